//! One serving thread: its own runtime, listener, connections and pools. Threads meet only in the
//! counters of deployments and instances.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use arc_swap::Cache;
use http::{HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use runtime::descriptors::is_lack;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::guard::{Guard, Shared, Timeouts};
use crate::instance::Instance;
use crate::meter::{Early, SharedShard, ThreadMeter, count_refusal};
use crate::pool::Pool;
use crate::proxy::Client;
use crate::refuse::refuse;
use crate::reply::Refusal;
use crate::router::{Endpoint, Router, Snapshot};
use crate::timer::now_us;
use crate::upstream::Upstream;

/// What all threads share.
#[derive(Debug)]
pub struct Core {
    pub config: Config,
    pub router: Arc<Router>,
    pub early: Early,
    /// Of clients.
    pub connections: AtomicUsize,
    /// To instances, in use or at rest.
    pub upstreams: Arc<AtomicUsize>,
}

impl Core {
    /// Clients that there may be now.
    fn clients_max(&self) -> usize {
        let config = &self.config;
        config.connections_max.min(config.descriptors.clients_max())
    }

    /// All descriptors for connections are taken.
    fn is_full(&self) -> bool {
        let open =
            self.connections.load(Ordering::Relaxed) + self.upstreams.load(Ordering::Relaxed);
        open >= self.config.descriptors.connections_max()
    }
}

/// An open connection of a client.
#[derive(Debug)]
struct Task {
    /// To be told of the end.
    waker: Waker,
    client: Rc<Shared>,
}

#[derive(Debug)]
pub struct Thread {
    pub core: Arc<Core>,
    /// Borrowed for one call at a time.
    pub pool: RefCell<Pool>,
    pub meter: Rc<ThreadMeter>,
    /// The room of a header map that is done with, for the next answer's.
    pub spare: RefCell<HeaderMap>,
    routes: RefCell<Cache<SnapshotRef, Arc<Snapshot>>>,
    random: RefCell<fastrand::Rng>,
    rotation: Cell<usize>,
    stopping: Cell<bool>,
    tasks: RefCell<HashMap<u64, Task>>,
    pub refusing: Cell<usize>,
    next_task: Cell<u64>,
}

/// The router, as something that holds the current snapshot.
#[derive(Clone, Debug)]
struct SnapshotRef(Arc<Router>);

impl std::ops::Deref for SnapshotRef {
    type Target = arc_swap::ArcSwap<Snapshot>;
    fn deref(&self) -> &Self::Target {
        self.0.current()
    }
}

const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// Between tries to accept when there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// A client that has rested for less is about to ask again, as likely as not.
const RESTED_MIN_US: u64 = 1_000_000;

/// Serves until `shutdown`, then lets requests in flight end within the grace.
pub fn run(
    core: Arc<Core>,
    shard: SharedShard,
    listener: std::net::TcpListener,
    seed: u64,
    shutdown: &CancellationToken,
) -> io::Result<()> {
    let runtime = Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build_local(LocalOptions::default())?;
    let thread = Rc::new(Thread::new(core, shard, seed));
    runtime.block_on(thread.clone().serve(listener, shutdown))?;
    // What still runs is cut with the runtime.
    thread.meter.cutting.set(true);
    drop(runtime);
    Ok(())
}

impl Thread {
    fn new(core: Arc<Core>, shard: SharedShard, seed: u64) -> Self {
        let router = core.router.clone();
        Self {
            core,
            pool: RefCell::default(),
            meter: Rc::new(ThreadMeter {
                shard,
                cutting: Rc::default(),
            }),
            spare: RefCell::default(),
            routes: RefCell::new(Cache::new(SnapshotRef(router))),
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
            rotation: Cell::new(seed as usize & 0xffff),
            stopping: Cell::new(false),
            tasks: RefCell::default(),
            refusing: Cell::new(0),
            next_task: Cell::new(0),
        }
    }

    /// The endpoint in the newest snapshot.
    pub fn endpoint(&self, name: &str) -> Option<Arc<Endpoint>> {
        self.routes.borrow_mut().load().endpoint(name).cloned()
    }

    pub fn domain(&self) -> Option<&str> {
        self.core.config.domain.as_deref()
    }

    pub fn rotation(&self) -> usize {
        let rotation = self.rotation.get();
        self.rotation.set(rotation.wrapping_add(1));
        rotation
    }

    /// A random UUID, as a header value. It must be unique, not secret.
    pub fn request_id(&self) -> HeaderValue {
        let id = uuid::Builder::from_random_bytes(self.random.borrow_mut().u128(..).to_ne_bytes());
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        id.as_uuid().hyphenated().encode_lower(&mut text);
        HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
    }

    async fn serve(
        self: Rc<Self>,
        listener: std::net::TcpListener,
        shutdown: &CancellationToken,
    ) -> io::Result<()> {
        let listener = TcpListener::from_std(listener)?;
        let housekeeping = tokio::task::spawn_local(self.clone().housekeep());
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.accept(&listener) => {}
        }
        self.stopping.set(true);
        // Connections that the system has accepted already get an answer.
        while let Poll::Ready(Ok((stream, _))) =
            poll_fn(|cx| Poll::Ready(listener.poll_accept(cx))).await
        {
            self.admit(stream);
        }
        drop(listener);
        for task in self.tasks.borrow().values() {
            task.waker.wake_by_ref();
        }
        let end = tokio::time::Instant::now() + self.core.config.grace;
        while !self.tasks.borrow().is_empty() && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        housekeeping.abort();
        Ok(())
    }

    async fn accept(self: &Rc<Self>, listener: &TcpListener) {
        loop {
            let error = match listener.accept().await {
                Ok((stream, _)) => {
                    self.admit(stream);
                    continue;
                }
                Err(error) => error,
            };
            if is_lack(&error) {
                self.give_way("a client's connection", &error);
                self.close_longest_resting();
            } else {
                tracing::warn!(%error, "a connection cannot be accepted; trying again shortly");
            }
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }

    /// Serves a new client if there is room, or one at rest can make some; refuses it otherwise, at
    /// once: who waits without a word cannot go elsewhere.
    fn admit(self: &Rc<Self>, stream: TcpStream) {
        let has_room = self.core.connections.load(Ordering::Relaxed) < self.core.clients_max();
        if has_room || self.close_longest_resting() {
            return self.open(stream);
        }
        self.core.config.descriptors.full();
        count_refusal(
            &self.meter.shard,
            "",
            Refusal::TooManyConnections.status().as_u16(),
        );
        refuse(self, stream);
    }

    /// False: no client of this thread has rested for long enough.
    fn close_longest_resting(&self) -> bool {
        let rested_since = now_us().saturating_sub(RESTED_MIN_US);
        let tasks = self.tasks.borrow();
        let resting = tasks.values().filter(|task| !task.client.closing.get());
        let longest = resting.min_by_key(|task| task.client.resting_us.get().unwrap_or(u64::MAX));
        let Some(task) = longest.filter(|task| {
            let since = task.client.resting_us.get();
            since.is_some_and(|since| since <= rested_since)
        }) else {
            return false;
        };
        task.client.closing.set(true);
        task.waker.wake_by_ref();
        true
    }

    /// Descriptors have run out: what is not needed now is closed.
    pub fn give_way(&self, what: &str, error: &io::Error) {
        self.core.config.descriptors.lack(what, error);
        self.pool.borrow_mut().close_all();
    }

    /// So that no more are open than there are descriptors for.
    pub fn make_room_for_an_upstream(&self) {
        if self.core.is_full() {
            self.pool.borrow_mut().close_oldest();
        }
    }

    /// Keeps a connection to an instance for the next request.
    pub fn keep(
        &self,
        instance: &Arc<Instance>,
        upstream: Box<Upstream>,
        idle_max_us: u64,
        now_us: u64,
    ) {
        if !self.core.is_full() {
            let mut pool = self.pool.borrow_mut();
            pool.put(instance, upstream, idle_max_us, now_us);
        }
    }

    fn open(self: &Rc<Self>, stream: TcpStream) {
        // Without it answers in two pieces would wait for an acknowledgement.
        if stream.set_nodelay(true).is_err() {
            return;
        }
        self.core.connections.fetch_add(1, Ordering::Relaxed);
        let task = self.next_task.get();
        self.next_task.set(task + 1);
        let client = Rc::new(Shared::new(stream));
        let known = Task {
            waker: Waker::noop().clone(),
            client: client.clone(),
        };
        self.tasks.borrow_mut().insert(task, known);
        let open = Open {
            thread: self.clone(),
            task,
        };
        tokio::task::spawn_local(open.run(client));
    }

    async fn housekeep(self: Rc<Self>) {
        loop {
            tokio::time::sleep(HOUSEKEEPING).await;
            self.pool.borrow_mut().sweep(now_us());
            self.shrink();
        }
    }
}

impl Thread {
    /// Closes clients at rest where instances have taken what there was for them, or others have.
    fn shrink(&self) {
        let open = self.core.connections.load(Ordering::Relaxed);
        let excess = open.saturating_sub(self.core.clients_max());
        for _ in 0..excess.div_ceil(self.core.config.threads.max(1)) {
            if !self.close_longest_resting() {
                break;
            }
        }
        if self.core.config.descriptors.is_tight() {
            self.pool.borrow_mut().close_all();
        }
    }
}

/// An open connection, counted until it is dropped.
struct Open {
    thread: Rc<Thread>,
    task: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.thread.tasks.borrow_mut().remove(&self.task);
        self.thread.core.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Open {
    async fn run(self, shared: Rc<Shared>) {
        let config = &self.thread.core.config;
        let timeouts = Timeouts {
            head: config.head_timeout,
            idle: config.idle_timeout,
            write: config.write_timeout,
        };
        let guard = Guard::new(shared.clone(), timeouts);
        let client = Rc::new(Client::new(self.thread.clone(), shared.clone()));
        let service = service_fn(move |request| client.clone().handle(request));
        // The guard holds heads back until they are whole and times them, so the server's own timer
        // has nothing to wait for; it is there so that no timeout is without effect.
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            // Whether the client left is looked for while its request is answered.
            .half_close(true)
            .serve_connection(TokioIo::new(guard), service);
        let mut connection = pin!(connection);
        let mut registered = false;
        let mut told = false;
        let ended = poll_fn(|cx| {
            if !registered {
                registered = true;
                shared.relay.attach(cx.waker());
                if let Some(task) = self.thread.tasks.borrow_mut().get_mut(&self.task) {
                    task.waker.clone_from(cx.waker());
                }
            }
            if (self.thread.stopping.get() || shared.closing.get()) && !told {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
            shared.relay.poll(|cx| connection.as_mut().poll(cx))
        })
        .await;
        if let Err(error) = ended {
            tracing::debug!(%error, "a client's connection ended early");
        }
    }
}
