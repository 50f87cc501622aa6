//! How services consume the log, implemented once: ownership and fences of buckets, folding,
//! parking, snapshots, retries and readiness.
//!
//! [`Consumer::next`] returns one step after the other; the caller acts on the steps and evaluates
//! the folded states. `runtime::reconcile` is the loop of services that write one stream per
//! endpoint; other services have their own.
//!
//! Invariants: buckets come and go at any time; only what is fenced and caught up may be evaluated;
//! starting from a snapshot gives the same as the whole log; snapshots are written under the
//! bucket's fence, so a replaced owner writes none; store outages end nothing.

mod core;
mod fold;
mod snapshot;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, BusMessage, Subscription};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, StreamKind};
use contract::time::Timestamp;
use futures::TryFutureExt;
use futures::future::try_join_all;
use store::{CommitError, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::task::AbortOnDropHandle;

use self::snapshot::StoredSnapshot;
use crate::clock::Clock;
use crate::feed::{Feed, FeedItem};
use crate::health::{Component, READING_LOG, WAITING_FOR_BUCKETS};
use crate::parking::{self, Parking, UnprocessedEvent};
use crate::retry::retry_while_unavailable;

pub use self::core::{AppliedRecord, ApplyOutcome, Core};
pub use self::fold::{Entries, Fold, FoldedEntry, SharedEntries};
pub use self::snapshot::{Backlog, Draft, Initial, load};

/// How long a fenced consumer waits before it reacquires the bucket: usually it just has not been
/// notified yet that the bucket was reassigned.
const REACQUIRE_AFTER: Duration = Duration::from_secs(1);

/// How often to check whether snapshots are due.
const SNAPSHOT_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The most drafts waiting to be stored; more are made once these are.
const DRAFTS_MAX: usize = 16;
/// How long shutdown waits for the last snapshots.
const SAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// The name and the mode of a consumer.
#[derive(Clone, Debug)]
pub struct ConsumerConfig {
    /// The name in fences, parking, metrics and logs: `autoscaler`.
    pub consumer: &'static str,
    /// The name under which snapshots are stored: the same, or `node/ID` if each process has its
    /// own.
    pub snapshots: String,
    /// Who owns the buckets.
    pub ownership: Ownership,
    /// Whether snapshots wait until the service confirms that what follows from a bucket has been
    /// written ([`Consumer::confirm_written`]).
    pub waits_for_writes: bool,
}

impl ConsumerConfig {
    /// A consumer whose replicas share the buckets.
    pub fn shared(consumer: &'static str) -> Self {
        Self {
            consumer,
            snapshots: consumer.to_owned(),
            ownership: Ownership::Shared,
            waits_for_writes: false,
        }
    }
}

/// Who owns the buckets.
#[derive(Clone, Debug)]
pub enum Ownership {
    /// Replicas share the buckets; the owner of one holds its fence, `CONSUMER/BUCKET`.
    Shared,
    /// This process owns all buckets, under this fence.
    Exclusive(Fence),
    /// Every replica folds everything; they share the rows that follow. Whoever writes those of a
    /// bucket holds its fence, `CONSUMER/BUCKET`. The rows of the global bucket go with those of
    /// the first.
    Rows,
}

/// A step of a consumer.
#[derive(Debug)]
pub enum Step<E> {
    /// Buckets are ours, under new fences. If they are newly assigned, their snapshots have been
    /// loaded, and their history follows.
    Acquired(Vec<Bucket>),
    /// Records in order within each bucket, with their effects.
    Applied(Vec<AppliedRecord<E>>),
    /// There was nothing more to apply up to these positions of their buckets.
    Advanced(BTreeMap<Bucket, Position>),
    /// An event that cannot be decoded.
    Unreadable {
        /// Its bucket.
        bucket: Bucket,
        /// Its position.
        position: Position,
    },
    /// The endpoint has no state any more and must be left alone.
    Parked(EndpointKey),
    /// The endpoint was unparked by this record, and its state was folded from the start.
    Rebuilt {
        /// The endpoint.
        key: EndpointKey,
        /// The record that unparked it.
        by: Arc<Record>,
        /// Its records, with their effects.
        applied: Vec<AppliedRecord<E>>,
    },
    /// The history of these buckets, up to the head at their assignment, has been applied.
    CaughtUp(Vec<Bucket>),
    /// Buckets now belong to another owner; their states are dropped.
    Released(Vec<Bucket>),
    /// The rows of these buckets are ours to write, under these fences.
    RowsAcquired(BTreeMap<Bucket, Fence>),
    /// The rows of these buckets are no longer ours to write.
    RowsReleased(Vec<Bucket>),
}

/// Dependencies of [`Consumer`].
#[derive(Clone)]
pub struct ConsumerDeps {
    /// The log and the snapshots.
    pub store: Store,
    /// The source of new records.
    pub bus: Arc<dyn Bus>,
    /// For recorded times, such as since when an endpoint is parked.
    pub clock: Arc<dyn Clock>,
}

/// A consumer of the log.
pub struct Consumer<F: Fold> {
    core: Core<F>,
    config: ConsumerConfig,
    deps: ConsumerDeps,
    component: Component,
    feed: Feed,
    /// Read, and not handled yet.
    inbox: VecDeque<FeedItem>,
    outbox: VecDeque<Step<F::Effect>>,
    /// A request to the store; nothing else proceeds meanwhile.
    pending_reply: Option<AbortOnDropHandle<Result<StoreReply<F>, StoreError>>>,
    /// Assignments of rows; states are assigned by the feed.
    row_assignments: Option<mpsc::Receiver<BusMessage>>,
    /// The fences of the rows that are ours.
    row_fences: BTreeMap<Bucket, Fence>,
    /// Buckets that are assigned to us, but whose fence has yet to be acquired, or was taken by
    /// another owner: when to acquire it.
    unfenced: BTreeMap<Bucket, Instant>,
    saving: Option<(
        Bucket,
        AbortOnDropHandle<Result<StoredSnapshot, CommitError>>,
    )>,
    /// Drafts to be stored next.
    drafts: VecDeque<(Bucket, Fence, Draft)>,
    /// Since when the stored snapshots have been behind.
    behind_since: BTreeMap<Bucket, Instant>,
    /// How far the service has confirmed that it wrote what follows from each bucket.
    written: BTreeMap<Bucket, Position>,
    snapshot_checks: Interval,
}

/// The store's reply to a request.
enum StoreReply<F: Fold> {
    Acquired(Vec<(Bucket, Option<Fence>, Initial<F::State>)>),
    Fenced(BTreeMap<Bucket, Fence>),
    History {
        by: Arc<Record>,
        key: EndpointKey,
        entries: Vec<store::LogEntry>,
    },
}

impl<F: Fold> Consumer<F> {
    /// Subscribes at once; nothing is read before the first [`next`](Self::next).
    pub fn open(config: ConsumerConfig, fold: F, deps: ConsumerDeps, component: Component) -> Self {
        let subscription = match &config.ownership {
            Ownership::Shared => Subscription::Group(config.consumer),
            Ownership::Exclusive(_) | Ownership::Rows => Subscription::All,
        };
        component.waiting(match &config.ownership {
            Ownership::Shared => WAITING_FOR_BUCKETS,
            Ownership::Exclusive(_) | Ownership::Rows => READING_LOG,
        });
        // Of these, only the assignments are used.
        let row_assignments = matches!(config.ownership, Ownership::Rows).then(|| {
            deps.bus
                .subscribe_records(Subscription::Group(config.consumer))
        });
        let feed = Feed::open(deps.store.clone(), deps.bus.clone(), subscription);
        let parking = Parking::open(config.consumer, deps.store.clone(), component.clone());
        let fold = Arc::new(fold);
        let filter = {
            let fold = fold.clone();
            Arc::new(move |after| event_filter(fold.as_ref(), after))
        };
        let mut snapshot_checks = tokio::time::interval(SNAPSHOT_CHECK_INTERVAL);
        snapshot_checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            core: Core::new(fold, parking),
            feed: feed.with_filter(filter).with_component(&component),
            config,
            deps,
            component,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            pending_reply: None,
            row_assignments,
            row_fences: BTreeMap::new(),
            unfenced: BTreeMap::new(),
            saving: None,
            drafts: VecDeque::new(),
            behind_since: BTreeMap::new(),
            written: BTreeMap::new(),
            snapshot_checks,
        }
    }

    /// The states of all endpoints in our buckets.
    pub fn folds(&self) -> &SharedEntries<F::State> {
        self.core.folds()
    }

    /// The underlying core.
    pub fn core(&self) -> &Core<F> {
        &self.core
    }

    /// The parked endpoints.
    pub fn parking(&self) -> &Parking {
        self.core.parking()
    }

    /// Whether the bucket is ours.
    pub fn has(&self, bucket: Bucket) -> bool {
        self.core.has(bucket)
    }

    /// The fence of a bucket that is ours.
    pub fn fence(&self, bucket: Bucket) -> Option<&Fence> {
        self.core.fence(bucket)
    }

    /// Whether the states of the bucket may be evaluated.
    pub fn is_caught_up(&self, bucket: Bucket) -> bool {
        self.core.is_caught_up(bucket)
    }

    /// Whether that holds for every bucket that is ours.
    pub fn all_caught_up(&self) -> bool {
        self.core.all_caught_up()
    }

    /// The buckets that are ours, in order.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> {
        self.core.buckets()
    }

    /// The position up to which a bucket has been applied.
    pub fn position(&self, bucket: Bucket) -> Position {
        self.core.position(bucket)
    }

    /// Parks an endpoint that cannot be evaluated.
    pub fn park(&mut self, key: &EndpointKey, detail: &str) {
        let position = self.core.folds().lock().get(key).map(|e| e.position);
        let now = self.deps.clock.now();
        self.core
            .park(key, position.unwrap_or_default(), "evaluation", detail, now);
    }

    /// Reports an event that belongs to no endpoint and that the service cannot process.
    pub fn report(&mut self, event: UnprocessedEvent) {
        let now = self.deps.clock.now();
        self.core.report(event, now);
    }

    /// Handles a fence that the store rejected: another owner has taken the bucket. It is
    /// reacquired after a while if it is still assigned to us by then.
    pub fn fenced(&mut self, bucket: Bucket) {
        if self.core.has(bucket) && matches!(self.config.ownership, Ownership::Shared) {
            tracing::warn!(consumer = self.config.consumer, %bucket, "bucket lost to another owner");
            self.core.mark_lost(bucket);
            self.unfenced
                .entry(bucket)
                .or_insert_with(|| Instant::now() + REACQUIRE_AFTER);
        }
    }

    /// Acquires the rows of a bucket once more, after rows could not be written; with `at_once`
    /// without waiting for a bucket that may have been reassigned.
    pub fn reacquire_rows(&mut self, bucket: Bucket, at_once: bool) {
        self.release_rows(bucket);
        let wait = match at_once {
            true => Duration::ZERO,
            false => REACQUIRE_AFTER,
        };
        self.unfenced.insert(bucket, Instant::now() + wait);
    }

    fn release_rows(&mut self, bucket: Bucket) {
        self.unfenced.remove(&bucket);
        self.row_fences.remove(&bucket);
        self.written.remove(&bucket);
        self.core.set_fence(bucket, None);
    }

    fn handle_row_assignment(&mut self, message: &BusMessage) {
        match message {
            BusMessage::Record(_) => {}
            BusMessage::Assigned(buckets) => {
                for bucket in with_global(buckets) {
                    if !self.row_fences.contains_key(&bucket) {
                        self.unfenced.insert(bucket, Instant::now());
                    }
                }
            }
            BusMessage::Revoked(buckets) => {
                let buckets = with_global(buckets);
                for bucket in &buckets {
                    self.release_rows(*bucket);
                }
                self.outbox.push_back(Step::RowsReleased(buckets));
            }
        }
    }

    /// Confirms that what follows from a bucket has been written up to here; no snapshot of it goes
    /// beyond.
    pub fn confirm_written(&mut self, bucket: Bucket, position: Position) {
        self.written.insert(bucket, position);
        // Draft at once, since the bucket may advance before the next check.
        if self.is_due(bucket) {
            self.draft(bucket);
        }
    }

    /// Discards the snapshot of a bucket and folds it from the start of the log. Must be called
    /// right after the bucket has been acquired.
    pub fn discard_snapshot(&mut self, bucket: Bucket) {
        let fence = self.core.fence(bucket).cloned();
        let now = self.deps.clock.now();
        self.core.acquire(bucket, fence, Initial::default(), now);
        self.feed.read_from_start(bucket);
    }

    /// See [`Feed::slices_from`].
    pub fn slices_from(&mut self, from: Timestamp) {
        self.feed.slices_from(from);
    }

    /// Returns the next step; waits until there is one, also while the store is unavailable. Cancel
    /// safe. The only error is that this process has closed the store.
    ///
    /// # Errors
    ///
    /// [`StoreError::Closed`] only.
    pub async fn next(&mut self) -> Result<Step<F::Effect>, StoreError> {
        loop {
            // Before anything is folded: rows that are ours from the start need not be made twice.
            while let Some(message) = try_next(&mut self.row_assignments) {
                self.handle_row_assignment(&message);
            }
            if let Some(step) = self.outbox.pop_front() {
                return Ok(step);
            }
            if let Some(pending_reply) = &mut self.pending_reply {
                let done = pending_reply.await;
                self.pending_reply = None;
                self.handle_reply(done.unwrap_or_else(|error| {
                    Err(
                        StoreError::database(format!("a request task failed: {error}"))
                            .caused_by(error),
                    )
                })?);
                continue;
            }
            if let Some(item) = self.inbox.pop_front() {
                self.handle(item);
                continue;
            }
            let acquire_at = self.unfenced.values().min().copied();
            tokio::select! {
                biased;
                Some(message) = next(&mut self.row_assignments) => self.handle_row_assignment(&message),
                (bucket, stored) = next_saved(&mut self.saving) => self.handle_saved(bucket, stored)?,
                _ = self.snapshot_checks.tick() => self.check_snapshots(),
                () = sleep_until(acquire_at) => self.acquire_fences(),
                item = self.feed.next() => self.inbox.push_back(item?),
            }
        }
    }

    fn handle(&mut self, item: FeedItem) {
        let now = self.deps.clock.now();
        let consumer = self.config.consumer;
        match item {
            FeedItem::Records(records) => self.apply(records, now),
            FeedItem::Unreadable(unreadable) => {
                let parked = self.core.park_unreadable(&unreadable, now);
                self.outbox.extend(parked.map(Step::Parked));
                self.outbox.push_back(Step::Unreadable {
                    bucket: unreadable.bucket,
                    position: unreadable.position,
                });
            }
            FeedItem::Advanced(positions) => {
                for (bucket, position) in &positions {
                    self.core.advance(*bucket, *position);
                }
                self.outbox.push_back(Step::Advanced(positions));
            }
            FeedItem::Assigned(buckets) => {
                tracing::debug!(consumer, ?buckets, "buckets are assigned");
                self.component.set_waiting_reason(READING_LOG);
                self.acquire(buckets);
            }
            FeedItem::Revoked(buckets) => {
                tracing::debug!(consumer, ?buckets, "buckets are revoked");
                for bucket in &buckets {
                    self.unfenced.remove(bucket);
                    self.written.remove(bucket);
                    self.core.release(*bucket);
                }
                self.outbox.push_back(Step::Released(buckets));
            }
            FeedItem::CaughtUp(buckets) => {
                tracing::debug!(consumer, ?buckets, "buckets are caught up with");
                self.core.caught_up(&buckets);
                // With rows, the service has some to write before parking is reported as caught up.
                if !matches!(self.config.ownership, Ownership::Rows) {
                    self.core.parking().caught_up(&buckets);
                }
                if self.core.all_caught_up() && matches!(self.config.ownership, Ownership::Shared) {
                    self.component.ready();
                }
                self.snapshot_checks.reset_immediately();
                self.outbox.push_back(Step::CaughtUp(buckets));
            }
        }
    }

    fn apply(&mut self, records: Vec<Arc<Record>>, now: Timestamp) {
        let mut applied = Vec::with_capacity(records.len());
        let mut records = records.into_iter();
        while let Some(record) = records.next() {
            let (effect, then) = match self.core.apply(&record, now) {
                ApplyOutcome::Applied(effect) => (Some(effect), None),
                ApplyOutcome::Skipped => (None, None),
                ApplyOutcome::Parked(key) => (None, Some(Step::Parked(key))),
                ApplyOutcome::Rebuild(key) => {
                    // Later records wait until its history has been read.
                    self.inbox.push_front(FeedItem::Records(records.collect()));
                    self.outbox.push_back(Step::Applied(applied));
                    return self.read_history(key, record);
                }
            };
            applied.push(AppliedRecord { record, effect });
            if let Some(step) = then {
                self.outbox
                    .push_back(Step::Applied(std::mem::take(&mut applied)));
                self.outbox.push_back(step);
            }
        }
        if !applied.is_empty() {
            self.outbox.push_back(Step::Applied(applied));
        }
    }

    fn spawn_request(
        &mut self,
        request: impl Future<Output = Result<StoreReply<F>, StoreError>> + Send + 'static,
    ) {
        self.pending_reply = Some(AbortOnDropHandle::new(tokio::spawn(request)));
    }

    /// Raises the generation of each bucket, so that a former owner can no longer write, then loads
    /// its snapshot.
    fn acquire(&mut self, buckets: Vec<Bucket>) {
        let (store, component) = (self.deps.store.clone(), self.component.clone());
        let (config, row_fences) = (self.config.clone(), self.row_fences.clone());
        self.spawn_request(async move {
            let acquire = || async {
                let mut fences = match &config.ownership {
                    Ownership::Shared => fences_of(&store, config.consumer, &buckets).await?,
                    Ownership::Exclusive(fence) => {
                        let fences = buckets.iter().map(|bucket| (*bucket, fence.clone()));
                        fences.collect()
                    }
                    Ownership::Rows => row_fences.clone(),
                };
                let initials = buckets.iter().map(|bucket| {
                    let fence = fences.remove(bucket);
                    let loaded = load(&store, &config.snapshots, *bucket, F::VERSION);
                    loaded.map_ok(move |initial| (*bucket, fence, initial))
                });
                try_join_all(initials).await
            };
            retry_while_unavailable(&component, acquire)
                .await
                .map(StoreReply::Acquired)
        });
    }

    /// Acquires the fences that are due: of rows, or of buckets that were fenced while assigned to
    /// us; they are then read up to their head.
    fn acquire_fences(&mut self) {
        let now = Instant::now();
        let due = self.unfenced.iter().filter(|(_, at)| **at <= now);
        let due: Vec<Bucket> = due.map(|(bucket, _)| *bucket).collect();
        let (store, component) = (self.deps.store.clone(), self.component.clone());
        let consumer = self.config.consumer;
        self.spawn_request(async move {
            let acquire = || fences_of(&store, consumer, &due);
            retry_while_unavailable(&component, acquire)
                .await
                .map(StoreReply::Fenced)
        });
    }

    fn read_history(&mut self, key: EndpointKey, by: Arc<Record>) {
        let (store, component) = (self.deps.store.clone(), self.component.clone());
        self.spawn_request(async move {
            let read = || parking::history(store.clone(), key.clone(), by.position);
            let entries = retry_while_unavailable(&component, read).await?;
            Ok(StoreReply::History { by, key, entries })
        });
    }

    fn handle_reply(&mut self, reply: StoreReply<F>) {
        let now = self.deps.clock.now();
        match reply {
            StoreReply::Acquired(acquired) => {
                let (mut buckets, mut parked) = (Vec::new(), Vec::new());
                for (bucket, fence, initial) in acquired {
                    self.feed.start_from(bucket, initial.position);
                    parked.extend(self.core.acquire(bucket, fence, initial, now));
                    buckets.push(bucket);
                }
                self.outbox.push_back(Step::Acquired(buckets));
                self.outbox.extend(parked.into_iter().map(Step::Parked));
            }
            StoreReply::Fenced(fences) => {
                for (bucket, fence) in &fences {
                    self.unfenced.remove(bucket);
                    self.core.set_fence(*bucket, Some(fence.clone()));
                }
                if matches!(self.config.ownership, Ownership::Rows) {
                    self.row_fences.extend(fences.clone());
                    self.outbox.push_back(Step::RowsAcquired(fences));
                    return;
                }
                let buckets: Vec<Bucket> = fences.into_keys().collect();
                self.feed.catch_up_again(&buckets);
                self.outbox.push_back(Step::Acquired(buckets));
            }
            StoreReply::History { by, key, entries } => {
                let step = match self.core.rebuild(&key, entries, now) {
                    Some(applied) => Step::Rebuilt { key, by, applied },
                    None => {
                        let record = [AppliedRecord {
                            record: by,
                            effect: None,
                        }];
                        self.outbox.push_back(Step::Applied(record.into()));
                        Step::Parked(key)
                    }
                };
                self.outbox.push_back(step);
            }
        }
    }

    /// Drafts the snapshots that are due.
    fn check_snapshots(&mut self) {
        let buckets: Vec<Bucket> = self.core.buckets().collect();
        for bucket in buckets {
            if self.drafts.len() < DRAFTS_MAX && self.is_due(bucket) {
                self.draft(bucket);
            }
        }
        self.save_next();
    }

    fn is_due(&mut self, bucket: Bucket) -> bool {
        let backlog = self.core.backlog(bucket);
        if backlog.applied + backlog.skipped == 0 {
            self.behind_since.remove(&bucket);
            return false;
        }
        let now = Instant::now();
        let since = *self.behind_since.entry(bucket).or_insert(now);
        let age = now.duration_since(since);
        snapshot::is_due(backlog, age, self.core.is_caught_up(bucket)) && self.may_save(bucket)
    }

    /// Whether a snapshot of the bucket may be drafted: not while another is in progress, since
    /// each builds on the previous one.
    fn may_save(&self, bucket: Bucket) -> bool {
        let written = self.written.get(&bucket);
        let is_written = !self.config.waits_for_writes
            || written.is_some_and(|written| *written >= self.core.position(bucket));
        let is_saving = self.saving.as_ref().is_some_and(|(of, _)| *of == bucket)
            || self.drafts.iter().any(|(of, ..)| *of == bucket);
        is_written && !is_saving && self.core.fence(bucket).is_some()
    }

    fn draft(&mut self, bucket: Bucket) {
        let Some(fence) = self.core.fence(bucket).cloned() else {
            return;
        };
        if let Some(draft) = self.core.draft(bucket) {
            self.behind_since.remove(&bucket);
            self.drafts.push_back((bucket, fence, draft));
        }
        self.save_next();
    }

    /// Stores one draft at a time, so that decisions do not have to wait for the store.
    fn save_next(&mut self) {
        if self.saving.is_some() {
            return;
        }
        let Some((bucket, fence, draft)) = self.drafts.pop_front() else {
            return;
        };
        let (store, consumer) = (self.deps.store.clone(), self.config.snapshots.clone());
        let saving = snapshot::save(store, consumer, bucket, F::VERSION, fence, draft);
        self.saving = Some((bucket, AbortOnDropHandle::new(tokio::spawn(saving))));
    }

    fn handle_saved(
        &mut self,
        bucket: Bucket,
        outcome: Result<StoredSnapshot, CommitError>,
    ) -> Result<(), StoreError> {
        match outcome {
            Ok(stored) => self.core.stored(bucket, Some(stored)),
            Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
            Err(error) => {
                if matches!(error, CommitError::Fenced { .. }) {
                    self.fenced(bucket);
                }
                let consumer = self.config.consumer;
                tracing::debug!(consumer, %bucket, %error, "failed to store a snapshot");
                self.core.stored(bucket, None);
            }
        }
        self.save_next();
        Ok(())
    }

    /// Stores snapshots of all buckets that are caught up, at shutdown; what cannot be stored in
    /// time is folded again by the next owner.
    pub async fn save_all(&mut self) {
        let buckets: Vec<Bucket> = self.core.buckets().collect();
        let saving = async {
            for bucket in buckets {
                if self.core.is_caught_up(bucket) && self.may_save(bucket) {
                    self.draft(bucket);
                }
            }
            while self.saving.is_some() {
                let (bucket, outcome) = next_saved(&mut self.saving).await;
                self.handle_saved(bucket, outcome)?;
            }
            Ok::<(), StoreError>(())
        };
        let _ = tokio::time::timeout(SAVE_TIMEOUT, saving).await;
    }
}

