//! Validates what a client sends before the HTTP server sees it. The guard tracks the framing of a
//! connection. It passes on request heads only once they are complete and valid, and bodies as they
//! arrive. So no request can be parsed differently here and by an instance, and heads that are too
//! long, too slow or malformed get the same kind of response as any other refusal.
//!
//! A refused head is replaced by one whose method is `!` and the reason, which the service
//! recognizes; no client can send such a method, since the guard refuses it.

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

use crate::framing::{BodyLength, ChunkParser, HeadError, HeadScanner, SeenHeads, check_head};
use crate::socket::poll_write_coalesced;
use crate::timer::{Deadline, now_us};
use crate::wake_coalescer::WakeCoalescer;

/// State of a client connection.
///
/// ```text
/// Idle -on_data-> Reading -begin_response-> Responding -end_response-> Reading -set_idle-> Idle
/// ```
#[derive(Clone, Copy, Debug)]
enum ConnectionPhase {
    /// No request is in progress.
    Idle { since_us: u64 },
    /// A request may be arriving; the guard has not yet found that there is nothing to read.
    Reading,
    /// A request is being handled: no idle or head timeout runs.
    Responding,
}

/// State that the guard and the service of one connection share.
#[derive(Debug)]
pub struct ConnectionState {
    phase: Cell<ConnectionPhase>,
    /// The deadline of the current request's phase.
    pub deadline: RefCell<Deadline>,
    /// When the current request must have ended, once it has been sent to an instance. The deadline may be
    /// earlier, which says nothing about a client that is slow to read.
    pub request_end_us: Cell<Option<u64>>,
    /// Wake-ups among the client connection, its service and its guard.
    pub wakes: WakeCoalescer,
    /// Whether it is being closed to make way for another connection.
    pub is_closing: Cell<bool>,
    stream: RefCell<TcpStream>,
    /// Whether more of the current request's body is to arrive.
    is_receiving: Cell<bool>,
    /// Whether nothing of the current response has been written yet, if it is a streamed one.
    is_unwritten: Cell<bool>,
    /// Whether the client has already sent more than the current request, so it is still connected.
    has_pipelined_data: Cell<bool>,
    /// When to check next whether a client that is still uploading has disconnected.
    next_check: RefCell<Deadline>,
    seen_heads: RefCell<SeenHeads>,
}

/// Interval between disconnect checks while a client's body is blocked on the instance.
const DISCONNECT_CHECK_US: u64 = 250_000;

impl ConnectionState {
    pub fn new(stream: TcpStream) -> Self {
        Self {
            phase: Cell::new(ConnectionPhase::Idle { since_us: now_us() }),
            deadline: RefCell::default(),
            request_end_us: Cell::default(),
            wakes: WakeCoalescer::default(),
            is_closing: Cell::default(),
            stream: RefCell::new(stream),
            is_receiving: Cell::default(),
            is_unwritten: Cell::default(),
            has_pipelined_data: Cell::default(),
            next_check: RefCell::default(),
            seen_heads: RefCell::default(),
        }
    }

    /// Called when handling of a request begins.
    pub fn begin_response(&self) {
        self.request_end_us.set(None);
        self.phase.set(ConnectionPhase::Responding);
    }

    /// Called when the response has been handed over or abandoned.
    pub fn end_response(&self) {
        if self.is_responding() {
            self.phase.set(ConnectionPhase::Reading);
        }
    }

    /// Whether any request so far had the client's own id.
    pub fn has_request_ids(&self) -> bool {
        self.seen_heads.borrow().has_request_id
    }

    /// Whether any request so far named a deployment.
    pub fn names_deployments(&self) -> bool {
        self.seen_heads.borrow().names_deployment
    }

    /// Whether more of the current request's body is to arrive.
    pub fn is_receiving(&self) -> bool {
        self.is_receiving.get()
    }

    /// Called when the head of a streamed response is handed over.
    pub fn begin_stream(&self) {
        self.is_unwritten.set(true);
    }

    /// Whether nothing of the streamed response has been written yet. Its task is woken once something has.
    pub fn is_unwritten(&self) -> bool {
        self.is_unwritten.get()
    }

    /// Makes the close of the connection a reset, so that the client cannot take it for the end of the
    /// response.
    pub fn reset_on_close(&self) {
        // If it fails, the connection is gone already.
        let _ = self.stream.borrow().set_zero_linger();
    }

