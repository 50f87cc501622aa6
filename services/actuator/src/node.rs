//! The node agent: carries out requests for its node, and records the results in the streams `node/…`.
//!
//! It folds all buckets of the log, so it needs no bucket assignment; its lease (`node/ID`) keeps a
//! second agent with the same id from writing. Level-triggered: requests to backends and events for the
//! log follow from the difference between log and backends, compared again after every change. A request
//! may reach a backend more than once and is made idempotent by its generation; an event is written once,
//! because the next comparison waits until the log has delivered it.
//!
//! An event that cannot be applied parks its endpoint on every node (consumer `node`): its instances are
//! left alone, neither started nor stopped nor reported, until an operator unparks it; other endpoints
//! are not affected.
//!
//! It also reports CPU and memory of its instances, in a frame per bucket and second.

mod fold;
mod frames;
pub mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use backends::{Backend, BackendError, ObservedInstance, ObservedPhase};
use bus::Bus;
use contract::events::Event;
use contract::frame::Hello;
use contract::ids::{EndpointKey, InstanceId};
use contract::log::{Actor, NewEvent, StreamName};
use contract::resources::BackendKind;
use contract::time::Span;
use futures::future::join_all;
use runtime::clock::Clock;
use runtime::consumer::{AppliedRecord, Consumer, ConsumerConfig, ConsumerDeps, Ownership, Step};
use runtime::executor::{RunningRequests, outcome_commit};
use runtime::health::Component;
use runtime::ids::Ids;
use runtime::parking::catch_panic;
use runtime::retry::retry_while_unavailable;
use store::{CommitError, Committed, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use fold::PlacementChange;
use frames::Frames;
use state::{BackendRequest, NodeState};

pub use fold::NodeFold;
pub use state::GONE_REASON;

/// The consumer name under which nodes park endpoints.
pub const CONSUMER: &str = "node";

/// Failed operations are retried after this time.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// The same during shutdown, when other tasks have just freed resources.
const SHORTAGE_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How long shutdown waits, beyond the longest grace period, for instances that do not exit.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Attempts to append the final events.
const STOP_ATTEMPTS: u32 = 3;

/// How long a node counts as running without a sign of life, as far as the log waits for it before it is
/// archived.
const LEASE_TTL: Duration = Duration::from_secs(60);

/// Observations that may be queued for the agent.
const OBSERVATIONS_MAX: usize = 4096;

#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// See `backends::process::node_id`.
    pub node: String,
    /// Whether there can be no other node, since store and bus belong to this process. It takes over what
    /// a node with another id ran, whose data folder it has.
    pub is_only: bool,
    /// The URL of this process's admin listener, from which others request logs.
    pub address: Option<String>,
    /// Whether instances outlive this process.
    pub keep_instances: bool,
    /// Time from SIGTERM to SIGKILL for instances that the log does not know.
    pub grace: Span,
}

pub struct NodeDeps {
    pub store: Store,
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    /// The backends that this node offers.
    pub backends: BTreeMap<BackendKind, Arc<dyn Backend>>,
    pub component: Component,
}

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "node `{node}` was taken over by another process with the same id; give each its own data folder"
    )]
    TakenOver { node: String },
}

/// Runs until `shutdown`, then sends a goodbye and ends or releases all instances. The store must stay
/// open until this returns.
pub async fn run(
    config: NodeConfig,
    deps: NodeDeps,
    shutdown: CancellationToken,
) -> Result<(), NodeError> {
    deps.component
        .waiting("acquiring the node's lease in the store");
    let lease = format!("node/{}", config.node);
    // Each start of a node is the same holder, so it never waits for its predecessor.
    let acquire = || deps.store.acquire_lease(&lease, &lease, LEASE_TTL);
    let acquiring = retry_while_unavailable(&deps.component, acquire);
    let Some(fence) = shutdown.run_until_cancelled(acquiring).await else {
        return Ok(());
    };
    let Some(fence) = fence? else {
        return Err(NodeError::TakenOver { node: config.node });
    };
    let _renewing =
        AbortOnDropHandle::new(tokio::spawn(renew_lease(deps.store.clone(), fence.clone())));
    let consumer_config = ConsumerConfig {
        consumer: CONSUMER,
        snapshots: lease.clone(),
        ownership: Ownership::Exclusive(fence.clone()),
        waits_for_writes: false,
    };
    let consumer_deps = ConsumerDeps {
        store: deps.store.clone(),
        bus: deps.bus.clone(),
        clock: deps.clock.clone(),
    };
    let consumer = Consumer::open(
        consumer_config,
        NodeFold::for_node(&config.node, config.is_only),
        consumer_deps,
        deps.component.clone(),
    );
    let (sender, observations) = mpsc::channel(OBSERVATIONS_MAX);
    let stop_watching = CancellationToken::new();
    let _stop = stop_watching.clone().drop_guard();
    for (kind, backend) in &deps.backends {
        tokio::spawn(watch(
            kind.clone(),
            backend.clone(),
            sender.clone(),
            stop_watching.clone(),
        ));
    }
    let hello = Hello {
        address: config.address.clone(),
        backends: deps.backends.keys().cloned().collect(),
    };
    let mut agent = Agent {
        state: NodeState::new(&config.node, config.grace, consumer.folds().clone()),
        frames: Frames::new(&config.node, hello, deps.ids.uid()),
        consumer,
        listed_backends: 0,
        is_caught_up: false,
        in_flight: RunningRequests::default(),
        fence,
        config,
        deps,
    };
    let (store, held) = (agent.deps.store.clone(), agent.fence.clone());
    let ended = agent.run(observations, shutdown).await;
    // If that fails, the lease expires.
    let _ = store.release_lease(&held).await;
    ended
}

