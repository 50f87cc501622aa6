//! Unusual responses from instances, byte by byte: what the client gets, and that one request's
//! bytes never become another's response.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use http::Method;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn start_with_large_bodies(instance: &RawInstance) -> TestGateway {
    let config = gateway::Config {
        threads: 1,
        ..config()
    };
    let settings = Settings {
        body_max: 64 << 20,
        ..Settings::default()
    };
    start_with(config, &[blue_route(1, &settings, &[instance.entry()])]).await
}

/// Responds to the next request on a new connection.
async fn respond(instance: &RawInstance, text: &[u8]) -> TcpStream {
    let mut stream = instance.accept().await;
    read_request(&mut stream).await;
    stream.write_all(text).await.unwrap();
    stream
}

#[tokio::test]
async fn an_ambiguous_response_is_502_and_its_connection_closes() {
    let instance = RawInstance::start().await;
    let gateway = start_with_large_bodies(&instance).await;
    for header in [
        "content-length: 2\r\ntransfer-encoding: chunked\r\n",
        "content-length: 2\r\ncontent-length: 3\r\n",
        "transfer-encoding: gzip, chunked\r\n",
        "content-length: 2\r\nx: a\r\n b\r\n",
        "content-length: 2\r\nx: a\0\r\n",
    ] {
        let text = format!("HTTP/1.1 200 OK\r\n{header}\r\nok");
        let (response, mut stream) =
            tokio::join!(gateway.post("x"), respond(&instance, text.as_bytes()));
        assert_eq!(
            (response.status.as_u16(), response.code()),
            (502, "bad-answer"),
            "{header:?}"
        );
        read_until_closed(&mut stream).await;
    }
}

#[tokio::test]
async fn data_after_a_response_is_discarded() {
    let instance = RawInstance::start().await;
    let gateway = start_with_large_bodies(&instance).await;
    let two = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\noneHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong";
    let (first, mut stream) = tokio::join!(gateway.post("x"), respond(&instance, two));
    assert_eq!(first.text(), "one");
    read_until_closed(&mut stream).await;
    let next = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright";
    let (second, _stream) = tokio::join!(gateway.post("y"), respond(&instance, next));
    assert_eq!(second.text(), "right");
}

#[tokio::test]
async fn data_on_an_idle_connection_is_discarded() {
    let instance = RawInstance::start().await;
    let gateway = start_with_large_bodies(&instance).await;
    let one = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\none";
    let (first, mut stream) = tokio::join!(gateway.post("x"), respond(&instance, one));
    assert_eq!(first.text(), "one");
    let wrong = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong";
    stream.write_all(wrong).await.unwrap();
    // The sweep of idle connections finds it, if no request does first.
    read_until_closed(&mut stream).await;
    let right = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright";
    let (second, _stream) = tokio::join!(gateway.post("y"), respond(&instance, right));
    assert_eq!(second.text(), "right");
}

#[tokio::test]
async fn interim_responses_and_trailers_are_not_forwarded() {
    let instance = RawInstance::start().await;
    let gateway = start_with_large_bodies(&instance).await;
    let text = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\
        trailer: x-sum\r\n\r\n3;a=b\r\none\r\n3\r\ntwo\r\n0\r\nx-sum: 1\r\n\r\n";
    let (response, mut stream) = tokio::join!(gateway.post("x"), respond(&instance, text));
    assert_eq!((response.status.as_u16(), response.text()), (200, "onetwo"));
    assert_eq!(
        (response.header("trailer"), response.header("x-sum")),
        ("", "")
    );
    // The connection can be reused.
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
async fn a_response_before_the_request_is_complete_is_forwarded() {
    let instance = RawInstance::start().await;
    let gateway = start_with_large_bodies(&instance).await;
    let (response, ()) = tokio::join!(gateway.post(vec![b'x'; 20 << 20]), async {
        let mut stream = instance.accept().await;
        let mut some = [0; 1000];
        stream.read_exact(&mut some).await.unwrap();
        let text = b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nwhy";
        stream.write_all(text).await.unwrap();
        // Reads the rest, so that the response is not lost to a reset.
        read_until_closed(&mut stream).await;
    });
    assert_eq!(response.status, 424);
    assert_eq!(
        (response.header("penstock-model-status"), response.text()),
        ("413", "why")
    );
    assert_eq!(response.header("connection"), "close");
}

#[tokio::test]
async fn the_response_to_a_head_request_has_a_length_and_no_body() {
    let instance = RawInstance::start().await;
    let gateway = start_with_large_bodies(&instance).await;
    let send_method = |method: Method| {
        let request = request("/endpoints/iris/score").method(method);
        send(gateway.address, request.body(full_body("")).unwrap())
    };
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n";
    let (response, mut stream) = tokio::join!(send_method(Method::HEAD), respond(&instance, head));
    assert_eq!(
        (response.header("content-length"), response.text()),
        ("5", "")
    );
    // No body is waited for: the connection serves the next request.
    let (next, ()) = tokio::join!(send_method(Method::GET), async {
        assert!(read_request(&mut stream).await.starts_with("GET "));
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody")
            .await
            .unwrap();
    });
    assert_eq!(next.text(), "body");
}

#[tokio::test]
async fn a_response_that_arrives_byte_by_byte_is_complete() {
    let instance = RawInstance::start().await;
    let gateway = start_with_large_bodies(&instance).await;
    let (response, ()) = tokio::join!(gateway.post("x"), async {
        let mut stream = instance.accept().await;
        stream.set_nodelay(true).unwrap();
        read_request(&mut stream).await;
        let text = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n";
        for byte in text {
            stream.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(response.text(), "abcde");
}
