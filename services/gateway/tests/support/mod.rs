//! A gateway on a free port, instances that do what a test asks of them, and clients.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "only tests use this")]

mod raw;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bus::{Bus, LocalBus};
use bytes::Bytes;
use contract::frame::{AtOrBelow, DeploymentFrame, Frame, Outcomes, StatusClasses};
use contract::resources::{
    AuthMode, Authorization, ErrorMapping, ModelClientErrors, Protocol, RequestSettings, Routes,
};
use contract::route::{DeploymentRoute, InstanceRoute, Route, RouteUpdate};
use contract::time::Span;
use contract::{EndpointKey, Position, Uid};
use futures::StreamExt;
use gateway::{Config, Deps, Gateway};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use runtime::clock::SystemClock;
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use sha2::{Digest, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

#[allow(unused_imports, reason = "each test file uses its part")]
pub use raw::*;

pub type AnyBody = BoxBody<Bytes, Infallible>;
/// Longer than anything takes; a test that reaches it has failed.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(20);

pub fn full_body(body: impl Into<Bytes>) -> AnyBody {
    Full::new(body.into()).boxed()
}

/// A body that is sent piece by piece.
pub fn channel_body() -> (
    futures::channel::mpsc::UnboundedSender<&'static str>,
    AnyBody,
) {
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    let frames = receiver.map(|text: &str| Ok(http_body::Frame::data(Bytes::from(text))));
    (sender, BodyExt::boxed(StreamBody::new(frames)))
}

pub async fn within_timeout<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(TEST_TIMEOUT, future).await {
        Ok(output) => output,
        Err(_) => panic!("timed out waiting for {what}"),
    }
}

// --- routes ---

#[derive(Clone)]
pub struct Settings {
    pub endpoint: &'static str,
    pub keys: Vec<&'static str>,
    pub body_max: u64,
    pub model_client_errors: ModelClientErrors,
    pub request: RequestSettings,
    pub authorization: Authorization,
    pub thresholds_us: Vec<u64>,
    pub routes: Option<Routes>,
    pub error_mapping: ErrorMapping,
    pub protocol: Protocol,
}

impl Settings {
    /// An instance takes one request; others are queued.
    pub fn one_at_a_time() -> Self {
        let mut settings = Self::default();
        settings.request.max_concurrent_requests_per_instance = 1;
        settings
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            endpoint: "iris",
            keys: Vec::new(),
            body_max: 1 << 20,
            model_client_errors: ModelClientErrors::Good,
            request: RequestSettings {
                timeout: Span::from_secs(10),
                max_concurrent_requests_per_instance: 100,
                max_queue_wait: Span::from_secs(5),
                ..RequestSettings::default()
            },
            authorization: Authorization::default(),
            thresholds_us: Vec::new(),
            routes: None,
            error_mapping: ErrorMapping::Azure,
            protocol: Protocol::Http,
        }
    }
}

#[derive(Clone)]
pub struct InstanceEntry {
    pub id: String,
    pub address: String,
    pub draining: bool,
    pub slots: BTreeMap<String, u32>,
}

pub fn entry_at(address: impl ToString) -> InstanceEntry {
    let address = address.to_string();
    InstanceEntry {
        id: format!("at-{address}"),
        address,
        draining: false,
        slots: BTreeMap::new(),
    }
}

impl InstanceEntry {
    pub fn draining(mut self) -> Self {
        self.draining = true;
        self
    }

    pub fn slots(mut self, gateway: &str, slots: u32) -> Self {
        self.slots.insert(gateway.into(), slots);
        self
    }
}

pub fn key_hash(key: &str) -> String {
    hex::encode(Sha256::digest(key))
}

