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
use contract::resources::{AuthMode, ModelClientErrors, RequestSettings};
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
use runtime::health::Health;
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
/// Long enough for anything that will happen; a test that waits for it has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn whole(body: impl Into<Bytes>) -> AnyBody {
    Full::new(body.into()).boxed()
}

/// A body that is sent piece by piece.
pub fn channel() -> (
    futures::channel::mpsc::UnboundedSender<&'static str>,
    AnyBody,
) {
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    let frames = receiver.map(|text: &str| Ok(http_body::Frame::data(Bytes::from(text))));
    (sender, BodyExt::boxed(StreamBody::new(frames)))
}

pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("nothing came: {what}"),
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
    pub thresholds_us: Vec<u64>,
}

impl Settings {
    /// An instance takes one request, and the next one waits.
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
            thresholds_us: Vec::new(),
        }
    }
}

#[derive(Clone)]
pub struct Place {
    pub id: String,
    pub address: String,
    pub draining: bool,
    pub slots: BTreeMap<String, u32>,
}

pub fn at(address: impl ToString) -> Place {
    let address = address.to_string();
    Place {
        id: format!("at-{address}"),
        address,
        draining: false,
        slots: BTreeMap::new(),
    }
}

impl Place {
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
    deployments: &[(&str, u8, &[Place])],
) -> RouteUpdate {
    let deployment = |percent: u8, name: &str, places: &[Place]| DeploymentRoute {
        uid: Uid(Uuid::from_u128(
            name.bytes()
                .fold(1, |uid, byte| uid * 256 + u128::from(byte)),
        )),
        percent,
        request_settings: settings.request.clone(),
        latency_thresholds_us: settings.thresholds_us.clone(),
        instances: places
            .iter()
            .map(|place| InstanceRoute {
                id: place.id.clone().into(),
                address: place.address.clone(),
                draining: place.draining,
                slots: place.slots.clone(),
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
                .map(|(name, percent, places)| {
                    (name.parse().unwrap(), deployment(*percent, name, places))
                })
                .collect(),
        }),
    }
}

/// The same route with slots that were dealt as of a position of the members.
pub fn dealt(members: u64, update: RouteUpdate) -> RouteUpdate {
    RouteUpdate {
        members: Position(members),
        ..update
    }
}

/// One deployment, `blue`, with all the traffic.
pub fn blue(revision: u64, settings: &Settings, places: &[Place]) -> RouteUpdate {
    route(revision, settings, &[("blue", 100, places)])
}

// --- the gateway ---

pub struct Running {
    pub address: SocketAddr,
    pub bus: Arc<LocalBus>,
    pub frames: mpsc::Receiver<Arc<Frame>>,
    pub metrics: Metrics,
    pub health: Health,
    shutdown: CancellationToken,
    served: Option<JoinHandle<Result<(), gateway::Error>>>,
}

pub fn config() -> Config {
    Config {
        threads: 2,
        grace: Duration::from_secs(5),
        ..Config::new("gw-1", ([127, 0, 0, 1], 0).into())
    }
}

pub async fn start(updates: &[RouteUpdate]) -> Running {
    start_with(config(), updates).await
}

/// A gateway with the usual deployment on these instances.
pub async fn serving(places: &[Place]) -> Running {
    start(&[blue(1, &Settings::default(), places)]).await
}

/// The same, where all requests share one pool of connections.
pub async fn serving_on_one_thread(places: &[Place]) -> Running {
    let config = Config {
        threads: 1,
        ..config()
    };
    start_with(config, &[blue(1, &Settings::default(), places)]).await
}

pub async fn start_with(config: Config, updates: &[RouteUpdate]) -> Running {
    let bus = LocalBus::new();
    let frames = bus.subscribe_frames();
    let (metrics, health) = (Metrics::default(), Health::default());
    for update in updates {
        bus.publish_route(Arc::new(update.clone()));
    }
    let deps = Deps {
        bus: bus.clone(),
        clock: Arc::new(SystemClock),
        metrics: metrics.clone(),
        health: health.clone(),
    };
    let gateway = Gateway::bind(config, deps).unwrap();
    let address = gateway.address;
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(gateway.serve(shutdown.clone()));
    let running = Running {
        address,
        bus,
        frames,
        metrics,
        health,
        shutdown,
        served: Some(served),
    };
    for update in updates {
        running.until_known(&update.endpoint).await;
    }
    running
}

