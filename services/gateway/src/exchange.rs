//! The body of an answer on its way to the client, and how a request ends.
//!
//! Invariant: a flight ends when the last byte of its answer is handed to the server, and its
//! connection then goes back to the pool; dropped before that, the client has left, and the
//! connection closes.

use std::mem::replace;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

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
    phase: Phase,
    client: Rc<Client>,
}

#[derive(Debug)]
enum Phase {
    /// More of the answer is to come. The connection closes before the flight ends.
    PassingOn {
        upstream: Box<Upstream>,
        flight: Flight,
    },
    Over,
}

/// What ends an answer.
enum End {
    Whole,
    Broken(Outcome),
    ClientLeft,
}

impl Exchange {
    /// The body that follows a head; at its end already where all of it came with the head.
    pub fn begin(
        client: &Rc<Client>,
        mut flight: Flight,
        mut upstream: Box<Upstream>,
    ) -> ReplyBody {
        let Some(whole) = upstream.take_at_hand() else {
            return ReplyBody::Model(Box::new(Self {
                phase: Phase::PassingOn { upstream, flight },
                client: client.clone(),
            }));
        };
        flight.pass_on(whole.as_ref().map_or(0, Bytes::len));
        finish(client, flight, upstream);
        client.shared.end_answer();
        ReplyBody::Whole(whole)
    }

    fn upstream(&self) -> Option<&Upstream> {
        match &self.phase {
            Phase::PassingOn { upstream, .. } => Some(upstream),
            Phase::Over => None,
        }
    }

    fn end(&mut self, end: End) {
        let Phase::PassingOn { upstream, flight } = replace(&mut self.phase, Phase::Over) else {
            return;
        };
        match end {
            End::Whole => finish(&self.client, flight, upstream),
            End::Broken(outcome) => {
                drop(upstream);
                flight.end_broken(outcome);
            }
            End::ClientLeft => {
                drop(upstream);
                drop(flight);
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        let Phase::PassingOn { upstream, flight } = &mut self.phase else {
            return Poll::Ready(None);
        };
        match upstream.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) => {
                flight.pass_on(data.len());
                if upstream.is_whole() {
                    self.end(End::Whole);
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Poll::Ready(None) => {
                self.end(End::Whole);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(_))) => {
                self.end(End::Broken(Outcome::Unreachable));
                Poll::Ready(Some(Err(ReplyError::BrokeOff)))
            }
            Poll::Pending => self.poll_stopped(cx).map(|error| Some(Err(error))),
        }
    }

    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<ReplyError> {
        match ready!(self.client.poll_stopped(cx)) {
            Stopped::Deadline => {
                self.end(End::Broken(Outcome::Timeout));
                Poll::Ready(ReplyError::Timeout)
            }
            Stopped::ClientLeft => {
                self.end(End::ClientLeft);
                Poll::Ready(ReplyError::ClientLeft)
            }
        }
    }
}

/// The answer is whole: the connection goes back to the pool, then the slot.
fn finish(client: &Client, flight: Flight, upstream: Box<Upstream>) {
    let at_us = now_us();
    if let (Ok(instance), Some(idle)) = (flight.instance(), upstream.rest()) {
        let idle_max_us = flight.deployment().keep_alive_idle_us;
        client.thread.keep(instance, idle, idle_max_us, at_us);
    }
    flight.end_whole(at_us);
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.client.shared.end_answer();
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
            Self::Model(exchange) => exchange.upstream().is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let length = match self {
            Self::Whole(bytes) => Some(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Model(exchange) => exchange
                .upstream()
                .map_or(Some(0), |upstream| upstream.exact_length()),
        };
        length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
