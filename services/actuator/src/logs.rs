//! Serves a node's logs over HTTP to the processes that show them to people.
//!
//! Invariant: every request needs the token shared by the processes of this installation, even on
//! loopback: network access alone must not expose instance output. A response ends when its client
//! disconnects or the process shuts down.

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

/// Header with the number of existing lines in a response; HEAD returns only that.
pub const LINES_HEADER: &str = "penstock-lines";

/// Which lines to return. Same names as in the control API, but `since` is always an absolute time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogsQuery {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Maximum number of existing lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Whether to continue with lines written later.
    #[serde(default)]
    pub follow: bool,
    /// Whether each line starts with the time by which it had been written.
    #[serde(default)]
    pub timestamps: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
}

/// Lines of text, oldest first.
pub struct NodeLines {
    /// How many of them existed at the time of the request.
    pub existing_lines: usize,
    pub stream: BoxStream<'static, io::Result<Bytes>>,
}

/// Why a node cannot return logs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogsError {
    /// The limit of concurrent readers has been reached.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    Failed(String),
}

/// Where a node keeps the output of its instances.
#[async_trait]
pub trait NodeLogs: Send + Sync + 'static {
    /// Opens the logs of a deployment. Reading ends when the stream is dropped; with `follow`, only then.
    async fn logs(&self, of: &DeploymentRef, query: LogsQuery) -> Result<NodeLines, LogsError>;
}

#[derive(Clone)]
struct ServerState {
    source: Arc<dyn NodeLogs>,
    token: Option<InternalToken>,
    shutdown: CancellationToken,
}

/// Returns the router of `GET /v1/logs/{endpoint}/{deployment}`, for the admin listener. Without a token
/// every request is refused. Responses end at `shutdown`.
pub fn router(
    source: Arc<dyn NodeLogs>,
    token: Option<InternalToken>,
    shutdown: CancellationToken,
) -> Router {
    Router::new()
        .route("/v1/logs/{endpoint}/{deployment}", get(get_logs))
        .with_state(ServerState {
            source,
            token,
            shutdown,
        })
}

async fn get_logs(
    State(server): State<ServerState>,
    Path((endpoint, deployment)): Path<(String, String)>,
    query: Result<Query<LogsQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Response {
    // Checked first, so that nothing else about the request is revealed.
    if !server.token.is_some_and(|token| token.is_in(&headers)) {
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
    match server.source.logs(&of, query).await {
        Ok(lines) => log_response(lines, server.shutdown),
        Err(LogsError::Busy(detail)) => {
            let retry_after = [(header::RETRY_AFTER, HeaderValue::from_static("1"))];
            (StatusCode::SERVICE_UNAVAILABLE, retry_after, detail).into_response()
        }
        Err(LogsError::Failed(detail)) => {
            (StatusCode::INTERNAL_SERVER_ERROR, detail).into_response()
        }
    }
}

fn log_response(lines: NodeLines, shutdown: CancellationToken) -> Response {
    let stream = lines.stream.take_until(shutdown.cancelled_owned());
    let mut response = Response::new(Body::from_stream(stream));
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, text);
    headers.insert(LINES_HEADER, HeaderValue::from(lines.existing_lines));
    response
}
