//! Metrics by name.
//!
//! Invariant: nothing outside a row tells one metric from another. Code that needs to know about a
//! metric asks its row ([`Metric`] is a handle to one), so a new metric is a new row in
//! [`METRICS`](super::METRICS) and nothing else.

use std::fmt;

use super::metrics::{METRICS, RESERVED_NAMES};
use super::row::{Computation, MetricRow, Unit};

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
