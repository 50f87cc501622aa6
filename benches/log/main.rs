//! The log compared with the limits of its engines at the same durability, and its replay:
//!
//! * `appends`: one event each from many concurrent committers, compared with plain batched inserts into
//!   the same indexed table (bar: at least half as fast), on SQLite and on PostgreSQL;
//! * `relay`: the durable relay draining a backlog from the embedded store to Kafka, including its cursor,
//!   compared with a plain producer loop with the same messages (bar: a quarter as fast);
//! * `replay`: a long log from the embedded store into memory (bar: 150,000 events/s) and into all
//!   persisted read models (bar: 50,000 events/s), as `penstock store rebuild` does it.
//!
//! `make bench-log`, or `cargo bench -p penstock --bench log -- [PART]…` for some parts. `ROUNDS`,
//! `EVENTS` per round of appends, `BACKLOG` of the relay and `REPLAY` are numbers; `FOLDER` is for
//! files (on a disk, not in memory, for meaningful numbers); `PENSTOCK_TEST_POSTGRES`,
//! `PENSTOCK_TEST_KAFKA` and `PENSTOCK_SKIP` as in the tests. Results are also written to
//! `OUT`, by default `benches/log/results`.

#![allow(clippy::unwrap_used)]

mod appends;
mod history;
mod relay;
mod replay;
mod table;

use std::path::PathBuf;
use std::str::FromStr;

use servers::{Kafka, Postgres};
use table::Measurement;
use tempfile::TempDir;

/// As in the binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PARTS: [&str; 3] = ["appends", "relay", "replay"];

/// The settings of a run.
pub struct Options {
    rounds: usize,
    /// Events per round of appends.
    events: usize,
    /// Events in the relay's backlog.
    backlog: usize,
    /// Events of the log that is replayed.
    replay: usize,
    /// The folder for databases.
    folder: TempDir,
}

impl Options {
    fn read() -> Self {
        let folder = set("FOLDER").unwrap_or_else(std::env::temp_dir);
        Self {
            rounds: set("ROUNDS").unwrap_or(5),
            events: set("EVENTS").unwrap_or(20_000),
            backlog: set("BACKLOG").unwrap_or(200_000),
            replay: set("REPLAY").unwrap_or(1_000_000),
            folder: tempfile::tempdir_in(folder).unwrap(),
        }
    }

    /// The path of a database file.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn set<T: FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    match text.parse() {
        Ok(value) => Some(value),
        Err(_) => {
            panic!("{name}={text} cannot be read: give a number, or a path for FOLDER and OUT")
        }
    }
}

fn main() {
    // Cargo adds arguments.
    let named: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    if let Some(unknown) = named.iter().find(|name| !PARTS.contains(&name.as_str())) {
        panic!(
            "there is no part `{unknown}`: there are {}",
            PARTS.join(", ")
        );
    }
    let wanted = |part: &str| named.is_empty() || named.iter().any(|name| name == part);
    let options = Options::read();
    // Started here because that blocks. Not the shared PostgreSQL, which runs without fsync.
    let postgres = wanted("appends").then(Postgres::start).flatten();
    let kafka = wanted("relay").then(Kafka::shared).flatten();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let lines = runtime.block_on(async {
        let mut lines: Vec<Measurement> = Vec::new();
        if wanted("appends") {
            lines.push(appends::on_sqlite(&options).await);
        }
        if let Some(postgres) = postgres {
            lines.push(
                appends::on_postgres(&options, &postgres.database(), &postgres.database()).await,
            );
        }
        if let Some(kafka) = kafka {
            lines.push(relay::drain(&options, kafka).await);
        }
        if wanted("replay") {
            lines.extend(replay::both(&options).await);
        }
        lines
    });
    let out = set("OUT").unwrap_or_else(|| table::results_file("results"));
    table::show(&lines, &options, &out);
    if lines.iter().any(|line| !line.is_met()) {
        std::process::exit(1);
    }
}
