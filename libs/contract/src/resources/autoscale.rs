//! `kind: Autoscale`: profiles, capacities and rules of one deployment, as written.
//!
//! Parsing stops at the text of conditions and schedules (`when`, `cron`, `by`); the engine compiles
//! them (`domain::autoscale::Policy::compile`) and reports every fault with its field.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::ids::DeploymentRef;
use crate::time::Span;

/// The autoscale policy of a deployment: how its count follows load and schedules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AutoscaleSpec {
    /// The deployment: `{endpoint, deployment}`. Each has at most one Autoscale.
    pub target: DeploymentRef,
    /// Whether decisions are carried out.
    #[serde(default)]
    pub mode: AutoscaleMode,
    /// Minimum time between changes.
    #[serde(default)]
    pub cooldown: Cooldown,
    /// Windows over which recommendations are compared before a change.
    #[serde(default)]
    pub stabilization: Stabilization,
    /// How long after an instance has become ready its CPU and memory still say nothing about load, since
    /// it warms up: metrics averaged over instances leave it out. 0s by default, 1h at most.
    #[serde(default, skip_serializing_if = "Span::is_zero")]
    pub initialization_period: Span,
    /// How a metric without data is treated.
    #[serde(default)]
    pub missing: MissingMetric,
    /// At least one profile, exactly one of them without a schedule: the default profile.
    pub profiles: Vec<ProfileSpec>,
}

/// Whether the decisions of a policy are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AutoscaleMode {
    /// Decisions are carried out.
    #[default]
    Live,
    /// Decisions are recorded, but not carried out.
    Shadow,
    /// No rule is evaluated; the count is kept.
    Paused,
}

/// The cooldown of rules that set none: for scaling out since the last scale-out, for scaling in since
/// the last change in either direction. Corrections of the count by the bounds or the schedule of a profile are
/// no such changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cooldown {
    /// Before another scale-out; 30s by default.
    pub out: Span,
    /// Before a scale-in; 5m by default.
    #[serde(rename = "in")]
    pub scale_in: Span,
}

impl Default for Cooldown {
    fn default() -> Self {
        Self {
            out: Span::from_secs(30),
            scale_in: Span::from_secs(300),
        }
    }
}

/// Windows over which the most conservative recommendation in a direction is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Stabilization {
    /// For scaling out; 0s by default.
    pub out: Span,
    /// For scaling in; 5m by default.
    #[serde(rename = "in")]
    pub scale_in: Span,
}

impl Default for Stabilization {
    fn default() -> Self {
        Self {
            out: Span::ZERO,
            scale_in: Span::from_secs(300),
        }
    }
}

/// How a metric that no source reports is treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MissingMetric {
    /// Keep the count.
    #[default]
    Hold,
    /// Scale out to the profile's default count; never scale in.
    Default,
    /// Scale out to the minimum of the scheduled profile, if one is active; never scale in.
    Schedule,
}

/// A capacity and rules, and when they apply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProfileSpec {
    /// The name, unique within the document; decisions refer to it.
    pub name: String,
    /// When the profile applies; omitted in the default profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleSpec>,
    /// Of profiles that apply at the same time, the one with the highest priority is used.
    #[serde(default)]
    pub priority: i32,
    /// The bounds of the count.
    pub capacity: Capacity,
    /// The rules; if omitted, the default profile's rules apply within this capacity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<Vec<RuleSpec>>,
}

/// Bounds of the instance count, 0 to 1000 each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Capacity {
    /// The minimum count.
    pub min: u32,
    /// The maximum count.
    pub max: u32,
    /// The first count of an Autoscale that comes with its deployment (within a minute of its creation, or before
    /// an instance was ever ready), the count of a profile without rules, and with `missing: default` the least
    /// count without data; from `min` to `max`.
    pub default: u32,
}

