//! The metrics of control.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use runtime::metrics::Metrics;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    pub route: &'static str,
    pub method: String,
    pub code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct InstanceLabels {
    pub endpoint: String,
    pub deployment: String,
    pub state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DeploymentLabels {
    pub endpoint: String,
    pub deployment: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ConditionLabels {
    pub endpoint: String,
    pub deployment: String,
    pub reason: &'static str,
}

#[derive(Clone, Debug, Default)]
pub struct ControlMetrics {
    pub calls: Family<CallLabels, Counter>,
    pub instances: Family<InstanceLabels, Gauge>,
    pub conditions: Family<ConditionLabels, Gauge>,
    pub failures: Family<DeploymentLabels, Gauge>,
    pub slots_excess: Family<DeploymentLabels, Gauge>,
    /// Seconds from an event's time until its rows are written.
    pub event_lag: Gauge<f64, AtomicU64>,
    pub position: Gauge,
}

impl ControlMetrics {
    pub fn new(metrics: &Metrics) -> Self {
        let this = Self::default();
        metrics.register(|registry| {
            registry.register(
                "penstock_control_requests",
                "Requests to the control API, by route and status",
                this.calls.clone(),
            );
            registry.register(
                "penstock_instances",
                "Instances by deployment and state",
                this.instances.clone(),
            );
            registry.register(
                "penstock_deployment_condition",
                "1 for the present reason of the condition Available of a deployment, 0 for the other reasons",
                this.conditions.clone(),
            );
            registry.register(
                "penstock_failures_in_a_row",
                "Instances of the present revision of a deployment that have failed since one of them last became ready",
                this.failures.clone(),
            );
            registry.register(
                "penstock_slots_excess",
                "Requests that all gateways together may have on one instance beyond its limit, at worst",
                this.slots_excess.clone(),
            );
            registry.register(
                "penstock_event_lag_seconds",
                "From the time of the newest event to its read models",
                this.event_lag.clone(),
            );
            registry.register(
                "penstock_read_model_position",
                "Position of the newest event that the read models show",
                this.position.clone(),
            );
        });
        this
    }
}
