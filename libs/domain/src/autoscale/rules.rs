//! Evaluates one rule in one tick: what it reads, whether it holds, how many instances it asks for,
//! and what it would read at another count.

use contract::decision::{InstanceCounts, Signal, Unmeasured};
use contract::resources::Direction;
use contract::time::Timestamp;

use super::policy::{Action, Rule, RuleKind};

/// Relative tolerance of rounding up, so that 1.1 / 0.1 asks for 11 instances and not for 12.
const CEILING_TOLERANCE: f64 = 1e-9;

/// How reliable a measurement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quality {
    Complete,
    /// Some data is missing: enough to scale out, not to scale in.
    Partial,
    /// Measuring has only just begun, and there is no value yet.
    Warming,
    /// Sources report, and there was nothing to measure. Unlike missing data, no reason for a default
    /// count.
    Unmeasured,
    Missing,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct RuleInput<'a> {
    pub quality: Quality,
    /// The value that the rule compares, in the metric's unit.
    pub value: f64,
    /// The same for all instances together: of an average over instances, what was measured, so that one
    /// that warms up counts as idle.
    pub total: f64,
    /// The same for scaling in and for projections: ready instances that were not measured count like the
    /// others.
    pub total_for_scale_in: f64,
    signal: Option<&'a Signal>,
}

impl RuleInput<'_> {
    /// What a rule reads without a signal.
    pub const NONE: Self = Self {
        quality: Quality::Missing,
        value: 0.0,
        total: 0.0,
        total_for_scale_in: 0.0,
        signal: None,
    };

    /// Requests that were refused for lack of capacity in the window.
    pub fn refused(&self) -> u64 {
        self.signal.map_or(0, |signal| signal.refused)
    }

    /// Whether part of the window was measured by other definitions.
    pub fn is_outdated(&self) -> bool {
        self.signal.is_some_and(|signal| signal.outdated)
    }

    /// Why there is no value, or only a lower bound of it.
    pub fn unmeasured(&self) -> Option<Unmeasured> {
        self.signal?.unmeasured
    }

    /// Seconds of the window that were not measured, and its length.
    pub fn uncovered(&self) -> Option<(u32, u32)> {
        let (covered, wanted) = (self.signal?.seconds_covered, self.signal?.seconds_wanted);
        (covered < wanted).then(|| (wanted - covered, wanted))
    }

    /// When the window is complete, if it is not.
    pub fn complete_at(&self) -> Option<Timestamp> {
        self.signal?.complete_at
    }

    pub fn may_scale_out(&self) -> bool {
        matches!(self.quality, Quality::Complete | Quality::Partial)
    }

    pub fn may_scale_in(&self) -> bool {
        self.quality == Quality::Complete
    }

    pub fn measured_value(&self) -> Option<f64> {
        (!matches!(self.quality, Quality::Missing | Quality::Unmeasured)).then_some(self.value)
    }
}

/// What a rule proposes for its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proposal {
    /// The rule does not hold.
    NoChange,
    Out(u32),
    In(u32),
}

/// Kept apart from thresholds, which are most rules and need less.
#[inline(never)]
fn track(input: &RuleInput<'_>, target: f64, tolerance: f64, current: u32) -> Proposal {
    let capacity = f64::from(current);
    let needed = input.total / target;
    if ceiling(needed) > current && needed > capacity * (1.0 + tolerance) {
        return Proposal::Out(ceiling(needed));
    }
    let needed = input.total_for_scale_in / target;
    if ceiling(needed) < current && needed < capacity * (1.0 - tolerance) {
        return Proposal::In(ceiling(needed));
    }
    Proposal::NoChange
}

