//! Bodies in both directions as they come, clients that leave, connections to instances.

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
    // The model answers each chunk as it comes, before the next is sent.
    let instance = Instance::start(|request| async {
        let (sender, body) = channel();
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
    let mut gateway = serving(&[instance.place()]).await;
    let mut client = Client::connect(gateway.address).await;
    let (sender, body) = channel();
    sender.unbounded_send("one").unwrap();
    let sent = client
        .sender
        .send_request(request("/endpoints/iris/score").body(body).unwrap());
    let mut answer = soon("the head", sent).await.unwrap().into_body();
    let first = soon("the first chunk", answer.frame())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first.into_data().unwrap(), "ONE");
    sender.unbounded_send("two").unwrap();
    let second = soon("the second chunk", answer.frame())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(second.into_data().unwrap(), "TWO");
    drop(sender);
    assert!(soon("the end", answer.frame()).await.is_none());
    let total = gateway.total(1).await;
    assert_eq!((total.request_bytes, total.response_bytes), (6, 6));
}

#[tokio::test]
async fn large_bodies_pass_whole_in_both_directions() {
    let instance = Instance::echo().await;
    let settings = Settings {
        body_max: 64 << 20,
        ..Settings::default()
    };
    let gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let body: Vec<u8> = (0..9_000_001u32).map(|n| (n % 251) as u8).collect();
    for size in [65_535, 65_536, 65_537, 1_000_000, body.len()] {
        let answer = gateway.post(body[..size].to_vec()).await;
        assert_eq!(answer.status, 200);
        assert!(answer.body == body[..size], "{size}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_closes_the_connection_to_the_instance_and_frees_the_slot() {
    let instance = RawInstance::start().await;
    let settings = Settings::one_at_a_time();
    let mut gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let client = posted(gateway.address, "x").await;
    let mut stream = instance.asked().await;
    drop(client);
    assert!(until_closed(&mut stream).await.is_empty());
    let total = gateway.total(1).await;
    assert_eq!(
        (total.outcomes.client_left, total.outcomes.counted()),
        (1, 0)
    );
    // The one slot is free again.
    let (answer, ()) = tokio::join!(gateway.post("y"), async {
        let mut stream = instance.asked().await;
        say(&mut stream, EMPTY_OK).await;
    });
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_an_answer_closes_the_instances_connection() {
    let instance = RawInstance::start().await;
    let mut gateway = serving(&[instance.place()]).await;
    let mut client = posted(gateway.address, "x").await;
    let mut stream = instance.asked().await;
    say(
        &mut stream,
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n",
    )
    .await;
    let mut head = [0; 12];
    client.read_exact(&mut head).await.unwrap();
    drop(client);
    until_closed(&mut stream).await;
    assert_eq!(gateway.total(1).await.outcomes.client_left, 1);
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_an_upload_that_is_stuck_is_noticed() {
    let instance = RawInstance::start().await;
    let mut settings = Settings::one_at_a_time();
    settings.body_max = 1 << 40;
    settings.request.timeout = contract::time::Span::from_secs(600);
    let mut gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let mut client = TcpStream::connect(gateway.address).await.unwrap();
    let head = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000000";
    say(&mut client, &format!("{head}\r\n\r\n")).await;
    // Accepted, and never read from.
    let stuck = instance.accept().await;
    let some = vec![b'x'; 1 << 20];
    let stuck_for = std::time::Duration::from_millis(500);
    while tokio::time::timeout(stuck_for, client.write_all(&some))
        .await
        .is_ok()
    {}
    client.set_zero_linger().unwrap();
    drop(client);
    let total = gateway.total(1).await;
    assert_eq!(total.outcomes.client_left, 1, "{total:?}");
    drop(stuck);
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_is_never_sent() {
    let instance = RawInstance::start().await;
    let settings = Settings::one_at_a_time();
    let mut gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let _first = posted(gateway.address, "1").await;
    let mut stream = instance.asked().await;
    let second = posted(gateway.address, "2").await;
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 1))
        .await;
    drop(second);
    assert_eq!(gateway.total(1).await.outcomes.client_left, 1);
    let third = gateway.post("3");
    let (answer, seen) = tokio::join!(third, async {
        say(&mut stream, EMPTY_OK).await;
        // The next request comes on the same connection or, from another thread, on a new one.
        let (mut stream, seen) = tokio::select! {
            seen = read_request(&mut stream) => (stream, seen),
            mut other = instance.accept() => { let seen = read_request(&mut other).await; (other, seen) }
        };
        say(&mut stream, EMPTY_OK).await;
        seen
    });
    assert_eq!(answer.status, 200);
    assert!(seen.ends_with('3'), "{seen}");
}

#[tokio::test]
async fn a_refused_connection_is_tried_once_on_another_instance() {
    let nobody = RawInstance::start().await.address;
    let good = Instance::echo().await;
    let mut gateway = serving(&[at(nobody), good.place()]).await;
    for _ in 0..20 {
        assert_eq!(gateway.post("x").await.status, 200);
    }
    let total = gateway.total(20).await;
    assert_eq!((total.outcomes.success, total.arrivals), (20, 20));
}

#[tokio::test]
async fn a_request_is_tried_on_at_most_two_instances() {
    let nobody: Vec<Place> = [
        RawInstance::start().await.address,
        RawInstance::start().await.address,
        RawInstance::start().await.address,
    ]
    .into_iter()
    .map(at)
    .collect();
    let mut gateway = serving(&nobody).await;
    assert_eq!(gateway.post("x").await.code(), "instance-unreachable");
    let total = gateway.total(1).await;
    assert_eq!(
        total.instance_requests.values().sum::<u64>(),
        2,
        "{total:?}"
    );
}

#[tokio::test]
async fn instances_that_close_after_each_answer_are_normal() {
    let instance = Instance::start(|_| async {
        Response::builder()
            .header("connection", "close")
            .body(whole("ok"))
            .unwrap()
    })
    .await;
    let mut gateway = serving(&[instance.place()]).await;
    let mut client = Client::connect(gateway.address).await;
    for _ in 0..50 {
        let answer = client
            .send(request("/endpoints/iris/score").body(whole("x")).unwrap())
            .await;
        assert_eq!((answer.status.as_u16(), answer.text()), (200, "ok"));
        assert_eq!(
            answer.header("connection"),
            "",
            "the client's connection stays"
        );
    }
    assert_eq!(instance.connections.load(Ordering::SeqCst), 50);
    assert_eq!(gateway.total(50).await.outcomes.success, 50);
}

#[tokio::test]
async fn an_answer_without_a_length_ends_with_the_instances_connection() {
    let instance = RawInstance::start().await;
    let gateway = serving(&[instance.place()]).await;
    let (answer, ()) = tokio::join!(gateway.post("x"), async {
        let mut stream = instance.asked().await;
        say(&mut stream, "HTTP/1.0 200 OK\r\n\r\nall of it").await;
    });
    assert_eq!((answer.status.as_u16(), answer.text()), (200, "all of it"));
}

#[tokio::test]
async fn connections_to_instances_are_used_again() {
    let instance = Instance::echo().await;
    let gateway = serving_on_one_thread(&[instance.place()]).await;
    for size in [0, 10, 70_000] {
        for _ in 0..5 {
            assert_eq!(gateway.post(vec![b'x'; size]).await.body.len(), size);
        }
    }
    assert_eq!(instance.connections.load(Ordering::SeqCst), 1);
}
