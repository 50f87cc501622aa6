//! Responses: JSON bodies, positions, revisions.

use axum::body::Body;
use axum::response::Response;
use contract::ids::Position;
use http::{HeaderValue, StatusCode, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::call::POSITION;
use crate::error::ApiError;

pub type ApiResult = Result<Response, ApiError>;

/// A page of a list, newest first unless the route says otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct List<T> {
    pub items: Vec<T>,
    /// The `cursor` of the next page; null on the last one.
    pub next_cursor: Option<String>,
}

pub fn json(status: StatusCode, body: &impl Serialize) -> ApiResult {
    let bytes = serde_json::to_vec(body).map_err(ApiError::internal)?;
    Ok(raw_json(status, bytes))
}

pub fn raw_json(status: StatusCode, bytes: impl Into<Body>) -> Response {
    let mut response = Response::new(bytes.into());
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

/// Adds the position of the caller's write.
pub fn with_position(mut response: Response, position: Position) -> Response {
    response
        .headers_mut()
        .insert(POSITION, HeaderValue::from(position.0));
    response
}

/// Adds the revision of the document as its ETag.
pub fn with_etag(mut response: Response, revision: u64) -> Response {
    // A number in quotes is always a valid header.
    if let Ok(value) = HeaderValue::from_str(&format!("\"{revision}\"")) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response
}

/// The revision in a stored view.
pub fn revision_of(view: &Value) -> Option<u64> {
    view.pointer("/metadata/revision")?.as_u64()
}
