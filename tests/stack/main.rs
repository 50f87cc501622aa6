//! Penstock as separate services on a real PostgreSQL and a real Kafka: user-visible behaviour, and
//! invariants under faults.
//!
//! `SEED` selects the faults, `COUNT` their number, `BROKERS` the number of brokers. All are printed.

#![allow(clippy::unwrap_used)] // tests fail by panicking

#[path = "../support/mod.rs"]
mod support;

mod checks;
mod cluster;
mod faults;
mod faults_suite;
mod proxy;
mod separate_processes;
mod stack;
mod workload;
