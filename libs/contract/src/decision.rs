//! A scaling decision with all its inputs, so that it can be explained and re-evaluated to the same
//! bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::frame::is_zero;
use crate::ids::{DeploymentRef, Uid};
use crate::resources::{AutoscaleSpec, Direction};
use crate::time::Timestamp;

/// The outcome of an evaluation.
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
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Outcome")]
pub enum DecisionOutcome {
    /// The count changes.
    Applied,
    /// No change is recommended.
    Steady,
    /// A change is recommended, but the last one was too recent.
    HeldByCooldown,
    /// A change is recommended, but a recommendation within the window asks for a smaller one.
    HeldByStabilization,
    /// Scale-in would make a scale-out rule fire at once.
    HeldByProjection,
    /// Scale-in is recommended while requests are refused for lack of capacity.
    HeldByRefusals,
    /// A change is recommended, but no instance of the deployment's present revision has ever become ready,
    /// and the last start failed.
    HeldByFailedStarts,
    /// A change is recommended, but an operator has paused its direction.
    HeldByPause,
    /// The recommendation was limited to the profile's minimum or maximum.
    Clamped,
    /// A metric has no or incomplete data, and the policy for missing metrics holds the count.
    Unknown,
    /// A manual pin sets the count.
    Pinned,
    /// No Autoscale applies: the count is the deployment's own.
    Fixed,
    /// The policy is in shadow mode; the decision is not carried out.
    Shadow,
}

/// One decision, the data of a `scaling.decided` event. `inputs` holds all inputs of the engine; the
/// other fields are its result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// The engine that decided: `autoscale`.
    pub engine: String,
    /// Its version. Replay compares decisions of the current version byte for byte.
    pub engine_version: u32,
    /// The deployment.
    pub deployment: DeploymentRef,
    /// Its incarnation.
    pub deployment_uid: Uid,
    /// When it was evaluated.
    pub at: Timestamp,
    /// The count that the previous decision granted.
    pub from: u32,
    /// The count that rules, pin or document ask for, before the stages.
    pub wanted: u32,
    /// The count that is granted.
    pub granted: u32,
    /// The outcome of the evaluation.
    pub outcome: DecisionOutcome,
    /// The profile in force, if an Autoscale applies.
    pub profile: Option<String>,
    /// The rule that changed the count, or would have; `None` if something else did.
    pub decided_by: Option<String>,
    /// What changed the count or keeps it; absent if nothing asks for another count, and in decisions of
    /// older releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// The result of each rule of the profile, in document order.
    pub rules: Vec<RuleResult>,
    /// The counts before and after each stage of the evaluation, in order.
    pub stages: Vec<EvaluationStage>,
    /// All inputs of the engine.
    pub inputs: DecisionInputs,
}

/// What changed a count, or keeps it although something asks for another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cause {
    /// The kind of cause.
    pub kind: CauseKind,
    /// The name of the rule, or of the profile whose beginning, bounds or default count it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The cause in words, without a full stop.
    pub detail: String,
}

/// Kinds of causes of a count.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum CauseKind {
    /// A rule, also if something else holds its recommendation back.
    Rule,
    /// A profile began or ended with its schedule, or the profile's default count applies.
    Profile,
    /// The minimum or maximum of the profile in force.
    Bounds,
    /// A count pinned by an operator.
    Pin,
    /// The end of a pin.
    PinEnd,
    /// A pause by an operator, or of the policy.
    Pause,
    /// The count in the deployment's document: no Autoscale applies, or only in shadow mode.
    Document,
    /// Missing or incomplete data.
    Data,
    /// Instances that fail to start.
    FailedStarts,
}

impl CauseKind {
    /// Whether a change with this cause starts the cooldowns of rules. A correction by the bounds or by a
    /// schedule says nothing about load.
    pub const fn starts_cooldown(self) -> bool {
        !matches!(self, Self::Profile | Self::Bounds | Self::PinEnd)
    }
}

/// The verdict of a rule.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Its condition holds.
    Triggered,
    /// Its condition does not hold.
    NotTriggered,
    /// Its metric has no data, or not enough.
    Unknown,
    /// Not evaluated: a scale-in rule while a scale-out rule fired, or the direction is paused.
    Suppressed,
}

/// The result of one rule, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleResult {
    /// The name of the rule in the policy.
    pub name: String,
    /// Whether the rule triggered.
    pub verdict: Verdict,
    /// The aggregate that was compared, in the metric's unit.
    pub value: Option<f64>,
    /// The count that the rule asks for.
    pub wanted: Option<u32>,
    /// The direction in which it scales; `None` for a target rule that is on target.
    pub direction: Option<Direction>,
    /// The reason in words: `12.4 > 4 (concurrency, average per instance over 30s)`.
    pub because: String,
    /// What the value was measured on; absent if the rule was not evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
}

/// What the value of a rule was measured on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Evidence {
    /// Requests that the model answered in the window; absent for metrics of instances.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered: Option<u64>,
    /// Requests that were refused for lack of capacity in the window, or in its last two minutes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub refused: u64,
    /// Instances that were measured, averaged over the window; absent for metrics of requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<f64>,
    /// Instances that are ready.
    pub ready: u32,
}

/// One stage of the evaluation, such as the limits of the profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Stage")]
pub struct EvaluationStage {
    /// The name of the stage, such as `clamp`.
    pub name: String,
    /// The count before the stage.
    pub before: u32,
    /// The count after the stage.
    pub after: u32,
    /// The reason in words; empty if the stage changed nothing.
    pub detail: String,
}

