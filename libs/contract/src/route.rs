//! What a gateway needs to serve one endpoint, whole, as one snapshot. Revisions are log positions;
//! a gateway ignores a lower one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Bucket, EndpointKey, InstanceId, Name, Position, Uid};
use crate::resources::{AuthMode, ModelClientErrors, RequestSettings};

/// A message on the routes topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteUpdate {
    /// Whose route it is.
    pub endpoint: EndpointKey,
    /// The position of the last event of the endpoint that went into it; a lower one is old.
    pub revision: Position,
    /// The position of the stream of members by which slots were dealt. Apart from the revision:
    /// that one vouches for the endpoint's own events.
    #[serde(default)]
    pub members: Position,
    /// None: the endpoint is gone.
    pub route: Option<Route>,
}

impl RouteUpdate {
    /// The bucket of its endpoint.
    pub fn bucket(&self) -> Bucket {
        self.endpoint.bucket()
    }
}

/// All that a gateway needs to know of an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Its incarnation.
    pub endpoint_uid: Uid,
    /// Whether clients must show a key.
    pub auth: AuthMode,
    /// SHA-256 of each key that is valid (primary, secondary), in hexadecimal.
    pub key_hashes: Vec<String>,
    /// How a 4xx answer of the model counts.
    pub model_client_errors: ModelClientErrors,
    /// Largest body of a request, in bytes.
    pub request_bytes_max: u64,
    /// Every deployment, those without traffic too: they may be asked for by name.
    pub deployments: BTreeMap<Name, DeploymentRoute>,
}

/// All that a gateway needs to know of a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentRoute {
    /// Its incarnation.
    pub uid: Uid,
    /// Share of live traffic in percent.
    pub percent: u8,
    /// Time-outs and concurrency.
    pub request_settings: RequestSettings,
    /// Latency thresholds, in microseconds, that objectives name; frames count exactly below them.
    pub latency_thresholds_us: Vec<u64>,
    /// Those that may be asked, or still are.
    pub instances: Vec<InstanceRoute>,
}

/// Where an instance is, and how much of it each gateway has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRoute {
    /// Which one.
    pub id: InstanceId,
    /// `host:port`.
    pub address: String,
    /// No new requests; the gateway reports what is still in flight.
    pub draining: bool,
    /// Requests at once, by gateway; `*` for every gateway not named.
    pub slots: BTreeMap<String, u32>,
}

/// The key of `slots` that holds for every gateway not named.
pub const ANY_GATEWAY: &str = "*";
