//! Operations: health, metrics, and the OpenAPI document.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, StatusCode, header};
use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};
use serde::{Deserialize, Serialize};

use crate::app::App;
use crate::call::Call;
use crate::response::{ApiResult, json, raw_json};
use crate::table::{Content, Gate, RouteEntry, route, schema};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/openapi.json" "openapi" Gate::Open, "This document",
            Content::Json(any_object), openapi),
        route!(GET "/healthz" "healthz" Gate::Health, "Alive", Content::Json(schema::<Health>), healthz),
        route!(GET "/readyz" "readyz" Gate::Health, "Ready to serve; otherwise lists what is missing",
            Content::Json(schema::<Health>), readyz, statuses &[200, 503]),
        route!(GET "/metrics" "metrics" Gate::Loopback, "Metrics in the format that Accept asks for: OpenMetrics, or the text format of Prometheus", Content::Metrics, metrics),
    ]
}

fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object"})
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Health {
    /// `ok`, or `waiting`.
    pub status: String,
    /// What is missing, in sentences.
    pub missing: Vec<String>,
    /// Problems that do not affect readiness, such as parked endpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

pub async fn healthz(app: Arc<App>, call: Call) -> ApiResult {
    json(
        StatusCode::OK,
        &health_report("ok", Vec::new(), &app, &call),
    )
}

pub async fn readyz(app: Arc<App>, call: Call) -> ApiResult {
    let missing = app.deps.health.missing();
    let (status, label) = match missing.is_empty() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "waiting"),
    };
    json(status, &health_report(label, missing, &app, &call))
}

/// Hides the details, which name endpoints and servers, from callers that are not trusted.
fn health_report(status: &str, missing: Vec<String>, app: &App, call: &Call) -> Health {
    let (missing, remarks) = match call.is_trusted {
        true => (missing, app.deps.health.warnings()),
        false => (Vec::new(), Vec::new()),
    };
    Health {
        status: status.into(),
        missing,
        remarks,
    }
}

pub async fn metrics(app: Arc<App>, call: Call) -> ApiResult {
    let (kind, text) = app.deps.metrics.encode_for(&call.headers);
    let mut response = Response::new(Body::from(text));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    Ok(response)
}

pub async fn openapi(app: Arc<App>, _call: Call) -> ApiResult {
    Ok(raw_json(StatusCode::OK, app.openapi.clone()))
}
