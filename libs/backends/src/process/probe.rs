//! Readiness and liveness probes of one instance: over HTTP, by connecting, or of gRPC's health service.
//!
//! A start has its own limit, apart from readiness: an instance that has never been ready is ended once
//! the limit is over, and until then only reported to be starting, however often the probe fails.
//! Liveness is probed only if that was asked for, and once the instance has been ready, so that a model
//! that loads slowly is not replaced for being busy. An instance that fails it is reported and runs on: the
//! planner decides when its requests have ended.
//! A probe that cannot be made because of a resource shortage is neither a success nor a failure.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use contract::resources::{ProbeProtocol, ProbeSpec};
use contract::time::Span;
use http_body_util::Empty;
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::grpc_health;
use super::shortage::{ResourceLimits, SHORTAGE_RETRY_PAUSE, is_shortage};

/// A shorter period would keep the instance busy with probes.
const PERIOD_MIN: Duration = Duration::from_millis(10);

/// A start that takes longer is reported, with what it waits for.
const PROGRESS_AFTER: Duration = Duration::from_secs(3);
/// At most so many reports of one start.
const PROGRESS_MAX: u32 = 20;

/// The result of probing an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ProbeVerdict {
    /// Not ready yet, for this reason.
    Starting(String),
    Ready,
    Unready(String),
    /// The instance fails its liveness probe, for this reason.
    Unhealthy(String),
    /// The instance is to be ended, for this reason.
    Failed(String),
}

/// Counts consecutive results of one kind. Pure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Streak {
    successes: u32,
    failures: u32,
}

impl Streak {
    /// Returns `Some` when this result completes a streak of its kind.
    fn count(&mut self, success: bool, spec: &ProbeSpec) -> Option<bool> {
        let (this, other, threshold) = if success {
            (
                &mut self.successes,
                &mut self.failures,
                spec.success_threshold,
            )
        } else {
            (
                &mut self.failures,
                &mut self.successes,
                spec.failure_threshold,
            )
        };
        *other = 0;
        *this = this.saturating_add(1);
        (*this == threshold.max(1)).then_some(success)
    }
}

/// The probes of one instance.
#[derive(Clone, Debug)]
pub(super) struct Probes {
    pub address: SocketAddr,
    pub readiness: ProbeSpec,
    pub liveness: Option<ProbeSpec>,
    /// How long it may take from its start to ready.
    pub startup_limit: Span,
    /// How long its process has been running if it was adopted, and so is past its initial delay.
    pub adopted_after: Option<Duration>,
    pub resource_limits: ResourceLimits,
    /// Limits concurrent probe connections.
    pub slots: Arc<Semaphore>,
}

/// The outcome of one probe.
enum ProbeOutcome {
    Success,
    Failed(ProbeFailure),
    /// The probe could not be made.
    Shortage(io::Error),
}

/// Why a probe failed.
#[derive(Debug)]
enum ProbeFailure {
    /// Nothing listens on the port.
    Closed(SocketAddr),
    Unreachable(SocketAddr, io::Error),
    Status(u16),
    Late(Span),
    InvalidPath(String, hyper::http::Error),
    NoAnswer(hyper::Error),
    Other(Box<dyn Error + Send + Sync>),
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(address) => {
                let (port, hint) = (address.port(), listen_hint(*address));
                write!(f, "port {port} is closed{hint}")
            }
            Self::Unreachable(address, error) => {
                write!(
                    f,
                    "cannot connect to {address}: {error}{}",
                    listen_hint(*address)
                )
            }
            Self::Status(code) => write!(f, "it answered {code}"),
            Self::Late(limit) => write!(f, "no answer within {limit}"),
            Self::InvalidPath(path, error) => write!(f, "`{path}` is not a path: {error}"),
            Self::NoAnswer(error) => write!(f, "it gave no answer: {error}"),
            Self::Other(error) => write!(f, "{error}"),
        }
    }
}

impl Error for ProbeFailure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unreachable(_, error) => Some(error),
            Self::InvalidPath(_, error) => Some(error),
            Self::NoAnswer(error) => Some(error),
            Self::Other(error) => Some(error.as_ref()),
            Self::Closed(_) | Self::Status(_) | Self::Late(_) => None,
        }
    }
}

