//! The meter: what was used, by whom and when.
//!
//! Inputs: frames of measurements from the bus, and the log (which endpoints there are, which
//! instances are ready, what has been counted already). Outputs: `usage.closed`,
//! `usage.corrected` and `usage.gap` in the streams `usage/…`, on which costs and reports rest, and
//! a history of one-second panes for charts and backtests.
//!
//! A minute with a request is in the log seconds after its end. A deployment without one has an event an
//! hour, or when the next request comes: what it used until then is in the saved state alone, which its
//! next owner goes on with, or counts again from the frames that the bus has kept.
//!
//! Invariants: `domain::usage` alone counts, so that no frame counts twice and none is lost without
//! a name; open minutes, spans without requests and panes are saved together in the history, every ten
//! seconds and at the end. Without the history what is not in the log yet is counted again from the bus;
//! a bus that keeps nothing has lost it, which is an hour at most, of deployments without requests.

mod config;
mod fold;
mod history;
mod metrics;
mod open;
mod panes;
mod ready;
mod service;

pub use config::Config;
pub use history::{GapSpan, History, HistoryError, HistoryPlace, POINTS_MAX, Point, Query};
pub use panes::Pane;
pub use service::{Deps, Meter, MeterError};
