//! The consumer `views`: folds the log, writes the rows of read models, publishes routes and asks the
//! reactor.
//!
//! Invariants: a bucket's rows and its cursor move in one commit; after a restart history is folded
//! silently up to the cursors, so no row is written twice and none is left out; routes are published
//! only from a state that has taken in the whole history.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, RowChange};
use contract::resources::{InstanceTally, ProvisioningState};
use domain::endpoint::Endpoint;
use domain::views::Projection;
use runtime::feed::{Feed, FeedItem};
use runtime::health::Component;
use store::{Commit, CommitError, CursorMove, Projector, StoreError};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::commands::Commands;
use crate::deps::ControlDeps;
use crate::metrics::{ControlMetrics, InstanceLabels};
use crate::reactor;
use crate::routes::{REPUBLISH_EVERY, Routes};

pub const CONSUMER: &str = "views";

/// Values of the label `state`.
const STATES: [&str; 4] = ["starting", "ready", "draining", "failed"];

/// What the store compares stored rows with.
#[derive(Default)]
pub struct ViewsProjector {
    projection: Projection,
}

impl Projector for ViewsProjector {
    fn project(&mut self, record: &Record) -> Vec<RowChange> {
        self.projection.apply(record)
    }

    fn consumer(&self) -> &'static str {
        CONSUMER
    }
}

/// How far the rows of each bucket are, and the newest position of all.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    pub cursors: BTreeMap<Bucket, Position>,
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

/// A panic cannot leave the fold half done in a way that a restart would not repair.
fn lock(projection: &Mutex<Projection>) -> MutexGuard<'_, Projection> {
    projection.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct ViewsConsumer {
    deps: ControlDeps,
    commands: Arc<Commands>,
    metrics: ControlMetrics,
    component: Component,
    projection: Arc<Mutex<Projection>>,
    progress: watch::Sender<Progress>,
    routes: Arc<Routes>,
    /// Endpoints whose routes and states are to be looked at.
    touched: BTreeSet<EndpointKey>,
}

