//! A connection in use: a request goes out, its answer comes in, both at once where the instance
//! answers early.

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

use super::body::Reader;
use super::counted::Counted;
use super::head::{Ask, Head, Malformed};
use super::idle::Idle;
use crate::body::{BodyError, RequestBody};
use crate::socket::{JOINED_MAX, poll_write_pieces};

/// Up to this size what is read is copied to where it just fits.
const READ_SMALL: usize = 8 * 1024;
/// Room for one read where more is to come.
const READ_LARGE: usize = 128 * 1024;
/// A head's buffer that has grown beyond this is not kept.
const TEXT_MAX: usize = 16 * 1024;

thread_local! {
    /// What heads are written into: one buffer per thread, as long as they go out in one piece.
    static TEXT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Why there is no answer, or no whole one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("the answer is not valid HTTP/1.1")]
    Malformed,
    #[error("the instance broke off")]
    Off,
    #[error("the request's body cannot be passed on")]
    Request,
}

impl From<Malformed> for Broken {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl From<BodyError> for Broken {
    fn from(_: BodyError) -> Self {
        Self::Request
    }
}

/// A request to an instance and its answer, and the connection that they have to themselves. It is
/// sent and answered at once: how far it is sent is told by `Outgoing`, how far it is answered by
/// `Reader`.
#[derive(Debug)]
pub struct Upstream {
    pub(super) stream: TcpStream,
    outgoing: Outgoing,
    reader: Reader,
    /// The last read used all the room there was.
    filled: bool,
    /// Among the descriptors of this gateway, as long as it is open.
    _counted: Counted,
}

impl Upstream {
    pub(super) fn new(stream: TcpStream, counted: Counted) -> Self {
        Self {
            stream,
            outgoing: Outgoing::default(),
            reader: Reader::new(),
            filled: false,
            _counted: counted,
        }
    }

    /// Begins a request. It goes out while its answer is waited for.
    pub(super) fn begin(&mut self, ask: &Ask<'_>, body: RequestBody) {
        self.reader.begin(ask.method);
        self.outgoing.begin(ask, body);
    }

    /// Waits for the head of the answer, while the request is still being sent.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        spare: &mut HeaderMap,
    ) -> Poll<Result<Box<Head>, Broken>> {
        self.send_on(cx)?;
        loop {
            if let Some(head) = self.reader.head(spare)? {
                return Poll::Ready(Ok(head));
            }
            if ready!(self.poll_read(cx)).unwrap_or_default() == 0 {
                self.reader.end()?;
                return Poll::Ready(Err(Broken::Off));
            }
        }
    }

    /// The next piece of the answer's body; none once it is whole.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
        if let Err(broken) = self.send_on(cx) {
            return Poll::Ready(Some(Err(broken)));
        }
        loop {
            match self.reader.data() {
                Ok(Some(data)) => return Poll::Ready(Some(Ok(data))),
                Ok(None) if self.reader.is_whole() => return Poll::Ready(None),
                Ok(None) => {}
                Err(malformed) => return Poll::Ready(Some(Err(malformed.into()))),
            }
            let goes_on = match ready!(self.poll_read(cx)) {
                Ok(0) => self.reader.end().unwrap_or_default(),
                read => read.is_ok(),
            };
            if !goes_on {
                return Poll::Ready(Some(Err(Broken::Off)));
            }
        }
    }

    /// The whole body where it came with the head, in at most one piece.
    pub fn take_at_hand(&mut self) -> Option<Option<Bytes>> {
        if !self.reader.is_at_hand() {
            return None;
        }
        self.reader.data().ok()
    }

    /// Whether the instance has sent anything for an answer.
    pub fn is_answered(&self) -> bool {
        self.reader.has_begun()
    }

    /// Whether the socket took not one byte of the request, so that no instance can have read any.
    /// Nothing else proves that: the reset that follows a close looks the same whether the request
    /// came after it or was read in part before it.
    pub fn none_sent(&self) -> bool {
        !self.outgoing.any_sent
    }

    /// The answer is whole.
    pub fn is_whole(&self) -> bool {
        self.reader.is_whole()
    }

    /// The exact length of what is left of the answer, where it is known.
    pub fn exact_length(&self) -> Option<u64> {
        self.reader.exact_length()
    }

    /// The connection for a next request, after a whole answer to a request that was sent to its
    /// end; closed otherwise.
    pub fn rest(self: Box<Self>) -> Option<Idle> {
        let is_over = self.reader.may_go_on() && self.outgoing.is_sent();
        is_over.then(|| Idle::after(self))
    }

    /// Sends what is left of the request. An instance that takes no more of it may still have
    /// answered, so only a body that fails is an error.
    fn send_on(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        if self.outgoing.stage == Stage::Sent {
            return Ok(());
        }
        match self.outgoing.poll(&mut self.stream, cx) {
            Poll::Ready(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Reads once, for the reader. Nothing read is the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let large = self.filled || self.reader.announced() > READ_SMALL as u64;
        let bytes = if large {
            ready!(self.poll_read_large(cx))?
        } else {
            let mut room = [MaybeUninit::uninit(); READ_SMALL];
            let mut room = ReadBuf::uninit(&mut room);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut room))?;
            self.filled = room.remaining() == 0;
            Bytes::copy_from_slice(room.filled())
        };
        let read = bytes.len();
        self.reader.push(bytes);
        Poll::Ready(Ok(read))
    }

    fn poll_read_large(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        // No room is made before there is something to read.
        ready!(self.stream.poll_read_ready(cx))?;
        let announced = usize::try_from(self.reader.announced()).unwrap_or(READ_LARGE);
        // With some room to spare a read that brings all leaves none to be looked for.
        let room = if announced > READ_SMALL {
            announced.saturating_add(128).min(READ_LARGE)
        } else {
            READ_LARGE
        };
        let mut buffer = BytesMut::with_capacity(room);
        let read = ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut buffer))?;
        self.filled = read == room;
        Poll::Ready(Ok(if read <= room / 4 {
            // A large room is not kept for little.
            Bytes::copy_from_slice(&buffer)
        } else {
            buffer.freeze()
        }))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// More of the body is to come.
    Body,
    /// The rest is here.
    Rest,
    #[default]
    Sent,
    /// The instance takes no more.
    Refused,
    /// The client's body cannot be had.
    Failed,
}

