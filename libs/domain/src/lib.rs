//! The pure engines: Penstock's decisions as functions of events and time.
//!
//! Invariants: no clock, no randomness, no I/O, no async, no hash maps. Live services, replay,
//! simulation and `explain` all run the same functions.

#![warn(missing_docs, clippy::missing_errors_doc)]

pub mod autoscale;
pub mod available;
pub mod documents;
pub mod endpoint;
pub mod fold;
pub mod instances;
pub mod measure;
pub mod members;
pub mod routes;
pub mod settle;
pub mod usage;
pub mod views;
pub mod zones;
