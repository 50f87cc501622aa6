//! The metrics of this release, one row each, and the names reserved for later ones.
//!
//! Invariant: what a row documents is what is measured; the test
//! `every_metric_has_the_values_its_row_documents` creates each situation for each row.
//! `METRICS.md` is generated from here.

use contract::frame::{Outcomes, SourceKind};
use contract::histogram::Histogram;
use contract::resources::ModelClientErrors;

use super::SignalOptions;
use super::row::{Computation, MetricRow, ReservedName, SituationValue, Situations, Unit};

use SituationValue::{Always, Measured, OldestAge, Unknown};

/// Every metric that rules may name.
pub const METRICS: &[MetricRow] = &[
    MetricRow {
        name: "requests_per_second",
        aliases: &[],
        description: "Requests that arrive per second, whatever their outcome: refused and failed requests are demand, too.",
        situations: ARRIVALS,
        computation: Computation::Counts(|coverage, load, _| {
            ratio(load.arrivals, coverage.length_us).map(|rate| rate * 1e6)
        }),
        ..LOAD
    },
    MetricRow {
        name: "requests_per_minute",
        aliases: &["RequestsPerMinute"],
        description: "Requests that arrive per minute, extrapolated from the window.",
        situations: ARRIVALS,
        computation: Computation::Counts(|coverage, load, _| {
            ratio(load.arrivals, coverage.length_us).map(|rate| rate * 60e6)
        }),
        ..LOAD
    },
    MetricRow {
        name: "concurrency",
        description: "Requests being served and requests waiting, averaged over time.",
        computation: Computation::Counts(|coverage, load, _| {
            ratio(load.in_flight_us + load.queued_us, coverage.length_us)
        }),
        ..LOAD
    },
    MetricRow {
        name: "queue_length",
        description: "Requests waiting for an instance, averaged over time.",
        computation: Computation::Counts(|coverage, load, _| {
            ratio(load.queued_us, coverage.length_us)
        }),
        ..LOAD
    },
    MetricRow {
        name: "latency_p50",
        aliases: &["RequestLatency_P50"],
        description: "Median latency of the answers of the model, and of requests that timed out.",
        computation: Computation::Latencies(|latency| quantile_ms(latency, 5000)),
        ..LATENCY
    },
    MetricRow {
        name: "latency_p90",
        aliases: &["RequestLatency_P90"],
        description: "90th percentile of the latency of the answers of the model, and of requests that timed out.",
        computation: Computation::Latencies(|latency| quantile_ms(latency, 9000)),
        ..LATENCY
    },
    MetricRow {
        name: "latency_p95",
        aliases: &["RequestLatency_P95"],
        description: "95th percentile of the latency of the answers of the model, and of requests that timed out.",
        computation: Computation::Latencies(|latency| quantile_ms(latency, 9500)),
        ..LATENCY
    },
    MetricRow {
        name: "latency_p99",
        aliases: &["RequestLatency_P99"],
        description: "99th percentile of the latency of the answers of the model, and of requests that timed out.",
        computation: Computation::Latencies(|latency| quantile_ms(latency, 9900)),
        ..LATENCY
    },
    MetricRow {
        name: "latency_average",
        aliases: &["RequestLatency"],
        description: "Mean latency of the answers of the model, and of requests that timed out.",
        ..LATENCY
    },
    MetricRow {
        name: "error_ratio",
        description: "Bad outcomes among those that count, including requests refused for lack of capacity.",
        computation: Computation::Share(bad),
        ..ANSWERS
    },
    MetricRow {
        name: "refused_ratio",
        description: "Requests refused for lack of capacity (too many pending, or no instance available) among those that count; part of `error_ratio`.",
        computation: Computation::Share(|outcomes, _| outcomes.refused_for_capacity()),
        ..ANSWERS
    },
    MetricRow {
        name: "cpu_utilization",
        aliases: &["CpuUtilizationPercentage"],
        description: "CPU used in percent of one core, averaged over the instances that were ready for the whole second, after the policy's `initializationPeriod`.",
        computation: Computation::Instances {
            average: |load| ratio(load.cpu_us, load.cpu_length_us).map(|share| share * 100.0),
            measured: |coverage, load| ratio(load.cpu_length_us, coverage.length_us),
        },
        ..RESOURCE
    },
    MetricRow {
        name: "memory_utilization",
        aliases: &["CpuMemoryUtilizationPercentage"],
        description: "Memory used in percent of the instance's limit, or else of its node's memory, averaged over the same instances as `cpu_utilization`.",
        computation: Computation::Instances {
            average: |load| {
                ratio(load.memory_share_ppm, load.memory_samples).map(|share| share / 10_000.0)
            },
            measured: |coverage, load| ratio(load.memory_samples, u64::from(coverage.seconds)),
        },
        ..RESOURCE
    },
];

