//! Connections to instances that close at the wrong moment, and what is resent.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use contract::time::Span;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What an instance does with a request on a reused connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ServerStep {
    /// Waits for the request and reads its head, none of its body.
    ReadHead,
    ReadAll,
    Respond,
    RespondPartly,
    /// End of stream; it can still read.
    End,
    Reset,
    /// Closes, with a reset if data is left unread.
    Close,
}
use ServerStep::{Close, End, ReadAll, ReadHead, Reset, Respond, RespondPartly};

async fn run_steps(mut stream: TcpStream, steps: &[ServerStep], body: usize) {
    for step in steps {
        match step {
            ReadHead => {
                read_head(&mut stream).await;
            }
            ReadAll => {
                read_head(&mut stream).await;
                stream.read_exact(&mut vec![0; body]).await.unwrap();
            }
            Respond => write_text(&mut stream, EMPTY_OK).await,
            RespondPartly => write_text(&mut stream, "HTTP/1.1 20").await,
            End => stream.shutdown().await.unwrap(),
            Reset => stream.set_zero_linger().unwrap(),
            Close => break,
        }
    }
}

/// Responds to every other request, and counts them.
fn count_other_requests(instance: RawInstance) -> Arc<AtomicUsize> {
    let others = Arc::new(AtomicUsize::new(0));
    let count = others.clone();
    tokio::spawn(async move {
        loop {
            let mut stream = instance.accept_request().await;
            count.fetch_add(1, Ordering::SeqCst);
            write_text(&mut stream, EMPTY_OK).await;
        }
    });
    others
}

/// Returns the status of a POST on a reused connection, and how many requests came on others.
async fn post_on_reused(steps: &[ServerStep], body: usize, key: Option<&str>) -> (u16, usize) {
    let instance = RawInstance::start().await;
    let gateway = start_single_threaded(&[instance.entry()]).await;
    let stream = idle_connection(&gateway, &instance).await;
    let others = count_other_requests(instance);
    let mut request = request("/endpoints/iris/score");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    let request = request.body(full_body(vec![b'x'; body])).unwrap();
    let (response, ()) = tokio::join!(
        send(gateway.address, request),
        run_steps(stream, steps, body)
    );
    (response.status.as_u16(), others.load(Ordering::SeqCst))
}

/// Sizes that fit with the head, that are sent at once, and that are streamed.
const BODIES: [usize; 4] = [100, 20_000, 65_000, 300_000];

/// The instance has read some of the request, and does not respond.
const UNANSWERED: [&[ServerStep]; 7] = [
    &[ReadHead, End, Close],
    &[ReadHead, Close],
    &[ReadHead, Reset],
    &[ReadAll, End, Close],
    &[ReadAll, Close],
    &[ReadAll, Reset],
    &[ReadAll, End, Reset],
];

#[tokio::test]
async fn a_post_that_an_instance_has_begun_to_read_is_sent_once_however_the_connection_ends() {
    for steps in UNANSWERED {
        for body in BODIES {
            let result = post_on_reused(steps, body, None).await;
            assert_eq!(result, (502, 0), "{steps:?} {body}");
        }
    }
}

#[tokio::test]
async fn a_post_that_reaches_an_instance_after_its_end_of_stream_is_sent_once() {
    // The instance closes its half of the connection first but still reads. Servers that time out
    // connections while a request is in transit do this.
    for body in [100, 20_000, 65_000] {
        let instance = RawInstance::start().await;
        let gateway = start_single_threaded(&[instance.entry()]).await;
        let mut stream = idle_connection(&gateway, &instance).await;
        let others = count_other_requests(instance);
        let (response, ()) = tokio::join!(gateway.post(vec![b'x'; body]), async {
            stream.peek(&mut [0]).await.unwrap();
            stream.shutdown().await.unwrap();
            // It reads all of the request, or what the gateway had sent when it saw the end.
            read_until_closed(&mut stream).await;
        });
        assert_eq!(response.status, 502, "{body}");
        assert_eq!(others.load(Ordering::SeqCst), 0, "{body}");
    }
}

#[tokio::test]
async fn a_post_with_an_idempotency_key_is_resent() {
    for steps in UNANSWERED {
        for body in [100, 20_000, 65_000] {
            let result = post_on_reused(steps, body, Some("k-1")).await;
            assert_eq!(result, (200, 1), "{steps:?} {body}");
        }
    }
}

