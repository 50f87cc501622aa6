//! Limits on what one client can use of the server while others are served.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use contract::ids::DeploymentRef;
use control::{Limits, LogQuery, LogSource, SourceError};
use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::Method;
use support::{Setup, TestWorld, deployment, endpoint};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Makes a test fail instead of hang.
const TIMEOUT: Duration = Duration::from_secs(20);
/// A timeout that a test waits for.
const SHORT: Duration = Duration::from_millis(100);

async fn start_with_limits(limits: Limits) -> TestWorld {
    TestWorld::start_with(Setup {
        limits,
        ..Setup::default()
    })
    .await
}

/// Connects and sends a text.
async fn connect_and_send(addr: SocketAddr, text: &str) -> TcpStream {
    let mut client = TcpStream::connect(addr).await.unwrap();
    client.write_all(text.as_bytes()).await.unwrap();
    client
}

/// Reads until the server closes the connection.
async fn read_until_closed(client: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let read = tokio::time::timeout(TIMEOUT, client.read_to_end(&mut text)).await;
    read.expect("the server keeps the connection").unwrap();
    String::from_utf8(text).unwrap()
}

/// Reads one response from a connection that stays open.
async fn read_response(client: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"}") {
        let read = tokio::time::timeout(TIMEOUT, client.read_buf(&mut text)).await;
        let read = read.expect("the server does not respond").unwrap();
        assert_ne!(read, 0, "closed after {}", String::from_utf8_lossy(&text));
    }
    String::from_utf8(text).unwrap()
}

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_half_a_head_is_disconnected() {
    let world = start_with_limits(Limits {
        head: SHORT,
        ..Limits::default()
    })
    .await;
    let mut client = connect_and_send(world.addr, "GET /healthz HTTP/1.1\r\nhos").await;
    read_until_closed(&mut client).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stays_idle_after_a_response_is_disconnected() {
    let world = start_with_limits(Limits {
        head: SHORT,
        ..Limits::default()
    })
    .await;
    let mut client = connect_and_send(world.addr, HEALTH).await;
    assert!(read_response(&mut client).await.starts_with("HTTP/1.1 200"));
    read_until_closed(&mut client).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_half_a_body_gets_408_and_is_disconnected() {
    let world = start_with_limits(Limits {
        body: SHORT,
        ..Limits::default()
    })
    .await;
    let head = format!(
        "PUT /v1/endpoints/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: 100\r\n\r\n{{",
        world.token
    );
    let mut client = connect_and_send(world.addr, &head).await;
    let response = read_until_closed(&mut client).await;
    assert!(response.starts_with("HTTP/1.1 408 "), "{response}");
    assert!(response.contains(r#""code":"too-slow""#), "{response}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_long_or_has_too_many_headers_gets_431() {
    let world = TestWorld::start().await;
    let long = format!("x-long: {}\r\n", "a".repeat(40_000));
    let many: String = (0..200).map(|n| format!("x-{n}: 1\r\n")).collect();
    for headers in [long, many] {
        let head = format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        let mut client = connect_and_send(world.addr, &head).await;
        let mut start = [0; 12];
        let read = tokio::time::timeout(TIMEOUT, client.read_exact(&mut start)).await;
        read.unwrap().unwrap();
        assert_eq!(&start, b"HTTP/1.1 431");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_over_the_limit_waits_while_the_others_are_served() {
    let world = start_with_limits(Limits {
        connections: 2,
        ..Limits::default()
    })
    .await;
    let mut first = connect_and_send(world.addr, HEALTH).await;
    let mut second = connect_and_send(world.addr, HEALTH).await;
    read_response(&mut first).await;
    read_response(&mut second).await;
    let mut third = connect_and_send(world.addr, HEALTH).await;
    for client in [&mut first, &mut second] {
        for _ in 0..20 {
            client.write_all(HEALTH.as_bytes()).await.unwrap();
            read_response(client).await;
        }
    }
    let early = third.try_read(&mut [0; 1]).unwrap_err();
    assert_eq!(early.kind(), std::io::ErrorKind::WouldBlock);
    drop(first);
    read_response(&mut third).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_over_the_limit_is_rejected_until_another_ends() {
    let world = with_one_stream(EndlessLog::default()).await;
    let open = || world.request(Method::GET, "/v1/events/stream").send();
    let first = open().await.unwrap();
    assert_eq!(first.status(), 200);
    for path in [
        "/v1/events/stream",
        "/v1/logs/a/blue?follow=true",
        "/v1/logs/a/blue",
    ] {
        let rejected = world.request(Method::GET, path).send().await.unwrap();
        // Checked before the body is read: an accepted one has no end.
        assert_eq!(rejected.status(), 503, "{path}");
        assert_eq!(rejected.headers()["retry-after"], "1");
        let problem: serde_json::Value = rejected.json().await.unwrap();
        assert_eq!(problem["code"], "too-many-streams");
    }
    world.get("/v1/endpoints").await.expect(200);
    drop(first);
    let reopened = async { while open().await.unwrap().status() != 200 {} };
    let reopened = tokio::time::timeout(TIMEOUT, reopened).await;
    reopened.expect("the closed stream still counts");
    world.stop().await;
}

/// An endless log, which signals when its reader is dropped.
#[derive(Default)]
struct EndlessLog {
    closed: Option<mpsc::UnboundedSender<()>>,
}

struct EndlessLogReader(Option<mpsc::UnboundedSender<()>>);

impl Drop for EndlessLogReader {
    fn drop(&mut self) {
        self.0.iter().for_each(|closed| closed.send(()).unwrap());
    }
}

#[async_trait]
impl LogSource for EndlessLog {
    async fn logs(
        &self,
        _of: &DeploymentRef,
        _query: LogQuery,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, SourceError> {
        let lines =
            futures::stream::unfold(EndlessLogReader(self.closed.clone()), |reader| async move {
                Some((Ok(Bytes::from_static(&[b'\n'; 65_536])), reader))
            });
        Ok(lines.boxed())
    }
}

/// Starts a server with one deployment that has these logs, and a limit of one stream.
async fn with_one_stream(logs: EndlessLog) -> TestWorld {
    let world = TestWorld::start_with(Setup {
        logs: Arc::new(logs),
        limits: Limits {
            streams: 1,
            ..Limits::default()
        },
        ..Setup::default()
    })
    .await;
    create_deployment(&world).await;
    world
}

async fn create_deployment(world: &TestWorld) {
    let blue = "/v1/endpoints/a/deployments/blue";
    world.create_endpoint("a").await;
    let put = world.put(blue, &deployment("a", "blue")).await.expect(201);
    world.get_at(blue, put.position()).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_response_ends_cleanly_when_the_server_shuts_down() {
    let world = with_one_stream(EndlessLog::default()).await;
    let open = world.request(Method::GET, "/v1/logs/a/blue").send();
    let mut log = open.await.unwrap();
    assert_eq!(log.status(), 200);
    let read_to_end = async move {
        // A truncated response would be an error.
        while log
            .chunk()
            .await
            .expect("the response was truncated")
            .is_some()
        {}
    };
    let read_to_end = tokio::time::timeout(TIMEOUT, read_to_end);
    let (read, _) = tokio::join!(read_to_end, world.stop());
    read.expect("the log is still read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_reader_that_disconnects_releases_its_permit() {
    let (closed, mut closed_signals) = mpsc::unbounded_channel();
    let world = with_one_stream(EndlessLog {
        closed: Some(closed),
    })
    .await;
    let open = || world.request(Method::GET, "/v1/logs/a/blue").send();
    let first = open().await.unwrap();
    assert_eq!(first.status(), 200);
    assert_eq!(open().await.unwrap().status(), 503);
    drop(first);
    let ended = tokio::time::timeout(TIMEOUT, closed_signals.recv()).await;
    ended.expect("the log is still read").unwrap();
    let reopened = async { while open().await.unwrap().status() != 200 {} };
    let reopened = tokio::time::timeout(TIMEOUT, reopened).await;
    reopened.expect("the reader that disconnected still counts");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_is_disconnected() {
    let (closed, mut closed_signals) = mpsc::unbounded_channel();
    let world = TestWorld::start_with(Setup {
        logs: Arc::new(EndlessLog {
            closed: Some(closed),
        }),
        limits: Limits {
            write_timeout: SHORT,
            ..Limits::default()
        },
        ..Setup::default()
    })
    .await;
    create_deployment(&world).await;
    let request = format!(
        "GET /v1/logs/a/blue HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n",
        world.token
    );
    let client = connect_and_send(world.addr, &request).await;
    let ended = tokio::time::timeout(TIMEOUT, closed_signals.recv()).await;
    ended.expect("the server still writes").unwrap();
    drop(client);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_does_not_delay_a_shutdown_and_a_request_in_flight_completes() {
    let world = TestWorld::start().await;
    let mut idle = connect_and_send(world.addr, HEALTH).await;
    read_response(&mut idle).await;
    let head = format!(
        "PUT /v1/endpoints/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
        world.token,
        endpoint("a").to_string().len(),
    );
    let mut active = connect_and_send(world.addr, &head).await;
    // The handler is now waiting for the body.
    let mut interim = [0; 25];
    active.read_exact(&mut interim).await.unwrap();
    let stopping = tokio::spawn(world.stop());
    assert_eq!(read_until_closed(&mut idle).await, "");
    active
        .write_all(endpoint("a").to_string().as_bytes())
        .await
        .unwrap();
    let response = read_until_closed(&mut active).await;
    assert!(response.starts_with("HTTP/1.1 201 "), "{response}");
    stopping.await.unwrap();
}
