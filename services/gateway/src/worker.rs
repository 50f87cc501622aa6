//! State that the requests on one worker thread share: connections to instances, the routes as this
//! thread sees them, and its share of the counters. Threads interact only through the counters of
//! deployments and instances.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::Cache;
use http::{HeaderMap, HeaderValue};

use crate::config::Config;
use crate::early_frames::EarlyFrames;
use crate::in_flight::WorkerMeter;
use crate::instance::ServedInstance;
use crate::pool::ConnectionPool;
use crate::router::{RouteSet, Router, ServedEndpoint};
use crate::shard::SharedShard;
use crate::upload_buffers::UploadBuffers;
use crate::upstream::IdleConnection;

/// State shared by all worker threads.
#[derive(Debug)]
pub struct SharedState {
    pub config: Config,
    pub router: Arc<Router>,
    pub early_frames: EarlyFrames,
    /// Open client connections.
    pub client_connections: AtomicUsize,
    /// Open connections to instances, in use or idle.
    pub upstreams: Arc<AtomicUsize>,
    pub upload_buffers: UploadBuffers,
}

impl SharedState {
    /// The number of client connections allowed right now.
    pub fn clients_max(&self) -> usize {
        let config = &self.config;
        config.connections_max.min(config.descriptors.clients_max())
    }

    /// Whether all descriptors for connections are taken.
    fn is_full(&self) -> bool {
        let open = self.client_connections.load(Ordering::Relaxed)
            + self.upstreams.load(Ordering::Relaxed);
        open >= self.config.descriptors.connections_max()
    }
}

#[derive(Debug)]
pub struct Worker {
    pub shared: Arc<SharedState>,
    /// Borrowed for one call at a time.
    pub pool: RefCell<ConnectionPool>,
    pub meter: Rc<WorkerMeter>,
    /// A finished header map whose allocation the next response reuses.
    pub spare_headers: RefCell<HeaderMap>,
    routes: RefCell<Cache<RouteSetRef, Arc<RouteSet>>>,
    random: RefCell<fastrand::Rng>,
    rotation: Cell<usize>,
    /// Clients that are currently being refused because the gateway is full.
    pub refusing: Cell<usize>,
}

/// Dereferences the router to its current snapshot.
#[derive(Clone, Debug)]
struct RouteSetRef(Arc<Router>);

impl std::ops::Deref for RouteSetRef {
    type Target = arc_swap::ArcSwap<RouteSet>;
    fn deref(&self) -> &Self::Target {
        self.0.current()
    }
}

impl Worker {
    pub fn new(shared: Arc<SharedState>, shard: SharedShard, seed: u64) -> Self {
        let router = shared.router.clone();
        Self {
            shared,
            pool: RefCell::default(),
            meter: Rc::new(WorkerMeter {
                shard,
                is_aborting: Rc::default(),
            }),
            spare_headers: RefCell::default(),
            routes: RefCell::new(Cache::new(RouteSetRef(router))),
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
            rotation: Cell::new(seed as usize & 0xffff),
            refusing: Cell::new(0),
        }
    }

    /// Looks up the endpoint in the newest snapshot.
    pub fn endpoint(&self, name: &str) -> Option<Arc<ServedEndpoint>> {
        self.routes.borrow_mut().load().endpoint(name).cloned()
    }

    pub fn domain(&self) -> Option<&str> {
        self.shared.config.domain.as_deref()
    }

    pub fn rotation(&self) -> usize {
        let rotation = self.rotation.get();
        self.rotation.set(rotation.wrapping_add(1));
        rotation
    }

    /// A random UUID as a header value. It must be unique, not secret.
    pub fn request_id(&self) -> HeaderValue {
        let id = uuid::Builder::from_random_bytes(self.random.borrow_mut().u128(..).to_ne_bytes());
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        id.as_uuid().hyphenated().encode_lower(&mut text);
        HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
    }

    /// Frees descriptors after running out of them: closes all idle connections to instances.
    pub fn handle_descriptor_shortage(&self, what: &str, error: &io::Error) {
        self.shared.config.descriptors.record_shortage(what, error);
        self.pool.borrow_mut().close_all();
    }

    /// Closes an idle connection if all descriptors are taken, to keep within the limit.
    pub fn make_room_for_upstream(&self) {
        if self.shared.is_full() {
            self.pool.borrow_mut().close_oldest();
        }
    }

    /// Keeps a connection to an instance for the next request.
    pub fn return_to_pool(
        &self,
        instance: &Arc<ServedInstance>,
        idle: IdleConnection,
        idle_max_us: u64,
        now_us: u64,
    ) {
        if !self.shared.is_full() {
            let mut pool = self.pool.borrow_mut();
            pool.put(instance, idle, idle_max_us, now_us);
        }
    }
}
