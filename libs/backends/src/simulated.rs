//! Instances that exist only as numbers, for simulations and for trying things out.
//!
//! [`SimulatedInstances`] is pure: what happens, and when, follows from the spec, the instance's id
//! and its generation alone, so that a run in virtual time and a live one see the same. Time is what
//! it is told; [`SimulatedBackend`] puts it behind the port and is advanced by whoever owns the clock.
//! Simulated instances do not outlive the process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use contract::ids::InstanceId;
use contract::resources::SimulatedSpec;
use contract::time::{Span, Timestamp};
use tokio::sync::mpsc;

use crate::watchers::Watchers;
use crate::{Backend, BackendError, Observed, ObservedPhase, Order, ResourceSample};

/// Exit code of a simulated crash, that of a process that aborts in a shell.
const CRASH_CODE: i32 = 134;
const FAILED_START_CODE: i32 = 1;

/// All simulated instances of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct SimulatedInstances {
    node: String,
    now: Timestamp,
    instances: BTreeMap<InstanceId, Simulated>,
    /// What happens next to any of them. What became void since is passed over.
    agenda: BTreeSet<(Timestamp, InstanceId)>,
}

#[derive(Clone, Debug, PartialEq)]
struct Simulated {
    generation: u64,
    phase: ObservedPhase,
    fate: Fate,
    /// What happens next, and when.
    next: Option<(Timestamp, Step)>,
}

/// What was drawn for an instance when it was ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fate {
    start_delay: Span,
    start_fails: bool,
    /// From ready to the crash.
    lifetime: Option<Span>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    StartEnds,
    Crash,
}

impl SimulatedInstances {
    /// A node without instances, of this id, at this instant.
    pub fn new(node: &str, now: Timestamp) -> Self {
        Self {
            node: node.to_owned(),
            now,
            instances: BTreeMap::new(),
            agenda: BTreeSet::new(),
        }
    }

    /// The instance begins to start now. What is observed of it is returned.
    ///
    /// # Errors
    ///
    /// [`BackendError::Stale`] after a newer order, or a removal of this generation.
    pub fn ensure(&mut self, order: &Order) -> Result<Option<Observed>, BackendError> {
        if let Some(known) = self.instances.get_mut(&order.id) {
            let gone = matches!(known.phase, ObservedPhase::Removed { .. });
            if order.generation < known.generation || gone && order.generation == known.generation {
                return Err(BackendError::Stale {
                    id: order.id.clone(),
                    ours: order.generation,
                    newest: known.generation,
                });
            }
            let over = gone || matches!(known.phase, ObservedPhase::Exited { .. });
            if !over {
                known.generation = order.generation;
                return Ok(None);
            }
            if order.generation == known.generation {
                return Ok(self.observed(&order.id));
            }
        }
        let spec = order.spec.simulated.clone().unwrap_or_default();
        let fate = Fate::draw(&spec, order);
        let instance = Simulated {
            generation: order.generation,
            phase: ObservedPhase::Starting,
            next: Some((self.now + fate.start_delay, Step::StartEnds)),
            fate,
        };
        self.agenda
            .extend(instance.next.map(|(at, _)| (at, order.id.clone())));
        self.instances.insert(order.id.clone(), instance);
        Ok(self.observed(&order.id))
    }

    /// The instance goes at once; simulated instances have nothing to finish.
    ///
    /// # Errors
    ///
    /// [`BackendError::Stale`] after a newer order.
    pub fn remove(
        &mut self,
        id: &InstanceId,
        generation: u64,
    ) -> Result<Option<Observed>, BackendError> {
        let known = self.instances.entry(id.clone()).or_insert(Simulated {
            generation,
            phase: ObservedPhase::Removed { code: None },
            fate: Fate::NONE,
            next: None,
        });
        if generation < known.generation {
            return Err(BackendError::Stale {
                id: id.clone(),
                ours: generation,
                newest: known.generation,
            });
        }
        known.generation = generation;
        known.next = None;
        known.phase = match known.phase {
            ObservedPhase::Exited { code, .. } | ObservedPhase::Removed { code } => {
                ObservedPhase::Removed { code }
            }
            _ => ObservedPhase::Removed { code: Some(0) },
        };
        Ok(self.observed(id))
    }

