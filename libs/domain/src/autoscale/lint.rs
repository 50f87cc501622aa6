//! Warnings about policies that are valid and probably not what their author intended.

use chrono::{Duration, NaiveTime};
use contract::frame::SourceKind;
use contract::problem::Finding;
use contract::resources::{AutoscaleSpec, Direction, RuleSpec};

use super::condition::{Condition, DisplayValue, Operator};
use super::policy::{Action, Policy, Profile, Rule, RuleKind};
use super::schedule::Schedule;

impl Policy {
    /// Returns warnings about valid settings that are probably not intended.
    pub fn warnings(&self) -> Vec<Finding> {
        warnings(self)
    }
}

fn warnings(policy: &Policy) -> Vec<Finding> {
    let mut findings = Vec::new();
    let spec = policy.spec();
    for (index, profile) in policy.profiles.iter().enumerate() {
        let pointer = format!("/spec/profiles/{index}");
        lint_profile(policy, profile, &pointer, &mut findings);
        // Rules inherited from the default profile are checked there.
        if spec.profiles[index].rules.is_none() {
            continue;
        }
        for (number, rule) in profile.rules.iter().enumerate() {
            let written = rule_spec(spec, index, number);
            let pointer = format!("{pointer}/rules/{number}");
            lint_rule(policy, profile, rule, written, &pointer, &mut findings);
        }
        lint_margins(profile, &pointer, &mut findings);
    }
    findings
}

fn rule_spec(spec: &AutoscaleSpec, profile: usize, rule: usize) -> Option<&RuleSpec> {
    spec.profiles.get(profile)?.rules.as_ref()?.get(rule)
}

fn warn(findings: &mut Vec<Finding>, pointer: impl Into<String>, detail: impl Into<String>) {
    findings.push(Finding::new(pointer, detail));
}

fn lint_profile(policy: &Policy, profile: &Profile, pointer: &str, findings: &mut Vec<Finding>) {
    let rules = format!("{pointer}/rules");
    let has_rule = |wanted: Direction| {
        profile
            .rules
            .iter()
            .any(|rule| rule.direction().is_none_or(|direction| direction == wanted))
    };
    match (has_rule(Direction::Out), has_rule(Direction::In)) {
        (true, false) => warn(
            findings,
            rules.as_str(),
            "no rule scales in: once scaled out, the count stays; add a rule with direction in, or one that tracks a target",
        ),
        (false, true) => warn(
            findings,
            rules.as_str(),
            "no rule scales out: the count only falls; add a rule with direction out, or one that tracks a target",
        ),
        _ => {}
    }
    let capacity = profile.capacity;
    if capacity.min == capacity.max && !profile.rules.is_empty() {
        let detail = format!(
            "the minimum equals the maximum, so no rule can change the count {}: widen the capacity or remove the rules",
            capacity.min
        );
        warn(findings, format!("{pointer}/capacity"), detail);
    }
    let default = &policy.profiles[policy.default];
    if profile.schedule.is_some() && profile.priority < default.priority {
        let detail = format!(
            "its priority {} is below that of the default profile ({}), so it is never in force: raise it",
            profile.priority, default.priority
        );
        warn(findings, format!("{pointer}/priority"), detail);
    }
    lint_zero(profile, pointer, findings);
    lint_schedule(profile, pointer, findings);
}

/// Warns of rules that cannot scale out from zero, since only instances report what they measure.
fn lint_zero(profile: &Profile, pointer: &str, findings: &mut Vec<Finding>) {
    let scales_out = |rule: &&Rule| rule.direction() != Some(Direction::In);
    let mut rules = profile.rules.iter().filter(scales_out).peekable();
    if profile.capacity.min > 0 || rules.peek().is_none() {
        return;
    }
    if rules.all(|rule| rule.metric.row().source == SourceKind::NODE) {
        let detail = "without instances there is nothing to measure for the rules that scale out, so the count never leaves 0: raise the minimum to 1, or add a rule on requests, such as concurrency";
        warn(findings, format!("{pointer}/capacity/min"), detail);
    }
}

fn lint_schedule(profile: &Profile, pointer: &str, findings: &mut Vec<Finding>) {
    let pointer = format!("{pointer}/schedule");
    match &profile.schedule {
        Some(Schedule::Cron {
            cron,
            duration,
            expression,
            ..
        }) => {
            for detail in super::cron::ambiguities(expression) {
                warn(findings, format!("{pointer}/cron"), detail);
            }
            if cron.widest_gap() <= *duration {
                let detail = format!(
                    "the window opens again before {duration} are over, so it never closes: shorten the duration or open it less often"
                );
                warn(findings, format!("{pointer}/duration"), detail);
            }
        }
        Some(Schedule::Weekly {
            days, start, end, ..
        }) => {
            let length = *end - start.signed_duration_since(NaiveTime::MIN);
            if days.iter().all(|day| *day) && length >= Duration::days(1) {
                let detail = "the window covers the whole day on every day, so it never closes: leave out a day, end it earlier, or make it the default profile";
                warn(findings, format!("{pointer}/weekly"), detail);
            }
        }
        Some(Schedule::Dated { .. }) | None => {}
    }
}