/// One of `cron` + `duration`, `weekly`, `dated`; local times in `timeZone` (UTC by default).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScheduleSpec {
    /// When it begins, as a five-field cron expression, such as `0 8 * * Mon-Fri`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cron: Option<String>,
    /// How long it lasts; with `cron` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Span>,
    /// On days of the week, from one time of day to another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weekly: Option<WeeklySpec>,
    /// Once, from one time to another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dated: Option<DatedSpec>,
    /// An IANA time zone name, such as `Europe/Berlin`. Windows open and close by its wall clock, also when
    /// clocks change:
    ///
    /// - A time in the hour that does not exist is when that hour would have begun. In Europe/Paris on
    ///   2026-03-29, when 02:00 becomes 03:00, `cron: "30 2 * * *"` with `duration: 1h` lasts from 03:00 to
    ///   04:00. A weekly or dated window that lies within that hour does not open.
    /// - In the hour that comes twice, a window opens at the first occurrence and closes at the last one. In
    ///   Europe/Paris on 2026-10-25, when 03:00 becomes 02:00, `cron: "30 2 * * *"` with `duration: 1h` lasts
    ///   from the first 02:30 (00:30 UTC) to 03:30 (02:30 UTC), two hours; a weekly window from 00:00 to 02:30
    ///   closes at the second 02:30 (01:30 UTC). It opens once.
    /// - `duration` is of the wall clock: `cron: "0 22 * * *"` with `duration: 9h` closes at 07:00 in every
    ///   night.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
}

/// A time of day on some days of each week.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeeklySpec {
    /// `Mon` … `Sun`.
    pub days: Vec<String>,
    /// `HH:MM`, local.
    pub start: String,
    /// `HH:MM`, local; on the next day if at or before `start`.
    pub end: String,
}

/// A single time range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatedSpec {
    /// `YYYY-MM-DDTHH:MM` local, or RFC 3339 with an offset.
    pub from: String,
    /// The same format; after `from`.
    pub to: String,
}

/// A threshold rule (`when` and `scale`) or a target to follow (`track`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuleSpec {
    /// The name, unique within the profile; decisions refer to it.
    pub name: String,
    /// The metric that is evaluated.
    pub metric: MetricSpec,
    /// The condition on the metric: `> 4`, `<= 250ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// The change to make if the condition holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<ScaleSpec>,
    /// The target value to track, instead of `when` and `scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track: Option<TrackSpec>,
}

/// An aggregate of a metric over a window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MetricSpec {
    /// A metric listed in METRICS.md, such as `concurrency` or `latency_p95`.
    pub name: String,
    /// The length of the window; a minute by default.
    #[serde(default = "default_window")]
    pub window: Span,
    /// `average min max sum count last p50 p90 p95 p99`.
    #[serde(default = "default_aggregation")]
    pub aggregation: String,
    /// Whether the value is divided by the number of ready instances.
    #[serde(default)]
    pub per_instance: bool,
}

fn default_window() -> Span {
    Span::from_secs(60)
}

fn default_aggregation() -> String {
    "average".into()
}

/// A change of the count: one of `by`, `to` and `steps`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScaleSpec {
    /// The direction of the change.
    pub direction: Direction,
    /// A count (`2`) or a share (`"50%"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<NumberOrText>,
    /// An exact count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u32>,
    /// Larger changes for larger deviations of the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepSpec>>,
    /// Overrides the cooldown of the document for this rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cooldown: Option<Span>,
}

/// The direction in which a count changes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// More instances.
    Out,
    /// Fewer instances.
    In,
}

/// A number, or text that holds one with a unit, such as `"50%"` or `"250ms"`.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum NumberOrText {
    /// A number without a unit.
    Number(f64),
    /// A number with a unit.
    Text(String),
}

/// Implemented by hand, because the derived implementation for untagged enums cannot say what is wrong.
impl<'de> Deserialize<'de> for NumberOrText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Number(number) => Ok(Self::Number(number.as_f64().unwrap_or_default())),
            Value::String(text) => Ok(Self::Text(text)),
            _ => Err(serde::de::Error::custom(
                "this must be a number, or text such as \"50%\"; write one of the two",
            )),
        }
    }
}

/// A step of a rule. Of the steps that match, the one with the greatest `above` (scale out) or the least
/// `below` (scale in) is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StepSpec {
    /// The step matches if the metric is above this value; for scaling out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<NumberOrText>,
    /// The step matches if the metric is below this value; for scaling in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<NumberOrText>,
    /// A count (`2`) or a share (`"50%"`).
    pub by: NumberOrText,
}

/// A target value per instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrackSpec {
    /// The target value per instance, in the metric's unit.
    pub target: NumberOrText,
    /// No change while the value is within this share of the target.
    #[serde(default = "default_tolerance")]
    pub tolerance: String,
}

fn default_tolerance() -> String {
    "10%".into()
}
