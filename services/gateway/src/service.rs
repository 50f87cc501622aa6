//! The service: binds, serves on its threads, follows the routes and sends frames.

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
use runtime::health::{Component, Health};
use runtime::metrics::Metrics;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::Config;
use crate::early::Early;
use crate::listen;
use crate::meter::Meter;
use crate::metrics::GatewayMetrics;
use crate::router::Router;
use crate::saved;
use crate::shard::SharedShard;
use crate::thread::Core;

/// What a gateway needs of its process.
#[derive(Clone)]
pub struct Deps {
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub metrics: Metrics,
    pub health: Health,
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
    #[error("a thread of the gateway panicked; its log says where")]
    Panicked,
}

/// A gateway that listens and does not serve yet.
pub struct Gateway {
    /// Where it listens, with the port that was picked.
    pub address: SocketAddr,
    core: Arc<Core>,
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

/// How long a gateway with routes of an earlier life waits for those on the bus: instances in its own
/// may be gone. Much shorter where the bus is away.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(30);
const AWAY_AFTER: Duration = Duration::from_secs(3);
/// How often the bus is asked meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Between two answers to requests for early frames.
const EARLY_PAUSE: Duration = Duration::from_millis(50);

impl Gateway {
    /// Binds, and loads the routes that were saved.
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
            router.apply(saved::load(data));
            router.take_changed();
        }
        Ok(Self {
            address,
            core: Arc::new(Core {
                config,
                router,
                early: Early::default(),
                connections: AtomicUsize::new(0),
                upstreams: Arc::default(),
            }),
            deps,
            component,
            listeners,
            shards: (0..threads).map(|_| SharedShard::default()).collect(),
            boot: boot_id(),
        })
    }

    /// Serves until `shutdown`, then lets requests in flight end and says goodbye. A thread that
    /// fails ends the gateway.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), Error> {
        let mut routes = self.deps.bus.subscribe_routes();
        self.component.waits_on("reads the routes from the bus");
        let caught_up = catch_up(&self.core.router, &*self.deps.bus, &mut routes);
        if shutdown.run_until_cancelled(caught_up).await.is_none() {
            return Ok(());
        }
        // A thread that ends takes the others with it.
        let stop = shutdown.child_token();
        let served = CancellationToken::new();
        let mut threads = Vec::new();
        for (index, listener) in self.listeners.into_iter().enumerate() {
            let core = self.core.clone();
            let shard = self.shards[index].clone();
            let stop = stop.clone();
            threads.push(spawn(&format!("gateway-{index}"), move || {
                let _stops_all = stop.clone().drop_guard();
                listen::run(core, shard, listener, random_seed(), &stop)
            })?);
        }
        let side = Side {
            meter: Meter::new(
                &self.core.config.id,
                Hello {
                    address: self.core.config.admin.clone(),
                    backends: Vec::new(),
                },
                self.boot,
                self.core.router.clone(),
                self.shards,
                self.deps.clock.now(),
            ),
            metrics: GatewayMetrics::register(&self.deps.metrics),
            routes,
            deps: self.deps,
            core: self.core,
        };
        let ended = served.clone();
        // Routes and frames have a thread of their own, so that neither can delay a request, and
        // nothing else in the process can delay them.
        let side = spawn("gateway-meter", move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()?;
            runtime.block_on(side.run(ended));
            Ok(())
        })?;
        self.component.ready();
        let mut result = Ok(());
        for thread in threads {
            result = result.and(joined(thread).await);
        }
        served.cancel();
        self.component.waiting("has stopped");
        result.and(joined(side).await)
    }
}

/// Takes in the routes that are on the bus. A gateway without any waits for them, since to it every
/// endpoint is unknown.
async fn catch_up(router: &Router, bus: &dyn Bus, routes: &mut mpsc::Receiver<RouteMessage>) {
    let mut updates = Vec::new();
    let all = async {
        while let Some(RouteMessage::Update(update)) = routes.recv().await {
            updates.push(update);
        }
    };
    tokio::select! {
        biased;
        () = all => {}
        () = patience(bus), if !router.is_empty() => {
            tracing::warn!("the bus does not tell the routes; serving by those of the last run");
        }
    }
    router.apply(updates);
}

