//! Metrics of the autoscaler's decisions.

use contract::decision::{Decision, DecisionOutcome};
use contract::time::Span;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use runtime::metrics::Metrics;

/// Upper bounds in seconds; fine-grained around the targets for a decision of 20 ms, and 100 ms through
/// Kafka, so that they can be checked.
const COMMIT_SECONDS: [f64; 16] = [
    0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.5,
    1.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    endpoint: String,
    deployment: String,
    direction: &'static str,
    outcome: String,
}

#[derive(Clone)]
pub struct DecisionMetrics {
    decisions: Family<Labels, Counter>,
    commit_seconds: Histogram,
}

impl DecisionMetrics {
    pub fn new(metrics: &Metrics) -> Self {
        let exported = Self {
            decisions: Family::default(),
            commit_seconds: Histogram::new(COMMIT_SECONDS),
        };
        metrics.register(|registry| {
            registry.register(
                "penstock_scaling_decisions",
                "Decisions by direction and outcome",
                exported.decisions.clone(),
            );
            registry.register(
                "penstock_decision_commit_seconds",
                "From the gateway closing a second to the commit of the decision that it causes",
                exported.commit_seconds.clone(),
            );
        });
        exported
    }

    pub fn count(&self, decision: &Decision) {
        let labels = Labels {
            endpoint: decision.deployment.endpoint.to_string(),
            deployment: decision.deployment.deployment.to_string(),
            direction: match decision.granted.cmp(&decision.from) {
                std::cmp::Ordering::Greater => "out",
                std::cmp::Ordering::Less => "in",
                std::cmp::Ordering::Equal => "none",
            },
            outcome: outcome_name(decision.outcome),
        };
        self.decisions.get_or_create(&labels).inc();
    }

    pub fn committed_after(&self, delay: Span) {
        self.commit_seconds.observe(delay.millis() as f64 / 1000.0);
    }
}

/// Returns the name that the API uses.
fn outcome_name(outcome: DecisionOutcome) -> String {
    let json = serde_json::to_value(outcome).ok();
    json.as_ref()
        .and_then(|json| json.as_str())
        .unwrap_or("unknown")
        .to_owned()
}
