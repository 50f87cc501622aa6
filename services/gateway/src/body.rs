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
    pub incoming: Incoming,
    /// Bytes that may still come.
    pub left: u64,
    pub bytes: Rc<Cell<u64>>,
    pub fault: Rc<Cell<Option<Fault>>>,
}

impl RequestBody {
    pub const EMPTY: Self = Self::Whole(None);

    /// A copy to send again; none of a body that is gone once sent.
    pub fn replay(&self) -> Option<Self> {
        match self {
            Self::Whole(bytes) => Some(Self::Whole(bytes.clone())),
            Self::Stream(_) => None,
        }
    }
}

impl Streamed {
    fn fail(&self, fault: Fault) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.fault.set(Some(fault));
        Poll::Ready(Some(Err(BodyError)))
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
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(Err(_))) => return stream.fail(Fault::Broken),
            Poll::Ready(Some(Ok(frame))) => frame,
        };
        let length = frame.data_ref().map_or(0, Bytes::len) as u64;
        stream.bytes.set(stream.bytes.get() + length);
        let Some(left) = stream.left.checked_sub(length) else {
            return stream.fail(Fault::TooLarge);
        };
        stream.left = left;
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
