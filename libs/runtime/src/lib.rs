//! The shell that every service runs in: clock, ids, metrics, health, telemetry, the way from the
//! log to a service (`relay`, `feed`, `consumer`), the loop of services that reconcile, and what services
//! share that act on something outside (`executor`).
//!
//! What needs the store stands behind the feature `log`, which the gateway does without.
//!
//! Invariant: this is the only place that reads the wall clock or draws random numbers; engines get
//! time and ids as arguments.

#![warn(missing_docs, clippy::missing_errors_doc)]

pub mod clock;
#[cfg(feature = "log")]
pub mod consumer;
pub mod descriptors;
#[cfg(feature = "log")]
pub mod executor;
#[cfg(feature = "log")]
pub mod feed;
pub mod health;
pub mod ids;
#[cfg(feature = "log")]
pub mod lease;
pub mod metrics;
#[cfg(feature = "log")]
pub mod parking;
#[cfg(feature = "log")]
pub mod reconcile;
#[cfg(feature = "log")]
pub mod relay;
#[cfg(feature = "log")]
pub mod retry;
pub mod telemetry;
pub mod token;
