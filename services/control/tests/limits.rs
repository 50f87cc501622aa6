//! What one client can take of the server, and that others are served meanwhile.
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
use support::{Setup, World, deployment, endpoint};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Only so that a broken server fails a test instead of hanging it.
const PATIENCE: Duration = Duration::from_secs(20);
/// A limit that a test waits for.
const SHORT: Duration = Duration::from_millis(100);

async fn limited(limits: Limits) -> World {
    World::start_with(Setup {
        limits,
        ..Setup::default()
    })
    .await
}

/// A connection with something sent on it.
async fn sent(addr: SocketAddr, text: &str) -> TcpStream {
    let mut client = TcpStream::connect(addr).await.unwrap();
    client.write_all(text.as_bytes()).await.unwrap();
    client
}

/// What comes until the server closes.
async fn until_closed(client: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let read = tokio::time::timeout(PATIENCE, client.read_to_end(&mut text)).await;
    read.expect("the server keeps the connection").unwrap();
    String::from_utf8(text).unwrap()
}

/// One answer on a connection that stays open.
async fn answer(client: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"}") {
        let read = tokio::time::timeout(PATIENCE, client.read_buf(&mut text)).await;
        let read = read.expect("the server does not answer").unwrap();
        assert_ne!(read, 0, "closed after {}", String::from_utf8_lossy(&text));
    }
    String::from_utf8(text).unwrap()
}

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_half_a_head_is_disconnected() {
    let world = limited(Limits {
        head: SHORT,
        ..Limits::default()
    })
    .await;
    let mut client = sent(world.addr, "GET /healthz HTTP/1.1\r\nhos").await;
    until_closed(&mut client).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_says_nothing_more_after_an_answer_is_disconnected() {
    let world = limited(Limits {
        head: SHORT,
        ..Limits::default()
    })
    .await;
    let mut client = sent(world.addr, HEALTH).await;
    assert!(answer(&mut client).await.starts_with("HTTP/1.1 200"));
    until_closed(&mut client).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_half_a_body_is_told_so_and_disconnected() {
    let world = limited(Limits {
        body: SHORT,
        ..Limits::default()
    })
    .await;
    let head = format!(
        "PUT /v1/endpoints/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: 100\r\n\r\n{{",
        world.token
    );
    let mut client = sent(world.addr, &head).await;
    let told = until_closed(&mut client).await;
    assert!(told.starts_with("HTTP/1.1 408 "), "{told}");
    assert!(told.contains(r#""code":"too-slow""#), "{told}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_long_or_has_too_many_headers_is_answered_431() {
    let world = World::start().await;
    let long = format!("x-long: {}\r\n", "a".repeat(40_000));
    let many: String = (0..200).map(|n| format!("x-{n}: 1\r\n")).collect();
    for headers in [long, many] {
        let head = format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        let mut client = sent(world.addr, &head).await;
        let mut told = [0; 12];
        let read = tokio::time::timeout(PATIENCE, client.read_exact(&mut told)).await;
        read.unwrap().unwrap();
        assert_eq!(&told, b"HTTP/1.1 431");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_over_the_limit_waits_while_the_others_are_served() {
    let world = limited(Limits {
        connections: 2,
        ..Limits::default()
    })
    .await;
    let mut first = sent(world.addr, HEALTH).await;
    let mut second = sent(world.addr, HEALTH).await;
    answer(&mut first).await;
    answer(&mut second).await;
    let mut third = sent(world.addr, HEALTH).await;
    for client in [&mut first, &mut second] {
        for _ in 0..20 {
            client.write_all(HEALTH.as_bytes()).await.unwrap();
            answer(client).await;
        }
    }
    let early = third.try_read(&mut [0; 1]).unwrap_err();
    assert_eq!(early.kind(), std::io::ErrorKind::WouldBlock);
    drop(first);
    answer(&mut third).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_over_the_limit_is_refused_until_another_ends() {
    let world = with_room_for_one(Endless::default()).await;
    let open = || world.request(Method::GET, "/v1/events/stream").send();
    let first = open().await.unwrap();
    assert_eq!(first.status(), 200);
    for path in [
        "/v1/events/stream",
        "/v1/logs/a/blue?follow=true",
        "/v1/logs/a/blue",
    ] {
        let refused = world.request(Method::GET, path).send().await.unwrap();
        // Before its body is read: one that is not refused has no end.
        assert_eq!(refused.status(), 503, "{path}");
        assert_eq!(refused.headers()["retry-after"], "1");
        let problem: serde_json::Value = refused.json().await.unwrap();
        assert_eq!(problem["code"], "too-many-streams");
    }
    world.get("/v1/endpoints").await.expect(200);
    drop(first);
    let again = async { while open().await.unwrap().status() != 200 {} };
    let again = tokio::time::timeout(PATIENCE, again).await;
    again.expect("the closed stream still counts");
    world.stop().await;
}

/// A log without an end, that tells when nobody reads it any more.
#[derive(Default)]
struct Endless {
    left: Option<mpsc::UnboundedSender<()>>,
}

struct Reader(Option<mpsc::UnboundedSender<()>>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.iter().for_each(|left| left.send(()).unwrap());
    }
}

#[async_trait]
impl LogSource for Endless {
    async fn logs(
        &self,
        _of: &DeploymentRef,
        _query: LogQuery,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, SourceError> {
        let lines = futures::stream::unfold(Reader(self.left.clone()), |reader| async move {
            Some((Ok(Bytes::from_static(&[b'\n'; 65_536])), reader))
        });
        Ok(lines.boxed())
    }
}

/// A server with one deployment, whose log this is, and with room for one stream.
async fn with_room_for_one(logs: Endless) -> World {
    let world = World::start_with(Setup {
        logs: Arc::new(logs),
        limits: Limits {
            streams: 1,
            ..Limits::default()
        },
        ..Setup::default()
    })
    .await;
    with_deployment(&world).await;
    world
}

async fn with_deployment(world: &World) {
    let blue = "/v1/endpoints/a/deployments/blue";
    world.with_endpoint("a").await;
    let put = world.put(blue, &deployment("a", "blue")).await.expect(201);
    world.get_at(blue, put.position()).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_in_the_middle_of_a_log_is_told_its_end_by_the_servers() {
    let world = with_room_for_one(Endless::default()).await;
    let open = world.request(Method::GET, "/v1/logs/a/blue").send();
    let mut log = open.await.unwrap();
    assert_eq!(log.status(), 200);
    let read_on = async move {
        // An answer that is cut is an error; this one has an end.
        while log.chunk().await.expect("the answer was cut").is_some() {}
    };
    let read_on = tokio::time::timeout(PATIENCE, read_on);
    let (read, _) = tokio::join!(read_on, world.stop());
    read.expect("the log is still read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_logs_that_leaves_gives_its_room_back() {
    let (left, mut gone) = mpsc::unbounded_channel();
    let world = with_room_for_one(Endless { left: Some(left) }).await;
    let open = || world.request(Method::GET, "/v1/logs/a/blue").send();
    let first = open().await.unwrap();
    assert_eq!(first.status(), 200);
    assert_eq!(open().await.unwrap().status(), 503);
    drop(first);
    let ended = tokio::time::timeout(PATIENCE, gone.recv()).await;
    ended.expect("the log is still read").unwrap();
    let again = async { while open().await.unwrap().status() != 200 {} };
    let again = tokio::time::timeout(PATIENCE, again).await;
    again.expect("the reader that left still counts");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_is_disconnected() {
    let (left, mut gone) = mpsc::unbounded_channel();
    let world = World::start_with(Setup {
        logs: Arc::new(Endless { left: Some(left) }),
        limits: Limits {
            stall: SHORT,
            ..Limits::default()
        },
        ..Setup::default()
    })
    .await;
    with_deployment(&world).await;
    let request = format!(
        "GET /v1/logs/a/blue HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n",
        world.token
    );
    let client = sent(world.addr, &request).await;
    let ended = tokio::time::timeout(PATIENCE, gone.recv()).await;
    ended.expect("the server still writes").unwrap();
    drop(client);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_does_not_delay_a_shutdown_and_a_request_in_flight_is_answered() {
    let world = World::start().await;
    let mut idle = sent(world.addr, HEALTH).await;
    answer(&mut idle).await;
    let head = format!(
        "PUT /v1/endpoints/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
        world.token,
        endpoint("a").to_string().len(),
    );
    let mut busy = sent(world.addr, &head).await;
    // The handler waits for the body now.
    let mut going_on = [0; 25];
    busy.read_exact(&mut going_on).await.unwrap();
    let stopping = tokio::spawn(world.stop());
    assert_eq!(until_closed(&mut idle).await, "");
    busy.write_all(endpoint("a").to_string().as_bytes())
        .await
        .unwrap();
    let told = until_closed(&mut busy).await;
    assert!(told.starts_with("HTTP/1.1 201 "), "{told}");
    stopping.await.unwrap();
}
