//! The consumer `views`: folds the log, writes the rows of read models, publishes routes and runs the
//! reactor.
//!
//! Every replica folds the full log for its own API. Only the owner of a bucket writes its rows and
//! cursor, publishes its routes and runs the reactor for it, with the bucket's fence in every commit.
//! The owner of bucket 0 also owns the global bucket.
//!
//! Invariants: a bucket's rows and its cursor are written in one commit; a new owner continues from the
//! stored cursor, so no row is written twice or missed; routes are published only after the full history
//! has been folded, and their revision keeps an older one from replacing a newer one; an endpoint whose
//! events cannot be processed is parked, and the others continue.

mod fold;
pub mod lag;
mod owned;
mod projector;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::log::{Record, RowChange};
use contract::resources::ProvisioningState;
use contract::views::{AvailableReason, InstanceTally};
use domain::available;
use domain::endpoint::Endpoint;
use domain::views::{EndpointModel, Projection};
use futures::StreamExt;
use runtime::consumer::{
    AppliedRecord, Consumer, ConsumerConfig, ConsumerDeps, Entries, Ownership, SharedEntries, Step,
};
use runtime::health::Component;
use runtime::parking::{UnprocessedEvent, catch_panic};
use store::{CommitError, StoreError};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::access::AccessTokens;
use crate::commands::Commands;
use crate::deps::ControlDeps;
use crate::metrics::{ConditionLabels, ControlMetrics, DeploymentLabels, InstanceLabels};
use crate::reactor;
use crate::routes::{REPUBLISH_INTERVAL, RoutePublisher};
use fold::{RowFilter, ViewsFold};
use owned::{ProjectedBucket, RowBatch};
pub use projector::ViewsProjector;

pub const CONSUMER: &str = "views";

/// Endpoints that the reactor handles concurrently.
const REACTION_CONCURRENCY: usize = 64;

/// Values of the label `state`.
const STATES: [&str; 4] = ["starting", "ready", "draining", "failed"];

/// How far this replica has folded each bucket, and written the rows of those that it owns.
#[derive(Clone, Debug, Default)]
pub struct ViewsProgress {
    pub folded: BTreeMap<Bucket, Position>,
    pub written: BTreeMap<Bucket, Position>,
    pub newest: Position,
    pub caught_up: bool,
}

/// The consumer as seen by requests.
#[derive(Clone)]
pub struct Views {
    models: SharedEntries<EndpointModel>,
    progress: watch::Receiver<ViewsProgress>,
}

impl Views {
    pub fn models(&self) -> MutexGuard<'_, Entries<EndpointModel>> {
        self.models.lock()
    }

    pub fn shared_models(&self) -> SharedEntries<EndpointModel> {
        self.models.clone()
    }

    pub fn progress(&self) -> watch::Receiver<ViewsProgress> {
        self.progress.clone()
    }
}

pub struct ViewsConsumer {
    deps: ControlDeps,
    commands: Arc<Commands>,
    access: Arc<AccessTokens>,
    metrics: ControlMetrics,
    component: Component,
    consumer: Consumer<ViewsFold>,
    models: SharedEntries<EndpointModel>,
    /// The projection of events that belong to no endpoint.
    global: Projection,
    progress: watch::Sender<ViewsProgress>,
    row_filter: RowFilter,
    owned: BTreeMap<Bucket, ProjectedBucket>,
    /// Assigned buckets whose rows could not be taken over or written, with the last error.
    failing: BTreeMap<Bucket, String>,
    /// Its own component, since the consumer sets and clears problems of its own.
    rows_component: Component,
    routes: Arc<RoutePublisher>,
    /// Endpoints whose routes and states may have changed.
    touched: BTreeSet<EndpointKey>,
    /// Endpoints for which the reactor failed to write.
    unsettled: BTreeSet<EndpointKey>,
    /// The failures in a row of each deployment that were last logged.
    logged_failures: BTreeMap<(EndpointKey, Name), u32>,
}

