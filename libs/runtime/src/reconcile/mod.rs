//! The loop of a service that reconciles: it folds the log into one state per endpoint
//! (`runtime::consumer`) and, when something changed or time has passed, writes the outputs of its
//! engine for that state to the streams that it owns.
//!
//! Level-triggered: outputs follow from the full state, which includes the service's own earlier
//! outputs, so a restart or a repeated record can neither lose an output nor write one twice.
//!
//! The store protects against a second owner: every commit carries the bucket's fence and the
//! streams' expected versions, so in-flight commits of a replaced owner do no harm. A service that
//! is fenced but still assigned reacquires the bucket, and catches up before it evaluates anything
//! of it.
//!
//! The loop outlives store outages: it retries, and keeps handling frames.

mod evaluate;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bus::Bus;
use contract::events::Event;
use contract::frame::Frame;
use contract::ids::{Bucket, EndpointKey};
use contract::log::{Record, RowChange, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::FuturesUnordered;
use store::{Commit, CommitError, Committed, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

pub use self::evaluate::{CommitResult, Evaluator, FailedEvaluation, Subject, Write};
use crate::clock::Clock;
use crate::consumer::{Consumer, ConsumerConfig, ConsumerDeps, Fold, Step};
use crate::health::Component;
use crate::ids::Ids;

/// If recorded times are this far ahead of our clock, the clock has been stepped back, and is
/// trusted.
pub const CLOCK_STEP: Span = Span::from_secs(5);
/// The pause after a commit that the store could not take.
const RETRY_AFTER: Span = Span::from_secs(1);

/// The service-specific part of the loop.
pub trait Reconciler: Send + 'static {
    /// How the events of an endpoint are folded.
    type Fold: Fold;
    /// What is folded of the events that belong to no endpoint; `()` for nothing.
    type Global: Clone + Default + Send + 'static;

    /// The name of the consumer group, the fences and the actor: `actuator`.
    const SERVICE: &'static str;
    /// The stream that only this service writes for each endpoint; clock steps are recorded in it.
    const STREAM: StreamKind;
    /// How often to ask what is [due](Self::due).
    const TICK: Duration;

    /// Returns the fold; called once, at the start.
    fn fold(&self) -> Self::Fold;

    /// Called after a record has been applied to the state of its endpoint.
    fn applied(
        &mut self,
        _key: &EndpointKey,
        _record: &Record,
        _effect: <Self::Fold as Fold>::Effect,
    ) {
    }

    /// Called once for each endpoint of an acquired bucket that has been caught up with, before anything of
    /// the bucket is evaluated: what its frames are read by is then known.
    fn prepare(
        &mut self,
        _key: &EndpointKey,
        _state: &<Self::Fold as Fold>::State,
        _now: Timestamp,
    ) {
    }

    /// Called once all endpoints of the bucket are prepared.
    fn prepared(&mut self, _bucket: Bucket, _now: Timestamp) {}

    /// Applies a record that belongs to no endpoint. If it panics, the event is reported and skipped, and
    /// changes nothing.
    fn apply_global(_global: &mut Self::Global, _record: &Record) {}

    /// Returns what to write now about an endpoint; usually nothing.
    fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &<Self::Fold as Fold>::State,
        global: &Self::Global,
        now: Timestamp,
    ) -> Outputs;

    /// Returns what to write now that belongs to no endpoint. Called only on the owner of bucket 0.
    fn evaluate_global(&mut self, _global: &Self::Global, _now: Timestamp) -> Outputs {
        Outputs::default()
    }

    /// Whether frames of other owners' buckets are handled, too: what they say about gateways is
    /// then known when a bucket is taken over.
    const OBSERVES_ALL_BUCKETS: bool = false;

    /// How far back frames of an acquired bucket are asked for again, as far as the bus has kept them. Zero:
    /// not at all.
    const FRAMES_AGAIN: Span = Span::ZERO;

    /// Handles a frame; returns true if the endpoints of its bucket are to be evaluated. Those of an
    /// acquired bucket may come before it is [prepared](Self::prepared).
    fn observe(&mut self, _frame: &Frame, _now: Timestamp) -> bool {
        false
    }

    /// Returns the buckets whose endpoints are to be evaluated. Called every [`TICK`](Self::TICK).
    fn due(&mut self, now: Timestamp) -> BTreeSet<Bucket>;

    /// Drops what is kept of a bucket besides the states, once it belongs to another owner.
    fn forget(&mut self, _bucket: Bucket) {}

    /// Drops what is kept of an endpoint besides its state, once it is parked or its state was
    /// folded again.
    fn forget_endpoint(&mut self, _key: &EndpointKey) {}

    /// Called after each commit about an endpoint.
    fn committed(&mut self, _key: &EndpointKey, _records: &[Arc<Record>], _now: Timestamp) {}
}

