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
mod state;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use backends::{Backend, BackendError, Observed, ObservedPhase};
use bus::{Bus, Subscription};
use contract::events::Event;
use contract::frame::Hello;
use contract::ids::{EndpointKey, InstanceId, Position};
use contract::log::{Actor, NewEvent, Record, StreamName};
use contract::resources::BackendKind;
use contract::time::Span;
use futures::future::join_all;
use runtime::clock::Clock;
use runtime::feed::{Feed, FeedItem};
use runtime::health::Component;
use runtime::ids::Ids;
use runtime::parking::{self, Parking, Verdict, endpoint_of, survive};
use runtime::retry::until_answered;
use store::{Append, Commit, CommitError, Committed, Entry, Fence, Store, StoreError, Unreadable};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use frames::Frames;
use state::{BackendOrder, NodeState};

pub use state::GONE;

/// What all nodes are called where endpoints are parked.
pub const CONSUMER: &str = "node";

/// What could not be done is tried again after this time.
const RETRY_EVERY: Duration = Duration::from_secs(1);

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
    deps.component.waiting("reads the log");
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

/// The history of an endpoint that is to be folded anew.
struct Past {
    key: EndpointKey,
    to: Position,
    entries: Result<Vec<Entry>, StoreError>,
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

    fn fold(&mut self, record: &Record) {
        match self.parking.judge(record) {
            Verdict::Fold => {
                let state = &mut self.state;
                if let Err(detail) = survive(|| state.apply(record))
                    && let Some(key) = record.endpoint()
                {
                    self.park(&key, record.position, record.event.type_name(), &detail);
                }
            }
            Verdict::PassOver => self.refold_up_to(record.endpoint(), record.position),
            Verdict::FoldAnew => {
                if let Some(key) = record.endpoint() {
                    self.refolds.insert(key.clone(), record.position);
                    self.read_history(key, record.position);
                }
            }
        }
    }

    fn pass_over(&mut self, unreadable: &Unreadable) {
        match self.parking.unreadable(unreadable, self.deps.clock.now()) {
            Some(key) => self.state.park(&key),
            None => self.refold_up_to(endpoint_of(unreadable), unreadable.position),
        }
    }

    fn park(&mut self, key: &EndpointKey, position: Position, event_type: &str, detail: &str) {
        self.state.park(key);
        let now = self.deps.clock.now();
        self.parking.park(key, position, event_type, detail, now);
    }

    /// While its history is being read, an endpoint goes on to change.
    fn refold_up_to(&mut self, key: Option<EndpointKey>, position: Position) {
        if let Some(to) = key.and_then(|key| self.refolds.get_mut(&key)) {
            *to = position;
        }
    }

    /// Beside everything else: an outage of the store must not keep measurements from being sent.
    fn read_history(&mut self, key: EndpointKey, to: Position) {
        let (store, component) = (self.deps.store.clone(), self.deps.component.clone());
        self.reading.spawn(async move {
            let read = || parking::history(store.clone(), key.clone(), to);
            let entries = until_answered(&component, read).await;
            Past { key, to, entries }
        });
    }

