//! How a service consumes the log, once for all of them: which buckets it has and under which fences, what
//! it folds of them and what is parked, snapshots to begin with, retries and readiness.
//!
//! [`Consumer::next`] gives one step after the other; whoever drives it acts on what the steps say and
//! evaluates what is folded ([`Consumer::folds`]). `runtime::reconcile` is the loop of services that write
//! one stream for each endpoint; others drive it themselves.
//!
//! Invariants: buckets come and go at any time; only what is fenced and caught up with may be evaluated; what
//! begins with a snapshot is what the whole log gives; a snapshot is written under the bucket's fence, so a
//! replaced owner writes none; outages of the store end nothing.

mod core;
mod fold;
mod snapshot;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, Subscription};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, StreamKind};
use contract::time::Timestamp;
use futures::TryFutureExt;
use futures::future::try_join_all;
use store::{CommitError, Fence, Store, StoreError};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::task::AbortOnDropHandle;

use self::snapshot::Stored;
use crate::clock::Clock;
use crate::feed::{Feed, FeedItem};
use crate::health::{Component, READS_THE_LOG, UNASSIGNED};
use crate::parking::{self, Parking};
use crate::retry::until_answered;

pub use self::core::{Applied, Backlog, Core, Handled};
pub use self::fold::{Entries, Entry, Fold, Folds};
pub use self::snapshot::{Draft, Initial, load};

/// Who was fenced waits for so long before it takes the bucket again: most often it has only not yet
/// heard that the bucket is somebody else's.
const TAKE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// How often it is looked whether snapshots are due.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A snapshot is written after so many events that would have to be applied again, or so many that would
/// have to be read again, or this long after the first of them.
const APPLIED_MAX: usize = 512;
const PASSED_MAX: usize = 8192;
const BEHIND_MAX: Duration = Duration::from_secs(300);
/// Drafts that wait for the store; more are made when these are stored.
const DRAFTS_MAX: usize = 16;
/// While the history is read, so that whoever is interrupted does not begin it once more.
const APPLIED_MAX_OF_HISTORY: usize = 20_000;
/// How long the end of a service waits for its last snapshots.
const SAVING_MAX: Duration = Duration::from_secs(2);

/// What a consumer is called, and how it goes about its work.
#[derive(Clone, Debug)]
pub struct ConsumerConfig {
    /// Names it in fences, in parking, in metrics and in the log of the process: `autoscaler`.
    pub consumer: &'static str,
    /// What its snapshots are stored under: the same, or `node/ID` where each process has its own.
    pub snapshots: String,
    /// Who else consumes the same.
    pub ownership: Ownership,
    /// Whether snapshots wait until the service says that what follows from a bucket has been written
    /// ([`Consumer::confirm_written`]).
    pub waits_for_writes: bool,
}

impl ConsumerConfig {
    /// One whose replicas share the buckets.
    pub fn shared(consumer: &'static str) -> Self {
        Self {
            consumer,
            snapshots: consumer.to_owned(),
            ownership: Ownership::Shared,
            waits_for_writes: false,
        }
    }
}

/// Who else consumes the same.
#[derive(Clone, Debug)]
pub enum Ownership {
    /// Replicas share the buckets; who has one holds its fence, `CONSUMER/BUCKET`.
    Shared,
    /// Everything is ours, under this fence.
    Sole(Fence),
    /// Every replica folds everything; who owns which bucket is settled elsewhere, and told by
    /// [`Consumer::own`].
    Elsewhere,
}

/// What has happened.
#[derive(Debug)]
pub enum Step<E> {
    /// Buckets are ours, under new fences. Where they were not before, what snapshots hold of them has been
    /// loaded, and their history follows.
    Taken(Vec<Bucket>),
    /// Records in order within each bucket, and what came of them.
    Applied(Vec<Applied<E>>),
    /// Up to these positions of their buckets there was nothing more to apply.
    Passed(BTreeMap<Bucket, Position>),
    /// An event that cannot be decoded.
    Unreadable {
        /// Where it stands.
        bucket: Bucket,
        /// At which position.
        position: Position,
    },
    /// The endpoint has no state any more, and is not to be dealt with.
    Parked(EndpointKey),
    /// People wanted the endpoint back, by this record: its state was folded from its start.
    Rebuilt {
        /// Which endpoint.
        key: EndpointKey,
        /// The record by which they said so.
        by: Arc<Record>,
        /// Its records, and what came of them.
        applied: Vec<Applied<E>>,
    },
    /// The history of these buckets, up to the head at their assignment, has been applied.
    CaughtUp(Vec<Bucket>),
    /// Buckets are somebody else's from here on; their states are gone.
    Released(Vec<Bucket>),
}

