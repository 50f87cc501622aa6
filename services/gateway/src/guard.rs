//! What a client sends, checked before the HTTP server sees it. The guard follows the framing of a
//! connection, hands on request heads only when they are whole and keep the strict rules, and
//! bodies as they come. So no request can be read in two ways, here and by an instance; and heads
//! that are too long, too slow or malformed are answered like every other refusal.
//!
//! A refused head is replaced by one that the service knows by its method, `!` and the reason; no
//! client can send such a method, since the guard refuses it.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

use crate::framing::{Chunks, Head, HeadError, Length, check_head};
use crate::relay::Relay;
use crate::socket::poll_write_pieces;
use crate::timer::{Deadline, now_us};

/// Where a client's connection is.
///
/// ```text
/// Resting -heard-> Asking -begin_answer-> Answering -end_answer-> Asking -rest-> Resting
/// ```
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// It is open and nothing is asked on it, since then.
    Resting { since_us: u64 },
    /// Between two of the others: a request is coming, or nobody has looked yet whether one is.
    Asking,
    /// A request is being answered: no idle or head timeout runs.
    Answering,
}

/// What the guard and the service of one connection share.
#[derive(Debug)]
pub struct Shared {
    phase: Cell<Phase>,
    /// The end of the phase that the request is in, while one is being answered.
    pub deadline: RefCell<Deadline>,
    /// Of the client's connection, its service and its guard.
    pub relay: Relay,
    /// It is to make room for another.
    pub closing: Cell<bool>,
    stream: RefCell<TcpStream>,
    /// The client has sent more than the request that is being answered: it is there.
    ahead: Cell<bool>,
    /// When a client whose body is on its way is looked after next.
    look: RefCell<Deadline>,
}

/// Between two looks whether a client has left whose body waits for the instance to take it.
const LOOK_US: u64 = 250_000;

impl Shared {
    pub fn new(stream: TcpStream) -> Self {
        Self {
            phase: Cell::new(Phase::Resting { since_us: now_us() }),
            deadline: RefCell::default(),
            relay: Relay::default(),
            closing: Cell::default(),
            stream: RefCell::new(stream),
            ahead: Cell::default(),
            look: RefCell::default(),
        }
    }

    /// A request has come, and is being answered.
    pub fn begin_answer(&self) {
        self.phase.set(Phase::Answering);
    }

    /// The answer has been handed on, or given up.
    pub fn end_answer(&self) {
        if self.is_answering() {
            self.phase.set(Phase::Asking);
        }
    }

    fn is_answering(&self) -> bool {
        matches!(self.phase.get(), Phase::Answering)
    }

    /// Since when it rests, in microseconds of `now_us`; none where something is going on.
    pub fn resting_since(&self) -> Option<u64> {
        match self.phase.get() {
            Phase::Resting { since_us } => Some(since_us),
            Phase::Asking | Phase::Answering => None,
        }
    }

    /// Something has come from the client.
    fn heard(&self) {
        if let Phase::Resting { .. } = self.phase.get() {
            self.phase.set(Phase::Asking);
        }
    }

    /// Nothing is asked and nothing has come.
    fn rest(&self) {
        if !self.is_answering() {
            let since_us = now_us();
            self.phase.set(Phase::Resting { since_us });
        }
    }

    /// Ready once the client has closed its connection while its request, which has come whole, is
    /// being answered. The server could look for this too, but would make room for a whole read
    /// each time it looks.
    pub fn poll_left(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.ahead.get() {
            return Poll::Pending;
        }
        let mut byte = [std::mem::MaybeUninit::uninit(); 1];
        let mut byte = ReadBuf::uninit(&mut byte);
        match ready!(self.stream.borrow().poll_peek(cx, &mut byte)) {
            Ok(0) | Err(_) => Poll::Ready(()),
            Ok(_) => {
                self.ahead.set(true);
                Poll::Pending
            }
        }
    }

    /// The same while the request's body is passed on. An instance that takes none of it stops us
    /// from reading, and a close stands behind what is not read; so it is the system that is asked,
    /// now and then, since unread bytes would make it ready at once.
    pub fn poll_left_sending(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut look = self.look.borrow_mut();
        if !look.is_set() {
            look.set(now_us() + LOOK_US);
        }
        while look.poll(cx).is_ready() {
            if self.is_closed() {
                return Poll::Ready(());
            }
            look.set(now_us() + LOOK_US);
        }
        Poll::Pending
    }