impl Rule {
    /// Reads the rule's signal. Instances that are not ready serve nothing, so the value is divided
    /// by the ready ones. With none ready, the whole load is waiting for the first one: it counts
    /// as the load of one instance.
    pub fn read<'a>(
        &self,
        signals: &'a [Option<Signal>],
        instances: InstanceCounts,
    ) -> RuleInput<'a> {
        let Some(signal) = signals.get(self.signal).and_then(Option::as_ref) else {
            return RuleInput::NONE;
        };
        let Some(measured) = signal.value.filter(|value| value.is_finite()) else {
            return RuleInput {
                quality: match signal.unmeasured {
                    _ if signal.warming => Quality::Warming,
                    Some(_) => Quality::Unmeasured,
                    None => Quality::Missing,
                },
                signal: Some(signal),
                ..RuleInput::NONE
            };
        };
        let quality = match signal.is_incomplete() || signal.unmeasured.is_some() {
            true => Quality::Partial,
            false => Quality::Complete,
        };
        let serving = f64::from(instances.ready.max(1));
        let (value, total, total_for_scale_in) = if self.per_instance {
            (measured / serving, measured, measured)
        } else if self.metric.is_total() {
            (measured, measured, measured)
        } else {
            let instances = signal.instances.unwrap_or(serving);
            (
                measured,
                measured * instances,
                measured * instances.max(serving),
            )
        };
        RuleInput {
            quality,
            value,
            total,
            total_for_scale_in,
            signal: Some(signal),
        }
    }

    pub fn direction(&self) -> Option<Direction> {
        match &self.kind {
            RuleKind::Threshold { direction, .. } => Some(*direction),
            RuleKind::Track { .. } => None,
        }
    }

    /// What the rule proposes at `current` instances, assuming that its input is complete.
    pub fn propose(&self, input: &RuleInput<'_>, current: u32) -> Proposal {
        match &self.kind {
            RuleKind::Threshold {
                condition,
                direction,
                action,
            } => {
                if condition.is_some_and(|condition| !condition.holds(input.value)) {
                    return Proposal::NoChange;
                }
                match (
                    apply_action(action, *direction, input.value, current),
                    direction,
                ) {
                    (None, _) => Proposal::NoChange,
                    (Some(count), Direction::Out) => Proposal::Out(count.max(current)),
                    (Some(count), Direction::In) => Proposal::In(count.min(current)),
                }
            }
            RuleKind::Track { target, tolerance } => track(input, *target, *tolerance, current),
        }
    }

    /// The value that the rule would read with this many instances, all ready.
    pub fn projected(&self, input: &RuleInput<'_>, count: u32) -> f64 {
        if !self.scales {
            return input.value;
        }
        match count {
            0 if input.total_for_scale_in == 0.0 => 0.0,
            0 => f64::INFINITY,
            _ => input.total_for_scale_in / f64::from(count),
        }
    }

    /// Whether the rule would scale out at that count.
    pub fn would_scale_out(&self, input: &RuleInput<'_>, count: u32) -> bool {
        let value = self.projected(input, count);
        match &self.kind {
            RuleKind::Threshold {
                condition,
                direction: Direction::Out,
                action,
            } => {
                condition.is_none_or(|condition| condition.holds(value))
                    && apply_action(action, Direction::Out, value, count).is_some()
            }
            RuleKind::Threshold { .. } => false,
            RuleKind::Track { target, tolerance } => {
                value > target * (1.0 + tolerance)
                    && (count == 0 || ceiling(input.total_for_scale_in / target) > count)
            }
        }
    }
}

/// The count that an action leads to; `None` if it has steps and none of them applies.
fn apply_action(action: &Action, direction: Direction, value: f64, current: u32) -> Option<u32> {
    let by = match action {
        Action::To(count) => return Some(*count),
        Action::By(amount) => *amount,
        Action::Steps(steps) => {
            let holds = |bound: f64| match direction {
                Direction::Out => value > bound,
                Direction::In => value < bound,
            };
            steps.iter().rfind(|step| holds(step.bound))?.by
        }
    };
    let amount = by.of(current, direction);
    Some(match direction {
        Direction::Out => current.saturating_add(amount),
        Direction::In => current.saturating_sub(amount),
    })
}

fn ceiling(needed: f64) -> u32 {
    // The cast saturates, and NaN becomes 0.
    (needed * (1.0 - CEILING_TOLERANCE)).ceil() as u32
}
