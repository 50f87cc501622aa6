//! One worker thread: its runtime and listener, and the lifetime of its client connections.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::Duration;

use contract::resources::ErrorMapping;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use runtime::descriptors::is_shortage;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio_util::sync::CancellationToken;

use crate::client::ClientConnection;
use crate::forwarded::Peer;
use crate::guard::{ConnectionState, Guard, Timeouts};
use crate::proxy;
use crate::refuse::refuse;
use crate::reply::Refusal;
use crate::shard::{SharedShard, count_refusal};
use crate::timer::now_us;
use crate::worker::{SharedState, Worker};

/// An open client connection.
#[derive(Debug)]
struct ConnectionTask {
    /// Wakes the connection's task when it must close.
    waker: Waker,
    client: Rc<ConnectionState>,
}

/// The clients of one thread.
#[derive(Debug)]
struct Server {
    worker: Rc<Worker>,
    is_stopping: Cell<bool>,
    tasks: RefCell<HashMap<u64, ConnectionTask>>,
    next_task: Cell<u64>,
}

const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// Delay between attempts to accept when there are no file descriptors left.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(20);
/// How long streams that outlasted the grace period may take to tell their clients that they are cut.
const LAST_EVENTS_GRACE: Duration = Duration::from_millis(250);
/// A client that has been idle for less than this is likely to send another request soon.
const IDLE_MIN_US: u64 = 1_000_000;

/// Serves until `shutdown`, then lets requests in flight finish within the grace period, and cuts the rest.
pub fn run(
    shared: Arc<SharedState>,
    shard: SharedShard,
    listener: std::net::TcpListener,
    seed: u64,
    shutdown: &CancellationToken,
) -> io::Result<()> {
    let runtime = Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build_local(LocalOptions::default())?;
    let worker = Rc::new(Worker::new(shared, shard, seed));
    let server = Rc::new(Server::new(worker));
    // Dropping the runtime aborts whatever is still running.
    runtime.block_on(server.serve(listener, shutdown))
}

impl Server {
    fn new(worker: Rc<Worker>) -> Self {
        Self {
            worker,
            is_stopping: Cell::new(false),
            tasks: RefCell::default(),
            next_task: Cell::new(0),
        }
    }