/// What [`Consumer`] works with.
#[derive(Clone)]
pub struct ConsumerDeps {
    /// Where the log and the snapshots are.
    pub store: Store,
    /// Where new records come from.
    pub bus: Arc<dyn Bus>,
    /// For what is written down, such as since when an endpoint is parked.
    pub clock: Arc<dyn Clock>,
}

/// A consumer of the log.
pub struct Consumer<F: Fold> {
    core: Core<F>,
    config: ConsumerConfig,
    deps: ConsumerDeps,
    component: Component,
    feed: Feed,
    /// Read, and not dealt with yet.
    inbox: VecDeque<FeedItem>,
    outbox: VecDeque<Step<F::Effect>>,
    /// What the store is asked for; nothing else goes on meanwhile.
    working: Option<AbortOnDropHandle<Result<Work<F>, StoreError>>>,
    /// Buckets that somebody else took and that are still assigned to us: when to take them again.
    lost: BTreeMap<Bucket, Instant>,
    saving: Option<(Bucket, AbortOnDropHandle<Result<Stored, CommitError>>)>,
    /// To be stored next.
    drafts: VecDeque<(Bucket, Fence, Draft)>,
    /// When the stored snapshots were last known to be up to date.
    behind_since: BTreeMap<Bucket, Instant>,
    /// Up to where the service says that it has written what follows.
    written: BTreeMap<Bucket, Position>,
    looks: Interval,
}

/// What the store has answered.
enum Work<F: Fold> {
    Taken(Vec<(Bucket, Option<Fence>, Initial<F::State>)>),
    Fenced(BTreeMap<Bucket, Fence>),
    History {
        by: Arc<Record>,
        key: EndpointKey,
        entries: Vec<store::Entry>,
    },
}

