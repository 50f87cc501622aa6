//! One evaluation: computes a count and its outcome from a policy, a tick's inputs and the time.
//!
//! The order is fixed: profile, manual pin, mode, default (first decision), immediate bounds,
//! rules, missing metrics, failed starts, refusals, projection, stabilization, cooldown, bounds, pause, shadow mode.
//!
//! Invariants: the result is a function of its arguments; the recorder never influences it; a count
//! leaves `[min, max]` only by a pin or a pause; nothing scales in while any rule's data is
//! incomplete.

mod damping;
mod results;

use contract::decision::{
    CarriedState, CauseKind, DecisionOutcome, FailedStarts, InstanceCounts, Pause, Pin, Signal,
};
use contract::resources::{AutoscaleMode, Capacity, Direction, MissingMetric};
use contract::time::Timestamp;

use super::describe;
use super::policy::{Policy, Profile, RULES_MAX, Selection};
use super::record::{NoopRecorder, Recorder, stage};
use super::rules::{Proposal, Quality, RuleInput};

/// Inputs of one evaluation, besides policy and time.
#[derive(Clone, Copy, Debug)]
pub struct TickInputs<'a> {
    /// Revision of the policy's document; 0 without a policy.
    pub policy_revision: u64,
    /// The deployment's own count, used without a policy.
    pub fixed_instances: u32,
    /// The count pinned by a person, in force or not.
    pub pin: Option<Pin>,
    /// Who pinned it; explains, and decides nothing.
    pub pinned_by: Option<&'a str>,
    /// Directions paused by a person.
    pub pause: Pause,
    /// The current instances.
    pub instances: InstanceCounts,
    /// Starts that failed since an instance was last ready, if the last one did.
    pub failed_starts: Option<&'a FailedStarts>,
    /// Whether the policy came together with the deployment, so that its default is the first count.
    pub starts_at_default: bool,
    /// In the order of `Policy::signals`.
    pub signals: &'a [Option<Signal>],
    /// State carried over from the previous evaluation.
    pub carried: &'a CarriedState,
    /// The selection that the last evaluation of the same policy returned. While it holds, it saves
    /// evaluating the schedules; it does not change the result.
    pub selection: Option<Selection>,
}

/// The result without its explanation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// The count that the previous evaluation granted.
    pub from: u32,
    /// The count asked for, before cooldowns and bounds.
    pub wanted: u32,
    /// The count granted.
    pub granted: u32,
    /// The outcome of the recommendation.
    pub outcome: DecisionOutcome,
    /// The rules' recommendation within the bounds, before anything held it back.
    pub recommendation: u32,
    /// What changed the count or keeps it; `None` if nothing asks for another one.
    pub cause: Option<CauseKind>,
    /// `None` without a policy.
    pub selection: Option<Selection>,
    /// Revision of the policy's document; 0 without a policy.
    pub(super) policy_revision: u64,
    /// The deployment's own count.
    pub(super) fixed_instances: u32,
    /// Index into the rules of the active profile.
    pub(super) decided_by: Option<usize>,
}

impl Evaluation {
    /// The name of the active profile; `policy` must be the one that was evaluated.
    pub fn profile<'p>(&self, policy: &'p Policy) -> Option<&'p str> {
        self.active_profile(policy)
            .map(|profile| profile.name.as_str())
    }

    /// The name of the rule that decided, if any; `policy` must be the one that was evaluated.
    pub fn decided_by<'p>(&self, policy: &'p Policy) -> Option<&'p str> {
        let rule = self.active_profile(policy)?.rules.get(self.decided_by?)?;
        Some(&rule.name)
    }

    fn active_profile<'p>(&self, policy: &'p Policy) -> Option<&'p Profile> {
        policy.profiles.get(self.selection?.profile)
    }
}

