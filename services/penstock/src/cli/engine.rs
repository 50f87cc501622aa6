//! What the command line asks of the pure engines, without a server.

use contract::problem::Finding;
use contract::resources::AutoscaleSpec;
use contract::resources::Resource;
use contract::time::Timestamp;
use serde::Serialize;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Transition {
    pub at: Timestamp,
    pub profile: String,
    pub min: u32,
    pub max: u32,
    pub default: u32,
}

/// Faults that only the engine sees: conditions, schedules, metrics. Pointers begin at the root.
pub fn findings(_resource: &Resource) -> Vec<Finding> {
    Vec::new()
}

/// The schedule's transitions, the state at `from` first.
pub fn transitions(
    _spec: &AutoscaleSpec,
    _from: Timestamp,
    _to: Timestamp,
) -> Result<Vec<Transition>, Vec<Finding>> {
    Ok(Vec::new())
}