#[tokio::test]
async fn a_partial_response_is_never_followed_by_a_second_attempt() {
    for steps in [
        &[ReadHead, RespondPartly, End, Close][..],
        &[ReadHead, RespondPartly, Reset],
        &[ReadAll, RespondPartly, Close],
        &[ReadAll, RespondPartly, Reset],
    ] {
        for body in BODIES {
            for key in [None, Some("k-1")] {
                let (status, others) = post_on_reused(steps, body, key).await;
                assert_eq!((status, others), (502, 0), "{steps:?} {body} {key:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_response_counts_however_the_connection_ends_after_it() {
    for steps in [
        &[ReadAll, Respond, Close][..],
        &[ReadAll, Respond, End, Close],
        &[ReadHead, Respond, End, Close],
        &[ReadHead, Respond, Close],
    ] {
        for body in BODIES {
            let result = post_on_reused(steps, body, None).await;
            assert_eq!(result, (200, 0), "{steps:?} {body}");
        }
    }
}

#[tokio::test]
async fn a_connection_that_closed_before_the_request_is_not_used() {
    for steps in [&[End, Close][..], &[Close], &[Reset]] {
        for body in BODIES {
            let instance = RawInstance::start().await;
            let gateway = start_single_threaded(&[instance.entry()]).await;
            let stream = idle_connection(&gateway, &instance).await;
            run_steps(stream, steps, body).await;
            let others = count_other_requests(instance);
            let response = gateway.post(vec![b'x'; body]).await;
            assert_eq!(response.status, 200, "{steps:?} {body}");
            assert_eq!(others.load(Ordering::SeqCst), 1, "{steps:?} {body}");
        }
    }
}

#[tokio::test]
async fn a_connection_idle_for_keep_alive_idle_is_not_used() {
    for (idle, connections) in [(Span::ZERO, 2), (Span::from_secs(60), 1)] {
        let instance = TestInstance::echo().await;
        let mut settings = Settings::default();
        settings.request.keep_alive_idle = idle;
        let config = gateway::Config {
            threads: 1,
            ..config()
        };
        let gateway = start_with(config, &[blue_route(1, &settings, &[instance.entry()])]).await;
        for _ in 0..2 {
            assert_eq!(gateway.post("x").await.status, 200);
        }
        let made = instance.connections.load(Ordering::SeqCst);
        assert_eq!(made, connections, "{idle}");
    }
}

/// Starts an instance that responds to the first request of a connection and closes on the next
/// without a response; counts the requests it has read.
async fn closes_on_reuse() -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let instance = RawInstance::start().await;
    let (address, seen) = (instance.address, Arc::new(AtomicUsize::new(0)));
    let count = seen.clone();
    tokio::spawn(async move {
        loop {
            let mut stream = instance.accept().await;
            let count = count.clone();
            tokio::spawn(async move {
                read_request(&mut stream).await;
                count.fetch_add(1, Ordering::SeqCst);
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .await
                    .unwrap();
                read_request(&mut stream).await;
                count.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    (address, seen)
}

#[tokio::test]
async fn a_post_that_an_instance_has_read_is_not_resent_when_it_closes_without_a_response() {
    let (address, seen) = closes_on_reuse().await;
    let gateway = start_single_threaded(&[entry_at(address)]).await;
    assert_eq!(gateway.post("x").await.status, 200);
    assert_eq!(gateway.post("y").await.code(), "instance-unreachable");
    assert_eq!(seen.load(Ordering::SeqCst), 2, "each was sent once");
}

#[tokio::test]
async fn an_idempotent_request_is_resent_when_a_reused_connection_closes_without_a_response() {
    for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"] {
        let (address, seen) = closes_on_reuse().await;
        let gateway = start_single_threaded(&[entry_at(address)]).await;
        assert_eq!(gateway.post("x").await.status, 200, "{method}");
        let again = request("/endpoints/iris/score").method(method);
        let response = send(gateway.address, again.body(full_body("")).unwrap()).await;
        assert_eq!(response.status, 200, "{method}");
        assert_eq!(seen.load(Ordering::SeqCst), 3, "{method}");
    }
}

/// Returns the connection to the instance after one request and its response.
async fn idle_connection(gateway: &TestGateway, instance: &RawInstance) -> TcpStream {
    let (response, stream) = tokio::join!(gateway.post("x"), async {
        let mut stream = instance.accept_request().await;
        write_text(&mut stream, EMPTY_OK).await;
        stream
    });
    assert_eq!(response.status, 200);
    stream
}

#[tokio::test]
async fn a_streamed_body_is_never_resent() {
    let instance = RawInstance::start().await;
    let gateway = start_single_threaded(&[instance.entry()]).await;
    let mut stream = idle_connection(&gateway, &instance).await;
    let (sender, body) = channel_body();
    sender.unbounded_send("one").unwrap();
    drop(sender);
    let streamed = request("/endpoints/iris/score").body(body).unwrap();
    let (response, ()) = tokio::join!(send(gateway.address, streamed), async {
        let mut some = [0; 20];
        stream.read_exact(&mut some).await.unwrap();
        drop(stream);
    });
    assert_eq!(response.code(), "instance-unreachable");
}

#[tokio::test]
async fn nothing_is_resent_after_a_partial_response() {
    let instance = RawInstance::start().await;
    let gateway = start_single_threaded(&[instance.entry()]).await;
    let mut stream = idle_connection(&gateway, &instance).await;
    let (response, ()) = tokio::join!(gateway.post("y"), async {
        read_request(&mut stream).await;
        stream.write_all(b"HTTP/1.1 20").await.unwrap();
        drop(stream);
    });
    assert_eq!(response.code(), "instance-unreachable");
}

#[tokio::test]
async fn a_request_is_not_resent_when_a_new_connection_closes_without_a_response() {
    let instance = RawInstance::start().await;
    let gateway = start_serving(&[instance.entry()]).await;
    let (response, ()) = tokio::join!(gateway.post("x"), async {
        drop(instance.accept_request().await);
    });
    assert_eq!(response.code(), "instance-unreachable");
}