/// Evaluates one tick, without an explanation.
pub fn evaluate(policy: Option<&Policy>, tick: &TickInputs<'_>, now: Timestamp) -> Evaluation {
    run(policy, tick, now, &mut NoopRecorder)
}

pub(super) fn run<R: Recorder>(
    policy: Option<&Policy>,
    tick: &TickInputs<'_>,
    now: Timestamp,
    record: &mut R,
) -> Evaluation {
    match policy {
        Some(policy) => Run::new(policy, tick, now, record).evaluate(),
        None => without_policy(tick, now, record),
    }
}

fn active_pin(tick: &TickInputs<'_>, now: Timestamp) -> Option<Pin> {
    tick.pin
        .filter(|pin| pin.until.is_none_or(|until| now < until))
}

fn without_policy<R: Recorder>(
    tick: &TickInputs<'_>,
    now: Timestamp,
    record: &mut R,
) -> Evaluation {
    let from = tick.carried.granted.unwrap_or(0);
    let (granted, outcome, cause) = match active_pin(tick, now) {
        Some(pin) => {
            record.stage(|| stage("pin", from, pin.instances, describe::pin(&pin)));
            (pin.instances, DecisionOutcome::Pinned, CauseKind::Pin)
        }
        None => own_count(tick, from, record),
    };
    Evaluation {
        from,
        wanted: granted,
        granted,
        outcome,
        recommendation: granted,
        cause: Some(cause),
        selection: None,
        policy_revision: tick.policy_revision,
        fixed_instances: tick.fixed_instances,
        decided_by: None,
    }
}

/// The deployment's own count, unless a pause keeps the present one. A person who changes the deployment's
/// count wants that one.
fn own_count<R: Recorder>(
    tick: &TickInputs<'_>,
    from: u32,
    record: &mut R,
) -> (u32, DecisionOutcome, CauseKind) {
    let fixed = tick.fixed_instances;
    record.stage(|| {
        let detail = "no Autoscale applies: the deployment's own count";
        stage("fixed", from, fixed, detail)
    });
    let carried = tick.carried;
    let is_new = carried
        .fixed_instances
        .is_some_and(|before| before != fixed);
    let paused = carried.granted.is_some() && !is_new && holds(tick.pause, from, fixed);
    let granted = if paused { from } else { fixed };
    let Pause {
        scale_in,
        scale_out,
    } = tick.pause;
    if scale_in || scale_out {
        record.stage(|| stage("pause", fixed, granted, describe::pause(tick.pause, paused)));
    }
    if paused {
        return (from, DecisionOutcome::HeldByPause, CauseKind::Pause);
    }
    let cause = match tick.carried.pinned && granted != from {
        true => CauseKind::PinEnd,
        false => CauseKind::Document,
    };
    (granted, DecisionOutcome::Fixed, cause)
}

/// Whether a pause keeps a count from changing.
fn holds(pause: Pause, from: u32, to: u32) -> bool {
    (to < from && pause.scale_in) || (to > from && pause.scale_out)
}

/// A recommended count and the rule that it came from; `None` if it came from the policy itself.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    count: u32,
    rule: Option<usize>,
}

/// The combined recommendation of all rules.
#[derive(Clone, Copy, Debug)]
struct Combined {
    recommendation: Candidate,
    /// Some rule's data is incomplete, and nothing scales out.
    unknown: bool,
}

/// How a count came about, before pause and mode.
#[derive(Clone, Copy, Debug)]
struct Reason {
    /// What changes the count, if it changes.
    cause: CauseKind,
    /// What holds a recommendation back, if it does not change.
    held: Option<DecisionOutcome>,
    decided_by: Option<usize>,
    /// Whether the bounds cut a recommendation.
    cut: bool,
}

impl Reason {
    fn of(cause: CauseKind) -> Self {
        Self {
            cause,
            held: None,
            decided_by: None,
            cut: false,
        }
    }
}

