//! The state that one evaluation hands to the next: the count, the last change in each direction,
//! and the wishes that may still hold something back.

use contract::decision::{Carried, Decision, LastChange, Wish};
use contract::time::{Span, Timestamp};

use super::evaluate::Evaluation;
use super::policy::Policy;
use crate::zones::ZoneData;

/// Takes an evaluation into the carried state.
pub fn carry(
    carried: &mut Carried,
    policy: Option<&Policy>,
    evaluation: &Evaluation,
    now: Timestamp,
) {
    let decided_by = || policy.and_then(|policy| evaluation.decided_by(policy));
    grant(carried, evaluation.granted, decided_by, now);
    let (out, scale_in) = policy.map_or((Span::ZERO, Span::ZERO), |policy| {
        (policy.stabilize_out, policy.stabilize_in)
    });
    let wish = Wish {
        last: now,
        instances: evaluation.wish,
    };
    remember(&mut carried.wishes, wish, out, scale_in);
}

fn grant<'a>(
    carried: &mut Carried,
    granted: u32,
    decided_by: impl FnOnce() -> Option<&'a str>,
    at: Timestamp,
) {
    let change = || {
        let rule = decided_by().map(str::to_owned);
        Some(LastChange { at, rule })
    };
    match carried.granted.replace(granted) {
        Some(before) if granted > before => carried.last_out = change(),
        Some(before) if granted < before => carried.last_in = change(),
        _ => {}
    }
}

/// Adds a wish, and drops those that can never count again: past the longest window, or followed by
/// one that holds back at least as much in every direction that looks back. At most one wish per
/// count remains.
fn remember(wishes: &mut Vec<Wish>, wish: Wish, out: Span, scale_in: Span) {
    let longest = out.max(scale_in);
    wishes.retain(|earlier| {
        let counts_in = scale_in > Span::ZERO && earlier.instances > wish.instances;
        let counts_out = out > Span::ZERO && earlier.instances < wish.instances;
        (counts_in || counts_out) && wish.last.since(earlier.last) < longest
    });
    wishes.push(wish);
}

/// The state after a decision that this engine makes.
pub fn carried_next(decision: &Decision, zones: &ZoneData) -> Carried {
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

/// The state to go on from after a start or a take-over, from the last decision that was written. What it
/// granted is what it records, whatever this engine would make of its inputs: another version may have
/// decided, or gone by other time zones. Cool-downs run on; what was wished since is not known, so the
/// stabilisation windows are filled with the present count.
pub fn carried_after_restart(last: &Decision, now: Timestamp) -> Carried {
    let mut carried = last.inputs.carried.clone();
    grant(
        &mut carried,
        last.granted,
        || last.decided_by.as_deref(),
        last.at,
    );
    carried.wishes = vec![Wish {
        last: now.max(last.at),
        instances: last.granted,
    }];
    carried
}

/// The state after the clock was set back from `recorded` to `clock`: what had elapsed of each
/// cool-down and window stays elapsed.
pub fn carried_after_clock_step(
    carried: &Carried,
    recorded: Timestamp,
    clock: Timestamp,
) -> Carried {
    let shifted =
        |at: Timestamp| Timestamp::from_millis(at.millis() + clock.millis() - recorded.millis());
    let mut carried = carried.clone();
    let changes = [&mut carried.last_out, &mut carried.last_in];
    for change in changes.into_iter().flatten() {
        change.at = shifted(change.at);
    }
    for wish in &mut carried.wishes {
        wish.last = shifted(wish.last);
    }
    carried
}
