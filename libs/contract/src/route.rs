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
    pub endpoint: EndpointKey,
    pub revision: Position,
    /// The position of the stream of members by which slots were dealt. Apart from the revision:
    /// that one vouches for the endpoint's own events.
    #[serde(default)]
    pub members: Position,
    /// None: the endpoint is gone.
    pub route: Option<Route>,
}

impl RouteUpdate {
    pub fn bucket(&self) -> Bucket {
        self.endpoint.bucket()
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    pub endpoint_uid: Uid,
    pub auth: AuthMode,
    /// SHA-256 of each key that is valid (primary, secondary), in hexadecimal.
    pub key_hashes: Vec<String>,
    pub model_client_errors: ModelClientErrors,
    pub request_bytes_max: u64,
    pub deployments: BTreeMap<Name, DeploymentRoute>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentRoute {
    pub uid: Uid,
    /// Share of live traffic in percent.
    pub percent: u8,
    pub request_settings: RequestSettings,
    /// Latency thresholds, in microseconds, that objectives name; frames count exactly below them.
    pub latency_thresholds_us: Vec<u64>,
    pub instances: Vec<InstanceRoute>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRoute {
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
