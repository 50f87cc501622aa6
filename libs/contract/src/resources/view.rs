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

/// What a resource is called, and which one it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ViewMetadata {
    /// As its document names it; absent for an Autoscale without a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The endpoint that it belongs to; absent for endpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Name>,
    /// Its incarnation: new whenever a name is used again.
    pub uid: Uid,
    /// As its document has them.
    pub labels: Labels,
    /// Rises with each change of the document; the ETag.
    pub revision: u64,
    /// When this incarnation was made.
    pub created_at: Timestamp,
}

/// An endpoint as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointView {
    /// `penstock/v1`.
    pub api_version: String,
    /// `Endpoint`, `Deployment` or `Autoscale`.
    pub kind: String,
    /// What it is called, and which one it is.
    pub metadata: ViewMetadata,
    /// What was asked for, with defaults filled in.
    pub spec: EndpointSpec,
    /// What there is.
    pub status: EndpointStatus,
}

/// What there is of an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    /// Where it stands.
    pub provisioning_state: ProvisioningState,
    /// Why it stands there, for people; absent where there is nothing to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Where requests go; filled in by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scoring_uri: Option<String>,
    /// The names of its deployments.
    pub deployments: Vec<Name>,
}

/// A deployment as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentView {
    /// `penstock/v1`.
    pub api_version: String,
    /// `Endpoint`, `Deployment` or `Autoscale`.
    pub kind: String,
    /// What it is called, and which one it is.
    pub metadata: ViewMetadata,
    /// What was asked for, with defaults filled in.
    pub spec: DeploymentSpec,
    /// What there is.
    pub status: DeploymentStatus,
}

/// What there is of a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentStatus {
    /// Where it stands.
    pub provisioning_state: ProvisioningState,
    /// Why it stands there, for people; absent where there is nothing to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Share of live traffic in percent.
    pub traffic: u8,
    /// Instances of an older one are being replaced.
    pub instance_revision: u64,
    /// Its instances, counted.
    pub instances: InstanceTally,
    /// Whether an Autoscale applies.
    pub autoscaled: bool,
    /// The count set by hand, where one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    /// Directions in which people have paused scaling.
    pub pause: Pause,
}

/// Instances of a deployment by where they stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceTally {
    /// What the last decision granted; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<u32>,
    /// Asked for, or started and not ready yet.
    pub starting: u32,
    /// Answering their readiness probe.
    pub ready: u32,
    /// Finishing what they have, to go then.
    pub draining: u32,
    /// Ended by themselves, or never started.
    pub failed: u32,
}

/// An Autoscale as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleView {
    /// `penstock/v1`.
    pub api_version: String,
    /// `Endpoint`, `Deployment` or `Autoscale`.
    pub kind: String,
    /// What it is called, and which one it is.
    pub metadata: ViewMetadata,
    /// What was asked for, with defaults filled in.
    pub spec: AutoscaleSpec,
    /// What there is.
    pub status: AutoscaleStatus,
}

/// What there is of an Autoscale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleStatus {
    /// Always Succeeded: rules hold from the moment they are durable.
    pub provisioning_state: ProvisioningState,
    /// The count set by hand, where one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    /// Directions in which people have paused scaling.
    pub pause: Pause,
    /// The newest decision about its target; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_decision: Option<DecisionSummary>,
}

/// A decision in short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionSummary {
    /// By which it is explained.
    pub id: Uuid,
    /// When it was written down.
    pub time: Timestamp,
    /// Instances that the decision before granted.
    pub from: u32,
    /// Instances that were asked for, before cool-downs and bounds.
    pub wanted: u32,
    /// Instances that there shall be.
    pub granted: u32,
    /// What became of the wish.
    pub outcome: Outcome,
    /// The profile in force, if an Autoscale applies.
    pub profile: Option<String>,
}

/// A decision, with the id by which it is explained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionView {
    /// By which it is explained.
    pub id: Uuid,
    /// When it was written down.
    pub time: Timestamp,
    /// Whose deployment it is about.
    pub endpoint: Name,
    /// Which deployment.
    pub deployment: Name,
    /// Its incarnation.
    pub deployment_uid: Uid,
    /// Which engine decided.
    pub engine: String,
    /// Its version.
    pub engine_version: u32,
    /// When it was evaluated.
    pub at: Timestamp,
    /// Instances that the decision before granted.
    pub from: u32,
    /// Instances that were asked for, before cool-downs and bounds.
    pub wanted: u32,
    /// Instances that there shall be.
    pub granted: u32,
    /// What became of the wish.
    pub outcome: Outcome,
    /// The profile in force, if an Autoscale applies.
    pub profile: Option<String>,
    /// The rule that decided, if one did.
    pub decided_by: Option<String>,
    /// What each rule said.
    pub rules: Vec<RuleResult>,
    /// Counts before and after each stage of the evaluation, in order.
    pub stages: Vec<Stage>,
    /// All that the engine was given.
    pub inputs: DecisionInputs,
}

impl DecisionView {
    /// A decision that was written down under this id at this time.
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

/// Where an instance stands.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum InstanceViewState {
    /// Asked for, or started and not ready yet.
    Starting,
    /// Answering its readiness probe.
    Ready,
    /// Finishing what it has, to go then.
    Draining,
    /// Gone because it was to go.
    Stopped,
    /// Ended by itself, or never started.
    Failed,
}

/// An instance as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceView {
    /// Never used again.
    pub id: InstanceId,
    /// Whose it is.
    pub endpoint: Name,
    /// Of which deployment.
    pub deployment: Name,
    /// Its incarnation.
    pub deployment_uid: Uid,
    /// Of the newest order about it.
    pub generation: u64,
    /// The deployment's instance revision that it is made of.
    pub revision: u64,
    /// Where it stands.
    pub state: InstanceViewState,
    /// Why, in words; absent where there is nothing to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Where it runs, by the node's id.
    pub node: String,
    /// `HOST:PORT` that it listens on, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Of its process, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// When it was asked for.
    pub requested_at: Timestamp,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it answered its readiness probe for the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_at: Option<Timestamp>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Of its process; absent where a signal ended it.
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
    /// What the token is called; unique.
    pub name: String,
    /// What it allows.
    pub role: AccessRole,
    /// When it ends by itself; absent where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// When it was made.
    pub granted_at: Timestamp,
    /// Who made it.
    pub granted_by: String,
}

/// What came of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ApplyResult {
    /// There was no such resource.
    Created,
    /// The resource is another now.
    Changed,
    /// It says what is there already.
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
    /// What came of it, or would have.
    pub result: ApplyResult,
    /// Nothing was written.
    pub dry_run: bool,
    /// What differs from before, by field.
    pub changes: Vec<Change>,
    /// As it is now, or would be.
    pub resource: R,
}
