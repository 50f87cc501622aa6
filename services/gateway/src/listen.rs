//! One serving thread: its own runtime and listener, and the connections of its clients from their
//! beginning to their end.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use runtime::descriptors::is_lack;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::guard::{Guard, Shared, Timeouts};
use crate::proxy;
use crate::refuse::refuse;
use crate::reply::Refusal;
use crate::shard::{SharedShard, count_refusal};
use crate::thread::{Core, Thread};
use crate::timer::now_us;

/// An open connection of a client.
#[derive(Debug)]
struct Task {
    /// To be told of the end.
    waker: Waker,
    client: Rc<Shared>,
}

/// The clients of one thread.
#[derive(Debug)]
struct Server {
    thread: Rc<Thread>,
    stopping: Cell<bool>,
    tasks: RefCell<HashMap<u64, Task>>,
    next_task: Cell<u64>,
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
    let server = Rc::new(Server::new(thread.clone()));
    runtime.block_on(server.serve(listener, shutdown))?;
    // What still runs is cut with the runtime.
    thread.meter.cutting.set(true);
    drop(runtime);
    Ok(())
}

impl Server {
    fn new(thread: Rc<Thread>) -> Self {
        Self {
            thread,
            stopping: Cell::new(false),
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
        let end = tokio::time::Instant::now() + self.thread.core.config.grace;
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
                self.thread.give_way("a client's connection", &error);
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
        let has_room =
            self.thread.core.connections.load(Ordering::Relaxed) < self.thread.core.clients_max();
        if has_room || self.close_longest_resting() {
            return self.open(stream);
        }
        self.thread.core.config.descriptors.full();
        count_refusal(
            &self.thread.meter.shard,
            "",
            Refusal::TooManyConnections.status().as_u16(),
        );
        refuse(&self.thread, stream);
    }

    /// False: no client of this thread has rested for long enough.
    fn close_longest_resting(&self) -> bool {
        let rested_since = now_us().saturating_sub(RESTED_MIN_US);
        let tasks = self.tasks.borrow();
        let resting = tasks.values().filter(|task| !task.client.closing.get());
        let longest = resting.min_by_key(|task| task.client.resting_since().unwrap_or(u64::MAX));
        let Some(task) = longest.filter(|task| {
            let since = task.client.resting_since();
            since.is_some_and(|since| since <= rested_since)
        }) else {
            return false;
        };
        task.client.closing.set(true);
        task.waker.wake_by_ref();
        true
    }

    fn open(self: &Rc<Self>, stream: TcpStream) {
        // Without it answers in two pieces would wait for an acknowledgement.
        if stream.set_nodelay(true).is_err() {
            return;
        }
        self.thread.core.connections.fetch_add(1, Ordering::Relaxed);
        let task = self.next_task.get();
        self.next_task.set(task + 1);
        let client = Rc::new(Shared::new(stream));
        let known = Task {
            waker: Waker::noop().clone(),
            client: client.clone(),
        };
        self.tasks.borrow_mut().insert(task, known);
        let open = Open {
            server: self.clone(),
            task,
        };
        tokio::task::spawn_local(open.run(client));
    }

    async fn housekeep(self: Rc<Self>) {
        loop {
            tokio::time::sleep(HOUSEKEEPING).await;
            self.thread.pool.borrow_mut().sweep(now_us());
            self.shrink();
        }
    }

    /// Closes clients at rest where instances have taken what there was for them, or others have.
    fn shrink(&self) {
        let open = self.thread.core.connections.load(Ordering::Relaxed);
        let excess = open.saturating_sub(self.thread.core.clients_max());
        for _ in 0..excess.div_ceil(self.thread.core.config.threads.max(1)) {
            if !self.close_longest_resting() {
                break;
            }
        }
        if self.thread.core.config.descriptors.is_tight() {
            self.thread.pool.borrow_mut().close_all();
        }
    }
}

/// An open connection, counted until it is dropped.
struct Open {
    server: Rc<Server>,
    task: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.server.tasks.borrow_mut().remove(&self.task);
        self.server
            .thread
            .core
            .connections
            .fetch_sub(1, Ordering::Relaxed);
    }
}

impl Open {
    async fn run(self, shared: Rc<Shared>) {
        let config = &self.server.thread.core.config;
        let timeouts = Timeouts {
            head: config.head_timeout,
            idle: config.idle_timeout,
            write: config.write_timeout,
        };
        let guard = Guard::new(shared.clone(), timeouts);
        let client = Rc::new(Client::new(self.server.thread.clone(), shared.clone()));
        let service = service_fn(move |request| proxy::handle(client.clone(), request));
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
                if let Some(task) = self.server.tasks.borrow_mut().get_mut(&self.task) {
                    task.waker.clone_from(cx.waker());
                }
            }
            if (self.server.stopping.get() || shared.closing.get()) && !told {
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
