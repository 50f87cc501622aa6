//! Measurements of one bucket: frames of all sources merged into seconds, seconds kept in panes,
//! panes aggregated into the signals that rules read.
//!
//! A second is **closed** when every member of its kind has sent its frame, or 50 ms after the
//! slowest member's usual arrival; with one member that is at once. A second that lacks a member is
//! **partial**. A member that falls silent without goodbye stays one for a minute, so its loss blocks
//! scale-in for the window and a minute more. A frame with nothing about a deployment says zero; a
//! second without any frame says nothing.
//!
//! Sources of different kinds (gateways measure requests, nodes resources) are summed, and close their
//! seconds, apart from each other; those of a kind that this release does not know, too.
//!
//! Invariants: a closed second never changes; the result depends on frames and `now` alone; what
//! belongs to a deployment is kept by its uid.

mod group;
mod metric;
mod metrics;
mod pane;
mod signal;
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
pub use metric::{
    Available, Metric, MetricRow, Reads, Situations, SpokenFor, Unit, UnknownMetric, Worth,
};
pub use metrics::{METRICS, SPOKEN_FOR};
pub use pane::{Coverage, Load};
pub use spec::{Aggregation, SignalSpec, UnknownAggregation};

use group::Group;

/// Longest window that a rule may ask for.
pub const WINDOW_MAX: Span = Span::from_secs(12 * 3600);

/// Kinds of sources that are summed; frames of more are ignored. Each costs the coverage of the longest
/// window in every bucket.
pub const SOURCE_KINDS_MAX: usize = 16;

/// A second that will not change any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedSecond {
    /// Of whose frames it is made.
    pub kind: SourceKind,
    /// When it began.
    pub start: Timestamp,
    /// Members that sent nothing for it; not empty: the second is partial.
    pub missing: Vec<Source>,
    /// No member sent anything for it.
    pub empty: bool,
}

/// What was not used for decisions, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames for seconds that were closed already.
    pub late: u64,
    /// Frames more than 2 s ahead of the owner's clock or more than 60 s behind it.
    pub skewed: u64,
    /// Frames that had been seen before.
    pub duplicate: u64,
    /// Members that fell silent without goodbye and were given up.
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
    /// Memory that one instance may use. None: `memory_utilization` has no data.
    pub memory_bytes_per_instance: Option<u64>,
}

/// The measurements of one bucket.
#[derive(Clone, Debug)]
pub struct Measures {
    /// At least of each kind that a metric of this release is computed from.
    groups: BTreeMap<SourceKind, Group>,
}

impl Measures {
    /// Begins to measure. Windows that reach back before `now` are not covered, and say so.
    pub fn new(now: Timestamp) -> Self {
        let group = |row: &MetricRow| (row.source.clone(), Group::new(row.source.clone(), now));
        Self {
            groups: METRICS.iter().map(group).collect(),
        }
    }

    /// Takes in a frame; answers with the seconds that it closed, in order.
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

    /// When `tick` has something to close next, if nothing else arrives before.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let groups = self.groups.values();
        groups.filter_map(Group::next_deadline).min()
    }

    /// Keeps what these signals need from now on. Windows up to 2 minutes are kept without it.
    pub fn watch(&mut self, deployment: Uid, signals: &[SignalSpec], now: Timestamp) {
        for spec in signals {
            if let Some(group) = self.group_mut(&spec.metric.row().source, now) {
                group.watch(deployment, i64::from(spec.window_seconds()), now.secs());
            }
        }
    }

    /// Drops what is known of a deployment that is gone.
    pub fn forget(&mut self, deployment: Uid) {
        for group in self.groups.values_mut() {
            group.forget(deployment);
        }
    }

    /// The aggregates, in the order asked for, as `autoscale::TickInputs` wants them.
    pub fn signals(
        &self,
        deployment: Uid,
        specs: &[SignalSpec],
        options: SignalOptions,
        now: Timestamp,
    ) -> Vec<Option<Signal>> {
        let mut merged = BTreeMap::new();
        specs
            .iter()
            .map(|spec| {
                let group = self.groups.get(&spec.metric.row().source)?;
                let signal = signal::compute(group, deployment, spec, options, now, &mut merged);
                Some(signal)
            })
            .collect()
    }

    /// Sources that count at the moment, silent ones included.
    pub fn members(&self) -> impl Iterator<Item = &Source> {
        self.groups.values().flat_map(Group::members)
    }

    /// What was not used for decisions, since the start.
    pub fn counters(&self) -> Counters {
        let mut counters = Counters::default();
        for group in self.groups.values() {
            counters.add(&group.counters);
        }
        counters
    }

    /// None: there are too many kinds already.
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
