//! `penstock serve`: wires all services, or those named, into one process, starts them in order and
//! stops them by task group.
//!
//! Invariant: the ready file appears only when every service can serve; on shutdown nothing stops
//! before what depends on it: listeners first, then the controllers, the node agent and its instances,
//! the meter, and the log last.

mod admin;
mod archiver;
mod args;
mod backends;
mod config_file;
mod context;
mod data_folder;
mod descriptor_budget;
mod folder_logs;
mod history;
mod log_end;
mod log_lines;
mod member_logs;
mod own_secrets;
mod plan;
mod secret;
mod server;
mod service;
mod services;
mod start;
mod supervisor;
mod task_groups;
mod zone_files;

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub use args::ServeArgs;
use descriptor_budget::DescriptorBudget;
use plan::Plan;
use server::ServerProcess;
use services::SERVICES;
use task_groups::TaskGroups;

/// Runs until SIGTERM, Ctrl-C, or the end of its terminal.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    runtime::telemetry::start();
    let args = config_file::with_file(args)?;
    let plan = Plan::of(SERVICES, &args)?;
    for warning in plan.warnings(&args) {
        tracing::warn!(warning, "incomplete configuration");
    }
    let budget = DescriptorBudget::of(&args)?;
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .max(2);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("could not start the runtime")?;
    runtime.block_on(serve(args, plan, budget))
}

async fn serve(args: ServeArgs, plan: Plan, budget: DescriptorBudget) -> anyhow::Result<()> {
    // Before anything starts: a signal during startup must not kill us with half-started instances.
    let mut signals = Signals::listen()?;
    let mut groups = TaskGroups::default();
    let started = tokio::select! {
        started = ServerProcess::start(&args, plan, budget, &mut groups) => started.map(Some),
        () = signals.stop() => Ok(None),
    };
    let served = match &started {
        Ok(Some(server)) => tokio::select! {
            announced = server.announce_ready(args.ready_file.as_deref()) => match announced {
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
    // Also after a failed start: threads left behind would keep the process alive.
    groups.shutdown().await;
    let started = match started {
        Ok(started) => started,
        Err(error) => return Err(server::with_damage(error, &args).await),
    };
    if let Some(server) = started {
        server.close().await;
        let data = args.data.display();
        tracing::info!(%data, hint = "all data is kept; the next start continues from here", "stopped");
    }
    served
}

/// The signals that request a shutdown.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Sent when the terminal is closed. `None` if whoever started us has it ignored, as `nohup` does.
    hangup: Option<Signal>,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("could not listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("could not listen for Ctrl-C")?,
            hangup: (!is_hangup_ignored())
                .then(|| signal(SignalKind::hangup()))
                .transpose()
                .context("could not listen for SIGHUP")?,
        })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = async {
                match &mut self.hangup {
                    Some(hangup) => drop(hangup.recv().await),
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
}

/// Whether this process was started with SIGHUP ignored. Listening for the signal would undo that.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // Signal 1 is the lowest bit.
    mask.is_some_and(|mask| mask & 1 == 1)
}
