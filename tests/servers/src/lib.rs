//! Real servers for tests: Apache Kafka, PostgreSQL and Python model servers, started through
//! `scripts/stack` on free loopback ports, each in its own temporary folder. All calls block.
//!
//! Invariant: a server ends with the test program, however that ends, and its folder is removed.
//!
//! A server that cannot be started fails the test with a message, unless `PENSTOCK_SKIP` names it
//! (`PENSTOCK_SKIP=kafka,postgres,python`): then `None` is returned, and the test returns early.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests may panic as tests do; the lint knows only the tests themselves"
)]

mod kafka;
mod postgres;
mod process;
mod python;
mod secrets;

pub use kafka::{BrokerPlacement, Kafka, SecuredListeners};
pub use postgres::Postgres;
pub use process::spawn;
pub use python::{PythonServer, python};
pub use secrets::{Secrets, USER};

/// Whether `PENSTOCK_SKIP` names this part.
pub fn is_skipped(part: &str) -> bool {
    let names = std::env::var("PENSTOCK_SKIP").unwrap_or_default();
    let is_named = names.split(',').any(|name| name.trim() == part);
    if is_named {
        eprintln!("skipped: PENSTOCK_SKIP names {part}");
    }
    is_named
}

/// A unique name.
fn unique(prefix: &str) -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("{prefix}{}", &id[..12])
}
