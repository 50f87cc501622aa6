//! The service: binds, runs the worker threads, follows the routes and sends frames.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread::JoinHandle;
use std::time::Duration;

use bus::{Bus, RouteMessage};
use contract::frame::{Frame, Hello};
use contract::time::{Span, Timestamp};
use runtime::clock::Clock;
use runtime::health::{Component, HealthRegistry};
use runtime::metrics::Metrics;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::Config;
use crate::early_frames::EarlyFrames;
use crate::listen;
use crate::meter::FrameBuilder;
use crate::metrics::GatewayMetrics;
use crate::router::Router;
use crate::saved_routes;
use crate::shard::SharedShard;
use crate::worker::SharedState;

/// What a gateway needs from its process.
#[derive(Clone)]
pub struct Deps {
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub metrics: Metrics,
    pub health: HealthRegistry,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the gateway cannot listen on {address}: {source}; choose another with --gateway-addr")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("the gateway cannot start a thread: {0}")]
    Thread(io::Error),
    #[error("a thread of the gateway failed: {0}")]
    Serve(io::Error),
    #[error("a thread of the gateway panicked; see its log for details")]
    Panicked,
}

/// A gateway that listens but does not serve yet.
pub struct Gateway {
    /// The address it listens on, with the port that was picked.
    pub address: SocketAddr,
    shared: Arc<SharedState>,
    deps: Deps,
    component: Component,
    listeners: Vec<TcpListener>,
    shards: Vec<SharedShard>,
    boot: Uuid,
}

/// Binds and serves until `shutdown`.
pub async fn run(config: Config, deps: Deps, shutdown: CancellationToken) -> Result<(), Error> {
    Gateway::bind(config, deps)?.serve(shutdown).await
}

const BACKLOG: i32 = 4096;

/// How long a gateway with saved routes waits for the routes on the bus: instances in the saved
/// ones may be gone. Much shorter if the bus is unreachable.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(30);
const BUS_UNREACHABLE_AFTER: Duration = Duration::from_secs(3);
/// Interval at which the bus is checked meanwhile.
const BUS_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Minimum interval between early frames.
const EARLY_FRAME_INTERVAL: Duration = Duration::from_millis(50);

impl Gateway {
    /// Binds, and loads the saved routes.
    pub fn bind(config: Config, deps: Deps) -> Result<Self, Error> {
        let component = deps.health.component("gateway");
        let threads = config.threads.max(1);
        let listen = |source| Error::Listen {
            address: config.address,
            source,
        };
        let listeners = listeners(config.address, threads).map_err(listen)?;
        let address = match listeners.first() {
            Some(first) => first.local_addr().map_err(listen)?,
            None => config.address,
        };
        let router = Arc::new(Router::new(config.id.clone()));
        if let Some(data) = &config.data {
            router.apply(saved_routes::load(data));
            router.take_unsaved();
        }
        Ok(Self {
            address,
            shared: Arc::new(SharedState {
                config,
                router,
                early_frames: EarlyFrames::default(),
                client_connections: AtomicUsize::new(0),
                upstreams: Arc::default(),
                upload_buffers: Default::default(),
            }),
            deps,
            component,
            listeners,
            shards: (0..threads).map(|_| SharedShard::default()).collect(),
            boot: boot_id(),
        })
    }

