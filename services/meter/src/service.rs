//! The main loop: frames and records in, events and panes out.
//!
//! Buckets are acquired and released at any time. Frames of a bucket are counted once its events have
//! been folded, which determines what has been counted already; earlier ones are queued, after a start also
//! those of buckets that have yet to be acquired. Store outages
//! are not fatal: what could not be written is due again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bus::Bus;
use contract::events::Event;
use contract::frame::{Frame, FrameHeader};
use contract::ids::{Bucket, EndpointKey, Name};
use contract::log::{Actor, NewEvent, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use domain::measure::WINDOW_MAX;
use domain::usage::{FrameOutcome, PendingUsage, SAVE_INTERVAL, Usage};
use futures::StreamExt;
use runtime::clock::Clock;
use runtime::consumer::{AppliedRecord, Consumer, ConsumerConfig, ConsumerDeps, Step};
use runtime::health::HealthRegistry;
use runtime::ids::Ids;
use runtime::metrics::Metrics;
use runtime::parking::catch_panic;
use store::{Append, Commit, CommitError, Committed, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::fold::MeterFold;
use crate::history::{BucketSave, HistoryError, HistoryStore, SaveBatch, SavedBucket};
use crate::metrics::MeterMetrics;
use crate::open::OpenUsage;
use crate::panes::Panes;
use crate::ready::ReadyChanges;

const SERVICE: &str = "meter";

/// How often panes and open minutes are saved while that is quick: what is not saved yet is missing in
/// windows of rules after a crash. [`SAVE_INTERVAL`] is the longest.
const SAVE_INTERVAL_MIN: Span = Span::from_secs(2);

/// How many times as long as a save takes the next one waits: saving takes at most this part of the time.
const SAVE_SHARE: u64 = 50;

/// How often to check for minutes that can be closed.
const TICK: Duration = Duration::from_millis(250);

/// Frames of one bucket queued until its events have been folded; the oldest are dropped first.
const QUEUED_FRAMES_MAX: usize = 4096;

/// Frames queued for buckets that have yet to be acquired; the oldest are dropped first.
const EARLY_FRAMES_MAX: usize = 65_536;

/// How long frames of such buckets are queued after a start. Afterwards they belong to other meters.
const ACQUIRED_WITHIN: Duration = Duration::from_secs(60);

/// Unreadable frames queued for buckets whose events have not been folded yet.
const UNREADABLE_MAX: usize = 65_536;

/// Endpoints whose minutes are written concurrently.
const CONCURRENT_CLOSES_MAX: usize = 256;

/// Frames are requested again from this long before the open minutes were saved: clocks differ, and some
/// frames were late.
const REDELIVERY_MARGIN: Span = Span::from_secs(60);

/// Nothing is closed until this long after redelivery was requested, or its last frame arrived: redelivered
/// frames must be counted first.
const REDELIVERY_QUIET: Span = Span::from_secs(10);

/// The limit for that delay: what arrives even later becomes a correction.
const REDELIVERY_MAX: Span = Span::from_secs(300);

/// What only windows of rules need is kept for this long at least: the longest window, and some time to
/// restart.
const WINDOWS_KEPT_MIN: Span = Span::from_secs(13 * 3600);

#[derive(Clone)]
pub struct Deps {
    pub store: Store,
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    pub metrics: Metrics,
    pub health: HealthRegistry,
}

#[derive(Debug, thiserror::Error)]
pub enum MeterError {
    // Not transparent: whoever reports it looks for a damaged store.
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    History(#[from] HistoryError),
}

/// The meter: opened and subscribed, but not running yet.
pub struct Meter {
    deps: Deps,
    history: HistoryStore,
    retention: Span,
    metrics: MeterMetrics,
    consumer: Consumer<MeterFold>,
    frames: mpsc::Receiver<Arc<Frame>>,
    state: State,
}

/// In-memory state; what is not in the log is saved to the history.
struct State {
    buckets: BTreeMap<Bucket, MeteredBucket>,
    /// Frames that arrived before their bucket was acquired; `None` once that is over.
    early: Option<VecDeque<Arc<Frame>>>,
    panes: Panes,
    ready: ReadyChanges,
    saved_at: Timestamp,
    /// How long after that the next save is due.
    save_after: Span,
    /// Unreadable frames of buckets that have not caught up.
    unreadable: Vec<FrameHeader>,
    /// The batch whose save failed, or has an unknown outcome.
    unsaved: Option<SaveBatch>,
    is_write_failing: bool,
}

/// A bucket owned by this meter.
struct MeteredBucket {
    fence: Fence,
    usage: Usage,
    is_caught_up: bool,
    /// Whether another owner counted before us and left no usable open minutes.
    is_taken_over: bool,
    /// From when on frames are to be redelivered.
    redeliver_from: Option<Timestamp>,
    /// Set once redelivery has been requested.
    redelivery: Option<Redelivery>,
    /// Frames that arrived before the bucket caught up.
    queued: VecDeque<Arc<Frame>>,
}

/// A redelivery of past frames in progress.
struct Redelivery {
    from: Timestamp,
    /// Until when the received frames are considered incomplete.
    until: Timestamp,
    /// The latest value of `until`.
    at_most_until: Timestamp,
}

impl Meter {
    /// Opens the history and subscribes to frames and records.
    pub async fn open(config: Config, deps: Deps) -> Result<Self, MeterError> {
        let component = deps.health.component(SERVICE);
        let frames = deps.bus.subscribe_frames();
        let consumer_config = ConsumerConfig {
            waits_for_writes: true,
            ..ConsumerConfig::shared(SERVICE)
        };
        let consumer_deps = ConsumerDeps {
            store: deps.store.clone(),
            bus: deps.bus.clone(),
            clock: deps.clock.clone(),
        };
        let consumer = Consumer::open(consumer_config, MeterFold, consumer_deps, component);
        let history = HistoryStore::open(&config.history).await?;
        let state = State {
            buckets: BTreeMap::new(),
            early: Some(VecDeque::new()),
            panes: Panes::default(),
            ready: ReadyChanges::default(),
            saved_at: deps.clock.now(),
            save_after: SAVE_INTERVAL_MIN,
            unreadable: Vec::new(),
            unsaved: None,
            is_write_failing: false,
        };
        Ok(Self {
            metrics: MeterMetrics::new(&deps.metrics),
            deps,
            history,
            retention: config.retention,
            consumer,
            frames,
            state,
        })
    }

    /// Returns a handle for reading the history.
    pub fn history(&self) -> HistoryStore {
        self.history.clone()
    }

    /// Runs until `shutdown`, then counts the frames received so far and saves.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), MeterError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let early_until = Instant::now() + ACQUIRED_WITHIN;
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = sleep_until(early_until), if self.state.early.is_some() => {
                    self.state.early = None;
                }
                _ = ticks.tick() => self.tick().await?,
                step = self.consumer.next() => self.handle(step?).await?,
                Some(frame) = self.frames.recv() => self.receive_frame(frame),
            }
        }
        self.drain_frames();
        let ours: Vec<Bucket> = self.state.buckets.keys().copied().collect();
        self.save(self.deps.clock.now(), &ours).await;
        self.consumer.save_all().await;
        Ok(())
    }

    async fn handle(&mut self, step: Step<Vec<(Name, u32)>>) -> Result<(), StoreError> {
        match step {
            Step::Applied(applied) => applied.into_iter().for_each(|one| self.applied(one)),
            // Open minutes are kept; applying a record again has no effect on them.
            Step::Rebuilt { applied, .. } => {
                applied.into_iter().for_each(|one| self.applied(one));
            }
            Step::Acquired(buckets) => {
                let fence =
                    |bucket: &Bucket| Some((*bucket, self.consumer.fence(*bucket)?.clone()));
                let fences: Vec<(Bucket, Fence)> = buckets.iter().filter_map(fence).collect();
                let mut saved = self.claim(&fences).await;
                for (bucket, fence) in fences {
                    let saved = saved.remove(&bucket);
                    match self.state.buckets.contains_key(&bucket) {
                        true => self.reacquire(bucket, fence, saved),
                        false => self.acquire(bucket, fence, saved),
                    }
                }
                self.consumer.slices_from(self.slices_from());
            }
            Step::Released(buckets) => self.release(&buckets).await,
            Step::CaughtUp(buckets) => self.caught_up(&buckets),
            // Open minutes are kept.
            Step::Parked(_)
            | Step::Unreadable { .. }
            | Step::Advanced(_)
            | Step::RowsAcquired(_)
            | Step::RowsReleased(_) => {}
        }
        Ok(())
    }

    fn applied(&mut self, applied: AppliedRecord<Vec<(Name, u32)>>) {
        let AppliedRecord { record, effect } = applied;
        let Some(owned) = self.state.buckets.get_mut(&record.bucket) else {
            return;
        };
        let applies = effect.is_some();
        self.state
            .ready
            .record_changes(&record, effect.unwrap_or_default());
        if applies && let Err(detail) = catch_panic(|| owned.usage.apply(&record)) {
            let key = record.endpoint();
            tracing::error!(position = %record.position, detail, "failed to apply event to open minutes");
            if let Some(key) = key {
                self.consumer.park(&key, &detail);
            }
        }
    }

    /// Fences out former owners of these buckets. If the history fails, the bucket starts from the log
    /// alone.
    async fn claim(&self, fences: &[(Bucket, Fence)]) -> BTreeMap<Bucket, SavedBucket> {
        let generation = |(bucket, fence): &(Bucket, Fence)| (*bucket, fence.generation);
        let generations = fences.iter().map(generation).collect();
        let claimed = self.history.claim(&generations).await;
        claimed.unwrap_or_else(|error| {
            tracing::error!(%error, "failed to read open minutes");
            BTreeMap::new()
        })
    }

    /// Acquires a bucket, starting from the saved open minutes, or else from the log alone.
    fn acquire(&mut self, bucket: Bucket, fence: Fence, saved: Option<SavedBucket>) {
        let now = self.deps.clock.now();
        let saved = saved.unwrap_or_else(|| SavedBucket {
            panes_before: now.secs() + 1,
            ..SavedBucket::default()
        });
        let open = saved.open.and_then(|open| open.for_owner(&fence));
        let is_taken_over = open.is_none() && fence.generation > 1;
        self.state.panes.forget(bucket);
        if is_taken_over {
            self.state.panes.start_from(bucket, saved.panes_before);
        }
        self.state.ready.start_from(bucket, saved.ready_through);
        let (mut usage, saved_at) = open.unwrap_or_default();
        // The history is older than the snapshot, or lost: what it lacks is only in the log.
        if self.consumer.position(bucket) > saved.ready_through {
            self.consumer.discard_snapshot(bucket);
        }
        for (key, entry) in self.consumer.folds().lock().of(bucket) {
            if entry.state.usage.version() >= usage.version(key) {
                usage.restore_endpoint(key, &entry.state.usage);
            }
        }
        let owned = MeteredBucket {
            is_taken_over,
            redeliver_from: saved_at.map(|at| before(at, REDELIVERY_MARGIN)),
            redelivery: None,
            usage,
            fence,
            is_caught_up: false,
            queued: self.take_early(bucket),
        };
        self.state.buckets.insert(bucket, owned);
    }

    /// While history is read, no frame is counted, and only minutes that were restored open are reduced by what
    /// the log has: usage before the first of them is read without its slices. Later all slices matter.
    fn slices_from(&self) -> Timestamp {
        let from = |owned: &MeteredBucket| match owned.is_caught_up {
            true => Timestamp::MIN,
            false => owned.usage.oldest_open().unwrap_or(Timestamp::MAX),
        };
        let owned = self.state.buckets.values();
        owned.map(from).min().unwrap_or(Timestamp::MIN)
    }

    /// Reacquires a bucket that was fenced while still owned. Its open minutes are kept: what another owner
    /// has reported of them comes with the feed and is subtracted.
    fn reacquire(&mut self, bucket: Bucket, fence: Fence, saved: Option<SavedBucket>) {
        let saved = saved.map(|saved| saved.panes_before);
        let begin = saved.unwrap_or_else(|| self.deps.clock.now().secs() + 1);
        self.state.panes.start_from(bucket, begin);
        if let Some(owned) = self.state.buckets.get_mut(&bucket) {
            owned.fence = fence;
        }
    }

    /// Releases buckets. Their next owner starts from what is saved now.
    async fn release(&mut self, buckets: &[Bucket]) {
        self.drain_frames();
        let owned = buckets.iter().filter_map(|b| self.state.buckets.get(b));
        if owned.filter(|owned| owned.is_caught_up).count() > 0 {
            self.save(self.deps.clock.now(), buckets).await;
        }
        for bucket in buckets {
            self.state.buckets.remove(bucket);
            self.state.panes.forget(*bucket);
            self.state.ready.forget(*bucket);
        }
    }

    fn caught_up(&mut self, buckets: &[Bucket]) {
        self.consumer.slices_from(Timestamp::MIN);
        let now = self.deps.clock.now();
        let mut since: Option<Timestamp> = None;
        for bucket in buckets {
            let Some(owned) = self.state.buckets.get_mut(bucket) else {
                continue;
            };
            // Already caught up before: nothing to start.
            if std::mem::replace(&mut owned.is_caught_up, true) {
                continue;
            }
            if owned.is_taken_over {
                let uncounted_from = owned.usage.taken_over(now);
                owned.redeliver_from = Some(before(uncounted_from, REDELIVERY_MARGIN));
            }
            if let Some(from) = owned.redeliver_from.filter(|from| *from < now) {
                owned.redelivery = Some(Redelivery {
                    from,
                    until: now + REDELIVERY_QUIET,
                    at_most_until: now + REDELIVERY_MAX,
                });
                since = Some(since.map_or(from, |since| since.min(from)));
            }
        }
        if let Some(since) = since {
            self.resubscribe_since(since);
        }
        for bucket in buckets {
            let owned = self.state.buckets.get_mut(bucket);
            let queued = owned.map(|owned| std::mem::take(&mut owned.queued));
            for frame in queued.into_iter().flatten() {
                self.count(&frame);
            }
        }
    }

    /// Requests frames again to count the former owner's open minutes, as far as the bus still has them.
    /// Duplicates are counted once.
    fn resubscribe_since(&mut self, since: Timestamp) {
        if let Some(frames) = self.deps.bus.subscribe_frames_since(since) {
            // Frames left in the old subscription may precede those of the new one.
            self.drain_frames();
            self.frames = frames;
        }
    }

    fn receive_frame(&mut self, frame: Arc<Frame>) {
        match self.state.buckets.get_mut(&frame.bucket) {
            Some(owned) if owned.is_caught_up => self.count(&frame),
            Some(owned) => {
                if owned.queued.len() >= QUEUED_FRAMES_MAX {
                    owned.queued.pop_front();
                }
                owned.queued.push_back(frame);
            }
            None => self.queue_early(frame),
        }
    }

    /// Gateways and nodes of the same process may send frames before the buckets are acquired: these
    /// would be reported missing.
    fn queue_early(&mut self, frame: Arc<Frame>) {
        if let Some(early) = &mut self.state.early {
            if early.len() >= EARLY_FRAMES_MAX {
                early.pop_front();
            }
            early.push_back(frame);
        }
    }

    fn take_early(&mut self, bucket: Bucket) -> VecDeque<Arc<Frame>> {
        let Some(early) = &mut self.state.early else {
            return VecDeque::new();
        };
        let (taken, left) = std::mem::take(early)
            .into_iter()
            .partition(|frame| frame.bucket == bucket);
        *early = left;
        taken
    }

    fn count(&mut self, frame: &Frame) {
        let Some(owned) = self.state.buckets.get_mut(&frame.bucket) else {
            return;
        };
        let now = self.deps.clock.now();
        owned.extend_redelivery(frame, now);
        let counted = owned.usage.count(frame, now);
        self.metrics.frame(counted);
        if counted != FrameOutcome::Duplicate {
            self.state.panes.add(frame);
        }
    }

    fn drain_frames(&mut self) {
        while let Ok(frame) = self.frames.try_recv() {
            self.receive_frame(frame);
        }
    }

    /// Counts unreadable frames as missing; those of buckets that have not caught up stay queued.
    fn count_unreadable_frames(&mut self) {
        let queued = std::mem::take(&mut self.state.unreadable);
        let arrived = self.deps.bus.take_unreadable_frames();
        for head in queued.into_iter().chain(arrived) {
            match self.state.buckets.get_mut(&head.bucket) {
                Some(owned) if owned.is_caught_up => {
                    owned.usage.count_unreadable(&head);
                    self.metrics.unreadable_frame();
                }
                Some(_) if self.state.unreadable.len() < UNREADABLE_MAX => {
                    self.state.unreadable.push(head);
                }
                _ => {}
            }
        }
    }

    async fn tick(&mut self) -> Result<(), StoreError> {
        // Count all received frames before closing a minute.
        self.drain_frames();
        self.count_unreadable_frames();
        let now = self.deps.clock.now();
        self.close(now).await?;
        let clock_stepped_back = now < self.state.saved_at;
        if clock_stepped_back || now.since(self.state.saved_at) >= self.state.save_after {
            let started = Instant::now();
            self.save(now, &[]).await;
            self.state.save_after = save_interval(started.elapsed());
        }
        Ok(())
    }

    /// Appends due events, one commit per endpoint. What cannot be written is due again.
    async fn close(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let mut due = Vec::new();
        for (bucket, owned) in &mut self.state.buckets {
            // Another meter may have acquired it meanwhile.
            let is_ours = self.consumer.fence(*bucket) == Some(&owned.fence);
            if !is_ours || !owned.is_caught_up || owned.is_redelivering(now) {
                continue;
            }
            let parking = self.consumer.parking();
            let of_bucket = owned.usage.due(now).into_iter();
            let wanted = of_bucket.filter(|due| !parking.is_parked(&due.endpoint));
            due.extend(wanted.map(|due| (*bucket, owned.fence.clone(), due)));
        }
        let commits = due.into_iter().map(|(bucket, fence, due)| {
            let commit = self.commit(&due, &fence, now);
            let store = &self.deps.store;
            async move { (bucket, due.endpoint, store.commit(commit).await) }
        });
        // Bounded: at the end of a minute, they would otherwise delay decisions at the writer.
        let outcomes: Vec<_> = futures::stream::iter(commits)
            .buffer_unordered(CONCURRENT_CLOSES_MAX)
            .collect()
            .await;
        for (bucket, endpoint, outcome) in outcomes {
            match outcome {
                Ok(Committed::Written { records }) => {
                    self.state.is_write_failing = false;
                    let Some(owned) = self.state.buckets.get_mut(&bucket) else {
                        continue;
                    };
                    for record in records {
                        self.metrics.written(&record.event);
                        owned.usage.apply(&record);
                    }
                }
                Ok(Committed::Duplicate { .. }) => {}
                // The feed will deliver what is missing here.
                Err(CommitError::Conflict { .. }) => {
                    tracing::debug!(%endpoint, "usage stream advanced, waiting for the feed");
                }
                Err(CommitError::Fenced { .. }) => {
                    self.consumer.fenced(bucket);
                }
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                // Log once per outage, not for each endpoint and attempt.
                Err(error) => {
                    if !std::mem::replace(&mut self.state.is_write_failing, true) {
                        tracing::error!(%endpoint, %error, "failed to write usage, retrying");
                    }
                }
            }
        }
        let (mut open, mut idle) = (0, 0);
        let owned = self.state.buckets.values_mut();
        for owned in owned.filter(|owned| owned.is_caught_up) {
            if !owned.is_redelivering(now) {
                owned.usage.prune(now);
            }
            open += owned.usage.open_minutes();
            idle += owned.usage.idle_deployments();
        }
        self.metrics.open_minutes.set(open as i64);
        self.metrics.idle_deployments.set(idle as i64);
        Ok(())
    }

    fn commit(&self, due: &PendingUsage, fence: &Fence, now: Timestamp) -> Commit {
        let new_event = |event: &Event| NewEvent {
            id: self.deps.ids.event_id(now),
            time: now,
            actor: Actor::service(SERVICE),
            event: event.clone(),
        };
        Commit {
            appends: vec![Append {
                stream: StreamName::of(StreamKind::Usage, &due.endpoint),
                expected_version: due.expected_version,
                events: due.events.iter().map(new_event).collect(),
            }],
            fence: Some(fence.clone()),
            ..Commit::default()
        }
    }

    /// Saves panes and open minutes. Failures are logged and retried, since the history is not the log.
    async fn save(&mut self, now: Timestamp, releasing: &[Bucket]) {
        self.state.saved_at = now;
        if let Some(unsaved) = self.state.unsaved.take()
            && !self.write_batch(unsaved, true).await
        {
            return;
        }
        let batch = self.collect(now, releasing);
        if self.write_batch(batch, false).await {
            let before = |span: Span| now.secs() - span.secs() as i64;
            let windows_before = before(WINDOW_MAX.max(WINDOWS_KEPT_MIN));
            let pruned = self.history.prune(before(self.retention), windows_before);
            if let Err(error) = pruned.await {
                tracing::warn!(%error, "failed to delete old history");
            }
        }
    }

    /// Collects unsaved data of the owned buckets.
    fn collect(&mut self, now: Timestamp, releasing: &[Bucket]) -> SaveBatch {
        let State {
            buckets,
            panes,
            ready,
            ..
        } = &mut self.state;
        let caught_up_buckets = buckets.iter().filter(|(_, owned)| owned.is_caught_up);
        let saves: BTreeMap<Bucket, BucketSave> = caught_up_buckets
            .filter_map(|(bucket, owned)| bucket_save(*bucket, owned, ready, now))
            .collect();
        let is_ours = |bucket| saves.contains_key(&bucket);
        let recorded = recorded(&self.consumer, saves.keys().copied());
        let is_leaving = |bucket| releasing.contains(&bucket);
        let mut taken = panes.take(now, is_ours, is_leaving, &recorded.deployments);
        let covered = taken.covered();
        // Without an endpoint there is no rule to read it.
        let is_used = |bucket: &Bucket| recorded.buckets.contains(bucket);
        taken.measured.retain(|(bucket, _), _| is_used(bucket));
        SaveBatch {
            panes: taken.panes,
            covered,
            measured: taken.measured,
            instances: taken.instances,
            ready: ready.take(is_ours),
            buckets: saves,
            now: now.secs(),
        }
    }

    async fn write_batch(&mut self, batch: SaveBatch, is_retry: bool) -> bool {
        match self.history.save(&batch, is_retry).await {
            Ok(refused) => {
                for (bucket, bucket_save) in &batch.buckets {
                    if !refused.contains(bucket) {
                        self.consumer
                            .confirm_written(*bucket, bucket_save.ready_through);
                    }
                }
                // The newer owner counts the same frames.
                let buckets = refused.len();
                if buckets > 0 {
                    tracing::info!(buckets, "not saved, buckets have new owners");
                }
                true
            }
            Err(error) => {
                tracing::error!(%error, "failed to save history and open minutes");
                self.metrics.saves_failed.inc();
                self.state.unsaved = Some(batch);
                false
            }
        }
    }
}

