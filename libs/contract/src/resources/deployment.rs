//! `kind: Deployment`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

pub use crate::open_names::{BackendKind, InvalidBackendKind};
use crate::time::Span;

/// Maximum number of instances of a deployment.
pub const INSTANCES_MAX: u32 = 1000;

/// What the instances of a deployment run, and how requests are sent to them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeploymentSpec {
    /// The backend that runs the instances.
    pub backend: BackendKind,
    /// The instance type: a row of the price sheet.
    pub instance_type: String,
    /// The region of the machine, as the price sheet names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// How the machine is paid for.
    #[serde(default)]
    pub purchase: Purchase,
    /// The model server that the command starts. It sets what the document leaves out of `routes`, probes, `env`,
    /// `requestSettings`, `startupTimeout`, `protocol` and `errorMapping`, as that server needs it; the values
    /// are stored with the deployment when the document is applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<Server>,
    /// Program and arguments of an instance; `{port}` is replaced by the port it must listen on, `{host}`
    /// by the address. Both are replaced in `env` too, and are in the variables `PORT` and `HOST`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// The environment of instances. Names that begin with `PENSTOCK_` are reserved.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, EnvValue>,
    /// Parameters of the simulated backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub simulated: Option<SimulatedSpec>,
    /// The fixed count, used if no Autoscale applies.
    #[serde(default = "default_instances")]
    pub instances: u32,
    /// Timeouts and concurrency.
    #[serde(default)]
    pub request_settings: RequestSettings,
    /// Which paths of the endpoint are served, and the paths of an instance that they reach. By default
    /// `/score` and what is below it, which reach the same paths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routes: Option<Routes>,
    /// What requests and answers mean; http by default. With `errorMapping: pass`, it decides the shape of
    /// errors of Penstock itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// How failures are answered; azure by default, and pass for the servers openai, vllm, open-inference and
    /// triton.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_mapping: Option<ErrorMapping>,
    /// What instances get of a client's `authorization` header; strip by default.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub authorization: Authorization,
    /// How long an instance that gets no new requests may take to finish those in flight, before it is
    /// stopped regardless; the longest that a request may take by default. 0s to 1d.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_timeout: Option<Span>,
    /// How long an instance may take from its start to ready, while its process runs; then it is ended and
    /// started again. 1s to 1d; 10m by default, or `initialDelay` and `failureThreshold` times `period` of
    /// `readinessProbe` if that is longer. A change holds for instances started after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup_timeout: Option<Span>,
    /// Determines whether an instance gets requests: for the first time after its start, and whether one
    /// that was ready still does.
    #[serde(default = "ProbeSpec::readiness")]
    pub readiness_probe: ProbeSpec,
    /// Determines whether an instance is replaced: one that fails it gets no new requests, its requests in
    /// flight may end, and a replacement starts, for one instance of the deployment at a time. None by
    /// default; probed only once the instance has been ready. Fields left out are as in `readinessProbe`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness_probe: Option<ProbeSpec>,
}

/// Large models take minutes to load.
const STARTUP_TIMEOUT_DEFAULT: Span = Span::from_secs(600);

impl DeploymentSpec {
    /// How failures are answered.
    pub fn error_mapping(&self) -> ErrorMapping {
        self.error_mapping.unwrap_or_default()
    }

    /// How long an instance may take from its start to ready.
    pub fn startup_limit(&self) -> Span {
        // Readiness limited the start before there was a limit of its own.
        let probe = &self.readiness_probe;
        let by_readiness = probe.initial_delay.millis() + probe.longest_streak().millis();
        let default = STARTUP_TIMEOUT_DEFAULT.max(Span::from_millis(by_readiness));
        self.startup_timeout.unwrap_or(default)
    }
}

fn default_instances() -> u32 {
    1
}

/// A model server that Penstock knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Server {
    /// Any other: nothing is set.
    Generic,
    /// MLflow: `mlflow models serve`.
    Mlflow,
    /// MLServer, or another server of the Open Inference Protocol.
    OpenInference,
    /// NVIDIA Triton.
    Triton,
    /// A server of OpenAI's API.
    Openai,
    /// vLLM's server of OpenAI's API.
    Vllm,
    /// TorchServe.
    Torchserve,
    /// BentoML: `bentoml serve`.
    Bentoml,
    /// LitServe.
    Litserve,
    /// Azure Machine Learning's inference server, with a scoring script.
    Azureml,
}

