//! The results of rules in a decision, with the evidence of each.

use contract::decision::{Evidence, RuleResult, Verdict};
use contract::resources::Direction;

use super::super::describe;
use super::super::policy::{Policy, Rule};
use super::super::record::Recorder;
use super::super::rules::{Proposal, RuleInput};
use super::{Run, TickInputs};

impl<R: Recorder> Run<'_, R> {
    pub(super) fn suppress_rules(&mut self, because: &str) {
        for rule in self.profile.rules.iter() {
            self.record.rule(|| RuleResult {
                name: rule.name.clone(),
                verdict: Verdict::Suppressed,
                value: None,
                wanted: None,
                direction: rule.direction(),
                because: because.into(),
                evidence: None,
            });
        }
    }

    pub(super) fn record_rules(&mut self, inputs: &[RuleInput<'_>], base: u32, fired: bool) {
        let (policy, tick) = (self.policy, self.tick);
        for (rule, input) in self.profile.rules.iter().zip(inputs) {
            self.record.rule(|| RuleResult {
                evidence: Some(evidence(rule, tick)),
                ..rule_result(policy, rule, input, base, fired)
            });
        }
    }
}

fn evidence(rule: &Rule, tick: &TickInputs<'_>) -> Evidence {
    let signal = tick.signals.get(rule.signal).copied().flatten();
    Evidence {
        answered: signal.and_then(|signal| signal.answered),
        refused: signal.map_or(0, |signal| signal.refused),
        measured: signal.and_then(|signal| signal.instances),
        ready: tick.instances.ready,
    }
}

fn rule_result(
    policy: &Policy,
    rule: &Rule,
    input: &RuleInput<'_>,
    base: u32,
    fired: bool,
) -> RuleResult {
    let proposal = rule.propose(input, base);
    let scales_in = match proposal {
        Proposal::In(_) => true,
        Proposal::Out(_) => false,
        Proposal::NoChange => rule.direction() == Some(Direction::In),
    };
    let usable = if scales_in {
        input.may_scale_in()
    } else {
        input.may_scale_out()
    };
    let verdict = match proposal {
        _ if scales_in && fired => Verdict::Suppressed,
        _ if !usable => Verdict::Unknown,
        Proposal::NoChange => Verdict::NotTriggered,
        Proposal::Out(_) | Proposal::In(_) => Verdict::Triggered,
    };
    let (count, direction) = match proposal {
        Proposal::NoChange => (None, rule.direction()),
        Proposal::Out(count) => (Some(count), Some(Direction::Out)),
        Proposal::In(count) => (Some(count), Some(Direction::In)),
    };
    let triggered = verdict == Verdict::Triggered;
    RuleResult {
        name: rule.name.clone(),
        verdict,
        value: input.measured_value(),
        wanted: count.filter(|_| triggered),
        direction: if triggered {
            direction
        } else {
            rule.direction()
        },
        because: describe::rule(policy, rule, input, base, verdict),
        evidence: None,
    }
}
