//! A simulated node: the state of the real node agent and the real executor, whose requests take virtual time,
//! on a backend that is simulated here so that its faults can be injected.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actuator::node::NodeFold;
use actuator::node::state::{BackendRequest, NodeState};
use backends::{BackendError, ObservedInstance, ObservedPhase};
use contract::ids::{Bucket, EndpointKey, InstanceId};
use contract::log::{Actor, NewEvent, StreamName};
use contract::resources::BackendKind;
use contract::time::{Span, Timestamp};
use runtime::consumer::{AppliedRecord, Step};
use runtime::executor::{RunningRequests, outcome_commit};
use runtime::ids::{Ids, SeededIds};
use store::Fence;
use tokio::time::{Instant, timeout_at};

use crate::log::Log;
use crate::rng::Rng;
use crate::service::{Reader, Snapshots, assert_snapshots_match_log};
use crate::world::Faults;

const CONSUMER: &str = actuator::node::CONSUMER;
const GRACE: Span = Span::from_secs(1);

/// What runs on a node; outlives its agent.
#[derive(Default)]
pub struct SimulatedBackend {
    now: Timestamp,
    instances: BTreeMap<InstanceId, SimulatedInstance>,
    running: BTreeSet<InstanceId>,
    /// Changes that the agent has not observed yet.
    changes: Vec<ObservedInstance>,
    /// How often each instance was started.
    pub starts: BTreeMap<InstanceId, u32>,
    /// Instances that were running when they were removed, until they are taken.
    pub removed: Vec<InstanceId>,
}

struct SimulatedInstance {
    observed: ObservedInstance,
    ready_at: Timestamp,
}

/// What happens to a request, drawn when it is dispatched.
#[derive(Clone, Copy)]
struct Fate {
    delay: Duration,
    /// The backend lacks resources.
    is_postponed: bool,
    start_fails: bool,
    start: Span,
}

impl SimulatedBackend {
    fn carry_out(&mut self, request: BackendRequest, fate: Fate) -> Result<(), BackendError> {
        let id = request.id().clone();
        if fate.is_postponed {
            let source = std::io::Error::other("the simulation says so");
            return Err(BackendError::OutOfResources { id, source });
        }
        let existing = self.instances.get(&id).map(|one| one.observed.clone());
        let observed = match (request, existing) {
            (BackendRequest::Ensure { start, .. }, Some(existing)) => {
                let newest = existing.generation;
                let is_removed = matches!(existing.phase, ObservedPhase::Removed { .. });
                let requested = start.generation;
                return match is_removed || requested < newest {
                    true => Err(BackendError::Stale {
                        id,
                        requested,
                        newest,
                    }),
                    false => Ok(()),
                };
            }
            (BackendRequest::Ensure { start, .. }, None) => {
                *self.starts.entry(id.clone()).or_default() += 1;
                let phase = match fate.start_fails {
                    true => exited("no start", 1),
                    false => ObservedPhase::Starting,
                };
                if !fate.start_fails {
                    self.running.insert(id.clone());
                }
                let address = (!fate.start_fails).then(|| "127.0.0.1:1".to_owned());
                observed(id.clone(), start.generation, address, phase)
            }
            (BackendRequest::Remove { generation, .. }, _) => {
                if self.running.remove(&id) {
                    self.removed.push(id.clone());
                }
                let phase = ObservedPhase::Removed { code: None };
                observed(id.clone(), generation, None, phase)
            }
        };
        let ready_at = self.now + fate.start;
        self.changes.push(observed.clone());
        let instance = SimulatedInstance { observed, ready_at };
        self.instances.insert(id.clone(), instance);
        match fate.start_fails && self.is_failed(&id) {
            true => Err(BackendError::CannotStart {
                id,
                detail: "no start".to_owned(),
            }),
            false => Ok(()),
        }
    }

    fn is_failed(&self, id: &InstanceId) -> bool {
        let phase = self.instances.get(id).map(|one| &one.observed.phase);
        matches!(phase, Some(ObservedPhase::Exited { .. }))
    }

    /// Instances become ready, or crash.
    fn advance(&mut self, now: Timestamp, rng: &mut Rng, faults: &Faults) {
        self.now = now;
        for id in self.running.clone() {
            let Some(instance) = self.instances.get_mut(&id) else {
                continue;
            };
            let observed = &mut instance.observed;
            if rng.percent(faults.instance_crashes) {
                self.running.remove(&id);
                observed.phase = exited("crashed", 139);
            } else if observed.phase == ObservedPhase::Starting && now >= instance.ready_at {
                observed.phase = ObservedPhase::Ready;
            } else {
                continue;
            }
            self.changes.push(observed.clone());
        }
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }
}

fn exited(reason: &str, code: i32) -> ObservedPhase {
    ObservedPhase::Exited {
        code: Some(code),
        reason: reason.to_owned(),
    }
}

fn observed(
    id: InstanceId,
    generation: u64,
    address: Option<String>,
    phase: ObservedPhase,
) -> ObservedInstance {
    ObservedInstance {
        id,
        generation,
        node: String::new(),
        address,
        pid: None,
        phase,
        adopted: false,
        progress: None,
        unhealthy: None,
    }
}

/// The agent of a node, without the loop around it.
pub struct Node {
    id: &'static str,
    reader: Reader<NodeFold>,
    state: NodeState,
    in_flight: RunningRequests<BackendRequest, BackendError>,
    /// Number of requests in flight.
    pub requests: usize,
    fence: Fence,
    snapshots: Snapshots,
    pub backend: Arc<Mutex<SimulatedBackend>>,
}

