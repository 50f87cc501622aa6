//! gRPC's health checking protocol: one call of `grpc.health.v1.Health/Check` without TLS.
//!
//! A message of one field and an answer of one field do not need a gRPC library with its code generator, so
//! both are encoded here; HTTP/2 is hyper's.

use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http2;
use hyper::{HeaderMap, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

const METHOD: &str = "/grpc.health.v1.Health/Check";
/// An answer has seven bytes.
const ANSWER_BYTES_MAX: usize = 1024;
/// Precedes each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Succeeds if the service, or the server as a whole if its name is empty, is serving.
pub(super) async fn check(
    stream: TcpStream,
    address: SocketAddr,
    service: &str,
) -> Result<(), String> {
    let no_answer = |error: hyper::Error| format!("it gave no answer over HTTP/2: {error}");
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(no_answer)?;
    let request = Request::post(format!("http://{address}{METHOD}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "penstock-probe")
        .body(Full::new(request(service)))
        .map_err(|error| format!("the request cannot be built: {error}"))?;
    let answer = async move {
        let response = sender.send_request(request).await.map_err(no_answer)?;
        let (head, body) = response.into_parts();
        if head.status != hyper::StatusCode::OK {
            return Err(format!("it answered {}", head.status.as_u16()));
        }
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| format!("its answer was not read: {error}"))?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        // An answer without a message has its status in the head.
        let status = grpc_status(&trailers).or_else(|| grpc_status(&head.headers));
        interpret(status, &body.to_bytes(), service)
    };
    tokio::select! {
        biased;
        answer = answer => answer,
        ended = connection => Err(match ended {
            Ok(()) => "it closed the connection".into(),
            Err(error) => no_answer(error),
        }),
    }
}

/// `HealthCheckRequest { string service = 1; }`; an empty string is left out.
fn request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    // Documents limit the name to what one byte of length can express.
    if let Ok(length @ 1..=127) = u8::try_from(service.len()) {
        message.extend_from_slice(&[0x0a, length]);
        message.extend_from_slice(service.as_bytes());
    }
    let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    bytes.extend_from_slice(&[0, 0, 0, 0, message.len() as u8]);
    bytes.extend_from_slice(&message);
    bytes.freeze()
}

fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// The answer is `HealthCheckResponse { ServingStatus status = 1; }`; 0 is left out.
fn interpret(grpc_status: Option<u32>, body: &[u8], service: &str) -> Result<(), String> {
    match grpc_status {
        Some(0) => {}
        Some(5) => return Err(format!("it knows no service `{service}`")),
        Some(12) => {
            return Err(
                "it does not implement grpc.health.v1.Health; register that service, or use `protocol: tcp`"
                    .into(),
            );
        }
        Some(status) => return Err(format!("it answered with gRPC status {status}")),
        None => return Err("its answer is not gRPC".into()),
    }
    match body.get(PREFIX_BYTES..) {
        Some([0x08, 1, ..]) => Ok(()),
        Some([0x08, 2, ..]) => Err("it is not serving".into()),
        Some([0x08, 3, ..]) => Err(format!("it knows no service `{service}`")),
        Some(_) => Err("its health is unknown".into()),
        None => Err("its answer has no message".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_the_service_or_none() {
        assert_eq!(request("").as_ref(), [0, 0, 0, 0, 0]);
        let named = [&[0, 0, 0, 0, 6, 0x0a, 4][..], b"iris"].concat();
        assert_eq!(request("iris").as_ref(), named);
    }

    #[test]
    fn only_serving_is_healthy() {
        let message = |status: u8| [0, 0, 0, 0, 2, 0x08, status];
        assert_eq!(interpret(Some(0), &message(1), ""), Ok(()));
        for (status, body, text) in [
            (Some(0), &message(2)[..], "not serving"),
            (Some(0), &message(3), "knows no service `iris`"),
            (Some(0), &[0, 0, 0, 0, 0], "unknown"),
            (Some(0), &[], "no message"),
            (Some(5), &[], "knows no service `iris`"),
            (Some(12), &[], "does not implement"),
            (Some(14), &[], "gRPC status 14"),
            (None, &message(1), "not gRPC"),
        ] {
            let reason = interpret(status, body, "iris").unwrap_err();
            assert!(reason.contains(text), "{reason}");
        }
    }
}
