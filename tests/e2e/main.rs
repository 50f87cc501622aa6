//! The real binary, real model servers, real HTTP.

mod bad_input;
mod lifecycle;
mod scaling;
#[path = "../support/mod.rs"]
mod support;
