//! One request from its head to the last byte of its answer.
//!
//! Invariants: nothing is sent to an instance without a slot on it; nothing is sent twice unless
//! the first try cannot have been seen by a model; when this future or the answer's body is dropped,
//! the connection to the instance closes and the slot is free.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST, HeaderName, TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::admission::Slot;
use crate::body::{Fault, RequestBody, Streamed};
use crate::config::REPLAY_BYTES_MAX;
use crate::framing::HeadError;
use crate::guard::Shared;
use crate::meter::{Flight, Outcome, count_refusal};
use crate::pool::Upstream;
use crate::reply::{AZURE_DEPLOYMENT, DEPLOYMENT, ERROR_CODE, MODEL_STATUS, REQUEST_ID, Refusal};
use crate::router::Endpoint;
use crate::target::{Target, authorize};
use crate::thread::Thread;
use crate::timer::now_us;

/// How long an instance that refused a connection comes last.
const SUSPECT_US: u64 = 1_000_000;

/// One client's connection. It carries one request at a time.
#[derive(Debug)]
pub struct Client {
    pub thread: Rc<Thread>,
    pub shared: Rc<Shared>,
    request_bytes: Rc<Cell<u64>>,
    fault: Rc<Cell<Option<Fault>>>,
}

/// A refusal, and the deployment that the request was for.
struct Refused {
    refusal: Refusal,
    deployment: Option<HeaderValue>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self {
            refusal,
            deployment: None,
        }
    }
}

impl Client {
    pub fn new(thread: Rc<Thread>, shared: Rc<Shared>) -> Self {
        Self {
            thread,
            shared,
            request_bytes: Rc::default(),
            fault: Rc::default(),
        }
    }

