//! `penstock serve`: wires all services, or those named, into one process, starts them in order and
//! stops them in reverse.
//!
//! Invariant: the ready file appears only when everything can serve; on the way out nobody loses
//! what it still needs: first the doors close, then the engines, then instances, meter, and last
//! the log.

mod admin;
mod config_file;
mod data_folder;
mod house;
mod member_logs;
mod plan;
mod ports;
mod secret;
mod sources;
mod start;
mod supervisor;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::serve_args::ServeArgs;
use house::House;
use plan::Plan;

/// Runs until SIGTERM or Ctrl-C.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    runtime::telemetry::start();
    let args = config_file::with_file(args)?;
    let plan = Plan::of(&args)?;
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .max(2);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("could not start the runtime")?;
    runtime.block_on(serve(args, plan))
}

async fn serve(args: ServeArgs, plan: Plan) -> anyhow::Result<()> {
    // Handlers first: a signal during the start must not kill us with half-started instances.
    let mut terminate = signal(SignalKind::terminate()).context("could not listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("could not listen for Ctrl-C")?;
    let house = House::start(&args, plan).await?;
    let stopped = tokio::select! {
        ready = house.announce(args.ready_file.as_deref()) => { ready?; false }
        _ = terminate.recv() => true,
        _ = interrupt.recv() => true,
    };
    if !stopped {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    tracing::info!("stopping");
    house.stop().await;
    Ok(())
}
