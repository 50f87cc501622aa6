//! The admin listener of a process without control: health, readiness and metrics, for those who run
//! it, on an address of its own.
//!
//! From this machine they need no token. From elsewhere metrics need the internal token, and
//! readiness says no more than yes or no without it.

use std::net::SocketAddr;
use std::time::Duration;

use actuator::logs::InternalToken;
use anyhow::Context;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use runtime::health::Health;
use runtime::metrics::Metrics;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Requests that are answered to the end after a shutdown has begun.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct Shown {
    health: Health,
    metrics: Metrics,
    token: Option<InternalToken>,
}

impl Shown {
    fn trusts(&self, peer: SocketAddr, headers: &HeaderMap) -> bool {
        peer.ip().is_loopback()
            || self
                .token
                .as_ref()
                .is_some_and(|token| token.is_in(headers))
    }
}

/// Bound, and ready to serve.
pub struct Admin {
    pub address: SocketAddr,
    listener: TcpListener,
    router: Router,
}

impl Admin {
    /// `more` is served beside what every process shows.
    pub async fn bind(
        address: SocketAddr,
        health: Health,
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
            .with_state(Shown {
                health,
                metrics,
                token,
            })
            .merge(more);
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            router,
        })
    }

    pub async fn serve(self, shutdown: CancellationToken) -> std::io::Result<()> {
        let service = self
            .router
            .into_make_service_with_connect_info::<SocketAddr>();
        let stop = shutdown.clone();
        let server = axum::serve(self.listener, service)
            .with_graceful_shutdown(async move { stop.cancelled().await });
        tokio::select! {
            served = server => served,
            // A log that somebody follows has no end.
            () = async { shutdown.cancelled().await; sleep(GRACE).await } => Ok(()),
        }
    }
}

async fn healthz() -> Response {
    Json(json!({"status": "ok", "missing": []})).into_response()
}

async fn readyz(
    State(shown): State<Shown>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    let mut missing = shown.health.missing();
    let (status, word) = match missing.is_empty() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "waiting"),
    };
    if !shown.trusts(peer, &headers) {
        missing.clear();
    }
    (status, Json(json!({"status": word, "missing": missing}))).into_response()
}

async fn metrics_text(
    State(shown): State<Shown>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    if !shown.trusts(peer, &headers) {
        let problem = json!({
            "type": "about:blank", "status": 401, "code": "unauthorized",
            "title": "Unauthorized",
            "detail": "metrics need the internal token from here; send it as `Authorization: Bearer TOKEN`",
        });
        let kind = [(header::CONTENT_TYPE, "application/problem+json")];
        return (StatusCode::UNAUTHORIZED, kind, problem.to_string()).into_response();
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], shown.metrics.encode()).into_response()
}
