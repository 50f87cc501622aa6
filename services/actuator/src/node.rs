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

mod frames;
mod parked;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use backends::{Backend, BackendError, Observed, ObservedPhase};
use bus::{Bus, Subscription};
use contract::events::Event;
use contract::frame::Hello;
use contract::ids::{EndpointKey, InstanceId, Position};
use contract::log::{Actor, NewEvent, StreamName};
use contract::resources::BackendKind;
use contract::time::Span;
use futures::future::join_all;
use runtime::clock::Clock;
use runtime::feed::{Feed, FeedItem};
use runtime::health::{Component, READS_THE_LOG};
use runtime::ids::Ids;
use runtime::parking::{Parking, survive};
use runtime::retry::until_answered;
use store::{Append, Commit, CommitError, Committed, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use frames::Frames;
use parked::Past;
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
    let feed = Feed::open(
        deps.store.clone(),
        deps.bus.clone(),
        Subscription::Whole,
        BTreeMap::new(),
    )
    .reporting(&deps.component);
    let (sender, observations) = mpsc::channel(OBSERVATIONS_MAX);
    let stop_watching = CancellationToken::new();
    let _stop = stop_watching.clone().drop_guard();
    for (kind, backend) in &deps.backends {
        tokio::spawn(watch(
            *kind,
            backend.clone(),
            sender.clone(),
            stop_watching.clone(),
        ));
    }
    deps.component.waiting(READS_THE_LOG);
    let hello = Hello {
        address: config.address.clone(),
        backends: deps.backends.keys().copied().collect(),
    };
    let mut agent = Agent {
        state: NodeState::new(&config.node, config.grace),
        frames: Frames::new(&config.node, hello, deps.ids.uid()),
        listed: 0,
        caught_up: false,
        carrying_out: JoinSet::new(),
        parking: Parking::open(CONSUMER, deps.store.clone(), deps.component.clone()),
        refolds: BTreeMap::new(),
        reading: JoinSet::new(),
        fence,
        config,
        deps,
    };
    agent.run(feed, observations, shutdown).await
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
                    .send(Observation::Listed(kind, listed))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(?kind, %error, "instances cannot be listed");
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
                .send(Observation::Seen(kind, observed))
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
    carrying_out: JoinSet<Outcome>,
    parking: Parking,
    /// Endpoints that people want back, and up to where they are to be folded.
    refolds: BTreeMap<EndpointKey, Position>,
    reading: JoinSet<Past>,
}

/// How an order went that is over for now.
struct Outcome {
    order: BackendOrder,
    result: Result<(), BackendError>,
}

impl Agent {
    async fn run(
        &mut self,
        mut feed: Feed,
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
                item = feed.next() => self.take_in(item?),
                Some(observation) = observations.recv() => self.observe(observation),
                Some(outcome) = self.carrying_out.join_next() => self.conclude(outcome),
                Some(Ok(past)) = self.reading.join_next() => self.fold_anew(past)?,
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
        for backend in self.deps.backends.values() {
            backend.release().await;
        }
        self.measure(true).await;
        Ok(())
    }

    fn take_in(&mut self, item: FeedItem) {
        match item {
            FeedItem::Records(records) => {
                for record in records {
                    self.fold(&record);
                }
            }
            // Whoever reads everything is assigned everything at once.
            FeedItem::CaughtUp(buckets) => {
                self.caught_up = true;
                self.state.touch_all();
                self.parking.caught_up(&buckets);
            }
            FeedItem::Unreadable(unreadable) => self.pass_over(&unreadable),
            // Instances are on this node whoever owns their bucket.
            FeedItem::Assigned(_) | FeedItem::Revoked(_) => {}
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
            let plan = match survive(|| state.plan(&endpoint)) {
                Ok(plan) => plan,
                Err(detail) => {
                    let position = self.state.position(&endpoint);
                    self.park(&endpoint, position, "evaluation", &detail);
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
        let Some(backend) = self.deps.backends.get(&order.kind()).cloned() else {
            if matches!(order, BackendOrder::Remove { .. }) {
                return self.state.nowhere(order.id());
            }
            let detail = format!(
                "node {} does not allow this backend; see the configuration of the actuator",
                self.config.node
            );
            return self.state.lost(order.id(), &detail);
        };
        self.carrying_out.spawn(async move {
            let result = match &order {
                BackendOrder::Ensure { order, .. } => backend.ensure((**order).clone()).await,
                BackendOrder::Remove {
                    id,
                    generation,
                    grace,
                    ..
                } => backend.remove(id, *generation, *grace).await,
            };
            Outcome { order, result }
        });
    }

    fn conclude(&mut self, outcome: Result<Outcome, tokio::task::JoinError>) {
        let Ok(Outcome { order, result }) = outcome else {
            return;
        };
        let Err(error) = result else {
            return;
        };
        match (&order, error) {
            (BackendOrder::Ensure { .. }, BackendError::CannotStart { detail, .. }) => {
                self.state.lost(order.id(), &detail);
            }
            (BackendOrder::Ensure { .. }, error @ BackendError::Stale { .. }) => {
                // The log wants it and the backend has buried it: it can only be replaced.
                self.state.lost(order.id(), &error.to_string());
            }
            // Told already, for all that had to wait at once.
            (_, BackendError::Lacking { .. }) => self.state.failed(&order),
            (_, error) => {
                tracing::warn!(instance = %order.id(), %error, "an order could not be carried out");
                self.state.failed(&order);
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
        let append = Append {
            stream: StreamName::of_node(&endpoint, &self.config.node),
            expected_version: self.state.version(&endpoint),
            events: events.into_iter().map(new_event).collect(),
        };
        let commit = Commit {
            appends: vec![append],
            fence: Some(self.fence.clone()),
            ..Commit::default()
        };
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
        while self.carrying_out.join_next().await.is_some() {}
        let deadline = Instant::now() + self.config.grace.to_std() + STOP_PATIENCE;
        let mut going = BTreeSet::<InstanceId>::new();
        for (kind, backend) in &self.deps.backends {
            let listed = match backend.list().await {
                Ok(listed) => listed,
                Err(error) => {
                    tracing::warn!(?kind, %error, "instances cannot be listed, and stay");
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
