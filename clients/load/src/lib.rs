//! `penstock load`: an open-loop load generator.
//!
//! Requests are sent on schedule, whatever happened to earlier ones: a slow server faces a growing
//! number of open requests, as it would with real clients. Latency counts from when a request was
//! due, so a stall shows in every request that it delayed (no coordinated omission).
//!
//! Owns nothing but the run: the caller says where to send and with which key. Reading order:
//! `schedule` (when), `sender` (one request), `stats` (counts), `report` (for people and programs).

mod report;
mod schedule;
mod sender;
mod stats;
mod trace;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use contract::Span;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use report::LoadReport;
pub use schedule::Arrivals;
use schedule::{Rates, RequestSchedule};
use sender::{CompletedRequest, RequestTemplate, Sender};
use stats::LoadStats;

/// A flower, as the example scorer expects it.
const DEFAULT_DATA: &str = r#"{"data":[[5.1,3.5,1.4,0.2]]}"#;
/// Maximum number of requests that are due and have not ended, to bound memory. Beyond it the
/// generator itself waits, which the report shows.
const PENDING_MAX: usize = 100_000;
/// Longest sleep of the dispatcher, so that it notices a stop.
const STOP_CHECK: Duration = Duration::from_millis(50);
/// Seconds between progress lines when they cannot be redrawn in place.
const PROGRESS_INTERVAL_SECONDS: u64 = 5;

/// Send load to an endpoint at a given rate and measure the responses
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock load iris --rate 50 --for 1m
  penstock load iris --trace deploy/examples/traces/diurnal-1h.txt.gz --compress 60 --scale-rate 0.4
  penstock load --url http://127.0.0.1:9000/score --rate 200 --for 10s --data '{\"data\":[[5.1,3.5,1.4,0.2]]}'

Latency counts from when a request was due, not from when it could be sent.")]
pub struct LoadArgs {
    /// The endpoint to load
    #[arg(value_name = "ENDPOINT", required_unless_present = "url")]
    pub endpoint: Option<String>,
    /// A full scoring URL, instead of an endpoint's name
    #[arg(long, conflicts_with = "endpoint")]
    pub url: Option<String>,
    /// The key to send; the endpoint's primary key unless given
    #[arg(long, env = "PENSTOCK_KEY", hide_env_values = true)]
    pub key: Option<String>,
    /// Pick one deployment instead of following the traffic split
    #[arg(long, value_name = "NAME")]
    pub deployment: Option<String>,

    /// Requests per second
    #[arg(long, value_name = "N", required_unless_present = "trace", value_parser = positive)]
    pub rate: Option<f64>,
    /// A file with one count per line, plain or gzip
    #[arg(long, value_name = "FILE", conflicts_with = "rate")]
    pub trace: Option<PathBuf>,
    /// The time that one line of the trace covers
    #[arg(long, value_name = "TIME", default_value = "1s")]
    pub step: Span,
    /// Play the trace this many times faster, at the same rates: 60 puts an hour into a minute
    #[arg(long, value_name = "TIMES", default_value = "1", value_parser = positive)]
    pub compress: f64,
    /// Multiply all rates
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = positive)]
    pub scale_rate: f64,
    /// Stop after this time; without it, at the trace's end or on Ctrl-C
    #[arg(long = "for", visible_alias = "duration", value_name = "TIME")]
    pub duration: Option<Span>,
    /// How requests are spaced at a given rate
    #[arg(long, value_enum, default_value_t)]
    pub arrivals: Arrivals,
    /// For Poisson arrivals: the same seed gives the same requests at the same times
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// The body of each request: JSON, or the name of a file
    #[arg(long, value_name = "FILE|JSON", default_value = DEFAULT_DATA)]
    pub data: String,
    /// Maximum number of concurrent requests
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = connections)]
    pub connections: usize,
    /// How long to wait for a response
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub timeout: Span,

    /// Exit with 1 if more requests than this fail
    #[arg(long, value_name = "N")]
    pub max_errors: Option<u64>,
    /// Chart load and instances over time at the end
    #[arg(long)]
    pub chart: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: LoadFormat,
    /// Also write the report as JSON to this file
    #[arg(long, value_name = "FILE")]
    pub report_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LoadFormat {
    /// For people
    #[default]
    Text,
    Json,
}

/// Returns the ready instances by deployment.
pub type InstanceSampler =
    Arc<dyn Fn() -> BoxFuture<'static, Result<BTreeMap<String, u32>>> + Send + Sync>;

/// Where the load goes, and how to sample instances.
#[derive(Clone)]
pub struct LoadTarget {
    /// The full scoring URL; `http` only.
    pub url: String,
    pub key: Option<String>,
    /// Called once a second. `None`: the report has no instances.
    pub instances: Option<InstanceSampler>,
}

