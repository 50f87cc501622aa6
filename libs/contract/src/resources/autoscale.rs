//! `kind: Autoscale`: profiles, capacities and rules of one deployment, as written.
//!
//! Parsing stops at the text of conditions and schedules (`when`, `cron`, `by`); the engine compiles
//! them (`domain::autoscale::Policy::compile`) and reports every fault with its field.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::ids::DeploymentRef;
use crate::time::Span;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AutoscaleSpec {
    pub target: DeploymentRef,
    #[serde(default)]
    pub mode: AutoscaleMode,
    #[serde(default)]
    pub cooldown: Cooldown,
    #[serde(default)]
    pub stabilization: Stabilization,
    #[serde(default)]
    pub missing: MissingMetric,
    pub profiles: Vec<ProfileSpec>,
}

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
    pub out: Span,
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
    pub out: Span,
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

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProfileSpec {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleSpec>,
    #[serde(default)]
    pub priority: i32,
    pub capacity: Capacity,
    /// None: the default profile's rules apply within this capacity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<Vec<RuleSpec>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Capacity {
    pub min: u32,
    pub max: u32,
    pub default: u32,
}

/// One of `cron` + `duration`, `weekly`, `dated`; local times of `timeZone` (UTC unless given).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScheduleSpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cron: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Span>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weekly: Option<WeeklySpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dated: Option<DatedSpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
}

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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatedSpec {
    /// `YYYY-MM-DDTHH:MM` local, or RFC 3339 with an offset.
    pub from: String,
    pub to: String,
}

/// A threshold rule (`when` and `scale`) or a target to follow (`track`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuleSpec {
    pub name: String,
    pub metric: MetricSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<ScaleSpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track: Option<TrackSpec>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MetricSpec {
    /// One of those in METRICS.md.
    pub name: String,
    #[serde(default = "a_minute")]
    pub window: Span,
    /// `average min max sum count last p50 p90 p95 p99`.
    #[serde(default = "average")]
    pub aggregation: String,
    #[serde(default)]
    pub per_instance: bool,
}

fn a_minute() -> Span {
    Span::from_secs(60)
}

fn average() -> String {
    "average".into()
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScaleSpec {
    pub direction: Direction,
    /// A count (`2`) or a share (`"50%"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<NumberOrText>,
    /// An exact count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepSpec>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cooldown: Option<Span>,
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Out,
    In,
}

#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum NumberOrText {
    Number(f64),
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<NumberOrText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<NumberOrText>,
    pub by: NumberOrText,
}

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
