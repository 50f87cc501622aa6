//! What sources report of instances, before it is decided which of them count.

use contract::frame::{DeploymentFrame, InstanceFrame};
use serde::{Deserialize, Serialize};

/// What one source reported of a deployment's instances in a second. Which of them count depends on the
/// policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceReport {
    /// The definitions that it was measured by.
    pub definitions: u32,
    /// The length of the second, in microseconds.
    pub length_us: u64,
    /// Its instances.
    pub instances: Vec<InstanceReading>,
}

/// What was measured of one instance in one second; see [`InstanceFrame`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceReading {
    /// Time since it became ready, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_for_us: Option<u64>,
    /// CPU time used, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<u64>,
    /// Resident memory, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Memory that it may use, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit_bytes: Option<u64>,
}

impl From<&InstanceFrame> for InstanceReading {
    fn from(frame: &InstanceFrame) -> Self {
        Self {
            ready_for_us: frame.ready_for_us,
            cpu_us: frame.cpu_us,
            memory_bytes: frame.memory_bytes,
            memory_limit_bytes: frame.memory_limit_bytes,
        }
    }
}

impl InstanceReport {
    /// The report in a frame of this length.
    pub fn of(frame: &DeploymentFrame, length_us: u64) -> Self {
        Self {
            definitions: frame.definitions,
            length_us,
            instances: frame.instances.iter().map(InstanceReading::from).collect(),
        }
    }
}
