//! Load sessions and their measurements.

use contract::decision::Signal;
use contract::ids::{InstanceId, Name};
use contract::log::{Actor, StreamKind, StreamName};
use contract::resources::ProvisioningState;
use contract::time::{Span, Timestamp};
use domain::measure::{SignalSpec, Unit};

use super::people::Change;
use super::{Endpoint, FollowUps, Task};
use crate::documents::Green;
use crate::installation::SharedState;
use crate::usage::{self, Load, Minute};

const EVALUATION_INTERVAL: Span = Span::from_secs(20);
/// Time within which everything has scaled in after a session.
const SETTLE_TIME: Span = Span::from_secs(40 * 60);
const MINUTE: Span = Span::from_secs(60);
/// Delay of the last frames of a minute.
const CLOSES_AFTER: Span = Span::from_millis(1_200);
/// Period of the load.
const WAVE: Span = Span::from_secs(9 * 60);
/// Latency of a request on an idle instance, in seconds.
const LATENCY: f64 = 0.09;

/// A period of load.
pub(super) struct Session {
    from: Timestamp,
    until: Timestamp,
    /// Peak of requests in flight, without noise.
    peak: f64,
}

impl Session {
    /// Requests in flight, without noise: waves under a rising and falling envelope.
    fn concurrency(&self, now: Timestamp) -> f64 {
        if now >= self.until || now < self.from {
            return 0.0;
        }
        let (gone, whole) = (now.since(self.from), self.until.since(self.from));
        let part = gone.millis() as f64 / whole.millis() as f64;
        let wave = (gone.secs() % WAVE.secs()) as f64 / WAVE.secs() as f64;
        let height = 0.1 + 0.9 * (2.0 * wave - 1.0).abs();
        self.peak * height * (4.0 * part * (1.0 - part)).sqrt()
    }
}

impl Endpoint {
    pub(super) fn begin_later(&mut self, now: Timestamp, follow_ups: &mut FollowUps) {
        let hours = 6.0 + 60.0 * self.rng.f64();
        self.begins_at = now + Span::from_secs((hours * 3600.0) as u64);
        follow_ups.push((self.begins_at, Task::BeginLoad));
    }

    pub(super) fn begin(&mut self, now: Timestamp, follow_ups: &mut FollowUps) {
        let endpoint = self.fold.endpoint.as_ref();
        let lives = endpoint.is_some_and(|e| e.state != ProvisioningState::Deleting);
        // Ignore sessions of an earlier incarnation.
        if !lives || now < self.begins_at {
            return;
        }
        let rng = &mut self.rng;
        let until = now + Span::from_secs(rng.u64(15 * 60..70 * 60));
        // Mostly light load, sometimes a peak.
        let peak = match rng.u32(0..100) {
            0..88 => 0.003 + 0.02 * rng.f64() * rng.f64(),
            _ => 1.0 + 30.0 * rng.f64() * rng.f64(),
        };
        let middle = now + Span::from_secs(rng.u64(300..900));
        if let Some(change) = random_change(rng) {
            follow_ups.push((middle, Task::Change(change)));
        }
        if let Some(id) = self.any_ready() {
            match self.rng.u32(0..400) {
                0 => follow_ups.push((middle, Task::Failed(id))),
                1..9 => follow_ups.push((middle, Task::Unready(id))),
                _ => {}
            }
        }
        self.session = Some(Session {
            from: now,
            until,
            peak,
        });
        follow_ups.push((next_minute(now) + CLOSES_AFTER, Task::CloseMinute));
        self.evaluate_at(now, follow_ups);
        self.begin_later(until, follow_ups);
    }

    /// Schedules the next evaluation: soon while there is load or scaling in is pending, else at the end of a
    /// pin or when the profile changes.
    pub(super) fn schedule_evaluation(
        &mut self,
        is_stable: bool,
        now: Timestamp,
        follow_ups: &mut FollowUps,
    ) {
        let has_more = match &self.session {
            Some(session) => now < session.until + SETTLE_TIME,
            None => !is_stable,
        };
        if has_more {
            return self.evaluate_at(now + EVALUATION_INTERVAL, follow_ups);
        }
        self.session = None;
        let selections = self
            .evaluations
            .values()
            .filter_map(|state| state.selection);
        let transitions = selections.filter_map(|selection| selection.until());
        let endpoint = self.fold.endpoint.iter();
        let deployments = endpoint.flat_map(|endpoint| endpoint.deployments.values());
        let pins = deployments.filter_map(|deployment| deployment.pin?.until);
        if let Some(at) = transitions.chain(pins).filter(|at| *at > now).min() {
            self.evaluate_at(at, follow_ups);
        }
    }