/// The kinds of streams to exclude after a position, and up to which position that holds. Decisions
/// about parking are never excluded.
fn event_filter<F: Fold>(fold: &F, after: Position) -> (Vec<StreamKind>, Position) {
    let effects_from = fold.effects_from();
    let without_effects = after < effects_from;
    let is_excluded = |kind: &StreamKind| {
        let has_no_effect = without_effects && fold.has_effects_only(*kind);
        *kind != StreamKind::Parking && (!F::READS.contains(kind) || has_no_effect)
    };
    let excluded = StreamKind::ALL
        .iter()
        .copied()
        .filter(is_excluded)
        .collect();
    let until = match without_effects {
        true => effects_from,
        false => Position(u64::MAX),
    };
    (excluded, until)
}

/// Acquires the fences of buckets in a single commit: one commit per fence would take long for many
/// buckets.
///
/// # Errors
///
/// If the store is unavailable; then no fence is acquired.
async fn fences_of(
    store: &Store,
    consumer: &str,
    buckets: &[Bucket],
) -> Result<BTreeMap<Bucket, Fence>, StoreError> {
    let name = |bucket: &Bucket| format!("{consumer}/{bucket}");
    let taken = store
        .acquire_fences(buckets.iter().map(name).collect())
        .await?;
    let mut taken: BTreeMap<String, Fence> = taken
        .into_iter()
        .map(|fence| (fence.name.clone(), fence))
        .collect();
    let of_bucket = |bucket: &Bucket| Some((*bucket, taken.remove(&name(bucket))?));
    Ok(buckets.iter().filter_map(of_bucket).collect())
}