    /// Serves until `shutdown`, then lets requests in flight finish and sends goodbyes. A worker
    /// thread that fails stops the gateway.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), Error> {
        let mut routes = self.deps.bus.subscribe_routes();
        self.component
            .set_waiting_reason("reading the routes from the bus");
        // The log may be long, and the saved routes are as new as any until it has been read.
        let serves_saved = !self.shared.router.is_empty() && !self.deps.bus.retains_routes();
        if !serves_saved {
            let caught_up = catch_up(&self.shared.router, &*self.deps.bus, &mut routes);
            if shutdown.run_until_cancelled(caught_up).await.is_none() {
                return Ok(());
            }
        }
        // A worker thread that ends stops the others.
        let stop = shutdown.child_token();
        let workers_done = CancellationToken::new();
        let mut threads = Vec::new();
        for (index, listener) in self.listeners.into_iter().enumerate() {
            let shared = self.shared.clone();
            let shard = self.shards[index].clone();
            let stop = stop.clone();
            threads.push(spawn(&format!("gateway-{index}"), move || {
                let _stops_all = stop.clone().drop_guard();
                listen::run(shared, shard, listener, random_seed(), &stop)
            })?);
        }
        let background = Background {
            meter: FrameBuilder::new(
                &self.shared.config.id,
                Hello {
                    address: self.shared.config.admin.clone(),
                    backends: Vec::new(),
                },
                self.boot,
                self.shared.router.clone(),
                self.shards,
                self.deps.clock.now(),
            ),
            metrics: GatewayMetrics::register(&self.deps.metrics),
            routes,
            component: self.component.clone(),
            deps: self.deps,
            shared: self.shared,
        };
        let stopped = workers_done.clone();
        // Routes and frames have their own thread, so that they cannot delay a request, and nothing
        // else in the process can delay them.
        let background = spawn("gateway-meter", move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()?;
            runtime.block_on(background.run(stopped));
            Ok(())
        })?;
        if !serves_saved {
            self.component.ready();
        }
        let mut result = Ok(());
        for thread in threads {
            result = result.and(join(thread).await);
        }
        workers_done.cancel();
        self.component.waiting("stopped");
        result.and(join(background).await)
    }
}

/// Applies the routes on the bus. A gateway without any routes waits for them, since it would
/// answer 404 for every endpoint.
async fn catch_up(router: &Router, bus: &dyn Bus, routes: &mut mpsc::Receiver<RouteMessage>) {
    let mut updates = Vec::new();
    let all_routes = async {
        while let Some(RouteMessage::Update(update)) = routes.recv().await {
            updates.push(update);
        }
    };
    tokio::select! {
        biased;
        () = all_routes => {}
        () = catch_up_timeout(bus), if !router.is_empty() => {
            tracing::warn!(effect = "serving the saved ones", "cannot read the routes from the bus");
        }
    }
    router.apply(updates);
}

async fn catch_up_timeout(bus: &dyn Bus) {
    let started = Instant::now();
    let has_timed_out = || {
        let waited = started.elapsed();
        waited >= CATCH_UP_TIMEOUT || (waited >= BUS_UNREACHABLE_AFTER && bus.problem().is_some())
    };
    while !has_timed_out() {
        tokio::time::sleep(BUS_CHECK_INTERVAL).await;
    }
}

type ThreadHandle = JoinHandle<io::Result<()>>;

fn spawn(
    name: &str,
    run: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<ThreadHandle, Error> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(Error::Thread)
}

async fn join(thread: ThreadHandle) -> Result<(), Error> {
    let result = tokio::task::spawn_blocking(move || thread.join()).await;
    match result {
        Ok(Ok(result)) => result.map_err(Error::Serve),
        Ok(Err(_)) | Err(_) => Err(Error::Panicked),
    }
}

/// Identifies this run of the gateway in its frames.
#[expect(clippy::disallowed_methods, reason = "no result depends on it")]
fn boot_id() -> Uuid {
    Uuid::new_v4()
}

#[expect(
    clippy::disallowed_methods,
    reason = "seeds the gateway's random number generators"
)]
fn random_seed() -> u64 {
    let mut seed = [0; 8];
    // Request ids must be unique, not secret, so the clock is good enough as a fallback.
    match getrandom::fill(&mut seed) {
        Ok(()) => u64::from_ne_bytes(seed),
        Err(_) => crate::timer::now_us(),
    }
}

