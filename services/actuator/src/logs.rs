//! A node's logs over HTTP, for the processes that show them to people.
//!
//! Invariant: nothing is told without the token that the processes of this installation share, on
//! loopback neither: whoever may come near may not read what instances print. An answer ends with its
//! client, and with the process.

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
use futures::StreamExt;
use futures::stream::BoxStream;
use runtime::token::InternalToken;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// How many lines of the past an answer has; HEAD asks for no more than that.
pub const LINES_HEADER: &str = "penstock-lines";

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

/// Lines of text, oldest first.
pub struct NodeLines {
    /// How many of them are of the past.
    pub past: usize,
    pub stream: BoxStream<'static, io::Result<Bytes>>,
}

/// Why a node shows no logs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogsError {
    /// As many are read as can be at a time.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    Failed(String),
}

/// Where a node keeps the output of its instances.
#[async_trait]
pub trait NodeLogs: Send + Sync + 'static {
    /// Reading ends when the stream is dropped, and with `follow` only then.
    async fn logs(&self, of: &DeploymentRef, query: LogsQuery) -> Result<NodeLines, LogsError>;
}

#[derive(Clone)]
struct Served {
    source: Arc<dyn NodeLogs>,
    token: Option<InternalToken>,
    shutdown: CancellationToken,
}

/// `GET /v1/logs/{endpoint}/{deployment}`, to be put on the admin listener. Without a token nobody
/// is answered; at `shutdown` answers end.
pub fn router(
    source: Arc<dyn NodeLogs>,
    token: Option<InternalToken>,
    shutdown: CancellationToken,
) -> Router {
    Router::new()
        .route("/v1/logs/{endpoint}/{deployment}", get(answer))
        .with_state(Served {
            source,
            token,
            shutdown,
        })
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
        Ok(lines) => shown(lines, served.shutdown),
        Err(LogsError::Busy(detail)) => {
            let soon = [(header::RETRY_AFTER, HeaderValue::from_static("1"))];
            (StatusCode::SERVICE_UNAVAILABLE, soon, detail).into_response()
        }
        Err(LogsError::Failed(detail)) => {
            (StatusCode::INTERNAL_SERVER_ERROR, detail).into_response()
        }
    }
}

fn shown(lines: NodeLines, shutdown: CancellationToken) -> Response {
    let stream = lines.stream.take_until(shutdown.cancelled_owned());
    let mut response = Response::new(Body::from_stream(stream));
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, text);
    headers.insert(LINES_HEADER, HeaderValue::from(lines.past));
    response
}
