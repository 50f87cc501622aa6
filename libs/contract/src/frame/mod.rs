//! Measurements: one frame per source, bucket and second, even if there was nothing to measure. An
//! absent entry means zero; an absent frame means no data.
//!
//! Invariant: a frame is read according to its version, or not at all. [`Frame::decode`] upcasts frames
//! of an older version and identifies those of a newer one; a reader of version 1 rejects any deployment
//! entry of version 2.

mod counts;
mod wire;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::histogram::Histogram;
use crate::ids::{Bucket, EndpointKey, InstanceId, Name, Position, Uid};
use crate::resources::BackendKind;
use crate::time::Timestamp;

pub use crate::open_names::{Measure, Role, SourceKind};
pub use counts::{AtOrBelow, Outcomes, StatusClasses, Tokens};
pub(crate) use counts::{
    add_each, add_thresholds, cancel, cancel_each, cancel_thresholds, is_zero,
};
pub use wire::{FRAME_VERSION, FrameError, FrameHeader, FrameReadError};

/// The version of the definitions by which this release measures; raised when a count or value changes
/// its meaning. 1: latency is that of answers by the model, and nodes report readiness and memory limits.
pub const DEFINITIONS: u32 = 1;

/// Who sends frames.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct Source {
    /// The kind of the source, which determines what it measures.
    pub kind: SourceKind,
    /// Stable across restarts.
    pub id: String,
}

/// The measurements of one source in one bucket and second, or part of a second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frame {
    /// The source that measured it.
    pub source: Source,
    /// New at each start of the source.
    pub boot: Uuid,
    /// Counts from 0 per boot and bucket, without gaps.
    pub sequence: u64,
    /// The bucket of all endpoints in it.
    pub bucket: Bucket,
    /// The start of the measured second, by the source's clock; a whole second.
    pub start: Timestamp,
    /// The actual length by a monotonic clock, in microseconds.
    pub length_us: u64,
    /// The revision of each endpoint's route that all threads of the gateway have applied. By endpoint:
    /// the highest of a bucket would also cover updates that were lost.
    pub routes: BTreeMap<EndpointKey, Position>,
    /// The position of the members stream up to which slots are allocated in every route of the bucket
    /// that the gateway has applied.
    #[serde(default)]
    pub members: Position,
    /// Describes the source; set in the frames of bucket 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hello: Option<Hello>,
    /// Whether this is the last frame of a source that leaves deliberately.
    pub goodbye: bool,
    /// Deployments with something to report; absent ones are zero.
    pub deployments: Vec<DeploymentFrame>,
}

/// What other services need to know about a source to make it a member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hello {
    /// The URL of its admin listener.
    pub address: Option<String>,
    /// The backends that a node offers; empty for a gateway.
    pub backends: Vec<BackendKind>,
}

/// One deployment in one role, in one second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentFrame {
    /// The endpoint of the deployment.
    pub endpoint: EndpointKey,
    /// Its name, unique within the endpoint.
    pub deployment: Name,
    /// Its incarnation: a deleted name inherits nothing.
    pub deployment_uid: Uid,
    /// The role of the requests, such as live traffic.
    pub role: Role,
    /// The [`DEFINITIONS`] that it was measured by; 0 in frames of releases that had none.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub definitions: u32,
    /// Requests that ended in this second.
    pub outcomes: Outcomes,
    /// Requests that arrived in this second, whatever their outcome, including refused ones.
    pub arrivals: u64,
    /// Requests that ended in this second, by class of the status sent to the client; requests without a
    /// status are in no class.
    #[serde(default, skip_serializing_if = "StatusClasses::is_empty")]
    pub status_classes: StatusClasses,
    /// Time for which requests were served (not queued) in this second, summed over requests, in
    /// microseconds.
    pub in_flight_us: u64,
    /// Maximum number of requests served concurrently.
    pub in_flight_max: u32,
    /// Age at the end of the second of the oldest request that has not ended, including queued ones, in
    /// microseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub oldest_in_flight_us: u64,
    /// Time for which requests waited for an instance in this second, summed over requests, in
    /// microseconds.
    pub queued_us: u64,
    /// Maximum number of requests that waited concurrently.
    pub queued_max: u32,
    /// Bytes received of the bodies of requests that ended.
    pub request_bytes: u64,
    /// Bytes forwarded of the bodies of responses that ended.
    pub response_bytes: u64,
    /// Exact counts of good responses at or below each threshold of an objective. Omitted if empty, so that
    /// readers of version 1, which require it, reject the frame.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub at_or_below: AtOrBelow,
    /// Time from the request's arrival to the last byte of the response, for requests that the model
    /// answered or that timed out. A refusal is not an answer.
    pub latency: Histogram,
    /// Tokens; `None` if they were not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Tokens>,
    /// Its instances with something to report.
    pub instances: Vec<InstanceFrame>,
}

impl DeploymentFrame {
    /// A frame without any measurements, by the definitions of this release.
    pub fn new(endpoint: EndpointKey, deployment: Name, deployment_uid: Uid, role: Role) -> Self {
        Self {
            endpoint,
            deployment,
            deployment_uid,
            role,
            definitions: DEFINITIONS,
            outcomes: Outcomes::default(),
            arrivals: 0,
            status_classes: StatusClasses::default(),
            in_flight_us: 0,
            in_flight_max: 0,
            oldest_in_flight_us: 0,
            queued_us: 0,
            queued_max: 0,
            request_bytes: 0,
            response_bytes: 0,
            at_or_below: AtOrBelow::new(),
            latency: Histogram::default(),
            tokens: None,
            instances: Vec::new(),
        }
    }
}

/// One instance in one second: its requests if sent by a gateway, its resources if sent by a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceFrame {
    /// The id of the instance.
    pub id: InstanceId,
    /// Time with at least one request from this gateway in flight, in microseconds.
    pub busy_us: u64,
    /// Time in flight, summed over requests, by role, in microseconds: busy time alone cannot be divided
    /// among concurrent requests.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub in_flight_us: BTreeMap<Role, u64>,
    /// Requests in flight at the end of the second.
    pub in_flight: u32,
    /// Requests that ended on it in this second.
    pub requests: u64,
    /// CPU time used in this second, in microseconds; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<u64>,
    /// Time since it became ready, without interruption, at the end of the second, in microseconds; `None`
    /// if it is not ready, or on its way out; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_for_us: Option<u64>,
    /// Resident memory at the end of the second, in bytes; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Memory that it may use, in bytes: its own limit, or else the memory of its node; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit_bytes: Option<u64>,
    /// Time for which its GPUs were busy in this second, summed over GPUs, in microseconds; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_us: Option<u64>,
    /// Memory used on its GPUs at the end of the second, in bytes; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_bytes: Option<u64>,
}

impl InstanceFrame {
    /// A frame without any measurements.
    pub fn new(id: InstanceId) -> Self {
        Self {
            id,
            busy_us: 0,
            in_flight_us: BTreeMap::new(),
            in_flight: 0,
            requests: 0,
            cpu_us: None,
            ready_for_us: None,
            memory_bytes: None,
            memory_limit_bytes: None,
            gpu_us: None,
            gpu_memory_bytes: None,
        }
    }
}