    /// Whether the current request has taken as long as its deployment allows.
    pub fn is_request_over(&self) -> bool {
        let end_us = self.request_end_us.get();
        end_us.is_some_and(|end_us| now_us() >= end_us)
    }

    fn is_responding(&self) -> bool {
        matches!(self.phase.get(), ConnectionPhase::Responding)
    }

    /// Since when the connection has been idle, in microseconds of `now_us`; `None` if it is not.
    pub fn idle_since(&self) -> Option<u64> {
        match self.phase.get() {
            ConnectionPhase::Idle { since_us } => Some(since_us),
            ConnectionPhase::Reading | ConnectionPhase::Responding => None,
        }
    }

    /// Called when data has arrived from the client.
    fn on_data(&self) {
        if let ConnectionPhase::Idle { .. } = self.phase.get() {
            self.phase.set(ConnectionPhase::Reading);
        }
    }

    /// Called when no request is in progress and there is nothing to read.
    fn set_idle(&self) {
        if !self.is_responding() {
            let since_us = now_us();
            self.phase.set(ConnectionPhase::Idle { since_us });
        }
    }

    /// Ready once the client has closed its connection while its fully received request is being
    /// handled. The server could detect this too, but would allocate a full read buffer on each
    /// check.
    pub fn poll_disconnect(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.has_pipelined_data.get() {
            return Poll::Pending;
        }
        let mut byte = [std::mem::MaybeUninit::uninit(); 1];
        let mut byte = ReadBuf::uninit(&mut byte);
        match ready!(self.stream.borrow().poll_peek(cx, &mut byte)) {
            Ok(0) | Err(_) => Poll::Ready(()),
            Ok(_) => {
                self.has_pipelined_data.set(true);
                Poll::Pending
            }
        }
    }

    /// Like `poll_disconnect`, while the request's body is being streamed. An instance that does
    /// not read stops us from reading too, and a close is queued behind the unread bytes. Those
    /// would also make a peek ready immediately, so this checks the socket's state periodically
    /// instead.
    pub fn poll_disconnect_while_uploading(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut next_check = self.next_check.borrow_mut();
        if !next_check.is_set() {
            next_check.set(now_us() + DISCONNECT_CHECK_US);
        }
        while next_check.poll(cx).is_ready() {
            if self.is_closed() {
                return Poll::Ready(());
            }
            next_check.set(now_us() + DISCONNECT_CHECK_US);
        }
        Poll::Pending
    }

    /// Whether the client has closed or reset its connection. Makes no system call.
    fn is_closed(&self) -> bool {
        let stream = self.stream.borrow();
        let ready = pin!(stream.ready(Interest::READABLE));
        let readiness = ready.poll(&mut Context::from_waker(Waker::noop()));
        matches!(readiness, Poll::Ready(Ok(ready)) if ready.is_read_closed())
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    pub head: Duration,
    pub idle: Duration,
    pub write: Duration,
}

/// How long a refused client's remaining data is drained, so that it reads our response before the
/// connection is reset (nginx's `lingering_timeout`).
const LINGER_US: u64 = 5_000_000;
/// Bytes to drain before yielding.
const LINGER_BYTES_PER_POLL: usize = 256 * 1024;

#[derive(Debug)]
enum RequestFraming {
    /// Inside or before a head.
    Head(HeadScanner),
    /// Bytes of body remaining.
    Body(u64),
    Chunks(ChunkParser),
    /// Everything after the validated bytes is refused for this reason, once those have been passed
    /// on.
    Refusing(HeadError),
    /// The refusal has been passed on; nothing more is read from this client.
    Refused,
    /// The body is malformed after the validated bytes: reading fails once those have been passed on, so that
    /// their request is refused.
    Broken,
}

#[derive(Debug)]
pub struct Guard {
    connection: Rc<ConnectionState>,
    timeouts: Timeouts,
    framing: RequestFraming,
    /// Data that was read and not passed on: `ready_len` validated bytes, then the beginning of a
    /// head.
    buffer: BytesMut,
    ready_len: usize,
    /// Whether `read_deadline` covers the rest of a head or a connection's first head.
    is_head_begun: bool,
    read_deadline: Deadline,
    write_deadline: Deadline,
    linger_deadline: Deadline,
}

impl Guard {
    pub fn new(connection: Rc<ConnectionState>, timeouts: Timeouts) -> Self {
        let mut read_deadline = Deadline::default();
        read_deadline.set(now_us() + timeouts.head.as_micros() as u64);
        Self {
            connection,
            timeouts,
            framing: RequestFraming::Head(HeadScanner::default()),
            buffer: BytesMut::new(),
            ready_len: 0,
            is_head_begun: true,
            read_deadline,
            write_deadline: Deadline::default(),
            linger_deadline: Deadline::default(),
        }
    }

