//! Measurements of one bucket: frames of all sources merged into seconds, seconds kept in panes,
//! panes aggregated into the signals that rules read.
//!
//! A second is **closed** when every member of its kind has sent its frame, or 50 ms after the
//! slowest member's usual arrival; with one member that is at once. A second that lacks a member is
//! **partial**. A member that falls silent without goodbye stays one for a minute, so its loss blocks
//! scale-in for the window and a minute more. A frame with nothing about a deployment says zero; a
//! second without any frame says nothing.
//!
//! Gateways (requests) and nodes (resources) close their seconds apart from each other.
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

/// A second that will not change any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedSecond {
    pub kind: SourceKind,
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
    gateways: Group,
    nodes: Group,
}

impl Measures {
    /// Begins to measure. Windows that reach back before `now` are not covered, and say so.
    pub fn new(now: Timestamp) -> Self {
        Self {
            gateways: Group::new(SourceKind::Gateway, now),
            nodes: Group::new(SourceKind::Node, now),
        }
    }

    /// Takes in a frame; answers with the seconds that it closed, in order.
    pub fn frame(&mut self, now: Timestamp, frame: &Frame) -> Vec<ClosedSecond> {
        self.group_mut(frame.source.kind).frame(now, frame)
    }

    /// Closes the seconds whose deadline has passed.
    pub fn tick(&mut self, now: Timestamp) -> Vec<ClosedSecond> {
        let mut closed = self.gateways.tick(now);
        closed.extend(self.nodes.tick(now));
        closed
    }

    /// When `tick` has something to close next, if nothing else arrives before.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        [self.gateways.next_deadline(), self.nodes.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Keeps what these signals need from now on. Windows up to 2 minutes are kept without it.
    pub fn watch(&mut self, deployment: Uid, signals: &[SignalSpec], now: Timestamp) {
        for spec in signals {
            self.group_mut(spec.metric.row().source).watch(
                deployment,
                i64::from(spec.window_seconds()),
                now.secs(),
            );
        }
    }

    /// Drops what is known of a deployment that is gone.
    pub fn forget(&mut self, deployment: Uid) {
        self.gateways.forget(deployment);
        self.nodes.forget(deployment);
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
                let group = self.group(spec.metric.row().source);
                let signal = signal::compute(group, deployment, spec, options, now, &mut merged);
                Some(signal)
            })
            .collect()
    }

    /// Sources that count at the moment, silent ones included.
    pub fn members(&self) -> impl Iterator<Item = &Source> {
        self.gateways.members().chain(self.nodes.members())
    }

    pub fn counters(&self) -> Counters {
        let mut counters = self.gateways.counters;
        counters.add(&self.nodes.counters);
        counters
    }

    fn group(&self, kind: SourceKind) -> &Group {
        match kind {
            SourceKind::Gateway => &self.gateways,
            SourceKind::Node => &self.nodes,
        }
    }

    fn group_mut(&mut self, kind: SourceKind) -> &mut Group {
        match kind {
            SourceKind::Gateway => &mut self.gateways,
            SourceKind::Node => &mut self.nodes,
        }
    }
}