impl MeteredBucket {
    /// Whether redelivered frames may still arrive.
    fn is_redelivering(&self, now: Timestamp) -> bool {
        self.redelivery
            .as_ref()
            .is_some_and(|redelivery| now < redelivery.until)
    }

    /// Extends the redelivery if the frame is from the past, since more may follow.
    fn extend_redelivery(&mut self, frame: &Frame, now: Timestamp) {
        let is_past = now.since(frame.start) > REDELIVERY_QUIET;
        if let Some(redelivery) = self
            .redelivery
            .as_mut()
            .filter(|redelivery| is_past && now < redelivery.until)
        {
            redelivery.until = (now + REDELIVERY_QUIET).min(redelivery.at_most_until);
        }
    }

    /// Returns the time before which all frames have been received.
    fn complete_until(&self, now: Timestamp) -> Timestamp {
        let redelivery = self
            .redelivery
            .as_ref()
            .filter(|_| self.is_redelivering(now));
        redelivery.map_or(now, |redelivery| redelivery.from)
    }
}

/// When to save again after a save that took this long.
fn save_interval(took: Duration) -> Span {
    let took = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    let wait = Span::from_millis(took.saturating_mul(SAVE_SHARE));
    wait.clamp(SAVE_INTERVAL_MIN, SAVE_INTERVAL)
}