    /// Schedules an evaluation, unless an earlier one is scheduled.
    pub(super) fn evaluate_at(&mut self, at: Timestamp, follow_ups: &mut FollowUps) {
        if self.evaluated_at.is_none_or(|known| at < known) {
            self.evaluated_at = Some(at);
            follow_ups.push((at, Task::Evaluate));
        }
    }

    /// The share of one deployment in the load.
    pub(super) fn load(&mut self, deployment: &Name, now: Timestamp) -> Load {
        let whole = self
            .session
            .as_ref()
            .map_or(0.0, |session| session.concurrency(now));
        let is_green = deployment.as_str() == "green";
        let share = match (self.shape.green, is_green) {
            (Green::None | Green::Mirrored, false) => 1.0,
            (Green::Live, false) => 0.9,
            (Green::Mirrored, true) => 0.45,
            (_, true) => 0.1,
        };
        let noise = 0.9 + 0.2 * self.rng.f64();
        Load {
            concurrency: whole * share * noise,
            latency: LATENCY,
            is_mirrored: is_green && self.shape.green == Green::Mirrored,
        }
    }

    pub(super) fn close_minute(
        &mut self,
        now: Timestamp,
        shared: &mut SharedState,
        follow_ups: &mut FollowUps,
    ) -> anyhow::Result<()> {
        let minute = next_minute(now) - MINUTE - MINUTE;
        let (Some(session), Some(endpoint)) = (&self.session, &self.fold.endpoint) else {
            return Ok(());
        };
        if minute >= session.until {
            return Ok(());
        }
        let deployments = endpoint.deployments.iter();
        let deployments = deployments.map(|(name, deployment)| (name.clone(), deployment.uid));
        let stream = StreamName::of(StreamKind::Usage, &self.key);
        for (name, uid) in deployments.collect::<Vec<_>>() {
            let loads = [0, 10, 20, 30, 40, 50].map(|second| {
                let at = minute + Span::from_secs(second);
                self.load(&name, at)
            });
            let instances = self.fold.instances.of(uid).filter(|i| i.is_ready());
            let ready: Vec<InstanceId> = instances.map(|i| i.id.clone()).collect();
            let rng = &mut self.rng;
            let mut summary = Minute::new((name, uid), minute, loads, &ready, rng);
            summary.counted = shared.frames(minute);
            let data = summary.data(std::mem::take(&mut self.is_first_minute))?;
            let actor = Actor::service("meter");
            shared
                .log
                .append_data(&stream, now, &actor, usage::TYPE, data);
        }
        follow_ups.push((now + MINUTE, Task::CloseMinute));
        Ok(())
    }
}

fn next_minute(now: Timestamp) -> Timestamp {
    Timestamp::from_secs((now.secs() / 60 + 1) * 60)
}

/// A random change by a user during a session.
fn random_change(rng: &mut fastrand::Rng) -> Option<Change> {
    Some(match rng.u32(0..1000) {
        0..30 => Change::Release,
        30..50 => Change::Policy,
        50..70 => Change::Traffic,
        70..85 => Change::Pin,
        85..110 => Change::Pause,
        110..115 => Change::Key,
        115..119 => Change::Delete,
        _ => return None,
    })
}

/// The signal that the autoscaler would have measured.
pub(super) fn signal(spec: &SignalSpec, load: Load, ready: u32, rng: &mut fastrand::Rng) -> Signal {
    let of_each = load.concurrency / f64::from(ready.max(1));
    // Beyond its concurrency limit an instance queues requests.
    let latency = load.latency * (1.0 + (of_each - 3.0).max(0.0) * 0.5);
    let value = match (spec.metric.name(), spec.metric.unit()) {
        ("concurrency", _) => load.concurrency,
        ("requests_per_second", _) => load.concurrency / latency,
        ("requests_per_minute", _) => 60.0 * load.concurrency / latency,
        (_, Unit::Number) => (of_each - 4.0).max(0.0),
        (_, Unit::Duration) => latency * 1000.0,
        (_, Unit::Ratio) => 0.02 * rng.f64(),
        (_, Unit::Percent) => (of_each * 22.0).min(100.0),
    };
    let partial = rng.u32(0..500) == 0;
    Signal {
        value: Some((value * 1000.0).round() / 1000.0),
        seconds_covered: spec.window_seconds() - u32::from(partial),
        seconds_wanted: spec.window_seconds(),
        partial,
        ..Signal::default()
    }
}
