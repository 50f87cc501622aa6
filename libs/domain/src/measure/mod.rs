//! Measurements of one bucket: frames of all sources merged into seconds, seconds kept in panes,
//! panes aggregated into the signals that rules read.
//!
//! A second is **closed** when every member of its kind has sent its frame, or 50 ms after the
//! slowest member's usual arrival; with one member, at once. A second that lacks a member is
//! **partial**. A member that falls silent without a goodbye remains a member for a minute, so its
//! loss blocks scale-in for the window plus a minute. A frame without a deployment means zero for
//! it; a second without any frame means nothing.
//!
//! Sources of different kinds (gateways measure requests, nodes resources) are summed separately
//! and close their seconds independently, including kinds that this release does not know.
//!
//! Invariants: a closed second never changes; the result depends on frames and `now` alone; a
//! deployment's data is kept by its uid.

mod group;
mod metric;
mod metrics;
mod pane;
mod past;
mod refill;
mod report;
mod row;
mod signal;
mod spans;
mod spec;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use contract::decision::Signal;
use contract::frame::{Frame, Source, SourceKind};
use contract::ids::Uid;
use contract::resources::ModelClientErrors;
use contract::time::{Span, Timestamp};

pub use group::{AHEAD_MAX, BEHIND_MAX, GRACE, LOST_AFTER};
pub use metric::{Available, Metric, UnknownMetric};
pub use metrics::{METRICS, RESERVED_NAMES};
pub use pane::{Coverage, Load};
pub use past::{MeasuredSpan, Past, PastOfKind};
pub use report::{InstanceReading, InstanceReport};
pub use row::{Computation, MetricRow, ReservedName, SituationValue, Situations, Unit};
pub use spans::Spans;
pub use spec::{Aggregation, SignalSpec, UnknownAggregation};

use group::Group;

/// Longest window that a rule may use.
pub const WINDOW_MAX: Span = Span::from_secs(12 * 3600);

/// Most kinds of sources that are measured; frames of further kinds are ignored. Each costs the
/// coverage of the longest window in every bucket.
pub const SOURCE_KINDS_MAX: usize = 16;

/// A second that will not change any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedSecond {
    /// The kind of source whose frames it consists of.
    pub kind: SourceKind,
    /// Its start.
    pub start: Timestamp,
    /// Members that sent no frame for it; if any, the second is partial.
    pub missing: Vec<Source>,
    /// Whether no member sent a frame for it.
    pub empty: bool,
}

/// Counts of what was not used for decisions, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames for seconds that were already closed.
    pub late: u64,
    /// Frames more than 2 s ahead of the owner's clock or more than 60 s behind it.
    pub skewed: u64,
    /// Repeated frames.
    pub duplicate: u64,
    /// Members dropped because they fell silent without a goodbye.
    pub lost: u64,
}

impl Counters {
    fn add(&mut self, other: &Self) {
        self.late += other.late;
        self.skewed += other.skewed;
        self.duplicate += other.duplicate;
        self.lost += other.lost;
    }
}

/// What an aggregate depends on besides the frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalOptions {
    /// How the endpoint counts a model's 4xx.
    pub model_client_errors: ModelClientErrors,
}

/// The measurements of one bucket.
#[derive(Clone, Debug)]
pub struct Measures {
    /// Includes every kind of source that a metric of this release is computed from.
    groups: BTreeMap<SourceKind, Group>,
}

impl Measures {
    /// Starts measuring at `now`. Windows that reach back further report that they are not covered.
    pub fn new(now: Timestamp) -> Self {
        let group = |row: &MetricRow| (row.source.clone(), Group::new(row.source.clone(), now));
        Self {
            groups: METRICS.iter().map(group).collect(),
        }
    }

    /// Applies a frame and returns the seconds that it closed, in order.
    pub fn frame(&mut self, now: Timestamp, frame: &Frame) -> Vec<ClosedSecond> {
        match self.group_mut(&frame.source.kind, now) {
            Some(group) => group.frame(now, frame),
            None => Vec::new(),
        }
    }

    /// Closes the seconds whose deadline has passed.
    pub fn tick(&mut self, now: Timestamp) -> Vec<ClosedSecond> {
        let groups = self.groups.values_mut();
        groups.flat_map(|group| group.tick(now)).collect()
    }

