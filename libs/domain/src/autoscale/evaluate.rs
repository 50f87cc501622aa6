//! One evaluation: from a policy, a tick's inputs and the time to a count and its outcome.
//!
//! The order is fixed: profile, manual pin, mode, default (first decision), bounds at once, rules,
//! missing metrics, projection, stabilisation, cool-down, bounds, pause, shadow mode.
//!
//! Invariants: the result is a function of its arguments; the recorder never influences it; a count
//! leaves `[min, max]` only by a pin or a pause; nothing scales in while any rule's data is not whole.

mod restraint;

use contract::decision::{
    Carried, InstanceCounts, Outcome, Pause, Pin, RuleResult, Signal, Verdict,
};
use contract::resources::{AutoscaleMode, Capacity, Direction, MissingMetric};
use contract::time::Timestamp;

use super::policy::{Policy, Profile, RULES_MAX, Rule, Selection};
use super::record::{Recorder, Silent, stage};
use super::rules::{Quality, Reading, Wanted};
use super::words;

/// What one evaluation is given, besides policy and time.
#[derive(Clone, Copy, Debug)]
pub struct TickInputs<'a> {
    /// Revision of the policy's document; 0 without a policy.
    pub policy_revision: u64,
    /// The deployment's own count, for where there is no policy.
    pub fixed_instances: u32,
    /// The count that people have set, be it in force or not.
    pub pin: Option<Pin>,
    /// Directions that people have paused.
    pub pause: Pause,
    /// Instances that there are.
    pub instances: InstanceCounts,
    /// In the order of `Policy::signals`.
    pub signals: &'a [Option<Signal>],
    /// What the evaluation before left.
    pub carried: &'a Carried,
    /// The selection that the last evaluation answered with, for the same policy. It saves looking
    /// at the schedules again while it holds, and changes nothing.
    pub selection: Option<Selection>,
}

/// The result without its explanation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// Instances that the evaluation before granted.
    pub from: u32,
    /// Instances that are asked for, before cool-downs and bounds.
    pub wanted: u32,
    /// Instances that there shall be.
    pub granted: u32,
    /// What became of the wish.
    pub outcome: Outcome,
    /// What the rules asked for within the bounds, before anything held it back.
    pub wish: u32,
    /// None: no policy.
    pub selection: Option<Selection>,
    /// Index into the rules of the profile in force.
    pub(super) decided_by: Option<usize>,
}

impl Evaluation {
    /// The name of the profile in force; `policy` is the one that was evaluated.
    pub fn profile<'p>(&self, policy: &'p Policy) -> Option<&'p str> {
        self.in_force(policy).map(|profile| profile.name.as_str())
    }

    /// The name of the rule that decided, if one did; `policy` is the one that was evaluated.
    pub fn decided_by<'p>(&self, policy: &'p Policy) -> Option<&'p str> {
        let rule = self.in_force(policy)?.rules.get(self.decided_by?)?;
        Some(&rule.name)
    }

    fn in_force<'p>(&self, policy: &'p Policy) -> Option<&'p Profile> {
        policy.profiles.get(self.selection?.profile)
    }
}

/// Evaluates one tick, without words.
pub fn evaluate(policy: Option<&Policy>, tick: &TickInputs<'_>, now: Timestamp) -> Evaluation {
    run(policy, tick, now, &mut Silent)
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

fn pin_in_force(tick: &TickInputs<'_>, now: Timestamp) -> Option<Pin> {
    tick.pin
        .filter(|pin| pin.until.is_none_or(|until| now < until))
}

fn without_policy<R: Recorder>(
    tick: &TickInputs<'_>,
    now: Timestamp,
    record: &mut R,
) -> Evaluation {
    let from = tick.carried.granted.unwrap_or(0);
    let (granted, outcome) = match pin_in_force(tick, now) {
        Some(pin) => {
            record.stage(|| stage("pin", from, pin.instances, words::pin(&pin)));
            (pin.instances, Outcome::Pinned)
        }
        None => {
            let fixed = tick.fixed_instances;
            let detail = "no Autoscale applies: the deployment's own count";
            record.stage(|| stage("fixed", from, fixed, detail));
            (fixed, Outcome::Fixed)
        }
    };
    Evaluation {
        from,
        wanted: granted,
        granted,
        outcome,
        wish: granted,
        selection: None,
        decided_by: None,
    }
}

/// A wish of the rules, with the rule that it came from. None: the policy itself.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    count: u32,
    rule: Option<usize>,
}

