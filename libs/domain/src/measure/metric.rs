//! What a metric is: a row that says its names, its unit, who reports it, what it is worth in the
//! situations that need an answer, and how it is computed.
//!
//! Invariant: nothing outside a row knows one metric from another. Whoever asks about metrics asks the
//! row ([`Metric`] is a handle to one), so a new metric is a new row in
//! [`METRICS`](super::METRICS) and nothing else.

use std::fmt;

use contract::frame::SourceKind;
use contract::histogram::Histogram;

use super::SignalOptions;
use super::metrics::{METRICS, SPOKEN_FOR};
use super::pane::{Coverage, Load};

/// One metric that rules may name.
#[derive(Clone, Debug)]
pub struct MetricRow {
    /// As rules and the keys of decisions name it; it never changes.
    pub name: &'static str,
    /// Other names that rules may use for it (Azure's).
    pub aliases: &'static [&'static str],
    /// How its values are written.
    pub unit: Unit,
    /// Whose frames it is computed from.
    pub source: SourceKind,
    /// The value is a sum over all instances (a load); others are properties of one instance or answer
    /// already, and averages of them do not add up.
    pub is_total: bool,
    /// A share of the value per ready instance means something, so that `perInstance` does; only of totals.
    pub is_per_instance: bool,
    /// For people, in one line.
    pub description: &'static str,
    /// Its values where there is nothing, or not the usual, to compute it from.
    pub worth: Situations,
    /// How it is computed.
    pub reads: Reads,
}

/// How a metric's values are written in rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// As they are.
    Number,
    /// 0 to 100, and above where more is used than there should be.
    Percent,
    /// 0 to 1.
    Ratio,
    /// In milliseconds inside.
    Duration,
}

/// What a metric is worth when there is nothing, or not the usual, to compute it from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Situations {
    /// Instances are ready, and no request has come.
    pub no_traffic: Worth,
    /// Requests are being served and are waiting; none has ended.
    pub all_in_flight: Worth,
    /// Every request was refused for lack of capacity, at once.
    pub all_refused: Worth,
    /// There is no instance; requests wait for one.
    pub no_instance: Worth,
    /// No source has reported.
    pub no_report: Worth,
}

/// A value in a situation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Worth {
    /// This, whatever else is true.
    Always(f64),
    /// What was counted.
    Measured,
    /// It has no value. A rule that reads it never takes an instance away.
    Unknown,
}

impl fmt::Display for Worth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always(value) => write!(f, "{value}"),
            Self::Measured => f.write_str("measured"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// What a metric is computed from, over one stretch of time.
#[derive(Clone, Copy, Debug)]
pub enum Reads {
    /// Counts; None: they do not give it a value.
    Counts(fn(&Coverage, &Load, SignalOptions) -> Option<f64>),
    /// The latencies of answers; None: there was no answer. The average over a window is that of all its
    /// answers, not of its seconds.
    Latencies(fn(&Histogram) -> Option<f64>),
}

/// A name that nothing is measured under in this version.
#[derive(Clone, Copy, Debug)]
pub struct SpokenFor {
    /// As rules will name it.
    pub name: &'static str,
    /// Other names that rules will use for it.
    pub aliases: &'static [&'static str],
}

/// A handle to a row.
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

/// A rule names a metric that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownMetric {
    /// A later release measures it.
    #[error("the metric `{0}` is not available yet; {1}")]
    NotYet(String, Available),
    /// Nothing goes by that name.
    #[error("there is no metric `{0}`; {1}")]
    Unknown(String, Available),
}

/// The names that can be used instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available(Vec<&'static str>);

impl fmt::Display for Available {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "use one of {}", self.0.join(", "))
    }
}

impl Metric {
    /// The metric that goes by this name in this release.
    ///
    /// # Errors
    /// There is none of that name, or none yet; the error lists those that there are.
    pub fn parse(name: &str) -> Result<Self, UnknownMetric> {
        Self::parse_among(METRICS, name)
    }

    /// The metric that goes by this name among `rows`.
    ///
    /// # Errors
    /// There is none of that name, or none yet; the error lists those that there are.
    pub fn parse_among(rows: &'static [MetricRow], name: &str) -> Result<Self, UnknownMetric> {
        if let Some(row) = rows.iter().find(|row| row.goes_by(name)) {
            return Ok(Self(row));
        }
        let available = Available(rows.iter().map(|row| row.name).collect());
        Err(if SPOKEN_FOR.iter().any(|of| of.goes_by(name)) {
            UnknownMetric::NotYet(name.to_owned(), available)
        } else {
            UnknownMetric::Unknown(name.to_owned(), available)
        })
    }

    /// What is known of it.
    pub fn row(self) -> &'static MetricRow {
        self.0
    }

    /// As rules and decisions name it.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// How its values are written.
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

    /// Computed from the latencies of answers: its average is that of a window as a whole, and seconds
    /// of it cannot be summed or counted.
    pub fn is_latency(self) -> bool {
        matches!(self.0.reads, Reads::Latencies(_))
    }
}

impl MetricRow {
    fn goes_by(&self, name: &str) -> bool {
        self.name == name || self.aliases.contains(&name)
    }
}

impl SpokenFor {
    fn goes_by(&self, name: &str) -> bool {
        self.name == name || self.aliases.contains(&name)
    }
}
