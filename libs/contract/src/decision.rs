//! A scaling decision with everything that led to it, so that it can be explained to a person and
//! re-evaluated to the same bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{DeploymentRef, Uid};
use crate::resources::{AutoscaleSpec, Direction};
use crate::time::Timestamp;

/// What became of a wish for another count.
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
pub enum Outcome {
    /// The count changes.
    Applied,
    /// Nothing asks for a change.
    Steady,
    /// A change is wanted, and the last one was too short a while ago.
    HeldByCooldown,
    /// A change is wanted, and a wish within the window asks for less of one.
    HeldByStabilization,
    /// Scale-in would make a scale-out rule fire at once.
    HeldByProjection,
    /// A change is wanted, and its direction is paused by hand.
    HeldByPause,
    /// The wish was cut to the profile's minimum or maximum.
    Clamped,
    /// A metric has no (whole) data, and the policy for that holds the count.
    Unknown,
    /// A manual pin decides.
    Pinned,
    /// No Autoscale applies: the deployment's own count.
    Fixed,
    /// A policy in shadow mode; nothing is carried out.
    Shadow,
}

/// One decision, the data of a `scaling.decided` event. `inputs` is all that the engine was given;
/// the rest is what it made of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Which engine decided: `autoscale`.
    pub engine: String,
    /// Its version; replay compares decisions of the present one byte for byte.
    pub engine_version: u32,
    /// About which deployment.
    pub deployment: DeploymentRef,
    /// Its incarnation.
    pub deployment_uid: Uid,
    /// When it was evaluated.
    pub at: Timestamp,
    /// Instances that the previous decision granted.
    pub from: u32,
    /// Instances that rules, pin or document ask for, before the stages.
    pub wanted: u32,
    /// Instances that there shall be.
    pub granted: u32,
    /// What became of the wish.
    pub outcome: Outcome,
    /// The profile in force, if an Autoscale applies.
    pub profile: Option<String>,
    /// The rule that decided, if one did.
    pub decided_by: Option<String>,
    /// What each rule of the profile said, in the order of the document.
    pub rules: Vec<RuleResult>,
    /// Counts before and after each stage of the evaluation, in order.
    pub stages: Vec<Stage>,
    /// All that the engine was given.
    pub inputs: DecisionInputs,
}

/// What a rule said.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Its condition holds.
    Triggered,
    /// Its condition does not hold.
    NotTriggered,
    /// Its metric has no data, or not enough to rest on.
    Unknown,
    /// Not evaluated: a scale-in rule while a scale-out rule fired, or the direction is paused.
    Suppressed,
}

/// What one rule said, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleResult {
    /// As the policy names it.
    pub name: String,
    /// Whether it asks for something.
    pub verdict: Verdict,
    /// The aggregate that was compared, in the metric's unit.
    pub value: Option<f64>,
    /// The count that the rule asks for.
    pub wanted: Option<u32>,
    /// Which way it scales; none of one that tracks a target and is on it.
    pub direction: Option<Direction>,
    /// In words: `12.4 > 4 (concurrency, average per instance over 30s)`.
    pub because: String,
}

/// One stage of the evaluation, such as the limits of the profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Stage {
    /// Which one, such as `clamp`.
    pub name: String,
    /// Instances that went in.
    pub before: u32,
    /// Instances that came out.
    pub after: u32,
    /// Why, in words; empty where the stage changed nothing.
    pub detail: String,
}

/// Everything that `decide` is a function of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionInputs {
    /// Revision of the Autoscale document; 0 if none applies.
    pub policy_revision: u64,
    /// The document itself; none if none applies.
    pub policy: Option<AutoscaleSpec>,
    /// The deployment's own count, for where no Autoscale applies.
    pub fixed_instances: u32,
    /// The count that people have set, as long as it holds.
    pub pin: Option<Pin>,
    /// Directions that people have paused.
    pub pause: Pause,
    /// Instances that there are.
    pub instances: InstanceCounts,
    /// Aggregates by signal key (see `domain::measure`); an absent one has no data.
    pub signals: BTreeMap<String, Signal>,
    /// What the evaluation before left.
    pub carried: Carried,
    /// The release of the IANA time zone database that schedules went by, such as `2026f`; none
    /// without a schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_data: Option<String>,
}

/// A count set by hand, which no rule changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pin {
    /// The count, 0 to 1000.
    pub instances: u32,
    /// None: until released.
    pub until: Option<Timestamp>,
}

/// Directions in which nothing is changed until people go on.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct Pause {
    /// No instance is taken away.
    pub scale_in: bool,
    /// No instance is added.
    pub scale_out: bool,
}

/// Instances at the moment of the evaluation. Pending ones count as capacity, but serve nothing yet.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct InstanceCounts {
    /// Those that answer their readiness probe.
    pub ready: u32,
    /// Those that are asked for or starting.
    pub pending: u32,
}

/// One aggregate over a window.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Signal {
    /// None: no data in the window.
    pub value: Option<f64>,
    /// Seconds of the window that had data.
    pub seconds_covered: u32,
    /// Seconds that the window has.
    pub seconds_wanted: u32,
    /// A source was missing in some second: good enough to scale out, not to scale in.
    pub partial: bool,
    /// The window reaches back to before the measuring began (a start, a take-over, a new policy):
    /// the rule is unknown, and that is no reason to go to the default count.
    #[serde(default)]
    pub warming: bool,
}

/// State that one evaluation hands to the next.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Carried {
    /// The count granted last; none before the first decision.
    pub granted: Option<u32>,
    /// Last change in each direction, with the rule that decided, if one did.
    pub last_out: Option<LastChange>,
    /// The same for scaling in.
    pub last_in: Option<LastChange>,
    /// Wishes inside the longest stabilisation window that can still hold something back, oldest
    /// first.
    pub wishes: Vec<Wish>,
}

/// When a count was last changed in one direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastChange {
    /// When it was decided.
    pub at: Timestamp,
    /// The rule that decided; none for a pin, a document or a profile's limits.
    pub rule: Option<String>,
}

/// A count that the rules asked for, before stabilisation. Only the last moment matters: a window
/// asks for the largest or the smallest wish in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Wish {
    /// When it was last asked for.
    pub last: Timestamp,
    /// The count.
    pub instances: u32,
}
