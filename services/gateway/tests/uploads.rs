//! Bodies that arrive slowly, or that are not taken.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use contract::Position;
use contract::frame::{Frame, Measure};
use contract::route::RouteUpdate;
use contract::time::Span;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Sends a request's head, and the beginning of its body.
async fn begin_upload(gateway: &TestGateway, length: usize, beginning: usize) -> TcpStream {
    let mut client = TcpStream::connect(gateway.address).await.unwrap();
    let head = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\nconnection: close";
    write_text(
        &mut client,
        &format!("{head}\r\ncontent-length: {length}\r\n\r\n"),
    )
    .await;
    client.write_all(&vec![b'x'; beginning]).await.unwrap();
    client
}

#[tokio::test]
async fn slow_uploads_take_no_slot_from_other_requests() {
    let instance = TestInstance::echo().await;
    let settings = Settings {
        body_max: 64 << 20,
        ..Settings::one_at_a_time()
    };
    for (length, beginning) in [(100_000, 99_999), (3 << 20, (1 << 20) - 1)] {
        let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
        let mut uploads = Vec::new();
        for _ in 0..3 {
            uploads.push(begin_upload(&gateway, length, beginning).await);
        }
        let mut total = FrameTotals::default();
        while total.arrivals < 3 {
            total.add(&*gateway.frame(|frame| !frame.deployments.is_empty()).await);
        }
        for _ in 0..9 {
            assert_eq!(gateway.post("x").await.status, 200, "{length}");
        }
        for mut client in uploads {
            let rest = vec![b'x'; length - beginning];
            let (mut reader, mut writer) = client.split();
            let mut response = Vec::new();
            let exchange = async {
                tokio::try_join!(writer.write_all(&rest), reader.read_to_end(&mut response))
            };
            within_timeout("the response", exchange).await.unwrap();
            assert!(response.starts_with(b"HTTP/1.1 200 "), "{length}");
            assert!(response.len() > length, "{length}");
        }
    }
}

#[tokio::test]
async fn a_slow_upload_of_unknown_length_takes_no_slot_from_other_requests() {
    let instance = TestInstance::echo().await;
    let settings = Settings::one_at_a_time();
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = TcpStream::connect(gateway.address).await.unwrap();
    let head = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\nconnection: close";
    let beginning = format!("{head}\r\ntransfer-encoding: chunked\r\n\r\n4\r\nsome\r\n");
    write_text(&mut client, &beginning).await;
    let mut total = FrameTotals::default();
    while total.arrivals < 1 {
        total.add(&*gateway.frame(|frame| !frame.deployments.is_empty()).await);
    }
    for _ in 0..9 {
        write_text(&mut client, "1\r\nx\r\n").await;
        assert_eq!(gateway.post("x").await.status, 200);
    }
    write_text(&mut client, "0\r\n\r\n").await;
    let response = String::from_utf8(read_until_closed(&mut client).await).unwrap();
    assert!(
        response.starts_with("HTTP/1.1 200 ") && response.contains("somexxxxxxxxx"),
        "{response}"
    );
}

#[tokio::test]
async fn a_check_of_health_with_a_body_that_is_not_read_says_that_the_connection_closes() {
    let gateway = start(&[]).await;
    let request = "GET /healthz HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nso";
    let response = send_raw(gateway.address, request.as_bytes()).await;
    assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
    assert!(response.contains("connection: close\r\n"), "{response}");
}

