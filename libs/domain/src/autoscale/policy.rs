//! A compiled Autoscale document: conditions parsed, schedules resolved, signals numbered.
//!
//! Invariant: a compiled policy can be evaluated at any instant with any inputs; every fault of a
//! document is found at once, each with its field and what to do.

mod compile;

use std::sync::Arc;

use contract::problem::Finding;
use contract::resources::{AutoscaleMode, AutoscaleSpec, Capacity, Direction, MissingMetric};
use contract::time::{Span, Timestamp};

use self::compile::Compiler;
use super::condition::{Amount, Condition};
use super::schedule::Schedule;
use crate::measure::{METRICS, Metric, MetricRow, SignalSpec};
use crate::zones::ZoneData;

/// Most profiles of a policy.
pub const PROFILES_MAX: usize = 20;
/// Most rules of a profile.
pub const RULES_MAX: usize = 20;
/// Most steps of a rule.
pub const STEPS_MAX: usize = 10;
/// Longest name of a profile or rule, in bytes.
pub const LABEL_LENGTH_MAX: usize = 64;
/// Longest cooldown.
pub const COOLDOWN_MAX: Span = Span::from_secs(7 * 86_400);
/// Longest initialization period.
pub const INITIALIZATION_MAX: Span = Span::from_secs(3600);
/// Longest stabilization window.
pub const STABILIZATION_MAX: Span = Span::from_secs(86_400);

/// An Autoscale document, checked and ready to be evaluated.
#[derive(Clone, Debug)]
pub struct Policy {
    pub(super) spec: Arc<AutoscaleSpec>,
    pub(super) mode: AutoscaleMode,
    pub(super) missing: MissingMetric,
    pub(super) stabilize_out: Span,
    pub(super) stabilize_in: Span,
    pub(super) profiles: Vec<Profile>,
    pub(super) default: usize,
    pub(super) signals: Vec<SignalSpec>,
    /// The keys of the signals, in their order: each decision needs them.
    pub(super) signal_keys: Vec<String>,
    /// The time zone release that its schedules use; `None` without a schedule.
    pub(super) zone_data: Option<String>,
}

#[derive(Clone, Debug)]
pub(super) struct Profile {
    pub name: String,
    pub schedule: Option<Schedule>,
    pub priority: i32,
    pub capacity: Capacity,
    pub rules: Arc<[Rule]>,
}

#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub name: String,
    pub metric: Metric,
    /// Index into the policy's signals.
    pub signal: usize,
    /// Whether the compared value is divided by ready instances.
    pub per_instance: bool,
    /// Whether the value falls as instances are added, for the projection.
    pub scales: bool,
    pub kind: RuleKind,
    /// Time after the last change before this rule scales out or in again.
    pub cooldown_out: Span,
    pub cooldown_in: Span,
}

#[derive(Clone, Debug)]
pub(super) enum RuleKind {
    Threshold {
        /// `None` if the steps alone decide.
        condition: Option<Condition>,
        direction: Direction,
        action: Action,
    },
    /// Tracks a target per instance, in the metric's unit.
    Track { target: f64, tolerance: f64 },
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    By(Amount),
    To(u32),
    /// Ordered so that the last one that applies decides.
    Steps(Vec<ScaleStep>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ScaleStep {
    pub bound: f64,
    pub by: Amount,
}

/// The active profile, and how long it is certain to stay active. A function of policy and time
/// alone, so one that still holds can be reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    pub(super) profile: usize,
    pub(super) from: Timestamp,
    /// `None` if it never changes.
    pub(super) until: Option<Timestamp>,
}

impl Selection {
    /// Whether selecting again would return the same.
    pub fn holds(&self, now: Timestamp) -> bool {
        self.from <= now && self.until.is_none_or(|until| now < until)
    }

    /// When to select again; `None` if never.
    pub fn until(&self) -> Option<Timestamp> {
        self.until
    }
}

/// A change of the active profile.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    /// When it takes effect.
    pub at: Timestamp,
    /// Name of the profile.
    pub profile: String,
    /// Minimum number of instances.
    pub min: u32,
    /// Maximum number of instances.
    pub max: u32,
    /// Number of instances when nothing is known yet.
    pub default: u32,
}

/// The profiles that are active over a period.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SchedulePreview {
    /// The profile at the start, and each change, oldest first.
    pub items: Vec<Transition>,
    /// When the first change happens that was left out because there are too many; `None` if none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_at: Option<Timestamp>,
}