    /// Brings the simulation to `now` and returns what changed, in order of time. An earlier instant
    /// changes nothing.
    pub fn step(&mut self, now: Timestamp) -> Vec<Observed> {
        let mut changes = Vec::new();
        while self.next_at().is_some_and(|at| at <= now)
            && let Some((at, id)) = self.agenda.pop_first()
        {
            if let Some(instance) = self.instances.get_mut(&id) {
                instance.happen(at);
                let next = instance.next;
                self.agenda.extend(next.map(|(at, _)| (at, id.clone())));
            }
            changes.extend(self.observed(&id));
        }
        self.now = self.now.max(now);
        changes
    }

    /// When the next change is due; a simulation in virtual time can go there at once.
    pub fn next_at(&mut self) -> Option<Timestamp> {
        while let Some((at, id)) = self.agenda.first() {
            let instance = self.instances.get(id);
            if instance.is_some_and(|i| i.next.is_some_and(|(next, _)| next == *at)) {
                return Some(*at);
            }
            self.agenda.pop_first();
        }
        None
    }

    /// All but the removed.
    pub fn list(&self) -> Vec<Observed> {
        let listed = self
            .instances
            .iter()
            .filter(|(_, instance)| !matches!(instance.phase, ObservedPhase::Removed { .. }));
        listed.filter_map(|(id, _)| self.observed(id)).collect()
    }

    fn observed(&self, id: &InstanceId) -> Option<Observed> {
        let instance = self.instances.get(id)?;
        Some(Observed {
            id: id.clone(),
            generation: instance.generation,
            node: self.node.clone(),
            address: Some(address(id)),
            pid: None,
            phase: instance.phase.clone(),
            adopted: false,
        })
    }
}

impl Simulated {
    fn happen(&mut self, at: Timestamp) {
        let Some((_, step)) = self.next.take() else {
            return;
        };
        self.phase = match step {
            Step::StartEnds if self.fate.start_fails => ObservedPhase::Exited {
                code: Some(FAILED_START_CODE),
                reason: "a simulated start that failed".into(),
            },
            Step::StartEnds => {
                self.next = self.fate.lifetime.map(|lives| (at + lives, Step::Crash));
                ObservedPhase::Ready
            }
            Step::Crash => ObservedPhase::Exited {
                code: Some(CRASH_CODE),
                reason: "a simulated crash".into(),
            },
        };
    }
}

impl Fate {
    const NONE: Self = Self {
        start_delay: Span::ZERO,
        start_fails: false,
        lifetime: None,
    };

    fn draw(spec: &SimulatedSpec, order: &Order) -> Self {
        let mut draws = Draws::new(spec.seed, &order.id, order.generation);
        let mean = spec.mean_time_to_failure.millis();
        Self {
            start_delay: spec.start_delay,
            start_fails: draws.next() % 10_000 < u64::from(spec.start_failures_per_10000),
            lifetime: (mean > 0).then(|| Span::from_millis(draws.exponential(mean))),
        }
    }
}

/// Random numbers that are the same on every machine: SplitMix64, integers only.
struct Draws(u64);

impl Draws {
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

    /// Exponentially distributed with this mean, by von Neumann's comparisons of uniform numbers: no
    /// logarithm, whose last digit differs between platforms.
    fn exponential(&mut self, mean: u64) -> u64 {
        let mut whole = 0;
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
                return (whole * mean).saturating_add(part as u64);
            }
            whole += 1;
        }
    }
}

/// An address of its own, on which nobody listens.
fn address(id: &InstanceId) -> String {
    let mut draws = Draws::new(0, id, 0);
    let [a, b, c, ..] = draws.next().to_be_bytes();
    format!("127.{}.{b}.{}:1", a | 1, c.max(1))
}

