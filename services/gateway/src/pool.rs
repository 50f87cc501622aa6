//! Connections to instances, kept per thread and instance. A connection is driven by whoever uses
//! it, inside the task of the client's connection: no task of its own, no hand-over between tasks,
//! and a request that is given up closes its connection by dropping it.

use std::cell::Cell;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::body::RequestBody;
use crate::instance::Instance;
use crate::socket::poll_write_pieces;
use crate::timer::now_us;

/// Idle connections kept per instance and thread.
const IDLE_MAX: usize = 256;

/// Turns in one poll before the rest of the thread gets its own.
const DRIVE_MAX: usize = 8;

/// Passes a connection's wake-ups on to the task that uses it. Those from inside a poll are noted
/// instead.
#[derive(Debug, Default)]
struct Relay {
    task: Mutex<Option<Waker>>,
    inside: AtomicBool,
    again: AtomicBool,
}

impl Relay {
    fn attach(&self, task: &Waker) {
        let mut known = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.as_ref().is_some_and(|known| known.will_wake(task)) {
            *known = Some(task.clone());
        }
    }

    fn wake_task(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = &*task {
            task.wake_by_ref();
        }
    }
}

impl Wake for Relay {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.again.store(true, Ordering::SeqCst);
        if !self.inside.load(Ordering::SeqCst) {
            self.wake_task();
        }
    }
}

/// A connection to an instance, idle or in use.
pub struct Upstream {
    pub sender: SendRequest<RequestBody>,
    connection: Connection<TokioIo<Counted>, RequestBody>,
    /// Whether the instance sent anything since the last request began.
    answered: Rc<Cell<bool>>,
    relay: Arc<Relay>,
    /// Wakes by way of the relay.
    waker: Waker,
    /// It has served a request before.
    pub reused: bool,
    closed: bool,
    idle_since_us: u64,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream")
            .field("reused", &self.reused)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl Upstream {
    pub async fn connect(instance: &Instance, timeout: Duration) -> io::Result<Box<Self>> {
        let connecting = TcpStream::connect(instance.address.as_str());
        let stream = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        let answered = Rc::new(Cell::new(false));
        let io = Counted {
            io: stream,
            answered: answered.clone(),
        };
        let (sender, connection) = Builder::new()
            .handshake(TokioIo::new(io))
            .await
            .map_err(io::Error::other)?;
        let relay = Arc::new(Relay::default());
        Ok(Box::new(Self {
            sender,
            connection,
            answered,
            waker: relay.clone().into(),
            relay,
            reused: false,
            closed: false,
            idle_since_us: 0,
        }))
    }

    /// Moves the connection on; ready once it is closed, and ever after. Only inside `drive`.
    pub fn step(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.closed {
            self.closed = Pin::new(&mut self.connection).poll(cx).is_ready();
        }
        if self.closed {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Polls what goes on over this connection. Its two ends, the HTTP library's and ours, talk by
    /// waking each other; inside one poll that means only that there is more to do, and the whole
    /// task need not run once more for it.
    pub fn drive<T>(
        &mut self,
        mut poll: impl FnMut(&mut Self, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let waker = std::mem::replace(&mut self.waker, Waker::noop().clone());
        let cx = &mut Context::from_waker(&waker);
        self.relay.inside.store(true, Ordering::SeqCst);
        let mut polled = Poll::Pending;
        // Bounded, since one who has used up its turn is woken each time it asks for another.
        for _ in 0..DRIVE_MAX {
            self.relay.again.store(false, Ordering::SeqCst);
            polled = poll(self, cx);
            if polled.is_ready() || !self.relay.again.load(Ordering::SeqCst) {
                break;
            }
        }
        self.relay.inside.store(false, Ordering::SeqCst);
        if polled.is_pending() && self.relay.again.load(Ordering::SeqCst) {
            self.relay.wake_task();
        }
        self.waker = waker;
        polled
    }

    fn poll(&mut self) -> Poll<()> {
        self.drive(Self::step)
    }

    /// A request begins, in this task.
    pub fn begin(&self, cx: &Context<'_>) {
        self.answered.set(false);
        self.relay.attach(cx.waker());
    }

    pub fn answered(&self) -> bool {
        self.answered.get()
    }

    /// Whether a next request may be sent, after a whole answer.
    fn is_reusable(&mut self) -> bool {
        // The last bytes of the answer may have been handed out before the connection took note.
        (self.sender.is_ready() || self.poll().is_pending())
            && !self.closed
            && self.sender.is_ready()
    }
}

#[derive(Debug)]
#[allow(clippy::vec_box, reason = "connections are large, and move in and out")]
struct IdleSet {
    instance: Weak<Instance>,
    connections: Vec<Box<Upstream>>,
}

#[derive(Debug, Default)]
pub struct Pool {
    idle: HashMap<u64, IdleSet>,
}

impl Pool {
    /// The connection that was used last, if one is alive.
    pub fn take(&mut self, instance: &Instance) -> Option<Box<Upstream>> {
        let set = self.idle.get_mut(&instance.serial)?;
        while let Some(mut upstream) = set.connections.pop() {
            // Tells whether the instance has closed it; costs no system call.
            if upstream.poll().is_pending() && upstream.sender.is_ready() {
                return Some(upstream);
            }
        }
        None
    }

    /// Keeps a connection whose answer is whole, if it can be used again.
    pub fn put(&mut self, instance: &Arc<Instance>, mut upstream: Box<Upstream>) {
        if instance.is_draining() || !upstream.is_reusable() {
            return;
        }
        upstream.reused = true;
        upstream.idle_since_us = now_us();
        let set = self.idle.entry(instance.serial).or_insert_with(|| IdleSet {
            instance: Arc::downgrade(instance),
            connections: Vec::new(),
        });
        if set.connections.len() < IDLE_MAX {
            set.connections.push(upstream);
        }
    }

    /// Closes what rested too long, what the instance has closed, and what leads to an instance
    /// that drains or is gone.
    pub fn sweep(&mut self, idle_timeout: Duration) {
        let oldest = now_us().saturating_sub(idle_timeout.as_micros() as u64);
        self.idle.retain(|_, set| {
            let usable = set.instance.upgrade().is_some_and(|i| !i.is_draining());
            if usable {
                set.connections
                    .retain_mut(|c| c.idle_since_us >= oldest && c.poll().is_pending());
            }
            usable && !set.connections.is_empty()
        });
    }
}

/// A stream that remembers whether anything was read.
#[derive(Debug)]
struct Counted {
    io: TcpStream,
    answered: Rc<Cell<bool>>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.answered.set(true);
        }
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        poll_write_pieces(&mut self.io, cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
