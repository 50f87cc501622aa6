//! Damping of recommendations: failed starts, refusals, projection, stabilization and cooldowns.
//!
//! Invariant: damping moves a recommendation towards the current count, and never across it.

use contract::decision::{DecisionOutcome, LastChange};
use contract::resources::Direction;
use contract::time::{Span, Timestamp};

use super::super::describe;
use super::super::record::{Recorder, stage};
use super::super::rules::{Proposal, Quality, RuleInput};
use super::{Candidate, Run};

impl<R: Recorder> Run<'_, R> {
    /// Keeps the count while no instance of the present revision has ever become ready and the last start
    /// failed: there is nothing to measure, and more instances would fail like the others.
    pub(super) fn hold_while_starts_fail(
        &mut self,
        base: u32,
        recommendation: Candidate,
    ) -> (Candidate, Option<DecisionOutcome>) {
        let failed = self.tick.failed_starts.filter(|failed| failed.never_ready);
        let Some(failed) = failed.filter(|_| recommendation.count != base) else {
            return (recommendation, None);
        };
        self.record.stage(|| {
            let detail = describe::starts_hold(failed);
            stage("starts", recommendation.count, base, detail)
        });
        hold(base, recommendation, DecisionOutcome::HeldByFailedStarts)
    }

    /// Keeps the count while requests are refused for lack of capacity: what the refused ones would have
    /// needed is in no other measurement, so that every rule sees less load than there is.
    pub(super) fn hold_while_refusing(
        &mut self,
        inputs: &[RuleInput<'_>],
        base: u32,
        recommendation: Candidate,
    ) -> (Candidate, Option<DecisionOutcome>) {
        if recommendation.count.max(self.profile.capacity.min) >= base {
            return (recommendation, None);
        }
        let refused = inputs.iter().map(RuleInput::refused).max().unwrap_or(0);
        if refused == 0 {
            return (recommendation, None);
        }
        self.record.stage(|| {
            let detail = describe::refusals(refused);
            stage("refusals", recommendation.count, base, detail)
        });
        hold(base, recommendation, DecisionOutcome::HeldByRefusals)
    }

    /// Limits a scale-in to the lowest count at which no rule would immediately scale out again.
    pub(super) fn project(
        &mut self,
        inputs: &[RuleInput<'_>],
        base: u32,
        recommendation: Candidate,
    ) -> (Candidate, Option<DecisionOutcome>) {
        if recommendation.count >= base {
            return (recommendation, None);
        }
        let profile = self.profile;
        // A count below the minimum is never reached, so there is no point in testing it.
        let lowest = recommendation.count.max(profile.capacity.min.min(base));
        let fires = |count: u32| {
            profile
                .rules
                .iter()
                .zip(inputs)
                .position(|(rule, input)| rule.would_scale_out(input, count))
        };
        let mut blocking: Option<(usize, u32)> = None;
        let mut reached = lowest;
        while reached < base {
            match fires(reached) {
                Some(rule) => blocking = Some((rule, reached)),
                None => break,
            }
            reached += 1;
        }
        let after = if reached == lowest {
            recommendation.count
        } else {
            reached
        };
        self.record.stage(|| {
            let detail = describe::projection(profile, inputs, blocking, after, base);
            stage("projection", recommendation.count, after, detail)
        });
        let held = (after == base).then_some(DecisionOutcome::HeldByProjection);
        let recommendation = Candidate {
            count: after,
            rule: recommendation.rule,
        };
        (recommendation, held)
    }

    /// Takes the most conservative recommendation within the window: the largest when scaling in,
    /// the smallest when scaling out, and never across the current count.
    pub(super) fn stabilize(&mut self, base: u32, recommendation: u32) -> u32 {
        if recommendation == base {
            return recommendation;
        }
        let scales_in = recommendation < base;
        let window = if scales_in {
            self.policy.stabilize_in
        } else {
            self.policy.stabilize_out
        };
        let inside = self
            .tick
            .carried
            .recommendations
            .iter()
            .filter(|earlier| window > Span::ZERO && self.now.since(earlier.last) < window)
            .map(|earlier| earlier.instances);
        let stabilized = if scales_in {
            inside.fold(recommendation, u32::max).min(base)
        } else {
            inside.fold(recommendation, u32::min).max(base)
        };
        self.record.stage(|| {
            let detail = describe::stabilization(window, recommendation, stabilized);
            stage("stabilization", recommendation, stabilized, detail)
        });
        stabilized
    }

    /// Applies cooldowns. A rule that scales out acts again only once its cooldown since the last
    /// scale-out is over; scaling in waits for the cooldowns of all rules that agreed, since the
    /// last change in either direction. A scale-in never delays a scale-out.
    pub(super) fn cool_down(
        &mut self,
        inputs: &[RuleInput<'_>],
        base: u32,
        stabilized: u32,
    ) -> u32 {
        if stabilized == base {
            return base;
        }
        let (cooled, until) = if stabilized > base {
            self.cool_down_out(inputs, base, stabilized)
        } else {
            self.cool_down_in(base, stabilized)
        };
        self.record.stage(|| {
            let detail = describe::cooldown(stabilized, cooled, until);
            stage("cooldown", stabilized, cooled, detail)
        });
        cooled
    }

    fn cool_down_out(
        &self,
        inputs: &[RuleInput<'_>],
        base: u32,
        stabilized: u32,
    ) -> (u32, Option<Timestamp>) {
        let last = self.tick.carried.last_out.as_ref().map(|change| change.at);
        let mut free = base;
        let mut until: Option<Timestamp> = None;
        for (rule, input) in self.profile.rules.iter().zip(inputs) {
            if !input.may_scale_out() {
                continue;
            }
            let Proposal::Out(count) = rule.propose(input, base) else {
                continue;
            };
            match cooling(last, rule.cooldown_out, self.now) {
                None => free = free.max(count),
                Some(end) => until = [until, Some(end)].into_iter().flatten().min(),
            }
        }
        let missing = inputs.iter().any(|input| input.quality == Quality::Missing);
        if let Some(floor) = missing.then(|| self.missing_floor()).flatten() {
            free = free.max(floor);
        }
        (stabilized.min(free), until)
    }

    fn cool_down_in(&self, base: u32, stabilized: u32) -> (u32, Option<Timestamp>) {
        let at = |change: &Option<LastChange>| change.as_ref().map(|change| change.at);
        let carried = self.tick.carried;
        let last = at(&carried.last_out).max(at(&carried.last_in));
        let until = self
            .profile
            .rules
            .iter()
            .filter(|rule| rule.direction() != Some(Direction::Out))
            .filter_map(|rule| cooling(last, rule.cooldown_in, self.now))
            .max();
        match until {
            Some(_) => (base, until),
            None => (stabilized, None),
        }
    }
}

/// The present count in place of a recommendation, whose rule stays named.
fn hold(
    base: u32,
    recommendation: Candidate,
    outcome: DecisionOutcome,
) -> (Candidate, Option<DecisionOutcome>) {
    let held = Candidate {
        count: base,
        rule: recommendation.rule,
    };
    (held, Some(outcome))
}

/// The end of a cooldown that is still running.
fn cooling(last: Option<Timestamp>, cooldown: Span, now: Timestamp) -> Option<Timestamp> {
    last.map(|last| last + cooldown).filter(|end| now < *end)
}
