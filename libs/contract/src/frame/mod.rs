//! Measurements: one frame per source, bucket and second, also when there was nothing to measure.
//! An absent entry means zero; an absent frame means no data.
//!
//! Invariant: a frame is read as what its version says, or not at all. [`Frame::decode`] brings those
//! of an older version to the present shape, and names those of a newer one; a reader of version 1
//! refuses whatever version 2 says of a deployment.

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
pub use wire::{FRAME_VERSION, FrameError, FrameHead, Unread};

/// Who sends frames.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct Source {
    /// What it measures.
    pub kind: SourceKind,
    /// Stable over restarts.
    pub id: String,
}

/// What one source measured in one bucket and second, or in a part of the second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frame {
    /// Who measured it.
    pub source: Source,
    /// New at each start of the source.
    pub boot: Uuid,
    /// Counts from 0 per boot and bucket, without holes.
    pub sequence: u64,
    /// The bucket of all endpoints in it.
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
    /// Those of which there is something to say; absent ones are at zero.
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

/// One deployment in one role, in one second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentFrame {
    /// Whose deployment it is.
    pub endpoint: EndpointKey,
    /// Its name, unique within the endpoint.
    pub deployment: Name,
    /// Its incarnation: a deleted name inherits nothing.
    pub deployment_uid: Uid,
    /// What the requests were for, such as live traffic.
    pub role: Role,
    /// Requests that ended in this second.
    pub outcomes: Outcomes,
    /// Requests that arrived in this second, whatever became of them, refused ones included.
    pub arrivals: u64,
    /// Requests that ended in this second, by the class of the status that the client got; those that
    /// got none are in no class.
    #[serde(default, skip_serializing_if = "StatusClasses::is_empty")]
    pub status_classes: StatusClasses,
    /// Sum over requests of the time each was being served (not queued) in this second, in microseconds.
    pub in_flight_us: u64,
    /// Most requests that were being served at once.
    pub in_flight_max: u32,
    /// Time since the arrival of the oldest request that has not ended, queued ones included, when the
    /// second closed; in microseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub oldest_in_flight_us: u64,
    /// The same for the time spent waiting for an instance.
    pub queued_us: u64,
    /// Most requests that waited at once.
    pub queued_max: u32,
    /// Bytes of the bodies of requests that ended, as far as they came.
    pub request_bytes: u64,
    /// Bytes of the bodies of answers that ended, as far as they were passed on.
    pub response_bytes: u64,
    /// Exact counts of good answers at or below each threshold that an objective names. Left out where
    /// empty, and so refused by readers of version 1, which ask for it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub at_or_below: AtOrBelow,
    /// From the request's arrival to the last byte of the answer, of requests that count in SLIs.
    pub latency: Histogram,
    /// None: nobody looked for tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Tokens>,
    /// Its instances of which there is something to say.
    pub instances: Vec<InstanceFrame>,
}

impl DeploymentFrame {
    /// Nothing has happened.
    pub fn new(endpoint: EndpointKey, deployment: Name, deployment_uid: Uid, role: Role) -> Self {
        Self {
            endpoint,
            deployment,
            deployment_uid,
            role,
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

/// One instance in one second: by a gateway its requests, by a node its resources.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceFrame {
    /// Which one.
    pub id: InstanceId,
    /// Time with at least one request on it, from this gateway, in microseconds.
    pub busy_us: u64,
    /// Sum over requests of the time each was on it, in microseconds, by role: busy time alone cannot
    /// be shared out where several run at once.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub in_flight_us: BTreeMap<Role, u64>,
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
    /// Sum over its GPUs of the time each was busy in this second, in microseconds; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_us: Option<u64>,
    /// Memory held on its GPUs at the end of the second, in bytes; nodes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_bytes: Option<u64>,
}

impl InstanceFrame {
    /// Nothing has happened on it.
    pub fn new(id: InstanceId) -> Self {
        Self {
            id,
            busy_us: 0,
            in_flight_us: BTreeMap::new(),
            in_flight: 0,
            requests: 0,
            cpu_us: None,
            memory_bytes: None,
            gpu_us: None,
            gpu_memory_bytes: None,
        }
    }
}
