//! Connections to instances that close at the wrong moment, and what is sent again.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use contract::time::Span;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What an instance does with a request on a connection that has rested.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    /// Waits for the request and reads its head, none of its body.
    ReadHead,
    ReadAll,
    Answer,
    PartOfAnswer,
    /// End of stream; it can still read.
    End,
    Reset,
    /// Closes: with a reset where something is left unread.
    Close,
}
use Step::{Answer, Close, End, PartOfAnswer, ReadAll, ReadHead, Reset};

async fn play(mut stream: TcpStream, steps: &[Step], body: usize) {
    for step in steps {
        match step {
            ReadHead => {
                read_head(&mut stream).await;
            }
            ReadAll => {
                read_head(&mut stream).await;
                stream.read_exact(&mut vec![0; body]).await.unwrap();
            }
            Answer => say(&mut stream, EMPTY_OK).await,
            PartOfAnswer => say(&mut stream, "HTTP/1.1 20").await,
            End => stream.shutdown().await.unwrap(),
            Reset => stream.set_zero_linger().unwrap(),
            Close => break,
        }
    }
}

/// Answers whatever else comes, and counts it.
fn count_others(instance: RawInstance) -> Arc<AtomicUsize> {
    let others = Arc::new(AtomicUsize::new(0));
    let count = others.clone();
    tokio::spawn(async move {
        loop {
            let mut stream = instance.asked().await;
            count.fetch_add(1, Ordering::SeqCst);
            say(&mut stream, EMPTY_OK).await;
        }
    });
    others
}

/// Status of the answer to a POST on a rested connection, and how often it came on others.
async fn ask_rested(steps: &[Step], body: usize, key: Option<&str>) -> (u16, usize) {
    let instance = RawInstance::start().await;
    let gateway = serving_on_one_thread(&[instance.place()]).await;
    let stream = rested(&gateway, &instance).await;
    let others = count_others(instance);
    let mut asked = request("/endpoints/iris/score");
    if let Some(key) = key {
        asked = asked.header("idempotency-key", key);
    }
    let asked = asked.body(whole(vec![b'x'; body])).unwrap();
    let (answer, ()) = tokio::join!(send(gateway.address, asked), play(stream, steps, body));
    (answer.status.as_u16(), others.load(Ordering::SeqCst))
}

/// Sizes that fit with the head, that are sent at once, and that are passed on as they come.
const BODIES: [usize; 4] = [100, 20_000, 65_000, 300_000];

/// The instance has read some of the request, and there is no answer.
const UNANSWERED: [&[Step]; 7] = [
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
            let asked = ask_rested(steps, body, None).await;
            assert_eq!(asked, (502, 0), "{steps:?} {body}");
        }
    }
}

#[tokio::test]
async fn a_post_that_reaches_an_instance_after_its_end_of_stream_is_sent_once() {
    // It ended its half of the connection first, and reads all the same: this happens, for one, to
    // servers that time connections out while a request is on its way.
    for body in [100, 20_000, 65_000] {
        let instance = RawInstance::start().await;
        let gateway = serving_on_one_thread(&[instance.place()]).await;
        let mut stream = rested(&gateway, &instance).await;
        let others = count_others(instance);
        let (answer, ()) = tokio::join!(gateway.post(vec![b'x'; body]), async {
            stream.peek(&mut [0]).await.unwrap();
            stream.shutdown().await.unwrap();
            // It finds all of the request, or what the gateway had sent when it saw the end.
            until_closed(&mut stream).await;
        });
        assert_eq!(answer.status, 502, "{body}");
        assert_eq!(others.load(Ordering::SeqCst), 0, "{body}");
    }
}

#[tokio::test]
async fn a_post_with_an_idempotency_key_is_sent_again() {
    for steps in UNANSWERED {
        for body in [100, 20_000, 65_000] {
            let asked = ask_rested(steps, body, Some("k-1")).await;
            assert_eq!(asked, (200, 1), "{steps:?} {body}");
        }
    }
}

#[tokio::test]
async fn part_of_an_answer_is_never_followed_by_a_second_try() {
    for steps in [
        &[ReadHead, PartOfAnswer, End, Close][..],
        &[ReadHead, PartOfAnswer, Reset],
        &[ReadAll, PartOfAnswer, Close],
        &[ReadAll, PartOfAnswer, Reset],
    ] {
        for body in BODIES {
            for key in [None, Some("k-1")] {
                let (status, others) = ask_rested(steps, body, key).await;
                assert_eq!((status, others), (502, 0), "{steps:?} {body} {key:?}");
            }
        }
    }
}

