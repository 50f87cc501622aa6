//! Generates a long log for `benches/start/run.py`: that of an installation of ENDPOINTS endpoints after some
//! months. The same `--seed` gives the same events.
//!
//! Everything that an engine decides comes from `domain`: commands on endpoints, decisions, requests about
//! instances and states, each computed from the log so far. Only external input is random: load, the
//! behaviour of instances, and user actions.
//!
//! * Endpoints are created during the first day: one deployment each, every fifth two (traffic 90/10, or a
//!   mirror); nine of ten deployments have an autoscale policy, of five shapes, one with office hours. One
//!   endpoint in four hundred is deleted in the course of a day and created again, the same name as another
//!   incarnation.
//! * About every 36 hours an endpoint has requests for 15 to 70 minutes: mostly a few, and every eighth time
//!   enough that it scales. Its deployments are evaluated every 20 seconds then, and each closes a minute of
//!   usage (`usage.closed`) every minute.
//! * So of the events of a long log about 80 % are usage, 9 % decisions with all their inputs, 9 % about
//!   instances (requested, started, ready, drained, removed, stopped; one start in fifty fails), and the rest
//!   documents, pins, pauses, keys, states, tokens and members. An event has 1.3 KB of data on average. A
//!   summary is printed at the end.
//! * It ends settled: every granted instance is ready, on the node whose id is in the folder.
//!   Instances are of the simulated backend, so that serving the folder starts no processes; their usage has
//!   CPU and memory as that of processes would have.
//!
//! Events are as db10201 writes them (usage in version 1), so that builds from then on can read the log. They
//! are imported like a copy of another store, in order and chained; so new events continue some way above.
//! Then the read models are built as in `penstock store rebuild`. Chart history is omitted, and the key that
//! seals endpoint keys does not exist, which control reports once when it starts.

mod documents;
mod endpoint;
mod installation;
mod log;
mod usage;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use control::ViewsProjector;
use domain::views::MODELS;
use serde_json::json;
use store::{RawRecord, Store, append_raw, rebuild};
use tokio::sync::mpsc;

use crate::installation::Installation;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Events per batch.
const BATCH: usize = 20_000;
/// Capacity of the queue to the store.
const BATCHES_MAX: usize = 2;

/// Writes a long log into an empty store.
#[derive(Parser)]
struct Options {
    /// The data folder to create, for `penstock serve --data`
    #[arg(long)]
    data: PathBuf,
    /// Another store than in the folder: an empty database, postgres://…
    #[arg(long)]
    store: Option<String>,
    /// Minimum number of events
    #[arg(long, default_value_t = 5_000_000)]
    events: u64,
    #[arg(long, default_value_t = 1000)]
    endpoints: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    ensure!(options.endpoints > 0, "--endpoints: give at least one");
    let installation = Installation::new(options.endpoints, options.seed);
    let node = installation.node().to_owned();
    make_folder(&options.data, &node)?;
    let url = options.store.clone().unwrap_or_else(|| {
        let file = options.data.join("penstock.db");
        format!("sqlite:{}", file.display())
    });
    let store = Store::open(&url).await.context("cannot open the store")?;
    if store.head().await?.0 != 0 {
        bail!("the store is not empty: use another one");
    }
    let started = Instant::now();
    let (batches, mut unwritten) = mpsc::channel::<Vec<RawRecord>>(BATCHES_MAX);
    let events = options.events;
    let generating =
        tokio::task::spawn_blocking(move || run_installation(installation, events, &batches));
    let mut written = 0;
    while let Some(batch) = unwritten.recv().await {
        written += append_raw(&store, batch).await?;
        let rate = written as f64 / started.elapsed().as_secs_f64();
        eprint!("\r{written} events, {rate:.0} a second ");
    }
    eprintln!();
    let installation = generating.await??;
    let seconds = started.elapsed().as_secs_f64();
    let rebuilding = Instant::now();
    let rows = rebuild(&store, &mut ViewsProjector::for_rebuild(), MODELS).await?;
    store.close().await;
    let counts: &BTreeMap<&'static str, u64> = installation.counts();
    let summary = json!({
        "events": written,
        "endpoints": options.endpoints,
        "seed": options.seed,
        "node": node,
        "from": installation::START,
        "to": installation.now(),
        "bytesOfData": installation.bytes(),
        "instances": installation.instances(),
        "byType": counts,
        "seconds": seconds,
        "eventsPerSecond": written as f64 / seconds,
        "rows": rows,
        "rowsSeconds": rebuilding.elapsed().as_secs_f64(),
    });
    println!("{summary}");
    Ok(())
}

/// Creates the folder with the node's id; `penstock serve` creates the rest.
fn make_folder(data: &Path, node: &str) -> anyhow::Result<()> {
    if data.join("penstock.db").exists() || data.join("node").exists() {
        bail!(
            "{} already contains a store: use another folder",
            data.display()
        );
    }
    std::fs::create_dir_all(data)
        .and_then(|()| std::fs::write(data.join("node"), format!("{node}\n")))
        .with_context(|| format!("cannot write into {}", data.display()))
}

/// Runs the simulation until there are enough events and everything in progress has completed.
fn run_installation(
    mut installation: Installation,
    events: u64,
    batches: &mpsc::Sender<Vec<RawRecord>>,
) -> anyhow::Result<Installation> {
    loop {
        let has_more = match installation.written() < events {
            true => installation.advance()?,
            false => installation.drain()?,
        };
        if installation.unwritten() >= BATCH || !has_more {
            // The receiver is gone only if the store has failed, which is reported there.
            let _ = batches.blocking_send(installation.take());
        }
        if !has_more {
            if let Some(endpoint) = installation.unsettled_endpoint() {
                bail!(
                    "{} has not settled at the end: the generator is wrong",
                    endpoint.name()
                );
            }
            return Ok(installation);
        }
    }
}