/// Shows that the node runs, so that what it has yet to read is not archived.
async fn renew_lease(store: Store, fence: Fence) {
    let mut renewals = tokio::time::interval(LEASE_TTL / 4);
    renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        renewals.tick().await;
        match store.renew_lease(&fence, &fence.name, LEASE_TTL).await {
            Ok(true) => {}
            // Taken over: the agent notices at its next write.
            Ok(false) | Err(StoreError::Closed) => return,
            Err(error) => tracing::debug!(%error, "the node's lease is not renewed yet"),
        }
    }
}

/// A report from a backend.
enum Observation {
    /// All instances of the backend; it has no others.
    Listed(BackendKind, Vec<ObservedInstance>),
    Changed(BackendKind, ObservedInstance),
}

/// Sends the full list and then changes; starts over if the watch fell behind.
async fn watch(
    kind: BackendKind,
    backend: Arc<dyn Backend>,
    sender: mpsc::Sender<Observation>,
    stop: CancellationToken,
) {
    while !stop.is_cancelled() && !sender.is_closed() {
        let mut changes = backend.watch();
        match backend.list().await {
            Ok(listed) => {
                if sender
                    .send(Observation::Listed(kind.clone(), listed))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%kind, %error, "failed to list instances");
                sleep(RETRY_EVERY).await;
                continue;
            }
        }
        loop {
            let change = tokio::select! {
                () = stop.cancelled() => return,
                change = changes.recv() => change,
            };
            let Some(observed) = change else {
                break;
            };
            if sender
                .send(Observation::Changed(kind.clone(), observed))
                .await
                .is_err()
            {
                return;
            }
        }
        sleep(RETRY_EVERY).await;
    }
}

/// Retries removals during resource shortages: an instance left behind would be an orphan.
async fn remove_with_retries(
    deadline: Instant,
    backend: &dyn Backend,
    id: &InstanceId,
    generation: u64,
    grace: Span,
) -> Result<(), BackendError> {
    loop {
        match backend.remove(id, generation, grace).await {
            Err(BackendError::OutOfResources { .. }) if Instant::now() < deadline => {
                sleep(SHORTAGE_RETRY_PAUSE).await;
            }
            result => return result,
        }
    }
}

struct Agent {
    config: NodeConfig,
    deps: NodeDeps,
    fence: Fence,
    state: NodeState,
    frames: Frames,
    /// The number of backends that have listed their instances.
    listed_backends: usize,
    is_caught_up: bool,
    in_flight: RunningRequests<BackendRequest, BackendError>,
    consumer: Consumer<NodeFold>,
}

