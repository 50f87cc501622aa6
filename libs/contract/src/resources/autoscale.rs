//! `kind: Autoscale`: profiles, capacities and rules of one deployment, as written.
//!
//! Parsing stops at the text of conditions and schedules (`when`, `cron`, `by`); the engine compiles
//! them (`domain::autoscale::Policy::compile`) and reports every fault with its field.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::ids::DeploymentRef;
use crate::time::Span;

/// How the count of one deployment follows its load and the calendar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AutoscaleSpec {
    /// The deployment: `{endpoint, deployment}`. At most one Autoscale is about each.
    pub target: DeploymentRef,
    /// What is done with decisions.
    #[serde(default)]
    pub mode: AutoscaleMode,
    /// How long changes keep from each other.
    #[serde(default)]
    pub cooldown: Cooldown,
    /// How long wishes for less of a change count.
    #[serde(default)]
    pub stabilization: Stabilization,
    /// What a metric without data means.
    #[serde(default)]
    pub missing: MissingMetric,
    /// At least one; exactly one without a schedule, the default.
    pub profiles: Vec<ProfileSpec>,
}

/// What is done with the decisions of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AutoscaleMode {
    /// Decisions are carried out.
    #[default]
    Live,
    /// Decisions are written, and not carried out.
    Shadow,
    /// No rule is evaluated; the count stays.
    Paused,
}

/// How long rules without a cool-down of their own wait: with scaling out since the last scale-out,
/// with scaling in since the last change in either direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cooldown {
    /// Before another scale-out; 30s unless given.
    pub out: Span,
    /// Before a scale-in; 5m unless given.
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

/// Window over which the least eager wish in a direction wins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Stabilization {
    /// For scaling out; 0s unless given.
    pub out: Span,
    /// For scaling in; 5m unless given.
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

/// What a metric without data means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MissingMetric {
    /// The count stays.
    #[default]
    Hold,
    /// Up to the profile's default count, never down.
    Default,
    /// Where a schedule is active, its profile's minimum counts as the wish; never down.
    Schedule,
}

/// A capacity and rules, and when they hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProfileSpec {
    /// Unique within the document; decisions name it.
    pub name: String,
    /// When it holds; left out in the default profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleSpec>,
    /// Of profiles that hold at the same time, the one with the highest decides.
    #[serde(default)]
    pub priority: i32,
    /// Within which bounds the count moves.
    pub capacity: Capacity,
    /// None: the default profile's rules apply within this capacity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<Vec<RuleSpec>>,
}

/// Bounds of a count of instances, 0 to 1000 each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Capacity {
    /// Never fewer.
    pub min: u32,
    /// Never more.
    pub max: u32,
    /// Where nothing is known yet; from `min` to `max`.
    pub default: u32,
}

/// One of `cron` + `duration`, `weekly`, `dated`; local times of `timeZone` (UTC unless given).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScheduleSpec {
    /// Five fields: when it begins, such as `0 8 * * Mon-Fri`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cron: Option<String>,
    /// How long it holds from then on; with `cron` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Span>,
    /// On days of the week, from one time of day to another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weekly: Option<WeeklySpec>,
    /// Once, from one moment to another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dated: Option<DatedSpec>,
    /// An IANA name, such as `Europe/Berlin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
}

/// Some days of each week.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeeklySpec {
    /// `Mon` … `Sun`.
    pub days: Vec<String>,
    /// `HH:MM`, local.
    pub start: String,
    /// `HH:MM`, local; at or before `start` it lies on the next day.
    pub end: String,
}

/// A single stretch of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatedSpec {
    /// `YYYY-MM-DDTHH:MM` local, or RFC 3339 with an offset.
    pub from: String,
    /// The same shape; after `from`.
    pub to: String,
}

/// A threshold rule (`when` and `scale`) or a target to follow (`track`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuleSpec {
    /// Unique within the profile; decisions name it.
    pub name: String,
    /// What it looks at.
    pub metric: MetricSpec,
    /// A comparison with the metric: `> 4`, `<= 250ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// What is done where that holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<ScaleSpec>,
    /// The value that is to be kept; in place of `when` and `scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track: Option<TrackSpec>,
}

/// One number, made of the measurements of a stretch of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MetricSpec {
    /// One of those in METRICS.md, such as `concurrency` or `latency_p95`.
    pub name: String,
    /// How far back it looks; a minute unless given.
    #[serde(default = "a_minute")]
    pub window: Span,
    /// `average min max sum count last p50 p90 p95 p99`.
    #[serde(default = "average")]
    pub aggregation: String,
    /// Divided by the instances that are ready.
    #[serde(default)]
    pub per_instance: bool,
}

fn a_minute() -> Span {
    Span::from_secs(60)
}

fn average() -> String {
    "average".into()
}

/// A change of the count: one of `by`, `to` and `steps`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScaleSpec {
    /// Which way.
    pub direction: Direction,
    /// A count (`2`) or a share (`"50%"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<NumberOrText>,
    /// An exact count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u32>,
    /// The further the value is off, the larger the change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepSpec>>,
    /// In place of the document's, for this rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cooldown: Option<Span>,
}

/// Which way a count changes.
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
    /// Without a unit.
    Number(f64),
    /// With one.
    Text(String),
}

/// Written out, because the derived reader of untagged enums cannot say what is wrong.
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

/// The step with the greatest `above` (scale out) or the least `below` (scale in) that holds decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StepSpec {
    /// The step counts where the metric is above this; to scale out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<NumberOrText>,
    /// The step counts where the metric is below this; to scale in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<NumberOrText>,
    /// A count (`2`) or a share (`"50%"`).
    pub by: NumberOrText,
}

/// A value per instance that the count is to keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrackSpec {
    /// Wanted value per instance, in the metric's unit.
    pub target: NumberOrText,
    /// No change while the value is within this share of the target.
    #[serde(default = "ten_percent")]
    pub tolerance: String,
}

fn ten_percent() -> String {
    "10%".into()
}
