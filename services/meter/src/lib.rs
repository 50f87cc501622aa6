//! The meter: what was used, by whom and when.
//!
//! Inputs: frames of measurements from the bus, and the log (existing endpoints, ready instances, usage
//! already counted). Outputs: `usage.closed`, `usage.corrected` and `usage.gap` in the streams `usage/…`,
//! the basis of costs and reports, and a history of one-second panes for charts, backtests and the windows of
//! rules, with what rules need besides: which seconds were measured, and the instances of deployments whose
//! rules read them.
//!
//! A minute with requests is in the log seconds after its end. An idle deployment gets one event per hour,
//! or when its next request comes: until then its usage is only in the saved state, from which the next
//! owner continues, or is counted again from the frames that the bus has kept.
//!
//! Invariants: only `domain::usage` counts, so that no frame counts twice and every lost frame is recorded
//! as a gap; open minutes, idle spans and panes are saved together in the history, every two to ten seconds
//! and at shutdown. Without the history, usage that is not in the log yet is counted again from the bus; if the
//! bus keeps no frames it is lost: at most one hour, of idle deployments.

mod config;
mod coverage;
mod fold;
mod history;
mod metrics;
mod open;
mod panes;
mod ready;
mod service;

pub use config::Config;
pub use fold::{MeterFold, MeterState};
pub use history::{
    GapSpan, HistoryError, HistoryLocation, HistoryStore, POINTS_MAX, PastQuery, Point,
    PointsQuery, backup_history,
};
pub use panes::Pane;
pub use service::{Deps, Meter, MeterError};
