//! Signals that rules read: a metric over a window, and the key under which the aggregate is
//! recorded.
//!
//! Invariant: a key names everything that its value depends on besides the deployment; keys are
//! written into decisions and never change their meaning.

use std::fmt;

use contract::time::Span;

use super::metric::Metric;

/// How the values in a window are combined into one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Aggregation {
    /// The mean over time.
    Average,
    /// The lowest second.
    Min,
    /// The highest second.
    Max,
    /// The sum of all seconds.
    Sum,
    /// The number of seconds with data.
    Count,
    /// The last second.
    Last,
    /// The quantile, per ten thousand.
    Quantile(u32),
}

const AGGREGATIONS: [(&str, Aggregation); 10] = [
    ("average", Aggregation::Average),
    ("min", Aggregation::Min),
    ("max", Aggregation::Max),
    ("sum", Aggregation::Sum),
    ("count", Aggregation::Count),
    ("last", Aggregation::Last),
    ("p50", Aggregation::Quantile(5000)),
    ("p90", Aggregation::Quantile(9000)),
    ("p95", Aggregation::Quantile(9500)),
    ("p99", Aggregation::Quantile(9900)),
];

/// A rule names an unknown aggregation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no aggregation `{0}`; use average, min, max, sum, count, last, p50, p90, p95 or p99"
)]
pub struct UnknownAggregation(String);

impl Aggregation {
    /// Returns the aggregation with this name in rules.
    ///
    /// # Errors
    ///
    /// [`UnknownAggregation`], which lists the available ones.
    pub fn parse(name: &str) -> Result<Self, UnknownAggregation> {
        AGGREGATIONS
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, aggregation)| *aggregation)
            .ok_or_else(|| UnknownAggregation(name.to_owned()))
    }

    /// Its name in rules and decisions.
    pub fn name(self) -> &'static str {
        AGGREGATIONS
            .iter()
            .find(|(_, aggregation)| *aggregation == self)
            .map_or("average", |(name, _)| name)
    }
}

/// One aggregate that a rule reads, before any division by instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalSpec {
    /// The metric.
    pub metric: Metric,
    /// Length of the window, in whole seconds.
    pub window: Span,
    /// How the window is aggregated.
    pub aggregation: Aggregation,
}

impl SignalSpec {
    /// The key in a decision's inputs: `requests_per_second/60s/average`. The window is always in
    /// seconds.
    pub fn key(&self) -> String {
        self.to_string()
    }

    /// The window's length in seconds.
    pub fn window_seconds(&self) -> u32 {
        u32::try_from(self.window.secs()).unwrap_or(u32::MAX)
    }
}

impl fmt::Display for SignalSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}s/{}",
            self.metric.name(),
            self.window.secs(),
            self.aggregation.name()
        )
    }
}