impl<F: Fold> Consumer<F> {
    /// Subscribes at once; nothing is read before the first [`next`](Self::next).
    pub fn open(config: ConsumerConfig, fold: F, deps: ConsumerDeps, component: Component) -> Self {
        let subscription = match &config.ownership {
            Ownership::Shared => Subscription::Group(config.consumer),
            Ownership::Sole(_) | Ownership::Elsewhere => Subscription::Whole,
        };
        component.waiting(match &config.ownership {
            Ownership::Shared => UNASSIGNED,
            Ownership::Sole(_) | Ownership::Elsewhere => READS_THE_LOG,
        });
        let feed = Feed::open(deps.store.clone(), deps.bus.clone(), subscription);
        let parking = Parking::open(config.consumer, deps.store.clone(), component.clone());
        let fold = Arc::new(fold);
        let wants = {
            let fold = fold.clone();
            Arc::new(move |after| wanted(fold.as_ref(), after))
        };
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            core: Core::new(fold, parking),
            feed: feed.wanting(wants).reporting(&component),
            config,
            deps,
            component,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            working: None,
            lost: BTreeMap::new(),
            saving: None,
            drafts: VecDeque::new(),
            behind_since: BTreeMap::new(),
            written: BTreeMap::new(),
            looks,
        }
    }

    /// The states of all endpoints of our buckets.
    pub fn folds(&self) -> &Folds<F::State> {
        self.core.folds()
    }

    /// What the steps are made of.
    pub fn core(&self) -> &Core<F> {
        &self.core
    }

    /// What is parked.
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

    /// Whether what is folded of the bucket may be evaluated.
    pub fn is_caught_up(&self, bucket: Bucket) -> bool {
        self.core.is_caught_up(bucket)
    }

    /// Whether that is so for every bucket that is ours.
    pub fn all_caught_up(&self) -> bool {
        self.core.all_caught_up()
    }

    /// The buckets that are ours, in order.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> {
        self.core.buckets()
    }

    /// How far a bucket has been applied.
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

    /// The store has refused our fence: somebody else has taken the bucket. It is taken again after a
    /// while, if it is still assigned to us by then.
    pub fn fenced(&mut self, bucket: Bucket) {
        if self.core.has(bucket) && matches!(self.config.ownership, Ownership::Shared) {
            tracing::warn!(consumer = self.config.consumer, %bucket, "bucket was taken over");
            self.core.mark_lost(bucket);
            self.lost
                .entry(bucket)
                .or_insert_with(|| Instant::now() + TAKE_AGAIN_AFTER);
        }
    }

    /// A bucket that is owned elsewhere is owned by this process now, under this fence, or is not.
    pub fn own(&mut self, bucket: Bucket, fence: Option<Fence>) {
        if fence.is_none() {
            self.written.remove(&bucket);
        }
        self.core.set_fence(bucket, fence);
    }

    /// What follows from a bucket has been written up to here: no snapshot of it stands above.
    pub fn confirm_written(&mut self, bucket: Bucket, position: Position) {
        self.written.insert(bucket, position);
        // At once, for it may go on before the next look.
        if self.is_due(bucket) {
            self.draft(bucket);
        }
    }

    /// Folds a bucket from the log's start, whatever its snapshot holds. To be called before anything else
    /// once it has been taken.
    pub fn discard_snapshot(&mut self, bucket: Bucket) {
        let fence = self.core.fence(bucket).cloned();
        let now = self.deps.clock.now();
        self.core.take(bucket, fence, Initial::default(), now);
        self.feed.read_from_start(bucket);
    }

    /// See [`Feed::slices_from`].
    pub fn slices_from(&mut self, from: Timestamp) {
        self.feed.slices_from(from);
    }

    /// The next step; waits until there is one, also while the store cannot be reached. May be cancelled (in
    /// a `select!`) without losing anything. The only error is that this process has closed the store.
    ///
    /// # Errors
    ///
    /// [`StoreError::Closed`] only.
    pub async fn next(&mut self) -> Result<Step<F::Effect>, StoreError> {
        loop {
            if let Some(step) = self.outbox.pop_front() {
                return Ok(step);
            }
            if let Some(working) = &mut self.working {
                let done = working.await;
                self.working = None;
                self.worked(done.unwrap_or_else(|error| {
                    Err(StoreError::Database(format!("a question ended: {error}")))
                })?);
                continue;
            }
            if let Some(item) = self.inbox.pop_front() {
                self.handle(item);
                continue;
            }
            let take_again = self.lost.values().min().copied();
            tokio::select! {
                biased;
                (bucket, stored) = saved(&mut self.saving) => self.saved(bucket, stored)?,
                _ = self.looks.tick() => self.look(),
                () = until(take_again) => self.take_again(),
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
                let parked = self.core.unreadable(&unreadable, now);
                self.outbox.extend(parked.map(Step::Parked));
                self.outbox.push_back(Step::Unreadable {
                    bucket: unreadable.bucket,
                    position: unreadable.position,
                });
            }
            FeedItem::Passed(passed) => {
                for (bucket, position) in &passed {
                    self.core.pass(*bucket, *position);
                }
                self.outbox.push_back(Step::Passed(passed));
            }
            FeedItem::Assigned(buckets) => {
                tracing::debug!(consumer, ?buckets, "buckets are assigned");
                self.component.waits_on(READS_THE_LOG);
                self.take(buckets);
            }
            FeedItem::Revoked(buckets) => {
                tracing::debug!(consumer, ?buckets, "buckets are revoked");
                for bucket in &buckets {
                    self.lost.remove(bucket);
                    self.written.remove(bucket);
                    self.core.release(*bucket);
                }
                self.outbox.push_back(Step::Released(buckets));
            }
            FeedItem::CaughtUp(buckets) => {
                tracing::debug!(consumer, ?buckets, "buckets are caught up with");
                self.core.caught_up(&buckets);
                // Who owns buckets elsewhere has rows to write before it is told that nothing is parked.
                if !matches!(self.config.ownership, Ownership::Elsewhere) {
                    self.core.parking().caught_up(&buckets);
                }
                if self.core.all_caught_up() && matches!(self.config.ownership, Ownership::Shared) {
                    self.component.ready();
                }
                self.looks.reset_immediately();
                self.outbox.push_back(Step::CaughtUp(buckets));
            }
        }
    }

    fn apply(&mut self, records: Vec<Arc<Record>>, now: Timestamp) {
        let mut applied = Vec::with_capacity(records.len());
        let mut records = records.into_iter();
        while let Some(record) = records.next() {
            let (effect, then) = match self.core.apply(&record, now) {
                Handled::Applied(effect) => (Some(effect), None),
                Handled::Skipped => (None, None),
                Handled::Parked(key) => (None, Some(Step::Parked(key))),
                Handled::Rebuild(key) => {
                    // What comes after it waits until its history has been read.
                    self.inbox.push_front(FeedItem::Records(records.collect()));
                    self.outbox.push_back(Step::Applied(applied));
                    return self.read_history(key, record);
                }
            };
            applied.push(Applied { record, effect });
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

    fn work(&mut self, work: impl Future<Output = Result<Work<F>, StoreError>> + Send + 'static) {
        self.working = Some(AbortOnDropHandle::new(tokio::spawn(work)));
    }

    /// Raises the generation of each bucket, so that a former owner can write no more, and then reads what
    /// its snapshot holds.
    fn take(&mut self, buckets: Vec<Bucket>) {
        let (store, component) = (self.deps.store.clone(), self.component.clone());
        let config = self.config.clone();
        self.work(async move {
            let take = || async {
                let mut fences = match &config.ownership {
                    Ownership::Shared => take_fences(&store, config.consumer, &buckets).await?,
                    Ownership::Sole(fence) => {
                        let fences = buckets.iter().map(|bucket| (*bucket, fence.clone()));
                        fences.collect()
                    }
                    Ownership::Elsewhere => BTreeMap::new(),
                };
                let initials = buckets.iter().map(|bucket| {
                    let fence = fences.remove(bucket);
                    let loaded = load(&store, &config.snapshots, *bucket, F::VERSION);
                    loaded.map_ok(move |initial| (*bucket, fence, initial))
                });
                try_join_all(initials).await
            };
            until_answered(&component, take).await.map(Work::Taken)
        });
    }

    /// What was fenced while it was still ours is taken once more, and read up to its head.
    fn take_again(&mut self) {
        let now = Instant::now();
        let due = self.lost.iter().filter(|(_, at)| **at <= now);
        let due: Vec<Bucket> = due.map(|(bucket, _)| *bucket).collect();
        let (store, component) = (self.deps.store.clone(), self.component.clone());
        let consumer = self.config.consumer;
        self.work(async move {
            let take = || take_fences(&store, consumer, &due);
            until_answered(&component, take).await.map(Work::Fenced)
        });
    }

    fn read_history(&mut self, key: EndpointKey, by: Arc<Record>) {
        let (store, component) = (self.deps.store.clone(), self.component.clone());
        self.work(async move {
            let read = || parking::history(store.clone(), key.clone(), by.position);
            let entries = until_answered(&component, read).await?;
            Ok(Work::History { by, key, entries })
        });
    }

    fn worked(&mut self, work: Work<F>) {
        let now = self.deps.clock.now();
        match work {
            Work::Taken(taken) => {
                let (mut buckets, mut parked) = (Vec::new(), Vec::new());
                for (bucket, fence, initial) in taken {
                    self.feed.begin_at(bucket, initial.position);
                    parked.extend(self.core.take(bucket, fence, initial, now));
                    buckets.push(bucket);
                }
                self.outbox.push_back(Step::Taken(buckets));
                self.outbox.extend(parked.into_iter().map(Step::Parked));
            }
            Work::Fenced(fences) => {
                let mut buckets = Vec::new();
                for (bucket, fence) in fences {
                    self.lost.remove(&bucket);
                    self.core.set_fence(bucket, Some(fence));
                    buckets.push(bucket);
                }
                self.feed.catch_up_again(&buckets);
                self.outbox.push_back(Step::Taken(buckets));
            }
            Work::History { by, key, entries } => {
                let step = match self.core.rebuild(&key, entries, now) {
                    Some(applied) => Step::Rebuilt { key, by, applied },
                    None => {
                        let record = [Applied {
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
    fn look(&mut self) {
        let buckets: Vec<Bucket> = self.core.buckets().collect();
        for bucket in buckets {
            if self.drafts.len() < DRAFTS_MAX && self.is_due(bucket) {
                self.draft(bucket);
            }
        }
        self.save_next();
    }

    fn is_due(&mut self, bucket: Bucket) -> bool {
        let Backlog { applied, passed } = self.core.backlog(bucket);
        if applied + passed == 0 {
            self.behind_since.remove(&bucket);
            return false;
        }
        let now = Instant::now();
        let since = *self.behind_since.entry(bucket).or_insert(now);
        let is_due = match self.core.is_caught_up(bucket) {
            true => {
                applied >= APPLIED_MAX
                    || passed >= PASSED_MAX
                    || now.duration_since(since) >= BEHIND_MAX
            }
            false => applied >= APPLIED_MAX_OF_HISTORY,
        };
        is_due && self.may_save(bucket)
    }

    /// Not while one of it is on its way: each builds on the one before.
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

    /// One after the other, so that they do not keep decisions waiting for the store.
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

    fn saved(
        &mut self,
        bucket: Bucket,
        outcome: Result<Stored, CommitError>,
    ) -> Result<(), StoreError> {
        match outcome {
            Ok(stored) => self.core.stored(bucket, Some(stored)),
            Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
            Err(error) => {
                if matches!(error, CommitError::Fenced { .. }) {
                    self.fenced(bucket);
                }
                let consumer = self.config.consumer;
                tracing::debug!(consumer, %bucket, %error, "a snapshot was not stored");
                self.core.stored(bucket, None);
            }
        }
        self.save_next();
        Ok(())
    }

    /// Stores what is new of all buckets that are caught up with, at the end of a service; what cannot be
    /// stored in time is folded again by whoever comes next.
    pub async fn save_all(&mut self) {
        let buckets: Vec<Bucket> = self.core.buckets().collect();
        let saving = async {
            for bucket in buckets {
                if self.core.is_caught_up(bucket) && self.may_save(bucket) {
                    self.draft(bucket);
                }
            }
            while self.saving.is_some() {
                let (bucket, outcome) = saved(&mut self.saving).await;
                self.saved(bucket, outcome)?;
            }
            Ok::<(), StoreError>(())
        };
        let _ = tokio::time::timeout(SAVING_MAX, saving).await;
    }
}

/// The kinds of streams that need not be read after a position, and how far that holds. What people decided
/// about parking concerns everybody.
fn wanted<F: Fold>(fold: &F, after: Position) -> (Vec<StreamKind>, Position) {
    let effects_from = fold.effects_from();
    let without_effects = after < effects_from;
    let is_left_out = |kind: &StreamKind| {
        let has_no_effect = without_effects && fold.has_effects_only(*kind);
        *kind != StreamKind::Parking && (!F::READS.contains(kind) || has_no_effect)
    };
    let left_out = StreamKind::ALL
        .iter()
        .copied()
        .filter(is_left_out)
        .collect();
    let until = match without_effects {
        true => effects_from,
        false => Position(u64::MAX),
    };
    (left_out, until)
}

/// Takes the fences of buckets, all in one commit: one for each would keep whoever takes many waiting.
///
/// # Errors
///
/// When the store cannot be reached; nothing is taken then.
pub async fn take_fences(
    store: &Store,
    consumer: &str,
    buckets: &[Bucket],
) -> Result<BTreeMap<Bucket, Fence>, StoreError> {
    let name = |bucket: &Bucket| format!("{consumer}/{bucket}");
    let taken = store.take_all(buckets.iter().map(name).collect()).await?;
    let mut taken: BTreeMap<String, Fence> = taken
        .into_iter()
        .map(|fence| (fence.name.clone(), fence))
        .collect();
    let of_bucket = |bucket: &Bucket| Some((*bucket, taken.remove(&name(bucket))?));
    Ok(buckets.iter().filter_map(of_bucket).collect())
}

async fn saved<T>(
    saving: &mut Option<(Bucket, AbortOnDropHandle<Result<T, CommitError>>)>,
) -> (Bucket, Result<T, CommitError>) {
    let Some((bucket, task)) = saving else {
        return std::future::pending().await;
    };
    let outcome = task.await;
    let outcome = outcome.unwrap_or_else(|error| {
        let error = StoreError::Database(format!("the task ended: {error}"));
        Err(error.into())
    });
    let bucket = *bucket;
    *saving = None;
    (bucket, outcome)
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
