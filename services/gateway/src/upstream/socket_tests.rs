//! What a connection's own end can tell of the other.

use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use tokio::io::AsyncReadExt;
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

#[tokio::test]
async fn a_request_that_crossed_the_instances_close_came_too_late() {
    let (mut upstream, far) = connected().await;
    drop(far);
    poll_fn(|cx| {
        post_on(&mut upstream, cx);
        Poll::Ready(())
    })
    .await;
    broken_off(&mut upstream).await;
    assert!(upstream.came_too_late().await);
}

#[tokio::test]
async fn a_request_that_was_read_before_the_close_or_the_reset_did_not_come_too_late() {
    for reset in [false, true] {
        let (mut upstream, mut far) = connected().await;
        poll_fn(|cx| {
            post_on(&mut upstream, cx);
            Poll::Ready(())
        })
        .await;
        let mut text = Vec::new();
        while !text.ends_with(b"body") {
            far.read_buf(&mut text).await.unwrap();
        }
        if reset {
            far.set_zero_linger().unwrap();
        }
        drop(far);
        broken_off(&mut upstream).await;
        assert!(!upstream.came_too_late().await, "reset: {reset}");
    }
}