impl ViewsConsumer {
    pub async fn open(
        deps: ControlDeps,
        commands: Arc<Commands>,
        metrics: ControlMetrics,
        routes: Arc<Routes>,
        component: Component,
    ) -> Result<(Self, Views), StoreError> {
        let cursors = deps.store.cursors(CONSUMER).await?;
        let progress = watch::Sender::new(Progress {
            cursors,
            ..Progress::default()
        });
        let projection = Arc::new(Mutex::new(Projection::default()));
        let views = Views {
            projection: projection.clone(),
            progress: progress.subscribe(),
        };
        component.waiting("reads the log");
        let consumer = Self {
            deps,
            commands,
            metrics,
            component,
            projection,
            progress,
            routes,
            touched: BTreeSet::new(),
        };
        Ok((consumer, views))
    }

    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), StoreError> {
        let (store, bus) = (self.deps.store.clone(), self.deps.bus.clone());
        let mut feed = Feed::open(store, bus, CONSUMER, BTreeMap::new());
        let mut second = tokio::time::interval(std::time::Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut republish =
            tokio::time::interval_at(Instant::now() + REPUBLISH_EVERY, REPUBLISH_EVERY);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                item = feed.next() => match item? {
                    FeedItem::Records(records) => self.take_in(&records).await?,
                    FeedItem::CaughtUp => self.caught_up().await?,
                    // All read models have one owner: the process that holds the store.
                    FeedItem::Assigned(_) | FeedItem::Revoked(_) => {}
                },
                _ = second.tick() => self.react_to_time().await?,
                _ = republish.tick() => self.publish_all(),
            }
        }
    }

    async fn take_in(&mut self, records: &[Arc<Record>]) -> Result<(), StoreError> {
        let mut by_bucket: BTreeMap<Bucket, (Vec<RowChange>, Position)> = BTreeMap::new();
        let mut newest = Position::START;
        {
            let mut projection = lock(&self.projection);
            for record in records {
                let rows = projection.apply(record);
                self.forget_metrics(record);
                let cursors = &self.progress.borrow().cursors;
                let cursor = cursors.get(&record.bucket).copied().unwrap_or_default();
                newest = newest.max(record.position);
                match record.endpoint() {
                    Some(endpoint) => self.touched.extend([endpoint]),
                    None if self.routes.apply(record) => {
                        self.touched.extend(projection.endpoints.keys().cloned());
                    }
                    None => {}
                }
                if record.position > cursor {
                    let entry = by_bucket.entry(record.bucket).or_default();
                    entry.0.extend(rows);
                    entry.1 = record.position;
                }
            }
        }
        // Gateways first: they wait for nobody's rows.
        if self.progress.borrow().caught_up {
            self.publish_touched();
        }
        let commits = by_bucket
            .into_iter()
            .map(|(bucket, (rows, to))| self.write(bucket, rows, to));
        let reached = futures::future::try_join_all(commits).await?;
        self.progress.send_modify(|progress| {
            progress.cursors.extend(reached);
            progress.newest = progress.newest.max(newest);
        });
        if let Some(last) = records.last() {
            let lag = self.deps.clock.now().since(last.time);
            self.metrics.event_lag.set(lag.millis() as f64 / 1000.0);
            self.metrics.position.set(newest.0 as i64);
        }
        if self.progress.borrow().caught_up {
            self.react_to_touched().await?;
        }
        Ok(())
    }

    async fn write(
        &self,
        bucket: Bucket,
        rows: Vec<RowChange>,
        to: Position,
    ) -> Result<(Bucket, Position), StoreError> {
        let from = self
            .progress
            .borrow()
            .cursors
            .get(&bucket)
            .copied()
            .unwrap_or_default();
        let cursor = CursorMove {
            consumer: CONSUMER,
            bucket,
            from,
            to,
        };
        let commit = Commit {
            rows: newest_only(rows),
            cursor: Some(cursor),
            ..Commit::default()
        };
        match self.deps.store.commit(commit).await {
            Ok(_) => Ok((bucket, to)),
            Err(CommitError::Store(error)) => Err(error),
            Err(error) => Err(StoreError::Refused(error.to_string())),
        }
    }

    async fn caught_up(&mut self) -> Result<(), StoreError> {
        self.progress
            .send_modify(|progress| progress.caught_up = true);
        self.touched
            .extend(lock(&self.projection).endpoints.keys().cloned());
        self.publish_touched();
        self.component.ready();
        self.react_to_touched().await
    }

    fn publish_touched(&self) {
        let projection = lock(&self.projection);
        for key in &self.touched {
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
        for (key, model) in &projection.endpoints {
            self.routes.publish(key, model);
        }
    }

    async fn react_to_touched(&mut self) -> Result<(), StoreError> {
        let members = self.routes.members();
        for key in std::mem::take(&mut self.touched) {
            let model = lock(&self.projection).endpoints.get(&key).cloned();
            let Some(model) = model else { continue };
            self.count_instances(&key, &model);
            let now = self.deps.clock.now();
            reactor::react(&self.commands, &key, &model, &members, now).await?;
        }
        Ok(())
    }

    /// Pins expire, and nodes are given up, without an event.
    async fn react_to_time(&mut self) -> Result<(), StoreError> {
        if !self.progress.borrow().caught_up {
            return Ok(());
        }
        let now = self.deps.clock.now();
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
        for state in STATES {
            self.metrics.instances.remove(&InstanceLabels {
                endpoint: key.endpoint().to_string(),
                deployment: of.deployment.to_string(),
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

/// Of several changes of one row only the last one matters.
fn newest_only(rows: Vec<RowChange>) -> Vec<RowChange> {
    let mut newest: BTreeMap<(&'static str, String), RowChange> = BTreeMap::new();
    for row in rows {
        newest.insert((row.model, row.key.clone()), row);
    }
    newest.into_values().collect()
}
