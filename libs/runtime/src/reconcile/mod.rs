//! The loop of a service that reconciles: it folds the log into one state per endpoint
//! (`runtime::consumer`) and, when something changed or time has passed, writes what its engine makes of
//! that state to the streams that it owns.
//!
//! Level-triggered: outputs follow from the whole state, which includes the service's own earlier
//! outputs, so a restart or a repeated record can neither lose an output nor write one twice.
//!
//! Safety against a second owner comes from the store: every commit carries the bucket's fence and the
//! streams' expected versions, so what a replaced owner still has in flight does no harm. Who is fenced and
//! still assigned takes the bucket again, and catches up with it before anything of it is evaluated.
//!
//! The loop outlives outages of the store: it tries again, and goes on handling frames.

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

pub use self::evaluate::{CommitResult, Evaluator, Failed, Subject, Write};
use crate::clock::Clock;
use crate::consumer::{Consumer, ConsumerConfig, ConsumerDeps, Fold, Step};
use crate::health::Component;
use crate::ids::Ids;

/// If what was recorded lies this far ahead of our clock, the clock has stepped back, and it holds.
pub const CLOCK_STEP: Span = Span::from_secs(5);
/// Pause after the store could not take a commit.
const RETRY_AFTER: Span = Span::from_secs(1);
/// Whose owner owns what belongs to no endpoint.
const OWNS_GLOBAL: Bucket = Bucket(0);

/// A service, as the loop sees it.
pub trait Reconciler: Send + 'static {
    /// How the events of an endpoint are folded.
    type Fold: Fold;

    /// Names the consumer group, the fences and the actor: `actuator`.
    const SERVICE: &'static str;
    /// The stream that this service alone writes for each endpoint; steps of the clock stand in it.
    const STREAM: StreamKind;
    /// Between two questions what is [due](Self::due).
    const TICK: Duration;

    /// What is folded of the log; asked for once, at the start.
    fn fold(&self) -> Self::Fold;

    /// A record has been applied to the state of its endpoint.
    fn applied(
        &mut self,
        _key: &EndpointKey,
        _record: &Record,
        _effect: <Self::Fold as Fold>::Effect,
    ) {
    }

    /// Applies a record that belongs to no endpoint.
    fn apply_global(&mut self, _record: &Record) {}

    /// What is to be written now about an endpoint; nothing most of the time.
    fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &<Self::Fold as Fold>::State,
        now: Timestamp,
    ) -> Outputs;

    /// What is to be written now that belongs to no endpoint. Asked of the owner of bucket 0 only.
    fn evaluate_global(&mut self, _now: Timestamp) -> Outputs {
        Outputs::default()
    }

    /// Whether frames of buckets of other owners are handled, too: what they say about gateways is
    /// then known when a bucket is taken over.
    const HEARS_ALL_BUCKETS: bool = false;

    /// Handles a frame; true if the endpoints of its bucket are to be evaluated.
    fn observe(&mut self, _frame: &Frame, _now: Timestamp) -> bool {
        false
    }

    /// Called every [`TICK`](Self::TICK): the buckets whose endpoints are to be evaluated.
    fn due(&mut self, now: Timestamp) -> BTreeSet<Bucket>;

    /// The bucket is somebody else's now: what is kept of it beside the states is of no use.
    fn forget(&mut self, _bucket: Bucket) {}

    /// The same for one endpoint, which is parked, or whose state was folded once more.
    fn forget_endpoint(&mut self, _key: &EndpointKey) {}

    /// Called after each commit about an endpoint.
    fn committed(&mut self, _key: &EndpointKey, _records: &[Arc<Record>], _now: Timestamp) {}
}

/// What a service writes in one commit.
#[derive(Debug, Default)]
pub struct Outputs {
    /// Each to its stream, in order; the streams must be ones that [`Fold::writes`] names.
    pub events: Vec<(StreamName, Event)>,
    /// Rows of tables, which change with the events or not at all.
    pub rows: Vec<RowChange>,
}

impl Outputs {
    /// Events of one stream.
    pub fn to(stream: StreamName, events: Vec<Event>) -> Self {
        let with_stream = |event| (stream.clone(), event);
        Self {
            events: events.into_iter().map(with_stream).collect(),
            rows: Vec::new(),
        }
    }
}

/// What a loop works with.
#[derive(Clone)]
pub struct Deps {
    /// Where events are written, and holes of the bus filled from.
    pub store: Store,
    /// Where records and frames come from.
    pub bus: Arc<dyn Bus>,
    /// When things are due, and what time events carry.
    pub clock: Arc<dyn Clock>,
    /// Ids of events.
    pub ids: Arc<dyn Ids>,
}

/// What became of a commit.
struct Written {
    subject: Subject,
    fence: Fence,
    now: Timestamp,
    outcome: Result<Committed, CommitError>,
}

