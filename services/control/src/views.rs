//! The consumer `views`: folds the log, writes the rows of read models, publishes routes and asks the
//! reactor.
//!
//! Every replica folds the whole log, for its own API. Rows, cursors, routes and the reactor are done
//! only by the owner of a bucket, who carries the bucket's fence in every commit; the owner of bucket 0
//! owns the global bucket, too.
//!
//! Invariants: a bucket's rows and its cursor move in one commit; whoever takes a bucket goes on from
//! the stored cursor, so no row is written twice and none is left out; routes are published only from
//! a state that has taken in the whole history, and by their revision none replaces a newer one; an
//! endpoint whose events cannot be digested is parked, and the others go on.

pub mod lag;
mod owned;
mod projector;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bus::Subscription;
use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::log::{Record, RowChange};
use contract::resources::{InstanceTally, ProvisioningState};
use domain::endpoint::Endpoint;
use domain::views::Projection;
use futures::StreamExt;
use runtime::feed::{Feed, FeedItem};
use runtime::health::{Component, READS_THE_LOG};
use runtime::parking::{Parking, Verdict, fold_anew, history, survive};
use runtime::retry::until_answered;
use store::{CommitError, StoreError, Unreadable};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::access::Access;
use crate::commands::Commands;
use crate::deps::ControlDeps;
use crate::metrics::{ControlMetrics, InstanceLabels};
use crate::reactor;
use crate::routes::{REPUBLISH_EVERY, Routes};
use owned::{Batch, Owned};
pub use projector::ViewsProjector;

pub const CONSUMER: &str = "views";

/// Endpoints that the reactor writes about at once.
const REACTIONS_MAX: usize = 64;

/// Values of the label `state`.
const STATES: [&str; 4] = ["starting", "ready", "draining", "failed"];

/// How far this replica has folded each bucket, and how far the rows are of those that it owns.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    pub folded: BTreeMap<Bucket, Position>,
    pub written: BTreeMap<Bucket, Position>,
    pub newest: Position,
    pub caught_up: bool,
}

/// What requests see of the consumer.
#[derive(Clone)]
pub struct Views {
    projection: Arc<Mutex<Projection>>,
    progress: watch::Receiver<Progress>,
}

impl Views {
    pub fn projection(&self) -> MutexGuard<'_, Projection> {
        lock(&self.projection)
    }

    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

/// A panic cannot leave the fold half done: the endpoint that it is about is dropped.
fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct ViewsConsumer {
    deps: ControlDeps,
    commands: Arc<Commands>,
    access: Arc<Access>,
    metrics: ControlMetrics,
    component: Component,
    projection: Arc<Mutex<Projection>>,
    progress: watch::Sender<Progress>,
    parking: Parking,
    owned: BTreeMap<Bucket, Owned>,
    /// Assigned, and to be taken at this time.
    to_take: BTreeMap<Bucket, Instant>,
    routes: Arc<Routes>,
    /// Endpoints whose routes and states are to be looked at.
    touched: BTreeSet<EndpointKey>,
    /// Endpoints that the reactor could not write about.
    unsettled: BTreeSet<EndpointKey>,
}