impl Server {
    /// The server as a document names it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Mlflow => "mlflow",
            Self::OpenInference => "open-inference",
            Self::Triton => "triton",
            Self::Openai => "openai",
            Self::Vllm => "vllm",
            Self::Torchserve => "torchserve",
            Self::Bentoml => "bentoml",
            Self::Litserve => "litserve",
            Self::Azureml => "azureml",
        }
    }
}

/// What the requests and answers of a server mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// Anything.
    #[default]
    Http,
    /// OpenAI's API.
    Openai,
    /// The Open Inference Protocol: tensors.
    OpenInference,
}

/// How a machine is paid for, which determines its price.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Purchase {
    /// By the hour, without commitment.
    #[default]
    OnDemand,
    /// Cheaper, but may be reclaimed.
    Spot,
    /// For a year or more, paid for whether used or not.
    Reserved,
    /// A committed amount per hour, whatever it is used for.
    SavingsPlan,
}

/// What instances get of a client's `authorization` header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Authorization {
    /// Nothing: it is for the gateway, which has checked it.
    #[default]
    Strip,
    /// All of it, the endpoint's key included: for a server that checks it itself, usually behind an
    /// endpoint with `auth: none`.
    Pass,
}

/// A plain value, or a reference that is resolved where it is used. The resolved value is never stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum EnvValue {
    /// The value itself; stored and shown.
    Plain(String),
    /// A reference that the node resolves.
    Secret(SecretRef),
}

/// Implemented by hand, because the derived implementation for untagged enums cannot say what is wrong.
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

/// A reference to a secret, on the node that starts the instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretRef {
    /// `env:NAME` or `file:PATH`.
    pub secret_ref: String,
}

/// How a gateway sends requests to instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RequestSettings {
    /// Maximum time from the dispatch of a request to the first byte of the response, not counting the time
    /// in which its body is sent; 408 if exceeded, or 504 with `errorMapping: pass`. Without `maxDuration` it
    /// is also the maximum time to the last byte, the sending of the body included. 1ms to 1h; 5s by default.
    pub timeout: Span,
    /// Maximum time without a byte of the response, or of a request's body while it is received. 1ms to 1h;
    /// by default 60s if `maxDuration` is set, and unlimited otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_idle_timeout: Option<Span>,
    /// Maximum time from the dispatch of a request to the last byte of the response. `timeout` to 1d; equal
    /// to `timeout` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_duration: Option<Span>,
    /// Maximum concurrent requests per instance, over all gateways; 1 by default.
    pub max_concurrent_requests_per_instance: u32,
    /// How long a request may wait for an instance before it is answered 429 or 503; 500ms by default.
    pub max_queue_wait: Span,
    /// How long a connection to an instance may be idle before the gateway closes it. Keep it below the
    /// server's own keep-alive timeout, so that no request races a close. 0s: a new connection per request.
    #[serde(skip_serializing_if = "is_keep_alive_idle_default")]
    pub keep_alive_idle: Span,
}

/// Below the 5 s of uvicorn, Hypercorn and Node.js. A server that keeps connections for 2 s or less
/// (gunicorn) needs a lower value.
const KEEP_ALIVE_IDLE_DEFAULT: Span = Span::from_secs(2);

/// As in nginx, Envoy and most load balancers, within a factor of five.
const STREAM_IDLE_DEFAULT: Span = Span::from_secs(60);

impl RequestSettings {
    /// Maximum time from the dispatch of a request to the last byte of the response.
    pub fn longest_request(&self) -> Span {
        self.max_duration.unwrap_or(self.timeout)
    }

    /// Maximum time without a byte, in either direction; `None` if only the whole request is limited, as
    /// it was before there was a `max_duration`.
    pub fn stream_idle(&self) -> Option<Span> {
        let default = self.max_duration.map(|_| STREAM_IDLE_DEFAULT);
        self.stream_idle_timeout.or(default)
    }
}

fn is_keep_alive_idle_default(idle: &Span) -> bool {
    *idle == KEEP_ALIVE_IDLE_DEFAULT
}

impl Default for RequestSettings {
    fn default() -> Self {
        Self {
            timeout: Span::from_secs(5),
            stream_idle_timeout: None,
            max_duration: None,
            max_concurrent_requests_per_instance: 1,
            max_queue_wait: Span::from_millis(500),
            keep_alive_idle: KEEP_ALIVE_IDLE_DEFAULT,
        }
    }
}