impl ProbeFailure {
    /// What a start waits for, and what to do if that will not come by itself.
    fn progress(&self, spec: &ProbeSpec) -> String {
        let probe = name(spec);
        match self {
            Self::Closed(_) | Self::Unreachable(..) => self.to_string(),
            Self::Status(404) => format!("{probe} answers 404: set `readinessProbe.path`"),
            Self::Status(code) => format!("{probe} answers {code}"),
            Self::Late(limit) => format!("{probe} gets no answer within {limit}"),
            Self::InvalidPath(..) | Self::NoAnswer(_) | Self::Other(_) => {
                format!("{probe}: {self}")
            }
        }
    }
}

/// The probe in messages.
fn name(spec: &ProbeSpec) -> String {
    match spec.protocol {
        ProbeProtocol::Http => format!("probe `{}`", spec.path),
        ProbeProtocol::Tcp => "tcp probe".into(),
        ProbeProtocol::Grpc if spec.service.is_empty() => "grpc probe".into(),
        ProbeProtocol::Grpc => format!("grpc probe of `{}`", spec.service),
    }
}

impl Probes {
    /// Runs until the receiver of verdicts is dropped.
    pub(super) async fn run(self, verdicts: mpsc::Sender<ProbeVerdict>) {
        let (was_ready, first_ready) = watch::channel(false);
        let _ = tokio::join!(
            self.watch_readiness(&verdicts, was_ready),
            self.watch_liveness(&verdicts, first_ready),
        );
    }

    async fn watch_readiness(
        &self,
        verdicts: &mpsc::Sender<ProbeVerdict>,
        was_ready: watch::Sender<bool>,
    ) -> Result<(), mpsc::error::SendError<ProbeVerdict>> {
        let (mut streak, mut ticks) = self.await_start(verdicts).await?;
        was_ready.send_replace(true);
        verdicts.send(ProbeVerdict::Ready).await?;
        let spec = &self.readiness;
        loop {
            ticks.tick().await;
            let answer = self.probe(spec).await;
            let verdict = match (streak.count(answer.is_ok(), spec), answer) {
                (Some(true), _) => ProbeVerdict::Ready,
                (Some(false), Err(failure)) => ProbeVerdict::Unready(failure.to_string()),
                _ => continue,
            };
            verdicts.send(verdict).await?;
        }
    }

    /// Returns once the instance is ready, to continue from. Reports what it waits for, and its failure once
    /// the time for a start is over.
    async fn await_start(
        &self,
        verdicts: &mpsc::Sender<ProbeVerdict>,
    ) -> Result<(Streak, Interval), mpsc::error::SendError<ProbeVerdict>> {
        let spec = &self.readiness;
        let begin = Instant::now();
        let deadline = begin + self.time_left_to_start();
        if self.adopted_after.is_none() {
            sleep(spec.initial_delay.to_std()).await;
        }
        let mut streak = Streak::default();
        let mut ticks = ticks(spec);
        let (mut reported, mut reports) = (String::new(), 0);
        loop {
            // The last probe is at the deadline, however long the period is.
            tokio::select! {
                biased;
                _ = ticks.tick() => {}
                () = sleep_until(deadline), if Instant::now() < deadline => {}
            }
            let answer = self.probe(spec).await;
            let completed = streak.count(answer.is_ok(), spec);
            let Err(failure) = answer else {
                match completed {
                    Some(true) => return Ok((streak, ticks)),
                    _ => continue,
                }
            };
            let progress = failure.progress(spec);
            if Instant::now() >= deadline {
                let limit = self.startup_limit;
                let reason = format!("not ready after {limit} (`startupTimeout`): {progress}");
                verdicts.send(ProbeVerdict::Failed(reason)).await?;
            } else if begin.elapsed() >= PROGRESS_AFTER
                && progress != reported
                && reports < PROGRESS_MAX
            {
                reports += 1;
                reported.clone_from(&progress);
                verdicts.send(ProbeVerdict::Starting(progress)).await?;
            }
        }
    }

    /// An adopted instance has what is left of its time, but is not ended for a few failed probes.
    fn time_left_to_start(&self) -> Duration {
        let limit = self.startup_limit.to_std();
        self.adopted_after.map_or(limit, |age| {
            let left = limit.saturating_sub(age);
            left.max(self.readiness.longest_streak().to_std())
        })
    }

    /// Probes once, retrying during resource shortages.
    async fn probe(&self, spec: &ProbeSpec) -> Result<(), ProbeFailure> {
        loop {
            // The semaphore is never closed.
            let slot = self.slots.acquire().await;
            match send_probe(self.address, spec).await {
                ProbeOutcome::Success => return Ok(()),
                ProbeOutcome::Failed(failure) => return Err(failure),
                ProbeOutcome::Shortage(error) => self
                    .resource_limits
                    .report_shortage("a probe of an instance", &error),
            }
            drop(slot);
            sleep(SHORTAGE_RETRY_PAUSE).await;
        }
    }

