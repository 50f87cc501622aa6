//! What changed a count, or keeps it, in words: the one sentence that decisions record, and that
//! `explain`, `decisions` and `top` show.

use contract::decision::{CauseKind, Decision, DecisionOutcome, RuleResult, Verdict};
use contract::resources::Capacity;

use super::describe;

/// Returns the sentence of a decision, without its full stop. That of an older release, which records no
/// cause, is derived from what it does record.
pub fn sentence(decision: &Decision) -> String {
    match &decision.cause {
        Some(cause) => cause.detail.clone(),
        None => detail(decision, presumed(decision)),
    }
}

/// The cause of a decision that does not name it.
fn presumed(decision: &Decision) -> CauseKind {
    let is_bounded = decision
        .stages
        .iter()
        .any(|stage| stage.name == "bounds" && stage.before != stage.after);
    match decision.outcome {
        DecisionOutcome::Pinned => CauseKind::Pin,
        DecisionOutcome::Fixed | DecisionOutcome::Shadow => CauseKind::Document,
        DecisionOutcome::HeldByPause => CauseKind::Pause,
        DecisionOutcome::HeldByFailedStarts => CauseKind::FailedStarts,
        DecisionOutcome::Unknown => CauseKind::Data,
        DecisionOutcome::Clamped if decision.from == decision.granted => CauseKind::Bounds,
        _ if decision.decided_by.is_some() => CauseKind::Rule,
        _ if is_bounded => CauseKind::Bounds,
        _ => CauseKind::Profile,
    }
}

/// Describes a cause of this kind. The decision holds everything else.
pub(super) fn detail(decision: &Decision, kind: CauseKind) -> String {
    if decision.outcome == DecisionOutcome::Steady {
        return "nothing asks for another count".into();
    }
    match kind {
        CauseKind::Rule => by_rule(decision),
        CauseKind::Profile => by_profile(decision),
        CauseKind::Bounds => by_bounds(decision),
        CauseKind::Pin => by_pin(decision),
        CauseKind::PinEnd => by_pin_end(decision),
        CauseKind::Pause => last_stage(decision, &["pause", "mode"]),
        CauseKind::Document => by_document(decision),
        CauseKind::Data => by_data(decision),
        CauseKind::FailedStarts => by_failed_starts(decision),
    }
}

fn decided_by(decision: &Decision) -> Option<&RuleResult> {
    let name = decision.decided_by.as_ref()?;
    decision.rules.iter().find(|rule| rule.name == *name)
}

/// The detail of the last stage with one of these names.
fn last_stage(decision: &Decision, names: &[&str]) -> String {
    let mut stages = decision.stages.iter();
    let stage = stages.rfind(|stage| names.contains(&stage.name.as_str()));
    stage.map_or(String::new(), |stage| stage.detail.clone())
}

fn with_reason(mut words: String, reason: &str) -> String {
    if !reason.is_empty() {
        words.reserve(reason.len() + 2);
        words.push_str(": ");
        words.push_str(reason);
    }
    words
}

fn name_of_rule(decision: &Decision) -> String {
    match &decision.decided_by {
        Some(name) => format!("`{name}`"),
        None => "the policy".into(),
    }
}

fn by_rule(decision: &Decision) -> String {
    let rule = name_of_rule(decision);
    let because = decided_by(decision).map_or("", |rule| rule.because.as_str());
    let held = |words: &str, stage: &str| {
        with_reason(format!("{rule} {words}"), &last_stage(decision, &[stage]))
    };
    match decision.outcome {
        DecisionOutcome::HeldByCooldown => {
            held("would change it, but a cooldown holds", "cooldown")
        }
        DecisionOutcome::HeldByStabilization => held(
            "would change it, but not for long enough yet",
            "stabilization",
        ),
        DecisionOutcome::HeldByRefusals => held("would scale in", "refusals"),
        DecisionOutcome::HeldByProjection => held("would scale in", "projection"),
        DecisionOutcome::Clamped => with_reason(
            format!("{rule}, {}", last_stage(decision, &["clamp"])),
            because,
        ),
        _ => with_reason(rule, because),
    }
}

/// The bounds of the profile in force.
fn capacity(decision: &Decision) -> Option<Capacity> {
    let name = decision.profile.as_ref()?;
    let policy = decision.inputs.policy.as_ref()?;
    let mut profiles = policy.profiles.iter();
    let profile = profiles.find(|profile| profile.name == *name)?;
    Some(profile.capacity)
}

