//! The shell that every service runs in: clock, ids, metrics, health, telemetry, the way from the
//! log to a service (`relay`, `feed`, `consumer`), the loop of services that reconcile, and what services
//! share that act on something outside (`executor`).
//!
//! Invariant: this is the only place that reads the wall clock or draws random numbers; engines get
//! time and ids as arguments.

pub mod clock;
pub mod consumer;
pub mod descriptors;
pub mod executor;
pub mod feed;
pub mod health;
pub mod ids;
pub mod lease;
pub mod metrics;
pub mod parking;
pub mod reconcile;
pub mod relay;
pub mod retry;
pub mod telemetry;
pub mod token;
