//! The autoscale engine: from a policy, measurements and time to a count, with its explanation.
//!
//! `evaluate` is the fast path (a count and an outcome, no words), `explain` and `decide` give the
//! whole decision; all run the same code. `carry` hands state from one tick to the next.
//!
//! What a tick does:
//! ```text
//! let evaluation = evaluate(Some(&policy), &tick, now);
//! if should_explain(last_written, Some(&policy), &evaluation) {
//!     write(explain(&deployment, uid, Some(&policy), &tick, now));
//! }
//! carry(&mut carried, Some(&policy), &evaluation, now);
//! selection = evaluation.selection;
//! ```
//!
//! Invariants: no clock, no randomness; a recorded decision is made again to the same bytes by the
//! engine version that it names.

mod carry;
mod condition;
mod cron;
mod decide;
mod evaluate;
pub mod explain;
mod lint;
mod policy;
mod record;
mod rules;
mod schedule;
mod words;

pub use carry::{carried_after_clock_step, carried_after_restart, carried_next, carry};
pub use decide::{
    Comparison, compare, decide, decide_with, explain, is_reproducible, reevaluate, should_explain,
    should_write,
};
pub use evaluate::{Evaluation, TickInputs, evaluate};
pub use policy::{
    COOLDOWN_MAX, LABEL_LENGTH_MAX, PROFILES_MAX, Policy, RULES_MAX, STABILIZATION_MAX, STEPS_MAX,
    Selection, TRANSITIONS_MAX, Transition,
};
pub use schedule::DURATION_MAX;

/// The name that decisions carry.
pub const ENGINE: &str = "autoscale";

/// Raised whenever any output changes for recorded inputs. Replay then compares what this version makes of
/// older decisions with what they record, as information; carried state goes on from what they record.
pub const ENGINE_VERSION: u32 = 1;