/// A request on its way out. At most one piece of its body is held.
#[derive(Debug, Default)]
struct Outgoing {
    stage: Stage,
    chunked: bool,
    body: RequestBody,
    /// The head, and what stands before a chunk.
    text: Vec<u8>,
    /// How much of it is sent.
    text_sent: usize,
    data: Bytes,
    /// What stands behind a chunk.
    tail: &'static [u8],
    /// The socket took some of it.
    any_sent: bool,
}

impl Outgoing {
    fn begin(&mut self, ask: &Ask<'_>, mut body: RequestBody) {
        self.text = TEXT.take();
        self.text.clear();
        self.text_sent = 0;
        self.any_sent = false;
        self.tail = b"";
        self.chunked = body.size_hint().exact().is_none();
        ask.write(&mut self.text, self.chunked);
        self.data = body.take_whole();
        if !self.data.is_empty() && self.text.len() + self.data.len() <= JOINED_MAX {
            self.text.extend_from_slice(&self.data);
            self.data = Bytes::new();
        }
        self.stage = if body.is_end_stream() && !self.chunked {
            Stage::Rest
        } else {
            Stage::Body
        };
        self.body = body;
    }

    fn is_sent(&self) -> bool {
        self.stage == Stage::Sent
    }

    fn unsent(&self) -> usize {
        self.text.len() - self.text_sent + self.data.len() + self.tail.len()
    }

    /// Sends what there is; ready once all is sent, or the instance takes no more.
    fn poll(
        &mut self,
        stream: &mut TcpStream,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), BodyError>> {
        loop {
            match self.stage {
                Stage::Sent | Stage::Refused => return Poll::Ready(Ok(())),
                Stage::Failed => return Poll::Ready(Err(BodyError)),
                Stage::Body if self.data.is_empty() && self.tail.is_empty() => {
                    if self.poll_piece(cx)?.is_pending() && self.unsent() == 0 {
                        return Poll::Pending;
                    }
                }
                Stage::Body | Stage::Rest => {}
            }
            while self.unsent() > 0 {
                match ready!(self.poll_write(stream, cx)) {
                    Ok(written) if written > 0 => self.advance(written),
                    _ => {
                        self.stop(Stage::Refused);
                        return Poll::Ready(Ok(()));
                    }
                }
            }
            if self.stage == Stage::Rest {
                self.stop(Stage::Sent);
            }
        }
    }

    /// Takes the next piece of the body.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                self.stop(Stage::Failed);
                return Poll::Ready(Err(error));
            }
            None => {
                self.stage = Stage::Rest;
                self.tail = if self.chunked { b"0\r\n\r\n" } else { b"" };
                return Poll::Ready(Ok(()));
            }
        };
        // Trailers belong to the hop, as the header that announces them.
        self.data = frame.into_data().unwrap_or_default();
        let ended = self.body.is_end_stream();
        if ended {
            self.stage = Stage::Rest;
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
        poll_write_pieces(stream, cx, &pieces)
    }

    fn advance(&mut self, mut written: usize) {
        self.any_sent = true;
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

    /// Nothing more goes out; the buffer is free for the next request of the thread.
    fn stop(&mut self, stage: Stage) {
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
