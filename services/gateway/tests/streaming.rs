//! Streaming in both directions, clients that disconnect, connections to instances.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::sync::atomic::Ordering;

use http::Response;
use http_body_util::BodyExt;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn both_directions_stream_chunk_by_chunk() {
    // The model responds to each chunk before the next is sent.
    let instance = TestInstance::start(|request| async {
        let (sender, body) = channel_body();
        tokio::spawn(async move {
            let mut incoming = request.into_body();
            while let Some(Ok(frame)) = incoming.frame().await {
                let data = frame.into_data().unwrap();
                let echo = if data == "one" { "ONE" } else { "TWO" };
                sender.unbounded_send(echo).unwrap();
            }
        });
        Response::new(body)
    })
    .await;
    let mut gateway = start_serving(&[instance.entry()]).await;
    let mut client = TestClient::connect(gateway.address).await;
    let (sender, body) = channel_body();
    sender.unbounded_send("one").unwrap();
    let sent = client
        .sender
        .send_request(request("/endpoints/iris/score").body(body).unwrap());
    let mut response = within_timeout("the head", sent).await.unwrap().into_body();
    let first = within_timeout("the first chunk", response.frame())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first.into_data().unwrap(), "ONE");
    sender.unbounded_send("two").unwrap();
    let second = within_timeout("the second chunk", response.frame())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(second.into_data().unwrap(), "TWO");
    drop(sender);
    assert!(within_timeout("the end", response.frame()).await.is_none());
    let total = gateway.totals(1).await;
    assert_eq!((total.request_bytes, total.response_bytes), (6, 6));
}

#[tokio::test]
async fn large_bodies_are_forwarded_unchanged_in_both_directions() {
    let instance = TestInstance::echo().await;
    let settings = Settings {
        body_max: 64 << 20,
        ..Settings::default()
    };
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let body: Vec<u8> = (0..9_000_001u32).map(|n| (n % 251) as u8).collect();
    for size in [65_535, 65_536, 65_537, 1_000_000, body.len()] {
        let response = gateway.post(body[..size].to_vec()).await;
        assert_eq!(response.status, 200);
        assert!(response.body == body[..size], "{size}");
    }
}

#[tokio::test]
async fn a_client_that_disconnects_closes_the_connection_to_the_instance_and_frees_the_slot() {
    let instance = RawInstance::start().await;
    let settings = Settings::one_at_a_time();
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let client = send_post(gateway.address, "x").await;
    let mut stream = instance.accept_request().await;
    drop(client);
    assert!(read_until_closed(&mut stream).await.is_empty());
    let total = gateway.totals(1).await;
    assert_eq!(
        (total.outcomes.client_left, total.outcomes.counted()),
        (1, 0)
    );
    // The one slot is free again.
    let (response, ()) = tokio::join!(gateway.post("y"), async {
        let mut stream = instance.accept_request().await;
        write_text(&mut stream, EMPTY_OK).await;
    });
    assert_eq!(response.status, 200);
}

#[tokio::test]
async fn a_client_that_disconnects_mid_response_closes_the_instances_connection() {
    let instance = RawInstance::start().await;
    let mut gateway = start_serving(&[instance.entry()]).await;
    let mut client = send_post(gateway.address, "x").await;
    let mut stream = instance.accept_request().await;
    write_text(
        &mut stream,
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n",
    )
    .await;
    let mut head = [0; 12];
    client.read_exact(&mut head).await.unwrap();
    drop(client);
    read_until_closed(&mut stream).await;
    assert_eq!(gateway.totals(1).await.outcomes.client_left, 1);
}

#[tokio::test]
async fn a_client_that_disconnects_during_a_blocked_upload_is_detected() {
    let instance = RawInstance::start().await;
    let mut settings = Settings::one_at_a_time();
    settings.body_max = 1 << 40;
    settings.request.timeout = contract::time::Span::from_secs(600);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = TcpStream::connect(gateway.address).await.unwrap();
    let head = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000000";
    write_text(&mut client, &format!("{head}\r\n\r\n")).await;
    let some = vec![b'x'; 1 << 20];
    client.write_all(&some).await.unwrap();
    // Accepted, and never read from.
    let stuck = instance.accept().await;
    let stuck_for = std::time::Duration::from_millis(500);
    while tokio::time::timeout(stuck_for, client.write_all(&some))
        .await
        .is_ok()
    {}
    client.set_zero_linger().unwrap();
    drop(client);
    let total = gateway.totals(1).await;
    assert_eq!(total.outcomes.client_left, 1, "{total:?}");
    drop(stuck);
}

