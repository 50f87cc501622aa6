//! `penstock serve`: wires the services into one process, starts them in order and stops them in
//! reverse.
//!
//! Invariant: the ready file appears only when everything can serve; on the way out nobody loses
//! what it still needs: first the doors close, then the engines, then instances, meter, and last
//! the log.

mod config_file;
mod data_folder;
mod house;
mod member_logs;
mod sources;
mod supervisor;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::serve_args::ServeArgs;
use house::House;

/// Runs until SIGTERM or Ctrl-C.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    runtime::telemetry::start();
    let args = config_file::with_file(args)?;
    check_services(&args)?;
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .max(2);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("could not start the runtime")?;
    runtime.block_on(serve(args))
}

async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    // Handlers first: a signal during the start must not kill us with half-started instances.
    let mut terminate = signal(SignalKind::terminate()).context("could not listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("could not listen for Ctrl-C")?;
    let house = House::start(&args).await?;
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

/// The services of the embedded default, which share one process.
const SERVICES: [&str; 5] = ["control", "gateway", "autoscaler", "actuator", "meter"];

/// With the bus inside the process there is nobody outside of it to talk to.
fn check_services(args: &ServeArgs) -> anyhow::Result<()> {
    if args.bus != "local" {
        anyhow::bail!(
            "--bus {} is not available: this version has `local` only",
            args.bus
        );
    }
    let named = |name: &str| args.services.iter().any(|service| service == name);
    for service in &args.services {
        if service != "all" && !SERVICES.contains(&service.as_str()) {
            anyhow::bail!(
                "--services: `{service}` is not a service of this version; use all, or {}",
                SERVICES.join(" ")
            );
        }
    }
    if !named("all") && !SERVICES.iter().all(|service| named(service)) {
        anyhow::bail!(
            "--services: with --bus local all services share one process; leave the flag out"
        );
    }
    Ok(())
}
