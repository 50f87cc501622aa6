//! The loop of a service that reconciles: it folds the log into one state per endpoint and, when
//! something changed or time has passed, writes what its engine makes of that state to the stream
//! that it owns.
//!
//! Level-triggered: outputs follow from the whole state, which includes the service's own earlier
//! outputs, so a restart or a repeated record can neither lose an output nor write one twice.
//!
//! Buckets come and go at any time. Only endpoints of buckets that are assigned, fenced and caught up
//! with are evaluated. Safety against a second owner comes from the store: every commit carries the
//! bucket's fence and the stream's expected version, so what a replaced owner still has in flight does
//! no harm. Who is fenced and still assigned takes the bucket again, and folds it anew before it
//! evaluates anything of it.
//!
//! The loop outlives outages of the store: it tries again, and goes on taking in frames.

mod entries;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, Subscription};
use contract::events::Event;
use contract::frame::Frame;
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt, try_join_all};
use futures::stream::FuturesUnordered;
use store::{Append, Commit, CommitError, Committed, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::entries::{Due, DueAgain, Entries, Entry, Evaluated, evaluate};
use crate::clock::Clock;
use crate::feed::{Feed, FeedItem};
use crate::health::{Component, READS_THE_LOG, UNASSIGNED};
use crate::ids::Ids;
use crate::parking::{self, Parking, Verdict, survive};
use crate::retry::until_answered;

/// If what was recorded lies this far ahead of our clock, the clock has stepped back, and it holds.
pub const CLOCK_STEP: Span = Span::from_secs(5);
/// Pause after the store could not take a commit.
const RETRY_AFTER: Span = Span::from_secs(1);
/// Who was fenced waits for so long before it takes the bucket again: most often it has only not yet
/// heard that the bucket is somebody else's.
const TAKE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// A service, as the loop sees it.
pub trait Reconciler: Send + 'static {
    /// What is folded from the events of one endpoint.
    type State: Default + Send;

    /// Names the consumer group, the fences and the actor: `actuator`.
    const SERVICE: &'static str;
    /// The stream that this service alone writes.
    const STREAM: StreamKind;
    const TICK: Duration;

    fn apply(&mut self, state: &mut Self::State, record: &Record);

    /// Takes in a record that belongs to no endpoint.
    fn apply_global(&mut self, _record: &Record) {}

    /// What is to be written now; empty if nothing.
    fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &mut Self::State,
        now: Timestamp,
    ) -> Vec<Event>;

    /// Whether frames of buckets of other owners are taken in, too: what they say about gateways is
    /// then known when a bucket is taken over.
    const HEARS_ALL_BUCKETS: bool = false;

    /// Takes in a frame; true if the endpoints of its bucket are to be evaluated.
    fn observe(&mut self, _frame: &Frame, _now: Timestamp) -> bool {
        false
    }

    /// Called every [`TICK`](Self::TICK): the buckets whose endpoints are to be evaluated.
    fn due(&mut self, now: Timestamp) -> BTreeSet<Bucket>;

    /// The bucket is somebody else's now: what is kept of it outside of the states is of no use.
    fn forget(&mut self, _bucket: Bucket) {}

    /// Called after each commit.
    fn committed(
        &mut self,
        _key: &EndpointKey,
        _state: &mut Self::State,
        _records: &[Arc<Record>],
        _now: Timestamp,
    ) {
    }
}

#[derive(Clone)]
pub struct Deps {
    pub store: Store,
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
}

/// A bucket that is ours.
struct Held {
    fence: Fence,
    caught_up: bool,
}

/// What became of a commit.
struct Written {
    key: EndpointKey,
    fence: Fence,
    now: Timestamp,
    outcome: Result<Committed, CommitError>,
}