/// What is recorded for the windows of rules.
#[derive(Default)]
struct Recorded {
    /// Buckets with an endpoint.
    buckets: BTreeSet<Bucket>,
    /// Deployments whose rules read their instances.
    deployments: Vec<(EndpointKey, Name)>,
}

fn recorded(consumer: &Consumer<MeterFold>, buckets: impl Iterator<Item = Bucket>) -> Recorded {
    let mut recorded = Recorded::default();
    let entries = consumer.folds().lock();
    for bucket in buckets {
        for (endpoint, entry) in entries.of(bucket) {
            recorded.buckets.insert(bucket);
            let deployments = entry.state.rules.reading_instances();
            let of = deployments.map(|deployment| (endpoint.clone(), deployment.clone()));
            recorded.deployments.extend(of);
        }
    }
    recorded
}

fn before(at: Timestamp, span: Span) -> Timestamp {
    Timestamp::from_millis(at.millis() - span.millis() as i64)
}

fn bucket_save(
    bucket: Bucket,
    owned: &MeteredBucket,
    ready: &ReadyChanges,
    now: Timestamp,
) -> Option<(Bucket, BucketSave)> {
    match OpenUsage::encode(&owned.fence, owned.complete_until(now), &owned.usage) {
        Ok(doc) => {
            let bucket_save = BucketSave {
                generation: owned.fence.generation,
                doc,
                ready_through: ready.applied_through(bucket),
            };
            Some((bucket, bucket_save))
        }
        Err(error) => {
            tracing::error!(%bucket, %error, "failed to encode open minutes");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saves_are_as_frequent_as_they_are_quick() {
        let after = |millis| save_interval(Duration::from_millis(millis)).millis();
        assert_eq!([0, 40, 100, 5000].map(after), [2000, 2000, 5000, 10_000]);
    }
}
