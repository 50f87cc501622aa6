//! Request bodies on their way to an instance.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

/// What went wrong with a client's body while it was streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadError {
    TooLarge,
    /// It ended early or was malformed.
    Broken,
}

/// Progress of a client's request body; one per connection.
#[derive(Debug, Default)]
pub struct Upload {
    /// Bytes received.
    pub bytes: Cell<u64>,
    /// Whether the body had to be waited for, so that the clock has advanced since the request
    /// arrived.
    pub has_waited: Cell<bool>,
    phase: Cell<UploadPhase>,
    /// Whether its length was announced.
    is_length_known: Cell<bool>,
}

/// How far a body has been received.
#[derive(Clone, Copy, Debug, Default)]
enum UploadPhase {
    /// There is none, or it was received in full.
    #[default]
    Complete,
    /// Not read yet, or no longer.
    Unread,
    /// More of it is to be streamed.
    Streaming,
    Failed(UploadError),
}

impl Upload {
    /// Resets for a new request with this body.
    pub fn begin(&self, body: &Incoming) {
        self.bytes.set(0);
        self.has_waited.set(false);
        self.is_length_known.set(body.size_hint().exact().is_some());
        self.phase.set(if body.is_end_stream() {
            UploadPhase::Complete
        } else {
            UploadPhase::Unread
        });
    }

    /// Called when the body has been received in full.
    pub fn complete(&self) {
        self.phase.set(UploadPhase::Complete);
    }

    /// Whether some of the body has not been received, as far as the gateway's own reading goes.
    pub fn is_incomplete(&self) -> bool {
        !matches!(self.phase.get(), UploadPhase::Complete)
    }

    pub fn is_length_known(&self) -> bool {
        self.is_length_known.get()
    }

    /// Whether more of the body is to be streamed.
    pub fn is_streaming(&self) -> bool {
        matches!(self.phase.get(), UploadPhase::Streaming)
    }

    /// Why the body cannot be passed on, if it failed.
    pub fn error(&self) -> Option<UploadError> {
        match self.phase.get() {
            UploadPhase::Failed(error) => Some(error),
            UploadPhase::Complete | UploadPhase::Unread | UploadPhase::Streaming => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the request body cannot be forwarded")]
pub struct BodyError;

#[derive(Debug)]
pub enum RequestBody {
    /// In full, so it can be sent again.
    Full(Option<Bytes>),
    Stream(StreamedBody),
}

/// A body that is streamed as it arrives.
#[derive(Debug)]
pub struct StreamedBody {
    /// What was received before.
    beginning: Bytes,
    incoming: Incoming,
    /// Bytes still allowed after it.
    remaining: u64,
    upload: Rc<Upload>,
}

impl RequestBody {
    pub const EMPTY: Self = Self::Full(None);

    /// Takes all of a full body; nothing of a streamed one.
    pub fn take_full(&mut self) -> Bytes {
        match self {
            Self::Full(bytes) => bytes.take().unwrap_or_default(),
            Self::Stream(_) => Bytes::new(),
        }
    }

    /// Copies the body to send it again; `None` if it is streamed.
    pub fn replay(&self) -> Option<Self> {
        match self {
            Self::Full(bytes) => Some(Self::Full(bytes.clone())),
            Self::Stream(_) => None,
        }
    }
}

impl Default for RequestBody {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl StreamedBody {
    /// The beginning is counted in `upload` already, and within `bytes_max`.
    pub fn new(beginning: Bytes, incoming: Incoming, bytes_max: u64, upload: Rc<Upload>) -> Self {
        upload.phase.set(UploadPhase::Streaming);
        Self {
            remaining: bytes_max.saturating_sub(beginning.len() as u64),
            beginning,
            incoming,
            upload,
        }
    }

    fn fail(&self, error: UploadError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.upload.phase.set(UploadPhase::Failed(error));
        Poll::Ready(Some(Err(BodyError)))
    }
}

impl Drop for StreamedBody {
    /// A body that is no longer streamed does not notice when its sender disconnects.
    fn drop(&mut self) {
        if self.upload.is_streaming() {
            self.upload.phase.set(UploadPhase::Unread);
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let stream = match &mut *self {
            Self::Full(bytes) => return Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Stream(stream) => stream,
        };
        if !stream.beginning.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut stream.beginning)))));
        }
        let frame = match Pin::new(&mut stream.incoming).poll_frame(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(None) => {
                stream.upload.complete();
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(_))) => return stream.fail(UploadError::Broken),
            Poll::Ready(Some(Ok(frame))) => frame,
        };
        let length = frame.data_ref().map_or(0, Bytes::len) as u64;
        let bytes = &stream.upload.bytes;
        bytes.set(bytes.get() + length);
        let Some(remaining) = stream.remaining.checked_sub(length) else {
            return stream.fail(UploadError::TooLarge);
        };
        stream.remaining = remaining;
        if stream.incoming.is_end_stream() {
            stream.upload.complete();
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Stream(stream) => stream.beginning.is_empty() && stream.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Stream(stream) => {
                let length = stream.incoming.size_hint().exact();
                length.map_or_else(SizeHint::default, |length| {
                    SizeHint::with_exact(stream.beginning.len() as u64 + length)
                })
            }
        }
    }
}