/// Runs until `shutdown`, or until the store is closed.
pub async fn run<R: Reconciler>(
    reconciler: R,
    deps: Deps,
    component: Component,
    shutdown: CancellationToken,
) -> Result<(), StoreError> {
    let group = Subscription::Group(R::SERVICE);
    let feed = Feed::open(deps.store.clone(), deps.bus.clone(), group, BTreeMap::new());
    let frames = deps.bus.subscribe_frames();
    component.waiting(UNASSIGNED);
    let mut shell = Loop {
        reconciler,
        parking: Parking::open(R::SERVICE, deps.store.clone(), component.clone()),
        feed: feed.reporting(&component),
        frames,
        shutdown,
        deps,
        component,
        entries: Entries {
            buckets: BTreeMap::new(),
        },
        held: BTreeMap::new(),
        lost: BTreeMap::new(),
        due: BTreeMap::new(),
        writing: FuturesUnordered::new(),
        writes_fail: false,
    };
    shell.run().await
}

struct Loop<R: Reconciler> {
    reconciler: R,
    deps: Deps,
    component: Component,
    feed: Feed,
    frames: mpsc::Receiver<Arc<Frame>>,
    shutdown: CancellationToken,
    parking: Parking,
    /// Of buckets that are held only.
    entries: Entries<R::State>,
    held: BTreeMap<Bucket, Held>,
    /// Fenced and still assigned: when to take them again.
    lost: BTreeMap<Bucket, Instant>,
    /// What to evaluate in this turn.
    due: BTreeMap<Bucket, Due>,
    writing: FuturesUnordered<BoxFuture<'static, Written>>,
    writes_fail: bool,
}