/// What a service writes in one commit.
#[derive(Debug, Default)]
pub struct Outputs {
    /// Events with their streams, in order; [`Fold::writes`] must be true of the streams.
    pub events: Vec<(StreamName, Event)>,
    /// Rows of tables, written atomically with the events.
    pub rows: Vec<RowChange>,
}

impl Outputs {
    /// Creates outputs of events for one stream.
    pub fn to(stream: StreamName, events: Vec<Event>) -> Self {
        let with_stream = |event| (stream.clone(), event);
        Self {
            events: events.into_iter().map(with_stream).collect(),
            rows: Vec::new(),
        }
    }
}

/// Dependencies of the loop.
#[derive(Clone)]
pub struct Deps {
    /// The store: events are written to it, and gaps of the bus filled from it.
    pub store: Store,
    /// The source of records and frames.
    pub bus: Arc<dyn Bus>,
    /// Determines when things are due, and the time of events.
    pub clock: Arc<dyn Clock>,
    /// Creates ids of events.
    pub ids: Arc<dyn Ids>,
}

/// A finished commit.
struct FinishedCommit {
    subject: Subject,
    fence: Fence,
    now: Timestamp,
    outcome: Result<Committed, CommitError>,
}

/// Runs until `shutdown`, or until the store is closed.
///
/// # Errors
///
/// [`StoreError::Closed`] if this process has closed the store; outages are waited out.
pub async fn run<R: Reconciler>(
    reconciler: R,
    deps: Deps,
    component: Component,
    shutdown: CancellationToken,
) -> Result<(), StoreError> {
    let consumer_deps = ConsumerDeps {
        store: deps.store.clone(),
        bus: deps.bus.clone(),
        clock: deps.clock.clone(),
    };
    let frames = deps.bus.subscribe_frames();
    let mut service_loop = Loop {
        consumer: Consumer::open(
            ConsumerConfig::shared(R::SERVICE),
            reconciler.fold(),
            consumer_deps,
            component,
        ),
        evaluator: Evaluator::new(reconciler),
        global_fence: None,
        frames,
        deps,
        writing: FuturesUnordered::new(),
        is_store_failing: false,
    };
    service_loop.run(shutdown).await
}

struct Loop<R: Reconciler> {
    consumer: Consumer<R::Fold>,
    evaluator: Evaluator<R>,
    /// The fence for what belongs to no endpoint, while it is ours.
    global_fence: Option<Fence>,
    frames: mpsc::Receiver<Arc<Frame>>,
    deps: Deps,
    writing: FuturesUnordered<BoxFuture<'static, FinishedCommit>>,
    is_store_failing: bool,
}

