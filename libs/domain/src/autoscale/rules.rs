//! One rule against one tick: what it reads, whether it holds, how many instances it asks for, and
//! what it would read at another count.

use contract::decision::{InstanceCounts, Signal};
use contract::resources::Direction;

use super::policy::{Action, Rule, RuleKind};

/// A ceiling forgives this share, so that 1.1 / 0.1 asks for 11 instances and not for 12.
const CEILING_TOLERANCE: f64 = 1e-9;

/// How far what was measured can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quality {
    Whole,
    /// Something was not measured: enough to scale out, not to scale in.
    Partial,
    /// The window is not covered yet since the measuring began.
    Warming,
    Missing,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    pub quality: Quality,
    /// What the rule compares, in the metric's unit.
    pub value: f64,
    /// The same for all instances together, which a projection divides anew.
    pub total: f64,
}

impl Reading {
    pub fn may_scale_out(&self) -> bool {
        matches!(self.quality, Quality::Whole | Quality::Partial)
    }

    pub fn may_scale_in(&self) -> bool {
        self.quality == Quality::Whole
    }

    pub fn shown(&self) -> Option<f64> {
        (self.quality != Quality::Missing).then_some(self.value)
    }
}

/// What a threshold rule or a target makes of its reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// It does not hold.
    Nothing,
    Out(u32),
    In(u32),
}

impl Rule {
    /// Instances that are not ready serve nothing, so a share is one of the ready. With none ready
    /// the whole load waits for the first: it counts as if one instance faced it.
    pub fn read(&self, signals: &[Option<Signal>], instances: InstanceCounts) -> Reading {
        let signal = signals.get(self.signal).copied().flatten();
        let serving = f64::from(instances.ready.max(1));
        let measured = signal
            .and_then(|signal| signal.value)
            .filter(|value| value.is_finite());
        let Some(measured) = measured else {
            let warming = signal.is_some_and(|signal| signal.warming);
            return Reading {
                quality: if warming {
                    Quality::Warming
                } else {
                    Quality::Missing
                },
                value: 0.0,
                total: 0.0,
            };
        };
        let quality = match signal {
            Some(signal) if signal.warming => Quality::Warming,
            Some(signal) if signal.partial || signal.seconds_covered < signal.seconds_wanted => {
                Quality::Partial
            }
            _ => Quality::Whole,
        };
        let (value, total) = if self.per_instance {
            (measured / serving, measured)
        } else if self.metric.is_total() {
            (measured, measured)
        } else {
            (measured, measured * serving)
        };
        Reading {
            quality,
            value,
            total,
        }
    }

    pub fn direction(&self) -> Option<Direction> {
        match &self.kind {
            RuleKind::Threshold { direction, .. } => Some(*direction),
            RuleKind::Track { .. } => None,
        }
    }

    /// What the rule asks for at `current` instances, were its reading whole.
    pub fn wanted(&self, reading: &Reading, current: u32) -> Wanted {
        match &self.kind {
            RuleKind::Threshold {
                condition,
                direction,
                action,
            } => {
                if condition.is_some_and(|condition| !condition.holds(reading.value)) {
                    return Wanted::Nothing;
                }
                match (act(action, *direction, reading.value, current), direction) {
                    (None, _) => Wanted::Nothing,
                    (Some(count), Direction::Out) => Wanted::Out(count.max(current)),
                    (Some(count), Direction::In) => Wanted::In(count.min(current)),
                }
            }
            RuleKind::Track { target, tolerance } => {
                let needed = reading.total / target;
                let desired = ceiling(needed);
                let capacity = f64::from(current);
                if desired > current && needed > capacity * (1.0 + tolerance) {
                    Wanted::Out(desired)
                } else if desired < current && needed < capacity * (1.0 - tolerance) {
                    Wanted::In(desired)
                } else {
                    Wanted::Nothing
                }
            }
        }
    }

    /// What the rule would read with this many instances, all ready.
    pub fn projected(&self, reading: &Reading, count: u32) -> f64 {
        if !self.scales {
            return reading.value;
        }
        match count {
            0 if reading.total == 0.0 => 0.0,
            0 => f64::INFINITY,
            _ => reading.total / f64::from(count),
        }
    }

    /// Whether the rule would scale out at that count.
    pub fn would_scale_out(&self, reading: &Reading, count: u32) -> bool {
        let value = self.projected(reading, count);
        match &self.kind {
            RuleKind::Threshold {
                condition,
                direction: Direction::Out,
                action,
            } => {
                condition.is_none_or(|condition| condition.holds(value))
                    && act(action, Direction::Out, value, count).is_some()
            }
            RuleKind::Threshold { .. } => false,
            RuleKind::Track { target, tolerance } => {
                value > target * (1.0 + tolerance)
                    && (count == 0 || ceiling(reading.total / target) > count)
            }
        }
    }
}

/// The count that an action leads to. None: it has steps, and none of them holds.
fn act(action: &Action, direction: Direction, value: f64, current: u32) -> Option<u32> {
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
    // Casting saturates, and what is not a number becomes 0.
    (needed * (1.0 - CEILING_TOLERANCE)).ceil() as u32
}