#[tokio::test]
async fn the_time_of_an_upload_is_neither_latency_nor_age() {
    let instance = TestInstance::echo().await;
    let settings = Settings {
        body_max: 64 << 20,
        thresholds_us: vec![500_000],
        ..Settings::default()
    };
    // In full before the dispatch, and streamed.
    for (length, beginning) in [(100_000, 99_999), (3 << 20, 2 << 20)] {
        let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
        let mut client = begin_upload(&gateway, length, beginning).await;
        let arrival = gateway.frame(|frame| !frame.deployments.is_empty()).await;
        let until = arrival.start + Span::from_secs(2);
        let of_upload = |frame: &Frame| frame.bucket == arrival.bucket && frame.start >= until;
        let during = gateway.frame(of_upload).await;
        let rest = vec![b'x'; length - beginning];
        let (mut reader, mut writer) = client.split();
        let mut response = Vec::new();
        let exchange =
            async { tokio::try_join!(writer.write_all(&rest), reader.read_to_end(&mut response)) };
        within_timeout("the response", exchange).await.unwrap();
        let mut total = FrameTotals::default();
        while total.outcomes.success == 0 {
            total.add(&*gateway.frame(|frame| !frame.deployments.is_empty()).await);
        }
        let fast = total.at_or_below[&Measure::LATENCY][&500_000];
        assert_eq!(fast, 1, "{length}: {total:?}");
        assert!(
            during.deployments[0].oldest_in_flight_us < 500_000,
            "{length}"
        );
    }
}

#[tokio::test]
async fn a_request_whose_endpoint_goes_during_its_upload_has_an_outcome_too() {
    let instance = TestInstance::echo().await;
    let update = blue_route(1, &Settings::default(), &[instance.entry()]);
    let mut gateway = start(std::slice::from_ref(&update)).await;
    let client = begin_upload(&gateway, 100, 50).await;
    let mut total = FrameTotals::default();
    while total.arrivals < 1 {
        total.add(&*gateway.frame(|frame| !frame.deployments.is_empty()).await);
    }
    let gone = RouteUpdate {
        revision: Position(2),
        route: None,
        ..update.clone()
    };
    let applied = gateway.apply(gone).await;
    let later = applied.start + Span::from_secs(2);
    let of_iris = |frame: &Frame| frame.bucket == applied.bucket && frame.start >= later;
    gateway.frame(of_iris).await;
    drop(client);
    while total.outcomes.total() < 1 {
        total.add(&*gateway.frame(|frame| !frame.deployments.is_empty()).await);
    }
    assert_eq!((total.arrivals, total.outcomes.total()), (1, 1));
}

#[tokio::test]
async fn a_large_body_is_streamed_once_its_first_part_has_arrived() {
    let instance = RawInstance::start().await;
    let config = gateway::Config {
        upload_buffer_bytes: 100_000,
        ..config()
    };
    let route = blue_route(1, &Settings::default(), &[instance.entry()]);
    let gateway = start_with(config, &[route]).await;
    let mut client = begin_upload(&gateway, 200_000, 100_000).await;
    let mut stream = instance.accept().await;
    let head = read_head(&mut stream).await;
    assert!(head.contains("content-length: 200000\r\n"), "{head}");
    let mut part = vec![0; 100_000];
    within_timeout("the first part", stream.read_exact(&mut part))
        .await
        .unwrap();
    client.write_all(&part).await.unwrap();
    within_timeout("the rest", stream.read_exact(&mut part))
        .await
        .unwrap();
    write_text(&mut stream, EMPTY_OK).await;
    let response = read_until_closed(&mut client).await;
    assert!(response.starts_with(b"HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_refusal_before_the_end_of_a_body_says_that_the_connection_closes() {
    let gateway = start(&[]).await;
    for rest in [
        "content-length: 4\r\n\r\nsom",
        "content-length: 4\r\nexpect: 100-continue\r\n\r\n",
        "transfer-encoding: chunked\r\n\r\n4\r\nsome\r\n",
    ] {
        let request = format!("POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\n{rest}");
        let response = send_raw(gateway.address, request.as_bytes()).await;
        assert!(response.contains("unknown-endpoint"), "{response}");
        assert!(response.contains("connection: close\r\n"), "{response}");
    }
}

#[tokio::test]
async fn a_refused_body_that_has_arrived_leaves_the_connection_open() {
    let gateway = start(&[]).await;
    let request = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\n";
    let two = format!(
        "{request}content-length: 4\r\n\r\nsome{request}connection: close\r\ncontent-length: 0\r\n\r\n"
    );
    let responses = send_raw(gateway.address, two.as_bytes()).await;
    assert_eq!(responses.matches("HTTP/1.1 404 ").count(), 2, "{responses}");
    assert_eq!(
        responses.matches("connection: close\r\n").count(),
        1,
        "{responses}"
    );
}