impl<R: Reconciler> Loop<R> {
    async fn run(&mut self) -> Result<(), StoreError> {
        let mut ticks = tokio::time::interval(R::TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let shutdown = self.shutdown.clone();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                Some(written) = self.writing.next() => self.settle(written)?,
                item = self.feed.next() => self.take_in(item?).await?,
                Some(frame) = self.frames.recv() => {
                    self.observe(&frame);
                    while let Ok(frame) = self.frames.try_recv() {
                        self.observe(&frame);
                    }
                }
                _ = ticks.tick() => {
                    let buckets = self.reconciler.due(self.deps.clock.now());
                    self.mark_due(buckets);
                    self.take_again().await?;
                }
            }
            self.evaluate_due();
        }
    }

    async fn take_in(&mut self, item: FeedItem) -> Result<(), StoreError> {
        match item {
            FeedItem::Records(records) => {
                for record in records {
                    match self.parking.judge(&record) {
                        Verdict::Fold => self.apply(&record),
                        Verdict::PassOver => {}
                        Verdict::FoldAnew => self.fold_anew(&record).await?,
                    }
                }
            }
            FeedItem::Unreadable(unreadable) => {
                if let Some(key) = self.parking.unreadable(&unreadable, self.deps.clock.now()) {
                    self.entries.remove(&key);
                }
            }
            FeedItem::Assigned(buckets) => {
                self.component.waits_on(READS_THE_LOG);
                self.take(&buckets).await?;
            }
            FeedItem::Revoked(buckets) => self.let_go(&buckets),
            FeedItem::CaughtUp(buckets) => self.caught_up(&buckets),
        }
        Ok(())
    }

    /// Raises the generation of each bucket, so that a former owner can write no more.
    async fn take(&mut self, buckets: &[Bucket]) -> Result<(), StoreError> {
        let (store, component) = (self.deps.store.clone(), self.component.clone());
        let names: Vec<String> = buckets
            .iter()
            .map(|bucket| format!("{}/{bucket}", R::SERVICE))
            .collect();
        let taking = async move {
            let take = || try_join_all(names.iter().map(|name| store.take(name)));
            until_answered(&component, take).await
        };
        let Some(fences) = self.patiently(taking).await? else {
            return Ok(());
        };
        for (bucket, fence) in buckets.iter().zip(fences) {
            let held = Held {
                fence,
                caught_up: false,
            };
            self.held.insert(*bucket, held);
        }
        Ok(())
    }

    /// Waits for the store, and takes in frames meanwhile. None: the service shuts down.
    async fn patiently<T>(
        &mut self,
        asked: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<Option<T>, StoreError> {
        tokio::pin!(asked);
        let shutdown = self.shutdown.clone();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(None),
                answer = &mut asked => return answer.map(Some),
                Some(frame) = self.frames.recv() => self.observe(&frame),
            }
        }
    }

    fn let_go(&mut self, buckets: &[Bucket]) {
        for bucket in buckets {
            self.drop_folded(*bucket);
            self.lost.remove(bucket);
            self.reconciler.forget(*bucket);
        }
    }

    fn drop_folded(&mut self, bucket: Bucket) {
        self.held.remove(&bucket);
        self.entries.remove_all(bucket);
        self.parking.forget(bucket);
    }

    fn caught_up(&mut self, buckets: &[Bucket]) {
        for bucket in buckets {
            if let Some(held) = self.held.get_mut(bucket) {
                held.caught_up = true;
            }
        }
        self.parking.caught_up(buckets);
        self.mark_due(buckets.iter().copied());
        if self.held.values().all(|held| held.caught_up) {
            self.component.ready();
        }
    }

    /// What was fenced while it was still ours is taken once more, and read from the start.
    async fn take_again(&mut self) -> Result<(), StoreError> {
        if self.lost.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let due = self.lost.iter().filter(|(_, at)| **at <= now);
        let due: Vec<Bucket> = due.map(|(bucket, _)| *bucket).collect();
        if due.is_empty() {
            return Ok(());
        }
        self.take(&due).await?;
        self.lost.retain(|bucket, _| !due.contains(bucket));
        self.feed.read_again(&due);
        Ok(())
    }

    fn apply(&mut self, record: &Record) {
        let Some(key) = record.endpoint() else {
            return self.apply_global(record);
        };
        if !self.held.contains_key(&record.bucket) {
            return;
        }
        let entry = self.entries.get_or_new(&key);
        let reconciler = &mut self.reconciler;
        if let Err(detail) = survive(|| reconciler.apply(&mut entry.state, record)) {
            return self.park(&key, record.position, record.event.type_name(), &detail);
        }
        entry.position = record.position;
        entry.recorded = entry.recorded.max(record.time);
        if record.stream == StreamName::of(R::STREAM, &key) {
            entry.version = record.version;
            if let Event::ClockStepped(stepped) = &record.event {
                entry.recorded = stepped.clock;
            }
        }
        self.mark_one_due(key);
    }

    /// What belongs to no endpoint parks none.
    fn apply_global(&mut self, record: &Record) {
        let reconciler = &mut self.reconciler;
        if let Err(detail) = survive(|| reconciler.apply_global(record)) {
            let (position, event_type) = (record.position, record.event.type_name());
            tracing::error!(service = R::SERVICE, %position, event_type, detail, "an event that belongs to no endpoint cannot be folded, and is passed over");
        }
    }

    fn park(&mut self, key: &EndpointKey, position: Position, event_type: &str, detail: &str) {
        self.entries.remove(key);
        let now = self.deps.clock.now();
        self.parking.park(key, position, event_type, detail, now);
    }

    /// A person wants the endpoint back: its history is read from the store, and folded.
    async fn fold_anew(&mut self, unparked: &Record) -> Result<(), StoreError> {
        let Some(key) = unparked.endpoint() else {
            return Ok(());
        };
        let (store, component) = (self.deps.store.clone(), self.component.clone());
        let (of, to) = (key.clone(), unparked.position);
        let reading = async move {
            let read = || parking::history(store.clone(), of.clone(), to);
            until_answered(&component, read).await
        };
        let Some(history) = self.patiently(reading).await? else {
            return Ok(());
        };
        self.entries.remove(&key);
        self.parking.release(&key);
        for past in history {
            if self.parking.passes_over(past.position()) {
                continue;
            }
            match past {
                store::Entry::Record(record) => self.apply(&record),
                store::Entry::Unreadable(unreadable) => {
                    self.parking.unreadable(&unreadable, self.deps.clock.now());
                }
            }
            if self.parking.is_parked(&key) {
                self.entries.remove(&key);
                break;
            }
        }
        Ok(())
    }

    fn observe(&mut self, frame: &Frame) {
        if !R::HEARS_ALL_BUCKETS && !self.held.contains_key(&frame.bucket) {
            return;
        }
        if self.reconciler.observe(frame, self.deps.clock.now()) {
            self.mark_due([frame.bucket]);
        }
    }

    fn mark_due(&mut self, buckets: impl IntoIterator<Item = Bucket>) {
        let all = |bucket| (bucket, Due::All);
        self.due.extend(buckets.into_iter().map(all));
    }

    fn mark_one_due(&mut self, key: EndpointKey) {
        if let Due::Some(keys) = self.due.entry(key.bucket()).or_default() {
            keys.insert(key);
        }
    }

    fn evaluate_due(&mut self) {
        if self.due.is_empty() {
            return;
        }
        let clock = self.deps.clock.now();
        let mut found = Vec::new();
        for (bucket, due) in std::mem::take(&mut self.due) {
            let held = self.held.get(&bucket);
            let Some(held) = held.filter(|held| held.caught_up) else {
                // It becomes due when its bucket is caught up with.
                continue;
            };
            let Some(entries) = self.entries.buckets.get_mut(&bucket) else {
                continue;
            };
            let mut look = |key: &EndpointKey, entry: &mut Entry<R::State>| {
                let evaluated = evaluate(&mut self.reconciler, &self.deps, key, entry, clock);
                if let Some(evaluated) = evaluated {
                    found.push((key.clone(), held.fence.clone(), evaluated));
                }
            };
            match due {
                Due::All => entries.iter_mut().for_each(|(key, entry)| look(key, entry)),
                Due::Some(keys) => keys.iter().for_each(|key| {
                    if let Some(entry) = entries.get_mut(key) {
                        look(key, entry);
                    }
                }),
            }
        }
        for (key, fence, evaluated) in found {
            match evaluated {
                Evaluated::ToWrite { now, append } => self.write(key, fence, now, append),
                Evaluated::Panicked { position, detail } => {
                    self.park(&key, position, "evaluation", &detail);
                }
            }
        }
    }

    /// Begins a commit; the loop goes on meanwhile.
    fn write(&mut self, key: EndpointKey, fence: Fence, now: Timestamp, append: Append) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        entry.writing = Some(DueAgain::No);
        let commit = Commit {
            appends: vec![append],
            fence: Some(fence.clone()),
            ..Commit::default()
        };
        let store = self.deps.store.clone();
        let writing = async move {
            let outcome = store.commit(commit).await;
            Written {
                key,
                fence,
                now,
                outcome,
            }
        };
        self.writing.push(writing.boxed());
    }

    fn settle(&mut self, written: Written) -> Result<(), StoreError> {
        let Written {
            key,
            fence,
            now,
            outcome,
        } = written;
        let bucket = key.bucket();
        let held = self.held.get(&bucket);
        if held.is_none_or(|held| held.fence != fence) {
            // Of an ownership that is over.
            return Ok(());
        }
        let Some(entry) = self.entries.get_mut(&key) else {
            return Ok(());
        };
        let due_again = entry.writing.take() == Some(DueAgain::Yes);
        match outcome {
            Ok(Committed::Now { records }) => {
                self.writes_fail = false;
                entry.awaiting = records
                    .last()
                    .map_or(entry.awaiting, |record| record.position);
                self.reconciler
                    .committed(&key, &mut entry.state, &records, now);
            }
            Ok(Committed::Before { .. }) => {}
            // What we had not seen yet comes through the feed and makes the endpoint due again.
            Err(CommitError::Conflict { .. }) => {
                tracing::debug!(service = R::SERVICE, endpoint = %key, "stream moved on, evaluating again");
            }
            Err(CommitError::Fenced { .. }) => {
                tracing::warn!(service = R::SERVICE, %bucket, "bucket was taken over");
                self.drop_folded(bucket);
                self.lost.insert(bucket, Instant::now() + TAKE_AGAIN_AFTER);
            }
            Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
            Err(error) => {
                entry.retry_at = Some(now + RETRY_AFTER);
                // Once for an outage, not once for each endpoint.
                if !std::mem::replace(&mut self.writes_fail, true) {
                    tracing::error!(service = R::SERVICE, endpoint = %key, %error, "could not write, trying again");
                }
            }
        }
        if due_again {
            self.mark_one_due(key);
        }
        Ok(())
    }
}

impl Deps {
    fn new_event<R: Reconciler>(&self, now: Timestamp, event: Event) -> NewEvent {
        NewEvent {
            id: self.ids.event_id(now),
            time: now,
            actor: Actor::service(R::SERVICE),
            event,
        }
    }
}