impl<R: Reconciler> Loop<R> {
    async fn run(&mut self, shutdown: CancellationToken) -> Result<(), StoreError> {
        let mut ticks = tokio::time::interval(R::TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(commit) = self.writing.next() => self.finish_commit(commit)?,
                step = self.consumer.next() => self.handle(step?).await?,
                Some(frame) = self.frames.recv() => {
                    self.observe(&frame);
                    while let Ok(frame) = self.frames.try_recv() {
                        self.observe(&frame);
                    }
                }
                _ = ticks.tick() => {
                    let buckets = self.evaluator.reconciler.due(self.deps.clock.now());
                    self.evaluator.mark_due(buckets);
                    self.evaluate_global();
                }
            }
            self.evaluate_due();
        }
        self.consumer.save_all().await;
        Ok(())
    }

    async fn handle(&mut self, step: Step<<R::Fold as Fold>::Effect>) -> Result<(), StoreError> {
        match step {
            Step::Applied(applied) => {
                for event in self.evaluator.applied(self.consumer.core(), applied) {
                    self.consumer.report(event);
                }
            }
            Step::Unreadable { .. }
            | Step::Advanced(_)
            | Step::RowsAcquired(_)
            | Step::RowsReleased(_) => {}
            Step::Parked(key) => self.evaluator.forget_endpoint(&key),
            Step::Rebuilt { key, .. } => {
                self.evaluator.forget_endpoint(&key);
                self.evaluator.mark_one_due(key);
            }
            Step::Acquired(buckets) => {
                for bucket in &buckets {
                    self.evaluator.forget_pending(*bucket);
                }
                if R::FRAMES_AGAIN > Span::ZERO {
                    self.resubscribe();
                }
                if buckets.contains(&Bucket::GLOBAL_OWNER) {
                    self.acquire_global().await?;
                }
            }
            Step::CaughtUp(buckets) => self.evaluator.mark_due(buckets),
            Step::Released(buckets) => {
                for bucket in &buckets {
                    self.evaluator.forget(*bucket);
                }
                if buckets.contains(&Bucket::GLOBAL_OWNER) {
                    self.global_fence = None;
                }
            }
        }
        Ok(())
    }

    /// Asks for the frames again that came before the buckets were ours. Those of other buckets are repeats.
    fn resubscribe(&mut self) {
        let now = self.deps.clock.now().millis();
        let since = Timestamp::from_millis(now - R::FRAMES_AGAIN.millis() as i64);
        // What is left in the old subscription comes again, in order: used now, it would make what precedes
        // it late.
        if let Some(frames) = self.deps.bus.subscribe_frames_since(since) {
            self.frames = frames;
        }
    }

    /// If this fails, it is retried when bucket 0 is reacquired.
    async fn acquire_global(&mut self) -> Result<(), StoreError> {
        let name = format!("{}/{}", R::SERVICE, Bucket::GLOBAL);
        self.evaluator.forget_pending(Bucket::GLOBAL);
        match self.deps.store.acquire_fence(&name).await {
            Ok(fence) => self.global_fence = Some(fence),
            Err(StoreError::Closed) => return Err(StoreError::Closed),
            Err(error) => {
                self.global_fence = None;
                tracing::warn!(service = R::SERVICE, %error, "failed to acquire the fence of the global bucket");
                self.consumer.fenced(Bucket::GLOBAL_OWNER);
            }
        }
        Ok(())
    }

    fn observe(&mut self, frame: &Frame) {
        if !R::OBSERVES_ALL_BUCKETS && !self.consumer.has(frame.bucket) {
            return;
        }
        let now = self.deps.clock.now();
        if self.evaluator.reconciler.observe(frame, now) {
            self.evaluator.mark_due([frame.bucket]);
        }
    }

    fn evaluate_due(&mut self) {
        let clock = self.deps.clock.now();
        let ids = self.deps.ids.as_ref();
        let core = self.consumer.core();
        let (writes, failed) = self.evaluator.evaluate_due(core, ids, clock);
        for FailedEvaluation { key, detail } in failed {
            self.evaluator.forget_endpoint(&key);
            self.consumer.park(&key, &detail);
        }
        for write in writes {
            let fence = self.consumer.fence(write.subject.bucket()).cloned();
            if let Some(fence) = fence {
                self.write(write, fence);
            }
        }
    }

    fn evaluate_global(&mut self) {
        let Some(fence) = self.global_fence.clone() else {
            return;
        };
        if !self.consumer.is_caught_up(Bucket::GLOBAL_OWNER) {
            return;
        }
        let clock = self.deps.clock.now();
        let write = self
            .evaluator
            .evaluate_global(self.deps.ids.as_ref(), clock);
        if let Some(write) = write {
            self.write(write, fence);
        }
    }

    /// Starts a commit; the loop continues meanwhile.
    fn write(&mut self, write: Write, fence: Fence) {
        let Write {
            subject,
            now,
            appends,
            rows,
        } = write;
        let commit = Commit {
            appends,
            rows,
            fence: Some(fence.clone()),
            ..Commit::default()
        };
        let store = self.deps.store.clone();
        let writing = async move {
            let outcome = store.commit(commit).await;
            FinishedCommit {
                subject,
                fence,
                now,
                outcome,
            }
        };
        self.writing.push(writing.boxed());
    }

    fn finish_commit(&mut self, commit: FinishedCommit) -> Result<(), StoreError> {
        let FinishedCommit {
            subject,
            fence,
            now,
            outcome,
        } = commit;
        let ours = match &subject {
            Subject::Global => self.global_fence.as_ref(),
            Subject::Endpoint(key) => self.consumer.fence(key.bucket()),
        };
        if ours != Some(&fence) {
            // From an earlier ownership.
            return Ok(());
        }
        let result = match outcome {
            Ok(Committed::Written { records }) => {
                self.is_store_failing = false;
                if let Subject::Endpoint(key) = &subject {
                    self.evaluator.reconciler.committed(key, &records, now);
                }
                let last = records.last().map(|record| record.position);
                CommitResult::Written(last.unwrap_or_default())
            }
            Ok(Committed::Duplicate { .. }) => CommitResult::Refused,
            // Events that we had not seen yet arrive through the feed and make the endpoint due
            // again.
            Err(CommitError::Conflict { .. }) => {
                tracing::debug!(
                    service = R::SERVICE,
                    ?subject,
                    "stream has advanced, evaluating again"
                );
                CommitResult::Refused
            }
            Err(CommitError::Fenced { .. }) => {
                self.evaluator.forget_pending(subject.bucket());
                match subject {
                    // Owned, and reacquired, together with the bucket of its owner.
                    Subject::Global => {
                        self.global_fence = None;
                        self.consumer.fenced(Bucket::GLOBAL_OWNER);
                    }
                    Subject::Endpoint(_) => self.consumer.fenced(subject.bucket()),
                }
                return Ok(());
            }
            Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
            Err(error) => {
                // Log once per outage, not once per endpoint.
                if !std::mem::replace(&mut self.is_store_failing, true) {
                    tracing::error!(service = R::SERVICE, ?subject, %error, "failed to commit, retrying");
                }
                CommitResult::Failed
            }
        };
        self.evaluator.settle(subject, now, result);
        Ok(())
    }
}