/// Sends the load and returns the report. Shows progress on standard error. Ctrl-C ends the run
/// with the results so far, a second Ctrl-C immediately. Writes `--report-file`; the caller prints
/// the report.
pub async fn run(args: &LoadArgs, target: LoadTarget) -> Result<LoadReport> {
    let stop = CancellationToken::new();
    let abandon = CancellationToken::new();
    let signals = tokio::spawn(watch_interrupts(stop.clone(), abandon.clone()));
    let report = run_until(args, target, StopSignals { stop, abandon }).await;
    signals.abort();
    let report = report?;
    if let Some(path) = &args.report_file {
        write_report(path, &report)?;
    }
    Ok(report)
}

async fn watch_interrupts(stop: CancellationToken, abandon: CancellationToken) {
    for token in [stop, abandon] {
        if tokio::signal::ctrl_c().await.is_err() {
            return;
        }
        token.cancel();
    }
}

fn write_report(path: &Path, report: &LoadReport) -> Result<()> {
    let json = serde_json::to_vec_pretty(report)?;
    std::fs::write(path, json)
        .with_context(|| format!("cannot write the report to {}", path.display()))
}

/// `stop`: send no more. `abandon`: do not wait for open requests either.
struct StopSignals {
    stop: CancellationToken,
    abandon: CancellationToken,
}

/// Input of the recorder.
enum RecorderEvent {
    Completed(Box<CompletedRequest>),
    Instances(u64, BTreeMap<String, u32>),
}

async fn run_until(args: &LoadArgs, target: LoadTarget, stop: StopSignals) -> Result<LoadReport> {
    let rates = rates(args)?;
    let template = RequestTemplate {
        url: target.url.clone(),
        key: target.key,
        deployment: args.deployment.clone(),
        body: body(&args.data)?,
    };
    let sender = Sender::new(&template, args.connections, duration(args.timeout))?;
    let end = args.duration.map(duration);
    let schedule = RequestSchedule::new(rates.clone(), end, args.arrivals, args.seed);
    let length = [rates.length(), end].into_iter().flatten().min();

    // Unbounded: a request that had to wait to be recorded would delay those that are due. Each
    // event is a few numbers, and the recorder does nothing else.
    let (events, receiver) = mpsc::unbounded_channel();
    let start = Instant::now();
    let due_count = Arc::new(AtomicU64::new(0));
    let sampling = target
        .instances
        .map(|sampler| tokio::spawn(sample_instances(sampler, start, events.clone())));
    let progress = Progress {
        rates,
        length,
        due: due_count.clone(),
        is_terminal: std::io::stderr().is_terminal(),
    };
    let recorder = tokio::spawn(record(receiver, start, progress));

    let pending = TaskTracker::new();
    let dispatcher = Dispatcher {
        start,
        sender,
        events: events.clone(),
        pending: pending.clone(),
        due_count: due_count.clone(),
        stop: stop.stop.clone(),
        runtime: Handle::current(),
    };
    tokio::task::spawn_blocking(move || dispatcher.run(schedule))
        .await
        .context("the dispatcher failed")?;
    // The schedule ends with its last second, not with its last request.
    if let Some(length) = length {
        tokio::select! {
            () = tokio::time::sleep_until(start + length) => {}
            () = stop.stop.cancelled() => {}
        }
    }
    let elapsed = start.elapsed();
    pending.close();
    tokio::select! {
        () = pending.wait() => {}
        () = stop.abandon.cancelled() => {}
    }
    if let Some(sampling) = sampling {
        sampling.abort();
    }
    let open = pending.len() as u64;
    drop(events);
    let stats = match open {
        0 => recorder.await.context("the recorder failed")?,
        // Open requests still hold the channel; their senders end with the process.
        _ => bail!("interrupted with {open} requests still open: no report"),
    };
    Ok(LoadReport::new(
        target.url,
        due_count.load(Ordering::Relaxed),
        elapsed,
        stop.stop.is_cancelled(),
        args.max_errors,
        stats.totals(),
    ))
}

/// Starts each request when it is due, without waiting for any. Runs on its own thread: the
/// runtime's timer has millisecond resolution, which is longer than many a response takes.
struct Dispatcher {
    start: Instant,
    sender: Arc<Sender>,
    events: mpsc::UnboundedSender<RecorderEvent>,
    pending: TaskTracker,
    due_count: Arc<AtomicU64>,
    stop: CancellationToken,
    runtime: Handle,
}

