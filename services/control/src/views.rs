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

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bus::{BusMessage, Subscription};
use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::log::{Record, RowChange};
use contract::resources::{InstanceTally, ProvisioningState};
use domain::endpoint::Endpoint;
use domain::views::{Projection, WRITTEN_ONCE};
use runtime::feed::{Feed, FeedItem};
use runtime::health::Component;
use runtime::parking::{Parking, Verdict, fold_anew, history, survive};
use runtime::retry::until_answered;
use store::{Commit, CommitError, CursorMove, Entry, Fence, Projector, StoreError, Unreadable};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::access::Access;
use crate::commands::Commands;
use crate::deps::ControlDeps;
use crate::metrics::{ControlMetrics, InstanceLabels};
use crate::reactor;
use crate::routes::{REPUBLISH_EVERY, Routes};

pub const CONSUMER: &str = "views";

/// Whose owner writes the rows that belong to no endpoint.
const OWNS_GLOBAL: Bucket = Bucket(0);

/// Records per read, and per commit of rows that a former owner has not written.
const PAGE: usize = 500;

/// Who was fenced waits for so long before it takes the bucket again: most often it has only not yet
/// heard that the bucket is somebody else's.
const TAKE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Values of the label `state`.
const STATES: [&str; 4] = ["starting", "ready", "draining", "failed"];

/// What the store compares stored rows with.
#[derive(Default)]
pub struct ViewsProjector {
    projection: Projection,
    skipped: BTreeSet<Position>,
    starts_over: bool,
}

impl ViewsProjector {
    /// Gives rows as they are at the end of the log, and makes no others.
    pub fn for_rebuild() -> Self {
        Self {
            projection: Projection::with_late_rows(),
            ..Self::default()
        }
    }

    /// Passes over the events that people have said are to be passed over.
    pub fn passing_over(skipped: BTreeSet<Position>) -> Self {
        Self {
            skipped,
            ..Self::default()
        }
    }
}

impl Projector for ViewsProjector {
    fn project(&mut self, record: &Record) -> Vec<RowChange> {
        if self.skipped.contains(&record.position) {
            return Vec::new();
        }
        let projection = &mut self.projection;
        let folded = survive(|| projection.apply(record));
        // What an event has left half done is not what its endpoint's rows shall show.
        self.starts_over |= folded.is_err() && projection.has_late_rows();
        folded.unwrap_or_default()
    }

    fn rest(&mut self) -> Option<Vec<RowChange>> {
        if std::mem::take(&mut self.starts_over) {
            self.projection = Projection::default();
            return None;
        }
        Some(self.projection.late_rows())
    }

    fn is_written_once(&self, model: &str) -> bool {
        WRITTEN_ONCE.contains(&model)
    }

    fn consumer(&self) -> &'static str {
        CONSUMER
    }
}

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
    skipped: Arc<Mutex<BTreeSet<Position>>>,
    progress: watch::Receiver<Progress>,
}

impl Views {
    pub fn projection(&self) -> MutexGuard<'_, Projection> {
        lock(&self.projection)
    }

    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Events that people have said are to be passed over.
    pub fn skipped(&self) -> BTreeSet<Position> {
        lock(&self.skipped).clone()
    }
}

/// A panic cannot leave the fold half done: the endpoint that it is about is dropped.
fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bucket whose rows this replica writes.
struct Owned {
    fence: Fence,
    /// The rows are those of the log up to here.
    cursor: Position,
}

/// Rows of one bucket that wait for their commit.
#[derive(Default)]
struct Batch {
    rows: Vec<RowChange>,
    to: Position,
}

