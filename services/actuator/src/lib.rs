//! The actuator: sees to it that as many instances run as was decided.
//!
//! Two halves that meet in events. The **planner** owns the streams `instances/…`: from decisions,
//! documents and what nodes report it orders single instances to start, drain and go. The **node
//! agent** carries out what names its node on its compute backends and answers in `node/…`; where
//! other processes show its logs, it serves them (`logs`).
//!
//! Inputs: the log, frames of gateways (what is still in flight). Outputs: orders and answers as
//! events, frames with CPU and memory. Invariant: no instance is stopped while a gateway may still
//! use it, and none is started twice.

pub mod logs;
pub mod node;
pub mod planner;
