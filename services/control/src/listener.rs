//! Connections of the API, and of the admin listeners of other processes: their number, their timeouts and their shutdown.
//!
//! Invariant: no client, however slow or silent, holds a connection forever, and no more connections are
//! open than the limits allow. Further ones wait, unaccepted, in the kernel's backlog.

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
use runtime::descriptors::{Descriptors, is_shortage};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

use crate::config::Limits;

/// Maximum size of a request head and number of its headers; beyond that the response is 431.
const HEAD_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 100;
/// How long requests in flight may take after a shutdown has begun.
const GRACE: Duration = Duration::from_secs(5);
/// How long to wait after a failed accept, for example for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Idle time before TCP keep-alive probes, which detect clients that vanished.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// Serves connections until `stop`; requests in flight get [`GRACE`] to finish.
pub async fn serve_connections(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    descriptors: Descriptors,
    stop: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let service = TowerToHyperService::new(router);
    // Dropping the set aborts the connections that remain.
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            // Permit first: a connection that is not accepted costs no descriptor and no memory.
            let permit = permits.clone().acquire_owned().await.ok()?;
            Some((permit, accept_next(&listener, &descriptors).await))
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
        socket.set_write_timeout(Some(limits.write_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_header_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .serve_connection(TokioIo::new(Box::pin(socket)), service);
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "connection closed early");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(GRACE, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!("aborting requests that are still in flight");
    }
}

/// Accepts the next connection, and retries if that fails: no such failure ends the server.
async fn accept_next(listener: &TcpListener, descriptors: &Descriptors) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                let _ = socket.set_nodelay(true);
                let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE);
                let _ = SockRef::from(&socket).set_tcp_keepalive(&keepalive);
                return (socket, peer);
            }
            // The client closed it before it was accepted.
            Err(error) if is_connection_error(&error) => {}
            Err(error) if is_shortage(&error) => {
                descriptors.record_shortage("a connection to control", &error);
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            Err(error) => {
                tracing::error!(%error, "cannot accept connections, retrying");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    [ConnectionAborted, ConnectionRefused, ConnectionReset].contains(&error.kind())
}
