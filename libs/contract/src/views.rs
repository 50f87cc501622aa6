//! Resources and records as the API shows them, which is what the read models hold. Documents are
//! returned in the shape they were written in, with `metadata` and `status` filled in by Penstock.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::decision::{
    Cause, Decision, DecisionInputs, DecisionOutcome, EvaluationStage, Pause, Pin, RuleResult,
};
use crate::events::AccessRole;
use crate::ids::{InstanceId, Name, Uid};
use crate::problem::Finding;
use crate::resources::{AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels, ProvisioningState};
use crate::time::Timestamp;

/// The metadata of a resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ViewMetadata {
    /// The name in the document; absent for an Autoscale without a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The endpoint that it belongs to; absent for endpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Name>,
    /// The incarnation: new whenever a name is reused.
    pub uid: Uid,
    /// The labels in the document.
    pub labels: Labels,
    /// Increases with each change of the document; the ETag.
    pub revision: u64,
    /// When this incarnation was created.
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
    /// The metadata.
    pub metadata: ViewMetadata,
    /// The desired state, with defaults filled in.
    pub spec: EndpointSpec,
    /// The actual state.
    pub status: EndpointStatus,
}

/// The actual state of an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    /// The provisioning state.
    pub provisioning_state: ProvisioningState,
    /// The reason for the state, for people; absent if there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The URI that requests are sent to; set by the server.
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
    /// The metadata.
    pub metadata: ViewMetadata,
    /// The desired state, with defaults filled in.
    pub spec: DeploymentSpec,
    /// The actual state.
    pub status: DeploymentStatus,
}

/// The actual state of a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentStatus {
    /// The provisioning state.
    pub provisioning_state: ProvisioningState,
    /// The reason for the state, for people; absent if there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The share of live traffic, in percent.
    pub traffic: u8,
    /// The current revision of what instances are made from. Instances of an older one are being
    /// replaced.
    pub instance_revision: u64,
    /// The number of instances by state.
    pub instances: InstanceTally,
    /// The condition Available; absent while the deployment is being deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available: Option<AvailableCondition>,
    /// Whether an Autoscale applies.
    pub autoscaled: bool,
    /// The pinned count, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    /// Directions in which operators have paused scaling.
    pub pause: Pause,
}

/// Whether a deployment can serve requests now. It follows the readiness of its instances, whereas the
/// provisioning state follows changes of its document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AvailableCondition {
    /// True if at least one instance is ready.
    pub status: ConditionStatus,
    /// The reason for the status.
    pub reason: AvailableReason,
    /// The numbers behind it and the newest failure, for people.
    pub message: String,
    /// When the reason last changed.
    pub since: Timestamp,
}

/// The status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// The condition holds.
    True,
    /// The condition does not hold.
    False,
}

/// Why a deployment is available or not.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum AvailableReason {
    /// As many instances are ready as are wanted. True.
    Ready,
    /// Some instances are ready, but fewer than are wanted. True.
    Degraded,
    /// No instance is ready yet, and none has failed since the deployment last changed or was
    /// healthy. False.
    Starting,
    /// No instance is ready: the last one failed, or those that run fail their readiness probe. False.
    Failing,
    /// No instance is wanted. False.
    ScaledToZero,
}

impl AvailableReason {
    /// All reasons.
    pub const ALL: [Self; 5] = [
        Self::Ready,
        Self::Degraded,
        Self::Starting,
        Self::Failing,
        Self::ScaledToZero,
    ];

    /// The status that goes with this reason.
    pub const fn status(self) -> ConditionStatus {
        match self {
            Self::Ready | Self::Degraded => ConditionStatus::True,
            Self::Starting | Self::Failing | Self::ScaledToZero => ConditionStatus::False,
        }
    }

    /// The name, as serialized.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Degraded => "Degraded",
            Self::Starting => "Starting",
            Self::Failing => "Failing",
            Self::ScaledToZero => "ScaledToZero",
        }
    }
}

/// The number of instances of a deployment by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceTally {
    /// The count that the last decision granted; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<u32>,
    /// Requested, or started and not ready yet.
    pub starting: u32,
    /// Passing their readiness probe.
    pub ready: u32,
    /// Completing their requests before they are removed.
    pub draining: u32,
    /// Exited on their own, or never started.
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
    /// The metadata.
    pub metadata: ViewMetadata,
    /// The desired state, with defaults filled in.
    pub spec: AutoscaleSpec,
    /// The actual state.
    pub status: AutoscaleStatus,
}