impl ViewsConsumer {
    pub fn open(
        deps: ControlDeps,
        commands: Arc<Commands>,
        access: Arc<Access>,
        metrics: ControlMetrics,
        routes: Arc<Routes>,
        component: Component,
    ) -> (Self, Views) {
        let progress = watch::Sender::new(Progress::default());
        let projection = Arc::new(Mutex::new(Projection::default()));
        let views = Views {
            projection: projection.clone(),
            progress: progress.subscribe(),
        };
        component.waiting(READS_THE_LOG);
        let parking = Parking::open(CONSUMER, deps.store.clone(), component.clone());
        let consumer = Self {
            deps,
            commands,
            access,
            metrics,
            component,
            projection,
            progress,
            parking,
            owned: BTreeMap::new(),
            to_take: BTreeMap::new(),
            routes,
            touched: BTreeSet::new(),
            unsettled: BTreeSet::new(),
        };
        (consumer, views)
    }

    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), StoreError> {
        let (store, bus) = (self.deps.store.clone(), self.deps.bus.clone());
        // Of this subscription only the assignment is of interest.
        let mut ownership = bus.subscribe_records(Subscription::Group(CONSUMER));
        let feed = Feed::open(store, bus, Subscription::Whole, BTreeMap::new());
        let mut feed = feed.reporting(&self.component);
        let mut second = tokio::time::interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut republish =
            tokio::time::interval_at(Instant::now() + REPUBLISH_EVERY, REPUBLISH_EVERY);
        // What is ours from the start need not be folded twice.
        self.hear(&mut ownership);
        loop {
            self.take_due().await?;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                Some(message) = ownership.recv() => {
                    self.assigned(&message);
                    self.hear(&mut ownership);
                }
                item = feed.next() => self.take_in(item?).await?,
                _ = second.tick() => self.react_to_time().await?,
                _ = republish.tick() => self.publish_all(),
            }
        }
    }

    async fn take_in(&mut self, item: FeedItem) -> Result<(), StoreError> {
        match item {
            FeedItem::Records(records) => self.fold(&records).await,
            FeedItem::Unreadable(unreadable) => self.pass_over(&unreadable).await,
            FeedItem::CaughtUp(_) => self.caught_up().await,
            // The whole log, at once and for good.
            FeedItem::Assigned(_) | FeedItem::Revoked(_) => Ok(()),
        }
    }

    async fn fold(&mut self, records: &[Arc<Record>]) -> Result<(), StoreError> {
        let mut batches: BTreeMap<Bucket, Batch> = BTreeMap::new();
        for record in records {
            let rows = match self.parking.judge(record) {
                Verdict::Fold => self.apply(record),
                Verdict::PassOver => Vec::new(),
                Verdict::FoldAnew => self.fold_anew(record).await?,
            };
            self.touched.extend(record.endpoint());
            let owned = self.owned.get(&record.bucket);
            if owned.is_some_and(|owned| record.position > owned.cursor) {
                let batch = batches.entry(record.bucket).or_default();
                batch.rows.extend(rows);
                batch.to = record.position;
            }
        }
        let reached = records.iter().map(|r| (r.bucket, r.position)).collect();
        self.advance(reached, batches).await?;
        if let Some(last) = records.last() {
            let lag = self.deps.clock.now().since(last.time);
            self.metrics.event_lag.set(lag.millis() as f64 / 1000.0);
            self.metrics
                .position
                .set(self.progress.borrow().newest.0 as i64);
        }
        Ok(())
    }

    /// Publishes what has been folded, writes its rows, and lets the reactor look at it.
    async fn advance(
        &mut self,
        reached: BTreeMap<Bucket, Position>,
        batches: BTreeMap<Bucket, Batch>,
    ) -> Result<(), StoreError> {
        let caught_up = self.progress.borrow().caught_up;
        // Gateways first: they wait for nobody's rows.
        if caught_up {
            self.publish_touched();
        }
        let written = self.write_all(batches).await?;
        self.progress.send_modify(|progress| {
            let newest = reached.values().copied().max().unwrap_or_default();
            progress.newest = progress.newest.max(newest);
            progress.folded.extend(reached);
            progress.written.extend(written);
        });
        if caught_up {
            self.react_to_touched().await?;
        }
        Ok(())
    }

    fn apply(&mut self, record: &Record) -> Vec<RowChange> {
        self.forget_metrics(record);
        self.access.follow(record);
        if record.endpoint().is_none() && self.routes.apply(record) {
            let projection = lock(&self.projection);
            self.touched.extend(projection.endpoints.keys().cloned());
        }
        let folded = {
            let mut projection = lock(&self.projection);
            survive(|| projection.apply(record))
        };
        match folded {
            Ok(rows) => rows,
            Err(detail) => {
                let event_type = record.event.type_name();
                match record.endpoint() {
                    Some(key) => {
                        let now = self.deps.clock.now();
                        lock(&self.projection).endpoints.remove(&key);
                        self.parking
                            .park(&key, record.position, event_type, &detail, now);
                    }
                    None => {
                        tracing::error!(position = %record.position, event_type, detail, "an event cannot be folded, and is passed over");
                    }
                }
                Vec::new()
            }
        }
    }

    /// A person wants an endpoint back: its history is read from the store, and all its rows are
    /// made anew.
    async fn fold_anew(&mut self, unparked: &Record) -> Result<Vec<RowChange>, StoreError> {
        let Some(key) = unparked.endpoint() else {
            return Ok(Vec::new());
        };
        let read = || history(self.deps.store.clone(), key.clone(), unparked.position);
        let past = until_answered(&self.component, read).await?;
        let (mut fresh, mut rows) = (Projection::default(), Vec::new());
        let now = self.deps.clock.now();
        let whole = fold_anew(&mut self.parking, &key, past, now, |record| {
            rows.extend(fresh.apply(record));
        });
        let mut projection = lock(&self.projection);
        projection.endpoints.remove(&key);
        if whole && let Some(model) = fresh.endpoints.remove(&key) {
            projection.endpoints.insert(key, model);
        }
        Ok(rows)
    }

    async fn pass_over(&mut self, unreadable: &Unreadable) -> Result<(), StoreError> {
        let (bucket, position) = (unreadable.bucket, unreadable.position);
        if let Some(key) = self.parking.unreadable(unreadable, self.deps.clock.now()) {
            lock(&self.projection).endpoints.remove(&key);
        }
        let owned = self.owned.get(&bucket);
        let ours = owned.is_some_and(|owned| position > owned.cursor);
        let batch = Batch {
            rows: Vec::new(),
            to: position,
        };
        let batches = ours.then_some((bucket, batch)).into_iter().collect();
        self.advance(BTreeMap::from([(bucket, position)]), batches)
            .await
    }

    async fn caught_up(&mut self) -> Result<(), StoreError> {
        let writes = self.owned.iter().map(|(bucket, owned)| {
            let written = self.write_released(*bucket, owned);
            async move { (*bucket, written.await) }
        });
        for (bucket, written) in futures::future::join_all(writes).await {
            match written {
                Ok(()) => {}
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                Err(error) => self.take_again(bucket, &error),
            }
        }
        self.progress
            .send_modify(|progress| progress.caught_up = true);
        self.touched
            .extend(lock(&self.projection).endpoints.keys().cloned());
        self.publish_touched();
        self.component.ready();
        self.react_to_touched().await
    }

    fn owns(&self, key: &EndpointKey) -> bool {
        self.owned.contains_key(&key.bucket())
    }

    fn publish_touched(&self) {
        let projection = lock(&self.projection);
        for key in self.touched.iter().filter(|key| self.owns(key)) {
            if let Some(model) = projection.endpoints.get(key) {
                self.routes.publish(key, model);
            }
        }
    }

    fn publish_all(&self) {
        if !self.progress.borrow().caught_up {
            return;
        }
        let projection = lock(&self.projection);
        for (key, model) in projection
            .endpoints
            .iter()
            .filter(|(key, _)| self.owns(key))
        {
            self.routes.publish(key, model);
        }
    }

    async fn react_to_touched(&mut self) -> Result<(), StoreError> {
        let members = self.routes.members();
        let touched = std::mem::take(&mut self.touched);
        let this = &*self;
        let reactions = touched.into_iter().filter_map(|key| {
            let model = lock(&this.projection).endpoints.get(&key).cloned();
            let model = model.filter(|_| this.owns(&key))?;
            this.count_instances(&key, &model);
            let members = &members;
            Some(async move {
                let now = this.deps.clock.now();
                let outcome = reactor::react(&this.commands, &key, &model, members, now).await;
                (key, outcome)
            })
        });
        // Side by side: one after the other, each would wait for the disk by itself.
        let outcomes: Vec<(EndpointKey, Result<(), StoreError>)> = futures::stream::iter(reactions)
            .buffer_unordered(REACTIONS_MAX)
            .collect()
            .await;
        for (key, outcome) in outcomes {
            match outcome {
                Ok(()) => {}
                Err(StoreError::Closed) => return Err(StoreError::Closed),
                Err(error) => {
                    tracing::warn!(endpoint = %key, %error, "what follows from its state cannot be written yet");
                    self.unsettled.insert(key);
                }
            }
        }
        Ok(())
    }

    /// Pins expire and nodes are given up without an event, and what could not be written is tried again.
    async fn react_to_time(&mut self) -> Result<(), StoreError> {
        if !self.progress.borrow().caught_up {
            return Ok(());
        }
        let now = self.deps.clock.now();
        self.touched.append(&mut self.unsettled);
        {
            let projection = lock(&self.projection);
            for (key, model) in &projection.endpoints {
                let deployments = model.endpoint.iter().flat_map(|e| e.deployments.values());
                let expired = deployments
                    .filter_map(|deployment| deployment.pin?.until)
                    .any(|until| until <= now);
                let deleting = |endpoint: &Endpoint| {
                    let parts = endpoint.deployments.values().map(|d| d.state);
                    parts
                        .chain([endpoint.state])
                        .any(|state| state == ProvisioningState::Deleting)
                };
                // What was lost with its node is waited for no longer after a while.
                if expired || model.endpoint.as_ref().is_some_and(deleting) {
                    self.touched.insert(key.clone());
                }
            }
        }
        self.react_to_touched().await
    }

    /// What is gone is no longer exported.
    fn forget_metrics(&self, record: &Record) {
        let (Event::DeploymentDeleted(of), Some(key)) = (&record.event, record.endpoint()) else {
            return;
        };
        self.uncount(&key, &of.deployment);
    }

    fn uncount(&self, key: &EndpointKey, deployment: &Name) {
        for state in STATES {
            self.metrics.instances.remove(&InstanceLabels {
                endpoint: key.endpoint().to_string(),
                deployment: deployment.to_string(),
                state,
            });
        }
    }

    fn count_instances(&self, key: &EndpointKey, model: &domain::views::EndpointModel) {
        let Some(endpoint) = &model.endpoint else {
            return;
        };
        for (name, deployment) in &endpoint.deployments {
            let view = model.deployment_view(endpoint, name, deployment);
            let InstanceTally {
                starting,
                ready,
                draining,
                failed,
                ..
            } = view.status.instances;
            for (state, count) in STATES.into_iter().zip([starting, ready, draining, failed]) {
                let labels = InstanceLabels {
                    endpoint: key.endpoint().to_string(),
                    deployment: name.to_string(),
                    state,
                };
                self.metrics
                    .instances
                    .get_or_create(&labels)
                    .set(i64::from(count));
            }
        }
    }
}
