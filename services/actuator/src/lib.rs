//! The actuator: runs as many instances as were decided.
//!
//! It has two halves, which communicate through events. The **planner** owns the streams `instances/…`:
//! from decisions, documents and reports of nodes it requests the start, drain and removal of individual
//! instances. The **node agent** carries out the requests for its node through compute backends, and
//! records the results in `node/…`; it also serves its logs to other processes (`logs`).
//!
//! Inputs: the log, frames of gateways (requests in flight). Outputs: requests and results as events,
//! frames with CPU and memory. Invariant: no instance is stopped while a gateway may still use it, and
//! none is started twice.

pub mod logs;
pub mod node;
pub mod planner;
