//! The control service: turns commands into events, and events into read models and gateway routes.
//!
//! Owns the streams `endpoint/…`, `access/…`, `members/…` and `parking/…`, the read models of [`domain::views`] and the routes.
//! Inputs: HTTP requests and the full log. Outputs: events, rows, routes and API responses.
//! Invariants: a write is acknowledged only once its events are durable; every event names its actor;
//! permissions are declared in one route table ([`table`]), which also generates the OpenAPI document;
//! no secret is returned in plain text except to a caller authorized to see it.

pub mod access;
pub mod api;
mod app;
mod auth;
mod call;
mod commands;
pub mod config;
mod deps;
mod error;
mod listener;
mod members;
mod metrics;
mod mirror;
pub mod openapi;
mod reactor;
mod response;
mod routes;
mod seal;
mod service;
pub mod table;
mod views;

pub use config::{ControlConfig, Limits, SEAL_FILE};
pub use deps::{
    ControlDeps, HistoryQuery, HistorySource, LogQuery, LogSource, NoHistory, NoLogs, SourceError,
};
pub use listener::serve_connections;
pub use service::{Control, ControlError};
pub use views::ViewsProjector;
