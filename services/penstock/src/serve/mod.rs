//! `penstock serve`: wires all services, or those named, into one process, starts them in order and
//! stops them in reverse.
//!
//! Invariant: the ready file appears only when everything can serve; on the way out nobody loses
//! what it still needs: first the doors close, then the engines, then instances, meter, and last
//! the log.

mod admin;
mod archiver;
mod args;
mod backends;
mod config_file;
mod data_folder;
mod folder_logs;
mod history;
mod house;
mod log_lines;
mod means;
mod member_logs;
mod own_secrets;
mod plan;
mod secret;
mod services;
mod stages;
mod start;
mod supervisor;
mod zone_files;

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub use args::ServeArgs;
use house::House;
use means::Means;
use plan::Plan;
use stages::Stages;

/// Runs until SIGTERM or Ctrl-C.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    runtime::telemetry::start();
    let args = config_file::with_file(args)?;
    let plan = Plan::of(&args)?;
    for caution in plan.cautions(&args) {
        tracing::warn!("{caution}");
    }
    let means = Means::of(&args)?;
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .max(2);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("could not start the runtime")?;
    runtime.block_on(serve(args, plan, means))
}

async fn serve(args: ServeArgs, plan: Plan, means: Means) -> anyhow::Result<()> {
    // Handlers first: a signal during the start must not kill us with half-started instances.
    let mut signals = Signals::listen()?;
    let mut stages = Stages::default();
    let started = tokio::select! {
        started = House::start(&args, plan, means, &mut stages) => started.map(Some),
        () = signals.stop() => Ok(None),
    };
    let served = match &started {
        Ok(Some(house)) => tokio::select! {
            announced = house.announce(args.ready_file.as_deref()) => match announced {
                Ok(()) => { signals.stop().await; Ok(()) }
                Err(error) => Err(error),
            },
            () = signals.stop() => Ok(()),
        },
        _ => Ok(()),
    };
    if started.is_ok() {
        tracing::info!("stopping");
    }
    // Also what a start that failed has left behind: threads would keep the process.
    stages.end().await;
    if let Some(house) = started? {
        house.close().await;
    }
    served
}

/// The two ways of being asked to stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("could not listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("could not listen for Ctrl-C")?,
        })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
