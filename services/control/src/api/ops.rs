//! For those who run the process: health, metrics, and the description of the API.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, StatusCode, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::answer::{Answer, json, json_text};
use crate::call::Call;
use crate::service::App;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Health {
    /// `ok`, or `waiting`.
    pub status: String,
    /// What is missing, in sentences.
    pub missing: Vec<String>,
    /// What people should know of, such as endpoints that are parked; takes nothing from readiness.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

pub async fn healthz(app: Arc<App>, call: Call) -> Answer {
    json(StatusCode::OK, &told("ok", Vec::new(), &app, &call))
}

pub async fn readyz(app: Arc<App>, call: Call) -> Answer {
    let missing = app.deps.health.missing();
    let (status, word) = match missing.is_empty() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "waiting"),
    };
    json(status, &told(word, missing, &app, &call))
}

/// Names of endpoints and of servers are not for everybody.
fn told(status: &str, missing: Vec<String>, app: &App, call: &Call) -> Health {
    let (missing, remarks) = match call.is_trusted {
        true => (missing, app.deps.health.remarks()),
        false => (Vec::new(), Vec::new()),
    };
    Health {
        status: status.into(),
        missing,
        remarks,
    }
}

pub async fn metrics(app: Arc<App>, _call: Call) -> Answer {
    let mut response = Response::new(Body::from(app.deps.metrics.encode()));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8"),
    );
    Ok(response)
}

pub async fn openapi(app: Arc<App>, _call: Call) -> Answer {
    Ok(json_text(StatusCode::OK, app.openapi.clone()))
}