struct Run<'a, R> {
    policy: &'a Policy,
    profile: &'a Profile,
    selection: Selection,
    tick: &'a TickInputs<'a>,
    now: Timestamp,
    from: u32,
    record: &'a mut R,
}

impl<'a, R: Recorder> Run<'a, R> {
    fn new(
        policy: &'a Policy,
        tick: &'a TickInputs<'a>,
        now: Timestamp,
        record: &'a mut R,
    ) -> Self {
        let selection = tick
            .selection
            .filter(|selection| selection.holds(now) && selection.profile < policy.profiles.len())
            .unwrap_or_else(|| policy.select(now));
        Self {
            policy,
            profile: &policy.profiles[selection.profile],
            selection,
            tick,
            now,
            from: tick.carried.granted.unwrap_or(0),
            record,
        }
    }

    fn evaluate(mut self) -> Evaluation {
        let (from, profile) = (self.from, self.profile);
        self.record
            .stage(|| stage("profile", from, from, describe::profile(profile)));
        if let Some(pin) = active_pin(self.tick, self.now) {
            self.record
                .stage(|| stage("pin", from, pin.instances, describe::pin(&pin)));
            self.suppress_rules("a manual pin decides");
            let pinned = DecisionOutcome::Pinned;
            return self.conclude(pin.instances, pin.instances, pinned, Some(CauseKind::Pin));
        }
        let carried = self.tick.carried;
        let is_paused = self.policy.mode == AutoscaleMode::Paused;
        let is_first = carried.granted.is_none();
        let comes_first = self.tick.starts_at_default && carried.profile.is_none();
        if is_first || (comes_first && !is_paused) {
            return self.first_decision();
        }
        if is_paused {
            self.record
                .stage(|| stage("mode", from, from, "the policy is paused: the count stays"));
            self.suppress_rules("the policy is paused");
            let held = DecisionOutcome::HeldByPause;
            return self.conclude(from, from, held, Some(CauseKind::Pause));
        }
        let base = self.enforce_bounds();
        if self.profile.rules.is_empty() {
            return self.without_rules(base);
        }
        self.apply_rules(base)
    }

    /// Decides for a deployment that has no count yet.
    fn first_decision(mut self) -> Evaluation {
        let default = self.profile.capacity.default;
        self.record.stage(|| {
            let detail = "the first decision: the profile's default";
            stage("default", self.from, default, detail)
        });
        self.suppress_rules("the first decision takes the profile's default");
        self.finish(default, default, Reason::of(CauseKind::Profile))
    }

    /// Corrects a count outside the profile's bounds immediately: no cooldown, no stabilization.
    fn enforce_bounds(&mut self) -> u32 {
        let Capacity { min, max, .. } = self.profile.capacity;
        let from = self.from;
        let base = from.clamp(min, max);
        self.record.stage(|| {
            let detail = if base == from {
                format!("within {min} to {max}")
            } else {
                format!("outside of {min} to {max}: corrected at once")
            };
            stage("bounds", from, base, detail)
        });
        base
    }

    /// Takes the profile's default as the count: without rules, only the schedule decides.
    fn without_rules(mut self, base: u32) -> Evaluation {
        let default = self.profile.capacity.default;
        self.record.stage(|| {
            let detail = "the profile has no rules: its default";
            stage("default", base, default, detail)
        });
        let cause = match self.correction() {
            CauseKind::PinEnd => CauseKind::PinEnd,
            _ => CauseKind::Profile,
        };
        self.finish(default, default, Reason::of(cause))
    }

    /// Why a count that the rules did not change has to change: the bounds are not what they were when it
    /// was granted.
    fn correction(&self) -> CauseKind {
        let carried = self.tick.carried;
        let is_same_document = carried.policy_revision == Some(self.tick.policy_revision);
        let has_begun =
            |before: &String| is_same_document && before.as_str() != self.profile.name.as_str();
        if carried.pinned {
            CauseKind::PinEnd
        } else if carried.profile.as_ref().is_some_and(has_begun) {
            CauseKind::Profile
        } else {
            CauseKind::Bounds
        }
    }