    pub async fn handle(
        self: Rc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<ReplyBody>, Infallible> {
        self.shared.active.set(true);
        let id = self.thread.request_id();
        Ok(match self.serve(request, &id).await {
            Ok(response) => response,
            Err(refused) => {
                self.shared.active.set(false);
                let mut response = refused.refusal.response(id);
                if let Some(deployment) = refused.deployment {
                    response.headers_mut().insert(DEPLOYMENT, deployment);
                }
                response.map(|body| ReplyBody::Own(Some(body.into())))
            }
        })
    }

    async fn serve(
        self: &Rc<Self>,
        request: Request<Incoming>,
        id: &HeaderValue,
    ) -> Result<Response<ReplyBody>, Refused> {
        let arrived_us = now_us();
        let (mut parts, incoming) = request.into_parts();
        let (endpoint, deployment) = self.route(&parts)?;
        let target = Target::of(&parts, self.thread.domain())?;
        let uri = target.uri(&self.thread.score)?;
        self.request_bytes.set(0);
        self.fault.set(None);
        let mut flight = Flight::new(
            self.thread.meter.clone(),
            endpoint.clone(),
            deployment,
            arrived_us,
            self.request_bytes.clone(),
        );
        let name = flight.deployment().header.clone();
        let refuse = |flight: Flight, refusal: Refusal| {
            flight.end(refusal.outcome());
            Refused {
                refusal,
                deployment: Some(name.clone()),
            }
        };

        let body = match self.receive(incoming, &endpoint, &flight, arrived_us).await {
            Ok(body) => body,
            Err(refusal) => return Err(refuse(flight, refusal)),
        };
        if !flight.admit() {
            let refusal = Refusal::TooManyPending {
                retry_after_secs: retry_after(&flight),
            };
            return Err(refuse(flight, refusal));
        }
        let slot = match self.slot(&mut flight).await {
            Ok(slot) => slot,
            Err(refusal) => return Err(refuse(flight, refusal)),
        };
        let at_us = now_us();
        let deadline_us = at_us + flight.deployment().timeout_us;
        flight.serve(slot, at_us);
        self.shared.deadline.borrow_mut().set(deadline_us);

        parts.uri = uri;
        parts.version = Version::HTTP_11;
        strip(&mut parts.headers);
        parts.headers.insert(REQUEST_ID, id.clone());
        let request = Request::from_parts(parts, body);
        match self.ask(&mut flight, request).await {
            Ok((response, upstream)) => Ok(self.answer(flight, response, upstream, id).await),
            Err(refusal) => Err(refuse(flight, refusal)),
        }
    }

    /// The endpoint and the deployment of a request that may pass; counts those that may not.
    fn route(
        &self,
        parts: &http::request::Parts,
    ) -> Result<(std::sync::Arc<Endpoint>, usize), Refusal> {
        let mut known = "";
        let mut find = || {
            if let Some(token) = parts.method.as_str().strip_prefix('!') {
                let reason = HeadError::of_token(token).unwrap_or(HeadError::Malformed);
                return Err(Refusal::Head(reason));
            }
            let target = Target::of(parts, self.thread.domain())?;
            let endpoint = self
                .thread
                .endpoint(target.endpoint)
                .ok_or(Refusal::UnknownEndpoint)?;
            known = target.endpoint;
            target.uri(&self.thread.score)?;
            if endpoint.auth == contract::resources::AuthMode::Key {
                authorize(&endpoint, &parts.headers)?;
            }
            let deployment = choose(&endpoint, &parts.headers)?;
            Ok((endpoint, deployment))
        };
        let found = find();
        if let Err(refusal) = &found {
            count_refusal(&self.thread.meter.shard, known, refusal.status().as_u16());
        }
        found
    }

    /// Reads a small body whole; a large one, or one of unknown length, is passed on as it comes.
    async fn receive(
        &self,
        mut incoming: Incoming,
        endpoint: &Endpoint,
        flight: &Flight,
        arrived_us: u64,
    ) -> Result<RequestBody, Refusal> {
        if incoming.is_end_stream() {
            return Ok(RequestBody::EMPTY);
        }
        let length = incoming.size_hint().exact();
        if length.is_some_and(|length| length > endpoint.request_bytes_max) {
            return Err(Refusal::BodyTooLarge);
        }
        let Some(length) = length.filter(|length| *length <= REPLAY_BYTES_MAX) else {
            return Ok(RequestBody::Stream(Streamed {
                incoming,
                left: endpoint.request_bytes_max,
                bytes: self.request_bytes.clone(),
                fault: self.fault.clone(),
            }));
        };
        let timeout_us = flight.deployment().timeout_us;
        self.shared
            .deadline
            .borrow_mut()
            .set(arrived_us + timeout_us);
        let whole = poll_fn(|cx| {
            let frame = Pin::new(&mut incoming).poll_frame(cx);
            self.until_deadline(frame, cx)
        });
        let first = data(whole.await)?;
        self.request_bytes.set(first.len() as u64);
        if first.len() as u64 == length {
            return Ok(RequestBody::Whole(Some(first)));
        }
        let mut all = BytesMut::with_capacity(length as usize);
        all.extend_from_slice(&first);
        while (all.len() as u64) < length {
            let next = poll_fn(|cx| {
                let frame = Pin::new(&mut incoming).poll_frame(cx);
                self.until_deadline(frame, cx)
            });
            all.extend_from_slice(&data(next.await)?);
            self.request_bytes.set(all.len() as u64);
        }
        Ok(RequestBody::Whole(Some(all.freeze())))
    }

    /// `None` when the deadline of the current phase passes first.
    fn until_deadline<T>(&self, polled: Poll<T>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        if let Poll::Ready(value) = polled {
            return Poll::Ready(Some(value));
        }
        self.shared.deadline.borrow_mut().poll(cx).map(|()| None)
    }

    /// A slot on an instance: at once, or after a turn in the queue.
    async fn slot(&self, flight: &mut Flight) -> Result<Slot, Refusal> {
        let state = flight.deployment().state.clone();
        let now = now_us();
        if let Some(slot) = state.try_slot(self.thread.rotation(), now) {
            return Ok(slot);
        }
        let patience_us = flight.deployment().queue_wait_us;
        self.shared.deadline.borrow_mut().set(now + patience_us);
        flight.queue();
        if !state.has_instances() {
            self.thread.core.early.ask(state.endpoint.bucket());
        }
        let mut waiting = state.wait();
        let granted = poll_fn(|cx| {
            let polled = Pin::new(&mut waiting).poll(cx);
            self.until_deadline(polled, cx)
        });
        if let Some(Ok(slot)) = granted.await {
            return Ok(slot);
        }
        if state.has_instances() {
            Err(Refusal::QueuedTooLong {
                retry_after_secs: retry_after(flight),
            })
        } else {
            Err(Refusal::NoInstance)
        }
    }

    /// Sends the request and waits for the head of the answer. A second try is made at most once,
    /// and only where the first cannot have reached a model, or where a connection that had rested
    /// turned out to be closed and the body can be sent again.
    async fn ask(
        &self,
        flight: &mut Flight,
        mut request: Request<RequestBody>,
    ) -> Result<(Response<Incoming>, Box<Upstream>), Refusal> {
        let mut second = false;
        loop {
            let Some(slot) = flight.slot() else {
                return Err(Refusal::Internal);
            };
            let instance = slot.instance.clone();
            request.headers_mut().insert(HOST, instance.host.clone());
            let pooled = if second {
                None
            } else {
                poll_fn(|cx| Poll::Ready(self.thread.pool.borrow_mut().take(&instance, cx))).await
            };
            let upstream = match pooled {
                Some(upstream) => upstream,
                None => {
                    let timeout = self.thread.core.config.connect_timeout;
                    let connecting = Box::pin(self.connect(&instance, timeout));
                    match connecting.await? {
                        Ok(upstream) => upstream,
                        Err(error) => {
                            tracing::debug!(instance = %instance.id, %error, "an instance refused a connection");
                            instance.suspect(now_us() + SUSPECT_US);
                            let rotation = self.thread.rotation();
                            let state = &flight.deployment().state;
                            match state.other_slot(&instance, rotation) {
                                Some(slot) if !second => {
                                    second = true;
                                    flight.serve(slot, now_us());
                                    continue;
                                }
                                _ => return Err(Refusal::Unreachable),
                            }
                        }
                    }
                }
            };
            let spare = (upstream.reused && !second)
                .then(|| copy(&request))
                .flatten();
            match self.exchange(upstream, request).await? {
                Exchanged::Answer(response, upstream) => return Ok((response, upstream)),
                Exchanged::Unsent(unsent) if !second => request = unsent,
                Exchanged::Failed { answered: false } if spare.is_some() => {
                    request = spare.ok_or(Refusal::Internal)?;
                }
                Exchanged::Unsent(_) | Exchanged::Failed { .. } => {
                    return Err(Refusal::Unreachable);
                }
            }
            second = true;
        }
    }

    async fn connect(
        &self,
        instance: &crate::instance::Instance,
        timeout: Duration,
    ) -> Result<std::io::Result<Box<Upstream>>, Refusal> {
        let mut connecting = pin!(Upstream::connect(instance, timeout));
        poll_fn(|cx| {
            let polled = connecting.as_mut().poll(cx);
            self.until_deadline(polled, cx)
        })
        .await
        .ok_or(Refusal::Timeout)
    }

    async fn exchange(
        &self,
        mut upstream: Box<Upstream>,
        request: Request<RequestBody>,
    ) -> Result<Exchanged, Refusal> {
        upstream.begin();
        let mut response = pin!(upstream.sender.try_send_request(request));
        let answered = poll_fn(|cx| {
            // First the connection, so that what it read is there when the answer is asked for.
            let closed = upstream.poll(cx).is_ready();
            match response.as_mut().poll(cx) {
                Poll::Ready(answer) => Poll::Ready(Some(Some(answer))),
                Poll::Pending if closed => Poll::Ready(Some(None)),
                Poll::Pending => self.until_deadline(Poll::Pending, cx),
            }
        })
        .await;
        match self.fault.get() {
            Some(Fault::TooLarge) => return Err(Refusal::BodyTooLarge),
            Some(Fault::Broken) => return Err(Refusal::Body),
            None => {}
        }
        match answered.ok_or(Refusal::Timeout)? {
            Some(Ok(response)) if response.status().is_informational() => Err(Refusal::BadAnswer),
            Some(Ok(response)) => Ok(Exchanged::Answer(response, upstream)),
            Some(Err(mut error)) => {
                if let Some(unsent) = error.take_message() {
                    return Ok(Exchanged::Unsent(unsent));
                }
                if error.error().is_parse() {
                    return Err(Refusal::BadAnswer);
                }
                Ok(Exchanged::Failed {
                    answered: upstream.answered(),
                })
            }
            None => Ok(Exchanged::Failed {
                answered: upstream.answered(),
            }),
        }
    }

    /// The head of the answer for the client; the body follows as the instance sends it.
    async fn answer(
        self: &Rc<Self>,
        flight: Flight,
        response: Response<Incoming>,
        upstream: Box<Upstream>,
        id: &HeaderValue,
    ) -> Response<ReplyBody> {
        let (mut parts, incoming) = response.into_parts();
        strip(&mut parts.headers);
        let outcome = if parts.status.is_client_error() {
            Outcome::ModelClientError
        } else if parts.status.as_u16() >= 500 {
            Outcome::ModelServerError
        } else {
            Outcome::Success
        };
        if outcome != Outcome::Success {
            let status = HeaderValue::from(parts.status.as_u16());
            parts.headers.insert(MODEL_STATUS, status);
            parts.status = StatusCode::FAILED_DEPENDENCY;
        }
        let deployment = flight.deployment().header.clone();
        parts.headers.insert(DEPLOYMENT, deployment);
        parts.headers.insert(REQUEST_ID, id.clone());
        parts.version = Version::HTTP_11;
        let mut exchange = Box::new(Exchange {
            incoming,
            upstream: Some(upstream),
            flight: Some(flight),
            outcome,
            client: self.clone(),
        });
        if exchange.incoming.is_end_stream() {
            poll_fn(|cx| Poll::Ready(exchange.finish(cx))).await;
        }
        Response::from_parts(parts, ReplyBody::Model(exchange))
    }
}

/// What became of one try.
enum Exchanged {
    Answer(Response<Incoming>, Box<Upstream>),
    /// Not a byte of it was written.
    Unsent(Request<RequestBody>),
    Failed {
        /// Part of an answer had come.
        answered: bool,
    },
}

/// The same request once more, where its body can be sent again.
fn copy(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let mut copy = Request::new(request.body().replay()?);
    copy.method_mut().clone_from(request.method());
    copy.uri_mut().clone_from(request.uri());
    copy.headers_mut().clone_from(request.headers());
    Some(copy)
}

/// The deployment that the request names, or the one whose turn it is.
fn choose(endpoint: &Endpoint, headers: &HeaderMap) -> Result<usize, Refusal> {
    let named = headers
        .get(DEPLOYMENT)
        .or_else(|| headers.get(AZURE_DEPLOYMENT));
    if let Some(name) = named {
        return endpoint
            .deployment(name.as_bytes())
            .ok_or(Refusal::UnknownDeployment);
    }
    let split = endpoint.split.as_ref().ok_or(Refusal::NoTraffic)?;
    Ok(split.pick(endpoint.count.fetch_add(1, Ordering::Relaxed)))
}

fn retry_after(flight: &Flight) -> u64 {
    flight.deployment().queue_wait_us.div_ceil(1_000_000).max(1)
}

fn data<E>(frame: Option<Option<Result<Frame<Bytes>, E>>>) -> Result<Bytes, Refusal> {
    match frame {
        Some(Some(Ok(frame))) => frame.into_data().map_err(|_| Refusal::Body),
        _ => Err(Refusal::Body),
    }
}

/// Takes out what belongs to one connection and not to the message, and what is between the client
/// and us. Framing stays under the control of the HTTP library, whatever `connection` names.
fn strip(headers: &mut HeaderMap) {
    if let Some(named) = headers.remove(CONNECTION) {
        let tokens = named.to_str().unwrap_or_default();
        for token in tokens.split(',').map(str::trim) {
            let protected = [CONTENT_LENGTH, TRANSFER_ENCODING, HOST];
            if let Ok(name) = token.parse::<HeaderName>()
                && !protected.contains(&name)
            {
                headers.remove(name);
            }
        }
    }
    while let Some(name) = headers.keys().find(|name| is_ours(name)) {
        let name = name.clone();
        headers.remove(name);
    }
}

fn is_ours(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "te" | "upgrade"
            | "trailer"
            | "expect"
            | "keep-alive"
            | "transfer-encoding"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
    ) || *name == AUTHORIZATION
        || *name == DEPLOYMENT
        || *name == AZURE_DEPLOYMENT
        || *name == ERROR_CODE
        || *name == MODEL_STATUS
}