async fn patience(bus: &dyn Bus) {
    let began = Instant::now();
    let is_over = || {
        let waited = began.elapsed();
        waited >= CATCH_UP_WITHIN || (waited >= AWAY_AFTER && bus.trouble().is_some())
    };
    while !is_over() {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

type Thread = JoinHandle<io::Result<()>>;

fn spawn(
    name: &str,
    run: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<Thread, Error> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(Error::Thread)
}

async fn joined(thread: Thread) -> Result<(), Error> {
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    match joined {
        Ok(Ok(result)) => result.map_err(Error::Serve),
        Ok(Err(_)) | Err(_) => Err(Error::Panicked),
    }
}

/// Frames of this life of the gateway carry it.
#[expect(clippy::disallowed_methods, reason = "no result depends on it")]
fn boot_id() -> Uuid {
    Uuid::new_v4()
}

#[expect(
    clippy::disallowed_methods,
    reason = "the seed of what the gateway draws"
)]
fn random_seed() -> u64 {
    let mut seed = [0; 8];
    // Ids of requests need to be unique, not secret; the clock will do where nothing else is.
    match getrandom::fill(&mut seed) {
        Ok(()) => u64::from_ne_bytes(seed),
        Err(_) => crate::timer::now_us(),
    }
}

/// One listener per thread on one port; the system spreads connections over them.
fn listeners(address: SocketAddr, threads: usize) -> io::Result<Vec<TcpListener>> {
    // A port that is shared could silently be shared with another process. So it is first taken
    // alone, which fails where anybody else listens.
    let alone = listener(address, false)?;
    if threads == 1 {
        return Ok(vec![alone]);
    }
    let address = alone.local_addr()?;
    drop(alone);
    (0..threads).map(|_| listener(address, true)).collect()
}

fn listener(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// What goes on beside the requests: routes come in, frames go out.
struct Side {
    meter: Meter,
    metrics: GatewayMetrics,
    routes: mpsc::Receiver<RouteMessage>,
    deps: Deps,
    core: Arc<Core>,
}

impl Side {
    async fn run(mut self, ended: CancellationToken) {
        let mut boundary = self.next_second(None);
        let mut tick = self.instant_of(boundary);
        let mut early_from = Instant::now();
        let mut bus_open = true;
        loop {
            tokio::select! {
                biased;
                () = ended.cancelled() => break,
                message = self.routes.recv(), if bus_open => match message {
                    Some(message) => self.apply(message),
                    None => bus_open = false,
                },
                () = tokio::time::sleep_until(tick) => {
                    let frames = self.meter.close_second(boundary);
                    self.publish(frames);
                    self.metrics.observe_refusals(&self.meter.take_refusals());
                    self.core.router.expire(self.core.config.deleted_kept);
                    self.save().await;
                    boundary = self.next_second(Some(boundary));
                    tick = self.instant_of(boundary);
                }
                buckets = async {
                    tokio::time::sleep_until(early_from).await;
                    self.core.early.asked().await
                } => {
                    let frames = self.meter.early(&buckets);
                    self.publish(frames);
                    early_from = Instant::now() + EARLY_PAUSE;
                }
            }
        }
        let frames = self.meter.goodbye();
        self.publish(frames);
        self.metrics.observe_refusals(&self.meter.take_refusals());
        self.save().await;
    }

    /// Applies all updates that have arrived as one snapshot.
    fn apply(&mut self, first: RouteMessage) {
        let rest = std::iter::from_fn(|| self.routes.try_recv().ok());
        let updates = std::iter::once(first)
            .chain(rest)
            .filter_map(|message| match message {
                RouteMessage::Update(update) => Some(update),
                RouteMessage::CaughtUp => None,
            });
        self.core.router.apply(updates);
    }

    fn publish(&self, frames: Vec<Frame>) {
        self.metrics.observe(&frames);
        for frame in frames {
            self.deps.bus.publish_frame(Arc::new(frame));
        }
    }

    async fn save(&self) {
        let Some(data) = self.core.config.data.clone() else {
            return;
        };
        let Some(routes) = self.core.router.take_changed() else {
            return;
        };
        let saving = tokio::task::spawn_blocking(move || saved::save(&data, &routes));
        match saving.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "the routes cannot be saved; after a restart the gateway waits for control");
            }
            Err(error) => tracing::error!(%error, "saving the routes failed"),
        }
    }

    /// The whole second after `last`, or the next on the clock if that lies elsewhere by now.
    fn next_second(&self, last: Option<Timestamp>) -> Timestamp {
        let now = self.deps.clock.now();
        let second = Span::from_secs(1);
        let next = Timestamp::from_secs(now.secs()) + second;
        match last {
            // A timer that fired a little early must not make a window of nothing.
            Some(last) if next <= last && last.since(now) < second => last + second,
            _ => next,
        }
    }

    fn instant_of(&self, at: Timestamp) -> Instant {
        Instant::now() + at.since(self.deps.clock.now()).to_std()
    }
}
