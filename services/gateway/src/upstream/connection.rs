//! A connection in use: the request is sent while the response is received, in case the instance
//! responds early.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use http_body::Body;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

use super::body::ResponseReader;
use super::count_guard::CountGuard;
use super::head::{MalformedResponse, ResponseHead, UpstreamRequest};
use crate::body::{BodyError, RequestBody};
use crate::socket::{COALESCE_BYTES_MAX, poll_write_coalesced};

/// Reads up to this size are copied to a buffer of their exact size.
const READ_SMALL: usize = 8 * 1024;
/// Buffer size of a read if more is expected.
const READ_LARGE: usize = 128 * 1024;
/// Bodies of known length up to this size are passed on once all of them has arrived, so that a response that
/// breaks off can be refused instead of cut.
const HELD_BYTES_MAX: u64 = 64 * 1024;
/// A head buffer that has grown beyond this is not kept.
const TEXT_MAX: usize = 16 * 1024;

thread_local! {
    /// Buffer for heads: one per thread, as long as heads are sent in one piece.
    static TEXT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Why there is no response, or only part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamError {
    #[error("the response is not valid HTTP/1.1")]
    Malformed,
    #[error("the instance closed the connection early")]
    ClosedEarly,
    #[error("the request body cannot be forwarded")]
    RequestBody,
}

impl From<MalformedResponse> for UpstreamError {
    fn from(_: MalformedResponse) -> Self {
        Self::Malformed
    }
}

impl From<BodyError> for UpstreamError {
    fn from(_: BodyError) -> Self {
        Self::RequestBody
    }
}

/// A request to an instance and its response, and the connection that they occupy. `Outgoing`
/// tracks how much of the request is sent, `ResponseReader` how much of the response is received.
#[derive(Debug)]
pub struct Upstream {
    pub(super) stream: TcpStream,
    outgoing: Outgoing,
    reader: ResponseReader,
    /// Whether the last read filled its buffer.
    last_read_full: bool,
    /// Counts the connection while it is open.
    _count: CountGuard,
}

impl Upstream {
    pub(super) fn new(stream: TcpStream, count: CountGuard) -> Self {
        Self {
            stream,
            outgoing: Outgoing::default(),
            reader: ResponseReader::new(),
            last_read_full: false,
            _count: count,
        }
    }

    /// Starts a request. It is sent while waiting for the response.
    pub(super) fn begin(&mut self, request: &UpstreamRequest<'_>, body: RequestBody) {
        self.reader.begin(request.method);
        self.outgoing.begin(request, body);
    }

    /// Waits for the response head, while still sending the request.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        spare: &mut HeaderMap,
    ) -> Poll<Result<Box<ResponseHead>, UpstreamError>> {
        self.poll_send(cx)?;
        loop {
            if let Some(head) = self.reader.head(spare)? {
                return Poll::Ready(Ok(head));
            }
            if ready!(self.poll_read(cx)).unwrap_or_default() == 0 {
                self.reader.on_close()?;
                return Poll::Ready(Err(UpstreamError::ClosedEarly));
            }
        }
    }

    /// Whether the response may be passed on: all of its body has arrived, if that is short, or a part of it,
    /// or its length is unknown, as of a stream of events.
    pub fn is_begun(&self) -> bool {
        match self.reader.exact_length() {
            Some(length) if length <= HELD_BYTES_MAX => self.reader.is_buffered(),
            Some(_) => self.reader.unread_bytes() > 0,
            None => true,
        }
    }

    /// Bytes that have arrived and were not taken.
    pub fn unread_bytes(&self) -> usize {
        self.reader.unread_bytes()
    }

    /// Waits until the response may be passed on, while still sending the request.
    pub fn poll_begun(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), UpstreamError>> {
        self.poll_send(cx)?;
        while !self.is_begun() {
            if ready!(self.poll_read(cx)).unwrap_or_default() == 0 {
                return Poll::Ready(Err(UpstreamError::ClosedEarly));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Returns the next piece of the response body; `None` once it is complete.
    pub fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, UpstreamError>>> {
        if let Err(broken) = self.poll_send(cx) {
            return Poll::Ready(Some(Err(broken)));
        }
        loop {
            match self.reader.data() {
                Ok(Some(data)) => return Poll::Ready(Some(Ok(data))),
                Ok(None) if self.reader.is_complete() => return Poll::Ready(None),
                Ok(None) => {}
                Err(malformed) => return Poll::Ready(Some(Err(malformed.into()))),
            }
            let can_continue = match ready!(self.poll_read(cx)) {
                Ok(0) => self.reader.on_close().unwrap_or_default(),
                read => read.is_ok(),
            };
            if !can_continue {
                return Poll::Ready(Some(Err(UpstreamError::ClosedEarly)));
            }
        }
    }

    /// Takes the whole body, in at most one piece, if it arrived with the head.
    pub fn take_buffered(&mut self) -> Option<Option<Bytes>> {
        if !self.reader.is_buffered() {
            return None;
        }
        self.reader.data().ok()
    }

    /// Whether the instance has sent any part of a response.
    pub fn has_response(&self) -> bool {
        self.reader.has_begun()
    }

    /// Whether the socket accepted no byte of the request, so that no instance can have read any.
    /// Nothing else proves that: the reset after a close looks the same whether the request arrived
    /// after the close or was partly read before it.
    pub fn is_unsent(&self) -> bool {
        !self.outgoing.has_sent
    }

    /// How far the request has been sent.
    pub fn send_progress(&self) -> SendProgress {
        let unsent = self.outgoing.unsent();
        SendProgress {
            unsent,
            awaits_client: self.outgoing.stage == SendStage::Body && unsent == 0,
            is_sent: self.outgoing.is_sent(),
        }
    }

    /// Whether the response is complete.
    pub fn is_complete(&self) -> bool {
        self.reader.is_complete()
    }

    /// The exact remaining length of the response body, if known.
    pub fn exact_length(&self) -> Option<u64> {
        self.reader.exact_length()
    }

    /// Whether it can serve another request: the response is complete and the request was fully sent.
    pub(super) fn is_reusable(&self) -> bool {
        self.reader.is_reusable() && self.outgoing.is_sent()
    }

    /// Sends what is left of the request. An instance that stops reading it may still have
    /// responded, so only a failing body is an error.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<(), UpstreamError> {
        if self.outgoing.stage == SendStage::Sent {
            return Ok(());
        }
        match self.outgoing.poll(&mut self.stream, cx) {
            Poll::Ready(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Reads once into the reader. 0 bytes means end of stream.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let large = self.last_read_full || self.reader.known_remaining() > READ_SMALL as u64;
        let bytes = if large {
            ready!(self.poll_read_large(cx))?
        } else {
            let mut buffer = [MaybeUninit::uninit(); READ_SMALL];
            let mut buffer = ReadBuf::uninit(&mut buffer);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
            self.last_read_full = buffer.remaining() == 0;
            Bytes::copy_from_slice(buffer.filled())
        };
        let read = bytes.len();
        self.reader.push(bytes);
        Poll::Ready(Ok(read))
    }

    fn poll_read_large(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        // Do not allocate before there is something to read.
        ready!(self.stream.poll_read_ready(cx))?;
        let known_remaining = usize::try_from(self.reader.known_remaining()).unwrap_or(READ_LARGE);
        // With some spare capacity, a read that returns everything shows that nothing is left.
        let capacity = if known_remaining > READ_SMALL {
            known_remaining.saturating_add(128).min(READ_LARGE)
        } else {
            READ_LARGE
        };
        let mut buffer = BytesMut::with_capacity(capacity);
        let read = ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut buffer))?;
        self.last_read_full = read == capacity;
        Poll::Ready(Ok(if read <= capacity / 4 {
            // Do not keep a large buffer for little data.
            Bytes::copy_from_slice(&buffer)
        } else {
            buffer.freeze()
        }))
    }
}

/// How far a request has been sent, to tell who is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendProgress {
    /// Bytes that the instance has not accepted yet.
    unsent: usize,
    /// Whether everything that has arrived from the client is sent, and more is to come.
    pub awaits_client: bool,
    /// Whether all of it is sent.
    pub is_sent: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum SendStage {
    /// More of the body is to come.
    Body,
    /// The rest is buffered.
    Rest,
    #[default]
    Sent,
    /// The instance stopped reading.
    Refused,
    /// The client's body failed.
    Failed,
}

/// A request being sent. Holds at most one piece of its body.
#[derive(Debug, Default)]
struct Outgoing {
    stage: SendStage,
    chunked: bool,
    body: RequestBody,
    /// The head, or a chunk's size line.
    text: Vec<u8>,
    /// How much of it is sent.
    text_sent: usize,
    data: Bytes,
    /// What follows a chunk's data.
    tail: &'static [u8],
    /// Whether the socket accepted any byte.
    has_sent: bool,
}

impl Outgoing {
    fn begin(&mut self, request: &UpstreamRequest<'_>, mut body: RequestBody) {
        self.text = TEXT.take();
        self.text.clear();
        self.text_sent = 0;
        self.has_sent = false;
        self.tail = b"";
        self.chunked = body.size_hint().exact().is_none();
        request.write(&mut self.text, self.chunked);
        self.data = body.take_full();
        if !self.data.is_empty() && self.text.len() + self.data.len() <= COALESCE_BYTES_MAX {
            self.text.extend_from_slice(&self.data);
            self.data = Bytes::new();
        }
        self.stage = if body.is_end_stream() && !self.chunked {
            SendStage::Rest
        } else {
            SendStage::Body
        };
        self.body = body;
    }

    fn is_sent(&self) -> bool {
        self.stage == SendStage::Sent
    }

    fn unsent(&self) -> usize {
        self.text.len() - self.text_sent + self.data.len() + self.tail.len()
    }

    /// Sends what is available; ready once everything is sent or the instance stops reading.
    fn poll(
        &mut self,
        stream: &mut TcpStream,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), BodyError>> {
        loop {
            match self.stage {
                SendStage::Sent | SendStage::Refused => return Poll::Ready(Ok(())),
                SendStage::Failed => return Poll::Ready(Err(BodyError)),
                SendStage::Body if self.data.is_empty() && self.tail.is_empty() => {
                    if self.poll_piece(cx)?.is_pending() && self.unsent() == 0 {
                        return Poll::Pending;
                    }
                }
                SendStage::Body | SendStage::Rest => {}
            }
            while self.unsent() > 0 {
                match ready!(self.poll_write(stream, cx)) {
                    Ok(written) if written > 0 => self.advance(written),
                    _ => {
                        self.stop(SendStage::Refused);
                        return Poll::Ready(Ok(()));
                    }
                }
            }
            if self.stage == SendStage::Rest {
                self.stop(SendStage::Sent);
            }
        }
    }

    /// Gets the next piece of the body.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                self.stop(SendStage::Failed);
                return Poll::Ready(Err(error));
            }
            None => {
                self.stage = SendStage::Rest;
                self.tail = if self.chunked { b"0\r\n\r\n" } else { b"" };
                return Poll::Ready(Ok(()));
            }
        };
        // Trailers are hop-by-hop, like the header that announces them.
        self.data = frame.into_data().unwrap_or_default();
        let ended = self.body.is_end_stream();
        if ended {
            self.stage = SendStage::Rest;
        }
        if self.chunked {
            self.tail = match (self.data.is_empty(), ended) {
                (true, true) => b"0\r\n\r\n",
                (true, false) => b"",
                (false, true) => b"\r\n0\r\n\r\n",
                (false, false) => b"\r\n",
            };
            if !self.data.is_empty() {
                let size = format!("{:x}\r\n", self.data.len());
                self.text.extend_from_slice(size.as_bytes());
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(
        &mut self,
        stream: &mut TcpStream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let text = &self.text[self.text_sent..];
        if self.data.is_empty() && self.tail.is_empty() {
            return Pin::new(stream).poll_write(cx, text);
        }
        let pieces = [text, &self.data, self.tail].map(IoSlice::new);
        poll_write_coalesced(stream, cx, &pieces)
    }

    fn advance(&mut self, mut written: usize) {
        self.has_sent = true;
        let text = written.min(self.text.len() - self.text_sent);
        self.text_sent += text;
        written -= text;
        if self.text_sent == self.text.len() {
            self.text.clear();
            self.text_sent = 0;
        }
        let data = written.min(self.data.len());
        self.data.advance(data);
        self.tail = &self.tail[written - data..];
    }

    /// Stops sending and returns the buffer for the thread's next request.
    fn stop(&mut self, stage: SendStage) {
        self.stage = stage;
        self.body = RequestBody::EMPTY;
        self.data = Bytes::new();
        self.tail = b"";
        let text = std::mem::take(&mut self.text);
        self.text_sent = 0;
        if text.capacity() <= TEXT_MAX {
            TEXT.set(text);
        }
    }
}
