//! Closed minutes of usage: what costs, budgets and SLA reports rest on. Integers only.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::frame::{Outcomes, Role, Source};
use crate::ids::{InstanceId, Name, Uid};
use crate::time::Timestamp;

/// Slices of a minute, ten seconds each.
pub const SLICES_PER_MINUTE: usize = 6;

/// One minute of one deployment; the data of `usage.closed` and `usage.corrected`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageMinute {
    pub deployment: Name,
    pub deployment_uid: Uid,
    pub minute: Timestamp,
    pub slices: Vec<UsageSlice>,
    /// Frames counted, so that a successor counts nothing twice: (source, boot, first, last sequence).
    pub counted: Vec<FrameRange>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageSlice {
    pub by_role: BTreeMap<Role, UsageCounts>,
    pub by_instance: BTreeMap<InstanceId, InstanceUsage>,
    /// Latency counts at or below each named threshold (microseconds).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub at_or_below: BTreeMap<u64, u64>,
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct UsageCounts {
    pub outcomes: Outcomes,
    pub arrivals: u64,
    pub in_flight_us: u64,
    pub queued_us: u64,
    pub request_bytes: u64,
    pub response_bytes: u64,
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct InstanceUsage {
    pub requests: u64,
    pub busy_us: u64,
    pub cpu_us: u64,
    /// Largest seen.
    pub memory_bytes_max: u64,
}

#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct FrameRange {
    pub source: Source,
    pub boot: Uuid,
    pub first: u64,
    pub last: u64,
}

/// Frames that never came; the data of `usage.gap`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageGap {
    pub minute: Timestamp,
    pub source: Source,
    pub boot: Uuid,
    pub first: u64,
    pub last: u64,
}