/// [`SimulatedInstances`] behind the port. It lives at the instant it was last advanced to.
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
    /// A node without instances, of this id, at this instant.
    pub fn new(node: &str, now: Timestamp) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                core: SimulatedInstances::new(node, now),
                watchers: Watchers::default(),
            }),
        })
    }

    /// Lets everything happen that is due by `now`, and tells the watchers.
    pub fn advance(&self, now: Timestamp) {
        let mut state = self.state();
        for observed in state.core.step(now) {
            state.watchers.publish(&observed);
        }
    }

    /// When the next change is due; none while nothing is to happen.
    pub fn next_at(&self) -> Option<Timestamp> {
        self.state().core.next_at()
    }

    /// No holder of the lock can leave the state half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(
        &self,
        order: impl FnOnce(&mut SimulatedInstances) -> Result<Option<Observed>, BackendError>,
    ) -> Result<(), BackendError> {
        let mut state = self.state();
        if let Some(observed) = order(&mut state.core)? {
            state.watchers.publish(&observed);
        }
        Ok(())
    }
}

#[async_trait]
impl Backend for SimulatedBackend {
    async fn ensure(&self, order: Order) -> Result<(), BackendError> {
        self.carry_out(|core| core.ensure(&order))
    }

    async fn remove(
        &self,
        id: &InstanceId,
        generation: u64,
        _grace: Span,
    ) -> Result<(), BackendError> {
        self.carry_out(|core| core.remove(id, generation))
    }

    async fn list(&self) -> Result<Vec<Observed>, BackendError> {
        Ok(self.state().core.list())
    }

    fn watch(&self) -> mpsc::Receiver<Observed> {
        self.state().watchers.subscribe()
    }

    /// None: what is simulated uses nothing.
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

    fn order(id: &str, simulated: SimulatedSpec) -> Order {
        let spec = serde_json::json!({
            "backend": "simulated", "instanceType": "t", "simulated": simulated,
        });
        Order {
            id: InstanceId::from(id.to_owned()),
            generation: 1,
            deployment: "iris/blue".into(),
            spec: serde_json::from_value(spec).unwrap(),
        }
    }

    fn fates(spec: &SimulatedSpec, count: u32) -> Vec<Fate> {
        (0..count)
            .map(|n| Fate::draw(spec, &order(&format!("i-{n}"), spec.clone())))
            .collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_run_however_time_is_cut() {
        let spec = SimulatedSpec {
            start_failures_per_10000: 3000,
            mean_time_to_failure: Span::from_secs(30),
            seed: 7,
            ..SimulatedSpec::default()
        };
        let run = |step_ms: i64| {
            let mut core = SimulatedInstances::new("n", Timestamp::from_secs(0));
            for n in 0..50 {
                core.ensure(&order(&format!("i-{n}"), spec.clone()))
                    .unwrap();
            }
            let mut seen = Vec::new();
            for tick in 1..=(60_000 / step_ms) {
                seen.extend(core.step(Timestamp::from_millis(tick * step_ms)));
            }
            seen
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
        let lives: Vec<f64> = fates(&spec, 20_000)
            .into_iter()
            .map(|fate| fate.lifetime.unwrap().millis() as f64 / 1000.0)
            .collect();
        let mean = lives.iter().sum::<f64>() / lives.len() as f64;
        assert!((mean - 100.0).abs() < 3.0, "{mean}");
        let longer = lives.iter().filter(|life| **life > 100.0).count() as f64;
        let share = longer / lives.len() as f64;
        assert!((share - (-1.0_f64).exp()).abs() < 0.02, "{share}");
    }

    #[test]
    fn as_many_starts_fail_as_the_spec_says() {
        let spec = SimulatedSpec {
            start_failures_per_10000: 2500,
            ..SimulatedSpec::default()
        };
        let failed = fates(&spec, 20_000)
            .iter()
            .filter(|f| f.start_fails)
            .count();
        assert!((4_700..5_300).contains(&failed), "{failed}");
    }
}