/// Which paths of the endpoint reach which paths of an instance. Queries are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Routes {
    /// The path that `/score` reaches, beginning with `/`; `/score` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scoring: Option<String>,
    /// What every other path is appended to, beginning with `/`; with `/`, it reaches the same path. By
    /// default no other path is served, except what is below `/score` if `scoring` is not set either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// The methods whose requests count in metrics, besides POST: as requests, in error ratios, in
    /// latencies. Requests with other methods are served too, and occupy an instance while they are in
    /// flight.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub counted_methods: BTreeSet<HttpMethod>,
}

/// A method of HTTP.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum HttpMethod {
    /// Reads.
    Get,
    /// Reads the headers only.
    Head,
    /// Sends data to be processed.
    Post,
    /// Stores or replaces.
    Put,
    /// Changes a part.
    Patch,
    /// Removes.
    Delete,
    /// Asks what is possible.
    Options,
    /// Asks for the request as it was received.
    Trace,
}

impl HttpMethod {
    /// The method as it is written in a request.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
            Self::Options => "OPTIONS",
            Self::Trace => "TRACE",
        }
    }
}

/// How failures are answered. What counts as good or bad does not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ErrorMapping {
    /// As Azure does: an error of the model is 424, with the model's status in `penstock-model-status`, and
    /// its timeout 408. Errors of Penstock itself are problem documents.
    #[default]
    Azure,
    /// The model's own status, with `penstock-error-code: model-error`; its timeout is 504. Errors of
    /// Penstock itself have the shape of OpenAI's, `{"error": {"message", "type", "code"}}`, and with
    /// `protocol: open-inference` of that protocol's, `{"error": "message"}`.
    Pass,
}

/// What a probe does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProbeProtocol {
    /// Sends a GET request; a status of 200 to 399 is a success.
    #[default]
    Http,
    /// Opens a connection; that it is accepted is a success. Says nothing about the model.
    Tcp,
    /// Asks gRPC's standard health service, `grpc.health.v1.Health/Check`, without TLS; SERVING is a success.
    Grpc,
}

impl ProbeProtocol {
    fn is_http(&self) -> bool {
        *self == Self::Http
    }
}

/// A probe of an instance, which succeeds within `timeout` or fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProbeSpec {
    /// What the probe does; http by default.
    #[serde(skip_serializing_if = "ProbeProtocol::is_http")]
    pub protocol: ProbeProtocol,
    /// Path and query of the GET request, beginning with `/`; `/` by default. Only for http.
    pub path: String,
    /// The service whose health is asked for; the server as a whole by default. Only for grpc.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub service: String,
    /// Time from the start of the process to the first probe.
    pub initial_delay: Span,
    /// Time from one probe to the next.
    pub period: Span,
    /// Maximum time for a response.
    pub timeout: Span,
    /// Consecutive successes after which a failing probe passes.
    pub success_threshold: u32,
    /// Consecutive failures after which a passing probe fails.
    pub failure_threshold: u32,
}

const DEFAULT_PATH: &str = "/";

impl ProbeSpec {
    /// The default readiness probe: every second from the start.
    pub fn readiness() -> Self {
        Self {
            protocol: ProbeProtocol::Http,
            path: DEFAULT_PATH.into(),
            service: String::new(),
            initial_delay: Span::ZERO,
            period: Span::from_secs(1),
            timeout: Span::from_secs(2),
            success_threshold: 1,
            failure_threshold: 30,
        }
    }

    /// The time in which `failure_threshold` probes fail.
    pub fn longest_streak(&self) -> Span {
        let probes = u64::from(self.failure_threshold.max(1));
        Span::from_millis(self.period.millis().saturating_mul(probes))
    }

    /// Whether the path is the one that a probe has if none is given.
    pub fn has_default_path(&self) -> bool {
        self.path == DEFAULT_PATH
    }

    /// Whether this is the liveness probe that specs had when nothing was asked for, before there could be
    /// none. It ended servers that do not answer `GET /`.
    pub fn is_former_liveness_default(&self) -> bool {
        let former = Self {
            period: Span::from_secs(10),
            ..Self::readiness()
        };
        *self == former
    }
}

impl Default for ProbeSpec {
    fn default() -> Self {
        Self::readiness()
    }
}

/// The behavior of simulated instances. The same spec and seed always behave the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SimulatedSpec {
    /// Time from start to ready.
    pub start_delay: Span,
    /// Number of failures per 10,000 starts.
    pub start_failures_per_10000: u32,
    /// Mean time from ready to a crash; 0s for never.
    pub mean_time_to_failure: Span,
    /// Requests per second that one instance can serve.
    pub capacity_per_second: u32,
    /// Seed of the random failures; 0 by default.
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