    fn apply_rules(mut self, base: u32) -> Evaluation {
        let mut inputs = [RuleInput::NONE; RULES_MAX];
        let profile = self.profile;
        for (input, rule) in inputs.iter_mut().zip(profile.rules.iter()) {
            *input = rule.read(self.tick.signals, self.tick.instances);
        }
        let inputs = &inputs[..profile.rules.len().min(RULES_MAX)];
        let combined = self.combine(inputs, base);
        let (recommendation, failing) = self.hold_while_starts_fail(base, combined.recommendation);
        let (recommendation, refusing) = self.hold_while_refusing(inputs, base, recommendation);
        let (recommendation, held) = self.project(inputs, base, recommendation);
        let held = failing.or(refusing).or(held);
        let Capacity { min, max, .. } = profile.capacity;
        let bounded = recommendation.count.clamp(min, max);
        // If the bounds leave nothing of a recommendation, nothing else holds it back.
        let is_at_bound = recommendation.count != base && bounded == base;
        let held = if combined.unknown {
            Some(DecisionOutcome::Unknown)
        } else if is_at_bound {
            Some(DecisionOutcome::Clamped)
        } else {
            held
        };
        let stabilized = if is_at_bound {
            recommendation.count
        } else {
            self.stabilize(base, recommendation.count)
        };
        let held = held.or((recommendation.count != base && stabilized == base)
            .then_some(DecisionOutcome::HeldByStabilization));
        let cooled = if is_at_bound {
            recommendation.count
        } else {
            self.cool_down(inputs, base, stabilized)
        };
        let held = held
            .or((stabilized != base && cooled == base).then_some(DecisionOutcome::HeldByCooldown));
        let granted = cooled.clamp(min, max);
        self.record.stage(|| {
            let detail = if granted == cooled {
                format!("within {min} to {max}")
            } else {
                format!("cut to {min} to {max}")
            };
            stage("clamp", cooled, granted, detail)
        });
        let is_corrected = base != self.from && granted == base;
        // A recommendation held by the projection is used up, and still names its rule.
        let decided_by = combined
            .recommendation
            .rule
            .filter(|_| combined.recommendation.count != base && !is_corrected);
        let cause = match decided_by {
            _ if is_corrected => self.correction(),
            Some(_) => CauseKind::Rule,
            None => CauseKind::Data,
        };
        let reason = Reason {
            cause,
            held,
            decided_by,
            cut: granted != cooled && !is_corrected,
        };
        self.finish(granted, bounded, reason)
    }