    /// Whether the system has heard the client close or reset its connection. Costs no system call.
    fn is_closed(&self) -> bool {
        let stream = self.stream.borrow();
        let ready = pin!(stream.ready(Interest::READABLE));
        let heard = ready.poll(&mut Context::from_waker(Waker::noop()));
        matches!(heard, Poll::Ready(Ok(ready)) if ready.is_read_closed())
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    pub head: Duration,
    pub idle: Duration,
    pub write: Duration,
}

/// How long what a refused client still sends is taken, so that it reads our answer before the
/// connection is reset (nginx's `lingering_timeout`).
const LINGER_US: u64 = 5_000_000;
/// So much of it at once, before others get their turn.
const LINGER_TURN_BYTES: usize = 256 * 1024;

#[derive(Debug)]
enum Framing {
    /// In a head, or before one.
    Head(Head),
    /// So many bytes of body left.
    Body(u64),
    Chunks(Chunks),
    /// What follows the checked bytes is refused for this reason, once those have been handed on.
    Refusing(HeadError),
    /// The refusal is handed on; nothing more is read from this client.
    Refused,
}

#[derive(Debug)]
pub struct Guard {
    shared: Rc<Shared>,
    timeouts: Timeouts,
    framing: Framing,
    /// Read and not handed on: `released` checked bytes, then the beginning of a head.
    held: BytesMut,
    released: usize,
    /// Whether the wait is for the rest of a head, or of a connection's first.
    head_begun: bool,
    wait: Deadline,
    stalled: Deadline,
    lingering: Deadline,
}

impl Guard {
    pub fn new(shared: Rc<Shared>, timeouts: Timeouts) -> Self {
        let mut wait = Deadline::default();
        wait.set(now_us() + timeouts.head.as_micros() as u64);
        Self {
            shared,
            timeouts,
            framing: Framing::Head(Head::default()),
            held: BytesMut::new(),
            released: 0,
            head_begun: true,
            wait,
            stalled: Deadline::default(),
            lingering: Deadline::default(),
        }
    }

    /// Nothing has come and nothing runs: pending, unless the client took too long.
    fn poll_wait(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.shared.is_answering() || !matches!(self.framing, Framing::Head(_)) {
            self.wait.clear();
            return Poll::Pending;
        }
        let begun = !self.held.is_empty();
        if !self.wait.is_set() || (begun && !self.head_begun) {
            let limit = if begun {
                self.timeouts.head
            } else {
                self.timeouts.idle
            };
            self.head_begun = begun;
            if !begun {
                self.shared.rest();
            }
            self.wait.set(now_us() + limit.as_micros() as u64);
        }
        self.wait.poll(cx)
    }

    fn refuse(&mut self, reason: HeadError) {
        self.framing = Framing::Refused;
        self.held.clear();
        self.held.extend_from_slice(b"!");
        self.held.extend_from_slice(reason.token().as_bytes());
        self.held
            .extend_from_slice(b" / HTTP/1.1\r\nhost: -\r\nconnection: close\r\n\r\n");
        self.released = self.held.len();
    }

