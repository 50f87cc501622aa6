//! What our end of a connection can know about the other.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use super::count_guard::CountGuard;
use super::{IdleConnection, Upstream, UpstreamError, UpstreamRequest};
use crate::body::RequestBody;
use crate::forwarded::{Origin, Peer};

/// A connection to an instance, and the instance's end of it.
async fn connected() -> (IdleConnection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let count = CountGuard::new(&Arc::default());
    (IdleConnection::new(near.unwrap(), count), far.unwrap().0)
}

fn post(idle: IdleConnection) -> Box<Upstream> {
    let fixed = HeaderValue::from_static("x");
    let request = UpstreamRequest {
        method: &Method::POST,
        path: "/score",
        headers: &HeaderMap::new(),
        host: &fixed,
        id: &fixed,
        origin: Origin {
            peer: &Peer::new([10, 0, 0, 2].into(), &[]),
            authority: None,
            prefix: "",
        },
        passes_authorization: false,
    };
    idle.begin(&request, RequestBody::Full(Some(Bytes::from("body"))))
}

async fn assert_closed_early(upstream: &mut Upstream) {
    let mut spare = HeaderMap::new();
    let head = poll_fn(|cx| upstream.poll_head(cx, &mut spare)).await;
    assert_eq!(head.err(), Some(UpstreamError::ClosedEarly));
}

#[tokio::test]
async fn a_request_that_the_socket_refused_was_not_sent() {
    let (idle, far) = connected().await;
    far.set_zero_linger().unwrap();
    drop(far);
    idle.stream().writable().await.unwrap();
    let mut upstream = post(idle);
    assert_closed_early(&mut upstream).await;
    assert!(upstream.is_unsent());
}

#[tokio::test]
async fn a_request_sent_while_the_instance_closes_may_have_been_read() {
    let (idle, far) = connected().await;
    drop(far);
    let mut upstream = post(idle);
    assert_closed_early(&mut upstream).await;
    assert!(!upstream.is_unsent());
    assert!(!upstream.has_response());
}

#[tokio::test]
async fn a_close_is_detected_before_tokio_has_processed_it() {
    let (idle, far) = connected().await;
    assert!(idle.is_alive_now());
    drop(far);
    // Nothing was awaited, so the close has not been processed.
    assert!(idle.is_alive());
    assert!(!idle.is_alive_now());
}

#[tokio::test]
async fn a_connection_is_reusable_only_after_a_complete_response() {
    let is_reused_after = async |answer: &[u8]| {
        let (idle, mut far) = connected().await;
        far.write_all(answer).await.unwrap();
        let mut upstream = post(idle);
        let mut spare = HeaderMap::new();
        let head = poll_fn(|cx| upstream.poll_head(cx, &mut spare)).await;
        assert!(head.is_ok());
        assert!(upstream.has_response());
        upstream.into_idle().map(|idle| idle.is_reused())
    };
    let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    assert_eq!(is_reused_after(whole).await, Some(true));
    let part = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na";
    assert_eq!(is_reused_after(part).await, None);
}
