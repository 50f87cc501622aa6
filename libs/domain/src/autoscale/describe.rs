//! The sentences in decisions. Nothing here affects the result.

use std::fmt::Write;

use contract::decision::{FailedStarts, Pause, Pin, Unmeasured, Verdict};
use contract::resources::Direction;
use contract::time::{Span, Timestamp};

use super::condition::{Amount, DisplayValue};
use super::policy::{Action, Policy, Profile, Rule, RuleKind};
use super::rules::{Proposal, Quality, RuleInput};
use crate::measure::Aggregation;

pub(super) fn profile(profile: &Profile) -> String {
    let kind = match &profile.schedule {
        None => "the default profile",
        Some(schedule) if schedule.is_dated() => "a dated profile",
        Some(_) => "a recurring profile",
    };
    let capacity = profile.capacity;
    format!(
        "`{}`, {kind} with priority {}: {} to {}, default {}",
        profile.name, profile.priority, capacity.min, capacity.max, capacity.default
    )
}

pub(super) fn pin(pin: &Pin) -> String {
    match pin.until {
        Some(until) => format!("pinned by hand until {until}"),
        None => "pinned by hand until released".into(),
    }
}

pub(super) fn pause(pause: Pause, held: bool) -> String {
    let what = match (pause.scale_in, pause.scale_out) {
        (true, true) => "scaling is paused",
        (true, false) => "scale-in is paused",
        _ => "scale-out is paused",
    };
    let then = if held { ": the count stays" } else { "" };
    format!("{what}{then}")
}

/// What the rules of a profile came to together.
pub(super) struct Combination {
    /// Whether a rule asks to scale out.
    pub fired: bool,
    /// The least count while a metric has no data.
    pub floor: Option<u32>,
    pub recommendation: u32,
    pub base: u32,
    /// Whether no rule lacks data.
    pub complete: bool,
    /// When that will be, if it is known.
    pub complete_at: Option<Timestamp>,
    /// Whether no rule objects to a scale-in.
    pub agree: bool,
}

pub(super) fn combined(profile: &Profile, of: &Combination) -> String {
    let has_in = profile
        .rules
        .iter()
        .any(|rule| rule.direction() != Some(Direction::Out));
    if of.floor.is_some_and(|floor| floor == of.recommendation) {
        "a metric has no data: at least the policy's count for that".into()
    } else if of.fired {
        "a rule asks to scale out: the largest count wins".into()
    } else if of.recommendation < of.base {
        "all rules that scale in agree: the largest count wins".into()
    } else if !of.complete {
        match of.complete_at {
            Some(at) => format!("some metric has no whole data: nothing scales in before {at}"),
            None => "some metric has no whole data: nothing scales in".into(),
        }
    } else if has_in && !of.agree {
        "no rule asks to scale out, and not all agree to scale in".into()
    } else {
        "no rule asks for a change".into()
    }
}

pub(super) fn refusals(refused: u64) -> String {
    let requests = if refused == 1 {
        "1 request was".into()
    } else {
        format!("{refused} requests were")
    };
    format!(
        "{requests} refused for lack of capacity in the rules' windows: no rule scales in until none are"
    )
}

/// `1 instance`, `3 instances`.
pub(super) fn instances(count: u32) -> String {
    let noun = if count == 1 { "instance" } else { "instances" };
    format!("{count} {noun}")
}

/// `5 starts in a row failed, the last one with: exit code 1`.
pub(super) fn starts(failed: &FailedStarts) -> String {
    match failed.in_a_row {
        1 => format!("the last start failed: {}", failed.reason),
        count => format!(
            "{count} starts in a row failed, the last one with: {}",
            failed.reason
        ),
    }
}

pub(super) fn starts_hold(failed: &FailedStarts) -> String {
    format!(
        "no instance of the present revision was ever ready, so no rule changes the count: {}",
        starts(failed)
    )
}