fn lint_rule(
    policy: &Policy,
    profile: &Profile,
    rule: &Rule,
    written: Option<&RuleSpec>,
    pointer: &str,
    findings: &mut Vec<Finding>,
) {
    let window = policy.signals[rule.signal].window;
    if written.is_some_and(|rule| rule.metric.per_instance) && !rule.metric.is_per_instance() {
        let detail = format!(
            "{} is a value of one instance or answer already, so perInstance changes nothing: remove it",
            rule.metric.name()
        );
        warn(findings, format!("{pointer}/metric/perInstance"), detail);
    }
    if rule.direction() != Some(Direction::Out)
        && rule.cooldown_in < window
        && policy.stabilize_in < window
    {
        let detail = format!(
            "after a scale-in the window of {window} still holds measurements from before it when the rule may act again: make the cooldown or the stabilization at least {window}"
        );
        warn(findings, format!("{pointer}/metric/window"), detail);
    }
    let RuleKind::Threshold {
        condition,
        direction,
        action,
    } = &rule.kind
    else {
        return;
    };
    if let Some(condition) = condition {
        lint_direction(condition.operator, *direction, pointer, findings);
    }
    lint_target(profile, *direction, action, pointer, findings);
}

fn lint_direction(
    operator: Operator,
    direction: Direction,
    pointer: &str,
    findings: &mut Vec<Finding>,
) {
    let low = matches!(operator, Operator::Below | Operator::AtMost);
    let high = matches!(operator, Operator::Above | Operator::AtLeast);
    let detail = match direction {
        Direction::Out if low => {
            "the rule scales out while the value is low: turn the operator or the direction around"
        }
        Direction::In if high => {
            "the rule scales in while the value is high: turn the operator or the direction around"
        }
        _ => return,
    };
    warn(findings, format!("{pointer}/scale/direction"), detail);
}

fn lint_target(
    profile: &Profile,
    direction: Direction,
    action: &Action,
    pointer: &str,
    findings: &mut Vec<Finding>,
) {
    let Action::To(to) = action else {
        return;
    };
    let capacity = profile.capacity;
    let detail = match direction {
        Direction::Out if *to <= capacity.min => {
            format!(
                "scaling out to {to} never adds an instance: the minimum is {} already",
                capacity.min
            )
        }
        Direction::In if *to >= capacity.max => {
            format!(
                "scaling in to {to} never removes an instance: the maximum is {}",
                capacity.max
            )
        }
        _ => return,
    };
    warn(findings, format!("{pointer}/scale/to"), detail);
}

/// Warns of a scale-in that ends where the same signal immediately scales out again. The projection
/// prevents that, so the count would stay although the rule holds.
fn lint_margins(profile: &Profile, pointer: &str, findings: &mut Vec<Finding>) {
    for (number, rule) in profile.rules.iter().enumerate() {
        let Some(below) = bound(rule, Direction::In) else {
            continue;
        };
        for other in profile.rules.iter() {
            let Some(above) = bound(other, Direction::Out) else {
                continue;
            };
            let same = other.signal == rule.signal && other.per_instance == rule.per_instance;
            if same {
                lint_margin(
                    profile,
                    (rule, below),
                    (other, above),
                    &format!("{pointer}/rules/{number}"),
                    findings,
                );
            }
        }
    }
}

/// The value below which a rule scales in, or above which it scales out.
fn bound(rule: &Rule, wanted: Direction) -> Option<f64> {
    let RuleKind::Threshold {
        condition: Some(Condition {
            operator,
            threshold,
        }),
        direction,
        ..
    } = &rule.kind
    else {
        return None;
    };
    let fits = match wanted {
        Direction::In => matches!(operator, Operator::Below | Operator::AtMost),
        Direction::Out => matches!(operator, Operator::Above | Operator::AtLeast),
    };
    (*direction == wanted && fits).then_some(*threshold)
}

fn lint_margin(
    profile: &Profile,
    (rule, below): (&Rule, f64),
    (other, above): (&Rule, f64),
    pointer: &str,
    findings: &mut Vec<Finding>,
) {
    let (low, high) = (
        DisplayValue(rule.metric, below),
        DisplayValue(rule.metric, above),
    );
    if below > above {
        let detail = format!(
            "below {low} this rule scales in, and above {high} `{}` scales out: between them both hold; lower this one",
            other.name
        );
        warn(findings, format!("{pointer}/when"), detail);
        return;
    }
    if !rule.scales {
        return;
    }
    // The load per instance grows most when the fewest instances remain.
    let fewest = profile.capacity.min.max(1) + 1;
    let grown = below * f64::from(fewest) / f64::from(fewest - 1);
    if fewest <= profile.capacity.max && grown >= above {
        let detail = format!(
            "the margin is too small: from {fewest} to {} instances {low} becomes {}, at which `{}` ({high}) scales out again; lower this one or widen the gap",
            fewest - 1,
            DisplayValue(rule.metric, grown),
            other.name
        );
        warn(findings, format!("{pointer}/when"), detail);
    }
}