/// The body of an answer.
#[derive(Debug)]
pub enum ReplyBody {
    /// Of Penstock itself.
    Own(Option<Bytes>),
    /// Of a model, as it comes.
    Model(Box<Exchange>),
}

#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    #[error("the instance broke off in the middle of its answer")]
    BrokeOff,
    #[error("the answer took longer than the request timeout")]
    Timeout,
}

/// A request whose answer is on its way. Dropped before its end, the client has left.
#[derive(Debug)]
pub struct Exchange {
    incoming: Incoming,
    /// Gone, like the flight, once the answer is whole.
    upstream: Option<Box<Upstream>>,
    flight: Option<Flight>,
    outcome: Outcome,
    client: Rc<Client>,
}

impl Exchange {
    /// The answer is whole: the connection goes back to the pool, then the slot.
    fn finish(&mut self, cx: &mut Context<'_>) {
        let Some(mut flight) = self.flight.take() else {
            return;
        };
        flight.set_outcome(self.outcome);
        if let (Some(upstream), Some(slot)) = (self.upstream.take(), flight.slot()) {
            let mut pool = self.client.thread.pool.borrow_mut();
            pool.put(&slot.instance, upstream, cx);
        }
    }

    fn fail(&mut self, outcome: Outcome) {
        self.upstream = None;
        if let Some(flight) = self.flight.take() {
            flight.end(outcome);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        let mut moved = false;
        loop {
            match Pin::new(&mut self.incoming).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    let length = frame.data_ref().map_or(0, Bytes::len) as u64;
                    if let Some(flight) = &mut self.flight {
                        flight.response_bytes += length;
                    }
                    if self.incoming.is_end_stream() {
                        self.finish(cx);
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Poll::Ready(None) => {
                    self.finish(cx);
                    return Poll::Ready(None);
                }
                Poll::Ready(Some(Err(_))) => {
                    self.fail(Outcome::Unreachable);
                    return Poll::Ready(Some(Err(ReplyError::BrokeOff)));
                }
                Poll::Pending => {}
            }
            // The body gets what the connection reads, so once it is empty the connection moves on,
            // and the body is asked again.
            let Some(upstream) = self.upstream.as_mut().filter(|_| !moved) else {
                break;
            };
            let _ = upstream.poll(cx);
            moved = true;
        }
        let late = self.client.shared.deadline.borrow_mut().poll(cx);
        if self.flight.is_some() && late.is_ready() {
            self.fail(Outcome::Timeout);
            return Poll::Ready(Some(Err(ReplyError::Timeout)));
        }
        Poll::Pending
    }
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
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Model(exchange) => exchange.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            Self::Model(exchange) => exchange.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Model(exchange) => exchange.incoming.size_hint(),
        }
    }
}

/// Pools are per thread, and borrowed for one call at a time.
pub type SharedPool = RefCell<crate::pool::Pool>;