/// One listener per thread on one port; the kernel distributes connections over them.
fn listeners(address: SocketAddr, threads: usize) -> io::Result<Vec<TcpListener>> {
    // With `SO_REUSEPORT` another process could silently share the port. So it is first bound
    // exclusively, which fails if anything else listens on it.
    let exclusive = listener(address, false)?;
    if threads == 1 {
        return Ok(vec![exclusive]);
    }
    let address = exclusive.local_addr()?;
    drop(exclusive);
    (0..threads).map(|_| listener(address, true)).collect()
}

fn listener(address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(reuse_port)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Background work: receives routes and sends frames.
struct Background {
    meter: FrameBuilder,
    metrics: GatewayMetrics,
    routes: mpsc::Receiver<RouteMessage>,
    component: Component,
    deps: Deps,
    shared: Arc<SharedState>,
}

impl Background {
    async fn run(mut self, stopped: CancellationToken) {
        let mut boundary = self.next_second(None);
        let mut tick = self.instant_of(boundary);
        let mut early_from = Instant::now();
        let mut bus_open = true;
        loop {
            tokio::select! {
                biased;
                () = stopped.cancelled() => break,
                message = self.routes.recv(), if bus_open => match message {
                    Some(message) => self.apply(message),
                    None => bus_open = false,
                },
                () = tokio::time::sleep_until(tick) => {
                    let frames = self.meter.close_second(boundary);
                    self.publish(frames);
                    self.metrics.observe_refusals(&self.meter.take_refusals());
                    self.metrics.observe_cuts(&self.meter.take_cuts());
                    self.shared.router.expire_deleted(self.shared.config.deleted_retention);
                    self.save().await;
                    boundary = self.next_second(Some(boundary));
                    tick = self.instant_of(boundary);
                }
                buckets = async {
                    tokio::time::sleep_until(early_from).await;
                    self.shared.early_frames.requested().await
                } => {
                    let frames = self.meter.early_frames(&buckets);
                    self.publish(frames);
                    early_from = Instant::now() + EARLY_FRAME_INTERVAL;
                }
            }
        }
        let frames = self.meter.goodbye();
        self.publish(frames);
        self.metrics.observe_refusals(&self.meter.take_refusals());
        self.metrics.observe_cuts(&self.meter.take_cuts());
        self.save().await;
    }

    /// Applies all updates that have arrived as one snapshot.
    fn apply(&mut self, first: RouteMessage) {
        let mut has_caught_up = false;
        let rest = std::iter::from_fn(|| self.routes.try_recv().ok());
        let updates = std::iter::once(first)
            .chain(rest)
            .filter_map(|message| match message {
                RouteMessage::Update(update) => Some(update),
                RouteMessage::CaughtUp => {
                    has_caught_up = true;
                    None
                }
            });
        self.shared.router.apply(updates);
        if has_caught_up {
            self.component.ready();
        }
    }

    fn publish(&self, frames: Vec<Frame>) {
        let routes = self.shared.router.current().load();
        self.metrics.observe(&frames, &routes);
        for frame in frames {
            self.deps.bus.publish_frame(Arc::new(frame));
        }
    }

    async fn save(&self) {
        let Some(data) = self.shared.config.data.clone() else {
            return;
        };
        let Some(routes) = self.shared.router.take_unsaved() else {
            return;
        };
        let saving = tokio::task::spawn_blocking(move || saved_routes::save(&data, &routes));
        match saving.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, effect = "waiting for control after a restart", "cannot save the routes");
            }
            Err(error) => tracing::error!(%error, "task that saves the routes failed"),
        }
    }

    /// The second after `last`, or the clock's next one if the clock has moved elsewhere.
    fn next_second(&self, last: Option<Timestamp>) -> Timestamp {
        let now = self.deps.clock.now();
        let second = Span::from_secs(1);
        let next = Timestamp::from_secs(now.secs()) + second;
        match last {
            // A timer that fired slightly early must not create an empty window.
            Some(last) if next <= last && last.since(now) < second => last + second,
            _ => next,
        }
    }

    fn instant_of(&self, at: Timestamp) -> Instant {
        Instant::now() + at.since(self.deps.clock.now()).to_std()
    }
}
