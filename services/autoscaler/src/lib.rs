//! The autoscaler: decides how many instances each deployment should have.
//!
//! Inputs: the log (documents, pins, instance events), frames of measurements, and for windows that begin
//! before this process did, what others have recorded of them. Output: decisions in
//! the streams `scaling/…`, one whenever something changes, each with all of its inputs. Invariants: only
//! the engine (`domain::autoscale`) decides; the effects of an uncommitted decision are not carried over;
//! at most one decision per second for each deployment.

mod metrics;
mod refill;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use contract::events::Event;
use contract::frame::{Frame, SourceKind};
use contract::ids::{Bucket, EndpointKey};
use contract::log::{Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use domain::measure::Measures;
use domain::zones::ZoneData;
use runtime::clock::Clock;
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use runtime::reconcile::{Deps, Outputs, Reconciler};
use store::StoreError;
use tokio_util::sync::CancellationToken;

use crate::metrics::DecisionMetrics;
pub use crate::refill::{PastError, PastRequest, PastSource};
use crate::refill::{Refill, Refills};
pub use crate::state::{AutoscalerFold, EndpointState};
use crate::state::{Evaluations, Settings, Shared};

/// Schedules, cooldowns and missing data need evaluations even if no second closes.
const EVALUATE_EVERY: Span = Span::from_secs(1);

/// Most frames of a bucket that wait until it has been caught up with; beyond that, the oldest are dropped.
const EARLY_FRAMES_MAX: usize = 1024;

/// Connects the engine to the log.
#[derive(Default)]
pub struct Autoscaler {
    measures: BTreeMap<Bucket, Measures>,
    /// Frames of buckets that have not been caught up with, and when they arrived: policies say how they
    /// are measured.
    early: BTreeMap<Bucket, VecDeque<(Timestamp, Frame)>>,
    evaluations: BTreeMap<EndpointKey, Evaluations>,
    /// Buckets of which a second has just closed, and when the gateway closed it.
    closed_seconds: BTreeMap<Bucket, Timestamp>,
    /// Endpoints with decisions being committed, and when the second that caused them was closed.
    pending_decisions: BTreeMap<EndpointKey, Timestamp>,
    evaluated_all_at: Timestamp,
    settings: Settings,
    /// Has earlier measurements; without it, windows begin with this process.
    refills: Option<Refills>,
    observer: Option<DecisionObserver>,
}

struct DecisionObserver {
    clock: Arc<dyn Clock>,
    metrics: DecisionMetrics,
}

/// Runs the autoscaler until `shutdown`.
pub async fn run(
    deps: Deps,
    zones: ZoneData,
    past: Option<Arc<dyn PastSource>>,
    metrics: &Metrics,
    health: &HealthRegistry,
    shutdown: CancellationToken,
) -> Result<(), StoreError> {
    let observer = DecisionObserver {
        clock: deps.clock.clone(),
        metrics: DecisionMetrics::new(metrics),
    };
    let autoscaler = Autoscaler {
        settings: Settings { zones },
        refills: past.map(Refills::start),
        observer: Some(observer),
        ..Autoscaler::default()
    };
    runtime::reconcile::run(autoscaler, deps, health.component("autoscaler"), shutdown).await
}

impl Autoscaler {
    /// When the measurements of a bucket begin: with the first frame that waits for them.
    fn measured_from(&self, bucket: Bucket, now: Timestamp) -> Timestamp {
        let first = self.early.get(&bucket).and_then(VecDeque::front);
        first.map_or(now, |(arrived, _)| *arrived)
    }

    /// Uses what has been read, and returns the buckets whose windows have changed.
    fn refill(&mut self, now: Timestamp) -> BTreeSet<Bucket> {
        let mut changed = BTreeSet::new();
        let Some(refills) = &mut self.refills else {
            return changed;
        };
        while let Some(Refill { request, past }) = refills.next() {
            let bucket = request.endpoint.bucket();
            let evaluations = self.evaluations.get_mut(&request.endpoint);
            // Of an earlier ownership, or deleted meanwhile.
            let is_read = past.is_some();
            if !evaluations
                .is_some_and(|evaluations| evaluations.refilled(request.uid, is_read, now))
            {
                continue;
            }
            if let (Some(measures), Some(past)) = (self.measures.get_mut(&bucket), past) {
                measures.refill(request.uid, &past, now);
            }
            changed.insert(bucket);
        }
        changed
    }
}

impl Reconciler for Autoscaler {
    type Fold = AutoscalerFold;
    type Global = ();

    const SERVICE: &'static str = "autoscaler";
    const STREAM: StreamKind = StreamKind::Scaling;
    /// Bounds how late a second with a missing member is closed.
    const TICK: Duration = Duration::from_millis(20);
    /// The history lags by the seconds since its last save, and a takeover takes some more.
    const FRAMES_AGAIN: Span = Span::from_secs(45);

    fn fold(&self) -> AutoscalerFold {
        AutoscalerFold
    }

    fn applied(&mut self, key: &EndpointKey, record: &Record, _effect: ()) {
        if let Some(evaluations) = self.evaluations.get_mut(key) {
            evaluations.applied(record);
        }
    }

    fn prepare(&mut self, key: &EndpointKey, state: &EndpointState, now: Timestamp) {
        let from = self.measured_from(key.bucket(), now);
        let measures = self.measures.entry(key.bucket());
        let measures = measures.or_insert_with(|| Measures::new(from));
        let evaluations = self.evaluations.entry(key.clone()).or_default();
        evaluations.prepare(state, measures, &self.settings.zones, now);
    }

    fn prepared(&mut self, bucket: Bucket, now: Timestamp) {
        let from = self.measured_from(bucket, now);
        let measures = self.measures.entry(bucket);
        let measures = measures.or_insert_with(|| Measures::new(from));
        for (arrived, frame) in self.early.remove(&bucket).into_iter().flatten() {
            measures.frame(arrived, &frame);
        }
    }

    fn observe(&mut self, frame: &Frame, now: Timestamp) -> bool {
        let Some(measures) = self.measures.get_mut(&frame.bucket) else {
            let early = self.early.entry(frame.bucket).or_default();
            if early.len() == EARLY_FRAMES_MAX {
                early.pop_front();
            }
            early.push_back((now, frame.clone()));
            return false;
        };
        let closed = measures.frame(now, frame);
        let closed = closed
            .iter()
            .any(|second| second.kind == SourceKind::GATEWAY);
        if closed {
            let closed_at = frame.start + Span::from_millis(frame.length_us / 1000);
            self.closed_seconds.insert(frame.bucket, closed_at);
        }
        closed
    }

    fn due(&mut self, now: Timestamp) -> BTreeSet<Bucket> {
        self.closed_seconds.clear();
        let refilled = self.refill(now);
        if now.since(self.evaluated_all_at) >= EVALUATE_EVERY || now < self.evaluated_all_at {
            self.evaluated_all_at = now;
            self.measures.values_mut().for_each(|measures| {
                measures.tick(now);
            });
            return Bucket::of_endpoints().collect();
        }
        let closed = |(bucket, measures): (&Bucket, &mut Measures)| {
            let closed = measures.tick(now);
            closed
                .iter()
                .any(|second| second.kind == SourceKind::GATEWAY)
                .then_some(*bucket)
        };
        let closed = self.measures.iter_mut().filter_map(closed);
        closed.chain(refilled).collect()
    }

    fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &EndpointState,
        _global: &(),
        now: Timestamp,
    ) -> Outputs {
        let measures = self.measures.entry(key.bucket());
        let measures = measures.or_insert_with(|| Measures::new(now));
        let evaluations = self.evaluations.entry(key.clone()).or_default();
        let shared = Shared {
            settings: &self.settings,
            refills: self.refills.as_ref(),
        };
        let decisions = evaluations.evaluate(key, state, measures, &shared, now);
        match self.closed_seconds.get(&key.bucket()) {
            Some(closed_at) if !decisions.is_empty() => {
                self.pending_decisions.insert(key.clone(), *closed_at);
            }
            _ => {
                self.pending_decisions.remove(key);
            }
        }
        let decided = |decision| Event::ScalingDecided(Box::new(decision));
        let events = decisions.into_iter().map(decided).collect();
        Outputs::to(StreamName::of(Self::STREAM, key), events)
    }

    fn forget_endpoint(&mut self, key: &EndpointKey) {
        self.evaluations.remove(key);
    }

    fn forget(&mut self, bucket: Bucket) {
        self.measures.remove(&bucket);
        self.early.remove(&bucket);
        self.evaluations.retain(|key, _| key.bucket() != bucket);
        self.closed_seconds.remove(&bucket);
        self.pending_decisions
            .retain(|key, _| key.bucket() != bucket);
    }

    fn committed(&mut self, key: &EndpointKey, records: &[Arc<Record>], _now: Timestamp) {
        let Some(observer) = &self.observer else {
            return;
        };
        for record in records {
            if let Event::ScalingDecided(decision) = &record.event {
                observer.metrics.count(decision);
            }
        }
        if let Some(closed_at) = self.pending_decisions.remove(key) {
            let delay = observer.clock.now().since(closed_at);
            observer.metrics.committed_after(delay);
        }
    }
}
