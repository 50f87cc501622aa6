//! What the requests on one serving thread share: the connections to instances, the routes as this
//! thread sees them, and its part of the counts. Threads meet only in the counters of deployments
//! and instances.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::Cache;
use http::{HeaderMap, HeaderValue};

use crate::config::Config;
use crate::early::Early;
use crate::flight::ThreadMeter;
use crate::instance::Instance;
use crate::pool::Pool;
use crate::router::{Endpoint, Router, Snapshot};
use crate::shard::SharedShard;
use crate::upstream::Idle;

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
    pub fn clients_max(&self) -> usize {
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
    /// Clients that are being told that there is no room for them.
    pub refusing: Cell<usize>,
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

impl Thread {
    pub fn new(core: Arc<Core>, shard: SharedShard, seed: u64) -> Self {
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
            refusing: Cell::new(0),
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
    pub fn keep(&self, instance: &Arc<Instance>, idle: Idle, idle_max_us: u64, now_us: u64) {
        if !self.core.is_full() {
            let mut pool = self.pool.borrow_mut();
            pool.put(instance, idle, idle_max_us, now_us);
        }
    }
}