/// All inputs of `decide`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionInputs {
    /// The revision of the Autoscale document; 0 if none applies.
    pub policy_revision: u64,
    /// The Autoscale document, if one applies; shared by the decisions that it leads to.
    pub policy: Option<Arc<AutoscaleSpec>>,
    /// The deployment's own count, which holds if no Autoscale applies.
    pub fixed_instances: u32,
    /// The count that an operator has pinned, while the pin holds.
    pub pin: Option<Pin>,
    /// Who pinned it: `token:NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned_by: Option<String>,
    /// Directions that operators have paused.
    pub pause: Pause,
    /// The instances at the time of the evaluation.
    pub instances: InstanceCounts,
    /// Starts that failed since an instance was last ready; absent if the last start did not fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_starts: Option<FailedStarts>,
    /// Whether the Autoscale came together with the deployment, so that its default count replaces the
    /// deployment's own, which was only granted in between.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub starts_at_default: bool,
    /// Aggregates by signal key (see `domain::measure`). An absent signal has no data.
    pub signals: BTreeMap<String, Signal>,
    /// State carried over from the previous evaluation.
    pub carried: CarriedState,
    /// The release of the IANA time zone database used for schedules, such as `2026f`; `None` without a
    /// schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_data: Option<String>,
}

/// A manually set count, which no rule changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pin {
    /// The count, 0 to 1000.
    pub instances: u32,
    /// When the pin ends; `None` if it holds until released.
    pub until: Option<Timestamp>,
}

/// Directions that are paused until an operator resumes scaling.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct Pause {
    /// Whether scaling in is paused.
    pub scale_in: bool,
    /// Whether scaling out is paused.
    pub scale_out: bool,
}

/// Instances at the time of the evaluation. Pending ones count as capacity, but do not serve yet.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct InstanceCounts {
    /// Instances that pass their readiness probe.
    pub ready: u32,
    /// Instances that are requested or starting.
    pub pending: u32,
}

/// Starts of a deployment's present revision that failed, since an instance was last ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailedStarts {
    /// How many failed in a row.
    pub in_a_row: u32,
    /// Why the last one failed, for people.
    pub reason: String,
    /// Whether no instance of this spec has ever been ready, in any revision. No rule changes the count then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub never_ready: bool,
}

/// The aggregate of a metric over a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Signal {
    /// The aggregate; `None` if the window has no data.
    pub value: Option<f64>,
    /// Seconds of the window that had data.
    pub seconds_covered: u32,
    /// The length of the window in seconds.
    pub seconds_wanted: u32,
    /// Whether a source was missing in some second: good enough to scale out, not to scale in.
    pub partial: bool,
    /// Whether the window begins before the measurements do (after a start, a takeover or a new policy):
    /// good enough to scale out, not to scale in. Without a value there is no falling back to the default
    /// count.
    #[serde(default)]
    pub warming: bool,
    /// Requests that were refused for lack of capacity in the window, or in the last two minutes if it is
    /// longer. Until there are none, no rule scales in.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub refused: u64,
    /// Whether part of the window was measured by other definitions, such as those of an older release:
    /// good enough to scale out, not to scale in.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outdated: bool,
    /// Why there is no value, or only a lower bound of it, although sources reported: no reason to scale
    /// in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unmeasured: Option<Unmeasured>,
    /// The number of instances that an average over instances is of, averaged over the window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instances: Option<f64>,
    /// Requests that the model answered in the window, as evidence; absent for metrics of instances.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered: Option<u64>,
    /// When the window is complete, if nothing is lacking from now on; absent if it is, and in decisions of
    /// older releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete_at: Option<Timestamp>,
}

impl Signal {
    /// Whether part of the window was not measured, or not as it is now.
    pub fn is_incomplete(&self) -> bool {
        // No branches: every evaluation asks this of every rule.
        self.partial | self.warming | self.outdated | (self.seconds_covered < self.seconds_wanted)
    }
}

/// Why a metric could not be measured although its sources reported.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Unmeasured {
    /// There were requests, and none was answered. A latency is then the age of the oldest one in flight.
    Unanswered,
    /// No instance was measured: none was ready for a whole second, after its initialization period, or the
    /// backend does not report the metric.
    NoInstance,
}

/// State that is carried over from one evaluation to the next.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Carried")]
pub struct CarriedState {
    /// The count granted last; `None` before the first decision.
    pub granted: Option<u32>,
    /// The last scale-out that starts cooldowns, with the rule that decided, if one did.
    pub last_out: Option<LastChange>,
    /// The last scale-in, likewise.
    pub last_in: Option<LastChange>,
    /// Recommendations within the longest stabilization window that can still hold back a change, oldest
    /// first.
    #[serde(rename = "wishes")]
    pub recommendations: Vec<Recommendation>,
    /// The profile that was in force; absent if no Autoscale applied, and before the first decision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// The revision of the Autoscale that was evaluated: 0 if none applied, absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_revision: Option<u64>,
    /// The deployment's own count as of then; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed_instances: Option<u32>,
    /// Whether a pin set the count.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
}

/// The last change of a count in one direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastChange {
    /// When the change was decided.
    pub at: Timestamp,
    /// The rule that decided; `None` for a pin or a document.
    pub rule: Option<String>,
}

/// A count that the rules recommended, before stabilization. Only the latest time matters: a window
/// takes the largest or the smallest recommendation in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "Wish")]
pub struct Recommendation {
    /// When it was last recommended.
    pub last: Timestamp,
    /// The count.
    pub instances: u32,
}
