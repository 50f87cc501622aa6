//! The loop of a service that reconciles: it folds the log into one state per endpoint and, when
//! something changed or time has passed, writes what its engine makes of that state to the stream
//! that it owns.
//!
//! Level-triggered: outputs follow from the whole state, which includes the service's own earlier
//! outputs, so a restart or a repeated record can neither lose an output nor write one twice.
//! Safety against a second owner comes from the store: every commit carries the bucket's fence and
//! the stream's expected version.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bus::Bus;
use contract::events::{ClockStepped, Event};
use contract::frame::Frame;
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use futures::future::join_all;
use store::{Append, Commit, CommitError, Committed, Fence, Store, StoreError};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::feed::{Feed, FeedItem};
use crate::health::Component;
use crate::ids::Ids;

/// If what was recorded lies this far ahead of our clock, the clock has stepped back, and it holds.
pub const CLOCK_STEP: Span = Span::from_secs(5);
/// Pause after the store could not take a commit.
const RETRY_AFTER: Span = Span::from_secs(1);

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

    /// Takes in a frame; true if the endpoints of its bucket are to be evaluated.
    fn observe(&mut self, _frame: &Frame, _now: Timestamp) -> bool {
        false
    }

    /// Called every [`TICK`](Self::TICK): the buckets whose endpoints are to be evaluated.
    fn due(&mut self, now: Timestamp) -> BTreeSet<Bucket>;

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

/// One endpoint, with what the loop itself needs to know of it.
#[derive(Default)]
struct Entry<S> {
    state: S,
    /// Version of the stream that we write.
    version: u64,
    /// Position of the last record taken in.
    position: Position,
    /// Greatest time recorded; our `now` never lies before it.
    recorded: Timestamp,
    /// Our own last commit; until it has come back, the state is behind and is not evaluated.
    awaiting: Position,
    /// After the store refused a commit for a reason of its own: not before this time.
    retry_at: Option<Timestamp>,
}

/// Runs until `shutdown`, or until the store fails for good.
pub async fn run<R: Reconciler>(
    reconciler: R,
    deps: Deps,
    component: Component,
    shutdown: CancellationToken,
) -> Result<(), StoreError> {
    let feed = Feed::open(
        deps.store.clone(),
        deps.bus.clone(),
        R::SERVICE,
        BTreeMap::new(),
    );
    let frames = deps.bus.subscribe_frames();
    let mut shell = Loop {
        reconciler,
        deps,
        component,
        entries: BTreeMap::new(),
        fences: BTreeMap::new(),
        due: BTreeSet::new(),
        caught_up: false,
    };
    shell.component.waiting("reads the log");
    shell.run(feed, frames, shutdown).await
}

struct Loop<R: Reconciler> {
    reconciler: R,
    deps: Deps,
    component: Component,
    entries: BTreeMap<EndpointKey, Entry<R::State>>,
    fences: BTreeMap<Bucket, Fence>,
    /// Endpoints to evaluate in this turn.
    due: BTreeSet<EndpointKey>,
    caught_up: bool,
}