/// Most transitions that are listed: a per-minute schedule has a million a year.
pub const TRANSITIONS_MAX: usize = 10_000;

impl Policy {
    /// Compiles a document.
    ///
    /// # Errors
    ///
    /// All faults of the document, at least one, for its author. Pointers start with `/spec`.
    pub fn compile(spec: &AutoscaleSpec, zones: &ZoneData) -> Result<Self, Vec<Finding>> {
        Self::compile_among(METRICS, spec, zones)
    }

    /// [`compile`](Self::compile) with a different set of metrics.
    ///
    /// # Errors
    ///
    /// As [`compile`](Self::compile).
    pub fn compile_among(
        metrics: &'static [MetricRow],
        spec: &AutoscaleSpec,
        zones: &ZoneData,
    ) -> Result<Self, Vec<Finding>> {
        let mut compiler = Compiler::new(metrics, zones);
        let policy = compiler.policy(spec);
        match policy {
            Some(policy) if compiler.findings.is_empty() => Ok(policy),
            _ => Err(compiler.findings),
        }
    }

    /// The document that it was compiled from.
    pub fn spec(&self) -> &Arc<AutoscaleSpec> {
        &self.spec
    }

    /// The aggregates that the rules read; inputs provide them in this order.
    pub fn signals(&self) -> &[SignalSpec] {
        &self.signals
    }

    /// Selects the active profile: the highest priority among the default profile and those whose
    /// schedule is active; then dated before recurring before default; then the order in the
    /// document.
    pub fn select(&self, now: Timestamp) -> Selection {
        let mut best = self.default;
        let mut until: Option<Timestamp> = None;
        let rank = |index: usize| {
            let profile = &self.profiles[index];
            let kind = match &profile.schedule {
                None => 0,
                Some(schedule) if schedule.is_dated() => 2,
                Some(_) => 1,
            };
            (profile.priority, kind, std::cmp::Reverse(index))
        };
        for (index, profile) in self.profiles.iter().enumerate() {
            let Some(schedule) = &profile.schedule else {
                continue;
            };
            let state = schedule.state_at(now);
            until = [until, state.until].into_iter().flatten().min();
            if state.is_open && rank(index) > rank(best) {
                best = index;
            }
        }
        Selection {
            profile: best,
            from: now,
            until,
        }
    }

    /// The name of a selected profile.
    pub fn profile_name(&self, selection: Selection) -> &str {
        &self.profiles[selection.profile].name
    }

    /// The profile that is active at an instant.
    pub fn profile_at(&self, now: Timestamp) -> Transition {
        self.transition(now, self.select(now).profile)
    }

    /// Returns the profile at `from` and its changes up to `to`, at most `TRANSITIONS_MAX` of them.
    pub fn preview(&self, from: Timestamp, to: Timestamp) -> SchedulePreview {
        let (later, cut_at) = self.changes(from + Span::from_millis(1), to);
        let first = std::iter::once(self.profile_at(from));
        SchedulePreview {
            items: first.chain(later).collect(),
            cut_at,
        }
    }

    /// Returns the changes of the active profile in `[from, to)`, at most `TRANSITIONS_MAX`.
    pub fn transitions(&self, from: Timestamp, to: Timestamp) -> Vec<Transition> {
        self.changes(from, to).0
    }

    /// The changes in `[from, to)`, and the time of the first one beyond the limit.
    fn changes(&self, from: Timestamp, to: Timestamp) -> (Vec<Transition>, Option<Timestamp>) {
        let mut transitions = Vec::new();
        let mut selection = self.select(from - Span::from_millis(1));
        while let Some(at) = selection.until.filter(|at| *at < to) {
            let next = self.select(at);
            if next.profile != selection.profile {
                if transitions.len() == TRANSITIONS_MAX {
                    return (transitions, Some(at));
                }
                transitions.push(self.transition(at, next.profile));
            }
            selection = next;
        }
        (transitions, None)
    }

    fn transition(&self, at: Timestamp, profile: usize) -> Transition {
        let profile = &self.profiles[profile];
        Transition {
            at,
            profile: profile.name.clone(),
            min: profile.capacity.min,
            max: profile.capacity.max,
            default: profile.capacity.default,
        }
    }
}
