//! A node's logs require the token of the installation.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use actuator::logs::{LINES_HEADER, LogsError, LogsQuery, NodeLines, NodeLogs, router};
use bytes::Bytes;
use contract::ids::DeploymentRef;
use contract::time::Timestamp;
use futures::StreamExt;
use futures::stream;
use reqwest::StatusCode;
use runtime::token::{InternalToken, TokenError};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// Returns the query that it received.
struct Echo;

#[async_trait::async_trait]
impl NodeLogs for Echo {
    async fn logs(
        &self,
        deployment: &DeploymentRef,
        query: LogsQuery,
    ) -> Result<NodeLines, LogsError> {
        let line = format!("{deployment} {}", serde_json::to_string(&query).unwrap());
        let lines = stream::iter([Ok(Bytes::from(line))]);
        let stream = match query.follow {
            true => lines.chain(stream::pending()).boxed(),
            false => lines.boxed(),
        };
        Ok(NodeLines {
            existing_lines: 1,
            stream,
        })
    }
}

/// Is always busy.
struct Full;

#[async_trait::async_trait]
impl NodeLogs for Full {
    async fn logs(&self, _: &DeploymentRef, _: LogsQuery) -> Result<NodeLines, LogsError> {
        Err(LogsError::Busy("128 are read now".to_owned()))
    }
}

async fn start(token: Option<&str>) -> String {
    start_with(Arc::new(Echo), token, CancellationToken::new()).await
}

async fn start_with(
    source: Arc<dyn NodeLogs>,
    token: Option<&str>,
    shutdown: CancellationToken,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let token = token.map(|token| InternalToken::new(token).unwrap());
    let router = router(source, token, shutdown);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

async fn ask(url: String, token: Option<&str>) -> (StatusCode, String) {
    let request = reqwest::Client::new().get(url);
    let request = match token {
        Some(token) => request.bearer_auth(token),
        None => request,
    };
    let response = request.send().await.unwrap();
    (response.status(), response.text().await.unwrap())
}

#[tokio::test]
async fn the_query_is_passed_on() {
    let node = start(Some(TOKEN)).await;
    let query = "since=2026-03-01T00:00:00.000Z&limit=7&timestamps=true&instance=iris-blue-1";
    let url = format!("{node}/v1/logs/iris/blue?{query}");
    let (status, text) = ask(url, Some(TOKEN)).await;
    assert_eq!(status, 200);
    let (deployment, received) = text.split_once(' ').unwrap();
    assert_eq!(deployment, "iris/blue");
    let expected = LogsQuery {
        since: Some("2026-03-01T00:00:00Z".parse::<Timestamp>().unwrap()),
        limit: Some(7),
        follow: false,
        timestamps: true,
        instance: Some("iris-blue-1".to_owned().into()),
    };
    assert_eq!(
        serde_json::from_str::<LogsQuery>(received).unwrap(),
        expected
    );
}

#[tokio::test]
async fn requests_without_the_token_are_refused_even_on_loopback() {
    let url = format!("{}/v1/logs/iris/blue", start(Some(TOKEN)).await);
    for wrong in [
        None,
        Some(""),
        Some("0123456789abcdef0123456789abcdeX"),
        Some("0123456789abcdef0123456789abcdef0"),
    ] {
        let (status, text) = ask(url.clone(), wrong).await;
        assert_eq!(status, 401, "{wrong:?}");
        assert!(!text.contains("iris"), "{text}");
    }
}

#[tokio::test]
async fn a_node_without_a_token_refuses_everyone() {
    let url = format!("{}/v1/logs/iris/blue", start(None).await);
    assert_eq!(ask(url.clone(), None).await.0, 401);
    assert_eq!(ask(url, Some("")).await.0, 401);
}

#[tokio::test]
async fn invalid_names_and_queries_are_refused() {
    let node = start(Some(TOKEN)).await;
    for (path, expected) in [
        ("/v1/logs/..%2f..%2fetc/passwd", 404),
        ("/v1/logs/Iris/blue", 404),
        ("/v1/logs/iris/blue?limit=many", 400),
        ("/v1/logs/iris/blue?lines=3", 400),
    ] {
        let (status, text) = ask(format!("{node}{path}"), Some(TOKEN)).await;
        assert_eq!(status.as_u16(), expected, "{path}: {text}");
    }
}

#[tokio::test]
async fn head_returns_the_number_of_lines_without_the_lines() {
    let node = start(Some(TOKEN)).await;
    let url = format!("{node}/v1/logs/iris/blue");
    let request = reqwest::Client::new().head(url).bearer_auth(TOKEN);
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()[LINES_HEADER], "1");
    assert_eq!(response.text().await.unwrap(), "");
}

#[tokio::test]
async fn a_followed_response_ends_at_shutdown() {
    let shutdown = CancellationToken::new();
    let node = start_with(Arc::new(Echo), Some(TOKEN), shutdown.clone()).await;
    let url = format!("{node}/v1/logs/iris/blue?follow=true");
    let request = reqwest::Client::new().get(url).bearer_auth(TOKEN);
    let mut response = request.send().await.unwrap();
    response.chunk().await.unwrap().unwrap();
    shutdown.cancel();
    let end = tokio::time::timeout(Duration::from_secs(60), response.chunk()).await;
    assert_eq!(end.expect("the answer goes on").unwrap(), None);
}

#[tokio::test]
async fn a_busy_node_answers_503_with_retry_after() {
    let node = start_with(Arc::new(Full), Some(TOKEN), CancellationToken::new()).await;
    let url = format!("{node}/v1/logs/iris/blue");
    let request = reqwest::Client::new().get(url).bearer_auth(TOKEN);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(response.text().await.unwrap(), "128 are read now");
}

#[test]
fn a_token_that_could_be_guessed_is_refused() {
    assert_eq!(InternalToken::new("short").unwrap_err(), TokenError::Short);
}