/// The actual state of an Autoscale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleStatus {
    /// Always Succeeded: rules take effect as soon as they are durable.
    pub provisioning_state: ProvisioningState,
    /// The pinned count, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    /// Directions in which operators have paused scaling.
    pub pause: Pause,
    /// The latest decision for its target; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_decision: Option<DecisionSummary>,
}

/// A summary of a decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionSummary {
    /// The id of the decision.
    pub id: Uuid,
    /// When it was recorded.
    pub time: Timestamp,
    /// The count that the previous decision granted.
    pub from: u32,
    /// The recommended count, before cooldowns and bounds.
    pub wanted: u32,
    /// The count that is granted.
    pub granted: u32,
    /// The outcome of the evaluation.
    pub outcome: DecisionOutcome,
    /// The profile in force, if an Autoscale applies.
    pub profile: Option<String>,
}

/// A decision as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionView {
    /// The id of the decision.
    pub id: Uuid,
    /// When it was recorded.
    pub time: Timestamp,
    /// The endpoint of the deployment.
    pub endpoint: Name,
    /// The deployment.
    pub deployment: Name,
    /// The incarnation of the deployment.
    pub deployment_uid: Uid,
    /// The engine that decided.
    pub engine: String,
    /// The version of the engine.
    pub engine_version: u32,
    /// When it was evaluated.
    pub at: Timestamp,
    /// The count that the previous decision granted.
    pub from: u32,
    /// The recommended count, before cooldowns and bounds.
    pub wanted: u32,
    /// The count that is granted.
    pub granted: u32,
    /// The outcome of the evaluation.
    pub outcome: DecisionOutcome,
    /// The profile in force, if an Autoscale applies.
    pub profile: Option<String>,
    /// The rule that changed the count, or would have; absent if something else did.
    pub decided_by: Option<String>,
    /// What changed the count or keeps it; absent if nothing asks for another count, and in decisions of
    /// older releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// The result of each rule.
    pub rules: Vec<RuleResult>,
    /// The counts before and after each stage of the evaluation, in order.
    pub stages: Vec<EvaluationStage>,
    /// All inputs of the engine.
    pub inputs: DecisionInputs,
}

impl DecisionView {
    /// Creates the view of a decision that was recorded with this id and time.
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
            cause: decision.cause,
            rules: decision.rules,
            stages: decision.stages,
            inputs: decision.inputs,
        }
    }
}

/// The state of an instance.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum InstanceViewState {
    /// Requested, or started and not ready yet.
    Starting,
    /// Passing its readiness probe.
    Ready,
    /// Completing its requests before it is removed.
    Draining,
    /// Stopped on request.
    Stopped,
    /// Exited on its own, or never started.
    Failed,
}

/// An instance as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceView {
    /// The id; never reused.
    pub id: InstanceId,
    /// The endpoint that it belongs to.
    pub endpoint: Name,
    /// The deployment that it belongs to.
    pub deployment: Name,
    /// The incarnation of the deployment.
    pub deployment_uid: Uid,
    /// The generation of the latest request for it.
    pub generation: u64,
    /// The instance revision of the deployment that it is made from.
    pub revision: u64,
    /// The state of the instance.
    pub state: InstanceViewState,
    /// The reason for the state; absent if there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// The id of the node that it runs on.
    pub node: String,
    /// The `HOST:PORT` that it listens on, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The id of its process, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// When it was requested.
    pub requested_at: Timestamp,
    /// When it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it first passed its readiness probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_at: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// The exit code of its process; absent if a signal ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The id of the decision that led to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Uuid>,
}

/// A token as the API shows it, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessView {
    /// The name of the token; unique.
    pub name: String,
    /// The role of the token.
    pub role: AccessRole,
    /// When it expires; absent if never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// When it was created.
    pub granted_at: Timestamp,
    /// Who created it.
    pub granted_by: String,
}

/// The result of applying a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ApplyResult {
    /// The resource was created.
    Created,
    /// The resource was changed.
    Changed,
    /// The resource already matched the document.
    Unchanged,
}

/// One field that differs between two documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Change")]
pub struct FieldChange {
    /// JSON Pointer of the field.
    pub pointer: String,
    /// The previous value; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<serde_json::Value>,
    /// The new value; absent if the field was removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<serde_json::Value>,
}

/// The response to a PUT: the result, the changed fields and the resource as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Applied<R> {
    /// The result, or what it would have been.
    pub result: ApplyResult,
    /// Whether this was a dry run: nothing was written.
    pub dry_run: bool,
    /// The fields that changed.
    pub changes: Vec<FieldChange>,
    /// What is valid in the document and probably not intended, with what to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Finding>,
    /// The resource as it is now, or would be.
    pub resource: R,
}
