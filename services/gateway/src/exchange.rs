//! The body of an answer on its way to the client, and how a request ends.
//!
//! Invariant: a flight ends when the last byte of its answer is handed to the server, and its
//! connection then goes back to the pool; dropped before that, the client has left, and the
//! connection closes.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::client::{Client, Stopped};
use crate::flight::Flight;
use crate::outcome::Outcome;
use crate::timer::now_us;
use crate::upstream::Upstream;

/// The body of an answer.
#[derive(Debug)]
pub enum ReplyBody {
    /// All of it is here: of Penstock itself, or of a model whose answer came in one piece.
    Whole(Option<Bytes>),
    /// Of a model, as it comes.
    Model(Box<Exchange>),
}

#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    #[error("the instance broke off in the middle of its answer")]
    BrokeOff,
    #[error("the answer took longer than the request timeout")]
    Timeout,
    #[error("the client left in the middle of its answer")]
    ClientLeft,
}

/// A request whose answer is on its way. Dropped before its end, the client has left.
#[derive(Debug)]
pub struct Exchange {
    /// Gone, like the flight, once the answer is whole.
    upstream: Option<Box<Upstream>>,
    flight: Option<Flight>,
    outcome: Outcome,
    client: Rc<Client>,
}

impl Exchange {
    /// The body that follows a head; at its end already where all of it came with the head.
    pub fn begin(
        client: &Rc<Client>,
        mut flight: Flight,
        mut upstream: Box<Upstream>,
        outcome: Outcome,
    ) -> ReplyBody {
        let Some(whole) = upstream.take_at_hand() else {
            return ReplyBody::Model(Box::new(Self {
                upstream: Some(upstream),
                flight: Some(flight),
                outcome,
                client: client.clone(),
            }));
        };
        flight.response_bytes += whole.as_ref().map_or(0, Bytes::len) as u64;
        finish(client, flight, outcome, upstream);
        client.shared.active.set(false);
        ReplyBody::Whole(whole)
    }

    fn finish(&mut self) {
        if let (Some(flight), Some(upstream)) = (self.flight.take(), self.upstream.take()) {
            finish(&self.client, flight, self.outcome, upstream);
        }
    }

    /// Without an outcome the client has left.
    fn fail(&mut self, outcome: Option<Outcome>) {
        self.upstream = None;
        if let (Some(flight), Some(outcome)) = (self.flight.take(), outcome) {
            flight.end(outcome);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        let Some(upstream) = &mut self.upstream else {
            return Poll::Ready(None);
        };
        match upstream.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) => {
                if let Some(flight) = &mut self.flight {
                    flight.response_bytes += data.len() as u64;
                }
                if upstream.is_whole() {
                    self.finish();
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Poll::Ready(None) => {
                self.finish();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(_))) => {
                self.fail(Some(Outcome::Unreachable));
                Poll::Ready(Some(Err(ReplyError::BrokeOff)))
            }
            Poll::Pending => self.poll_stopped(cx).map(|error| Some(Err(error))),
        }
    }

    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<ReplyError> {
        match self.client.poll_stopped(cx) {
            Poll::Ready(Stopped::Deadline) => {
                self.fail(Some(Outcome::Timeout));
                Poll::Ready(ReplyError::Timeout)
            }
            Poll::Ready(Stopped::ClientLeft) => {
                self.fail(None);
                Poll::Ready(ReplyError::ClientLeft)
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

/// The answer is whole: the connection goes back to the pool, then the slot.
fn finish(client: &Client, flight: Flight, outcome: Outcome, upstream: Box<Upstream>) {
    let at_us = now_us();
    if let Some(slot) = flight.slot() {
        let idle_max_us = flight.deployment().keep_alive_idle_us;
        client
            .thread
            .keep(&slot.instance, upstream, idle_max_us, at_us);
    }
    flight.end_at(outcome, at_us);
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.client.shared.active.set(false);
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = ReplyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Model(exchange) => exchange.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Model(exchange) => exchange.upstream.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let length = match self {
            Self::Whole(bytes) => Some(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Model(exchange) => exchange
                .upstream
                .as_ref()
                .map_or(Some(0), |u| u.exact_length()),
        };
        length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
