//! What is refused before it is a request, each followed by a second request that must not be
//! served on the same connection.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LINE: &str = "POST /endpoints/iris/score HTTP/1.1\r\n";

#[tokio::test]
async fn ambiguous_requests_are_refused_and_their_connections_closed() {
    let instance = TestInstance::echo().await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let host = "host: a\r\n";
    let cases = [
        (
            format!("{LINE}{host}content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
            400,
            "ambiguous-length",
        ),
        (
            format!("{LINE}{host}content-length: 4\r\ncontent-length: 4\r\n\r\nabcd"),
            400,
            "ambiguous-length",
        ),
        (
            format!("{LINE}{host}content-length: 4\r\ncontent-length: 5\r\n\r\nabcd"),
            400,
            "ambiguous-length",
        ),
        (
            format!("{LINE}{host}content-length: 4, 4\r\n\r\nabcd"),
            400,
            "ambiguous-length",
        ),
        (
            format!("{LINE}{host}content-length: +4\r\n\r\nabcd"),
            400,
            "ambiguous-length",
        ),
        (
            format!("{LINE}{host}transfer-encoding: xchunked\r\n\r\n"),
            400,
            "ambiguous-length",
        ),
        (
            format!("{LINE}{host}transfer-encoding: chunked, identity\r\n\r\n"),
            400,
            "ambiguous-length",
        ),
        (
            format!(
                "POST /endpoints/iris/score HTTP/1.0\r\n{host}transfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            400,
            "ambiguous-length",
        ),
        (format!("{LINE}\r\n"), 400, "bad-host"),
        (format!("{LINE}{host}{host}\r\n"), 400, "bad-host"),
        (
            format!("{LINE}{host}content-length : 4\r\n\r\nabcd"),
            400,
            "malformed-request",
        ),
        (
            format!("{LINE}{host}x: a\r\n b\r\n\r\n"),
            400,
            "malformed-request",
        ),
        (
            format!("{LINE}{host}x: a\0b\r\n\r\n"),
            400,
            "malformed-request",
        ),
        (
            format!("{LINE}{host}x: a\rb\r\n\r\n"),
            400,
            "malformed-request",
        ),
        (format!("{LINE}{host}x: a\n\r\n"), 400, "malformed-request"),
        (
            "POST /endpoints/iris/score HTTP/1.1\nhost: a\n\n".into(),
            400,
            "malformed-request",
        ),
        (
            format!("POST /endpoints/iris/sc ore HTTP/1.1\r\n{host}\r\n"),
            400,
            "malformed-request",
        ),
        (
            format!("POST /endpoints/iris/score<x> HTTP/1.1\r\n{host}\r\n"),
            400,
            "malformed-request",
        ),
        (
            "POST /endpoints/iris/score HTTP/1.0\r\n\r\nabcd".into(),
            400,
            "ambiguous-length",
        ),
        (
            format!("{LINE}{host}connection: upgrade\r\nupgrade: websocket\r\n\r\n"),
            501,
            "upgrade-unsupported",
        ),
        (
            format!("{}{LINE}{host}\r\n", "\r\n".repeat(5)),
            400,
            "malformed-request",
        ),
        (format!("!slow / HTTP/1.1\r\n{host}\r\n"), 400, "bad-method"),
        (
            format!("CONNECT a:1 HTTP/1.1\r\n{host}\r\n"),
            400,
            "bad-method",
        ),
        (
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(),
            400,
            "malformed-request",
        ),
        (
            format!("{LINE}{host}x: {}\r\n\r\n", "y".repeat(64 * 1024)),
            431,
            "headers-too-large",
        ),
        (
            format!("{LINE}{host}{}\r\n", "x: y\r\n".repeat(101)),
            431,
            "headers-too-large",
        ),
    ];
    for (text, status, code) in cases {
        let both = format!("{text}{LINE}{host}content-length: 1\r\n\r\nx");
        let response = send_raw(gateway.address, both.as_bytes()).await;
        assert!(
            response.starts_with(&format!("HTTP/1.1 {status} ")),
            "{text:?}: {response}"
        );
        assert!(
            response.contains(&format!("penstock-error-code: {code}\r\n")),
            "{text:?}: {response}"
        );
        assert!(response.contains("x-request-id: "), "{response}");
        assert_eq!(
            response.matches("HTTP/1.1 ").count(),
            1,
            "{text:?}: {response}"
        );
    }
    assert_eq!(
        instance.connections.load(Ordering::SeqCst),
        0,
        "nothing reached the model"
    );
}

#[tokio::test]
async fn every_refused_head_is_counted() {
    let gateway = start(&[]).await;
    let refused = "POST /endpoints/iris/score<x> HTTP/1.1\r\nhost: a\r\n\r\n";
    send_raw(gateway.address, refused.as_bytes()).await;
    let metrics = gateway.metrics.clone();
    gateway.stop().await;
    let text = metrics.encode();
    let line =
        r#"penstock_requests_total{endpoint="",deployment="",role="live",code_class="4xx"} 1"#;
    assert!(text.contains(line), "{text}");
}

#[tokio::test]
async fn empty_lines_before_a_request_are_ignored() {
    let instance = TestInstance::echo().await;
    let gateway = start_serving(&[instance.entry()]).await;
    let mut client = tokio::net::TcpStream::connect(gateway.address)
        .await
        .unwrap();
    // Nothing answers the lines themselves, however long the next request takes to come.
    write_text(&mut client, "\r\n").await;
    let first = format!("{LINE}host: a\r\ncontent-length: 2\r\n\r\nok\r\n");
    write_text(&mut client, &first).await;
    let head = read_head(&mut client).await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let mut body = [0; 2];
    client.read_exact(&mut body).await.unwrap();
    write_text(&mut client, "\r").await;
    let second = format!("\n\r\n{LINE}host: a\r\nconnection: close\r\n\r\n");
    write_text(&mut client, &second).await;
    let rest = String::from_utf8(read_until_closed(&mut client).await).unwrap();
    assert!(rest.starts_with("HTTP/1.1 200 "), "{rest}");
}

#[tokio::test]
async fn no_encoding_of_a_path_escapes_from_the_scoring_path() {
    let instance = TestInstance::echo().await;
    let gateway = start_serving(&[instance.entry()]).await;
    for below in [
        "..%2f..%2fadmin",
        "..;/admin",
        "..%5cadmin",
        "%252e%252e/admin",
    ] {
        let text = format!(
            "POST /endpoints/iris/score/{below} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        );
        let response = send_raw(gateway.address, text.as_bytes()).await;
        assert!(response.starts_with("HTTP/1.1 400 "), "{below}: {response}");
    }
    assert_eq!(instance.connections.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn malformed_chunks_are_refused_and_their_connections_closed() {
    let instance = TestInstance::echo().await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    for chunks in [
        "0x1\r\na\r\n0\r\n\r\n",
        "1\na\n0\n\n",
        "fffffffffffffffff\r\na",
        "2\r\nabc\r\n0\r\n\r\n",
        "4\r\nsome\r\nx\r\n",
    ] {
        let text = format!(
            "{LINE}host: a\r\ntransfer-encoding: chunked\r\n\r\n{chunks}{LINE}host: a\r\n\r\n"
        );
        let response = send_raw(gateway.address, text.as_bytes()).await;
        assert_eq!(
            response.matches("HTTP/1.1 ").count(),
            1,
            "{chunks:?}: {response}"
        );
        assert!(
            response.starts_with("HTTP/1.1 400 ") && response.contains("bad-body"),
            "{chunks:?}: {response}"
        );
    }
}

#[tokio::test]
async fn a_refused_upgrade_is_not_counted_as_a_failure() {
    let gateway = start(&[]).await;
    let upgrade = format!("{LINE}host: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n");
    send_raw(gateway.address, upgrade.as_bytes()).await;
    let metrics = gateway.metrics.clone();
    gateway.stop().await;
    let text = metrics.encode();
    let counted = text
        .lines()
        .find(|line| line.starts_with("penstock_requests_total{"));
    assert!(counted.unwrap().contains("code_class=\"4xx\""), "{text}");
}

#[tokio::test]
async fn requests_before_a_refused_head_are_answered_first() {
    let instance = TestInstance::echo().await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let good = format!("{LINE}host: a\r\ncontent-length: 2\r\n\r\nok");
    let response = send_raw(
        gateway.address,
        format!("{good}{good}{LINE}\r\n").as_bytes(),
    )
    .await;
    assert_eq!(response.matches("HTTP/1.1 200").count(), 2, "{response}");
    assert_eq!(response.matches("HTTP/1.1 400").count(), 1, "{response}");
}

#[tokio::test]
async fn each_pipelined_request_needs_its_own_key() {
    let instance = TestInstance::echo().await;
    let settings = Settings {
        keys: vec!["secret"],
        ..Settings::default()
    };
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let with = format!(
        "{LINE}host: a\r\nauthorization: Bearer secret\r\nupgrade: foo\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\nok"
    );
    let without = format!("{LINE}host: a\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno");
    let response = send_raw(gateway.address, format!("{with}{without}").as_bytes()).await;
    assert_eq!(response.matches("HTTP/1.1 200").count(), 1, "{response}");
    assert_eq!(response.matches("HTTP/1.1 401").count(), 1, "{response}");
}

#[tokio::test]
async fn a_request_may_arrive_byte_by_byte() {
    let instance = TestInstance::echo().await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let text = format!(
        "{LINE}host: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n4;x=y\r\nabcd\r\n1\r\ne\r\n0\r\nT: 1\r\n\r\n"
    );
    let mut stream = tokio::net::TcpStream::connect(gateway.address)
        .await
        .unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in text.bytes() {
        stream.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let response = String::from_utf8(read_until_closed(&mut stream).await).unwrap();
    assert!(
        response.starts_with("HTTP/1.1 200") && response.ends_with("abcde"),
        "{response}"
    );
}

#[tokio::test]
async fn slow_heads_are_refused_and_silent_connections_closed() {
    let instance = TestInstance::echo().await;
    let config = gateway::Config {
        head_timeout: Duration::from_millis(200),
        idle_timeout: Duration::from_millis(300),
        ..config()
    };
    let gateway = start_with(
        config,
        &[blue_route(1, &Settings::default(), &[instance.entry()])],
    )
    .await;
    let slow = send_raw(gateway.address, LINE.as_bytes()).await;
    assert!(
        slow.starts_with("HTTP/1.1 408 ") && slow.contains("headers-too-slow"),
        "{slow}"
    );
    assert_eq!(send_raw(gateway.address, b"").await, "");
    let served = send_raw(
        gateway.address,
        format!("{LINE}host: a\r\ncontent-length: 2\r\n\r\nok").as_bytes(),
    )
    .await;
    assert!(served.ends_with("ok"), "answered, then closed: {served}");
}

#[tokio::test]
async fn one_byte_at_a_time_does_not_extend_the_head_timeout() {
    let config = gateway::Config {
        head_timeout: Duration::from_millis(300),
        ..config()
    };
    let gateway = start_with(config, &[]).await;
    let stream = tokio::net::TcpStream::connect(gateway.address)
        .await
        .unwrap();
    let (mut read, mut write) = stream.into_split();
    let writer = tokio::spawn(async move {
        while write.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut response = String::new();
    let _ = within_timeout("408", read.read_to_string(&mut response)).await;
    assert!(response.starts_with("HTTP/1.1 408 "), "{response}");
    writer.abort();
}
