//! Connections to instances, kept per thread and instance. A connection is driven by whoever uses
//! it, inside the task of the client's connection: no task of its own, no hand-over between tasks,
//! and a request that is given up closes its connection by dropping it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::body::RequestBody;
use crate::instance::Instance;
use crate::relay::Relay;
use crate::socket::poll_write_pieces;
use crate::timer::now_us;

/// Idle connections kept per instance and thread.
const IDLE_MAX: usize = 256;

/// What becomes of a request: the head of the answer, or the request itself if it was not sent.
pub type Sent = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>;

/// A connection to an instance, idle or in use.
pub struct Upstream {
    sender: SendRequest<RequestBody>,
    connection: Connection<TokioIo<Counted>, RequestBody>,
    /// Whether the instance sent anything since the last request began.
    answered: Rc<Cell<bool>>,
    relay: Option<Box<Relay>>,
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
        Ok(Box::new(Self {
            sender,
            connection,
            answered,
            relay: Some(Box::default()),
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

    /// Polls what goes on over this connection.
    pub fn drive<T>(
        &mut self,
        mut poll: impl FnMut(&mut Self, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        // Taken out, so that what is polled can be borrowed.
        let relay = self.relay.take().unwrap_or_default();
        let polled = relay.poll(|cx| poll(self, cx));
        self.relay = Some(relay);
        polled
    }

    /// Closed by the instance while it rested, as far as is known. Costs no system call.
    fn is_alive(&mut self) -> bool {
        let woken = self.relay.as_ref().is_none_or(|relay| relay.is_woken());
        (!woken || self.poll().is_pending()) && self.sender.is_ready()
    }

    fn poll(&mut self) -> Poll<()> {
        self.drive(Self::step)
    }

    /// Hands a request over; it goes out with the next `drive`.
    pub fn send(&mut self, request: Request<RequestBody>) -> impl Future<Output = Sent> + use<> {
        self.answered.set(false);
        let sender = &mut self.sender;
        match &self.relay {
            Some(relay) => relay.before_poll(|| sender.try_send_request(request)),
            None => sender.try_send_request(request),
        }
    }

    /// This task drives the connection from now on.
    pub fn attach(&self, cx: &Context<'_>) {
        if let Some(relay) = &self.relay {
            relay.attach(cx.waker());
        }
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
    /// By the instance's serial.
    idle: BTreeMap<u64, IdleSet>,
}

impl Pool {
    /// The connection that was used last, if one is alive.
    pub fn take(&mut self, instance: &Instance) -> Option<Box<Upstream>> {
        let set = self.idle.get_mut(&instance.serial)?;
        while let Some(mut upstream) = set.connections.pop() {
            if upstream.is_alive() {
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
        // It has read until there was nothing more, so whatever comes now wakes the relay.
        if let Some(relay) = &upstream.relay {
            relay.restore(false);
        }
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
                    .retain_mut(|c| c.idle_since_us >= oldest && c.is_alive());
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
