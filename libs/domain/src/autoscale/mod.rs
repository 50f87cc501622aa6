//! The autoscale engine: computes a count, with its explanation, from a policy, measurements and
//! time.
//!
//! `evaluate` is the fast path (a count and an outcome, no text), `explain` and `decide` return the
//! complete decision; all run the same code. `carry` hands state from one tick to the next.
//!
//! A tick:
//! ```text
//! let evaluation = evaluate(Some(&policy), &tick, now);
//! if repeats.should_record(last_written, Some(&policy), &evaluation, now) {
//!     write(explain(&deployment, uid, Some(&policy), &tick, now));
//! }
//! carry(&mut carried, Some(&policy), &evaluation, now);
//! selection = evaluation.selection;
//! ```
//!
//! Invariants: no clock, no randomness; the engine version that a recorded decision names
//! reproduces it byte for byte.

mod carry;
mod cause;
mod condition;
mod cron;
mod decide;
mod describe;
mod evaluate;
pub mod explain;
mod lint;
mod policy;
mod reads;
mod record;
mod repeats;
mod rules;
mod schedule;

pub use carry::{carried_after_clock_step, carried_after_restart, carried_next, carry};
pub use decide::{
    Comparison, compare, decide, decide_with, explain, is_reproducible, reevaluate, should_explain,
    should_write,
};
pub use evaluate::{Evaluation, TickInputs, evaluate};
pub use policy::{
    COOLDOWN_MAX, INITIALIZATION_MAX, LABEL_LENGTH_MAX, PROFILES_MAX, Policy, RULES_MAX,
    STABILIZATION_MAX, STEPS_MAX, SchedulePreview, Selection, TRANSITIONS_MAX, Transition,
};
pub use reads::{RULE_METRICS_VERSION, RuleMetrics};
pub use repeats::Repeats;
pub use schedule::DURATION_MAX;

/// The engine's name in decisions.
pub const ENGINE: &str = "autoscale";

/// Raised whenever any output changes for recorded inputs. Replay then compares this version's
/// results with older decisions for information only; carried state continues from what they
/// record.
pub const ENGINE_VERSION: u32 = 2;
