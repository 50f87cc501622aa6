//! Metric definitions: each is a row with its names, unit, source, computation, and its values in
//! the situations where there is nothing to compute from.
//!
//! Invariant: nothing outside a row tells one metric from another. Code that needs to know about a
//! metric asks its row ([`Metric`] is a handle to one), so a new metric is a new row in
//! [`METRICS`](super::METRICS) and nothing else.

use std::fmt;

use contract::frame::{Outcomes, SourceKind};
use contract::histogram::Histogram;

use super::SignalOptions;
use super::metrics::{METRICS, RESERVED_NAMES};
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

/// A handle to a metric's row.
#[derive(Clone, Copy)]
pub struct Metric(&'static MetricRow);

impl PartialEq for Metric {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for Metric {}

impl fmt::Debug for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Metric").field(&self.0.name).finish()
    }
}

/// A rule names an unknown metric.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownMetric {
    /// The name is reserved for a later release.
    #[error("the metric `{0}` is not available yet; {1}")]
    NotYet(String, Available),
    /// No metric has this name.
    #[error("there is no metric `{0}`; {1}")]
    Unknown(String, Available),
}

/// The metrics that can be used instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available(Vec<&'static str>);

impl fmt::Display for Available {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "use one of {}", self.0.join(", "))
    }
}

impl Metric {
    /// Returns the metric of this release with this name.
    ///
    /// # Errors
    ///
    /// The name is unknown or reserved; the error lists the available names.
    pub fn parse(name: &str) -> Result<Self, UnknownMetric> {
        Self::parse_among(METRICS, name)
    }

    /// Returns the metric with this name among `rows`.
    ///
    /// # Errors
    ///
    /// The name is unknown or reserved; the error lists the available names.
    pub fn parse_among(rows: &'static [MetricRow], name: &str) -> Result<Self, UnknownMetric> {
        if let Some(row) = rows.iter().find(|row| row.is_named(name)) {
            return Ok(Self(row));
        }
        let available = Available(rows.iter().map(|row| row.name).collect());
        Err(if RESERVED_NAMES.iter().any(|of| of.is_named(name)) {
            UnknownMetric::NotYet(name.to_owned(), available)
        } else {
            UnknownMetric::Unknown(name.to_owned(), available)
        })
    }

    /// Its row.
    pub fn row(self) -> &'static MetricRow {
        self.0
    }

    /// Its name in rules and decisions.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// Unit of its values.
    pub fn unit(self) -> Unit {
        self.0.unit
    }

    /// See [`MetricRow::is_total`].
    pub fn is_total(self) -> bool {
        self.0.is_total
    }

    /// See [`MetricRow::is_per_instance`].
    pub fn is_per_instance(self) -> bool {
        self.0.is_per_instance
    }

    /// Whether it is computed from the latencies of answers: its average is that of the whole
    /// window, and its seconds cannot be summed or counted.
    pub fn is_latency(self) -> bool {
        matches!(self.0.computation, Computation::Latencies(_))
    }
}

impl MetricRow {
    fn is_named(&self, name: &str) -> bool {
        self.name == name || self.aliases.contains(&name)
    }
}

impl ReservedName {
    fn is_named(&self, name: &str) -> bool {
        self.name == name || self.aliases.contains(&name)
    }
}