impl Dispatcher {
    fn run(self, schedule: RequestSchedule) {
        let permits = Arc::new(Semaphore::new(PENDING_MAX));
        for due in schedule {
            let Some(permit) = self.wait_until(self.start + due, &permits) else {
                return;
            };
            self.due_count.fetch_add(1, Ordering::Relaxed);
            let (sender, events, start) = (self.sender.clone(), self.events.clone(), self.start);
            let request = async move {
                let completed = sender.send(start, due).await;
                drop(permit);
                // The recorder outlives all senders, unless the process is ending.
                let _ = events.send(RecorderEvent::Completed(Box::new(completed)));
            };
            self.pending.spawn_on(request, &self.runtime);
        }
    }

    /// Returns `None` when stopped.
    fn wait_until(&self, due: Instant, permits: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        while !self.stop.is_cancelled() {
            let left = due.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                std::thread::sleep(left.min(STOP_CHECK));
            } else if let Ok(permit) = permits.clone().try_acquire_owned() {
                return Some(permit);
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        None
    }
}

async fn sample_instances(
    sampler: InstanceSampler,
    start: Instant,
    events: mpsc::UnboundedSender<RecorderEvent>,
) {
    let mut ticks = tokio::time::interval_at(start, Duration::from_secs(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        let second = start.elapsed().as_secs();
        // A second without a sample stays empty in the report, which is better than a wrong count.
        if let Ok(instances) = sampler().await
            && events
                .send(RecorderEvent::Instances(second, instances))
                .is_err()
        {
            return;
        }
    }
}

/// Owns the counts: receives events until all senders are gone.
async fn record(
    mut receiver: mpsc::UnboundedReceiver<RecorderEvent>,
    start: Instant,
    progress: Progress,
) -> LoadStats {
    let mut stats = LoadStats::new();
    let first = start + Duration::from_secs(1);
    let mut ticks = tokio::time::interval_at(first, Duration::from_secs(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            event = receiver.recv() => match event {
                Some(RecorderEvent::Completed(completed)) => stats.record(&completed),
                Some(RecorderEvent::Instances(second, instances)) => stats.sample(second, instances),
                None => break,
            },
            _ = ticks.tick() => progress.show(&mut stats, start.elapsed()),
        }
    }
    progress.finish();
    stats
}

/// The progress line on standard error.
struct Progress {
    rates: Rates,
    length: Option<Duration>,
    due: Arc<AtomicU64>,
    is_terminal: bool,
}

impl Progress {
    fn show(&self, stats: &mut LoadStats, elapsed: Duration) {
        if !self.is_terminal && !elapsed.as_secs().is_multiple_of(PROGRESS_INTERVAL_SECONDS) {
            return;
        }
        let recent = stats.take_recent();
        let latency = stats::percentiles(&recent.latency);
        let line = report::ProgressLine {
            elapsed,
            length: self.length,
            rate: self.rates.at(elapsed),
            sent: self.due.load(Ordering::Relaxed),
            ok: stats.ok,
            errors: stats.errors(),
            latency: (recent.completed > 0).then_some(latency),
            instances: stats.instances_now(),
        };
        let mut out = std::io::stderr().lock();
        // A closed standard error is no reason to stop the run.
        let _ = match self.is_terminal {
            true => write!(out, "\r\x1b[2K{line}").and_then(|()| out.flush()),
            false => writeln!(out, "{line}"),
        };
    }

    fn finish(&self) {
        if self.is_terminal {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[2K");
        }
    }
}

fn rates(args: &LoadArgs) -> Result<Rates> {
    match (&args.trace, args.rate) {
        (Some(path), _) => {
            if args.step == Span::ZERO {
                bail!("--step is 0: give the time that one line of the trace covers, such as 1s");
            }
            let counts = trace::read(path)?;
            Ok(Rates::from_trace(
                &counts,
                duration(args.step),
                args.compress,
                args.scale_rate,
            ))
        }
        (None, Some(rate)) => Ok(Rates::Constant(rate * args.scale_rate)),
        (None, None) => bail!("no load given: use --rate N or --trace FILE"),
    }
}

/// Returns valid JSON as the body itself; anything else is the name of a file.
fn body(data: &str) -> Result<Bytes> {
    if serde_json::from_str::<serde_json::Value>(data).is_ok() {
        return Ok(Bytes::copy_from_slice(data.as_bytes()));
    }
    let read = std::fs::read(data);
    let bytes =
        read.with_context(|| format!("--data `{data}` is neither JSON nor a readable file"))?;
    Ok(bytes.into())
}

fn duration(span: Span) -> Duration {
    Duration::from_millis(span.millis())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= 1e6 => Ok(number),
        _ => Err("expected a number above 0 and at most 1000000".to_owned()),
    }
}

fn connections(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if (1..=65_536).contains(&number) => Ok(number),
        _ => Err("expected a whole number from 1 to 65536".to_owned()),
    }
}
