//! Readiness and liveness of one instance over HTTP.
//!
//! Readiness governs the start: an instance that is not ready in time is given up. Liveness is asked
//! from the first ready on, so that a model that loads slowly is not ended for being busy with it.
//! A probe for which we lack the means has not been made: it is neither a success nor a failure.

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

use super::lack::{LACK_PAUSE, Means, is_lack};

/// A shorter period would keep the instance busy with probes.
const PERIOD_MIN: Duration = Duration::from_millis(10);

/// What the probes have to say about an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Ready,
    Unready(String),
    /// It is to be ended, for this reason.
    Hopeless(String),
}

/// Counts answers in a row. Pure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Row {
    successes: u32,
    failures: u32,
}

impl Row {
    /// `Some` when this answer completes a row of its kind.
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

/// What is probed, and how.
#[derive(Clone, Debug)]
pub(super) struct Probes {
    pub address: SocketAddr,
    pub readiness: ProbeSpec,
    pub liveness: ProbeSpec,
    /// Runs for longer than any initial delay already.
    pub adopted: bool,
    pub means: Means,
    /// As many as there may be connections of probes.
    pub room: Arc<Semaphore>,
}

/// What came of one probe.
enum Asked {
    Answered,
    Failed(String),
    /// It could not be made.
    Lacking(std::io::Error),
}

impl Probes {
    /// Never returns unless nobody listens any more.
    pub(super) async fn run(self, verdicts: mpsc::Sender<Verdict>) {
        let (was_ready, first_ready) = watch::channel(false);
        let _ = tokio::join!(
            self.watch_readiness(&verdicts, was_ready),
            self.watch_liveness(&verdicts, first_ready),
        );
    }

    async fn watch_readiness(
        &self,
        verdicts: &mpsc::Sender<Verdict>,
        was_ready: watch::Sender<bool>,
    ) -> Result<(), mpsc::error::SendError<Verdict>> {
        let spec = &self.readiness;
        if !self.adopted {
            sleep(spec.initial_delay.to_std()).await;
        }
        let mut row = Row::default();
        let mut ticks = ticks(spec);
        loop {
            ticks.tick().await;
            let answer = self.probe(spec).await;
            let verdict = match (row.count(answer.is_ok(), spec), answer) {
                (Some(true), _) => {
                    was_ready.send_replace(true);
                    Verdict::Ready
                }
                (Some(false), Err(detail)) if *was_ready.borrow() => Verdict::Unready(detail),
                (Some(false), Err(detail)) => Verdict::Hopeless(self.not_ready(&detail)),
                _ => continue,
            };
            verdicts.send(verdict).await?;
        }
    }

    /// Asks as soon as there are the means for it.
    async fn probe(&self, spec: &ProbeSpec) -> Result<(), String> {
        loop {
            // It is never closed.
            let room = self.room.acquire().await;
            match ask(self.address, spec).await {
                Asked::Answered => return Ok(()),
                Asked::Failed(detail) => return Err(detail),
                Asked::Lacking(error) => self.means.lack("a probe of an instance", &error),
            }
            drop(room);
            sleep(LACK_PAUSE).await;
        }
    }

    fn not_ready(&self, detail: &str) -> String {
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
        verdicts: &mpsc::Sender<Verdict>,
        mut first_ready: watch::Receiver<bool>,
    ) -> Result<(), mpsc::error::SendError<Verdict>> {
        let spec = &self.liveness;
        if first_ready.wait_for(|ready| *ready).await.is_err() {
            return Ok(());
        }
        sleep(spec.initial_delay.to_std()).await;
        let mut row = Row::default();
        let mut ticks = ticks(spec);
        loop {
            ticks.tick().await;
            let answer = self.probe(spec).await;
            if let (Some(false), Err(detail)) = (row.count(answer.is_ok(), spec), answer) {
                let reason = format!(
                    "its liveness probe `{}` failed {} times in a row; the last: {detail}",
                    spec.path,
                    spec.failure_threshold.max(1)
                );
                verdicts.send(Verdict::Hopeless(reason)).await?;
            }
        }
    }
}

fn ticks(spec: &ProbeSpec) -> tokio::time::Interval {
    let mut ticks = interval(spec.period.to_std().max(PERIOD_MIN));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn ask(address: SocketAddr, spec: &ProbeSpec) -> Asked {
    let asked = async {
        match TcpStream::connect(address).await {
            Ok(stream) => match get(stream, address, &spec.path).await {
                Ok(()) => Asked::Answered,
                Err(detail) => Asked::Failed(detail),
            },
            Err(error) if is_lack(&error) => Asked::Lacking(error),
            Err(error) => Asked::Failed(format!(
                "cannot connect to {address}: {error}{}",
                where_to_listen(address)
            )),
        }
    };
    let asked = timeout(spec.timeout.to_std(), asked).await;
    asked.unwrap_or_else(|_| Asked::Failed(format!("no answer within {}", spec.timeout)))
}

/// A connection of its own for each probe: an instance that accepts no new ones is not healthy.
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
    // Dropping the sender and the body ends the connection, which is driven here beside it.
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

/// Many a server listens on 127.0.0.1 unless it is told otherwise.
fn where_to_listen(address: SocketAddr) -> &'static str {
    match address.ip() == Ipv4Addr::LOCALHOST {
        true => "",
        false => "; this node's instances must listen on {host}, which is replaced in spec.command",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_complete_once_and_is_broken_by_the_other_kind() {
        let spec = ProbeSpec {
            success_threshold: 2,
            failure_threshold: 3,
            ..ProbeSpec::readiness()
        };
        let mut row = Row::default();
        let answers = [
            true, false, true, true, true, false, false, true, false, false, false, false,
        ];
        let complete: Vec<_> = answers.map(|answer| row.count(answer, &spec)).into();
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
