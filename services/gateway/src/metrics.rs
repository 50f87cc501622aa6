//! Prometheus metrics, updated once a second from the frames: dashboards show what the autoscaler
//! saw.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use contract::frame::{Frame, Outcomes, Role};
use contract::histogram::Histogram;
use contract::ids::Bucket;
use contract::resources::ErrorMapping;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::{MetricType, TypedMetric};
use runtime::metrics::Metrics;

use crate::router::RouteSet;
use crate::shard::{CutCounts, RefusalCounts};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: String,
    deployment: String,
    role: String,
    code_class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CutLabels {
    endpoint: String,
    deployment: String,
    reason: &'static str,
}

#[derive(PartialOrd, Ord, Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeploymentLabels {
    endpoint: String,
    deployment: String,
    role: String,
}

/// Powers of two from 0.256 ms to 67 s: bounds at which the frames' histograms are exact.
const BOUNDS_LOG2_US: std::ops::RangeInclusive<u32> = 8..=26;

/// A histogram that merges whole histograms.
#[derive(Clone, Debug, Default)]
struct DurationHistogram(Arc<Mutex<Histogram>>);

impl DurationHistogram {
    fn merge(&self, other: &Histogram) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .merge(other);
    }
}

impl TypedMetric for DurationHistogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for DurationHistogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut counts: Vec<(f64, u64)> = BOUNDS_LOG2_US
            .map(|log2| ((1u64 << log2) as f64 / 1e6, 0))
            .chain([(f64::INFINITY, 0)])
            .collect();
        for (bound_us, count) in histogram.iter() {
            let seconds = bound_us as f64 / 1e6;
            if let Some(bucket) = counts.iter_mut().find(|(bound, _)| seconds <= *bound) {
                bucket.1 += count;
            }
        }
        let sum = histogram.sum_micros() as f64 / 1e6;
        encoder.encode_histogram::<[(&str, &str); 0]>(sum, histogram.count(), &counts, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[derive(Debug, Default)]
pub struct GatewayMetrics {
    requests: Family<RequestLabels, Counter<u64, AtomicU64>>,
    durations: Family<DeploymentLabels, DurationHistogram>,
    in_flight: Family<DeploymentLabels, Gauge>,
    cuts: Family<CutLabels, Counter<u64, AtomicU64>>,
    /// Deployments in the last frame of each bucket.
    last_deployments: Mutex<BTreeMap<Bucket, BTreeSet<DeploymentLabels>>>,
}

impl GatewayMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        metrics.register(|registry| {
            // The encoder adds `_total` to a counter's name.
            registry.register(
                "penstock_requests",
                "Completed requests, by class of the status code",
                own.requests.clone(),
            );
            registry.register(
                "penstock_request_duration_seconds",
                "From arrival to the last byte of the response, for requests that the model answered or that timed out",
                own.durations.clone(),
            );
            registry.register(
                "penstock_inflight_requests",
                "Peak number of concurrent requests in the last second",
                own.in_flight.clone(),
            );
            registry.register(
                "penstock_responses_cut",
                "Responses that ended before they were complete, by reason: stream-idle, max-duration, instance-closed, gateway-shutdown",
                own.cuts.clone(),
            );
        });
        own
    }

    pub fn observe(&self, frames: &[Frame], routes: &RouteSet) {
        for frame in frames {
            self.observe_frame(frame, routes);
        }
    }

    fn observe_frame(&self, frame: &Frame, routes: &RouteSet) {
        let mut current = BTreeSet::new();
        for part in &frame.deployments {
            let labels = DeploymentLabels {
                endpoint: part.endpoint.endpoint().to_string(),
                deployment: part.deployment.to_string(),
                role: part.role.to_string(),
            };
            let endpoint = routes.endpoint(&labels.endpoint);
            let mapping = endpoint.and_then(|endpoint| {
                let index = endpoint.deployment(labels.deployment.as_bytes())?;
                Some(endpoint.deployments[index].error_mapping)
            });
            for (code_class, count) in by_class(&part.outcomes, mapping.unwrap_or_default()) {
                self.count(labels.clone(), code_class, count);
            }
            self.durations.get_or_create(&labels).merge(&part.latency);
            self.in_flight
                .get_or_create(&labels)
                .set(i64::from(part.in_flight_max));
            current.insert(labels);
        }
        // A frame omits deployments without activity: nothing is in flight there.
        let mut last_deployments = self
            .last_deployments
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let previous = last_deployments
            .insert(frame.bucket, current.clone())
            .unwrap_or_default();
        for labels in previous.difference(&current) {
            self.in_flight.get_or_create(labels).set(0);
        }
    }

    /// Counts requests that were refused before a deployment was chosen.
    pub fn observe_refusals(&self, refusals: &RefusalCounts) {
        for ((endpoint, status), count) in refusals {
            // 501 refuses the client's upgrade; it is no failure of ours.
            let code_class = match status {
                400..=499 | 501 => "4xx",
                _ => "5xx",
            };
            let labels = DeploymentLabels {
                endpoint: endpoint.clone(),
                deployment: String::new(),
                role: Role::LIVE.to_string(),
            };
            self.count(labels, code_class, *count);
        }
    }

    /// Counts responses that ended before they were complete.
    pub fn observe_cuts(&self, cuts: &CutCounts) {
        for ((endpoint, deployment, reason), count) in cuts {
            let labels = CutLabels {
                endpoint: endpoint.clone(),
                deployment: deployment.clone(),
                reason: reason.code(),
            };
            self.cuts.get_or_create(&labels).inc_by(*count);
        }
    }

    fn count(&self, deployment: DeploymentLabels, code_class: &'static str, count: u64) {
        if count == 0 {
            return;
        }
        let labels = RequestLabels {
            endpoint: deployment.endpoint,
            deployment: deployment.deployment,
            role: deployment.role,
            code_class,
        };
        self.requests.get_or_create(&labels).inc_by(count);
    }
}

/// The status classes of the contract's table, by outcome: a response that ended early counts as an
/// error, whatever its head said. A model's redirects count as successes; a client that left
/// received no status.
fn by_class(outcomes: &Outcomes, mapping: ErrorMapping) -> [(&'static str, u64); 4] {
    let o = outcomes;
    let mut client = o.model_client_error + o.too_many_pending + o.hold_full + o.refused;
    let mut server = o.unreachable + o.unavailable + o.hold_expired + o.internal;
    // 424 and 408, or the model's own status and 504.
    *match mapping {
        ErrorMapping::Azure => &mut client,
        ErrorMapping::Pass => &mut server,
    } += o.model_server_error + o.timeout;
    [
        ("2xx", o.success),
        ("4xx", client),
        ("5xx", server),
        ("none", o.client_left),
    ]
}
