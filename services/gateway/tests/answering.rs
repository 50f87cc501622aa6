//! Instances that answer in unusual ways, byte by byte: what the client gets, and that one
//! request's bytes never become another's answer.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use http::Method;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn one_thread(instance: &RawInstance) -> Running {
    let config = gateway::Config {
        threads: 1,
        ..config()
    };
    let settings = Settings {
        body_max: 64 << 20,
        ..Settings::default()
    };
    start_with(config, &[blue(1, &settings, &[instance.place()])]).await
}

/// Answers the next request of a new connection.
async fn say(instance: &RawInstance, text: &[u8]) -> TcpStream {
    let mut stream = instance.accept().await;
    read_request(&mut stream).await;
    stream.write_all(text).await.unwrap();
    stream
}

#[tokio::test]
async fn an_answer_that_can_be_read_in_two_ways_is_502_and_its_connection_closes() {
    let instance = RawInstance::start().await;
    let gateway = one_thread(&instance).await;
    for header in [
        "content-length: 2\r\ntransfer-encoding: chunked\r\n",
        "content-length: 2\r\ncontent-length: 3\r\n",
        "transfer-encoding: gzip, chunked\r\n",
        "content-length: 2\r\nx: a\r\n b\r\n",
        "content-length: 2\r\nx: a\0\r\n",
    ] {
        let text = format!("HTTP/1.1 200 OK\r\n{header}\r\nok");
        let (answer, mut stream) = tokio::join!(gateway.post("x"), say(&instance, text.as_bytes()));
        assert_eq!(
            (answer.status.as_u16(), answer.code()),
            (502, "bad-answer"),
            "{header:?}"
        );
        until_closed(&mut stream).await;
    }
}

#[tokio::test]
async fn what_stands_behind_an_answer_is_nobodys() {
    let instance = RawInstance::start().await;
    let gateway = one_thread(&instance).await;
    let two = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\noneHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong";
    let (first, mut stream) = tokio::join!(gateway.post("x"), say(&instance, two));
    assert_eq!(first.text(), "one");
    until_closed(&mut stream).await;
    let next = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright";
    let (second, _stream) = tokio::join!(gateway.post("y"), say(&instance, next));
    assert_eq!(second.text(), "right");
}

#[tokio::test]
async fn what_comes_on_a_connection_at_rest_is_nobodys() {
    let instance = RawInstance::start().await;
    let gateway = one_thread(&instance).await;
    let one = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\none";
    let (first, mut stream) = tokio::join!(gateway.post("x"), say(&instance, one));
    assert_eq!(first.text(), "one");
    let wrong = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong";
    stream.write_all(wrong).await.unwrap();
    // The sweep of idle connections finds it, if no request does before.
    until_closed(&mut stream).await;
    let right = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright";
    let (second, _stream) = tokio::join!(gateway.post("y"), say(&instance, right));
    assert_eq!(second.text(), "right");
}

#[tokio::test]
async fn interim_answers_and_trailers_are_not_passed_on() {
    let instance = RawInstance::start().await;
    let gateway = one_thread(&instance).await;
    let text = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\
        trailer: x-sum\r\n\r\n3;a=b\r\none\r\n3\r\ntwo\r\n0\r\nx-sum: 1\r\n\r\n";
    let (answer, mut stream) = tokio::join!(gateway.post("x"), say(&instance, text));
    assert_eq!((answer.status.as_u16(), answer.text()), (200, "onetwo"));
    assert_eq!((answer.header("trailer"), answer.header("x-sum")), ("", ""));
    // The connection is good for a next request.
    let (next, ()) = tokio::join!(gateway.post("y"), async {
        read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            .await
            .unwrap();
    });
    assert_eq!(next.status, 204);
}

#[tokio::test]
async fn an_answer_before_the_request_is_whole_is_passed_on() {
    let instance = RawInstance::start().await;
    let gateway = one_thread(&instance).await;
    let (answer, ()) = tokio::join!(gateway.post(vec![b'x'; 20 << 20]), async {
        let mut stream = instance.accept().await;
        let mut some = [0; 1000];
        stream.read_exact(&mut some).await.unwrap();
        let text = b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nwhy";
        stream.write_all(text).await.unwrap();
        // Takes the rest, as whoever wants the answer to be read does.
        until_closed(&mut stream).await;
    });
    assert_eq!(answer.status, 424);
    assert_eq!(
        (answer.header("penstock-model-status"), answer.text()),
        ("413", "why")
    );
}

#[tokio::test]
async fn the_answer_to_a_head_request_has_a_length_and_no_body() {
    let instance = RawInstance::start().await;
    let gateway = one_thread(&instance).await;
    let ask = |method: Method| {
        let request = request("/endpoints/iris/score").method(method);
        send(gateway.address, request.body(whole("")).unwrap())
    };
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n";
    let (answer, mut stream) = tokio::join!(ask(Method::HEAD), say(&instance, head));
    assert_eq!((answer.header("content-length"), answer.text()), ("5", ""));
    // Nothing of it is waited for: the connection serves the next request.
    let (next, ()) = tokio::join!(ask(Method::GET), async {
        assert!(read_request(&mut stream).await.starts_with("GET "));
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody")
            .await
            .unwrap();
    });
    assert_eq!(next.text(), "body");
}

#[tokio::test]
async fn an_answer_that_comes_byte_by_byte_is_whole() {
    let instance = RawInstance::start().await;
    let gateway = one_thread(&instance).await;
    let (answer, ()) = tokio::join!(gateway.post("x"), async {
        let mut stream = instance.accept().await;
        stream.set_nodelay(true).unwrap();
        read_request(&mut stream).await;
        let text = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n";
        for byte in text {
            stream.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(answer.text(), "abcde");
}
