//! Measurements: one frame per source, bucket and second, also when there was nothing to measure.
//! An absent entry means zero; an absent frame means no data.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::histogram::Histogram;
use crate::ids::{Bucket, EndpointKey, InstanceId, Name, Position, Uid};
use crate::resources::BackendKind;
use crate::time::Timestamp;

/// Who sends frames.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct Source {
    pub kind: SourceKind,
    /// Stable over restarts.
    pub id: String,
}

#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// Requests, latencies, in-flight.
    Gateway,
    /// CPU and memory of instances.
    Node,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frame {
    pub source: Source,
    /// New at each start of the source.
    pub boot: Uuid,
    /// Counts from 0 per boot and bucket, without holes.
    pub sequence: u64,
    pub bucket: Bucket,
    /// The second that is measured, on the source's clock; a whole second.
    pub start: Timestamp,
    /// Its true length by a monotonic clock, in microseconds.
    pub length_us: u64,
    /// The revision of each endpoint's route that the gateway has reached, in all its threads. By
    /// endpoint: a bucket's highest would also vouch for updates that were lost.
    pub routes: BTreeMap<EndpointKey, Position>,
    /// How far, by positions of the stream of members, the slots of every route of the bucket were
    /// dealt anew that the gateway has reached.
    #[serde(default)]
    pub members: Position,
    /// Who the source is; stands in the frames of bucket 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hello: Option<Hello>,
    /// The last frame of a source that leaves on purpose.
    pub goodbye: bool,
    pub deployments: Vec<DeploymentFrame>,
}

/// What others need to know of a source to make it a member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hello {
    /// Where its admin listener answers, as a URL.
    pub address: Option<String>,
    /// What a node can run; empty for a gateway.
    pub backends: Vec<BackendKind>,
}

/// Roles under which requests are counted and instances are paid for.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Live,
    Shadow,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentFrame {
    pub endpoint: EndpointKey,
    pub deployment: Name,
    pub deployment_uid: Uid,
    pub role: Role,
    /// Requests that ended in this second.
    pub outcomes: Outcomes,
    /// Requests that arrived in this second, whatever became of them, refused ones included.
    pub arrivals: u64,
    /// Sum over requests of the time each was being served (not queued) in this second, in microseconds.
    pub in_flight_us: u64,
    pub in_flight_max: u32,
    /// The same for the time spent waiting for an instance.
    pub queued_us: u64,
    pub queued_max: u32,
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// Exact counts of answers at or below each threshold (microseconds) that an objective names.
    pub at_or_below: BTreeMap<u64, u64>,
    /// From the request's arrival to the last byte of the answer, of requests that count in SLIs.
    pub latency: Histogram,
    pub instances: Vec<InstanceFrame>,
}

/// Requests by what became of them; the contract's table says which are good, bad or not counted.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct Outcomes {
    /// The model answered 2xx or 3xx.
    pub success: u64,
    /// The model answered 4xx (424).
    pub model_client_error: u64,
    /// The model answered 5xx (424).
    pub model_server_error: u64,
    /// Longer than the timeout (408).
    pub timeout: u64,
    /// Instance unreachable or broke off (502).
    pub unreachable: u64,
    /// No instance ready in time (503).
    pub unavailable: u64,
    /// Our fault (500).
    pub internal: u64,
    /// Too many pending, queue full or queued too long (429).
    pub too_many_pending: u64,
    /// Refused for the caller's reasons (400 401 403 404 413 429).
    pub refused: u64,
    /// The client left before the answer was whole.
    pub client_left: u64,
}

impl Outcomes {
    pub fn add(&mut self, other: &Self) {
        self.success += other.success;
        self.model_client_error += other.model_client_error;
        self.model_server_error += other.model_server_error;
        self.timeout += other.timeout;
        self.unreachable += other.unreachable;
        self.unavailable += other.unavailable;
        self.internal += other.internal;
        self.too_many_pending += other.too_many_pending;
        self.refused += other.refused;
        self.client_left += other.client_left;
    }

    /// Everything, counted or not.
    pub fn total(&self) -> u64 {
        self.counted() + self.refused + self.client_left
    }

    /// What SLIs and error ratios count.
    pub fn counted(&self) -> u64 {
        self.success + self.model_client_error + self.bad()
    }

    /// Bad whatever the endpoint says about the model's 4xx.
    pub fn bad(&self) -> u64 {
        self.model_server_error
            + self.timeout
            + self.unreachable
            + self.unavailable
            + self.internal
            + self.too_many_pending
    }
}

/// One instance in one second: by a gateway its requests, by a node its resources.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceFrame {
    pub id: InstanceId,
    /// Time with at least one request on it, from this gateway, in microseconds.
    pub busy_us: u64,
    /// Requests on it when the second closed.
    pub in_flight: u32,
    /// Requests that ended on it in this second.
    pub requests: u64,
    /// CPU time used in this second, in microseconds; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<u64>,
    /// Resident memory at the end of the second, in bytes; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}
