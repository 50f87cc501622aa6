//! Streams the body of a response to the client, and ends the request.
//!
//! Invariant: a request ends when the last byte of its response is handed to the server, and its
//! connection then returns to the pool. If it is dropped before that, the connection closes: its time
//! was over while the client did not read, the gateway ends, or the client has left.

use std::mem::replace;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use crate::client::{ClientConnection, Interrupt};
use crate::cut::{CutReason, EventStream};
use crate::in_flight::InFlightRequest;
use crate::shard::count_cut;
use crate::timer::now_us;
use crate::upstream::Upstream;

/// The body of a response to a client.
#[derive(Debug)]
pub enum ResponseBody {
    /// Available in full: from Penstock itself, or from a model whose response arrived in one
    /// piece.
    Full(Option<Bytes>),
    /// Streamed from a model.
    Model(Box<Exchange>),
}

#[derive(Debug, thiserror::Error)]
pub enum ResponseError {
    #[error("the instance closed the connection in the middle of its response")]
    ClosedEarly,
    #[error("the response took longer than the deployment allows")]
    Timeout,
    #[error("the gateway ended before the response")]
    Shutdown,
    #[error("the client disconnected in the middle of its response")]
    ClientLeft,
}

/// A request whose response is being streamed. Dropping it early counts it as cut if its time is over or
/// the gateway ends, or else as `client_left`.
#[derive(Debug)]
pub struct Exchange {
    phase: ExchangePhase,
    /// Whether bytes have arrived since the last wait for more began.
    has_moved: bool,
    /// Bytes of the request's body that had been received by then.
    uploaded: u64,
    /// The response broke off before its head was written: a second read could take that for its end.
    is_broken: bool,
    /// Where an event that says why the stream was cut may be added.
    events: Option<EventStream>,
    client: Rc<ClientConnection>,
}

#[derive(Debug)]
enum ExchangePhase {
    /// More of the response is to come. The connection closes before the request ends.
    Streaming {
        upstream: Box<Upstream>,
        in_flight: InFlightRequest,
    },
    Done,
}

/// How a response ends.
enum ResponseEnd {
    Complete,
    Cut(CutReason),
    ClientLeft,
}

impl Exchange {
    /// Returns the body that follows a head; already complete if all of it arrived with the head.
    pub fn begin(
        client: &Rc<ClientConnection>,
        mut in_flight: InFlightRequest,
        mut upstream: Box<Upstream>,
        headers: &HeaderMap,
    ) -> ResponseBody {
        let Some(body) = upstream.take_buffered() else {
            client.connection.begin_stream();
            return ResponseBody::Model(Box::new(Self {
                has_moved: true,
                uploaded: 0,
                is_broken: false,
                events: EventStream::of(headers, upstream.exact_length()),
                phase: ExchangePhase::Streaming {
                    upstream,
                    in_flight,
                },
                client: client.clone(),
            }));
        };
        in_flight.add_response_bytes(body.as_ref().map_or(0, Bytes::len));
        complete(client, in_flight, upstream);
        client.connection.end_response();
        ResponseBody::Full(body)
    }

    fn upstream(&self) -> Option<&Upstream> {
        match &self.phase {
            ExchangePhase::Streaming { upstream, .. } => Some(upstream),
            ExchangePhase::Done => None,
        }
    }