impl Running {
    /// Waits until the endpoint is served. The requests that ask are refused before they count.
    pub async fn until_known(&self, endpoint: &EndpointKey) {
        let uri = format!("/endpoints/{}/score", endpoint.endpoint());
        soon("the endpoint", async {
            loop {
                let probe = request(&uri).header("penstock-deployment", "none");
                let answer = send(self.address, probe.body(whole("")).unwrap()).await;
                if answer.code() != "unknown-endpoint" {
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

    pub async fn frame(&mut self, wanted: impl Fn(&Frame) -> bool) -> Arc<Frame> {
        soon("a frame", async {
            loop {
                let frame = self.frames.recv().await.expect("the bus is open");
                if wanted(&frame) {
                    return frame;
                }
            }
        })
        .await
    }

    /// Adds up the frames until as many requests have ended.
    pub async fn total(&mut self, ended: u64) -> Total {
        let mut total = Total::default();
        while total.outcomes.total() < ended {
            let frame = self.frame(|frame| !frame.deployments.is_empty()).await;
            total.add(&frame);
        }
        total
    }

    pub async fn post(&self, body: impl Into<Bytes>) -> Answer {
        let request = request("/endpoints/iris/score").body(whole(body));
        send(self.address, request.unwrap()).await
    }

    /// Stops it and gives all frames that nobody took.
    pub async fn stop(mut self) -> Vec<Arc<Frame>> {
        self.shutdown.cancel();
        let served = self.served.take().unwrap();
        soon("the end", served).await.unwrap().unwrap();
        std::iter::from_fn(|| self.frames.try_recv().ok()).collect()
    }

    pub fn begin_stop(&self) {
        self.shutdown.cancel();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Frames of one deployment (or of all) added up.
#[derive(Debug, Default)]
pub struct Total {
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

impl Total {
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
            let ours = self.at_or_below.entry(measure.clone()).or_default();
            for (threshold, count) in counts {
                *ours.entry(*threshold).or_default() += count;
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
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// Our error code, from header and body alike.
    pub fn code(&self) -> &str {
        let code = self.header("penstock-error-code");
        if !code.is_empty() {
            let problem: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
            assert_eq!(problem["code"], code);
            assert_eq!(problem["status"], self.status.as_u16());
        }
        code
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// A client's connection; it closes when this is dropped.
pub struct Client {
    pub sender: hyper::client::conn::http1::SendRequest<AnyBody>,
    task: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let io = TokioIo::new(stream);
        let (sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        let task = tokio::spawn(async move {
            let _ = connection.await;
        });
        Self { sender, task }
    }

    pub async fn send(&mut self, request: Request<AnyBody>) -> Answer {
        soon("an answer", async {
            self.sender.ready().await.unwrap();
            let response = self.sender.send_request(request).await.unwrap();
            let (parts, body) = response.into_parts();
            Answer {
                status: parts.status,
                headers: parts.headers,
                body: body.collect().await.unwrap().to_bytes(),
            }
        })
        .await
    }
}

pub async fn send(address: SocketAddr, request: Request<AnyBody>) -> Answer {
    Client::connect(address).await.send(request).await
}

// --- instances ---

type Answering = Pin<Box<dyn Future<Output = Response<AnyBody>> + Send>>;

/// An instance that serves HTTP.
pub struct Instance {
    pub address: SocketAddr,
    pub connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Instance {
    pub async fn start<F, A>(answer: F) -> Self
    where
        F: Fn(Request<Incoming>) -> A + Send + Sync + 'static,
        A: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        let answer = Arc::new(answer);
        let answer: Arc<dyn Fn(Request<Incoming>) -> Answering + Send + Sync> =
            Arc::new(move |request| Box::pin(answer(request)));
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
                let answer = answer.clone();
                let service = service_fn(move |request| {
                    let answering = answer(request);
                    async move { Ok::<_, Infallible>(answering.await) }
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

    /// Answers every request with its own body.
    pub async fn echo() -> Self {
        Self::start(|request| async {
            let body = request.into_body().collect().await;
            Response::new(whole(body.map(|b| b.to_bytes()).unwrap_or_default()))
        })
        .await
    }

    /// Answers every request with this text.
    pub async fn saying(text: &'static str) -> Self {
        Self::start(move |request| async move {
            let _ = request.into_body().collect().await;
            Response::new(whole(text))
        })
        .await
    }

    pub fn place(&self) -> Place {
        at(self.address)
    }
}

pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub fn saved_routes(data: &Path) -> Option<String> {
    std::fs::read_to_string(data.join("gateway-routes.json")).ok()
}
