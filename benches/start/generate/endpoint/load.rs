//! Load, and what is measured of it.

use contract::decision::Signal;
use contract::ids::{InstanceId, Name};
use contract::log::{Actor, StreamKind, StreamName};
use contract::resources::ProvisioningState;
use contract::time::{Span, Timestamp};
use domain::measure::{SignalSpec, Unit};

use super::people::Change;
use super::{Endpoint, Followed, Task};
use crate::documents::Green;
use crate::house::Ground;
use crate::usage::{self, Load, Minute};

const EVALUATE_EVERY: Span = Span::from_secs(20);
/// What scaled out is let go of within this time after the load.
const CALMS_DOWN: Span = Span::from_secs(40 * 60);
const MINUTE: Span = Span::from_secs(60);
/// The last frames of a minute come this late.
const CLOSES_AFTER: Span = Span::from_millis(1_200);
/// Load comes and goes.
const WAVE: Span = Span::from_secs(9 * 60);
/// Seconds that a request takes of an instance with nothing else to do.
const LATENCY: f64 = 0.09;

/// Some time with load.
pub(super) struct Session {
    from: Timestamp,
    until: Timestamp,
    /// Most requests in flight, but for noise.
    peak: f64,
}

impl Session {
    /// Requests in flight, without noise: they become more, and then fewer, in waves.
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
    pub(super) fn begin_later(&mut self, now: Timestamp, followed: &mut Followed) {
        let hours = 6.0 + 60.0 * self.rng.f64();
        self.begins_at = now + Span::from_secs((hours * 3600.0) as u64);
        followed.push((self.begins_at, Task::Begin));
    }

    pub(super) fn begin(&mut self, now: Timestamp, followed: &mut Followed) {
        let endpoint = self.fold.endpoint.as_ref();
        let lives = endpoint.is_some_and(|e| e.state != ProvisioningState::Deleting);
        // Another incarnation has plans of its own.
        if !lives || now < self.begins_at {
            return;
        }
        let rng = &mut self.rng;
        let until = now + Span::from_secs(rng.u64(15 * 60..70 * 60));
        // Mostly somebody tries something; sometimes everybody comes.
        let peak = match rng.u32(0..100) {
            0..88 => 0.003 + 0.02 * rng.f64() * rng.f64(),
            _ => 1.0 + 30.0 * rng.f64() * rng.f64(),
        };
        let middle = now + Span::from_secs(rng.u64(300..900));
        if let Some(change) = drawn_change(rng) {
            followed.push((middle, Task::Change(change)));
        }
        if let Some(id) = self.any_ready() {
            match self.rng.u32(0..400) {
                0 => followed.push((middle, Task::Failed(id))),
                1..9 => followed.push((middle, Task::Unready(id))),
                _ => {}
            }
        }
        self.session = Some(Session {
            from: now,
            until,
            peak,
        });
        followed.push((next_minute(now) + CLOSES_AFTER, Task::CloseMinute));
        self.evaluate_at(now, followed);
        self.begin_later(until, followed);
    }

    /// An evaluation has been done: while there is load, or something to calm down, another follows; else
    /// at the end of a pin, or when the profile changes.
    pub(super) fn evaluate_again(
        &mut self,
        is_calm: bool,
        now: Timestamp,
        followed: &mut Followed,
    ) {
        let goes_on = match &self.session {
            Some(session) => now < session.until + CALMS_DOWN,
            None => !is_calm,
        };
        if goes_on {
            return self.evaluate_at(now + EVALUATE_EVERY, followed);
        }
        self.session = None;
        let selections = self
            .watched
            .values()
            .filter_map(|watched| watched.selection);
        let transitions = selections.filter_map(|selection| selection.until());
        let endpoint = self.fold.endpoint.iter();
        let deployments = endpoint.flat_map(|endpoint| endpoint.deployments.values());
        let pins = deployments.filter_map(|deployment| deployment.pin?.until);
        if let Some(at) = transitions.chain(pins).filter(|at| *at > now).min() {
            self.evaluate_at(at, followed);
        }
    }

    /// Unless it is evaluated before anyway.
    pub(super) fn evaluate_at(&mut self, at: Timestamp, followed: &mut Followed) {
        if self.evaluated_at.is_none_or(|known| at < known) {
            self.evaluated_at = Some(at);
            followed.push((at, Task::Evaluate));
        }
    }

    /// What one deployment has of the load.
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
        ground: &mut Ground,
        followed: &mut Followed,
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
            let mut told = Minute::new((name, uid), minute, loads, &ready, rng);
            told.counted = ground.frames(minute);
            let data = told.data(std::mem::take(&mut self.is_first_minute))?;
            let actor = Actor::service("meter");
            ground
                .log
                .append_data(&stream, now, &actor, usage::TYPE, data);
        }
        followed.push((now + MINUTE, Task::CloseMinute));
        Ok(())
    }
}

fn next_minute(now: Timestamp) -> Timestamp {
    Timestamp::from_secs((now.secs() / 60 + 1) * 60)
}

/// What people change while an endpoint is in use.
fn drawn_change(rng: &mut fastrand::Rng) -> Option<Change> {
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

/// What the autoscaler would have measured.
pub(super) fn signal(spec: &SignalSpec, load: Load, ready: u32, rng: &mut fastrand::Rng) -> Signal {
    let of_each = load.concurrency / f64::from(ready.max(1));
    // Beyond some requests at a time, an instance only makes them wait.
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
        warming: false,
    }
}
