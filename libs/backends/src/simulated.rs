//! Simulated instances, for simulations and experiments.
//!
//! [`SimulatedInstances`] is pure: what happens, and when, depends only on the spec, the instance's id
//! and its generation, so that a run in virtual time and a live one see the same. Time is an argument;
//! [`SimulatedBackend`] wraps it as a [`Backend`] and is advanced by whoever owns the clock. Simulated
//! instances do not outlive the process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use contract::ids::InstanceId;
use contract::resources::SimulatedSpec;
use contract::time::{Span, Timestamp};
use tokio::sync::mpsc;

use crate::watchers::Watchers;
use crate::{Backend, BackendError, ObservedInstance, ObservedPhase, ResourceSample, StartSpec};

/// Exit code of a simulated crash: what a shell reports for a process that aborts.
const CRASH_CODE: i32 = 134;
const FAILED_START_CODE: i32 = 1;

/// All simulated instances of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct SimulatedInstances {
    node: String,
    now: Timestamp,
    instances: BTreeMap<InstanceId, SimulatedInstance>,
    /// Upcoming changes, including stale ones, which are skipped.
    schedule: BTreeSet<(Timestamp, InstanceId)>,
}

#[derive(Clone, Debug, PartialEq)]
struct SimulatedInstance {
    generation: u64,
    phase: ObservedPhase,
    lifecycle: Lifecycle,
    /// The next change, and when it is due.
    next: Option<(Timestamp, LifecycleChange)>,
}

/// The random lifecycle of an instance, drawn when it is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lifecycle {
    start_delay: Span,
    start_fails: bool,
    /// Time from ready to the crash.
    lifetime: Option<Span>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LifecycleChange {
    StartEnds,
    Crash,
}

impl SimulatedInstances {
    /// Creates a node without instances, with this id and at this time.
    pub fn new(node: &str, now: Timestamp) -> Self {
        Self {
            node: node.to_owned(),
            now,
            instances: BTreeMap::new(),
            schedule: BTreeSet::new(),
        }
    }

    /// Starts the instance now. Returns what changed.
    ///
    /// # Errors
    ///
    /// [`BackendError::Stale`] after a newer request, or a removal of this generation.
    pub fn ensure(&mut self, start: &StartSpec) -> Result<Option<ObservedInstance>, BackendError> {
        if let Some(instance) = self.instances.get_mut(&start.id) {
            let is_removed = matches!(instance.phase, ObservedPhase::Removed { .. });
            if start.generation < instance.generation
                || is_removed && start.generation == instance.generation
            {
                return Err(BackendError::Stale {
                    id: start.id.clone(),
                    requested: start.generation,
                    newest: instance.generation,
                });
            }
            let has_ended = is_removed || matches!(instance.phase, ObservedPhase::Exited { .. });
            if !has_ended {
                instance.generation = start.generation;
                return Ok(None);
            }
            if start.generation == instance.generation {
                return Ok(self.observed(&start.id));
            }
        }
        let spec = start.spec.simulated.clone().unwrap_or_default();
        let lifecycle = Lifecycle::draw(&spec, start);
        let instance = SimulatedInstance {
            generation: start.generation,
            phase: ObservedPhase::Starting,
            next: Some((self.now + lifecycle.start_delay, LifecycleChange::StartEnds)),
            lifecycle,
        };
        self.schedule
            .extend(instance.next.map(|(at, _)| (at, start.id.clone())));
        self.instances.insert(start.id.clone(), instance);
        Ok(self.observed(&start.id))
    }

    /// Removes the instance at once, since simulated instances have nothing to finish.
    ///
    /// # Errors
    ///
    /// [`BackendError::Stale`] after a newer request.
    pub fn remove(
        &mut self,
        id: &InstanceId,
        generation: u64,
    ) -> Result<Option<ObservedInstance>, BackendError> {
        let instance = self
            .instances
            .entry(id.clone())
            .or_insert(SimulatedInstance {
                generation,
                phase: ObservedPhase::Removed { code: None },
                lifecycle: Lifecycle::NONE,
                next: None,
            });
        if generation < instance.generation {
            return Err(BackendError::Stale {
                id: id.clone(),
                requested: generation,
                newest: instance.generation,
            });
        }
        instance.generation = generation;
        instance.next = None;
        instance.phase = match instance.phase {
            ObservedPhase::Exited { code, .. } | ObservedPhase::Removed { code } => {
                ObservedPhase::Removed { code }
            }
            _ => ObservedPhase::Removed { code: Some(0) },
        };
        Ok(self.observed(id))
    }