    fn end(&mut self, end: ResponseEnd) {
        let ExchangePhase::Streaming {
            upstream,
            in_flight,
        } = replace(&mut self.phase, ExchangePhase::Done)
        else {
            return;
        };
        match end {
            ResponseEnd::Complete => complete(&self.client, in_flight, upstream),
            ResponseEnd::Cut(reason) => {
                drop(upstream);
                count_cut(
                    &self.client.worker.meter.shard,
                    &in_flight.deployment().state,
                    reason,
                );
                in_flight.fail(reason.outcome());
            }
            ResponseEnd::ClientLeft => {
                drop(upstream);
                drop(in_flight);
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ResponseError>>> {
        let ExchangePhase::Streaming {
            upstream,
            in_flight,
        } = &mut self.phase
        else {
            return Poll::Ready(None);
        };
        let data = match self.is_broken {
            true => Poll::Ready(Some(Err(()))),
            false => upstream.poll_data(cx).map_err(drop),
        };
        match data {
            Poll::Ready(Some(Ok(data))) => {
                in_flight.add_response_bytes(data.len());
                self.has_moved = true;
                if let Some(events) = &mut self.events {
                    events.push(&data);
                }
                if upstream.is_complete() {
                    self.end(ResponseEnd::Complete);
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Poll::Ready(None) => {
                self.end(ResponseEnd::Complete);
                Poll::Ready(None)
            }
            // The server would drop a head that it has not written yet: the client would get nothing.
            Poll::Ready(Some(Err(()))) if self.client.connection.is_unwritten() => {
                self.is_broken = true;
                Poll::Pending
            }
            Poll::Ready(Some(Err(()))) => Poll::Ready(Some(
                self.cut(CutReason::Instance, ResponseError::ClosedEarly),
            )),
            Poll::Pending if self.client.worker.meter.is_aborting.get() => {
                Poll::Ready(Some(self.cut(CutReason::Shutdown, ResponseError::Shutdown)))
            }
            Poll::Pending => {
                self.begin_wait();
                Poll::Ready(Some(ready!(self.poll_interrupt(cx))))
            }
        }
    }

    /// Limits the time until the next byte. The clock is read once per wait, not per piece.
    fn begin_wait(&mut self) {
        let upload = &self.client.upload;
        let has_uploaded = upload.is_streaming() && upload.bytes.get() != self.uploaded;
        let connection = &self.client.connection;
        if let ExchangePhase::Streaming { in_flight, .. } = &self.phase
            && let Some(end_us) = connection.request_end_us.get()
            && (self.has_moved || has_uploaded)
        {
            let deadline_us = in_flight.deployment().limits.next_byte(end_us, now_us());
            connection.deadline.borrow_mut().set(deadline_us);
        }
        self.has_moved = false;
        self.uploaded = upload.bytes.get();
    }

    fn poll_interrupt(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Frame<Bytes>, ResponseError>> {
        Poll::Ready(match ready!(self.client.poll_interrupt(cx)) {
            // It has not sent what it announced, and the model waits for that.
            Interrupt::Deadline
                if self
                    .upstream()
                    .is_some_and(|upstream| upstream.send_progress().awaits_client) =>
            {
                self.client.connection.reset_on_close();
                self.end(ResponseEnd::ClientLeft);
                Err(ResponseError::ClientLeft)
            }
            Interrupt::Deadline => {
                let reason = if self.client.connection.is_request_over() {
                    CutReason::Duration
                } else {
                    CutReason::Idle
                };
                self.cut(reason, ResponseError::Timeout)
            }
            Interrupt::ClientLeft => {
                self.end(ResponseEnd::ClientLeft);
                Err(ResponseError::ClientLeft)
            }
        })
    }

    /// Ends an incomplete response: with a last event, or else a reset.
    fn cut(
        &mut self,
        reason: CutReason,
        error: ResponseError,
    ) -> Result<Frame<Bytes>, ResponseError> {
        self.end(ResponseEnd::Cut(reason));
        let events = self.events.as_ref();
        match events.and_then(|events| events.last_event(reason)) {
            Some(event) => Ok(Frame::data(event)),
            None => {
                self.client.connection.reset_on_close();
                Err(error)
            }
        }
    }
}

/// Completes the request: returns the connection to the pool, then releases the slot.
fn complete(client: &ClientConnection, in_flight: InFlightRequest, upstream: Box<Upstream>) {
    let at_us = now_us();
    if let (Ok(instance), Some(idle)) = (in_flight.instance(), upstream.into_idle()) {
        let idle_max_us = in_flight.deployment().keep_alive_idle_us;
        client
            .worker
            .return_to_pool(instance, idle, idle_max_us, at_us);
    }
    in_flight.finish(at_us);
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let connection = &self.client.connection;
        let reason = if self.client.worker.meter.is_aborting.get() {
            Some(CutReason::Shutdown)
        } else {
            connection.is_request_over().then_some(CutReason::Duration)
        };
        if let Some(reason) = reason.filter(|_| self.upstream().is_some()) {
            // Nothing can be sent any more.
            connection.reset_on_close();
            self.end(ResponseEnd::Cut(reason));
        }
        self.client.connection.end_response();
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = ResponseError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseError>>> {
        match &mut *self {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Model(exchange) => exchange.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Model(exchange) => exchange.upstream().is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let length = match self {
            Self::Full(bytes) => Some(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Model(exchange) => exchange
                .upstream()
                .map_or(Some(0), |upstream| upstream.exact_length()),
        };
        length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
