//! What a connection's own end can tell of the other.

use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use tokio::net::{TcpListener, TcpStream};

use super::{Ask, Broken, Upstream};
use crate::body::RequestBody;

/// A connection to an instance, and the instance's end of it.
async fn connected() -> (Upstream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (Upstream::new(near.unwrap()), far.unwrap().0)
}

fn post_on(upstream: &mut Upstream, cx: &mut Context<'_>) {
    let fixed = HeaderValue::from_static("x");
    let ask = Ask {
        method: &Method::POST,
        path: "/score",
        headers: &HeaderMap::new(),
        host: &fixed,
        id: &fixed,
    };
    upstream.begin(cx, &ask, RequestBody::Whole(Some(Bytes::from("body"))));
}

async fn broken_off(upstream: &mut Upstream) {
    let mut spare = HeaderMap::new();
    let head = poll_fn(|cx| upstream.poll_head(cx, &mut spare)).await;
    assert_eq!(head.err(), Some(Broken::Off));
}

async fn post(upstream: &mut Upstream) {
    poll_fn(|cx| {
        post_on(upstream, cx);
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn a_request_that_the_socket_refused_was_not_sent() {
    let (mut upstream, far) = connected().await;
    far.set_zero_linger().unwrap();
    drop(far);
    upstream.stream.writable().await.unwrap();
    post(&mut upstream).await;
    broken_off(&mut upstream).await;
    assert!(upstream.none_sent());
}

#[tokio::test]
async fn a_request_that_crossed_the_instances_close_may_have_been_read() {
    let (mut upstream, far) = connected().await;
    drop(far);
    post(&mut upstream).await;
    broken_off(&mut upstream).await;
    assert!(!upstream.none_sent());
}

#[tokio::test]
async fn a_close_is_seen_before_the_thread_has_been_told_of_it() {
    let (upstream, far) = connected().await;
    assert!(upstream.is_alive_now());
    drop(far);
    // Nothing was awaited, so no event of the close has been taken in.
    assert!(upstream.is_alive());
    assert!(!upstream.is_alive_now());
}