#[tokio::test]
async fn an_answer_counts_however_the_connection_ends_after_it() {
    for steps in [
        &[ReadAll, Answer, Close][..],
        &[ReadAll, Answer, End, Close],
        &[ReadHead, Answer, End, Close],
        &[ReadHead, Answer, Close],
    ] {
        for body in BODIES {
            let asked = ask_rested(steps, body, None).await;
            assert_eq!(asked, (200, 0), "{steps:?} {body}");
        }
    }
}

#[tokio::test]
async fn a_connection_that_closed_before_the_request_is_not_used() {
    for steps in [&[End, Close][..], &[Close], &[Reset]] {
        for body in BODIES {
            let instance = RawInstance::start().await;
            let gateway = serving_on_one_thread(&[instance.place()]).await;
            let stream = rested(&gateway, &instance).await;
            play(stream, steps, body).await;
            let others = count_others(instance);
            let answer = gateway.post(vec![b'x'; body]).await;
            assert_eq!(answer.status, 200, "{steps:?} {body}");
            assert_eq!(others.load(Ordering::SeqCst), 1, "{steps:?} {body}");
        }
    }
}

#[tokio::test]
async fn a_connection_that_rested_for_keep_alive_idle_is_not_used() {
    for (idle, connections) in [(Span::ZERO, 2), (Span::from_secs(60), 1)] {
        let instance = Instance::echo().await;
        let mut settings = Settings::default();
        settings.request.keep_alive_idle = idle;
        let config = gateway::Config {
            threads: 1,
            ..config()
        };
        let gateway = start_with(config, &[blue(1, &settings, &[instance.place()])]).await;
        for _ in 0..2 {
            assert_eq!(gateway.post("x").await.status, 200);
        }
        let made = instance.connections.load(Ordering::SeqCst);
        assert_eq!(made, connections, "{idle}");
    }
}

/// An instance that answers the first request of a connection and closes on the next without a
/// word; counts the requests it has read.
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
async fn a_post_that_an_instance_has_read_is_not_sent_again_when_it_closes_without_a_word() {
    let (address, seen) = closes_on_reuse().await;
    let gateway = serving_on_one_thread(&[at(address)]).await;
    assert_eq!(gateway.post("x").await.status, 200);
    assert_eq!(gateway.post("y").await.code(), "instance-unreachable");
    assert_eq!(seen.load(Ordering::SeqCst), 2, "each was sent once");
}

#[tokio::test]
async fn an_idempotent_request_is_sent_again_when_a_rested_connection_closes_without_a_word() {
    for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"] {
        let (address, seen) = closes_on_reuse().await;
        let gateway = serving_on_one_thread(&[at(address)]).await;
        assert_eq!(gateway.post("x").await.status, 200, "{method}");
        let again = request("/endpoints/iris/score").method(method);
        let answer = send(gateway.address, again.body(whole("")).unwrap()).await;
        assert_eq!(answer.status, 200, "{method}");
        assert_eq!(seen.load(Ordering::SeqCst), 3, "{method}");
    }
}

/// The connection to the instance after one request and its answer.
async fn rested(gateway: &Running, instance: &RawInstance) -> TcpStream {
    let (answer, stream) = tokio::join!(gateway.post("x"), async {
        let mut stream = instance.asked().await;
        say(&mut stream, EMPTY_OK).await;
        stream
    });
    assert_eq!(answer.status, 200);
    stream
}

#[tokio::test]
async fn a_streamed_body_is_never_sent_again() {
    let instance = RawInstance::start().await;
    let gateway = serving_on_one_thread(&[instance.place()]).await;
    let mut stream = rested(&gateway, &instance).await;
    let (sender, body) = channel();
    sender.unbounded_send("one").unwrap();
    drop(sender);
    let streamed = request("/endpoints/iris/score").body(body).unwrap();
    let (answer, ()) = tokio::join!(send(gateway.address, streamed), async {
        let mut some = [0; 20];
        stream.read_exact(&mut some).await.unwrap();
        drop(stream);
    });
    assert_eq!(answer.code(), "instance-unreachable");
}

#[tokio::test]
async fn nothing_is_sent_again_once_part_of_an_answer_has_come() {
    let instance = RawInstance::start().await;
    let gateway = serving_on_one_thread(&[instance.place()]).await;
    let mut stream = rested(&gateway, &instance).await;
    let (answer, ()) = tokio::join!(gateway.post("y"), async {
        read_request(&mut stream).await;
        stream.write_all(b"HTTP/1.1 20").await.unwrap();
        drop(stream);
    });
    assert_eq!(answer.code(), "instance-unreachable");
}

#[tokio::test]
async fn a_new_connection_that_closes_without_a_word_is_not_tried_again() {
    let instance = RawInstance::start().await;
    let gateway = serving(&[instance.place()]).await;
    let (answer, ()) = tokio::join!(gateway.post("x"), async {
        drop(instance.asked().await);
    });
    assert_eq!(answer.code(), "instance-unreachable");
}