/// `deployments`: name, percent, instances.
pub fn route(
    revision: u64,
    settings: &Settings,
    deployments: &[(&str, u8, &[InstanceEntry])],
) -> RouteUpdate {
    let deployment = |percent: u8, name: &str, entries: &[InstanceEntry]| DeploymentRoute {
        uid: Uid(Uuid::from_u128(
            name.bytes()
                .fold(1, |uid, byte| uid * 256 + u128::from(byte)),
        )),
        percent,
        request_settings: settings.request.clone(),
        routes: settings.routes.clone(),
        error_mapping: settings.error_mapping,
        protocol: settings.protocol,
        authorization: settings.authorization,
        latency_thresholds_us: settings.thresholds_us.clone(),
        instances: entries
            .iter()
            .map(|entry| InstanceRoute {
                id: entry.id.clone().into(),
                address: entry.address.clone(),
                draining: entry.draining,
                slots: entry.slots.clone(),
            })
            .collect(),
    };
    RouteUpdate {
        endpoint: EndpointKey::new(&settings.endpoint.parse().unwrap()),
        revision: Position(revision),
        members: Position::START,
        route: Some(Route {
            endpoint_uid: Uid(Uuid::nil()),
            auth: if settings.keys.is_empty() {
                AuthMode::None
            } else {
                AuthMode::Key
            },
            key_hashes: settings.keys.iter().map(|key| key_hash(key)).collect(),
            model_client_errors: settings.model_client_errors,
            request_bytes_max: settings.body_max,
            deployments: deployments
                .iter()
                .map(|(name, percent, entries)| {
                    let route = deployment(*percent, name, entries);
                    (name.parse().unwrap(), Box::new(route))
                })
                .collect(),
        }),
    }
}

/// The same route with slots allocated at a position of the members.
pub fn with_allocation(members: u64, update: RouteUpdate) -> RouteUpdate {
    RouteUpdate {
        members: Position(members),
        ..update
    }
}

/// One deployment, `blue`, with all the traffic.
pub fn blue_route(revision: u64, settings: &Settings, entries: &[InstanceEntry]) -> RouteUpdate {
    route(revision, settings, &[("blue", 100, entries)])
}

// --- the gateway ---

pub struct TestGateway {
    pub address: SocketAddr,
    pub bus: Arc<LocalBus>,
    pub frames: mpsc::Receiver<Arc<Frame>>,
    pub metrics: Metrics,
    pub health: HealthRegistry,
    shutdown: CancellationToken,
    task: Option<JoinHandle<Result<(), gateway::Error>>>,
}

pub fn config() -> Config {
    Config {
        threads: 2,
        grace: Duration::from_secs(5),
        ..Config::new("gw-1", ([127, 0, 0, 1], 0).into())
    }
}

pub async fn start(updates: &[RouteUpdate]) -> TestGateway {
    start_with(config(), updates).await
}

/// Starts a gateway with the default deployment on these instances.
pub async fn start_serving(entries: &[InstanceEntry]) -> TestGateway {
    start(&[blue_route(1, &Settings::default(), entries)]).await
}

/// The same with one thread, so that all requests share one connection pool.
pub async fn start_single_threaded(entries: &[InstanceEntry]) -> TestGateway {
    let config = Config {
        threads: 1,
        ..config()
    };
    start_with(config, &[blue_route(1, &Settings::default(), entries)]).await
}

pub async fn start_with(config: Config, updates: &[RouteUpdate]) -> TestGateway {
    let bus = LocalBus::new();
    let frames = bus.subscribe_frames();
    let (metrics, health) = (Metrics::default(), HealthRegistry::default());
    for update in updates {
        bus.publish_route(Arc::new(update.clone()));
    }
    bus.mark_routes_complete();
    let deps = Deps {
        bus: bus.clone(),
        clock: Arc::new(SystemClock),
        metrics: metrics.clone(),
        health: health.clone(),
    };
    let gateway = Gateway::bind(config, deps).unwrap();
    let address = gateway.address;
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(gateway.serve(shutdown.clone()));
    let running = TestGateway {
        address,
        bus,
        frames,
        metrics,
        health,
        shutdown,
        task: Some(task),
    };
    for update in updates {
        running.wait_until_served(&update.endpoint).await;
    }
    running
}

