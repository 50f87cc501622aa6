//! The definition of a metric: its names, unit, source, computation, and its values in the situations
//! where there is nothing to compute from.

use std::fmt;

use contract::frame::{Outcomes, SourceKind};
use contract::histogram::Histogram;

use super::SignalOptions;
use super::pane::{Coverage, Load};

/// A metric that rules may name.
#[derive(Clone, Debug)]
pub struct MetricRow {
    /// Its name in rules and in the keys of decisions; never changes.
    pub name: &'static str,
    /// Alternative names in rules (Azure's).
    pub aliases: &'static [&'static str],
    /// Unit of its values.
    pub unit: Unit,
    /// The kind of source whose frames it is computed from.
    pub source: SourceKind,
    /// Whether the value is a sum over all instances (a load). Other metrics already describe one
    /// instance or answer, and averages of them do not add up.
    pub is_total: bool,
    /// Whether dividing the value by ready instances is meaningful, so that `perInstance` applies;
    /// only for totals.
    pub is_per_instance: bool,
    /// One-line description for people.
    pub description: &'static str,
    /// Its values in unusual situations.
    pub situations: Situations,
    /// The definitions of frames by which its values have their present meaning; a window with frames
    /// of older ones does not scale in.
    pub definitions: u32,
    /// How it is computed.
    pub computation: Computation,
}

/// The unit in which rules write a metric's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A plain number.
    Number,
    /// 0 to 100, or above if more is used than should be.
    Percent,
    /// 0 to 1.
    Ratio,
    /// A duration, in milliseconds internally.
    Duration,
}

/// A metric's values when there is nothing, or nothing usual, to compute them from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Situations {
    /// Instances are ready, and no request has arrived.
    pub no_traffic: SituationValue,
    /// Requests are being served and are waiting; none has finished.
    pub all_in_flight: SituationValue,
    /// Every request was refused immediately for lack of capacity.
    pub all_refused: SituationValue,
    /// There is no instance; requests wait for one.
    pub no_instance: SituationValue,
    /// No source has reported.
    pub no_report: SituationValue,
}

/// The value of a metric in a situation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SituationValue {
    /// This value, whatever else is true.
    Always(f64),
    /// The measured value.
    Measured,
    /// The age of the oldest request in flight. A rule that reads it never scales in.
    OldestAge,
    /// No value. A rule that reads it never scales in.
    Unknown,
}

impl fmt::Display for SituationValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always(value) => write!(f, "{value}"),
            Self::Measured => f.write_str("measured"),
            Self::OldestAge => f.write_str("age of the oldest request"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// How a metric is computed from a period of time.
#[derive(Clone, Copy, Debug)]
pub enum Computation {
    /// From counts; `None` if they give it no value.
    Counts(fn(&Coverage, &Load, SignalOptions) -> Option<f64>),
    /// The share of some of the requests that ended among those that count. It has no value while there
    /// are requests and none has ended, and is 0 without requests.
    Share(fn(&Outcomes, SignalOptions) -> u64),
    /// Averages over the instances that were measured. Without any it has no value.
    Instances {
        /// The average; `None` if no instance was measured.
        average: fn(&Load) -> Option<f64>,
        /// The number of instances that it is of, averaged over time.
        measured: fn(&Coverage, &Load) -> Option<f64>,
    },
    /// From the latencies of answers. The average over a window is that of all its answers, not of its
    /// seconds. While there are requests and none was answered, it is the age of the oldest, and 0
    /// without requests.
    Latencies(fn(&Histogram) -> Option<f64>),
}

/// A metric name reserved for a later release.
#[derive(Clone, Copy, Debug)]
pub struct ReservedName {
    /// The name.
    pub name: &'static str,
    /// Its alternative names.
    pub aliases: &'static [&'static str],
}

impl MetricRow {
    pub(super) fn is_named(&self, name: &str) -> bool {
        self.name == name || self.aliases.contains(&name)
    }
}

impl ReservedName {
    pub(super) fn is_named(&self, name: &str) -> bool {
        self.name == name || self.aliases.contains(&name)
    }
}
