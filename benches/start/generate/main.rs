//! Writes a long log for `benches/start/run.py`: what an installation of ENDPOINTS endpoints leaves behind in
//! some months. The same `--seed` gives the same events.
//!
//! Nothing is made up that an engine decides: commands on endpoints, decisions, orders about instances and
//! states all come from `domain`, each fed with what stands in the log so far. What is drawn at random is what
//! comes from outside: when load comes and how much, how instances fare, what people do.
//!
//! * Endpoints are created during the first day: one deployment each, every fifth two (traffic 90/10, or a
//!   mirror); nine of ten deployments have an autoscale policy, of five shapes, one with office hours. One
//!   endpoint in four hundred is deleted in the course of a day and created again, the same name as another
//!   incarnation.
//! * About every 36 hours an endpoint has requests for 15 to 70 minutes: mostly a few, and every eighth time so
//!   many that it scales. Its deployments are evaluated every 20 seconds then, and each closes a minute of
//!   usage (`usage.closed`) every minute.
//! * So of the events of a long log some 80 in a hundred are usage, 9 decisions with all their inputs, 9 about
//!   instances (requested, started, ready, drained, removed, stopped; one start in fifty fails), and the rest
//!   documents, pins, pauses, keys, states, tokens and members. An event has 1.3 KB of data on average. What
//!   a run came to is printed at its end.
//! * It ends at rest: every granted instance is there and ready, on the node whose id stands in the folder.
//!   Instances are of the simulated backend, so that serving the folder starts no processes; their usage has
//!   CPU and memory as that of processes would have.
//!
//! Events are as db10201 writes them (usage in version 1), so that builds from then on can read the log. They
//! are taken in as a copy of another store's, in order, with their chain; so new events go on some way above.
//! Then the read models are made, as `penstock store rebuild` does it. History for charts is left out, and
//! nobody has the key that endpoints' keys are sealed with, which control says once when it starts.

mod documents;
mod endpoint;
mod house;
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

use crate::house::House;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Events that are handed over at a time.
const BATCH: usize = 20_000;
/// Batches that wait for the store.
const BATCHES_MAX: usize = 2;

/// Writes a long log into an empty store.
#[derive(Parser)]
struct Options {
    /// The data folder to make, for `penstock serve --data`
    #[arg(long)]
    data: PathBuf,
    /// The store, if it is not to be in the folder: an empty database, postgres://…
    #[arg(long)]
    store: Option<String>,
    /// At least so many events
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
    let house = House::new(options.endpoints, options.seed);
    let node = house.node().to_owned();
    make_folder(&options.data, &node)?;
    let url = options.store.clone().unwrap_or_else(|| {
        let file = options.data.join("penstock.db");
        format!("sqlite:{}", file.display())
    });
    let store = Store::open(&url).await.context("cannot open the store")?;
    if store.head().await?.0 != 0 {
        bail!("the store is not empty: name another one");
    }
    let started = Instant::now();
    let (batches, mut waiting) = mpsc::channel::<Vec<RawRecord>>(BATCHES_MAX);
    let events = options.events;
    let making = tokio::task::spawn_blocking(move || live(house, events, &batches));
    let mut written = 0;
    while let Some(batch) = waiting.recv().await {
        written += append_raw(&store, batch).await?;
        let rate = written as f64 / started.elapsed().as_secs_f64();
        eprint!("\r{written} events, {rate:.0} a second ");
    }
    eprintln!();
    let house = making.await??;
    let seconds = started.elapsed().as_secs_f64();
    let rebuilding = Instant::now();
    let rows = rebuild(&store, &mut ViewsProjector::for_rebuild(), MODELS).await?;
    store.close().await;
    let counts: &BTreeMap<&'static str, u64> = house.counts();
    let told = json!({
        "events": written,
        "endpoints": options.endpoints,
        "seed": options.seed,
        "node": node,
        "from": house::BEGINNING,
        "to": house.now(),
        "bytesOfData": house.bytes(),
        "instances": house.instances(),
        "byType": counts,
        "seconds": seconds,
        "eventsPerSecond": written as f64 / seconds,
        "rows": rows,
        "rowsSeconds": rebuilding.elapsed().as_secs_f64(),
    });
    println!("{told}");
    Ok(())
}

/// The folder with the id of its node; `penstock serve` makes whatever else it needs.
fn make_folder(data: &Path, node: &str) -> anyhow::Result<()> {
    if data.join("penstock.db").exists() || data.join("node").exists() {
        bail!(
            "{} holds a store already: name another folder",
            data.display()
        );
    }
    std::fs::create_dir_all(data)
        .and_then(|()| std::fs::write(data.join("node"), format!("{node}\n")))
        .with_context(|| format!("cannot write into {}", data.display()))
}

/// Lets time pass until there are so many events and everything under way has come to its end.
fn live(
    mut house: House,
    events: u64,
    batches: &mpsc::Sender<Vec<RawRecord>>,
) -> anyhow::Result<House> {
    loop {
        let goes_on = match house.written() < events {
            true => house.go_on()?,
            false => house.come_to_rest()?,
        };
        if house.waiting() >= BATCH || !goes_on {
            // Nobody waits for them only after the store has failed, which is told there.
            let _ = batches.blocking_send(house.take());
        }
        if !goes_on {
            if let Some(endpoint) = house.restless() {
                bail!(
                    "{} is not at rest at the end: the generator is wrong",
                    endpoint.name()
                );
            }
            return Ok(house);
        }
    }
}
