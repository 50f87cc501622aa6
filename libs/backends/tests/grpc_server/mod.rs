//! A tiny gRPC server for tests: `grpc.health.v1.Health/Check` for one service, over HTTP/2.

use std::convert::Infallible;
use std::env;
use std::net::{Ipv4Addr, TcpListener};

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};

/// Serves the health of the service in `TINY_GRPC_SERVICE`, as gRPC servers do; returns at once if there is
/// none.
pub fn serve() {
    let Ok(service) = env::var("TINY_GRPC_SERVICE") else {
        return;
    };
    let port = env::args().next_back().unwrap().parse().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    listener.set_nonblocking(true).unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service.clone();
            let answer = service_fn(move |request: Request<Incoming>| {
                let service = service.clone();
                async move { Ok::<_, Infallible>(grpc_health(request, &service).await) }
            });
            let server = http2::Builder::new(TokioExecutor::new());
            let connection = server.serve_connection(TokioIo::new(stream), answer);
            tokio::spawn(async move {
                let _ = connection.await;
            });
        }
    });
}

/// The request is a message with one field, the name; the answer's one field is 1 for serving.
async fn grpc_health(request: Request<Incoming>, service: &str) -> Response<GrpcBody> {
    let is_check = request.uri().path() == "/grpc.health.v1.Health/Check"
        && request.headers()["content-type"] == "application/grpc";
    let message = request.into_body().collect().await.unwrap().to_bytes();
    let (status, answer) = match message.get(7..) {
        _ if !is_check => ("12", &[][..]),
        Some(name) if name == service.as_bytes() => ("0", &[0, 0, 0, 0, 2, 0x08, 1][..]),
        _ => ("5", &[][..]),
    };
    let mut trailers = hyper::HeaderMap::new();
    trailers.insert("grpc-status", status.parse().unwrap());
    let body = Full::new(Bytes::from_static(answer));
    let body = body.with_trailers(std::future::ready(Some(Ok(trailers))));
    Response::builder()
        .header("content-type", "application/grpc")
        .body(BodyExt::boxed(body))
        .unwrap()
}

type GrpcBody = BoxBody<Bytes, Infallible>;