#[tokio::test]
async fn a_request_whose_client_left_the_queue_is_never_sent() {
    let instance = RawInstance::start().await;
    let settings = Settings::one_at_a_time();
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let _first = send_post(gateway.address, "1").await;
    let mut stream = instance.accept_request().await;
    let second = send_post(gateway.address, "2").await;
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 1))
        .await;
    drop(second);
    assert_eq!(gateway.totals(1).await.outcomes.client_left, 1);
    let third = gateway.post("3");
    let (response, seen) = tokio::join!(third, async {
        write_text(&mut stream, EMPTY_OK).await;
        // The next request comes on the same connection or, from another thread, on a new one.
        let (mut stream, seen) = tokio::select! {
            seen = read_request(&mut stream) => (stream, seen),
            mut other = instance.accept() => { let seen = read_request(&mut other).await; (other, seen) }
        };
        write_text(&mut stream, EMPTY_OK).await;
        seen
    });
    assert_eq!(response.status, 200);
    assert!(seen.ends_with('3'), "{seen}");
}

#[tokio::test]
async fn a_refused_connection_is_retried_once_on_another_instance() {
    let unused_address = RawInstance::start().await.address;
    let good = TestInstance::echo().await;
    let mut gateway = start_serving(&[entry_at(unused_address), good.entry()]).await;
    for _ in 0..20 {
        assert_eq!(gateway.post("x").await.status, 200);
    }
    let total = gateway.totals(20).await;
    assert_eq!((total.outcomes.success, total.arrivals), (20, 20));
}

#[tokio::test]
async fn a_request_is_tried_on_at_most_two_instances() {
    let unused_address: Vec<InstanceEntry> = [
        RawInstance::start().await.address,
        RawInstance::start().await.address,
        RawInstance::start().await.address,
    ]
    .into_iter()
    .map(entry_at)
    .collect();
    let mut gateway = start_serving(&unused_address).await;
    assert_eq!(gateway.post("x").await.code(), "instance-unreachable");
    let total = gateway.totals(1).await;
    assert_eq!(
        total.instance_requests.values().sum::<u64>(),
        2,
        "{total:?}"
    );
}

#[tokio::test]
async fn instances_may_close_after_each_response() {
    let instance = TestInstance::start(|_| async {
        Response::builder()
            .header("connection", "close")
            .body(full_body("ok"))
            .unwrap()
    })
    .await;
    let mut gateway = start_serving(&[instance.entry()]).await;
    let mut client = TestClient::connect(gateway.address).await;
    for _ in 0..50 {
        let response = client
            .send(
                request("/endpoints/iris/score")
                    .body(full_body("x"))
                    .unwrap(),
            )
            .await;
        assert_eq!((response.status.as_u16(), response.text()), (200, "ok"));
        assert_eq!(
            response.header("connection"),
            "",
            "the client's connection stays"
        );
    }
    assert_eq!(instance.connections.load(Ordering::SeqCst), 50);
    assert_eq!(gateway.totals(50).await.outcomes.success, 50);
}

#[tokio::test]
async fn a_response_without_a_length_ends_with_the_instances_connection() {
    let instance = RawInstance::start().await;
    let gateway = start_serving(&[instance.entry()]).await;
    let (response, ()) = tokio::join!(gateway.post("x"), async {
        let mut stream = instance.accept_request().await;
        write_text(&mut stream, "HTTP/1.0 200 OK\r\n\r\nall of it").await;
    });
    assert_eq!(
        (response.status.as_u16(), response.text()),
        (200, "all of it")
    );
}

#[tokio::test]
async fn connections_to_instances_are_reused() {
    let instance = TestInstance::echo().await;
    let gateway = start_single_threaded(&[instance.entry()]).await;
    for size in [0, 10, 70_000] {
        for _ in 0..5 {
            assert_eq!(gateway.post(vec![b'x'; size]).await.body.len(), size);
        }
    }
    assert_eq!(instance.connections.load(Ordering::SeqCst), 1);
}