    fn fold_anew(&mut self, past: Past) -> Result<(), StoreError> {
        let Past { key, to, entries } = past;
        let entries = entries?;
        match self.refolds.get(&key).copied() {
            None => return Ok(()),
            Some(further) if further > to => {
                self.read_history(key, further);
                return Ok(());
            }
            Some(_) => self.refolds.remove(&key),
        };
        let (state, now) = (&mut self.state, self.deps.clock.now());
        let whole = parking::fold_anew(&mut self.parking, &key, entries, now, |record| {
            state.apply(record);
        });
        match whole {
            true => self.state.unpark(&key),
            false => self.state.park(&key),
        }
        Ok(())
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
        let mut going = BTreeMap::<InstanceId, Option<i32>>::new();
        let mut waiting = 0_usize;
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
                match backend
                    .remove(&observed.id, generation, self.config.grace)
                    .await
                {
                    Ok(()) => waiting += usize::from(going.insert(observed.id, None).is_none()),
                    Err(error) => {
                        tracing::warn!(instance = %observed.id, %error, "cannot be ended, and stays");
                    }
                }
            }
        }
        let deadline = Instant::now() + self.config.grace.to_std() + STOP_PATIENCE;
        let mut gone = BTreeMap::new();
        while gone.len() < waiting {
            let Ok(Some(observation)) = timeout_at(deadline, observations.recv()).await else {
                tracing::warn!(left = waiting - gone.len(), "instances did not end in time");
                break;
            };
            if let Observation::Seen(_, observed) = observation
                && let ObservedPhase::Removed { code } = observed.phase
                && going.contains_key(&observed.id)
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

#[cfg(test)]
mod tests {
    use contract::events::{Empty, InstanceRequested, RequestReason};
    use contract::ids::Uid;
    use contract::log::StreamKind;
    use contract::time::Timestamp;
    use runtime::clock::SystemClock;
    use runtime::health::Health;
    use runtime::ids::SeededIds;
    use uuid::Uuid;

    use super::*;

    fn key(endpoint: &str) -> EndpointKey {
        EndpointKey::new(&endpoint.parse().unwrap())
    }

    fn record(position: u64, endpoint: &str, event: Event) -> Arc<Record> {
        let key = key(endpoint);
        Arc::new(Record {
            position: Position(position),
            prev: Position(position - 1),
            bucket: key.bucket(),
            stream: StreamName::of(StreamKind::Instances, &key),
            version: position,
            id: Uuid::from_u128(position.into()),
            time: Timestamp::from_secs(1),
            actor: Actor::service("test"),
            event,
        })
    }

    fn requested(endpoint: &str) -> Event {
        Event::InstanceRequested(Box::new(InstanceRequested {
            id: InstanceId::from(format!("{endpoint}-blue-1")),
            generation: 1,
            deployment: format!("{endpoint}/blue").parse().unwrap(),
            deployment_uid: Uid(Uuid::from_u128(7)),
            revision: 1,
            node: "n".into(),
            decision: None,
            reason: RequestReason::ScaleOut,
            spec: serde_json::from_str(r#"{"backend": "simulated", "instanceType": "t"}"#).unwrap(),
        }))
    }

    async fn agent(folder: &tempfile::TempDir, health: &Health) -> Agent {
        let url = format!("sqlite:{}", folder.path().join("log.db").display());
        let store = Store::open(&url).await.unwrap();
        let config = NodeConfig {
            node: "n".into(),
            address: None,
            keep_instances: true,
            grace: Span::from_secs(1),
        };
        let deps = NodeDeps {
            store: store.clone(),
            bus: bus::LocalBus::new(),
            clock: Arc::new(SystemClock),
            ids: Arc::new(SeededIds::new(1)),
            backends: BTreeMap::new(),
            component: health.component("node"),
        };
        let hello = Hello {
            address: None,
            backends: Vec::new(),
        };
        Agent {
            state: NodeState::new("n", config.grace),
            frames: Frames::new("n", hello, deps.ids.uid()),
            listed: 0,
            caught_up: false,
            carrying_out: JoinSet::new(),
            parking: Parking::open(CONSUMER, store.clone(), deps.component.clone()),
            refolds: BTreeMap::new(),
            reading: JoinSet::new(),
            fence: store.take("node/n").await.unwrap(),
            config,
            deps,
        }
    }

    #[tokio::test]
    async fn a_panic_in_the_fold_parks_the_endpoint_that_it_is_about() {
        let folder = tempfile::tempdir().unwrap();
        let health = Health::default();
        let mut agent = agent(&folder, &health).await;
        agent.state.panics_at = Some(Position(2));
        agent.take_in(FeedItem::Records(vec![
            record(1, "rose", requested("rose")),
            record(2, "rose", Event::EndpointDeleted(Empty {})),
            record(3, "iris", requested("iris")),
        ]));
        assert!(agent.parking.is_parked(&key("rose")));
        assert!(!agent.parking.is_parked(&key("iris")));
        let rose = agent.state.plan(&key("rose"));
        assert_eq!((rose.orders.len(), rose.events.len()), (0, 0));
        assert_eq!(agent.state.plan(&key("iris")).orders.len(), 1);
        assert!(health.remarks()[0].contains("rose (position 2)"));
    }
}