    /// Called when there is nothing to read: pending until the client takes too long.
    fn poll_read_timeout(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.connection.is_responding() || !matches!(self.framing, RequestFraming::Head(_)) {
            self.read_deadline.clear();
            return Poll::Pending;
        }
        // Empty lines were passed on, so the HTTP server does not take the connection for idle either.
        let has_skipped =
            matches!(&self.framing, RequestFraming::Head(head) if head.has_skipped_lines());
        let is_begun = has_skipped || !self.buffer.is_empty();
        if !self.read_deadline.is_set() || (is_begun && !self.is_head_begun) {
            let limit = if is_begun {
                self.timeouts.head
            } else {
                self.timeouts.idle
            };
            self.is_head_begun = is_begun;
            if !is_begun {
                self.connection.set_idle();
            }
            self.read_deadline.set(now_us() + limit.as_micros() as u64);
        }
        self.read_deadline.poll(cx)
    }

    fn refuse(&mut self, reason: HeadError) {
        self.framing = RequestFraming::Refused;
        self.buffer.clear();
        self.buffer.extend_from_slice(b"!");
        self.buffer.extend_from_slice(reason.token().as_bytes());
        self.buffer
            .extend_from_slice(b" / HTTP/1.1\r\nhost: -\r\nconnection: close\r\n\r\n");
        self.ready_len = self.buffer.len();
    }

