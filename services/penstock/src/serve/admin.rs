//! The admin listener of a process without control: health, readiness and metrics for its operators, on
//! an address of its own.
//!
//! Loopback clients need no token. For others, metrics require the internal token, and without it
//! readiness answers only yes or no.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use control::Limits;
use runtime::descriptors::Descriptors;
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use runtime::token::InternalToken;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::descriptor_budget::DescriptorBudget;

/// Limits of the admin listener, in a process that has other work: enough for a few monitors and for
/// the logs that control follows.
const LIMITS: Limits = Limits {
    connections: 256,
    streams: 128,
    head: Duration::from_secs(10),
    body: Duration::from_secs(10),
    write_timeout: Duration::from_secs(30),
};

#[derive(Clone)]
struct AdminState {
    health: HealthRegistry,
    metrics: Metrics,
    token: Option<InternalToken>,
}

impl AdminState {
    fn is_trusted(&self, peer: SocketAddr, headers: &HeaderMap) -> bool {
        peer.ip().is_loopback()
            || self
                .token
                .as_ref()
                .is_some_and(|token| token.is_in(headers))
    }
}

impl AdminState {
    /// The response body, as control's: names of endpoints and servers are for trusted clients only.
    fn body(&self, status: &str, missing: Vec<String>, trusted: bool) -> Value {
        let (missing, warnings) = match trusted {
            true => (missing, self.health.warnings()),
            false => (Vec::new(), Vec::new()),
        };
        let mut body = json!({"status": status, "missing": missing});
        if !warnings.is_empty() {
            body["remarks"] = json!(warnings);
        }
        body
    }
}

/// The admin listener, bound and ready to serve.
pub struct Admin {
    pub address: SocketAddr,
    listener: TcpListener,
    router: Router,
    limits: Limits,
    descriptors: Descriptors,
}

impl Admin {
    /// Binds the listener; the routes of `more` are served next to the common ones.
    pub async fn bind(
        address: SocketAddr,
        health: HealthRegistry,
        metrics: Metrics,
        token: Option<InternalToken>,
        more: Router,
    ) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!(
                "the admin listener cannot listen on {address}; choose another with --admin-addr"
            )
        })?;
        let router = Router::new()
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics_text))
            .with_state(AdminState {
                health,
                metrics,
                token,
            })
            .merge(more);
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            router,
            limits: LIMITS,
            descriptors: Descriptors::default(),
        })
    }

    pub fn with_budget(self, budget: &DescriptorBudget) -> Self {
        Self {
            limits: budget.limits(self.limits),
            descriptors: budget.descriptors.clone(),
            ..self
        }
    }

    pub async fn serve(self, shutdown: CancellationToken) {
        let (limits, descriptors) = (self.limits, self.descriptors);
        control::serve_connections(self.listener, self.router, limits, descriptors, shutdown).await;
    }
}

async fn healthz(
    State(state): State<AdminState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    let trusted = state.is_trusted(peer, &headers);
    Json(state.body("ok", Vec::new(), trusted)).into_response()
}

async fn readyz(
    State(state): State<AdminState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    let missing = state.health.missing();
    let (status, status_text) = match missing.is_empty() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "waiting"),
    };
    let trusted = state.is_trusted(peer, &headers);
    (status, Json(state.body(status_text, missing, trusted))).into_response()
}

async fn metrics_text(
    State(state): State<AdminState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    if !state.is_trusted(peer, &headers) {
        let problem = json!({
            "type": "about:blank", "status": 401, "code": "unauthorized",
            "title": "Unauthorized",
            "detail": "metrics need the internal token from here; send it as `Authorization: Bearer TOKEN`",
        });
        let kind = [(header::CONTENT_TYPE, "application/problem+json")];
        return (StatusCode::UNAUTHORIZED, kind, problem.to_string()).into_response();
    }
    let (kind, text) = state.metrics.encode_for(&headers);
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// An admin listener with this connection limit and this timeout for request heads.
    async fn admin(
        connections: usize,
        head: Duration,
    ) -> (SocketAddr, HealthRegistry, CancellationToken) {
        let health = HealthRegistry::default();
        let address = "127.0.0.1:0".parse().unwrap();
        let metrics = Metrics::default();
        let admin = Admin::bind(address, health.clone(), metrics, None, Router::new());
        let mut admin = admin.await.unwrap();
        admin.limits = Limits {
            connections,
            head,
            ..LIMITS
        };
        let (address, stop) = (admin.address, CancellationToken::new());
        tokio::spawn(admin.serve(stop.clone()));
        (address, health, stop)
    }

    async fn read_response(stream: &mut TcpStream) -> String {
        let mut text = String::new();
        let reading = stream.read_to_string(&mut text);
        tokio::time::timeout(PATIENCE, reading)
            .await
            .unwrap()
            .unwrap();
        text
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        read_response(&mut stream).await
    }

    #[tokio::test]
    async fn a_client_that_does_not_finish_its_head_loses_its_connection_to_one_that_waits() {
        let (address, _, stop) = admin(1, Duration::from_millis(200)).await;
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET /readyz HTTP/1.1\r\nhost:")
            .await
            .unwrap();
        // The slow client holds the only connection until its timeout.
        let response = get(address, "/readyz").await;
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        let closed = read_response(&mut slow).await;
        assert!(!closed.contains(" 200 "), "{closed}");
        stop.cancel();
    }

    #[tokio::test]
    async fn readiness_says_what_is_missing_and_warns_of_the_rest() {
        let (address, health, stop) = admin(8, PATIENCE).await;
        let gateway = health.component("gateway");
        gateway.waiting("no routes yet");
        gateway.set_warning(Some("1 endpoint is parked".to_owned()));
        let response = get(address, "/readyz").await;
        assert!(response.starts_with("HTTP/1.1 503"), "{response}");
        assert!(response.contains("gateway: no routes yet"), "{response}");
        assert!(
            response.contains("gateway: 1 endpoint is parked"),
            "{response}"
        );
        stop.cancel();
    }
}
