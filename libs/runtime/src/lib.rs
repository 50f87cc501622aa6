//! The runtime that every service shares: clock, ids, metrics, health, telemetry, the path from the
//! log to a service (`relay`, `feed`, `consumer`), the loop of services that reconcile, and what
//! services that act on something external have in common (`executor`).
//!
//! Everything that needs the store is behind the feature `log`, which the gateway does not enable.
//!
//! Invariant: the wall clock is read and random numbers are drawn here; engines get time and ids as
//! arguments. The few other places are at the edge, each marked with its reason (`clippy.toml` lists
//! what needs one).

#![warn(missing_docs, clippy::missing_errors_doc)]

#[cfg(feature = "log")]
pub mod archive;
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
