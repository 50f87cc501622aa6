//! The node agent: carries out what names its node, and answers in the streams `node/…`.
//!
//! It folds the whole log, so it needs no assignment of buckets; its lease (`node/ID`) keeps a second
//! agent with the same id from answering. Level-triggered: orders to backends and answers to the log
//! follow from what the log says and what the backends say, compared anew after every change. An
//! order may reach a backend more than once and is one in result, by its generation; an answer is
//! written once, because the next comparison waits until the log has brought it back.
//!
//! An event of an endpoint that it cannot digest parks the endpoint on every node (consumer `node`):
//! its instances are left as they are, neither ordered nor ended nor spoken of, until a person says
//! otherwise; the other endpoints go on.
//!
//! It also measures CPU and memory of its instances, in a frame per bucket and second.

mod fold;
mod frames;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use backends::{Backend, BackendError, Observed, ObservedPhase};
use bus::Bus;
use contract::events::Event;
use contract::frame::Hello;
use contract::ids::{EndpointKey, InstanceId};
use contract::log::{Actor, NewEvent, StreamName};
use contract::resources::BackendKind;
use contract::time::Span;
use futures::future::join_all;
use runtime::clock::Clock;
use runtime::consumer::{Applied, Consumer, ConsumerConfig, ConsumerDeps, Ownership, Step};
use runtime::executor::{Running, answer};
use runtime::health::Component;
use runtime::ids::Ids;
use runtime::parking::catch_panic;
use runtime::retry::until_answered;
use store::{CommitError, Committed, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use fold::{NodeFold, Placed};
use frames::Frames;
use state::{BackendOrder, NodeState};

pub use state::GONE;

/// What all nodes are called where endpoints are parked.
pub const CONSUMER: &str = "node";

/// What could not be done is tried again after this time.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// The same at the end of everything, when others have just given back what is lacking.
const LACK_PAUSE: Duration = Duration::from_millis(100);

/// Past the grace, how long the end of everything waits for instances that do not go.
const STOP_PATIENCE: Duration = Duration::from_secs(15);

/// Tries to append the answers of the last moment.
const STOP_TRIES: u32 = 3;

/// Observations that may wait for the agent.
const OBSERVATIONS_MAX: usize = 4096;

#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// See `backends::process::node_id`.
    pub node: String,
    /// Where the admin listener of this process answers, as a URL; others ask there for logs.
    pub address: Option<String>,
    /// Whether instances outlive this process.
    pub keep_instances: bool,
    /// From the polite signal to the hard one when everything ends, and for what nobody ordered.
    pub grace: Span,
}

pub struct NodeDeps {
    pub store: Store,
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    /// The backends that this node allows.
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

/// Runs until `shutdown`; then ends all instances, or lets go of them, and says goodbye. The store
/// must stay open until this returns.
pub async fn run(
    config: NodeConfig,
    deps: NodeDeps,
    shutdown: CancellationToken,
) -> Result<(), NodeError> {
    deps.component
        .waiting("takes the node's lease in the store");
    let lease = format!("node/{}", config.node);
    let taking = until_answered(&deps.component, || deps.store.take(&lease));
    let Some(fence) = shutdown.run_until_cancelled(taking).await else {
        return Ok(());
    };
    let fence = fence?;
    let consumer_config = ConsumerConfig {
        consumer: CONSUMER,
        snapshots: lease,
        ownership: Ownership::Sole(fence.clone()),
        waits_for_writes: false,
    };
    let consumer_deps = ConsumerDeps {
        store: deps.store.clone(),
        bus: deps.bus.clone(),
        clock: deps.clock.clone(),
    };
    let consumer = Consumer::open(
        consumer_config,
        NodeFold::of(&config.node),
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
        listed: 0,
        caught_up: false,
        carrying_out: Running::default(),
        fence,
        config,
        deps,
    };
    agent.run(observations, shutdown).await
}

/// What is heard of a backend.
enum Observation {
    /// Everything that the backend has; what it does not list, it does not have.
    Listed(BackendKind, Vec<Observed>),
    Seen(BackendKind, Observed),
}

/// Tells first what there is and then what changes; begins anew where the watch was too slow.
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
                tracing::warn!(%kind, %error, "instances cannot be listed");
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
                .send(Observation::Seen(kind.clone(), observed))
                .await
                .is_err()
            {
                return;
            }
        }
        sleep(RETRY_EVERY).await;
    }
}