impl Node {
    pub fn new(id: &'static str, log: &mut Log) -> Self {
        Self::start(id, log, Snapshots::new(), Arc::default())
    }

    fn start(
        id: &'static str,
        log: &mut Log,
        snapshots: Snapshots,
        backend: Arc<Mutex<SimulatedBackend>>,
    ) -> Self {
        let mut reader = Reader::new(CONSUMER, NodeFold::for_node(id, false));
        let fence = log.acquire_fence(format!("node/{id}"));
        let mut parked = Vec::new();
        for bucket in Bucket::of_endpoints() {
            parked.extend(reader.acquire(bucket, fence.clone(), log, &snapshots));
        }
        let mut state = NodeState::new(id, GRACE, reader.core.folds().clone());
        state.restore_all();
        parked.iter().for_each(|key| state.park(key));
        {
            let mut backend = backend.lock().unwrap();
            backend.changes.clear();
            let listed = backend.instances.values().map(|one| one.observed.clone());
            state.handle_list(BackendKind::SIMULATED, listed.collect());
        }
        Self {
            id,
            reader,
            state,
            in_flight: RunningRequests::default(),
            requests: 0,
            fence,
            snapshots,
            backend,
        }
    }

    /// The agent loses all state, as in a crash; what it runs and what it asked for stays or not.
    pub fn restart(&mut self, log: &mut Log) {
        let snapshots = std::mem::take(&mut self.snapshots);
        *self = Self::start(self.id, log, snapshots, self.backend.clone());
    }

    /// Carries out what the log requests, and records what has become of it. Must be called within the
    /// runtime on which requests run.
    pub fn turn(
        &mut self,
        log: &mut Log,
        rng: &mut Rng,
        clock: Timestamp,
        ids: &SeededIds,
        faults: &Faults,
    ) {
        let limit = match rng.percent(faults.lagging_reads) {
            true => 1,
            false => usize::MAX,
        };
        for step in self.reader.read(log, rng, limit) {
            self.handle(step);
        }
        if rng.percent(25) {
            let bucket = Bucket(rng.below(64) as u16);
            let is_refused = self.reader.save(bucket, log, &mut self.snapshots);
            assert!(!is_refused, "there is one agent per node");
        }
        let changes = {
            let mut backend = self.backend.lock().unwrap();
            backend.advance(clock, rng, faults);
            std::mem::take(&mut backend.changes)
        };
        for observed in changes {
            self.state.observe(BackendKind::SIMULATED, observed);
        }
        self.state.retry();
        if self.reader.core.all_caught_up() {
            self.reconcile(log, rng, clock, ids, faults);
        }
    }

    fn handle(&mut self, step: Step<<NodeFold as runtime::consumer::Fold>::Effect>) {
        match step {
            Step::Applied(applied) => {
                for AppliedRecord { record, effect } in applied {
                    if let (Some(key), Some(change)) = (record.endpoint(), effect) {
                        self.state.handle_applied(key, change);
                    }
                }
            }
            Step::CaughtUp(_) => self.state.mark_all_dirty(),
            Step::Parked(key) => self.state.park(&key),
            Step::Rebuilt { key, .. } => self.state.unpark(&key),
            _ => {}
        }
    }

    fn reconcile(
        &mut self,
        log: &mut Log,
        rng: &mut Rng,
        clock: Timestamp,
        ids: &SeededIds,
        faults: &Faults,
    ) {
        for request in self.state.stray_requests() {
            self.dispatch(request, rng, faults);
        }
        for endpoint in self.state.take_dirty() {
            let plan = self.state.plan(&endpoint);
            for request in plan.requests {
                self.dispatch(request, rng, faults);
            }
            if plan.events.is_empty() {
                continue;
            }
            let event = |event| NewEvent {
                id: ids.event_id(clock),
                time: clock,
                actor: Actor::service("actuator"),
                event,
            };
            let commit = outcome_commit(
                StreamName::of_node(&endpoint, self.id),
                self.state.version(&endpoint),
                plan.events.into_iter().map(event).collect(),
                self.fence.clone(),
            );
            self.commit(&endpoint, commit, log);
        }
    }

    fn commit(&mut self, endpoint: &EndpointKey, commit: store::Commit, log: &mut Log) {
        for append in commit.appends {
            let written = log.append(append, &self.fence);
            let written = written.expect("an agent knows its own streams");
            self.state.committed(endpoint, &written);
        }
    }

    fn dispatch(&mut self, request: BackendRequest, rng: &mut Rng, faults: &Faults) {
        let fate = Fate {
            delay: Duration::from_millis(rng.below(900)),
            is_postponed: rng.percent(faults.postponed_requests),
            start_fails: matches!(request, BackendRequest::Ensure { .. })
                && rng.percent(faults.start_failures),
            start: Span::from_secs(1 + rng.below(9)),
        };
        let backend = self.backend.clone();
        self.requests += 1;
        self.in_flight.begin(request, |request| {
            let request = request.clone();
            async move {
                tokio::time::sleep(fate.delay).await;
                backend.lock().unwrap().carry_out(request, fate)
            }
        });
    }

    /// Waits for requests until a time.
    pub async fn run_until(&mut self, end: Instant) {
        while let Ok((request, result)) = timeout_at(end, self.in_flight.next()).await {
            self.requests -= 1;
            self.state.handle_result(&request, result);
        }
    }

    pub fn assert_snapshots_match_log(&self, log: &Log, context: &str) {
        let fold = || NodeFold::for_node(self.id, false);
        assert_snapshots_match_log(CONSUMER, fold, &self.snapshots, log, context);
    }
}