impl Agent {
    async fn run(
        &mut self,
        mut observations: mpsc::Receiver<Observation>,
        shutdown: CancellationToken,
    ) -> Result<(), NodeError> {
        let mut retries = interval(RETRY_EVERY);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut second = self.frames.next_second(self.deps.clock.now());
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = sleep_until(second) => {
                    self.measure(false).await;
                    second = self.frames.next_second(self.deps.clock.now());
                }
                step = self.consumer.next() => self.handle(step?),
                Some(observation) = observations.recv() => self.observe(observation),
                (request, result) = self.in_flight.next() => self.state.handle_result(&request, result),
                _ = retries.tick() => self.state.retry(),
            }
            while let Ok(observation) = observations.try_recv() {
                self.observe(observation);
            }
            if self.is_caught_up && self.listed_backends >= self.deps.backends.len() {
                self.reconcile().await?;
                self.deps.component.ready();
            }
        }
        // First, so that nothing more is requested here while the instances end.
        self.measure(true).await;
        if self.config.keep_instances {
            let running = self.state.running().count();
            tracing::info!(
                running,
                next_start = "takes them over",
                "leaving the instances of this node running"
            );
        } else {
            self.stop_all(&mut observations).await?;
        }
        self.consumer.save_all().await;
        for backend in self.deps.backends.values() {
            backend.release().await;
        }
        Ok(())
    }

    fn handle(&mut self, step: Step<PlacementChange>) {
        match step {
            Step::Applied(applied) => {
                for AppliedRecord { record, effect } in applied {
                    if let (Some(key), Some(change)) = (record.endpoint(), effect) {
                        self.state.handle_applied(key, change);
                    }
                }
            }
            // A sole consumer acquires all buckets at once.
            Step::Acquired(_) => self.state.restore_all(),
            Step::CaughtUp(_) => {
                self.is_caught_up = true;
                self.state.mark_all_dirty();
            }
            Step::Parked(key) => self.state.park(&key),
            Step::Rebuilt { key, .. } => self.state.unpark(&key),
            // Bucket ownership does not matter: the instances are on this node.
            Step::Unreadable { .. }
            | Step::Advanced(_)
            | Step::Released(_)
            | Step::RowsAcquired(_)
            | Step::RowsReleased(_) => {}
        }
    }

    fn observe(&mut self, observation: Observation) {
        match observation {
            Observation::Changed(kind, observed) => self.state.observe(kind, observed),
            Observation::Listed(kind, observed) => {
                if self.state.handle_list(kind, observed) {
                    self.listed_backends += 1;
                }
            }
        }
    }

    /// Reconciles backends and log for all changed endpoints.
    async fn reconcile(&mut self) -> Result<(), NodeError> {
        let mut commits = Vec::new();
        for request in self.state.stray_requests() {
            self.dispatch(request);
        }
        for endpoint in self.state.take_dirty() {
            let state = &mut self.state;
            let plan = match catch_panic(|| state.plan(&endpoint)) {
                Ok(plan) => plan,
                Err(detail) => {
                    self.state.park(&endpoint);
                    self.consumer.park(&endpoint, &detail);
                    continue;
                }
            };
            for request in plan.requests {
                self.dispatch(request);
            }
            if !plan.events.is_empty() {
                commits.push(self.commit(endpoint, plan.events));
            }
        }
        for (endpoint, result) in join_all(commits).await {
            self.handle_commit(&endpoint, result).await?;
        }
        Ok(())
    }

    /// Sends a request to its backend without waiting for the result.
    fn dispatch(&mut self, request: BackendRequest) {
        let Some(backend) = self.deps.backends.get(request.kind()).cloned() else {
            if matches!(request, BackendRequest::Remove { .. }) {
                return self.state.report_removed(request.id());
            }
            let detail = format!(
                "node {} does not allow this backend; see the configuration of the actuator",
                self.config.node
            );
            return self.state.report_failed(request.id(), &detail);
        };
        self.in_flight.begin(request, |request| {
            let request = request.clone();
            async move {
                match request {
                    BackendRequest::Ensure { start, .. } => backend.ensure(*start).await,
                    BackendRequest::Remove {
                        id,
                        generation,
                        grace,
                        ..
                    } => backend.remove(&id, generation, grace).await,
                }
            }
        });
    }

    fn commit(
        &self,
        endpoint: EndpointKey,
        events: Vec<Event>,
    ) -> impl Future<Output = (EndpointKey, Result<Committed, CommitError>)> + use<> {
        let now = self.deps.clock.now();
        let new_event = |event| NewEvent {
            id: self.deps.ids.event_id(now),
            time: now,
            actor: Actor::service("actuator"),
            event,
        };
        let commit = outcome_commit(
            StreamName::of_node(&endpoint, &self.config.node),
            self.state.version(&endpoint),
            events.into_iter().map(new_event).collect(),
            self.fence.clone(),
        );
        let store = self.deps.store.clone();
        async move {
            let result = store.commit(commit).await;
            (endpoint, result)
        }
    }

    async fn handle_commit(
        &mut self,
        endpoint: &EndpointKey,
        result: Result<Committed, CommitError>,
    ) -> Result<(), NodeError> {
        match result {
            Ok(Committed::Written { records }) => {
                self.state.committed(endpoint, &records);
                Ok(())
            }
            Ok(Committed::Duplicate { .. }) => Ok(()),
            Err(CommitError::Conflict { .. }) => self.reread_stream(endpoint).await,
            Err(CommitError::Fenced { .. }) => Err(NodeError::TakenOver {
                node: self.config.node.clone(),
            }),
            Err(CommitError::Store(StoreError::Closed)) => Err(StoreError::Closed.into()),
            Err(error) => {
                tracing::warn!(%endpoint, %error, "failed to record instance changes");
                self.state.mark_dirty_later(endpoint);
                Ok(())
            }
        }
    }

    /// The stream is ahead of our state, because the response to one of our commits was lost. Its events
    /// come with the feed; nothing more is written before then.
    async fn reread_stream(&mut self, endpoint: &EndpointKey) -> Result<(), NodeError> {
        let stream = StreamName::of_node(endpoint, &self.config.node);
        loop {
            let version = self.state.version(endpoint);
            let records = match self.deps.store.read_stream(&stream, version, 1000).await {
                Ok(records) => records,
                Err(StoreError::Closed) => return Err(StoreError::Closed.into()),
                Err(error) => {
                    tracing::warn!(%endpoint, %error, "failed to read node stream, retrying");
                    self.state.mark_dirty_later(endpoint);
                    return Ok(());
                }
            };
            if records.is_empty() {
                self.state.mark_dirty_later(endpoint);
                return Ok(());
            }
            let records: Vec<_> = records.into_iter().map(Arc::new).collect();
            self.state.committed(endpoint, &records);
        }
    }

    async fn measure(&mut self, goodbye: bool) {
        let samples = self
            .deps
            .backends
            .values()
            .map(|backend| backend.resources());
        let samples = if goodbye {
            Vec::new()
        } else {
            join_all(samples).await.into_iter().flatten().collect()
        };
        let now = self.deps.clock.now();
        for frame in self
            .frames
            .close_second(now, &samples, &self.state, goodbye)
        {
            self.deps.bus.publish_frame(Arc::new(frame));
        }
    }

    /// Ends every instance of this node and records that it stopped, so that the next run starts with none.
    async fn stop_all(
        &mut self,
        observations: &mut mpsc::Receiver<Observation>,
    ) -> Result<(), NodeError> {
        // Wait for starts in progress, so that those instances are ended too.
        self.in_flight.finish().await;
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut longest_grace = Span::ZERO;
        let mut stopping = BTreeSet::<InstanceId>::new();
        for (kind, backend) in &self.deps.backends {
            let listed = match backend.list().await {
                Ok(listed) => listed,
                Err(error) => {
                    tracing::warn!(%kind, %error, "failed to list instances, leaving them running");
                    continue;
                }
            };
            for observed in listed {
                let generation = self.state.newest_generation(&observed);
                let id = observed.id;
                let grace = self.state.termination_grace(&id);
                longest_grace = longest_grace.max(grace);
                match remove_with_retries(deadline, backend.as_ref(), &id, generation, grace).await
                {
                    Ok(()) => drop(stopping.insert(id)),
                    Err(error) => {
                        tracing::warn!(instance = %id, %error, "failed to end instance, leaving it running");
                    }
                }
            }
        }
        let deadline = Instant::now() + longest_grace.to_std() + STOP_TIMEOUT;
        let waiting = stopping.len();
        let mut stopped = BTreeMap::new();
        while stopped.len() < waiting {
            let Ok(Some(observation)) = timeout_at(deadline, observations.recv()).await else {
                tracing::warn!(
                    left = waiting - stopped.len(),
                    "instances did not stop in time"
                );
                break;
            };
            if let Observation::Changed(_, observed) = observation
                && let ObservedPhase::Removed { code } = observed.phase
                && stopping.contains(&observed.id)
            {
                stopped.insert(observed.id, code);
            }
        }
        let (ended, left) = (stopped.len(), waiting - stopped.len());
        tracing::info!(
            ended,
            left,
            next_start = "starts them again",
            "ended the instances of this node"
        );
        self.record_stops(stopped).await
    }

    async fn record_stops(
        &mut self,
        stopped: BTreeMap<InstanceId, Option<i32>>,
    ) -> Result<(), NodeError> {
        for (endpoint, events) in self.state.stop_events(&stopped) {
            for _ in 0..STOP_ATTEMPTS {
                let (_, result) = self.commit(endpoint.clone(), events.clone()).await;
                let conflict = matches!(result, Err(CommitError::Conflict { .. }));
                self.handle_commit(&endpoint, result).await?;
                if !conflict {
                    break;
                }
            }
        }
        Ok(())
    }
}