impl ViewsConsumer {
    pub fn open(
        deps: ControlDeps,
        commands: Arc<Commands>,
        access: Arc<AccessTokens>,
        metrics: ControlMetrics,
        routes: Arc<RoutePublisher>,
        component: Component,
    ) -> (Self, Views) {
        let progress = watch::Sender::new(ViewsProgress::default());
        let config = ConsumerConfig {
            consumer: CONSUMER,
            snapshots: CONSUMER.to_owned(),
            ownership: Ownership::Rows,
            waits_for_writes: true,
        };
        let consumer_deps = ConsumerDeps {
            store: deps.store.clone(),
            bus: deps.bus.clone(),
            clock: deps.clock.clone(),
        };
        let row_filter = RowFilter::default();
        let consumer = Consumer::open(
            config,
            ViewsFold::new(row_filter.clone()),
            consumer_deps,
            component.clone(),
        );
        let models = consumer.folds().clone();
        let views = Views {
            models: models.clone(),
            progress: progress.subscribe(),
        };
        let rows_component = deps.health.component(CONSUMER);
        rows_component.ready();
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
            row_filter,
            owned: BTreeMap::new(),
            failing: BTreeMap::new(),
            rows_component,
            routes,
            touched: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            logged_failures: BTreeMap::new(),
        };
        (consumer, views)
    }

    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), StoreError> {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut republish =
            tokio::time::interval_at(Instant::now() + REPUBLISH_INTERVAL, REPUBLISH_INTERVAL);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                step = self.consumer.next() => self.handle(step?).await?,
                _ = second.tick() => self.react_to_tick().await?,
                _ = republish.tick() => self.publish_all(),
            }
        }
        self.consumer.save_all().await;
        Ok(())
    }

    async fn handle(&mut self, step: Step<Vec<RowChange>>) -> Result<(), StoreError> {
        match step {
            Step::Applied(applied) => self.handle_applied(applied).await,
            Step::Unreadable { bucket, position } => {
                let batch = self.due_batch(bucket, position, Vec::new());
                let reached = BTreeMap::from([(bucket, position)]);
                self.advance(reached, batch.into_iter().collect()).await
            }
            Step::Advanced(passed) => self.advance(passed, BTreeMap::new()).await,
            Step::Rebuilt { key, by, .. } => {
                let rows = self.rebuild_rows(&key, by.position).await;
                let rows = log_unless_closed(rows)?.unwrap_or_default();
                let batch = self.due_batch(by.bucket, by.position, rows);
                self.touched.insert(key);
                let reached = BTreeMap::from([(by.bucket, by.position)]);
                self.advance(reached, batch.into_iter().collect()).await
            }
            Step::Acquired(buckets) => {
                // A snapshot may be past the cursor.
                self.row_filter.forget_written(|bucket, cursor| {
                    buckets.contains(&bucket) && self.consumer.position(bucket) > cursor
                });
                self.progress.send_modify(|progress| {
                    for bucket in buckets {
                        let position = self.consumer.position(bucket);
                        progress.newest = progress.newest.max(position);
                        progress.folded.insert(bucket, position);
                    }
                });
                Ok(())
            }
            Step::CaughtUp(_) => self.handle_caught_up().await,
            // Rows of a parked endpoint stay as they are.
            Step::Parked(key) => {
                self.row_filter
                    .forget_written(|bucket, _| bucket == key.bucket());
                Ok(())
            }
            // Every bucket is read for good.
            Step::Released(_) => Ok(()),
            Step::RowsAcquired(fences) => self.acquire_all(fences).await,
            Step::RowsReleased(buckets) => {
                for bucket in buckets {
                    self.release(bucket);
                    self.failing.remove(&bucket);
                }
                self.report_failing();
                Ok(())
            }
        }
    }

    /// Returns the rows of a bucket up to a position, if this replica must write them and they are not
    /// written yet. Rows of the history are written once it has been folded.
    fn due_batch(
        &self,
        bucket: Bucket,
        to: Position,
        rows: Vec<RowChange>,
    ) -> Option<(Bucket, RowBatch)> {
        let owned = self.owned.get(&bucket);
        let due = owned.is_some_and(|owned| to > owned.cursor);
        let due = due && self.progress.borrow().caught_up;
        due.then_some((bucket, RowBatch { rows, to }))
    }

    async fn handle_applied(
        &mut self,
        applied: Vec<AppliedRecord<Vec<RowChange>>>,
    ) -> Result<(), StoreError> {
        let mut batches: BTreeMap<Bucket, RowBatch> = BTreeMap::new();
        let mut reached = BTreeMap::new();
        let mut last = None;
        for AppliedRecord { record, effect } in applied {
            let rows = match record.endpoint() {
                None => self.apply_global(&record),
                Some(key) => {
                    self.remove_metrics(&record);
                    self.touched.insert(key);
                    effect.unwrap_or_default()
                }
            };
            if let Some((bucket, batch)) = self.due_batch(record.bucket, record.position, rows) {
                let merged = batches.entry(bucket).or_default();
                merged.rows.extend(batch.rows);
                merged.to = batch.to;
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

    /// How far a bucket has been folded, including steps not handled here yet, which made no rows.
    fn folded_position(&self, bucket: Bucket) -> Position {
        match bucket {
            Bucket::GLOBAL => {
                let progress = self.progress.borrow();
                progress.folded.get(&bucket).copied().unwrap_or_default()
            }
            bucket => self.consumer.position(bucket),
        }
    }

    /// Applies a record that belongs to no endpoint. One that cannot be applied is reported and skipped.
    fn apply_global(&mut self, record: &Record) -> Vec<RowChange> {
        let (access, routes, global) = (&self.access, &self.routes, &mut self.global);
        let applied = catch_panic(|| {
            access.apply(record);
            (routes.apply(record), global.apply(record))
        });
        match applied {
            Ok((are_routes_changed, rows)) => {
                if are_routes_changed {
                    let models = self.models.lock();
                    self.touched
                        .extend(models.iter().map(|(key, _)| key.clone()));
                }
                rows
            }
            Err(detail) => {
                self.consumer.report(UnprocessedEvent {
                    position: record.position,
                    event_type: record.event.type_name().to_owned(),
                    detail,
                });
                Vec::new()
            }
        }
    }

    /// Publishes the routes of what has been folded, writes its rows and runs the reactor.
    async fn advance(
        &mut self,
        reached: BTreeMap<Bucket, Position>,
        batches: BTreeMap<Bucket, RowBatch>,
    ) -> Result<(), StoreError> {
        let caught_up = self.progress.borrow().caught_up;
        // Routes first: gateways should not wait for rows.
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

    async fn handle_caught_up(&mut self) -> Result<(), StoreError> {
        self.row_filter.end_history();
        let behind = |(bucket, owned): (&Bucket, &ProjectedBucket)| {
            (self.folded_position(*bucket) > owned.cursor).then_some(*bucket)
        };
        let behind: Vec<Bucket> = self.owned.iter().filter_map(behind).collect();
        self.row_filter
            .forget_written(|bucket, _| !behind.contains(&bucket));
        for bucket in behind {
            self.reacquire(bucket, true);
        }
        let writes = self.owned.iter().map(|(bucket, owned)| {
            let written = self.write_unparked(*bucket, owned);
            async move { (*bucket, written.await) }
        });
        for (bucket, written) in futures::future::join_all(writes).await {
            match written {
                Ok(()) => {}
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                Err(error) => self.reacquire_after_error(bucket, &error),
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

    /// Publishes the routes of what has changed, after the history has been folded.
    fn publish_touched(&self) {
        let models = self.models.lock();
        for key in self.touched.iter().filter(|key| self.owns(key)) {
            if let Some(entry) = models.get(key) {
                self.routes.publish(key, &entry.state);
            }
        }
        // A bucket whose rows are behind is acquired once more after that.
        if Bucket::of_endpoints().all(|bucket| self.owned.contains_key(&bucket)) {
            self.deps.bus.mark_routes_complete();
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
        self.log_failures(&touched);
        let this = &*self;
        let reactions = touched.into_iter().filter_map(|key| {
            let model = this.models.lock().get(&key).map(|e| e.state.clone());
            let model = model.filter(|_| this.owns(&key))?;
            this.export_states(&key, &model);
            let members = &members;
            Some(async move {
                let now = this.deps.clock.now();
                let outcome = reactor::react(&this.commands, &key, &model, members, now).await;
                (key, outcome)
            })
        });
        // Concurrently: in sequence, each write would wait for the disk on its own.
        let outcomes: Vec<(EndpointKey, Result<(), StoreError>)> = futures::stream::iter(reactions)
            .buffer_unordered(REACTION_CONCURRENCY)
            .collect()
            .await;
        for (key, outcome) in outcomes {
            match outcome {
                Ok(()) => {}
                Err(StoreError::Closed) => return Err(StoreError::Closed),
                Err(error) => {
                    tracing::warn!(endpoint = %key, %error, "reactor cannot write, retrying");
                    self.unsettled.insert(key);
                }
            }
        }
        Ok(())
    }

    /// Logs the first failure of a row and then each doubling of their number, so that a crash loop
    /// neither stays unseen nor fills the log.
    fn log_failures(&mut self, touched: &BTreeSet<EndpointKey>) {
        let models = self.models.lock();
        for key in touched
            .iter()
            .filter(|key| self.owned.contains_key(&key.bucket()))
        {
            let Some(model) = models.get(key).map(|entry| &entry.state) else {
                continue;
            };
            let deployments = model.endpoint.iter().flat_map(|e| &e.deployments);
            for (name, deployment) in deployments {
                let of = (key.clone(), name.clone());
                let Some(history) = available::present_failures(deployment, &model.instances)
                else {
                    self.logged_failures.remove(&of);
                    continue;
                };
                let logged = self.logged_failures.get(&of).copied().unwrap_or(0);
                if history.failures < logged {
                    // A new row.
                    self.logged_failures.insert(of, history.failures);
                } else if history.failures < logged * 2 || logged == history.failures {
                    continue;
                } else {
                    self.logged_failures.insert(of, history.failures);
                }
                tracing::warn!(
                    deployment = %format_args!("{}/{name}", key.endpoint()),
                    failures = history.failures,
                    reason = history.last_reason,
                    effect = "the next start waits longer each time",
                    "instances fail"
                );
            }
        }
    }

    /// Handles changes that have no event: expired pins, nodes given up, and writes to retry.
    async fn react_to_tick(&mut self) -> Result<(), StoreError> {
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
                // A deletion stops waiting for lost nodes after a grace period.
                if expired || model.endpoint.as_ref().is_some_and(deleting) {
                    self.touched.insert(key.clone());
                }
            }
        }
        self.react_to_touched().await
    }

    /// Stops exporting metrics of a deleted deployment.
    fn remove_metrics(&self, record: &Record) {
        let (Event::DeploymentDeleted(of), Some(key)) = (&record.event, record.endpoint()) else {
            return;
        };
        self.remove_states(&key, &of.deployment);
    }

    fn remove_states(&self, key: &EndpointKey, deployment: &Name) {
        for state in STATES {
            self.metrics.instances.remove(&InstanceLabels {
                endpoint: key.endpoint().to_string(),
                deployment: deployment.to_string(),
                state,
            });
        }
        for reason in AvailableReason::ALL {
            let labels = condition_labels(key, deployment, reason);
            self.metrics.conditions.remove(&labels);
        }
        self.metrics
            .failures
            .remove(&deployment_labels(key, deployment));
    }

    fn export_states(&self, key: &EndpointKey, model: &EndpointModel) {
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
            let failures = available::present_failures(deployment, &model.instances);
            self.metrics
                .failures
                .get_or_create(&deployment_labels(key, name))
                .set(failures.map_or(0, |history| i64::from(history.failures)));
            let present = view.status.available.map(|available| available.reason);
            for reason in AvailableReason::ALL {
                let labels = condition_labels(key, name, reason);
                let is_present = i64::from(present == Some(reason));
                self.metrics
                    .conditions
                    .get_or_create(&labels)
                    .set(is_present);
            }
        }
    }
}

fn deployment_labels(key: &EndpointKey, deployment: &Name) -> DeploymentLabels {
    DeploymentLabels {
        endpoint: key.endpoint().to_string(),
        deployment: deployment.to_string(),
    }
}

fn condition_labels(
    key: &EndpointKey,
    deployment: &Name,
    reason: AvailableReason,
) -> ConditionLabels {
    ConditionLabels {
        endpoint: key.endpoint().to_string(),
        deployment: deployment.to_string(),
        reason: reason.name(),
    }
}

/// Logs an error and returns none, unless the store is closed: the next owner of the bucket retries.
fn log_unless_closed<T>(read: Result<Option<T>, StoreError>) -> Result<Option<T>, StoreError> {
    match read {
        Err(StoreError::Closed) => Err(StoreError::Closed),
        Err(error) => {
            tracing::error!(%error, "cannot write the rows of an unparked endpoint");
            Ok(None)
        }
        read => read,
    }
}