/// What all rules together ask for.
#[derive(Clone, Copy, Debug)]
struct Ask {
    wish: Candidate,
    /// Some rule's data is not whole, and nothing scales out.
    unknown: bool,
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
            .stage(|| stage("profile", from, from, words::profile(profile)));
        if let Some(pin) = pin_in_force(self.tick, self.now) {
            self.record
                .stage(|| stage("pin", from, pin.instances, words::pin(&pin)));
            self.suppress_rules("a manual pin decides");
            return self.settled(pin.instances, pin.instances, Outcome::Pinned, None);
        }
        if self.tick.carried.granted.is_none() {
            return self.first_decision();
        }
        if self.policy.mode == AutoscaleMode::Paused {
            self.record
                .stage(|| stage("mode", from, from, "the policy is paused: the count stays"));
            self.suppress_rules("the policy is paused");
            return self.settled(from, from, Outcome::HeldByPause, None);
        }
        let base = self.bounds_at_once();
        if self.profile.rules.is_empty() {
            return self.without_rules(base);
        }
        self.by_rules(base)
    }

    /// The deployment has no count yet.
    fn first_decision(mut self) -> Evaluation {
        let default = self.profile.capacity.default;
        self.record.stage(|| {
            let detail = "the first decision: the profile's default";
            stage("default", 0, default, detail)
        });
        self.suppress_rules("the first decision takes the profile's default");
        self.finish(default, default, None, None, false)
    }

    /// A count outside of the profile's bounds is corrected at once: no cool-down, no stabilisation.
    fn bounds_at_once(&mut self) -> u32 {
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

    /// Nothing but the schedule decides, so the profile's default is the count.
    fn without_rules(mut self, base: u32) -> Evaluation {
        let default = self.profile.capacity.default;
        self.record.stage(|| {
            let detail = "the profile has no rules: its default";
            stage("default", base, default, detail)
        });
        self.finish(default, default, None, None, false)
    }

    fn by_rules(mut self, base: u32) -> Evaluation {
        let mut readings = [Reading {
            quality: Quality::Missing,
            value: 0.0,
            total: 0.0,
        }; RULES_MAX];
        let profile = self.profile;
        for (reading, rule) in readings.iter_mut().zip(profile.rules.iter()) {
            *reading = rule.read(self.tick.signals, self.tick.instances);
        }
        let readings = &readings[..profile.rules.len().min(RULES_MAX)];
        let ask = self.ask(readings, base);
        let (wish, held) = self.project(readings, base, ask.wish);
        let Capacity { min, max, .. } = profile.capacity;
        let bounded = wish.count.clamp(min, max);
        // A wish that the bounds leave nothing of is not held back by anything else.
        let at_bound = wish.count != base && bounded == base;
        let held = if ask.unknown {
            Some(Outcome::Unknown)
        } else if at_bound {
            Some(Outcome::Clamped)
        } else {
            held
        };
        let stabilised = if at_bound {
            wish.count
        } else {
            self.stabilise(base, wish.count)
        };
        let held = held
            .or((wish.count != base && stabilised == base).then_some(Outcome::HeldByStabilization));
        let cooled = if at_bound {
            wish.count
        } else {
            self.cool_down(readings, base, stabilised)
        };
        let held =
            held.or((stabilised != base && cooled == base).then_some(Outcome::HeldByCooldown));
        let granted = cooled.clamp(min, max);
        self.record.stage(|| {
            let detail = if granted == cooled {
                format!("within {min} to {max}")
            } else {
                format!("cut to {min} to {max}")
            };
            stage("clamp", cooled, granted, detail)
        });
        // Held by the projection, the wish is spent, and still names its rule.
        let decided_by = ask.wish.rule.filter(|_| ask.wish.count != base);
        self.finish(granted, bounded, held, decided_by, granted != cooled)
    }

    /// Any rule scales out; all must agree to scale in. Of several counts the largest wins.
    fn ask(&mut self, readings: &[Reading], base: u32) -> Ask {
        let profile = self.profile;
        let mut out: Option<Candidate> = None;
        let mut scale_in: Option<Candidate> = None;
        let mut whole = true;
        let mut missing = false;
        let mut agree = true;
        for (index, (rule, reading)) in profile.rules.iter().zip(readings).enumerate() {
            whole &= reading.may_scale_in();
            missing |= reading.quality == Quality::Missing;
            if !reading.may_scale_out() {
                continue;
            }
            let larger = |best: Option<Candidate>, count: u32| match best {
                Some(best) if best.count >= count => Some(best),
                _ => Some(Candidate {
                    count,
                    rule: Some(index),
                }),
            };
            match rule.wanted(reading, base) {
                Wanted::Out(count) => out = larger(out, count),
                Wanted::In(count) => scale_in = larger(scale_in, count),
                Wanted::Nothing => agree &= rule.direction() == Some(Direction::Out),
            }
        }
        let floor = missing
            .then(|| self.missing_floor())
            .flatten()
            .filter(|floor| *floor > base);
        let fired = out.is_some();
        self.record_rules(readings, base, fired);
        let wish = match (out, floor) {
            (Some(out), Some(floor)) if floor > out.count => Some(Candidate {
                count: floor,
                rule: None,
            }),
            (Some(out), _) => Some(out),
            (None, Some(count)) => Some(Candidate { count, rule: None }),
            (None, None) => scale_in.filter(|_| whole && agree),
        };
        let wish = wish.unwrap_or(Candidate {
            count: base,
            rule: None,
        });
        self.record.stage(|| {
            let detail = words::ask(profile, fired, floor, wish.count, base, whole, agree);
            stage("rules", base, wish.count, detail)
        });
        Ask {
            wish,
            unknown: !whole && wish.count <= base && !fired,
        }
    }

    /// The least count while some metric has no data at all; never a reason to scale in.
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

    /// Pause and shadow mode, then the outcome.
    fn finish(
        &mut self,
        count: u32,
        wish: u32,
        held: Option<Outcome>,
        decided_by: Option<usize>,
        cut: bool,
    ) -> Evaluation {
        let from = self.from;
        let first = self.tick.carried.granted.is_none();
        let Pause {
            scale_in,
            scale_out,
        } = self.tick.pause;
        let paused = !first && ((count < from && scale_in) || (count > from && scale_out));
        let wanted = if paused { from } else { count };
        if scale_in || scale_out {
            self.record.stage(|| {
                stage(
                    "pause",
                    count,
                    wanted,
                    words::pause(self.tick.pause, paused),
                )
            });
        }
        if self.policy.mode == AutoscaleMode::Shadow {
            let granted = self.tick.fixed_instances;
            self.record.stage(|| {
                let detail = "the policy is in shadow mode: the deployment's own count stands";
                stage("mode", wanted, granted, detail)
            });
            let evaluation = self.settled(wanted, granted, Outcome::Shadow, decided_by);
            return Evaluation { wish, ..evaluation };
        }
        let outcome = if paused {
            Outcome::HeldByPause
        } else if cut {
            Outcome::Clamped
        } else if wanted != from || first {
            Outcome::Applied
        } else {
            held.unwrap_or(Outcome::Steady)
        };
        let evaluation = self.settled(wanted, wanted, outcome, decided_by);
        Evaluation { wish, ..evaluation }
    }

    fn settled(
        &self,
        wanted: u32,
        granted: u32,
        outcome: Outcome,
        decided_by: Option<usize>,
    ) -> Evaluation {
        Evaluation {
            from: self.from,
            wanted,
            granted,
            outcome,
            wish: granted,
            selection: Some(self.selection),
            decided_by,
        }
    }

    fn suppress_rules(&mut self, because: &str) {
        for rule in self.profile.rules.iter() {
            self.record.rule(|| RuleResult {
                name: rule.name.clone(),
                verdict: Verdict::Suppressed,
                value: None,
                wanted: None,
                direction: rule.direction(),
                because: because.into(),
            });
        }
    }

    fn record_rules(&mut self, readings: &[Reading], base: u32, fired: bool) {
        let policy = self.policy;
        for (rule, reading) in self.profile.rules.iter().zip(readings) {
            self.record
                .rule(|| rule_result(policy, rule, reading, base, fired));
        }
    }
}

