//! The metrics that rules may name, their units, and the key under which an aggregate is recorded.
//!
//! Invariant: a key says everything that its value depends on besides the deployment; keys are
//! written into decisions and never change their meaning.

use std::fmt;

use contract::time::Span;

/// A built-in metric that this version measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Metric {
    /// Arrivals, whatever became of them: refused and failed requests are demand too.
    RequestsPerSecond,
    RequestsPerMinute,
    /// Requests being served and requests waiting, averaged over time.
    Concurrency,
    /// Requests waiting for an instance, averaged over time.
    QueueLength,
    /// A quantile of the latency, in per ten thousand: 9500 is p95. Milliseconds.
    LatencyQuantile(u32),
    LatencyAverage,
    /// Bad answers among the answers that count, 0 to 1.
    ErrorRatio,
    /// Of one core per instance, averaged over instances, in percent.
    CpuUtilization,
    /// Of the memory an instance may use, averaged over instances, in percent.
    MemoryUtilization,
}

/// How a metric's values are written in rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Number,
    Percent,
    Ratio,
    Duration,
}

const NAMES: [(&str, Metric); 12] = [
    ("requests_per_second", Metric::RequestsPerSecond),
    ("requests_per_minute", Metric::RequestsPerMinute),
    ("concurrency", Metric::Concurrency),
    ("queue_length", Metric::QueueLength),
    ("latency_p50", Metric::LatencyQuantile(5000)),
    ("latency_p90", Metric::LatencyQuantile(9000)),
    ("latency_p95", Metric::LatencyQuantile(9500)),
    ("latency_p99", Metric::LatencyQuantile(9900)),
    ("latency_average", Metric::LatencyAverage),
    ("error_ratio", Metric::ErrorRatio),
    ("cpu_utilization", Metric::CpuUtilization),
    ("memory_utilization", Metric::MemoryUtilization),
];

/// Azure's names of the same measurements.
const ALIASES: [(&str, &str); 10] = [
    ("CpuUtilizationPercentage", "cpu_utilization"),
    ("CpuMemoryUtilizationPercentage", "memory_utilization"),
    ("GpuUtilizationPercentage", "gpu_utilization"),
    ("GpuMemoryUtilizationPercentage", "gpu_memory_utilization"),
    ("RequestsPerMinute", "requests_per_minute"),
    ("RequestLatency", "latency_average"),
    ("RequestLatency_P50", "latency_p50"),
    ("RequestLatency_P90", "latency_p90"),
    ("RequestLatency_P95", "latency_p95"),
    ("RequestLatency_P99", "latency_p99"),
];

/// Names that are spoken for, and cannot be measured by this version.
const NOT_YET: [&str; 10] = [
    "gpu_utilization",
    "gpu_memory_utilization",
    "tokens_per_second",
    "time_to_first_token",
    "burn_rate",
    "prometheus",
    "http",
    "kafka-lag",
    "sql",
    "external",
];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownMetric {
    #[error("the metric `{0}` is not available yet; {available}", available = available())]
    NotYet(String),
    #[error("there is no metric `{0}`; {available}", available = available())]
    Unknown(String),
}

fn available() -> String {
    let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
    format!("use one of {}", names.join(", "))
}

impl Metric {
    pub fn parse(name: &str) -> Result<Self, UnknownMetric> {
        let canonical = ALIASES
            .iter()
            .find(|(alias, _)| *alias == name)
            .map_or(name, |(_, canonical)| canonical);
        if let Some((_, metric)) = NAMES.iter().find(|(known, _)| *known == canonical) {
            return Ok(*metric);
        }
        Err(if NOT_YET.contains(&canonical) {
            UnknownMetric::NotYet(name.to_owned())
        } else {
            UnknownMetric::Unknown(name.to_owned())
        })
    }

    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(_, metric)| *metric == self)
            .map_or("latency", |(name, _)| name)
    }

    pub fn unit(self) -> Unit {
        match self {
            Self::LatencyQuantile(_) | Self::LatencyAverage => Unit::Duration,
            Self::ErrorRatio => Unit::Ratio,
            Self::CpuUtilization | Self::MemoryUtilization => Unit::Percent,
            _ => Unit::Number,
        }
    }

    /// The value is a sum over all instances (a load), so a share per instance means something.
    /// Others are properties of one instance or answer already.
    pub fn is_total(self) -> bool {
        self.unit() == Unit::Number
    }

    pub fn is_latency(self) -> bool {
        self.unit() == Unit::Duration
    }

    /// Measured by nodes rather than by gateways.
    pub fn is_of_nodes(self) -> bool {
        self.unit() == Unit::Percent
    }
}

/// How the values inside a window become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Aggregation {
    Average,
    Min,
    Max,
    Sum,
    /// Seconds that had data.
    Count,
    Last,
    /// Per ten thousand.
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

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no aggregation `{0}`; use average, min, max, sum, count, last, p50, p90, p95 or p99"
)]
pub struct UnknownAggregation(String);

impl Aggregation {
    pub fn parse(name: &str) -> Result<Self, UnknownAggregation> {
        AGGREGATIONS
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, aggregation)| *aggregation)
            .ok_or_else(|| UnknownAggregation(name.to_owned()))
    }

    pub fn name(self) -> &'static str {
        AGGREGATIONS
            .iter()
            .find(|(_, aggregation)| *aggregation == self)
            .map_or("average", |(name, _)| name)
    }
}

/// One aggregate that a rule reads, before any division by instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SignalSpec {
    pub metric: Metric,
    pub window: Span,
    pub aggregation: Aggregation,
}

impl SignalSpec {
    /// The key in a decision's inputs: `requests_per_second/60s/average`. The window is always in
    /// seconds.
    pub fn key(&self) -> String {
        self.to_string()
    }

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
