//! The state that one evaluation hands to the next: the count and what set it, the last change in each
//! direction, and the recommendations that may still hold something back.

use contract::decision::{
    CarriedState, CauseKind, Decision, DecisionOutcome, LastChange, Recommendation,
};
use contract::time::{Span, Timestamp};

use super::evaluate::Evaluation;
use super::policy::Policy;
use crate::zones::ZoneData;

/// Updates the carried state with an evaluation.
pub fn carry(
    carried: &mut CarriedState,
    policy: Option<&Policy>,
    evaluation: &Evaluation,
    now: Timestamp,
) {
    let decided_by = || policy.and_then(|policy| evaluation.decided_by(policy));
    grant(
        carried,
        evaluation.granted,
        evaluation.cause,
        decided_by,
        now,
    );
    let profile = policy.and_then(|policy| evaluation.profile(policy));
    let pinned = evaluation.outcome == DecisionOutcome::Pinned;
    set_origin(carried, profile, evaluation.policy_revision, pinned);
    carried.fixed_instances = Some(evaluation.fixed_instances);
    let (out, scale_in) = policy.map_or((Span::ZERO, Span::ZERO), |policy| {
        (policy.stabilize_out, policy.stabilize_in)
    });
    let recommendation = Recommendation {
        last: now,
        instances: evaluation.recommendation,
    };
    push_recommendation(&mut carried.recommendations, recommendation, out, scale_in);
}

fn grant<'a>(
    carried: &mut CarriedState,
    granted: u32,
    cause: Option<CauseKind>,
    decided_by: impl FnOnce() -> Option<&'a str>,
    at: Timestamp,
) {
    let change = || {
        let rule = decided_by().map(str::to_owned);
        Some(LastChange { at, rule })
    };
    let before = carried.granted.replace(granted);
    if cause.is_some_and(|cause| !cause.starts_cooldown()) {
        return;
    }
    match before {
        Some(before) if granted > before => carried.last_out = change(),
        Some(before) if granted < before => carried.last_in = change(),
        _ => {}
    }
}

/// Remembers under what the count was granted, to tell what changes it next. Most evaluations change
/// nothing here, and copy nothing.
fn set_origin(carried: &mut CarriedState, profile: Option<&str>, revision: u64, pinned: bool) {
    if carried.profile.as_deref() != profile {
        carried.profile = profile.map(str::to_owned);
    }
    carried.policy_revision = Some(revision);
    carried.pinned = pinned;
}

/// Adds a recommendation, and drops those that can no longer count: older than the longest window,
/// or followed by one that restrains at least as much in every direction with a window. At most one
/// recommendation per count remains.
fn push_recommendation(
    recommendations: &mut Vec<Recommendation>,
    recommendation: Recommendation,
    out: Span,
    scale_in: Span,
) {
    let longest = out.max(scale_in);
    recommendations.retain(|earlier| {
        let counts_in = scale_in > Span::ZERO && earlier.instances > recommendation.instances;
        let counts_out = out > Span::ZERO && earlier.instances < recommendation.instances;
        (counts_in || counts_out) && recommendation.last.since(earlier.last) < longest
    });
    recommendations.push(recommendation);
}

/// Returns the state after a decision of this engine.
pub fn carried_next(decision: &Decision, zones: &ZoneData) -> CarriedState {
    let policy = decision
        .inputs
        .policy
        .as_ref()
        .and_then(|spec| Policy::compile(spec, zones).ok());
    let mut carried = decision.inputs.carried.clone();
    let evaluation = super::decide::evaluate_inputs(policy.as_ref(), &decision.inputs, decision.at);
    carry(&mut carried, policy.as_ref(), &evaluation, decision.at);
    carried
}

/// Returns the state to continue with after a start or a takeover, from the last recorded decision.
/// Its granted count is taken as recorded, whatever this engine would make of its inputs: another
/// version, or other time zones, may have produced it. Cooldowns keep running; recommendations
/// made since are unknown, so the stabilization windows are filled with the current count.
pub fn carried_after_restart(last: &Decision, now: Timestamp) -> CarriedState {
    let mut carried = last.inputs.carried.clone();
    grant(
        &mut carried,
        last.granted,
        last.cause.as_ref().map(|cause| cause.kind),
        || last.decided_by.as_deref(),
        last.at,
    );
    set_origin(
        &mut carried,
        last.profile.as_deref(),
        last.inputs.policy_revision,
        last.outcome == DecisionOutcome::Pinned,
    );
    carried.fixed_instances = Some(last.inputs.fixed_instances);
    carried.recommendations = vec![Recommendation {
        last: now.max(last.at),
        instances: last.granted,
    }];
    carried
}

/// Returns the state after the clock was set back from `recorded` to `clock`: the elapsed part of
/// each cooldown and window stays elapsed.
pub fn carried_after_clock_step(
    carried: &CarriedState,
    recorded: Timestamp,
    clock: Timestamp,
) -> CarriedState {
    let shifted =
        |at: Timestamp| Timestamp::from_millis(at.millis() + clock.millis() - recorded.millis());
    let mut carried = carried.clone();
    let changes = [&mut carried.last_out, &mut carried.last_in];
    for change in changes.into_iter().flatten() {
        change.at = shifted(change.at);
    }
    for recommendation in &mut carried.recommendations {
        recommendation.last = shifted(recommendation.last);
    }
    carried
}
