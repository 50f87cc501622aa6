//! The control service: commands become events, events become what people read and what gateways
//! follow.
//!
//! Owns the streams `endpoint/…`, `access/…` and `members/…`, the read models of [`domain::views`] and the routes.
//! Inputs: HTTP requests, and the whole log. Outputs: events, rows, routes, and the answers of the
//! API. Invariants: a write is answered once its events are durable; every event names its actor;
//! what a request may do stands in one table ([`table`]), which also makes the OpenAPI document;
//! no secret leaves in clear but to the one who may see it.

pub mod access;
mod answer;
pub mod api;
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
mod routes;
mod seal;
mod service;
pub mod table;
mod views;

pub use config::{ControlConfig, Limits, SEAL_FILE};
pub use deps::{
    ControlDeps, HistoryQuery, HistorySource, LogQuery, LogSource, NoHistory, NoLogs, SourceError,
};
pub use listener::accept;
pub use service::{Control, ControlError};
pub use views::ViewsProjector;
