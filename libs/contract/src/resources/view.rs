//! Resources and records as the API shows them: what the read models hold. What a person writes
//! comes back in the same places, with `metadata` and `status` filled in by Penstock.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels, ProvisioningState};
use crate::decision::{Decision, DecisionInputs, Outcome, Pause, Pin, RuleResult, Stage};
use crate::events::AccessRole;
use crate::ids::{InstanceId, Name, Uid};
use crate::time::Timestamp;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ViewMetadata {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Name>,
    pub uid: Uid,
    pub labels: Labels,
    /// Rises with each change of the document; the ETag.
    pub revision: u64,
    pub created_at: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointView {
    pub api_version: String,
    pub kind: String,
    pub metadata: ViewMetadata,
    pub spec: EndpointSpec,
    pub status: EndpointStatus,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    pub provisioning_state: ProvisioningState,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Where requests go; filled in by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scoring_uri: Option<String>,
    pub deployments: Vec<Name>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentView {
    pub api_version: String,
    pub kind: String,
    pub metadata: ViewMetadata,
    pub spec: DeploymentSpec,
    pub status: DeploymentStatus,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentStatus {
    pub provisioning_state: ProvisioningState,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Share of live traffic in percent.
    pub traffic: u8,
    /// Instances of an older one are being replaced.
    pub instance_revision: u64,
    pub instances: InstanceTally,
    /// Whether an Autoscale applies.
    pub autoscaled: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    pub pause: Pause,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceTally {
    /// What the last decision granted; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<u32>,
    pub starting: u32,
    pub ready: u32,
    pub draining: u32,
    pub failed: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleView {
    pub api_version: String,
    pub kind: String,
    pub metadata: ViewMetadata,
    pub spec: AutoscaleSpec,
    pub status: AutoscaleStatus,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleStatus {
    /// Always Succeeded: rules hold from the moment they are durable.
    pub provisioning_state: ProvisioningState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    pub pause: Pause,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_decision: Option<DecisionSummary>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionSummary {
    pub id: Uuid,
    pub time: Timestamp,
    pub from: u32,
    pub wanted: u32,
    pub granted: u32,
    pub outcome: Outcome,
    pub profile: Option<String>,
}

/// A decision, with the id by which it is explained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionView {
    pub id: Uuid,
    pub time: Timestamp,
    pub endpoint: Name,
    pub deployment: Name,
    pub deployment_uid: Uid,
    pub engine: String,
    pub engine_version: u32,
    pub at: Timestamp,
    pub from: u32,
    pub wanted: u32,
    pub granted: u32,
    pub outcome: Outcome,
    pub profile: Option<String>,
    pub decided_by: Option<String>,
    pub rules: Vec<RuleResult>,
    pub stages: Vec<Stage>,
    pub inputs: DecisionInputs,
}

impl DecisionView {
    pub fn new(id: Uuid, time: Timestamp, decision: Decision) -> Self {
        Self {
            id,
            time,
            endpoint: decision.deployment.endpoint,
            deployment: decision.deployment.deployment,
            deployment_uid: decision.deployment_uid,
            engine: decision.engine,
            engine_version: decision.engine_version,
            at: decision.at,
            from: decision.from,
            wanted: decision.wanted,
            granted: decision.granted,
            outcome: decision.outcome,
            profile: decision.profile,
            decided_by: decision.decided_by,
            rules: decision.rules,
            stages: decision.stages,
            inputs: decision.inputs,
        }
    }
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum InstanceViewState {
    Starting,
    Ready,
    Draining,
    Stopped,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceView {
    pub id: InstanceId,
    pub endpoint: Name,
    pub deployment: Name,
    pub deployment_uid: Uid,
    pub generation: u64,
    /// The deployment's instance revision that it is made of.
    pub revision: u64,
    pub state: InstanceViewState,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    pub node: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    pub requested_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The decision that asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Uuid>,
}

/// A token, without the token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessView {
    pub name: String,
    pub role: AccessRole,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    pub granted_at: Timestamp,
    pub granted_by: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ApplyResult {
    Created,
    Changed,
    Unchanged,
}

/// One field that differs between two documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// JSON Pointer.
    pub pointer: String,
    /// Absent: there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<serde_json::Value>,
    /// Absent: there is none any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<serde_json::Value>,
}

/// The answer to a PUT: what came of it, field by field, and the resource as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Applied<R> {
    pub result: ApplyResult,
    pub dry_run: bool,
    pub changes: Vec<Change>,
    pub resource: R,
}