    /// Advances the simulation to `now` and returns the changes in order of time. An earlier time has no
    /// effect.
    pub fn step(&mut self, now: Timestamp) -> Vec<ObservedInstance> {
        let mut changes = Vec::new();
        while self.next_at().is_some_and(|at| at <= now)
            && let Some((at, id)) = self.schedule.pop_first()
        {
            if let Some(instance) = self.instances.get_mut(&id) {
                instance.apply_change(at);
                let next = instance.next;
                self.schedule.extend(next.map(|(at, _)| (at, id.clone())));
            }
            changes.extend(self.observed(&id));
        }
        self.now = self.now.max(now);
        changes
    }

    /// Returns when the next change is due; a simulation in virtual time can jump there.
    pub fn next_at(&mut self) -> Option<Timestamp> {
        while let Some((at, id)) = self.schedule.first() {
            let instance = self.instances.get(id);
            if instance.is_some_and(|i| i.next.is_some_and(|(next, _)| next == *at)) {
                return Some(*at);
            }
            self.schedule.pop_first();
        }
        None
    }

    /// Returns all instances that have not been removed.
    pub fn list(&self) -> Vec<ObservedInstance> {
        let listed = self
            .instances
            .iter()
            .filter(|(_, instance)| !matches!(instance.phase, ObservedPhase::Removed { .. }));
        listed.filter_map(|(id, _)| self.observed(id)).collect()
    }

    fn observed(&self, id: &InstanceId) -> Option<ObservedInstance> {
        let instance = self.instances.get(id)?;
        Some(ObservedInstance {
            id: id.clone(),
            generation: instance.generation,
            node: self.node.clone(),
            address: Some(address(id)),
            pid: None,
            phase: instance.phase.clone(),
            adopted: false,
            progress: None,
            unhealthy: None,
        })
    }
}

impl SimulatedInstance {
    fn apply_change(&mut self, at: Timestamp) {
        let Some((_, change)) = self.next.take() else {
            return;
        };
        self.phase = match change {
            LifecycleChange::StartEnds if self.lifecycle.start_fails => ObservedPhase::Exited {
                code: Some(FAILED_START_CODE),
                reason: "a simulated start that failed".into(),
            },
            LifecycleChange::StartEnds => {
                self.next = self
                    .lifecycle
                    .lifetime
                    .map(|lifetime| (at + lifetime, LifecycleChange::Crash));
                ObservedPhase::Ready
            }
            LifecycleChange::Crash => ObservedPhase::Exited {
                code: Some(CRASH_CODE),
                reason: "a simulated crash".into(),
            },
        };
    }
}

impl Lifecycle {
    const NONE: Self = Self {
        start_delay: Span::ZERO,
        start_fails: false,
        lifetime: None,
    };

    fn draw(spec: &SimulatedSpec, start: &StartSpec) -> Self {
        let mut random = SplitMix64::new(spec.seed, &start.id, start.generation);
        let mean = spec.mean_time_to_failure.millis();
        Self {
            start_delay: spec.start_delay,
            start_fails: random.next() % 10_000 < u64::from(spec.start_failures_per_10000),
            lifetime: (mean > 0).then(|| Span::from_millis(random.exponential(mean))),
        }
    }
}

/// Random numbers that are the same on every machine, with integers only.
struct SplitMix64(u64);

impl SplitMix64 {
    fn new(seed: u64, id: &InstanceId, generation: u64) -> Self {
        // FNV-1a over the id, so that instances of one seed differ.
        let hash = id
            .as_str()
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        Self(seed ^ hash ^ generation.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns an exponentially distributed number with this mean, by von Neumann's comparison of uniform
    /// numbers: the last digit of a logarithm differs between platforms.
    fn exponential(&mut self, mean: u64) -> u64 {
        let mut integer_part = 0;
        loop {
            let first = self.next();
            let mut previous = first;
            let mut length = 1_u32;
            loop {
                let next = self.next();
                if next >= previous {
                    break;
                }
                previous = next;
                length += 1;
            }
            if !length.is_multiple_of(2) {
                let part = (u128::from(first) * u128::from(mean)) >> 64;
                return (integer_part * mean).saturating_add(part as u64);
            }
            integer_part += 1;
        }
    }
}

/// Returns a unique address on which nobody listens.
fn address(id: &InstanceId) -> String {
    let mut random = SplitMix64::new(0, id, 0);
    let [a, b, c, ..] = random.next().to_be_bytes();
    format!("127.{}.{b}.{}:1", a | 1, c.max(1))
}

/// [`SimulatedInstances`] as a [`Backend`], at the time to which it was last advanced.
#[derive(Debug)]
pub struct SimulatedBackend {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    core: SimulatedInstances,
    watchers: Watchers,
}

impl SimulatedBackend {
    /// Creates a node without instances, with this id and at this time.
    pub fn new(node: &str, now: Timestamp) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                core: SimulatedInstances::new(node, now),
                watchers: Watchers::default(),
            }),
        })
    }

    /// Applies all changes due by `now` and publishes them to watchers.
    pub fn advance(&self, now: Timestamp) {
        let mut state = self.state();
        for observed in state.core.step(now) {
            state.watchers.publish(&observed);
        }
    }

    /// Returns when the next change is due, if any.
    pub fn next_at(&self) -> Option<Timestamp> {
        self.state().core.next_at()
    }

    /// A panic while holding the lock cannot leave the state half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(
        &self,
        change: impl FnOnce(&mut SimulatedInstances) -> Result<Option<ObservedInstance>, BackendError>,
    ) -> Result<(), BackendError> {
        let mut state = self.state();
        if let Some(observed) = change(&mut state.core)? {
            state.watchers.publish(&observed);
        }
        Ok(())
    }
}

