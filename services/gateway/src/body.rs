//! Bodies on their way to an instance.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

/// What went wrong with a client's body while it was passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    TooLarge,
    /// It broke off or was malformed.
    Broken,
}

/// What is known of a client's body; one per connection.
#[derive(Debug, Default)]
pub struct Upload {
    /// So many have come.
    pub bytes: Cell<u64>,
    /// It was waited for, so the clock has moved on since the request came.
    pub waited: Cell<bool>,
    passing: Cell<Passing>,
}

/// How a body is passed on.
#[derive(Clone, Copy, Debug, Default)]
enum Passing {
    /// It is not, or no longer: it came whole, or nobody takes it any more.
    #[default]
    Over,
    /// It has not come whole.
    Running,
    Failed(Fault),
}

impl Upload {
    /// A request begins.
    pub fn begin(&self) {
        self.bytes.set(0);
        self.waited.set(false);
        self.passing.set(Passing::Over);
    }

    /// More of it is to be passed on.
    pub fn is_running(&self) -> bool {
        matches!(self.passing.get(), Passing::Running)
    }

    /// Why it cannot be passed on, where it cannot.
    pub fn fault(&self) -> Option<Fault> {
        match self.passing.get() {
            Passing::Failed(fault) => Some(fault),
            Passing::Over | Passing::Running => None,
        }
    }

    /// A fault remains known.
    fn end(&self) {
        if self.is_running() {
            self.passing.set(Passing::Over);
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the request's body cannot be passed on")]
pub struct BodyError;

#[derive(Debug)]
pub enum RequestBody {
    /// Whole, so it can be sent again.
    Whole(Option<Bytes>),
    Stream(Streamed),
}

/// A body that is passed on as it comes.
#[derive(Debug)]
pub struct Streamed {
    incoming: Incoming,
    /// Bytes that may still come.
    left: u64,
    upload: Rc<Upload>,
}

impl RequestBody {
    pub const EMPTY: Self = Self::Whole(None);

    /// All of a body that is whole; nothing of one that is passed on.
    pub fn take_whole(&mut self) -> Bytes {
        match self {
            Self::Whole(bytes) => bytes.take().unwrap_or_default(),
            Self::Stream(_) => Bytes::new(),
        }
    }

    /// A copy to send again; none of a body that is gone once sent.
    pub fn replay(&self) -> Option<Self> {
        match self {
            Self::Whole(bytes) => Some(Self::Whole(bytes.clone())),
            Self::Stream(_) => None,
        }
    }
}

impl Default for RequestBody {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl Streamed {
    pub fn new(incoming: Incoming, bytes_max: u64, upload: Rc<Upload>) -> Self {
        upload.passing.set(Passing::Running);
        Self {
            incoming,
            left: bytes_max,
            upload,
        }
    }

    fn fail(&self, fault: Fault) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.upload.passing.set(Passing::Failed(fault));
        Poll::Ready(Some(Err(BodyError)))
    }
}

impl Drop for Streamed {
    /// No longer passed on, it does not tell when its sender leaves.
    fn drop(&mut self) {
        self.upload.end();
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
            Self::Whole(bytes) => return Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Stream(stream) => stream,
        };
        let frame = match Pin::new(&mut stream.incoming).poll_frame(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(None) => {
                stream.upload.end();
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(_))) => return stream.fail(Fault::Broken),
            Poll::Ready(Some(Ok(frame))) => frame,
        };
        let length = frame.data_ref().map_or(0, Bytes::len) as u64;
        let bytes = &stream.upload.bytes;
        bytes.set(bytes.get() + length);
        let Some(left) = stream.left.checked_sub(length) else {
            return stream.fail(Fault::TooLarge);
        };
        stream.left = left;
        if stream.incoming.is_end_stream() {
            stream.upload.end();
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Stream(stream) => stream.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Stream(stream) => stream.incoming.size_hint(),
        }
    }
}