async fn next_saved<T>(
    saving: &mut Option<(Bucket, AbortOnDropHandle<Result<T, CommitError>>)>,
) -> (Bucket, Result<T, CommitError>) {
    let Some((bucket, task)) = saving else {
        return std::future::pending().await;
    };
    let outcome = task.await;
    let outcome = outcome.unwrap_or_else(|error| {
        let error =
            StoreError::database(format!("a snapshot task failed: {error}")).caused_by(error);
        Err(error.into())
    });
    let bucket = *bucket;
    *saving = None;
    (bucket, outcome)
}

/// Adds the global bucket if its owner is among the buckets.
fn with_global(buckets: &[Bucket]) -> Vec<Bucket> {
    let mut buckets = buckets.to_vec();
    if buckets.contains(&Bucket::GLOBAL_OWNER) {
        buckets.push(Bucket::GLOBAL);
    }
    buckets
}

/// The next message of a subscription; waits for ever without one.
async fn next(subscription: &mut Option<mpsc::Receiver<BusMessage>>) -> Option<BusMessage> {
    match subscription {
        Some(subscription) => subscription.recv().await,
        None => std::future::pending().await,
    }
}

fn try_next(subscription: &mut Option<mpsc::Receiver<BusMessage>>) -> Option<BusMessage> {
    subscription.as_mut()?.try_recv().ok()
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