/// What this process lacks the means for now is tried again: an instance left behind is an orphan.
async fn remove_by(
    deadline: Instant,
    backend: &dyn Backend,
    id: &InstanceId,
    generation: u64,
    grace: Span,
) -> Result<(), BackendError> {
    loop {
        match backend.remove(id, generation, grace).await {
            Err(BackendError::Lacking { .. }) if Instant::now() < deadline => {
                sleep(LACK_PAUSE).await;
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
    /// Backends that have said what they have.
    listed: usize,
    caught_up: bool,
    carrying_out: Running<BackendOrder, BackendError>,
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
                (order, result) = self.carrying_out.next() => self.conclude(&order, result),
                _ = retries.tick() => self.state.retry(),
            }
            while let Ok(observation) = observations.try_recv() {
                self.observe(observation);
            }
            if self.caught_up && self.listed >= self.deps.backends.len() {
                self.reconcile().await?;
                self.deps.component.ready();
            }
        }
        if !self.config.keep_instances {
            self.stop_all(&mut observations).await?;
        }
        self.consumer.save_all().await;
        for backend in self.deps.backends.values() {
            backend.release().await;
        }
        self.measure(true).await;
        Ok(())
    }

    fn handle(&mut self, step: Step<Placed>) {
        match step {
            Step::Applied(applied) => {
                for Applied { record, effect } in applied {
                    if let (Some(key), Some(placed)) = (record.endpoint(), effect) {
                        self.state.applied(key, placed);
                    }
                }
            }
            // Whoever reads everything is assigned everything at once.
            Step::Taken(_) => self.state.restore_all(),
            Step::CaughtUp(_) => {
                self.caught_up = true;
                self.state.touch_all();
            }
            Step::Parked(key) => self.state.park(&key),
            Step::Rebuilt { key, .. } => self.state.unpark(&key),
            // Instances are on this node whoever owns their bucket.
            Step::Unreadable { .. } | Step::Passed(_) | Step::Released(_) => {}
        }
    }

    fn observe(&mut self, observation: Observation) {
        match observation {
            Observation::Seen(kind, observed) => self.state.observe(kind, observed),
            Observation::Listed(kind, observed) => {
                if self.state.list(kind, observed) {
                    self.listed += 1;
                }
            }
        }
    }

    /// Brings backends and log in line with each other, for all endpoints where something changed.
    async fn reconcile(&mut self) -> Result<(), NodeError> {
        let mut commits = Vec::new();
        for order in self.state.stray_orders() {
            self.give(order);
        }
        for endpoint in self.state.take_touched() {
            let state = &mut self.state;
            let plan = match catch_panic(|| state.plan(&endpoint)) {
                Ok(plan) => plan,
                Err(detail) => {
                    self.state.park(&endpoint);
                    self.consumer.park(&endpoint, &detail);
                    continue;
                }
            };
            for order in plan.orders {
                self.give(order);
            }
            if !plan.events.is_empty() {
                commits.push(self.commit(endpoint, plan.events));
            }
        }
        for (endpoint, result) in join_all(commits).await {
            self.committed(&endpoint, result).await?;
        }
        Ok(())
    }

    /// Hands an order to its backend without waiting for it.
    fn give(&mut self, order: BackendOrder) {
        let Some(backend) = self.deps.backends.get(order.kind()).cloned() else {
            if matches!(order, BackendOrder::Remove { .. }) {
                return self.state.nowhere(order.id());
            }
            let detail = format!(
                "node {} does not allow this backend; see the configuration of the actuator",
                self.config.node
            );
            return self.state.lost(order.id(), &detail);
        };
        self.carrying_out.begin(order, |order| {
            let order = order.clone();
            async move {
                match order {
                    BackendOrder::Ensure { order, .. } => backend.ensure(*order).await,
                    BackendOrder::Remove {
                        id,
                        generation,
                        grace,
                        ..
                    } => backend.remove(&id, generation, grace).await,
                }
            }
        });
    }

    fn conclude(&mut self, order: &BackendOrder, result: Result<(), BackendError>) {
        let Err(error) = result else {
            return;
        };
        match (order, error) {
            (BackendOrder::Ensure { .. }, BackendError::CannotStart { detail, .. }) => {
                self.state.lost(order.id(), &detail);
            }
            (BackendOrder::Ensure { .. }, error @ BackendError::Stale { .. }) => {
                // The log wants it and the backend has buried it: it can only be replaced.
                self.state.lost(order.id(), &error.to_string());
            }
            // Told already, for all that had to wait at once.
            (_, BackendError::Lacking { .. }) => self.state.failed(order),
            (_, error) => {
                tracing::warn!(instance = %order.id(), %error, "an order could not be carried out");
                self.state.failed(order);
            }
        }
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
        let commit = answer(
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

    async fn committed(
        &mut self,
        endpoint: &EndpointKey,
        result: Result<Committed, CommitError>,
    ) -> Result<(), NodeError> {
        match result {
            Ok(Committed::Now { records }) => {
                self.state.committed(endpoint, &records);
                Ok(())
            }
            Ok(Committed::Before { .. }) => Ok(()),
            Err(CommitError::Conflict { .. }) => self.read_again(endpoint).await,
            Err(CommitError::Fenced { .. }) => Err(NodeError::TakenOver {
                node: self.config.node.clone(),
            }),
            Err(CommitError::Store(StoreError::Closed)) => Err(StoreError::Closed.into()),
            Err(error) => {
                tracing::warn!(%endpoint, %error, "what became of instances cannot be recorded");
                self.state.touch_later(endpoint);
                Ok(())
            }
        }
    }

    /// The stream is further than we know: a commit of ours whose answer was lost. What it says
    /// comes with the feed; nothing more is written before.
    async fn read_again(&mut self, endpoint: &EndpointKey) -> Result<(), NodeError> {
        let stream = StreamName::of_node(endpoint, &self.config.node);
        loop {
            let version = self.state.version(endpoint);
            let records = match self.deps.store.read_stream(&stream, version, 1000).await {
                Ok(records) => records,
                Err(StoreError::Closed) => return Err(StoreError::Closed.into()),
                Err(error) => {
                    tracing::warn!(%endpoint, %error, "what was said of its instances cannot be read, trying again");
                    self.state.touch_later(endpoint);
                    return Ok(());
                }
            };
            if records.is_empty() {
                self.state.touch_later(endpoint);
                return Ok(());
            }
            let records: Vec<_> = records.into_iter().map(Arc::new).collect();
            self.state.committed(endpoint, &records);
        }
    }

    async fn measure(&mut self, goodbye: bool) {
        let asked = self
            .deps
            .backends
            .values()
            .map(|backend| backend.resources());
        let samples = if goodbye {
            Vec::new()
        } else {
            join_all(asked).await.into_iter().flatten().collect()
        };
        let now = self.deps.clock.now();
        for frame in self
            .frames
            .close_second(now, &samples, &self.state, goodbye)
        {
            self.deps.bus.publish_frame(Arc::new(frame));
        }
    }

    /// Ends every instance of this node and writes down that it stopped, so that the next start
    /// begins with none.
    async fn stop_all(
        &mut self,
        observations: &mut mpsc::Receiver<Observation>,
    ) -> Result<(), NodeError> {
        // An instance that is just being started is ended like the others.
        self.carrying_out.finish().await;
        let deadline = Instant::now() + self.config.grace.to_std() + STOP_PATIENCE;
        let mut going = BTreeSet::<InstanceId>::new();
        for (kind, backend) in &self.deps.backends {
            let listed = match backend.list().await {
                Ok(listed) => listed,
                Err(error) => {
                    tracing::warn!(%kind, %error, "instances cannot be listed, and stay");
                    continue;
                }
            };
            for observed in listed {
                let generation = self.state.newest_generation(&observed);
                let (id, grace) = (observed.id, self.config.grace);
                match remove_by(deadline, backend.as_ref(), &id, generation, grace).await {
                    Ok(()) => drop(going.insert(id)),
                    Err(error) => {
                        tracing::warn!(instance = %id, %error, "cannot be ended, and stays");
                    }
                }
            }
        }
        let deadline = Instant::now() + self.config.grace.to_std() + STOP_PATIENCE;
        let waiting = going.len();
        let mut gone = BTreeMap::new();
        while gone.len() < waiting {
            let Ok(Some(observation)) = timeout_at(deadline, observations.recv()).await else {
                tracing::warn!(left = waiting - gone.len(), "instances did not end in time");
                break;
            };
            if let Observation::Seen(_, observed) = observation
                && let ObservedPhase::Removed { code } = observed.phase
                && going.contains(&observed.id)
            {
                gone.insert(observed.id, code);
            }
        }
        self.record_stops(gone).await
    }

    async fn record_stops(
        &mut self,
        gone: BTreeMap<InstanceId, Option<i32>>,
    ) -> Result<(), NodeError> {
        for (endpoint, events) in self.state.stops(&gone) {
            for _ in 0..STOP_TRIES {
                let (_, result) = self.commit(endpoint.clone(), events.clone()).await;
                let conflict = matches!(result, Err(CommitError::Conflict { .. }));
                self.committed(&endpoint, result).await?;
                if !conflict {
                    break;
                }
            }
        }
        Ok(())
    }
}
