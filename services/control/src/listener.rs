//! Connections of the API, and of the admin listeners of other processes: how many there are, how long a client may take, and how they end.
//!
//! Invariant: nothing that a client does or leaves undone holds a connection for ever, and no more of
//! them are open than the limits say. Those beyond wait in the kernel's queue, unaccepted.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use runtime::descriptors::{Descriptors, is_lack};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

use crate::config::Limits;

/// Longest head of a request, and most headers in it; longer ones are answered 431.
const HEAD_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 100;
/// Requests that are answered to the end after a shutdown has begun.
const GRACE: Duration = Duration::from_secs(5);
/// After an accept that failed for want of something, such as file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// A client that is gone without a word is noticed by probes of its kernel.
const PROBE_AFTER: Duration = Duration::from_secs(60);

/// Serves connections until `stop`, and what they are in the middle of for a while longer.
pub async fn accept(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    descriptors: Descriptors,
    stop: CancellationToken,
) {
    let room = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let service = TowerToHyperService::new(router);
    // Connections that are left at the end are dropped with it.
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            // Room first: a connection that is not accepted costs no descriptor and no memory.
            let permit = room.clone().acquire_owned().await.ok()?;
            Some((permit, next(&listener, &descriptors).await))
        };
        let (permit, (socket, peer)) = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            Some(accepted) = accepted => accepted,
        };
        let service = service.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            service.call(request)
        });
        let mut socket = TimeoutStream::new(socket);
        socket.set_write_timeout(Some(limits.stall));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_header_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .serve_connection(TokioIo::new(Box::pin(socket)), service);
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "a connection ends early");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(GRACE, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!("requests were still being answered, and are broken off");
    }
}

/// The next connection. No failure to accept one ends the server.
async fn next(listener: &TcpListener, descriptors: &Descriptors) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                let _ = socket.set_nodelay(true);
                let probes = TcpKeepalive::new().with_time(PROBE_AFTER);
                let _ = SockRef::from(&socket).set_tcp_keepalive(&probes);
                return (socket, peer);
            }
            // It was gone before it was taken.
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) if is_lack(&error) => {
                descriptors.lack("a connection to control", &error);
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            Err(error) => {
                tracing::error!(%error, "connections cannot be accepted; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    [ConnectionAborted, ConnectionRefused, ConnectionReset].contains(&error.kind())
}
