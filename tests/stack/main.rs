//! Penstock as separate services on a real PostgreSQL and a real Kafka: what a user sees, and what
//! holds when parts of it fail.
//!
//! `SEED` and `COUNT` choose the faults and how many; `BROKERS` how many brokers there are. All are
//! printed.

#![allow(clippy::unwrap_used)] // a test says what it waits for by failing

#[path = "../support/mod.rs"]
mod support;

mod apart;
mod checks;
mod cluster;
mod faults;
mod faults_suite;
mod proxy;
mod stack;
mod workload;