impl<R: Reconciler> Loop<R> {
    async fn run(
        &mut self,
        mut feed: Feed,
        mut frames: tokio::sync::mpsc::Receiver<Arc<Frame>>,
        shutdown: CancellationToken,
    ) -> Result<(), StoreError> {
        let mut ticks = tokio::time::interval(R::TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                item = feed.next() => self.take_in(item?).await?,
                Some(frame) = frames.recv() => {
                    self.observe(&frame);
                    while let Ok(frame) = frames.try_recv() {
                        self.observe(&frame);
                    }
                }
                _ = ticks.tick() => {
                    let buckets = self.reconciler.due(self.deps.clock.now());
                    self.mark_due(&buckets);
                }
            }
            if self.caught_up {
                self.evaluate_due().await?;
            }
        }
    }

    async fn take_in(&mut self, item: FeedItem) -> Result<(), StoreError> {
        match item {
            FeedItem::Records(records) => records.iter().for_each(|record| self.apply(record)),
            FeedItem::Assigned(buckets) => self.take(buckets).await?,
            FeedItem::Revoked(buckets) => buckets.iter().for_each(|bucket| {
                self.fences.remove(bucket);
            }),
            FeedItem::CaughtUp => {
                self.caught_up = true;
                self.component.ready();
                self.due.extend(self.entries.keys().cloned());
            }
        }
        Ok(())
    }

    /// Raises the generation of each bucket, so that a former owner can write no more.
    async fn take(&mut self, buckets: Vec<Bucket>) -> Result<(), StoreError> {
        let names: Vec<String> = buckets
            .iter()
            .map(|bucket| format!("{}/{bucket}", R::SERVICE))
            .collect();
        let fences = join_all(names.iter().map(|name| self.deps.store.take(name))).await;
        for (bucket, fence) in buckets.into_iter().zip(fences) {
            self.fences.insert(bucket, fence?);
        }
        Ok(())
    }

    fn apply(&mut self, record: &Record) {
        let Some(key) = record.endpoint() else {
            return self.reconciler.apply_global(record);
        };
        let entry = self.entries.entry(key.clone()).or_default();
        self.reconciler.apply(&mut entry.state, record);
        entry.position = record.position;
        entry.recorded = entry.recorded.max(record.time);
        if record.stream == StreamName::of(R::STREAM, &key) {
            entry.version = record.version;
            if let Event::ClockStepped(stepped) = &record.event {
                entry.recorded = stepped.clock;
            }
        }
        self.due.insert(key);
    }

    fn observe(&mut self, frame: &Frame) {
        if self.reconciler.observe(frame, self.deps.clock.now()) {
            self.mark_due(&BTreeSet::from([frame.bucket]));
        }
    }

    fn mark_due(&mut self, buckets: &BTreeSet<Bucket>) {
        let keys = self
            .entries
            .keys()
            .filter(|key| buckets.contains(&key.bucket()));
        self.due.extend(keys.cloned());
    }

    async fn evaluate_due(&mut self) -> Result<(), StoreError> {
        let clock = self.deps.clock.now();
        let mut commits = Vec::new();
        for key in std::mem::take(&mut self.due) {
            let Some(entry) = self.entries.get_mut(&key) else {
                continue;
            };
            let Some(fence) = self.fences.get(&key.bucket()) else {
                continue;
            };
            if entry.awaiting > entry.position || entry.retry_at.is_some_and(|at| clock < at) {
                continue;
            }
            entry.retry_at = None;
            let (now, events) = if entry.recorded > clock + CLOCK_STEP {
                (
                    clock,
                    vec![Event::ClockStepped(ClockStepped {
                        recorded: entry.recorded,
                        clock,
                    })],
                )
            } else {
                let now = entry.recorded.max(clock);
                (now, self.reconciler.evaluate(&key, &mut entry.state, now))
            };
            if events.is_empty() {
                continue;
            }
            let append = Append {
                stream: StreamName::of(R::STREAM, &key),
                expected_version: entry.version,
                events: events
                    .into_iter()
                    .map(|event| self.deps.new_event::<R>(now, event))
                    .collect(),
            };
            let commit = Commit {
                appends: vec![append],
                fence: Some(fence.clone()),
                ..Commit::default()
            };
            let store = self.deps.store.clone();
            commits.push(async move { (key, now, store.commit(commit).await) });
        }
        for (key, now, outcome) in join_all(commits).await {
            self.settle(key, now, outcome).await?;
        }
        Ok(())
    }

    async fn settle(
        &mut self,
        key: EndpointKey,
        now: Timestamp,
        outcome: Result<Committed, CommitError>,
    ) -> Result<(), StoreError> {
        match outcome {
            Ok(Committed::Now { records }) => {
                let Some(entry) = self.entries.get_mut(&key) else {
                    return Ok(());
                };
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
                tracing::warn!(service = R::SERVICE, bucket = %key.bucket(), "bucket was taken over, taking it again");
                self.take(vec![key.bucket()]).await?;
            }
            Err(error) => {
                if let Some(entry) = self.entries.get_mut(&key) {
                    entry.retry_at = Some(now + RETRY_AFTER);
                }
                tracing::error!(service = R::SERVICE, endpoint = %key, %error, "could not write, trying again");
            }
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
