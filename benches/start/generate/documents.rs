//! The documents that users apply.

use contract::ids::{DeploymentRef, Name};
use contract::resources::{AutoscaleSpec, DeploymentSpec, EndpointSpec};
use serde_json::{Value, json};

/// The configuration of an endpoint; drawn once, and the same in every incarnation.
#[derive(Clone, Copy, Debug)]
pub struct EndpointShape {
    pub has_key: bool,
    /// A second deployment next to `blue`.
    pub green: Green,
    /// The policy of `blue`; `None` for a fixed count.
    pub policy: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Green {
    None,
    /// Gets a tenth of the traffic.
    Live,
    /// Gets copies of half of it.
    Mirrored,
}

/// Number of policy variants.
pub const POLICIES: usize = 5;

impl EndpointShape {
    pub fn draw(rng: &mut fastrand::Rng) -> Self {
        Self {
            has_key: rng.u32(0..4) > 0,
            green: match rng.u32(0..20) {
                0..3 => Green::Live,
                3 => Green::Mirrored,
                _ => Green::None,
            },
            policy: (rng.u32(0..10) > 0).then(|| rng.usize(0..POLICIES)),
        }
    }
}

pub fn endpoint(shape: EndpointShape) -> serde_json::Result<EndpointSpec> {
    let auth = if shape.has_key { "key" } else { "none" };
    serde_json::from_value(json!({ "auth": auth }))
}

/// `release` is in the environment, so a new one replaces the instances.
pub fn deployment(release: u64, instances: u32) -> serde_json::Result<DeploymentSpec> {
    serde_json::from_value(json!({
        "backend": "simulated",
        "instanceType": "cpu-small",
        "env": {"MODEL_RELEASE": release.to_string(), "LOG_LEVEL": "info"},
        "simulated": {"startDelay": "2s"},
        "instances": instances,
        "requestSettings": {"timeout": "10s", "maxConcurrentRequestsPerInstance": 4},
        "readinessProbe": {"path": "/health/ready"},
    }))
}

/// A policy; `revision` shifts a threshold, as users do.
pub fn policy(
    endpoint: &Name,
    deployment: &Name,
    shape: usize,
    revision: u64,
) -> serde_json::Result<AutoscaleSpec> {
    let (rules, more) = match shape {
        0 => (concurrency(revision), None),
        1 => (latency(revision), None),
        2 => (follow(revision), None),
        3 => (concurrency(revision), Some(office_hours())),
        _ => (cpu(revision), None),
    };
    let default = json!({
        "name": "default",
        "capacity": {"min": 1, "max": 12, "default": 1},
        "rules": rules,
    });
    let profiles: Vec<Value> = [default].into_iter().chain(more).collect();
    let target = DeploymentRef {
        endpoint: endpoint.clone(),
        deployment: deployment.clone(),
    };
    serde_json::from_value(json!({
        "target": target,
        "cooldown": {"out": "30s", "in": "2m"},
        "stabilization": {"in": "3m"},
        "profiles": profiles,
    }))
}

fn metric(name: &str, window: &str, per_instance: bool) -> Value {
    json!({"name": name, "window": window, "aggregation": "average", "perInstance": per_instance})
}

fn concurrency(revision: u64) -> Value {
    let threshold = 3 + revision % 2;
    json!([
        {"name": "busy", "metric": metric("concurrency", "30s", true), "when": format!("> {threshold}"),
         "scale": {"direction": "out", "by": "50%"}},
        {"name": "idle", "metric": metric("concurrency", "2m", true), "when": "< 1",
         "scale": {"direction": "in", "by": "50%"}},
    ])
}

fn latency(revision: u64) -> Value {
    let threshold = 140 + revision % 3 * 20;
    json!([
        {"name": "slow", "metric": metric("latency_p95", "1m", false), "when": format!("> {threshold}ms"),
         "scale": {"direction": "out", "steps": [
             {"above": format!("{threshold}ms"), "by": 1}, {"above": "400ms", "by": 3}]}},
        {"name": "busy", "metric": metric("concurrency", "30s", true), "when": "> 6",
         "scale": {"direction": "out", "by": 1}},
        {"name": "idle", "metric": metric("concurrency", "5m", true), "when": "< 1",
         "scale": {"direction": "in", "by": 1}},
    ])
}

fn follow(revision: u64) -> Value {
    json!([
        {"name": "follow", "metric": metric("requests_per_second", "60s", false),
         "track": {"target": 24 + revision % 4, "tolerance": "10%"}},
    ])
}

fn cpu(revision: u64) -> Value {
    let threshold = 60 + revision % 3 * 5;
    json!([
        {"name": "hot", "metric": metric("cpu_utilization", "1m", false), "when": format!("> {threshold}"),
         "scale": {"direction": "out", "by": 2}},
        {"name": "cold", "metric": metric("cpu_utilization", "5m", false), "when": "< 20",
         "scale": {"direction": "in", "by": 1, "cooldown": "3m"}},
        {"name": "errors", "metric": metric("error_ratio", "1m", false), "when": "> 0.2",
         "scale": {"direction": "out", "by": 1}},
    ])
}

fn office_hours() -> Value {
    json!({
        "name": "office-hours",
        "schedule": {"cron": "0 9 * * Mon-Fri", "duration": "9h", "timeZone": "Europe/Paris"},
        "priority": 10,
        "capacity": {"min": 2, "max": 20, "default": 2},
    })
}