/// Runs until `shutdown`, or until the store is closed.
///
/// # Errors
///
/// [`StoreError::Closed`] where this process has closed the store; outages are waited for.
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
    let mut shell = Loop {
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
        writes_fail: false,
    };
    shell.run(shutdown).await
}

struct Loop<R: Reconciler> {
    consumer: Consumer<R::Fold>,
    evaluator: Evaluator<R>,
    /// Of what belongs to no endpoint, while it is ours.
    global_fence: Option<Fence>,
    frames: mpsc::Receiver<Arc<Frame>>,
    deps: Deps,
    writing: FuturesUnordered<BoxFuture<'static, Written>>,
    writes_fail: bool,
}

impl<R: Reconciler> Loop<R> {
    async fn run(&mut self, shutdown: CancellationToken) -> Result<(), StoreError> {
        let mut ticks = tokio::time::interval(R::TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(written) = self.writing.next() => self.settle(written)?,
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
            Step::Applied(applied) => self.evaluator.applied(self.consumer.core(), applied),
            Step::Unreadable { .. } | Step::Passed(_) => {}
            Step::Parked(key) => self.evaluator.forget_endpoint(&key),
            Step::Rebuilt { key, .. } => {
                self.evaluator.forget_endpoint(&key);
                self.evaluator.mark_one_due(key);
            }
            Step::Taken(buckets) => {
                for bucket in &buckets {
                    self.evaluator.forget_pending(*bucket);
                }
                if buckets.contains(&OWNS_GLOBAL) {
                    self.take_global().await?;
                }
            }
            Step::CaughtUp(buckets) => self.evaluator.mark_due(buckets),
            Step::Released(buckets) => {
                for bucket in &buckets {
                    self.evaluator.forget(*bucket);
                }
                if buckets.contains(&OWNS_GLOBAL) {
                    self.global_fence = None;
                }
            }
        }
        Ok(())
    }

    /// What cannot be taken now is taken with bucket 0 the next time that somebody is fenced.
    async fn take_global(&mut self) -> Result<(), StoreError> {
        let name = format!("{}/{}", R::SERVICE, Bucket::GLOBAL);
        self.evaluator.forget_pending(Bucket::GLOBAL);
        match self.deps.store.take(&name).await {
            Ok(fence) => self.global_fence = Some(fence),
            Err(StoreError::Closed) => return Err(StoreError::Closed),
            Err(error) => {
                self.global_fence = None;
                tracing::warn!(service = R::SERVICE, %error, "what belongs to no endpoint cannot be taken");
                self.consumer.fenced(OWNS_GLOBAL);
            }
        }
        Ok(())
    }

    fn observe(&mut self, frame: &Frame) {
        if !R::HEARS_ALL_BUCKETS && !self.consumer.has(frame.bucket) {
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
        for Failed { key, detail } in failed {
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
        if !self.consumer.is_caught_up(OWNS_GLOBAL) {
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

    /// Begins a commit; the loop goes on meanwhile.
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
            Written {
                subject,
                fence,
                now,
                outcome,
            }
        };
        self.writing.push(writing.boxed());
    }

    fn settle(&mut self, written: Written) -> Result<(), StoreError> {
        let Written {
            subject,
            fence,
            now,
            outcome,
        } = written;
        let ours = match &subject {
            Subject::Global => self.global_fence.as_ref(),
            Subject::Endpoint(key) => self.consumer.fence(key.bucket()),
        };
        if ours != Some(&fence) {
            // Of an ownership that is over.
            return Ok(());
        }
        let settled = match outcome {
            Ok(Committed::Now { records }) => {
                self.writes_fail = false;
                if let Subject::Endpoint(key) = &subject {
                    self.evaluator.reconciler.committed(key, &records, now);
                }
                let last = records.last().map(|record| record.position);
                CommitResult::Written(last.unwrap_or_default())
            }
            Ok(Committed::Before { .. }) => CommitResult::Refused,
            // What we had not seen yet comes through the feed and makes the endpoint due again.
            Err(CommitError::Conflict { .. }) => {
                tracing::debug!(
                    service = R::SERVICE,
                    ?subject,
                    "stream moved on, evaluating again"
                );
                CommitResult::Refused
            }
            Err(CommitError::Fenced { .. }) => {
                match subject {
                    // It goes with bucket 0, whose owner hears of it there.
                    Subject::Global => self.global_fence = None,
                    Subject::Endpoint(_) => {
                        self.evaluator.forget_pending(subject.bucket());
                        self.consumer.fenced(subject.bucket());
                    }
                }
                return Ok(());
            }
            Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
            Err(error) => {
                // Once for an outage, not once for each endpoint.
                if !std::mem::replace(&mut self.writes_fail, true) {
                    tracing::error!(service = R::SERVICE, ?subject, %error, "could not write, trying again");
                }
                CommitResult::Failed
            }
        };
        self.evaluator.settle(subject, now, settled);
        Ok(())
    }
}
