//! The real binary, real model servers, real HTTP.

#![allow(clippy::unwrap_used)] // tests fail by panicking

mod api_clients;
mod archives;
mod availability;
mod bad_input;
mod command_line;
mod damage;
mod descriptors;
mod host_names;
mod lifecycle;
mod logs;
mod metrics;
mod replacing;
mod routes;
mod scaling;
mod secrets;
mod starting;
mod stopping;
#[path = "../support/mod.rs"]
mod support;
mod time_limits;
mod usage;