pub struct ViewsConsumer {
    deps: ControlDeps,
    commands: Arc<Commands>,
    access: Arc<Access>,
    metrics: ControlMetrics,
    component: Component,
    projection: Arc<Mutex<Projection>>,
    skipped: Arc<Mutex<BTreeSet<Position>>>,
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
        let skipped = Arc::new(Mutex::new(BTreeSet::new()));
        let views = Views {
            projection: projection.clone(),
            skipped: skipped.clone(),
            progress: progress.subscribe(),
        };
        component.waiting("reads the log");
        let parking = Parking::open(CONSUMER, deps.store.clone(), component.clone());
        let consumer = Self {
            deps,
            commands,
            access,
            metrics,
            component,
            projection,
            skipped,
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

    fn hear(&mut self, ownership: &mut mpsc::Receiver<BusMessage>) {
        while let Ok(message) = ownership.try_recv() {
            self.assigned(&message);
        }
    }

    fn assigned(&mut self, message: &BusMessage) {
        match message {
            BusMessage::Record(_) => {}
            BusMessage::Assigned(buckets) => {
                for bucket in with_global(buckets) {
                    if !self.owned.contains_key(&bucket) {
                        self.to_take.insert(bucket, Instant::now());
                    }
                }
            }
            BusMessage::Revoked(buckets) => {
                for bucket in with_global(buckets) {
                    self.to_take.remove(&bucket);
                    self.disown(bucket);
                }
            }
        }
    }

    fn disown(&mut self, bucket: Bucket) {
        // Its next owner counts them.
        let projection = lock(&self.projection);
        let theirs = |(key, _): &(&EndpointKey, _)| key.bucket() == bucket;
        for (key, model) in projection.endpoints.iter().filter(theirs) {
            let endpoint = model.endpoint.iter();
            let names = endpoint.flat_map(|endpoint| endpoint.deployments.keys());
            names.for_each(|name| self.uncount(key, name));
        }
        drop(projection);
        self.owned.remove(&bucket);
        self.progress.send_modify(|progress| {
            progress.written.remove(&bucket);
        });
    }

    /// Tries to take what is assigned and not owned. What the store does not give now is tried again.
    async fn take_due(&mut self) -> Result<(), StoreError> {
        let now = Instant::now();
        let due = self.to_take.iter().filter(|(_, at)| **at <= now);
        let due: Vec<Bucket> = due.map(|(bucket, _)| *bucket).collect();
        if due.is_empty() {
            return Ok(());
        }
        let takes = due.iter().map(|bucket| self.take(*bucket));
        let taken = futures::future::join_all(takes).await;
        for (bucket, taken) in due.into_iter().zip(taken) {
            match taken {
                Ok(owned) => {
                    self.to_take.remove(&bucket);
                    self.own(bucket, owned);
                }
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                Err(error) => {
                    tracing::warn!(%bucket, %error, "read models cannot be taken over yet, trying again");
                    self.to_take.insert(bucket, now + TAKE_AGAIN_AFTER);
                }
            }
        }
        if self.progress.borrow().caught_up {
            // The former owner may have ended before it did this.
            self.publish_touched();
            self.react_to_touched().await?;
        }
        Ok(())
    }

    fn own(&mut self, bucket: Bucket, owned: Owned) {
        let cursor = owned.cursor;
        self.owned.insert(bucket, owned);
        self.progress.send_modify(|progress| {
            progress.written.insert(bucket, cursor);
        });
        let projection = lock(&self.projection);
        let theirs = projection.endpoints.keys();
        let theirs = theirs.filter(|key| key.bucket() == bucket);
        self.touched.extend(theirs.cloned());
    }

    /// Takes a bucket over: raises its fence, and brings its rows to where our fold stands.
    async fn take(&self, bucket: Bucket) -> Result<Owned, CommitError> {
        let store = &self.deps.store;
        let fence = store.take(&format!("{CONSUMER}/{bucket}")).await?;
        let cursor = store.cursor(CONSUMER, bucket).await?;
        let folded = self.progress.borrow().folded.get(&bucket).copied();
        let mut owned = Owned { fence, cursor };
        if let Some(folded) = folded.filter(|folded| *folded > cursor) {
            self.write_missing(bucket, &mut owned, folded).await?;
        }
        Ok(owned)
    }

    /// Rows between the stored cursor and our fold: the bucket is folded once more by itself.
    async fn write_missing(
        &self,
        bucket: Bucket,
        owned: &mut Owned,
        to: Position,
    ) -> Result<(), CommitError> {
        let mut projector = ViewsProjector::passing_over(self.parking.skipped().clone());
        let mut after = Position::START;
        while after < to {
            let page = self
                .deps
                .store
                .read_bucket_entries(bucket, after, PAGE)
                .await?;
            let Some(last) = page.last().map(Entry::position) else {
                return Ok(());
            };
            let mut batch = Batch::default();
            for entry in page.iter().filter(|entry| entry.position() <= to) {
                after = entry.position();
                let Entry::Record(record) = entry else {
                    continue;
                };
                // Rows of a parked endpoint stay as they were.
                let parked = record
                    .endpoint()
                    .is_some_and(|k| self.parking.is_parked(&k));
                let rows = projector.project(record);
                if after > owned.cursor && !parked {
                    batch.rows.extend(rows);
                }
            }
            batch.to = after;
            if batch.to > owned.cursor {
                owned.cursor = self.write(bucket, owned, batch).await?;
            }
            if last >= to {
                break;
            }
        }
        Ok(())
    }

    async fn take_in(&mut self, item: FeedItem) -> Result<(), StoreError> {
        match item {
            FeedItem::Records(records) => self.fold(&records).await,
            FeedItem::Unreadable(unreadable) => self.pass_over(&unreadable).await,
            FeedItem::CaughtUp(buckets) => self.caught_up(&buckets).await,
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
            self.note_skips(record);
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

    fn note_skips(&self, record: &Record) {
        if matches!(record.event, Event::EventSkipped(_)) {
            *lock(&self.skipped) = self.parking.skipped().clone();
        }
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

    /// One commit for each bucket. Where one fails, the bucket is taken again, which begins at what
    /// the store has.
    async fn write_all(
        &mut self,
        batches: BTreeMap<Bucket, Batch>,
    ) -> Result<BTreeMap<Bucket, Position>, StoreError> {
        let this = &*self;
        let commits = batches.into_iter().filter_map(|(bucket, batch)| {
            let owned = this.owned.get(&bucket)?;
            Some(async move { (bucket, this.write(bucket, owned, batch).await) })
        });
        let outcomes = futures::future::join_all(commits).await;
        let mut written = BTreeMap::new();
        for (bucket, outcome) in outcomes {
            match outcome {
                Ok(to) => {
                    written.insert(bucket, to);
                    if let Some(owned) = self.owned.get_mut(&bucket) {
                        owned.cursor = to;
                    }
                }
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                Err(error) => {
                    tracing::warn!(%bucket, %error, "read models cannot be written, taking the bucket again");
                    self.disown(bucket);
                    self.to_take
                        .insert(bucket, Instant::now() + TAKE_AGAIN_AFTER);
                }
            }
        }
        Ok(written)
    }

    async fn write(
        &self,
        bucket: Bucket,
        owned: &Owned,
        batch: Batch,
    ) -> Result<Position, CommitError> {
        let cursor = CursorMove {
            consumer: CONSUMER,
            bucket,
            from: owned.cursor,
            to: batch.to,
        };
        let commit = Commit {
            rows: newest_only(batch.rows),
            cursor: Some(cursor),
            fence: Some(owned.fence.clone()),
            ..Commit::default()
        };
        self.deps.store.commit(commit).await?;
        Ok(batch.to)
    }

    async fn caught_up(&mut self, buckets: &[Bucket]) -> Result<(), StoreError> {
        self.progress
            .send_modify(|progress| progress.caught_up = true);
        self.parking.caught_up(buckets);
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
        for key in std::mem::take(&mut self.touched) {
            let model = lock(&self.projection).endpoints.get(&key).cloned();
            let Some(model) = model.filter(|_| self.owns(&key)) else {
                continue;
            };
            self.count_instances(&key, &model);
            let now = self.deps.clock.now();
            match reactor::react(&self.commands, &key, &model, &members, now).await {
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

/// The owner of one of the buckets owns the global one with it.
fn with_global(buckets: &[Bucket]) -> Vec<Bucket> {
    let mut buckets = buckets.to_vec();
    if buckets.contains(&OWNS_GLOBAL) {
        buckets.push(Bucket::GLOBAL);
    }
    buckets
}

/// Of several changes of one row only the last one matters.
fn newest_only(rows: Vec<RowChange>) -> Vec<RowChange> {
    let mut newest: BTreeMap<(&'static str, String), RowChange> = BTreeMap::new();
    for row in rows {
        newest.insert((row.model, row.key.clone()), row);
    }
    newest.into_values().collect()
}