#[async_trait]
impl Backend for SimulatedBackend {
    async fn ensure(&self, start: StartSpec) -> Result<(), BackendError> {
        self.apply(|core| core.ensure(&start))
    }

    async fn remove(
        &self,
        id: &InstanceId,
        generation: u64,
        _grace: Span,
    ) -> Result<(), BackendError> {
        self.apply(|core| core.remove(id, generation))
    }

    async fn list(&self) -> Result<Vec<ObservedInstance>, BackendError> {
        Ok(self.state().core.list())
    }

    fn watch(&self) -> mpsc::Receiver<ObservedInstance> {
        self.state().watchers.subscribe()
    }

    /// Returns nothing: simulated instances use no resources.
    async fn resources(&self) -> Vec<ResourceSample> {
        Vec::new()
    }

    async fn release(&self) {
        self.state().watchers.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start_spec(id: &str, simulated: SimulatedSpec) -> StartSpec {
        let spec = serde_json::json!({
            "backend": "simulated", "instanceType": "t", "simulated": simulated,
        });
        StartSpec {
            id: InstanceId::from(id.to_owned()),
            generation: 1,
            deployment: "iris/blue".into(),
            spec: serde_json::from_value(spec).unwrap(),
        }
    }

    fn lifecycles(spec: &SimulatedSpec, count: u32) -> Vec<Lifecycle> {
        (0..count)
            .map(|n| Lifecycle::draw(spec, &start_spec(&format!("i-{n}"), spec.clone())))
            .collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_run_for_any_time_step() {
        let spec = SimulatedSpec {
            start_failures_per_10000: 3000,
            mean_time_to_failure: Span::from_secs(30),
            seed: 7,
            ..SimulatedSpec::default()
        };
        let run = |step_ms: i64| {
            let mut core = SimulatedInstances::new("n", Timestamp::from_secs(0));
            for n in 0..50 {
                core.ensure(&start_spec(&format!("i-{n}"), spec.clone()))
                    .unwrap();
            }
            let mut changes = Vec::new();
            for tick in 1..=(60_000 / step_ms) {
                changes.extend(core.step(Timestamp::from_millis(tick * step_ms)));
            }
            changes
        };
        assert_eq!(run(10), run(60_000));
        assert!(run(60_000).len() > 50);
    }

    #[test]
    fn lifetimes_have_the_mean_and_the_spread_of_an_exponential_distribution() {
        let spec = SimulatedSpec {
            mean_time_to_failure: Span::from_secs(100),
            ..SimulatedSpec::default()
        };
        let lifetimes: Vec<f64> = lifecycles(&spec, 20_000)
            .into_iter()
            .map(|lifecycle| lifecycle.lifetime.unwrap().millis() as f64 / 1000.0)
            .collect();
        let mean = lifetimes.iter().sum::<f64>() / lifetimes.len() as f64;
        assert!((mean - 100.0).abs() < 3.0, "{mean}");
        let longer = lifetimes
            .iter()
            .filter(|lifetime| **lifetime > 100.0)
            .count() as f64;
        let share = longer / lifetimes.len() as f64;
        assert!((share - (-1.0_f64).exp()).abs() < 0.02, "{share}");
    }

    #[test]
    fn the_share_of_failed_starts_matches_the_spec() {
        let spec = SimulatedSpec {
            start_failures_per_10000: 2500,
            ..SimulatedSpec::default()
        };
        let failed = lifecycles(&spec, 20_000)
            .iter()
            .filter(|f| f.start_fails)
            .count();
        assert!((4_700..5_300).contains(&failed), "{failed}");
    }
}