    /// Fails a write that has made no progress for too long, or whose request has timed out.
    fn poll_write_timeout(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if !self.write_deadline.is_set() {
            self.write_deadline
                .set(now_us() + self.timeouts.write.as_micros() as u64);
        }
        let end_us = self.connection.request_end_us.get();
        let is_late = end_us.is_some_and(|end_us| {
            let mut deadline = self.connection.deadline.borrow_mut();
            self.connection.is_responding() && deadline.poll_until(cx, end_us).is_ready()
        });
        if is_late || self.write_deadline.poll(cx).is_ready() {
            self.connection.reset_on_close();
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }

    fn track_write(
        &mut self,
        written: Poll<io::Result<usize>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if written.is_pending() {
            return self.poll_write_timeout(cx);
        }
        if self.connection.is_unwritten.replace(false) {
            cx.waker().wake_by_ref();
        }
        self.write_deadline.clear();
        written
    }

    /// Discards what a client sends after we have stopped reading requests.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.linger_deadline.is_set() {
            self.linger_deadline.set(now_us() + LINGER_US);
        }
        if self.linger_deadline.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let mut scratch = [std::mem::MaybeUninit::uninit(); 8192];
        let mut taken = 0;
        while taken < LINGER_BYTES_PER_POLL {
            let mut buffer = ReadBuf::uninit(&mut scratch);
            let read =
                Pin::new(&mut *self.connection.stream.borrow_mut()).poll_read(cx, &mut buffer);
            match ready!(read) {
                Ok(()) if !buffer.filled().is_empty() => taken += buffer.filled().len(),
                _ => return Poll::Ready(()),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl RequestFraming {
    /// Returns how many of `bytes` may be passed on: all but the beginning of an incomplete head.
    fn check(&mut self, bytes: &[u8], seen: &mut SeenHeads) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            match self {
                Self::Body(remaining) => {
                    let taken = (*remaining).min((bytes.len() - at) as u64);
                    at += taken as usize;
                    *remaining -= taken;
                    if *remaining == 0 {
                        *self = Self::Head(HeadScanner::default());
                    }
                }
                Self::Chunks(chunks) => {
                    let Ok((taken, done)) = chunks.consume(&bytes[at..]) else {
                        *self = Self::Broken;
                        return at;
                    };
                    at += taken;
                    if done {
                        *self = Self::Head(HeadScanner::default());
                    }
                }
                Self::Head(head) => {
                    // Passed on: the HTTP server skips them too.
                    at += head.skip_empty_lines(&bytes[at..]);
                    let end = match head.find_end(&bytes[at..]) {
                        Ok(Some(end)) => end,
                        Ok(None) => return at,
                        Err(reason) => {
                            *self = Self::Refusing(reason);
                            return at;
                        }
                    };
                    *self = match check_head(&bytes[at..at + end], seen) {
                        Ok(next) => next.into(),
                        Err(reason) => {
                            *self = Self::Refusing(reason);
                            return at;
                        }
                    };
                    at += end;
                }
                Self::Refusing(_) | Self::Refused | Self::Broken => return at,
            }
        }
        at
    }
}

impl From<BodyLength> for RequestFraming {
    fn from(length: BodyLength) -> Self {
        match length {
            BodyLength::Known(0) => Self::Head(HeadScanner::default()),
            BodyLength::Known(bytes) => Self::Body(bytes),
            BodyLength::Chunked => Self::Chunks(ChunkParser::default()),
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
            if this.ready_len > 0 {
                let count = this.ready_len.min(buf.remaining());
                buf.put_slice(&this.buffer[..count]);
                this.buffer.advance(count);
                this.ready_len -= count;
                return Poll::Ready(Ok(()));
            }
            match this.framing {
                // Everything before the refused head has been passed on.
                RequestFraming::Refusing(reason) => {
                    this.refuse(reason);
                    continue;
                }
                RequestFraming::Refused => return Poll::Pending,
                RequestFraming::Broken => {
                    return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
                }
                RequestFraming::Head(_) | RequestFraming::Body(_) | RequestFraming::Chunks(_) => {}
            }
            let checked = if this.buffer.is_empty() {
                let before = buf.filled().len();
                let polled =
                    Pin::new(&mut *this.connection.stream.borrow_mut()).poll_read(cx, buf)?;
                match polled {
                    Poll::Ready(()) => {}
                    Poll::Pending => {
                        ready!(this.poll_read_timeout(cx));
                        // Idle timeouts, and first heads that never arrive, close the connection
                        // without a response.
                        return Poll::Ready(Ok(()));
                    }
                }
                let read = buf.filled().len() - before;
                if read == 0 {
                    return Poll::Ready(Ok(()));
                }
                this.connection.on_data();
                let mut seen = this.connection.seen_heads.borrow_mut();
                let checked = this.framing.check(&buf.filled()[before..], &mut seen);
                if checked < read {
                    this.buffer
                        .extend_from_slice(&buf.filled()[before + checked..]);
                    buf.set_filled(before + checked);
                }
                checked
            } else {
                this.buffer.reserve(4096);
                let polled = poll_read_buf(
                    Pin::new(&mut *this.connection.stream.borrow_mut()),
                    cx,
                    &mut this.buffer,
                )?;
                match polled {
                    Poll::Ready(0) => return Poll::Ready(Ok(())),
                    Poll::Ready(_) => {}
                    Poll::Pending => {
                        ready!(this.poll_read_timeout(cx));
                        this.refuse(HeadError::Slow);
                        continue;
                    }
                }
                let mut seen = this.connection.seen_heads.borrow_mut();
                this.ready_len = this.framing.check(&this.buffer, &mut seen);
                0
            };
            let is_receiving = !matches!(this.framing, RequestFraming::Head(_));
            this.connection.is_receiving.set(is_receiving);
            if this.ready_len > 0 || checked > 0 {
                this.connection.has_pipelined_data.set(false);
                this.read_deadline.clear();
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
        let written = Pin::new(&mut *self.connection.stream.borrow_mut()).poll_write(cx, buf);
        self.track_write(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = poll_write_coalesced(&mut self.connection.stream.borrow_mut(), cx, bufs);
        self.track_write(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.connection.stream.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut *self.connection.stream.borrow_mut()).poll_shutdown(cx))?;
        let is_between_requests =
            matches!(self.framing, RequestFraming::Head(_)) && self.buffer.is_empty();
        if !is_between_requests {
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
    async fn a_connection_is_idle_only_without_a_request_or_response_in_progress() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
        let connection = ConnectionState::new(stream.unwrap());
        assert!(connection.idle_since().is_some());
        connection.on_data();
        assert!(connection.idle_since().is_none());
        connection.begin_response();
        // Another request may arrive meanwhile, and the guard may find nothing to read.
        connection.on_data();
        connection.set_idle();
        assert!(connection.is_responding());
        assert!(connection.idle_since().is_none());
        connection.end_response();
        assert!(!connection.is_responding());
        connection.set_idle();
        assert!(connection.idle_since().is_some());
        connection.end_response();
        assert!(connection.idle_since().is_some());
    }
}
