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
use runtime::token::InternalToken;
use serde::{Deserialize, Serialize};

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