pub(super) fn projection(
    profile: &Profile,
    inputs: &[RuleInput<'_>],
    blocking: Option<(usize, u32)>,
    after: u32,
    base: u32,
) -> String {
    let Some((index, count)) = blocking else {
        return format!("at {after} no rule would scale out again");
    };
    let (rule, input) = (&profile.rules[index], &inputs[index]);
    let value = DisplayValue(rule.metric, rule.projected(input, count));
    let name = &rule.name;
    if after == base {
        format!("at {count} `{name}` would read {value} and scale out again: the count stays")
    } else {
        format!("at {count} `{name}` would read {value} and scale out again; at {after} none would")
    }
}

pub(super) fn stabilization(window: Span, recommendation: u32, after: u32) -> String {
    if window == Span::ZERO {
        "no window".into()
    } else if recommendation == after {
        format!("no less eager wish in the last {window}")
    } else {
        format!("the least eager wish of the last {window} counts")
    }
}

pub(super) fn cooldown(before: u32, after: u32, until: Option<Timestamp>) -> String {
    match until {
        Some(until) if before != after => format!("cooling down until {until}"),
        _ => "no cool-down is running".into(),
    }
}

/// `12.4 > 4 (concurrency, average per instance over 30s)`.
pub(super) fn rule(
    policy: &Policy,
    rule: &Rule,
    input: &RuleInput<'_>,
    base: u32,
    verdict: Verdict,
) -> String {
    let spec = &policy.signals[rule.signal];
    let mut of = String::from(rule.metric.name());
    if !(rule.metric.is_latency() && spec.aggregation == Aggregation::Average) {
        let _ = write!(of, ", {}", spec.aggregation.name());
    }
    if rule.per_instance {
        of.push_str(" per instance");
    }
    let _ = write!(of, " over {}", spec.window);
    match input.quality {
        Quality::Missing => return format!("no data ({of})"),
        Quality::Warming => return format!("nothing is measured yet ({of})"),
        Quality::Unmeasured => return format!("{} ({of})", unmeasured(input)),
        Quality::Partial | Quality::Complete => {}
    }
    let value = DisplayValue(rule.metric, input.value);
    let mut text = match &rule.kind {
        RuleKind::Threshold {
            condition: Some(condition),
            ..
        } => {
            let holds = condition.holds(input.value);
            let not = if holds { "" } else { "not " };
            let threshold = DisplayValue(rule.metric, condition.threshold);
            format!(
                "{value} {not}{} {threshold} ({of})",
                condition.operator.symbol()
            )
        }
        RuleKind::Threshold { .. } => format!("{value} ({of})"),
        RuleKind::Track { target, tolerance } => {
            let (target_value, target) = (*target, DisplayValue(rule.metric, *target));
            let percent = format!("{:.3}", tolerance * 100.0);
            let percent = percent.trim_end_matches('0').trim_end_matches('.');
            let needed = match rule.propose(input, base) {
                Proposal::Out(_) => input.total,
                Proposal::In(_) | Proposal::NoChange => input.total_for_scale_in,
            } / target_value;
            format!(
                "{value} for a target of {target}: needs {needed:.2} instances, has {base}, tolerance {percent}% ({of})"
            )
        }
    };
    if let RuleKind::Threshold {
        action, direction, ..
    } = &rule.kind
    {
        let _ = write!(text, ": {}", describe_action(rule, action, *direction));
    }
    match verdict {
        Verdict::Suppressed => text.push_str("; not looked at, since a rule scales out"),
        Verdict::Unknown if input.unmeasured().is_some() => {
            let _ = write!(text, "; no reason to scale in: {}", unmeasured(input));
        }
        Verdict::Unknown => {
            let _ = write!(text, "; {}", lacking(input));
            if let Some(at) = input.complete_at() {
                let _ = write!(text, ", so it does not scale in before {at}");
            }
        }
        Verdict::Triggered | Verdict::NotTriggered if input.uncovered().is_some() => {
            let _ = write!(text, "; {}", lacking(input));
        }
        Verdict::Triggered | Verdict::NotTriggered => {}
    }
    text
}

/// What keeps the measurements from being complete.
fn lacking(input: &RuleInput<'_>) -> String {
    match input.uncovered() {
        Some((lacking, wanted)) => {
            format!("only {} of {wanted} s are measured", wanted - lacking)
        }
        None if input.is_outdated() => "part of it was measured by other definitions".into(),
        None => "a source of measurements was missing".into(),
    }
}

fn unmeasured(input: &RuleInput<'_>) -> &'static str {
    match input.unmeasured() {
        Some(Unmeasured::Unanswered) => "there were requests, and none was answered",
        Some(Unmeasured::NoInstance) => "no instance was measured while ready",
        None => "no data",
    }
}

fn describe_action(rule: &Rule, action: &Action, direction: Direction) -> String {
    let way = match direction {
        Direction::Out => "out",
        Direction::In => "in",
    };
    let amount = |amount: &Amount| match amount {
        Amount::Count(count) => count.to_string(),
        Amount::Share(parts) => format!("{}%", f64::from(*parts) / 1000.0),
    };
    match action {
        Action::By(by) => format!("{way} by {}", amount(by)),
        Action::To(count) => format!("{way} to {count}"),
        Action::Steps(steps) => {
            let side = match direction {
                Direction::Out => "above",
                Direction::In => "below",
            };
            let steps: Vec<String> = steps
                .iter()
                .map(|step| {
                    format!(
                        "{} {side} {}",
                        amount(&step.by),
                        DisplayValue(rule.metric, step.bound)
                    )
                })
                .collect();
            format!("{way} by {}", steps.join(", "))
        }
    }
}
