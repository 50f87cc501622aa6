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

mod fold;
pub mod lag;
mod owned;
mod projector;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use bus::Subscription;
use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::log::{Record, RowChange};
use contract::resources::{InstanceTally, ProvisioningState};
use domain::endpoint::Endpoint;
use domain::views::{EndpointModel, Projection};
use futures::StreamExt;
use runtime::consumer::{
    Applied, Consumer, ConsumerConfig, ConsumerDeps, Entries, Folds, Ownership, Step,
};
use runtime::health::Component;
use runtime::parking::catch_panic;
use store::{CommitError, StoreError};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::access::Access;
use crate::commands::Commands;
use crate::deps::ControlDeps;
use crate::metrics::{ControlMetrics, InstanceLabels};
use crate::reactor;
use crate::routes::{REPUBLISH_EVERY, Routes};
use fold::{RowsWanted, ViewsFold};
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
    models: Folds<EndpointModel>,
    progress: watch::Receiver<Progress>,
}

impl Views {
    pub fn models(&self) -> MutexGuard<'_, Entries<EndpointModel>> {
        self.models.lock()
    }

    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

pub struct ViewsConsumer {
    deps: ControlDeps,
    commands: Arc<Commands>,
    access: Arc<Access>,
    metrics: ControlMetrics,
    component: Component,
    consumer: Consumer<ViewsFold>,
    models: Folds<EndpointModel>,
    /// Of what belongs to no endpoint.
    global: Projection,
    progress: watch::Sender<Progress>,
    wanted: RowsWanted,
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
        let config = ConsumerConfig {
            consumer: CONSUMER,
            snapshots: CONSUMER.to_owned(),
            ownership: Ownership::Elsewhere,
            waits_for_writes: true,
        };
        let consumer_deps = ConsumerDeps {
            store: deps.store.clone(),
            bus: deps.bus.clone(),
            clock: deps.clock.clone(),
        };
        let wanted = RowsWanted::default();
        let consumer = Consumer::open(
            config,
            ViewsFold::new(wanted.clone()),
            consumer_deps,
            component.clone(),
        );
        let models = consumer.folds().clone();
        let views = Views {
            models: models.clone(),
            progress: progress.subscribe(),
        };
        let consumer = Self {
            deps,
            commands,
            access,
            metrics,
            component,
            consumer,
            models,
            global: Projection::default(),
            progress,
            wanted,
            owned: BTreeMap::new(),
            to_take: BTreeMap::new(),
            routes,
            touched: BTreeSet::new(),
            unsettled: BTreeSet::new(),
        };
        (consumer, views)
    }

    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), StoreError> {
        // Of this subscription only the assignment is of interest.
        let bus = self.deps.bus.clone();
        let mut ownership = bus.subscribe_records(Subscription::Group(CONSUMER));
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
                () = shutdown.cancelled() => break,
                Some(message) = ownership.recv() => {
                    self.assigned(&message);
                    self.hear(&mut ownership);
                }
                step = self.consumer.next() => self.handle(step?).await?,
                _ = second.tick() => self.react_to_time().await?,
                _ = republish.tick() => self.publish_all(),
            }
        }
        self.consumer.save_all().await;
        Ok(())
    }

    async fn handle(&mut self, step: Step<Vec<RowChange>>) -> Result<(), StoreError> {
        match step {
            Step::Applied(applied) => self.applied(applied).await,
            Step::Unreadable { bucket, position } => {
                let batch = self.batch(bucket, position, Vec::new());
                let reached = BTreeMap::from([(bucket, position)]);
                self.advance(reached, batch.into_iter().collect()).await
            }
            Step::Passed(passed) => self.advance(passed, BTreeMap::new()).await,
            Step::Rebuilt { key, by, .. } => {
                let rows = self.all_rows(&key, by.position).await;
                let rows = until_read(rows)?.unwrap_or_default();
                let batch = self.batch(by.bucket, by.position, rows);
                self.touched.insert(key);
                let reached = BTreeMap::from([(by.bucket, by.position)]);
                self.advance(reached, batch.into_iter().collect()).await
            }
            Step::Taken(buckets) => {
                // What was owned before its fold began has been begun without its fence.
                for (bucket, owned) in &self.owned {
                    self.consumer.own(*bucket, Some(owned.fence.clone()));
                }
                self.progress.send_modify(|progress| {
                    for bucket in buckets {
                        let position = self.consumer.position(bucket);
                        progress.newest = progress.newest.max(position);
                        progress.folded.insert(bucket, position);
                    }
                });
                Ok(())
            }
            Step::CaughtUp(_) => self.caught_up().await,
            // Its rows stay as they are. Everything is read, at once and for good.
            Step::Parked(_) | Step::Released(_) => Ok(()),
        }
    }

    /// The rows of a bucket up to a position, if they are ours to write and not written yet. Those of the
    /// history are written at its end.
    fn batch(&self, bucket: Bucket, to: Position, rows: Vec<RowChange>) -> Option<(Bucket, Batch)> {
        let owned = self.owned.get(&bucket);
        let due = owned.is_some_and(|owned| to > owned.cursor);
        let due = due && self.progress.borrow().caught_up;
        due.then_some((bucket, Batch { rows, to }))
    }

    async fn applied(&mut self, applied: Vec<Applied<Vec<RowChange>>>) -> Result<(), StoreError> {
        let mut batches: BTreeMap<Bucket, Batch> = BTreeMap::new();
        let mut reached = BTreeMap::new();
        let mut last = None;
        for Applied { record, effect } in applied {
            let rows = match record.endpoint() {
                None => self.apply_global(&record),
                Some(key) => {
                    self.forget_metrics(&record);
                    self.touched.insert(key);
                    effect.unwrap_or_default()
                }
            };
            if let Some((bucket, batch)) = self.batch(record.bucket, record.position, rows) {
                let known = batches.entry(bucket).or_default();
                known.rows.extend(batch.rows);
                known.to = batch.to;
            }
            reached.insert(record.bucket, record.position);
            last = Some(record.time);
        }
        self.advance(reached, batches).await?;
        if let Some(time) = last {
            let lag = self.deps.clock.now().since(time);
            self.metrics.event_lag.set(lag.millis() as f64 / 1000.0);
            self.metrics
                .position
                .set(self.progress.borrow().newest.0 as i64);
        }
        Ok(())
    }

    /// How far a bucket has been folded, also where it was not handled here yet: no rows were made of that.
    fn folded(&self, bucket: Bucket) -> Position {
        match bucket {
            Bucket::GLOBAL => {
                let progress = self.progress.borrow();
                progress.folded.get(&bucket).copied().unwrap_or_default()
            }
            bucket => self.consumer.position(bucket),
        }
    }

    /// Applies a record that belongs to no endpoint.
    fn apply_global(&mut self, record: &Record) -> Vec<RowChange> {
        self.access.follow(record);
        if self.routes.apply(record) {
            let models = self.models.lock();
            self.touched
                .extend(models.iter().map(|(key, _)| key.clone()));
        }
        let global = &mut self.global;
        catch_panic(|| global.apply(record)).unwrap_or_else(|detail| {
            let event_type = record.event.type_name();
            tracing::error!(position = %record.position, event_type, detail, "an event cannot be applied, and is skipped");
            Vec::new()
        })
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

    async fn caught_up(&mut self) -> Result<(), StoreError> {
        self.wanted.end_history();
        let behind = |(bucket, owned): (&Bucket, &Owned)| {
            (self.folded(*bucket) > owned.cursor).then_some(*bucket)
        };
        let behind: Vec<Bucket> = self.owned.iter().filter_map(behind).collect();
        for bucket in behind {
            self.retake(bucket, Instant::now());
        }
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
        {
            let models = self.models.lock();
            self.touched
                .extend(models.iter().map(|(key, _)| key.clone()));
        }
        self.publish_touched();
        self.component.ready();
        self.react_to_touched().await
    }

    fn owns(&self, key: &EndpointKey) -> bool {
        self.owned.contains_key(&key.bucket())
    }

    fn publish_touched(&self) {
        let models = self.models.lock();
        for key in self.touched.iter().filter(|key| self.owns(key)) {
            if let Some(entry) = models.get(key) {
                self.routes.publish(key, &entry.state);
            }
        }
    }

    fn publish_all(&self) {
        if !self.progress.borrow().caught_up {
            return;
        }
        let models = self.models.lock();
        for (key, entry) in models.iter().filter(|(key, _)| self.owns(key)) {
            self.routes.publish(key, &entry.state);
        }
    }

    async fn react_to_touched(&mut self) -> Result<(), StoreError> {
        let members = self.routes.members();
        let touched = std::mem::take(&mut self.touched);
        let this = &*self;
        let reactions = touched.into_iter().filter_map(|key| {
            let model = this.models.lock().get(&key).map(|e| e.state.clone());
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
            let models = self.models.lock();
            for (key, entry) in models.iter() {
                let model = &entry.state;
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

/// What cannot be read now is written by whoever takes the bucket the next time.
fn until_read<T>(read: Result<Option<T>, StoreError>) -> Result<Option<T>, StoreError> {
    match read {
        Err(StoreError::Closed) => Err(StoreError::Closed),
        Err(error) => {
            tracing::error!(%error, "the rows of an endpoint that is parked no longer cannot be written");
            Ok(None)
        }
        read => read,
    }
}
