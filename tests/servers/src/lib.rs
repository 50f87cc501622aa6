//! Real servers for tests: Apache Kafka, PostgreSQL and model servers in Python, started by hand on free
//! loopback ports through `scripts/stack`, each in a scratch folder of its own. All calls block.
//!
//! Invariant: a server ends with the test program, however that ends, and its folder goes with it.
//!
//! A server that cannot be had fails the test with a sentence, unless `PENSTOCK_SKIP` names it
//! (`PENSTOCK_SKIP=kafka,postgres,python`): then there is none, and the test returns early.

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

pub use kafka::{Ground, Kafka, Secured};
pub use postgres::Postgres;
pub use process::spawn;
pub use python::{PythonServer, python};
pub use secrets::{Secrets, USER};

/// Whether whoever runs the tests does without this part.
pub fn skipped(part: &str) -> bool {
    let skipped = std::env::var("PENSTOCK_SKIP").unwrap_or_default();
    let skipped = skipped.split(',').any(|name| name.trim() == part);
    if skipped {
        eprintln!("skipped: PENSTOCK_SKIP names {part}");
    }
    skipped
}

/// A name that no other test has.
fn unique(what: &str) -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("{what}{}", &id[..12])
}
