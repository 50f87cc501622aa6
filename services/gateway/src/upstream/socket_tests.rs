//! What a connection's own end can tell of the other.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use super::counted::Counted;
use super::{Ask, Broken, Idle, Upstream};
use crate::body::RequestBody;

/// A connection to an instance, and the instance's end of it.
async fn connected() -> (Idle, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let counted = Counted::among(&Arc::default());
    (Idle::new(near.unwrap(), counted), far.unwrap().0)
}

fn post(idle: Idle) -> Box<Upstream> {
    let fixed = HeaderValue::from_static("x");
    let ask = Ask {
        method: &Method::POST,
        path: "/score",
        headers: &HeaderMap::new(),
        host: &fixed,
        id: &fixed,
    };
    idle.begin(&ask, RequestBody::Whole(Some(Bytes::from("body"))))
}

async fn broken_off(upstream: &mut Upstream) {
    let mut spare = HeaderMap::new();
    let head = poll_fn(|cx| upstream.poll_head(cx, &mut spare)).await;
    assert_eq!(head.err(), Some(Broken::Off));
}

#[tokio::test]
async fn a_request_that_the_socket_refused_was_not_sent() {
    let (idle, far) = connected().await;
    far.set_zero_linger().unwrap();
    drop(far);
    idle.stream().writable().await.unwrap();
    let mut upstream = post(idle);
    broken_off(&mut upstream).await;
    assert!(upstream.none_sent());
}

#[tokio::test]
async fn a_request_that_crossed_the_instances_close_may_have_been_read() {
    let (idle, far) = connected().await;
    drop(far);
    let mut upstream = post(idle);
    broken_off(&mut upstream).await;
    assert!(!upstream.none_sent());
    assert!(!upstream.is_answered());
}

#[tokio::test]
async fn a_close_is_seen_before_the_thread_has_been_told_of_it() {
    let (idle, far) = connected().await;
    assert!(idle.is_alive_now());
    drop(far);
    // Nothing was awaited, so no event of the close has been taken in.
    assert!(idle.is_alive());
    assert!(!idle.is_alive_now());
}

#[tokio::test]
async fn a_connection_rests_only_when_its_answer_is_whole() {
    let answered = async |answer: &[u8]| {
        let (idle, mut far) = connected().await;
        far.write_all(answer).await.unwrap();
        let mut upstream = post(idle);
        let mut spare = HeaderMap::new();
        let head = poll_fn(|cx| upstream.poll_head(cx, &mut spare)).await;
        assert!(head.is_ok());
        assert!(upstream.is_answered());
        upstream.rest().map(|idle| idle.is_reused())
    };
    let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    assert_eq!(answered(whole).await, Some(true));
    let part = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na";
    assert_eq!(answered(part).await, None);
}