    /// When `tick` next has something to close, if no frame arrives before.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let groups = self.groups.values();
        groups.filter_map(Group::next_deadline).min()
    }

    /// Keeps the data that these signals need from now on. Windows up to 2 minutes are always kept.
    pub fn watch(&mut self, deployment: Uid, signals: &[SignalSpec], now: Timestamp) {
        for spec in signals {
            if let Some(group) = self.group_mut(&spec.metric.row().source, now) {
                group.watch(deployment, i64::from(spec.window_seconds()), now.secs());
            }
        }
    }

    /// Counts the seconds up to that in which the deployment was created as measured, without any load,
    /// unless they were measured, once its window has a report: what did not exist had no traffic.
    pub fn set_created(&mut self, deployment: Uid, created_at: Timestamp) {
        for group in self.groups.values_mut() {
            group.first_whole.insert(deployment, created_at.secs() + 1);
        }
    }

    /// Leaves instances out of averages over instances for this long after they have become ready, from
    /// now on. Windows that begin before a change are outdated.
    pub fn set_initialization_period(&mut self, deployment: Uid, period: Span, now: Timestamp) {
        for group in self.groups.values_mut() {
            group.set_initialization_period(deployment, period, now.secs());
        }
    }

    /// The first second that these signals may need and that is not held, if any: what to
    /// [refill](Self::refill) from. Call [`watch`](Self::watch) and [`set_created`](Self::set_created)
    /// before.
    pub fn lacks_since(
        &self,
        deployment: Uid,
        signals: &[SignalSpec],
        now: Timestamp,
    ) -> Option<Timestamp> {
        let lacking = |spec: &SignalSpec| {
            let window = i64::from(spec.window_seconds());
            let group = self.groups.get(&spec.metric.row().source)?;
            let from = signal::first_needed(window, now).max(group.first_whole(deployment));
            (from < group.complete_since(deployment, window)).then_some(from)
        };
        let from = signals.iter().filter_map(lacking).min()?;
        Some(Timestamp::from_secs(from))
    }

    /// Adds earlier measurements to the windows of a deployment, where they are not held. The
    /// initialization period must have been set.
    pub fn refill(&mut self, deployment: Uid, past: &Past, now: Timestamp) {
        for (kind, past) in &past.kinds {
            if let Some(group) = self.groups.get_mut(kind) {
                group.refill(deployment, past, now.secs());
            }
        }
    }

    /// Drops the data of a deleted deployment.
    pub fn forget(&mut self, deployment: Uid) {
        for group in self.groups.values_mut() {
            group.forget(deployment);
        }
    }

    /// Returns the aggregates in the order of `specs`, as `autoscale::TickInputs` expects them.
    pub fn signals(
        &self,
        deployment: Uid,
        specs: &[SignalSpec],
        options: SignalOptions,
        now: Timestamp,
    ) -> Vec<Option<Signal>> {
        let mut latencies = BTreeMap::new();
        let gateways = self.groups.get(&SourceKind::GATEWAY);
        let mut refused = BTreeMap::new();
        specs
            .iter()
            .map(|spec| {
                let group = self.groups.get(&spec.metric.row().source)?;
                let signal = signal::compute(group, deployment, spec, options, now, &mut latencies);
                let refused = refused.entry(spec.window_seconds()).or_insert_with(|| {
                    gateways.map_or(0, |of| signal::refused(of, deployment, spec, now))
                });
                Some(Signal {
                    refused: *refused,
                    ..signal
                })
            })
            .collect()
    }

    /// Adds to these signals, which must be of the same time, what explains them and decides nothing: how
    /// many requests were answered, and when a window that lacks something is complete. Only decisions that
    /// are written need it.
    pub fn add_evidence(
        &self,
        deployment: Uid,
        specs: &[SignalSpec],
        now: Timestamp,
        signals: &mut [Option<Signal>],
    ) {
        for (spec, signal) in specs.iter().zip(signals) {
            let source = &spec.metric.row().source;
            let (Some(group), Some(signal)) = (self.groups.get(source), signal) else {
                continue;
            };
            if *source == SourceKind::GATEWAY {
                signal.answered = Some(signal::answered(group, deployment, spec, now));
            }
            if signal.is_incomplete() {
                signal.complete_at = signal::complete_at(group, deployment, spec, now);
            }
        }
    }

    /// The current members, including silent ones.
    pub fn members(&self) -> impl Iterator<Item = &Source> {
        self.groups.values().flat_map(Group::members)
    }

    /// Counts of what was not used for decisions, since the start.
    pub fn counters(&self) -> Counters {
        let mut counters = Counters::default();
        for group in self.groups.values() {
            counters.add(&group.counters);
        }
        counters
    }

    /// Returns `None` if there are too many kinds already.
    fn group_mut(&mut self, kind: &SourceKind, now: Timestamp) -> Option<&mut Group> {
        if !self.groups.contains_key(kind) {
            if self.groups.len() >= SOURCE_KINDS_MAX {
                return None;
            }
            self.groups
                .insert(kind.clone(), Group::new(kind.clone(), now));
        }
        self.groups.get_mut(kind)
    }
}