/// Names that rules will be able to use in a later release.
pub const RESERVED_NAMES: &[ReservedName] = &[
    reserved("gpu_utilization", &["GpuUtilizationPercentage"]),
    reserved(
        "gpu_memory_utilization",
        &["GpuMemoryUtilizationPercentage"],
    ),
    reserved("tokens_per_second", &[]),
    reserved("time_to_first_token", &[]),
    reserved("time_per_output_token", &[]),
    reserved("burn_rate", &[]),
    reserved("prometheus", &[]),
    reserved("http", &[]),
    reserved("kafka-lag", &[]),
    reserved("sql", &[]),
    reserved("external", &[]),
];

const fn reserved(name: &'static str, aliases: &'static [&'static str]) -> ReservedName {
    ReservedName { name, aliases }
}

/// Defaults of loads measured by gateways.
const LOAD: MetricRow = MetricRow {
    name: "",
    aliases: &[],
    unit: Unit::Number,
    source: SourceKind::GATEWAY,
    is_total: true,
    is_per_instance: true,
    description: "",
    situations: Situations {
        no_traffic: Always(0.0),
        all_in_flight: Measured,
        all_refused: Always(0.0),
        no_instance: Measured,
        no_report: Unknown,
    },
    definitions: 0,
    computation: Computation::Counts(|_, _, _| None),
};

/// Refused requests have arrived, too.
const ARRIVALS: Situations = Situations {
    all_refused: Measured,
    ..LOAD.situations
};

/// Defaults of shares of the requests that ended.
const ANSWERS: MetricRow = MetricRow {
    name: "",
    aliases: &[],
    unit: Unit::Ratio,
    source: SourceKind::GATEWAY,
    is_total: false,
    is_per_instance: false,
    description: "",
    situations: Situations {
        no_traffic: Always(0.0),
        all_in_flight: Unknown,
        all_refused: Always(1.0),
        no_instance: Unknown,
        no_report: Unknown,
    },
    definitions: 0,
    computation: Computation::Share(|_, _| 0),
};

/// Defaults of latencies; without an answer they are the age of the oldest request in flight.
const LATENCY: MetricRow = MetricRow {
    name: "",
    aliases: &[],
    unit: Unit::Duration,
    source: SourceKind::GATEWAY,
    is_total: false,
    is_per_instance: false,
    description: "",
    situations: Situations {
        no_traffic: Always(0.0),
        all_in_flight: OldestAge,
        all_refused: Unknown,
        no_instance: OldestAge,
        no_report: Unknown,
    },
    definitions: 1,
    computation: Computation::Latencies(|latency| {
        ratio(latency.sum_micros(), latency.count()).map(|micros| micros / 1000.0)
    }),
};

/// Defaults of resources measured by nodes.
const RESOURCE: MetricRow = MetricRow {
    name: "",
    aliases: &[],
    unit: Unit::Percent,
    source: SourceKind::NODE,
    is_total: false,
    is_per_instance: false,
    description: "",
    situations: Situations {
        no_traffic: Measured,
        all_in_flight: Measured,
        all_refused: Measured,
        no_instance: Unknown,
        no_report: Unknown,
    },
    definitions: 1,
    computation: Computation::Counts(|_, _, _| None),
};

fn quantile_ms(latency: &Histogram, per_10000: u32) -> Option<f64> {
    latency
        .quantile_micros(per_10000)
        .map(|micros| micros as f64 / 1000.0)
}

fn bad(outcomes: &Outcomes, options: SignalOptions) -> u64 {
    let client_errors = match options.model_client_errors {
        ModelClientErrors::Good => 0,
        ModelClientErrors::Bad => outcomes.model_client_error,
    };
    outcomes.bad() + client_errors
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}