impl TestGateway {
    /// Waits until the endpoint is served. The probing requests are refused before they count.
    pub async fn wait_until_served(&self, endpoint: &EndpointKey) {
        let uri = format!("/endpoints/{}/score", endpoint.endpoint());
        within_timeout("the endpoint", async {
            loop {
                let probe = request(&uri).header("penstock-deployment", "none");
                let response = send(self.address, probe.body(full_body("")).unwrap()).await;
                if response.code() != "unknown-endpoint" {
                    return;
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Publishes a route and waits for the frame that reports it.
    pub async fn apply(&mut self, update: RouteUpdate) -> Arc<Frame> {
        let (endpoint, revision) = (update.endpoint.clone(), update.revision);
        self.bus.publish_route(Arc::new(update));
        self.frame(|frame| {
            frame
                .routes
                .get(&endpoint)
                .is_some_and(|reached| *reached >= revision)
        })
        .await
    }

    pub async fn frame(&mut self, predicate: impl Fn(&Frame) -> bool) -> Arc<Frame> {
        within_timeout("a frame", async {
            loop {
                let frame = self.frames.recv().await.expect("the bus is open");
                if predicate(&frame) {
                    return frame;
                }
            }
        })
        .await
    }

    /// Sums the frames until this many requests have ended.
    pub async fn totals(&mut self, ended: u64) -> FrameTotals {
        let mut total = FrameTotals::default();
        while total.outcomes.total() < ended {
            let frame = self.frame(|frame| !frame.deployments.is_empty()).await;
            total.add(&frame);
        }
        total
    }

    pub async fn post(&self, body: impl Into<Bytes>) -> TestResponse {
        let request = request("/endpoints/iris/score").body(full_body(body));
        send(self.address, request.unwrap()).await
    }

    /// Stops the gateway and returns all frames not yet received.
    pub async fn stop(mut self) -> Vec<Arc<Frame>> {
        self.shutdown.cancel();
        let task = self.task.take().unwrap();
        within_timeout("the end", task).await.unwrap().unwrap();
        std::iter::from_fn(|| self.frames.try_recv().ok()).collect()
    }

    pub fn start_shutdown(&self) {
        self.shutdown.cancel();
    }
}

impl Drop for TestGateway {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Sums over the frames of one deployment (or of all).
#[derive(Debug, Default)]
pub struct FrameTotals {
    pub outcomes: Outcomes,
    pub arrivals: u64,
    pub in_flight_us: u64,
    pub queued_us: u64,
    pub in_flight_max: u32,
    pub queued_max: u32,
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub status_classes: StatusClasses,
    pub oldest_in_flight_us: u64,
    pub at_or_below: AtOrBelow,
    pub latency_count: u64,
    pub by_deployment: BTreeMap<String, u64>,
    pub instance_requests: BTreeMap<String, u64>,
    pub instance_busy_us: BTreeMap<String, u64>,
    pub instance_in_flight_us: BTreeMap<String, u64>,
}

impl FrameTotals {
    pub fn add(&mut self, frame: &Frame) {
        frame
            .deployments
            .iter()
            .for_each(|part| self.add_part(part));
    }

    fn add_part(&mut self, part: &DeploymentFrame) {
        self.outcomes.add(&part.outcomes);
        self.arrivals += part.arrivals;
        self.in_flight_us += part.in_flight_us;
        self.queued_us += part.queued_us;
        self.in_flight_max = self.in_flight_max.max(part.in_flight_max);
        self.queued_max = self.queued_max.max(part.queued_max);
        self.request_bytes += part.request_bytes;
        self.response_bytes += part.response_bytes;
        self.status_classes.add(&part.status_classes);
        self.oldest_in_flight_us = self.oldest_in_flight_us.max(part.oldest_in_flight_us);
        for (measure, counts) in &part.at_or_below {
            let sum = self.at_or_below.entry(measure.clone()).or_default();
            for (threshold, count) in counts {
                *sum.entry(*threshold).or_default() += count;
            }
        }
        self.latency_count += part.latency.count();
        *self
            .by_deployment
            .entry(part.deployment.to_string())
            .or_default() += part.arrivals;
        for instance in &part.instances {
            *self
                .instance_requests
                .entry(instance.id.to_string())
                .or_default() += instance.requests;
            *self
                .instance_busy_us
                .entry(instance.id.to_string())
                .or_default() += instance.busy_us;
            *self
                .instance_in_flight_us
                .entry(instance.id.to_string())
                .or_default() += instance.in_flight_us.values().sum::<u64>();
        }
    }
}

// --- clients ---

pub fn request(uri: &str) -> http::request::Builder {
    Request::builder()
        .method(Method::POST)
        .uri(uri)
        .header("host", "gateway")
}

#[derive(Debug)]
pub struct TestResponse {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl TestResponse {
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// Our error code, checked to be the same in header and body, if the body is more than text.
    pub fn code(&self) -> &str {
        let code = self.header("penstock-error-code");
        if !code.is_empty() {
            let body: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
            if let Some(error) = body.get("error") {
                assert!(error.is_string() || error["code"] == code, "{body}");
            } else {
                assert_eq!(body["code"], code);
                assert_eq!(body["status"], self.status.as_u16());
            }
        }
        code
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// A client connection; dropping it closes it.
pub struct TestClient {
    pub sender: hyper::client::conn::http1::SendRequest<AnyBody>,
    task: JoinHandle<()>,
}

impl Drop for TestClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TestClient {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let io = TokioIo::new(stream);
        let (sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        let task = tokio::spawn(async move {
            let _ = connection.await;
        });
        Self { sender, task }
    }

    pub async fn send(&mut self, request: Request<AnyBody>) -> TestResponse {
        within_timeout("a response", async {
            self.sender.ready().await.unwrap();
            let response = self.sender.send_request(request).await.unwrap();
            let (parts, body) = response.into_parts();
            TestResponse {
                status: parts.status,
                headers: parts.headers,
                body: body.collect().await.unwrap().to_bytes(),
            }
        })
        .await
    }
}

pub async fn send(address: SocketAddr, request: Request<AnyBody>) -> TestResponse {
    TestClient::connect(address).await.send(request).await
}

// --- instances ---

type ResponseFuture = Pin<Box<dyn Future<Output = Response<AnyBody>> + Send>>;

/// An instance that serves HTTP.
pub struct TestInstance {
    pub address: SocketAddr,
    pub connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for TestInstance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TestInstance {
    pub async fn start<F, A>(handler: F) -> Self
    where
        F: Fn(Request<Incoming>) -> A + Send + Sync + 'static,
        A: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let handler: Arc<dyn Fn(Request<Incoming>) -> ResponseFuture + Send + Sync> =
            Arc::new(move |request| Box::pin(handler(request)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                let handler = handler.clone();
                let service = service_fn(move |request| {
                    let response = handler(request);
                    async move { Ok::<_, Infallible>(response.await) }
                });
                open.spawn(async move {
                    let server = hyper::server::conn::http1::Builder::new();
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self {
            address,
            connections,
            task,
        }
    }

    /// Echoes the body of every request.
    pub async fn echo() -> Self {
        Self::start(|request| async {
            let body = request.into_body().collect().await;
            Response::new(full_body(body.map(|b| b.to_bytes()).unwrap_or_default()))
        })
        .await
    }

    /// Responds to every request with this text.
    pub async fn responding_with(text: &'static str) -> Self {
        Self::start(move |request| async move {
            let _ = request.into_body().collect().await;
            Response::new(full_body(text))
        })
        .await
    }

    pub fn entry(&self) -> InstanceEntry {
        entry_at(self.address)
    }
}

pub fn temp_dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub fn saved_routes(data: &Path) -> Option<String> {
    std::fs::read_to_string(data.join("gateway-routes.json")).ok()
}
