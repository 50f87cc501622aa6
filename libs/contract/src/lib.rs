//! The vocabulary of Penstock: the types that services exchange with each other and with users.
//!
//! Owns identifiers, time, resource documents, events with their versions and upcasters, frames of
//! measurements, routes, decisions and problem reports. Invariant: nothing here does I/O, reads a
//! clock or draws a random number; every type that is stored or sent can be read back.

#![warn(missing_docs, clippy::missing_errors_doc)]

pub mod chain;
pub mod decision;
pub mod events;
pub mod frame;
pub mod histogram;
pub mod ids;
pub mod log;
pub mod open_names;
pub mod own_secrets;
pub mod problem;
pub mod resources;
pub mod route;
pub mod stream;
pub mod time;
pub mod usage;
pub mod views;

pub use ids::{Bucket, BucketKey, DeploymentRef, EndpointKey, InstanceId, Name, Position, Uid};
pub use time::{Span, Timestamp};

/// Whether a field has the value of one that is left out.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
