//! `kind: Deployment`.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

pub use crate::open_names::{BackendKind, InvalidBackendKind};
use crate::time::Span;

/// Most instances that one deployment may have.
pub const INSTANCES_MAX: u32 = 1000;

/// What the instances of a deployment are, and how they are asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeploymentSpec {
    /// Where they run.
    pub backend: BackendKind,
    /// A row of the price sheet.
    pub instance_type: String,
    /// Where the machine stands, as the price sheet names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// How the machine is paid for.
    #[serde(default)]
    pub purchase: Purchase,
    /// Program and arguments of an instance; `{port}` is replaced by the port it must listen on, `{host}`
    /// by the address. Both are replaced in `env` too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Their environment; names that begin with `PENSTOCK_` are Penstock's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, EnvValue>,
    /// Parameters of the simulated backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub simulated: Option<SimulatedSpec>,
    /// The fixed count where no Autoscale applies.
    #[serde(default = "one")]
    pub instances: u32,
    /// Time-outs and concurrency.
    #[serde(default)]
    pub request_settings: RequestSettings,
    /// Whether an instance gets requests.
    #[serde(default = "ProbeSpec::readiness")]
    pub readiness_probe: ProbeSpec,
    /// Whether an instance is ended and replaced.
    #[serde(default = "ProbeSpec::liveness")]
    pub liveness_probe: ProbeSpec,
}

fn one() -> u32 {
    1
}

/// How a machine is paid for, which its price depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Purchase {
    /// By the hour, without a promise.
    #[default]
    OnDemand,
    /// Cheaper, and may be taken away.
    Spot,
    /// For a year or more, paid whether used or not.
    Reserved,
    /// An amount by the hour that is promised, whatever it is used for.
    SavingsPlan,
}

/// A plain value, or a reference that is resolved where it is used and never stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum EnvValue {
    /// The value itself; stored and shown.
    Plain(String),
    /// Where the node finds the value.
    Secret(SecretRef),
}

/// Written out, because the derived reader of untagged enums cannot say what is wrong.
impl<'de> Deserialize<'de> for EnvValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EnvVisitor)
    }
}

struct EnvVisitor;

impl<'de> Visitor<'de> for EnvVisitor {
    type Value = EnvValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text in quotes, or a mapping with secretRef")
    }

    fn visit_str<E>(self, text: &str) -> Result<EnvValue, E> {
        Ok(EnvValue::Plain(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<EnvValue, E> {
        Ok(EnvValue::Plain(text))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<EnvValue, A::Error> {
        SecretRef::deserialize(MapAccessDeserializer::new(map)).map(EnvValue::Secret)
    }
}

/// Where a secret is to be had, on the node that starts the instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretRef {
    /// `env:NAME` or `file:PATH`.
    pub secret_ref: String,
}

/// How a gateway asks instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RequestSettings {
    /// From the start of its service to the last byte of the answer; more is answered 408. 1ms to
    /// 1h, 5s unless given.
    pub timeout: Span,
    /// Requests at once on an instance, over all gateways; 1 unless given.
    pub max_concurrent_requests_per_instance: u32,
    /// How long a request may wait for an instance before it is answered 429 or 503; 500ms unless
    /// given.
    pub max_queue_wait: Span,
    /// How long a connection to an instance may rest before the gateway drops it: less than the
    /// server's own keep-alive, so that no request meets a close. 0s: a connection for each request.
    #[serde(skip_serializing_if = "is_keep_alive_idle_default")]
    pub keep_alive_idle: Span,
}

/// Below the 5 s of uvicorn, Hypercorn and Node.js. A server that keeps connections for 2 s or less
/// (gunicorn) wants less.
const KEEP_ALIVE_IDLE_DEFAULT: Span = Span::from_secs(2);

fn is_keep_alive_idle_default(idle: &Span) -> bool {
    *idle == KEEP_ALIVE_IDLE_DEFAULT
}

impl Default for RequestSettings {
    fn default() -> Self {
        Self {
            timeout: Span::from_secs(5),
            max_concurrent_requests_per_instance: 1,
            max_queue_wait: Span::from_millis(500),
            keep_alive_idle: KEEP_ALIVE_IDLE_DEFAULT,
        }
    }
}

/// How an instance is asked whether it can serve. An answer of 200 to 399 within `timeout` is a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProbeSpec {
    /// Path and query of the GET request, beginning with `/`.
    pub path: String,
    /// From the start of the process to the first probe.
    pub initial_delay: Span,
    /// From one probe to the next.
    pub period: Span,
    /// How long an answer may take.
    pub timeout: Span,
    /// So many successes in a row change a bad word to a good one.
    pub success_threshold: u32,
    /// So many failures in a row change a good word to a bad one.
    pub failure_threshold: u32,
}

impl ProbeSpec {
    /// The readiness probe of who writes none: every second from the start.
    pub fn readiness() -> Self {
        Self {
            path: "/".into(),
            initial_delay: Span::ZERO,
            period: Span::from_secs(1),
            timeout: Span::from_secs(2),
            success_threshold: 1,
            failure_threshold: 30,
        }
    }

    /// The liveness probe of who writes none: every 10 seconds.
    pub fn liveness() -> Self {
        Self {
            period: Span::from_secs(10),
            ..Self::readiness()
        }
    }
}

impl Default for ProbeSpec {
    fn default() -> Self {
        Self::readiness()
    }
}

/// How instances of the simulated backend behave. The same spec and seed always behave the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SimulatedSpec {
    /// From start to ready.
    pub start_delay: Span,
    /// Of 10,000 starts, how many fail.
    pub start_failures_per_10000: u32,
    /// Mean time from ready to a crash; 0s: never.
    pub mean_time_to_failure: Span,
    /// Requests per second that one instance can serve.
    pub capacity_per_second: u32,
    /// Another seed, another fate; 0 unless given.
    pub seed: u64,
}

impl Default for SimulatedSpec {
    fn default() -> Self {
        Self {
            start_delay: Span::from_secs(5),
            start_failures_per_10000: 0,
            mean_time_to_failure: Span::ZERO,
            capacity_per_second: 10,
            seed: 0,
        }
    }
}
