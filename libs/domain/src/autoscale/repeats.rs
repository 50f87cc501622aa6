//! Keeps results that alternate, such as a held and an unheld recommendation at a rounding boundary, from
//! being recorded each second.

use contract::decision::{Decision, DecisionOutcome};
use contract::time::{Span, Timestamp};

use super::decide::{has_other_pin, should_explain};
use super::evaluate::{Evaluation, TickInputs};
use super::policy::Policy;

/// How often a result is recorded while the count stays, before it is a repetition.
const TIMES_MAX: u32 = 2;
/// A result that lasts this long is recorded, even if it is a repetition.
const LASTS: Span = Span::from_secs(60);
/// A result that was not returned for this long is new again.
const FORGET_AFTER: Span = Span::from_secs(600);
/// Most results that are remembered.
const RESULTS_MAX: usize = 16;

/// The results of a deployment's evaluations since its count last changed. Changes of the count, of the
/// profile and of the pin are always recorded, and the first evaluation of each revision of the policy, so
/// that it can be told from the record when a revision takes effect.
#[derive(Clone, Debug, Default)]
pub struct Repeats {
    results: Vec<Recorded>,
    present: Option<(Shape, Timestamp)>,
}

/// What distinguishes results with the same count and profile.
type Shape = (DecisionOutcome, u32, Option<usize>);

#[derive(Clone, Debug)]
struct Recorded {
    outcome: DecisionOutcome,
    wanted: u32,
    decided_by: Option<String>,
    /// How often it was recorded.
    times: u32,
    /// When an evaluation last returned it.
    last: Timestamp,
}

impl Repeats {
    /// Whether an evaluation's decision is to be recorded, given the last recorded one.
    pub fn should_record(
        &mut self,
        previous: Option<&Decision>,
        policy: Option<&Policy>,
        tick: &TickInputs<'_>,
        evaluation: &Evaluation,
        now: Timestamp,
    ) -> bool {
        let shape = (evaluation.outcome, evaluation.wanted, evaluation.decided_by);
        let since = match self.present {
            Some((present, since)) if present == shape => since,
            _ => now,
        };
        self.present = Some((shape, since));
        let profile = policy.and_then(|policy| evaluation.profile(policy));
        let is_settled = |previous: &Decision| {
            previous.granted == evaluation.granted
                && previous.inputs.policy_revision == tick.policy_revision
                && previous.profile.as_deref() == profile
                && !has_other_pin(previous, evaluation.outcome, tick.pin, tick.pinned_by)
        };
        if !previous.is_some_and(is_settled) {
            self.results.clear();
            return true;
        }
        self.results
            .retain(|result| now.since(result.last) < FORGET_AFTER);
        let decided_by = policy.and_then(|policy| evaluation.decided_by(policy));
        let result = self.results.iter_mut().find(|result| {
            result.outcome == evaluation.outcome
                && result.wanted == evaluation.wanted
                && result.decided_by.as_deref() == decided_by
        });
        let is_repetition = result.is_some_and(|result| {
            result.last = now;
            result.times >= TIMES_MAX
        });
        should_explain(previous, policy, tick, evaluation)
            && (!is_repetition || now.since(since) >= LASTS)
    }

    /// Remembers a decision that was recorded.
    pub fn recorded(&mut self, decision: &Decision) {
        let known = self.results.iter_mut().find(|result| {
            result.outcome == decision.outcome
                && result.wanted == decision.wanted
                && result.decided_by == decision.decided_by
        });
        if let Some(result) = known {
            result.times += 1;
            return;
        }
        if self.results.len() == RESULTS_MAX {
            self.results.remove(0);
        }
        self.results.push(Recorded {
            outcome: decision.outcome,
            wanted: decision.wanted,
            decided_by: decision.decided_by.clone(),
            times: 1,
            last: decision.at,
        });
    }
}
