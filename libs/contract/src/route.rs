//! Routes: a complete snapshot of what a gateway needs to serve one endpoint. Revisions are log
//! positions; a gateway ignores an older revision.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Bucket, EndpointKey, InstanceId, Name, Position, Uid};
use crate::resources::{
    AuthMode, Authorization, ErrorMapping, ModelClientErrors, Protocol, RequestSettings, Routes,
};

/// A message on the routes topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteUpdate {
    /// The endpoint of the route.
    pub endpoint: EndpointKey,
    /// The position of the endpoint's last event in the route; a lower one is stale.
    pub revision: Position,
    /// The position of the members stream that slots were allocated by. Separate from the revision,
    /// which covers the endpoint's own events only.
    #[serde(default)]
    pub members: Position,
    /// The route; `None` if the endpoint has been deleted.
    pub route: Option<Route>,
}

impl RouteUpdate {
    /// The bucket of its endpoint.
    pub fn bucket(&self) -> Bucket {
        self.endpoint.bucket()
    }
}

/// All that a gateway needs to know about an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Its incarnation.
    pub endpoint_uid: Uid,
    /// Whether clients must present a key.
    pub auth: AuthMode,
    /// SHA-256 of each valid key (primary, secondary), in hexadecimal.
    pub key_hashes: Vec<String>,
    /// How a 4xx response of the model counts.
    pub model_client_errors: ModelClientErrors,
    /// Maximum size of a request body, in bytes.
    pub request_bytes_max: u64,
    /// Every deployment, including those without traffic: clients may request them by name.
    pub deployments: BTreeMap<Name, Box<DeploymentRoute>>,
}

/// All that a gateway needs to know about a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentRoute {
    /// Its incarnation.
    pub uid: Uid,
    /// The share of live traffic, in percent.
    pub percent: u8,
    /// Timeouts and concurrency.
    pub request_settings: RequestSettings,
    /// The paths that it serves; `None`: `/score` and what is below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routes: Option<Routes>,
    /// How failures are answered.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub error_mapping: ErrorMapping,
    /// What requests and answers mean.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub protocol: Protocol,
    /// What instances get of a client's `authorization` header.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub authorization: Authorization,
    /// Latency thresholds of objectives, in microseconds. Frames hold exact counts for them.
    pub latency_thresholds_us: Vec<u64>,
    /// Instances that accept requests or are still draining.
    pub instances: Vec<InstanceRoute>,
}

/// The address of an instance, and the share of it that each gateway may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRoute {
    /// The id of the instance.
    pub id: InstanceId,
    /// `host:port`.
    pub address: String,
    /// Whether the instance is draining: it gets no new requests, and the gateway reports those still in
    /// flight.
    pub draining: bool,
    /// Maximum concurrent requests, by gateway; `*` for every gateway that is not listed.
    pub slots: BTreeMap<String, u32>,
}

/// The key in `slots` for every gateway that is not listed.
pub const ANY_GATEWAY: &str = "*";
