//! A node's logs are for those who have the token of the installation.

#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::Arc;

use actuator::logs::{LogsQuery, NodeLogs, router};
use bytes::Bytes;
use contract::ids::DeploymentRef;
use contract::time::Timestamp;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use reqwest::StatusCode;
use runtime::token::{InternalToken, TokenError};
use tokio::net::TcpListener;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// Says what it was asked.
struct Echo;

#[async_trait::async_trait]
impl NodeLogs for Echo {
    async fn logs(
        &self,
        of: &DeploymentRef,
        query: LogsQuery,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, String> {
        let line = format!("{of} {}", serde_json::to_string(&query).unwrap());
        Ok(stream::iter([Ok(Bytes::from(line))]).boxed())
    }
}

async fn start(token: Option<&str>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let token = token.map(|token| InternalToken::new(token).unwrap());
    let router = router(Arc::new(Echo), token);
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
    let query =
        "since=2026-03-01T00:00:00.000Z&limit=7&follow=true&timestamps=true&instance=iris-blue-1";
    let url = format!("{node}/v1/logs/iris/blue?{query}");
    let (status, text) = ask(url, Some(TOKEN)).await;
    assert_eq!(status, 200);
    let (of, asked) = text.split_once(' ').unwrap();
    assert_eq!(of, "iris/blue");
    let expected = LogsQuery {
        since: Some("2026-03-01T00:00:00Z".parse::<Timestamp>().unwrap()),
        limit: Some(7),
        follow: true,
        timestamps: true,
        instance: Some("iris-blue-1".to_owned().into()),
    };
    assert_eq!(serde_json::from_str::<LogsQuery>(asked).unwrap(), expected);
}

#[tokio::test]
async fn nobody_is_answered_without_the_token_on_loopback_neither() {
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
async fn a_node_without_a_token_answers_nobody() {
    let url = format!("{}/v1/logs/iris/blue", start(None).await);
    assert_eq!(ask(url.clone(), None).await.0, 401);
    assert_eq!(ask(url, Some("")).await.0, 401);
}

#[tokio::test]
async fn names_and_queries_that_cannot_be_are_refused() {
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

#[test]
fn a_token_that_could_be_guessed_is_refused() {
    assert_eq!(InternalToken::new("short").unwrap_err(), TokenError::Short);
}