/// `1 to 20`, and the default if that is the count.
fn allowed(decision: &Decision) -> String {
    match capacity(decision) {
        Some(capacity) if decision.stages.iter().any(|stage| stage.name == "default") => {
            format!("its count is {}", capacity.default)
        }
        Some(capacity) => format!("it allows {} to {}", capacity.min, capacity.max),
        None => "no bounds".into(),
    }
}

fn profile_name(decision: &Decision) -> &str {
    decision.profile.as_deref().unwrap_or("default")
}

fn by_profile(decision: &Decision) -> String {
    let (name, carried) = (profile_name(decision), &decision.inputs.carried);
    let is_scheduled = |name: &str| {
        let policy = decision.inputs.policy.as_ref();
        let mut profiles = policy.iter().flat_map(|policy| policy.profiles.iter());
        profiles.any(|profile| profile.name == name && profile.schedule.is_some())
    };
    let allowed = allowed(decision);
    match &carried.profile {
        Some(before) if before != name && is_scheduled(name) => {
            format!("profile `{name}` has begun: {allowed}")
        }
        Some(before) if before != name => {
            format!("profile `{before}` has ended, `{name}` is in force: {allowed}")
        }
        None if carried.granted.is_none() || decision.inputs.starts_at_default => {
            format!("the first count of profile `{name}` is its default")
        }
        _ => format!("profile `{name}`: {allowed}"),
    }
}

fn by_bounds(decision: &Decision) -> String {
    let (name, inputs) = (profile_name(decision), &decision.inputs);
    let (min, max) = capacity(decision).map_or((0, 0), |capacity| (capacity.min, capacity.max));
    if decision.from == decision.granted {
        let rule = name_of_rule(decision);
        let asked = decided_by(decision);
        let wants_fewer = asked
            .and_then(|rule| rule.wanted)
            .is_some_and(|wanted| wanted < decision.granted);
        let words = match wants_fewer {
            true => format!("{rule} asks for fewer than the minimum {min} of `{name}`"),
            false => format!("{rule} asks for more than the maximum {max} of `{name}`"),
        };
        return with_reason(words, asked.map_or("", |rule| rule.because.as_str()));
    }
    let what = match inputs.carried.policy_revision {
        Some(0) => "the Autoscale applies from now on".into(),
        Some(before) if before != inputs.policy_revision => {
            format!("revision {} of the Autoscale", inputs.policy_revision)
        }
        _ => format!("{} was outside of the bounds", decision.from),
    };
    format!("{what}: `{name}` allows {min} to {max}")
}

fn by_pin(decision: &Decision) -> String {
    let words = last_stage(decision, &["pin"]);
    match &decision.inputs.pinned_by {
        Some(by) => format!("{words}, by {by}"),
        None => words,
    }
}

fn by_pin_end(decision: &Decision) -> String {
    let then = match &decision.profile {
        Some(name) => format!("`{name}` is in force, {}", allowed(decision)),
        None => last_stage(decision, &["fixed"]),
    };
    format!("the pin to {} has ended: {then}", decision.from)
}

fn by_document(decision: &Decision) -> String {
    if decision.outcome == DecisionOutcome::Shadow {
        let instances = describe::instances(decision.wanted);
        return format!(
            "the policy is in shadow mode and would have {instances}; the deployment's own count stands"
        );
    }
    let was_removed =
        (decision.inputs.carried.policy_revision).is_some_and(|revision| revision > 0);
    match was_removed {
        true => "the Autoscale was removed: the deployment's own count".into(),
        false => last_stage(decision, &["fixed"]),
    }
}

fn by_data(decision: &Decision) -> String {
    if decision.outcome != DecisionOutcome::Unknown {
        return last_stage(decision, &["rules"]);
    }
    let mut rules = decision.rules.iter();
    match rules.find(|rule| rule.verdict == Verdict::Unknown) {
        Some(rule) => format!(
            "some data is incomplete, so nothing scales in: `{}`, {}",
            rule.name, rule.because
        ),
        None => last_stage(decision, &["policy", "rules"]),
    }
}

fn by_failed_starts(decision: &Decision) -> String {
    let rule = name_of_rule(decision);
    format!(
        "{rule} would change it, but {}",
        last_stage(decision, &["starts"])
    )
}