fn rule_result(
    policy: &Policy,
    rule: &Rule,
    reading: &Reading,
    base: u32,
    fired: bool,
) -> RuleResult {
    let wanted = rule.wanted(reading, base);
    let scales_in = match wanted {
        Wanted::In(_) => true,
        Wanted::Out(_) => false,
        Wanted::Nothing => rule.direction() == Some(Direction::In),
    };
    let usable = if scales_in {
        reading.may_scale_in()
    } else {
        reading.may_scale_out()
    };
    let verdict = match wanted {
        _ if scales_in && fired => Verdict::Suppressed,
        _ if !usable => Verdict::Unknown,
        Wanted::Nothing => Verdict::NotTriggered,
        Wanted::Out(_) | Wanted::In(_) => Verdict::Triggered,
    };
    let (count, direction) = match wanted {
        Wanted::Nothing => (None, rule.direction()),
        Wanted::Out(count) => (Some(count), Some(Direction::Out)),
        Wanted::In(count) => (Some(count), Some(Direction::In)),
    };
    let triggered = verdict == Verdict::Triggered;
    RuleResult {
        name: rule.name.clone(),
        verdict,
        value: reading.shown(),
        wanted: count.filter(|_| triggered),
        direction: if triggered {
            direction
        } else {
            rule.direction()
        },
        because: words::rule(policy, rule, reading, base, verdict),
    }
}
