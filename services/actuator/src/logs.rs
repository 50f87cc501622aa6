//! A node's logs over HTTP, for the processes that show them to people.
//!
//! Invariant: nothing is told without the token that the processes of this installation share, on
//! loopback neither: whoever may come near may not read what instances print.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use contract::ids::{DeploymentRef, InstanceId, Name};
use contract::time::Timestamp;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

/// Shortest token that is taken; a shorter one could be guessed.
pub const TOKEN_BYTES_MIN: usize = 16;

/// Which lines are asked for. The names of the control API, but `since` is always an instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogsQuery {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// At most so many lines of the past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Go on with what is written later.
    #[serde(default)]
    pub follow: bool,
    /// Before each line the time by which it had been written.
    #[serde(default)]
    pub timestamps: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
}

/// Where a node keeps the output of its instances.
#[async_trait]
pub trait NodeLogs: Send + Sync + 'static {
    /// Lines of text, oldest first. With `follow` the stream ends when it is dropped.
    async fn logs(
        &self,
        of: &DeploymentRef,
        query: LogsQuery,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, String>;
}

/// What the processes of an installation know each other by.
#[derive(Clone)]
pub struct InternalToken(Arc<str>);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error(
        "the internal token is shorter than {TOKEN_BYTES_MIN} characters; make one with `openssl rand -hex 32`"
    )]
    Short,
}

impl InternalToken {
    pub fn new(token: &str) -> Result<Self, TokenError> {
        let token = token.trim();
        if token.len() < TOKEN_BYTES_MIN {
            return Err(TokenError::Short);
        }
        Ok(Self(token.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether these headers of a request carry it.
    pub fn is_in(&self, headers: &HeaderMap) -> bool {
        let header = headers.get(header::AUTHORIZATION);
        let given = header.and_then(|header| header.as_bytes().strip_prefix(b"Bearer "));
        given.is_some_and(|given| bool::from(given.ct_eq(self.0.as_bytes())))
    }
}

impl std::fmt::Debug for InternalToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InternalToken")
    }
}

#[derive(Clone)]
struct Served {
    source: Arc<dyn NodeLogs>,
    token: Option<InternalToken>,
}

/// `GET /v1/logs/{endpoint}/{deployment}`, to be put on the admin listener. Without a token nobody
/// is answered.
pub fn router(source: Arc<dyn NodeLogs>, token: Option<InternalToken>) -> Router {
    Router::new()
        .route("/v1/logs/{endpoint}/{deployment}", get(answer))
        .with_state(Served { source, token })
}

async fn answer(
    State(served): State<Served>,
    Path((endpoint, deployment)): Path<(String, String)>,
    query: Result<Query<LogsQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Response {
    // Before anything is said about the rest of the request.
    if !served.token.is_some_and(|token| token.is_in(&headers)) {
        let detail = "give the token of PENSTOCK_INTERNAL_TOKEN as `Authorization: Bearer TOKEN`";
        return (StatusCode::UNAUTHORIZED, detail).into_response();
    }
    let (Ok(endpoint), Ok(deployment)) = (endpoint.parse::<Name>(), deployment.parse::<Name>())
    else {
        let detail = "no endpoint or deployment can have this name";
        return (StatusCode::NOT_FOUND, detail).into_response();
    };
    let Query(query) = match query {
        Ok(query) => query,
        Err(rejection) => return (StatusCode::BAD_REQUEST, rejection.body_text()).into_response(),
    };
    let of = DeploymentRef {
        endpoint,
        deployment,
    };
    match served.source.logs(&of, query).await {
        Ok(lines) => {
            let mut response = Response::new(Body::from_stream(lines));
            let text = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, text);
            response
        }
        Err(detail) => (StatusCode::INTERNAL_SERVER_ERROR, detail).into_response(),
    }
}