    async fn serve(
        self: Rc<Self>,
        listener: std::net::TcpListener,
        shutdown: &CancellationToken,
    ) -> io::Result<()> {
        let listener = TcpListener::from_std(listener)?;
        let housekeeping = tokio::task::spawn_local(self.clone().run_housekeeping());
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.accept(&listener) => {}
        }
        self.is_stopping.set(true);
        // Connections already in the accept queue still get a response.
        while let Poll::Ready(Ok((stream, address))) =
            poll_fn(|cx| Poll::Ready(listener.poll_accept(cx))).await
        {
            self.admit(stream, address.ip());
        }
        drop(listener);
        self.wait_for_connections(self.worker.shared.config.grace)
            .await;
        self.worker.meter.is_aborting.set(true);
        self.wait_for_connections(LAST_EVENTS_GRACE).await;
        housekeeping.abort();
        Ok(())
    }

    /// Lets every connection notice the shutdown, and waits at most `grace` until all are closed.
    async fn wait_for_connections(&self, grace: Duration) {
        for task in self.tasks.borrow().values() {
            task.waker.wake_by_ref();
        }
        let end = tokio::time::Instant::now() + grace;
        while !self.tasks.borrow().is_empty() && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn accept(self: &Rc<Self>, listener: &TcpListener) {
        loop {
            let error = match listener.accept().await {
                Ok((stream, address)) => {
                    self.admit(stream, address.ip());
                    continue;
                }
                Err(error) => error,
            };
            if is_shortage(&error) {
                self.worker
                    .handle_descriptor_shortage("a client connection", &error);
                self.close_longest_idle();
            } else {
                tracing::warn!(%error, effect = "retrying", "cannot accept a connection");
            }
            tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
        }
    }

    /// Serves a new client if there is capacity, or if an idle client can be closed for it.
    /// Otherwise refuses it immediately, so that it can go elsewhere.
    fn admit(self: &Rc<Self>, stream: TcpStream, address: IpAddr) {
        let has_capacity = self
            .worker
            .shared
            .client_connections
            .load(Ordering::Relaxed)
            < self.worker.shared.clients_max();
        if has_capacity || self.close_longest_idle() {
            return self.spawn_connection(stream, address);
        }
        self.worker.shared.config.descriptors.record_exhausted();
        count_refusal(
            &self.worker.meter.shard,
            "",
            Refusal::TooManyConnections
                .status(ErrorMapping::Azure)
                .as_u16(),
        );
        refuse(&self.worker, stream);
    }

    /// Returns false if no client of this thread has been idle for long enough.
    fn close_longest_idle(&self) -> bool {
        let idle_before = now_us().saturating_sub(IDLE_MIN_US);
        let tasks = self.tasks.borrow();
        let candidates = tasks.values().filter(|task| !task.client.is_closing.get());
        let longest = candidates.min_by_key(|task| task.client.idle_since().unwrap_or(u64::MAX));
        let Some(task) = longest.filter(|task| {
            let since = task.client.idle_since();
            since.is_some_and(|since| since <= idle_before)
        }) else {
            return false;
        };
        task.client.is_closing.set(true);
        task.waker.wake_by_ref();
        true
    }

    fn spawn_connection(self: &Rc<Self>, stream: TcpStream, address: IpAddr) {
        // Without it, a response in two segments would wait for an acknowledgement.
        if stream.set_nodelay(true).is_err() {
            return;
        }
        self.worker
            .shared
            .client_connections
            .fetch_add(1, Ordering::Relaxed);
        let task = self.next_task.get();
        self.next_task.set(task + 1);
        let client = Rc::new(ConnectionState::new(stream));
        let entry = ConnectionTask {
            waker: Waker::noop().clone(),
            client: client.clone(),
        };
        self.tasks.borrow_mut().insert(task, entry);
        let open_connection = OpenConnection {
            server: self.clone(),
            task,
        };
        tokio::task::spawn_local(open_connection.run(client, address));
    }

    async fn run_housekeeping(self: Rc<Self>) {
        loop {
            tokio::time::sleep(HOUSEKEEPING).await;
            self.worker.pool.borrow_mut().sweep(now_us());
            self.shed_idle_clients();
        }
    }

    /// Closes idle clients when connections to instances or other descriptors have used up their
    /// share.
    fn shed_idle_clients(&self) {
        let open = self
            .worker
            .shared
            .client_connections
            .load(Ordering::Relaxed);
        let excess = open.saturating_sub(self.worker.shared.clients_max());
        for _ in 0..excess.div_ceil(self.worker.shared.config.threads.max(1)) {
            if !self.close_longest_idle() {
                break;
            }
        }
        if self.worker.shared.config.descriptors.is_tight() {
            self.worker.pool.borrow_mut().close_all();
        }
    }
}

/// An open connection, counted until it is dropped.
struct OpenConnection {
    server: Rc<Server>,
    task: u64,
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.server.tasks.borrow_mut().remove(&self.task);
        self.server
            .worker
            .shared
            .client_connections
            .fetch_sub(1, Ordering::Relaxed);
    }
}

impl OpenConnection {
    async fn run(self, connection: Rc<ConnectionState>, address: IpAddr) {
        let config = &self.server.worker.shared.config;
        let timeouts = Timeouts {
            head: config.head_timeout,
            idle: config.idle_timeout,
            write: config.write_timeout,
        };
        let guard = Guard::new(connection.clone(), timeouts);
        let peer = Peer::new(address, &config.trusted_proxies);
        let worker = self.server.worker.clone();
        let client = Rc::new(ClientConnection::new(worker, connection.clone(), peer));
        let service = service_fn(move |request| proxy::handle(client.clone(), request));
        // The guard buffers heads until they are complete and times them, so hyper's own timer has
        // nothing to wait for; setting it keeps every timeout in effect.
        let http_connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            // The proxy watches for client disconnects itself while it handles a request.
            .half_close(true)
            .serve_connection(TokioIo::new(guard), service);
        let mut http_connection = pin!(http_connection);
        let mut is_registered = false;
        let mut is_shutting_down = false;
        let result = poll_fn(|cx| {
            if !is_registered {
                is_registered = true;
                connection.wakes.attach(cx.waker());
                if let Some(task) = self.server.tasks.borrow_mut().get_mut(&self.task) {
                    task.waker.clone_from(cx.waker());
                }
            }
            if (self.server.is_stopping.get() || connection.is_closing.get()) && !is_shutting_down {
                is_shutting_down = true;
                http_connection.as_mut().graceful_shutdown();
            }
            connection
                .wakes
                .poll(|cx| http_connection.as_mut().poll(cx))
        })
        .await;
        if let Err(error) = result {
            tracing::debug!(%error, "client connection ended early");
        }
    }
}