    /// Combines the rules: any rule can scale out, all must agree to scale in, and the largest
    /// count wins.
    fn combine(&mut self, inputs: &[RuleInput<'_>], base: u32) -> Combined {
        let profile = self.profile;
        let mut out: Option<Candidate> = None;
        let mut scale_in: Option<Candidate> = None;
        let mut complete = true;
        let mut missing = false;
        let mut agree = true;
        for (index, (rule, input)) in profile.rules.iter().zip(inputs).enumerate() {
            complete &= input.may_scale_in();
            missing |= input.quality == Quality::Missing;
            if !input.may_scale_out() {
                continue;
            }
            let larger = |best: Option<Candidate>, count: u32| match best {
                Some(best) if best.count >= count => Some(best),
                _ => Some(Candidate {
                    count,
                    rule: Some(index),
                }),
            };
            match rule.propose(input, base) {
                Proposal::Out(count) => out = larger(out, count),
                Proposal::In(count) => scale_in = larger(scale_in, count),
                Proposal::NoChange => agree &= rule.direction() == Some(Direction::Out),
            }
        }
        let floor = missing
            .then(|| self.missing_floor())
            .flatten()
            .filter(|floor| *floor > base);
        let fired = out.is_some();
        self.record_rules(inputs, base, fired);
        let recommendation = match (out, floor) {
            (Some(out), Some(floor)) if floor > out.count => Some(Candidate {
                count: floor,
                rule: None,
            }),
            (Some(out), _) => Some(out),
            (None, Some(count)) => Some(Candidate { count, rule: None }),
            (None, None) => scale_in.filter(|_| complete && agree),
        };
        let recommendation = recommendation.unwrap_or(Candidate {
            count: base,
            rule: None,
        });
        self.record.stage(|| {
            let combination = describe::Combination {
                fired,
                floor,
                recommendation: recommendation.count,
                base,
                complete,
                complete_at: inputs.iter().filter_map(RuleInput::complete_at).max(),
                agree,
            };
            let detail = describe::combined(profile, &combination);
            stage("rules", base, recommendation.count, detail)
        });
        Combined {
            recommendation,
            unknown: !complete && recommendation.count <= base && !fired,
        }
    }

    /// The lowest count while some metric has no data at all; never a reason to scale in.
    fn missing_floor(&self) -> Option<u32> {
        match self.policy.missing {
            MissingMetric::Hold => None,
            MissingMetric::Default => Some(self.profile.capacity.default),
            MissingMetric::Schedule => self
                .profile
                .schedule
                .is_some()
                .then_some(self.profile.capacity.min),
        }
    }

    /// Applies pause and shadow mode, and determines the outcome.
    fn finish(&mut self, count: u32, recommendation: u32, reason: Reason) -> Evaluation {
        let from = self.from;
        let first = self.tick.carried.granted.is_none();
        let Pause {
            scale_in,
            scale_out,
        } = self.tick.pause;
        let paused = !first && holds(self.tick.pause, from, count);
        let wanted = if paused { from } else { count };
        if scale_in || scale_out {
            self.record.stage(|| {
                stage(
                    "pause",
                    count,
                    wanted,
                    describe::pause(self.tick.pause, paused),
                )
            });
        }
        let outcome = if paused {
            DecisionOutcome::HeldByPause
        } else if reason.cut {
            DecisionOutcome::Clamped
        } else if wanted != from || first {
            DecisionOutcome::Applied
        } else {
            reason.held.unwrap_or(DecisionOutcome::Steady)
        };
        let cause = match outcome {
            DecisionOutcome::Steady => None,
            DecisionOutcome::HeldByPause => Some(CauseKind::Pause),
            DecisionOutcome::HeldByFailedStarts => Some(CauseKind::FailedStarts),
            DecisionOutcome::Unknown => Some(CauseKind::Data),
            DecisionOutcome::Clamped if wanted == from => Some(CauseKind::Bounds),
            _ => Some(reason.cause),
        };
        let (granted, outcome, cause) = match self.policy.mode {
            AutoscaleMode::Shadow => {
                let granted = self.tick.fixed_instances;
                self.record.stage(|| {
                    let detail = "the policy is in shadow mode: the deployment's own count stands";
                    stage("mode", wanted, granted, detail)
                });
                (granted, DecisionOutcome::Shadow, Some(CauseKind::Document))
            }
            AutoscaleMode::Live | AutoscaleMode::Paused => (wanted, outcome, cause),
        };
        Evaluation {
            recommendation,
            decided_by: reason.decided_by,
            ..self.conclude(wanted, granted, outcome, cause)
        }
    }

    fn conclude(
        &self,
        wanted: u32,
        granted: u32,
        outcome: DecisionOutcome,
        cause: Option<CauseKind>,
    ) -> Evaluation {
        Evaluation {
            from: self.from,
            wanted,
            granted,
            outcome,
            recommendation: granted,
            cause,
            selection: Some(self.selection),
            policy_revision: self.tick.policy_revision,
            fixed_instances: self.tick.fixed_instances,
            decided_by: None,
        }
    }
}
