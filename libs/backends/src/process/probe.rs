//! Readiness and liveness probes of one instance over HTTP.
//!
//! Readiness governs the start: an instance that is not ready in time is ended. Liveness is probed only
//! if that was asked for, and once the instance has been ready, so that a model that loads slowly is not
//! replaced for being busy. An instance that fails it is reported and runs on: the planner decides when
//! its requests have ended.
//! A probe that cannot be made because of a resource shortage is neither a success nor a failure.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use contract::resources::ProbeSpec;
use contract::time::Span;
use http_body_util::Empty;
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::shortage::{ResourceLimits, SHORTAGE_RETRY_PAUSE, is_shortage};

/// A shorter period would keep the instance busy with probes.
const PERIOD_MIN: Duration = Duration::from_millis(10);

/// The result of probing an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ProbeVerdict {
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
    /// Whether the instance was adopted, and so is past its initial delay.
    pub adopted: bool,
    pub resource_limits: ResourceLimits,
    /// Limits concurrent probe connections.
    pub slots: Arc<Semaphore>,
}

/// The outcome of one probe.
enum ProbeOutcome {
    Success,
    Failed(String),
    /// The probe could not be made.
    Shortage(std::io::Error),
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
        let spec = &self.readiness;
        if !self.adopted {
            sleep(spec.initial_delay.to_std()).await;
        }
        let mut streak = Streak::default();
        let mut ticks = ticks(spec);
        loop {
            ticks.tick().await;
            let answer = self.probe(spec).await;
            let verdict = match (streak.count(answer.is_ok(), spec), answer) {
                (Some(true), _) => {
                    was_ready.send_replace(true);
                    ProbeVerdict::Ready
                }
                (Some(false), Err(detail)) if *was_ready.borrow() => ProbeVerdict::Unready(detail),
                (Some(false), Err(detail)) => ProbeVerdict::Failed(self.not_ready_reason(&detail)),
                _ => continue,
            };
            verdicts.send(verdict).await?;
        }
    }

    /// Probes once, retrying during resource shortages.
    async fn probe(&self, spec: &ProbeSpec) -> Result<(), String> {
        loop {
            // The semaphore is never closed.
            let slot = self.slots.acquire().await;
            match send_probe(self.address, spec).await {
                ProbeOutcome::Success => return Ok(()),
                ProbeOutcome::Failed(detail) => return Err(detail),
                ProbeOutcome::Shortage(error) => self
                    .resource_limits
                    .report_shortage("a probe of an instance", &error),
            }
            drop(slot);
            sleep(SHORTAGE_RETRY_PAUSE).await;
        }
    }

    fn not_ready_reason(&self, detail: &str) -> String {
        let spec = &self.readiness;
        let delay = if self.adopted {
            0
        } else {
            spec.initial_delay.millis()
        };
        let allowed = delay + spec.period.millis() * u64::from(spec.failure_threshold.max(1));
        format!(
            "not ready after {} ({} probes of `{}` failed; the last: {detail})",
            Span::from_millis(allowed),
            spec.failure_threshold.max(1),
            spec.path
        )
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
            if let (Some(false), Err(detail)) = (streak.count(answer.is_ok(), spec), answer) {
                let reason = format!(
                    "its liveness probe `{}` failed {} times in a row; the last: {detail}",
                    spec.path,
                    spec.failure_threshold.max(1)
                );
                // It is replaced, even if the probe succeeds again.
                return verdicts.send(ProbeVerdict::Unhealthy(reason)).await;
            }
        }
    }
}

fn ticks(spec: &ProbeSpec) -> tokio::time::Interval {
    let mut ticks = interval(spec.period.to_std().max(PERIOD_MIN));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn send_probe(address: SocketAddr, spec: &ProbeSpec) -> ProbeOutcome {
    let outcome = async {
        match TcpStream::connect(address).await {
            Ok(stream) => match get(stream, address, &spec.path).await {
                Ok(()) => ProbeOutcome::Success,
                Err(detail) => ProbeOutcome::Failed(detail),
            },
            Err(error) if is_shortage(&error) => ProbeOutcome::Shortage(error),
            Err(error) => ProbeOutcome::Failed(format!(
                "cannot connect to {address}: {error}{}",
                listen_hint(address)
            )),
        }
    };
    let outcome = timeout(spec.timeout.to_std(), outcome).await;
    outcome.unwrap_or_else(|_| ProbeOutcome::Failed(format!("no answer within {}", spec.timeout)))
}

/// Uses a new connection for each probe: an instance that accepts none is not healthy.
async fn get(stream: TcpStream, address: SocketAddr, path: &str) -> Result<(), String> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let request = Request::get(path)
        .header("host", address.to_string())
        .header("user-agent", "penstock-probe")
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("`{path}` is not a path: {error}"))?;
    // Dropping the sender and the body ends the connection, which is driven concurrently.
    let answer = async move {
        let response = sender.send_request(request).await;
        response.map(|response| response.status().as_u16())
    };
    let (status, _) = tokio::join!(answer, connection);
    match status {
        Ok(200..=399) => Ok(()),
        Ok(code) => Err(format!("it answered {code}")),
        Err(error) => Err(format!("it gave no answer: {error}")),
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