    /// Fails a write that has made no progress for too long, or whose request has run out of time.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if !self.stalled.is_set() {
            self.stalled
                .set(now_us() + self.timeouts.write.as_micros() as u64);
        }
        let late =
            self.shared.is_answering() && self.shared.deadline.borrow_mut().poll(cx).is_ready();
        if late || self.stalled.poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }

    fn progressed(
        &mut self,
        written: Poll<io::Result<usize>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if written.is_pending() {
            return self.poll_stalled(cx);
        }
        self.stalled.clear();
        written
    }

    /// Takes and forgets what a client sends after we have stopped reading it.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.lingering.is_set() {
            self.lingering.set(now_us() + LINGER_US);
        }
        if self.lingering.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let mut scratch = [std::mem::MaybeUninit::uninit(); 8192];
        let mut taken = 0;
        while taken < LINGER_TURN_BYTES {
            let mut buffer = ReadBuf::uninit(&mut scratch);
            let read = Pin::new(&mut *self.shared.stream.borrow_mut()).poll_read(cx, &mut buffer);
            match ready!(read) {
                Ok(()) if !buffer.filled().is_empty() => taken += buffer.filled().len(),
                _ => return Poll::Ready(()),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Framing {
    /// How many of `bytes` may be handed on: all but the beginning of a head that is not whole.
    fn check(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut at = 0;
        while at < bytes.len() {
            match self {
                Self::Body(left) => {
                    let taken = (*left).min((bytes.len() - at) as u64);
                    at += taken as usize;
                    *left -= taken;
                    if *left == 0 {
                        *self = Self::Head(Head::default());
                    }
                }
                Self::Chunks(chunks) => {
                    let (taken, done) = chunks.take(&bytes[at..])?;
                    at += taken;
                    if done {
                        *self = Self::Head(Head::default());
                    }
                }
                Self::Head(head) => {
                    let end = match head.find_end(&bytes[at..]) {
                        Ok(Some(end)) => end,
                        Ok(None) => return Ok(at),
                        Err(reason) => {
                            *self = Self::Refusing(reason);
                            return Ok(at);
                        }
                    };
                    *self = match check_head(&bytes[at..at + end]) {
                        Ok(next) => next.into(),
                        Err(reason) => {
                            *self = Self::Refusing(reason);
                            return Ok(at);
                        }
                    };
                    at += end;
                }
                Self::Refusing(_) | Self::Refused => return Ok(at),
            }
        }
        Ok(at)
    }
}

impl From<Length> for Framing {
    fn from(length: Length) -> Self {
        match length {
            Length::Known(0) => Self::Head(Head::default()),
            Length::Known(bytes) => Self::Body(bytes),
            Length::Chunked => Self::Chunks(Chunks::default()),
        }
    }
}

impl AsyncRead for Guard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.released > 0 {
                let count = this.released.min(buf.remaining());
                buf.put_slice(&this.held[..count]);
                this.held.advance(count);
                this.released -= count;
                return Poll::Ready(Ok(()));
            }
            match this.framing {
                // What came before the refused head has been handed on.
                Framing::Refusing(reason) => {
                    this.refuse(reason);
                    continue;
                }
                Framing::Refused => return Poll::Pending,
                Framing::Head(_) | Framing::Body(_) | Framing::Chunks(_) => {}
            }
            let checked = if this.held.is_empty() {
                let before = buf.filled().len();
                let polled = Pin::new(&mut *this.shared.stream.borrow_mut()).poll_read(cx, buf)?;
                match polled {
                    Poll::Ready(()) => {}
                    Poll::Pending => {
                        ready!(this.poll_wait(cx));
                        // A connection that rests too long is closed without a word; one whose
                        // first head never came as well.
                        return Poll::Ready(Ok(()));
                    }
                }
                let read = buf.filled().len() - before;
                if read == 0 {
                    return Poll::Ready(Ok(()));
                }
                this.shared.heard();
                let checked = this.framing.check(&buf.filled()[before..])?;
                if checked < read {
                    this.held
                        .extend_from_slice(&buf.filled()[before + checked..]);
                    buf.set_filled(before + checked);
                }
                checked
            } else {
                this.held.reserve(4096);
                let polled = poll_read_buf(
                    Pin::new(&mut *this.shared.stream.borrow_mut()),
                    cx,
                    &mut this.held,
                )?;
                match polled {
                    Poll::Ready(0) => return Poll::Ready(Ok(())),
                    Poll::Ready(_) => {}
                    Poll::Pending => {
                        ready!(this.poll_wait(cx));
                        this.refuse(HeadError::Slow);
                        continue;
                    }
                }
                this.released = this.framing.check(&this.held)?;
                0
            };
            if this.released > 0 || checked > 0 {
                this.shared.ahead.set(false);
                this.wait.clear();
            }
            if checked > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Guard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut *self.shared.stream.borrow_mut()).poll_write(cx, buf);
        self.progressed(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = poll_write_pieces(&mut self.shared.stream.borrow_mut(), cx, bufs);
        self.progressed(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.shared.stream.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut *self.shared.stream.borrow_mut()).poll_shutdown(cx))?;
        let whole = matches!(self.framing, Framing::Head(_)) && self.held.is_empty();
        if !whole {
            ready!(self.poll_linger(cx));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_connection_rests_only_while_nothing_is_asked_on_it_and_nothing_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
        let shared = Shared::new(stream.unwrap());
        assert!(shared.resting_since().is_some());
        shared.heard();
        assert!(shared.resting_since().is_none());
        shared.begin_answer();
        // A next request may come meanwhile, and the guard may find nothing to read.
        shared.heard();
        shared.rest();
        assert!(shared.is_answering());
        assert!(shared.resting_since().is_none());
        shared.end_answer();
        assert!(!shared.is_answering());
        shared.rest();
        assert!(shared.resting_since().is_some());
        shared.end_answer();
        assert!(shared.resting_since().is_some());
    }
}