    /// Whether the readiness probe succeeds now.
    pub(super) async fn is_ready(&self) -> bool {
        self.probe(&self.readiness).await.is_ok()
    }

    async fn watch_liveness(
        &self,
        verdicts: &mpsc::Sender<ProbeVerdict>,
        mut first_ready: watch::Receiver<bool>,
    ) -> Result<(), mpsc::error::SendError<ProbeVerdict>> {
        let Some(spec) = &self.liveness else {
            return Ok(());
        };
        if first_ready.wait_for(|ready| *ready).await.is_err() {
            return Ok(());
        }
        sleep(spec.initial_delay.to_std()).await;
        let mut streak = Streak::default();
        let mut ticks = ticks(spec);
        loop {
            ticks.tick().await;
            let answer = self.probe(spec).await;
            if let (Some(false), Err(failure)) = (streak.count(answer.is_ok(), spec), answer) {
                let reason = format!(
                    "its liveness {} failed {} times in a row; the last: {failure}",
                    name(spec),
                    spec.failure_threshold.max(1)
                );
                // It is replaced, even if the probe succeeds again.
                return verdicts.send(ProbeVerdict::Unhealthy(reason)).await;
            }
        }
    }
}

fn ticks(spec: &ProbeSpec) -> Interval {
    let mut ticks = interval(spec.period.to_std().max(PERIOD_MIN));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn send_probe(address: SocketAddr, spec: &ProbeSpec) -> ProbeOutcome {
    let outcome = async {
        let stream = match TcpStream::connect(address).await {
            Ok(stream) => stream,
            Err(error) if is_shortage(&error) => return ProbeOutcome::Shortage(error),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return ProbeOutcome::Failed(ProbeFailure::Closed(address));
            }
            Err(error) => return ProbeOutcome::Failed(ProbeFailure::Unreachable(address, error)),
        };
        let answer = match spec.protocol {
            ProbeProtocol::Http => get(stream, address, &spec.path).await,
            ProbeProtocol::Tcp => Ok(()),
            ProbeProtocol::Grpc => grpc_health::check(stream, address, &spec.service)
                .await
                .map_err(|error| ProbeFailure::Other(error.into())),
        };
        answer.map_or_else(ProbeOutcome::Failed, |()| ProbeOutcome::Success)
    };
    let outcome = timeout(spec.timeout.to_std(), outcome).await;
    outcome.unwrap_or(ProbeOutcome::Failed(ProbeFailure::Late(spec.timeout)))
}

/// Uses a new connection for each probe: an instance that accepts none is not healthy.
async fn get(stream: TcpStream, address: SocketAddr, path: &str) -> Result<(), ProbeFailure> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| ProbeFailure::Other(error.into()))?;
    let request = Request::get(path)
        .header("host", address.to_string())
        .header("user-agent", "penstock-probe")
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| ProbeFailure::InvalidPath(path.to_owned(), error))?;
    // Dropping the sender and the body ends the connection, which is driven concurrently.
    let answer = async move {
        let response = sender.send_request(request).await;
        response.map(|response| response.status().as_u16())
    };
    let (status, _) = tokio::join!(answer, connection);
    match status {
        Ok(200..=399) => Ok(()),
        Ok(code) => Err(ProbeFailure::Status(code)),
        Err(error) => Err(ProbeFailure::NoAnswer(error)),
    }
}

/// Many servers listen on 127.0.0.1 by default.
fn listen_hint(address: SocketAddr) -> &'static str {
    match address.ip() == Ipv4Addr::LOCALHOST {
        true => "",
        false => "; this node's instances must listen on {host}, which is replaced in spec.command",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streak_completes_once_and_is_reset_by_the_opposite_result() {
        let spec = ProbeSpec {
            success_threshold: 2,
            failure_threshold: 3,
            ..ProbeSpec::readiness()
        };
        let mut streak = Streak::default();
        let answers = [
            true, false, true, true, true, false, false, true, false, false, false, false,
        ];
        let complete: Vec<_> = answers.map(|answer| streak.count(answer, &spec)).into();
        let expected = [
            None,
            None,
            None,
            Some(true),
            None,
            None,
            None,
            None,
            None,
            None,
            Some(false),
            None,
        ];
        assert_eq!(complete, expected);
    }
}
