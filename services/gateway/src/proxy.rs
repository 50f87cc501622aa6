//! One request from its head to the last byte of its answer.
//!
//! Invariants: nothing is sent to an instance without a slot on it; nothing is sent twice unless
//! the first try cannot have been seen by a model; when this future or the answer's body is dropped,
//! the connection to the instance closes and the slot is free.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderName, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::admission::Slot;
use crate::body::{Fault, RequestBody, Streamed, Upload};
use crate::config::REPLAY_BYTES_MAX;
use crate::framing::HeadError;
use crate::guard::Shared;
use crate::meter::{Flight, Outcome, count_refusal};
use crate::pool::Upstream;
use crate::reply::{AZURE_DEPLOYMENT, DEPLOYMENT, MODEL_STATUS, REQUEST_ID, Refusal};
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
    upload: Rc<Upload>,
}

/// The client has closed its connection; there is nobody to answer.
#[derive(Debug, thiserror::Error)]
#[error("the client left before its request was answered")]
pub struct ClientLeft;

/// A request may end in no answer at all.
enum End {
    Refused(Refused),
    ClientLeft,
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Refused {
            refusal,
            deployment: None,
        })
    }
}

/// What ended a wait before its time.
enum Stopped {
    Deadline,
    ClientLeft,
}

/// Why there is no answer of the model.
enum Failure {
    Refusal(Refusal),
    ClientLeft,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

impl Stopped {
    /// A wait whose deadline means this refusal.
    fn or(self, refusal: Refusal) -> Failure {
        match self {
            Self::Deadline => Failure::Refusal(refusal),
            Self::ClientLeft => Failure::ClientLeft,
        }
    }
}

/// A refusal, and the deployment that the request was for.
struct Refused {
    refusal: Refusal,
    deployment: Option<HeaderValue>,
}

impl Client {
    pub fn new(thread: Rc<Thread>, shared: Rc<Shared>) -> Self {
        Self {
            thread,
            shared,
            upload: Rc::default(),
        }
    }

    pub async fn handle(
        self: Rc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<ReplyBody>, ClientLeft> {
        self.shared.active.set(true);
        let id = self.thread.request_id();
        let refused = match self.serve(request, &id).await {
            Ok(response) => return Ok(response),
            Err(End::ClientLeft) => return Err(ClientLeft),
            Err(End::Refused(refused)) => refused,
        };
        self.shared.active.set(false);
        let mut response = refused.refusal.response(id);
        if let Some(deployment) = refused.deployment {
            response.headers_mut().insert(DEPLOYMENT, deployment);
        }
        Ok(response.map(|body| ReplyBody::Own(Some(body.into()))))
    }

    async fn serve(
        self: &Rc<Self>,
        request: Request<Incoming>,
        id: &HeaderValue,
    ) -> Result<Response<ReplyBody>, End> {
        let arrived_us = now_us();
        let (mut parts, incoming) = request.into_parts();
        let (endpoint, deployment, uri) = self.route(&parts)?;
        self.upload.begin();
        let mut flight = Flight::new(
            self.thread.meter.clone(),
            endpoint,
            deployment,
            arrived_us,
            self.upload.clone(),
        );
        parts.uri = uri;
        parts.version = Version::HTTP_11;
        strip(&mut parts.headers);
        parts.headers.insert(REQUEST_ID, id.clone());
        match self.fly(&mut flight, parts, incoming).await {
            Ok((response, upstream)) => Ok(self.answer(flight, response, upstream, id)),
            // Dropped without a word, the flight counts the client as gone.
            Err(Failure::ClientLeft) => Err(End::ClientLeft),
            Err(Failure::Refusal(refusal)) => {
                let deployment = Some(flight.deployment().header.clone());
                flight.end(refusal.outcome());
                Err(End::Refused(Refused {
                    refusal,
                    deployment,
                }))
            }
        }
    }

    /// From the choice of the deployment to the head of the answer.
    async fn fly(
        &self,
        flight: &mut Flight,
        parts: http::request::Parts,
        incoming: Incoming,
    ) -> Result<(Response<Incoming>, Box<Upstream>), Failure> {
        let body = self.receive(incoming, flight).await?;
        if !flight.admit() {
            return Err(Failure::Refusal(Refusal::TooManyPending {
                retry_after_secs: retry_after(flight),
            }));
        }
        let (slot, at_us) = self.slot(flight).await?;
        let deadline_us = at_us + flight.deployment().timeout_us;
        flight.serve(slot, at_us);
        self.shared.deadline.borrow_mut().set(deadline_us);
        let mut request = Request::from_parts(parts, body);
        self.ask(flight, &mut request).await
    }

    /// The endpoint and the deployment of a request that may pass; counts those that may not.
    fn route(&self, parts: &http::request::Parts) -> Result<(Arc<Endpoint>, usize, Uri), Refusal> {
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
            let uri = target.uri(&self.thread.score)?;
            if endpoint.auth == contract::resources::AuthMode::Key {
                authorize(&endpoint, &parts.headers)?;
            }
            let deployment = choose(&endpoint, &parts.headers)?;
            Ok((endpoint, deployment, uri))
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
        flight: &Flight,
    ) -> Result<RequestBody, Refusal> {
        if incoming.is_end_stream() {
            return Ok(RequestBody::EMPTY);
        }
        let bytes_max = flight.endpoint().request_bytes_max;
        let length = incoming.size_hint().exact();
        if length.is_some_and(|length| length > bytes_max) {
            return Err(Refusal::BodyTooLarge);
        }
        let Some(length) = length.filter(|length| *length <= REPLAY_BYTES_MAX) else {
            let upload = self.upload.clone();
            return Ok(RequestBody::Stream(Streamed::new(
                incoming, bytes_max, upload,
            )));
        };
        self.shared
            .deadline
            .borrow_mut()
            .set(flight.body_deadline_us());
        let first = self.piece(&mut incoming).await?;
        if first.len() as u64 == length {
            self.upload.bytes.set(length);
            return Ok(RequestBody::Whole(Some(first)));
        }
        self.upload.bytes.set(first.len() as u64);
        let mut all = BytesMut::with_capacity(length as usize);
        all.extend_from_slice(&first);
        while (all.len() as u64) < length {
            all.extend_from_slice(&self.piece(&mut incoming).await?);
            self.upload.bytes.set(all.len() as u64);
        }
        Ok(RequestBody::Whole(Some(all.freeze())))
    }

    /// The next piece of a body that is not whole yet.
    async fn piece(&self, incoming: &mut Incoming) -> Result<Bytes, Refusal> {
        let frame = poll_fn(|cx| {
            let woken = self.shared.relay.is_woken();
            let frame = Pin::new(&mut *incoming).poll_frame(cx);
            if incoming.is_end_stream() {
                // Taking the last piece tells the sender, which is gone, that there is room again.
                self.shared.relay.restore(woken);
            }
            if frame.is_pending() && self.shared.deadline.borrow_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            frame
        });
        match frame.await {
            Some(Ok(frame)) => frame.into_data().map_err(|_| Refusal::Body),
            _ => Err(Refusal::Body),
        }
    }

    /// What may end a wait: the deadline of the phase, or the client.
    fn poll_stopped(&self, cx: &mut Context<'_>) -> Poll<Stopped> {
        if self.shared.deadline.borrow_mut().poll(cx).is_ready() {
            return Poll::Ready(Stopped::Deadline);
        }
        // A body that is on its way tells by itself when its sender leaves.
        if !self.upload.running.get() && self.shared.poll_left(cx).is_ready() {
            return Poll::Ready(Stopped::ClientLeft);
        }
        Poll::Pending
    }

    /// Waits for something as long as it makes sense.
    async fn wait<T>(
        &self,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Result<T, Stopped> {
        poll_fn(|cx| match poll(cx) {
            Poll::Ready(value) => Poll::Ready(Ok(value)),
            Poll::Pending => self.poll_stopped(cx).map(Err),
        })
        .await
    }

    /// A slot on an instance and when it was got: at once, or after a turn in the queue.
    async fn slot(&self, flight: &mut Flight) -> Result<(Slot, u64), Failure> {
        let state = flight.deployment().state.clone();
        let now = now_us();
        if let Some(slot) = state.try_slot(self.thread.rotation(), now) {
            return Ok((slot, now));
        }
        let patience_us = flight.deployment().queue_wait_us;
        self.shared.deadline.borrow_mut().set(now + patience_us);
        flight.queue();
        if !state.has_instances() {
            self.thread.core.early.ask(state.endpoint.bucket());
        }
        let mut waiting = state.wait();
        let stopped = match self.wait(|cx| Pin::new(&mut waiting).poll(cx)).await {
            Ok(Ok(slot)) => return Ok((slot, now_us())),
            // The queue is never closed while the deployment is known.
            Ok(Err(_)) => return Err(Failure::Refusal(Refusal::Internal)),
            Err(stopped) => stopped,
        };
        Err(stopped.or(if state.has_instances() {
            Refusal::QueuedTooLong {
                retry_after_secs: retry_after(flight),
            }
        } else {
            Refusal::NoInstance
        }))
    }

    /// Sends the request and waits for the head of the answer. A second try is made at most once,
    /// and only where the first cannot have reached a model, or where a connection that had rested
    /// turned out to be closed and the body can be sent again.
    async fn ask(
        &self,
        flight: &mut Flight,
        request: &mut Request<RequestBody>,
    ) -> Result<(Response<Incoming>, Box<Upstream>), Failure> {
        let mut second = false;
        loop {
            let Some(slot) = flight.slot() else {
                return Err(Failure::Refusal(Refusal::Internal));
            };
            let instance = slot.instance.clone();
            request.headers_mut().insert(HOST, instance.host.clone());
            let pooled = if second {
                None
            } else {
                self.thread.pool.borrow_mut().take(&instance)
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
                            if second {
                                return Err(Failure::Refusal(Refusal::Unreachable));
                            }
                            second = true;
                            let rotation = self.thread.rotation();
                            let state = &flight.deployment().state;
                            let slot = state
                                .other_slot(&instance, rotation)
                                .ok_or(Refusal::Unreachable)?;
                            flight.serve(slot, now_us());
                            continue;
                        }
                    }
                }
            };
            let copied = if upstream.reused && !second {
                copy(request)
            } else {
                None
            };
            let again = copied.is_some();
            let sent = copied.unwrap_or_else(|| take(request));
            match self.exchange(upstream, sent).await? {
                Exchanged::Answer(response, upstream) => return Ok((response, upstream)),
                Exchanged::Unsent(unsent) if !second => *request = *unsent,
                Exchanged::Failed { answered: false } if again => {}
                Exchanged::Unsent(_) | Exchanged::Failed { .. } => {
                    return Err(Failure::Refusal(Refusal::Unreachable));
                }
            }
            second = true;
        }
    }

    async fn connect(
        &self,
        instance: &crate::instance::Instance,
        timeout: Duration,
    ) -> Result<std::io::Result<Box<Upstream>>, Failure> {
        let mut connecting = pin!(Upstream::connect(instance, timeout));
        self.wait(|cx| connecting.as_mut().poll(cx))
            .await
            .map_err(|stopped| stopped.or(Refusal::Timeout))
    }

    async fn exchange(
        &self,
        mut upstream: Box<Upstream>,
        request: Request<RequestBody>,
    ) -> Result<Exchanged, Failure> {
        let mut response = pin!(upstream.send(request));
        let mut attached = false;
        let answered = self
            .wait(|cx| {
                if !attached {
                    attached = true;
                    upstream.attach(cx);
                }
                upstream.drive(|upstream, cx| {
                    // First the connection, so that what it read is there when it is asked for.
                    let closed = upstream.step(cx).is_ready();
                    match response.as_mut().poll(cx) {
                        Poll::Ready(answer) => Poll::Ready(Some(answer)),
                        Poll::Pending if closed => Poll::Ready(None),
                        Poll::Pending => Poll::Pending,
                    }
                })
            })
            .await;
        match self.upload.fault.get() {
            Some(Fault::TooLarge) => return Err(Failure::Refusal(Refusal::BodyTooLarge)),
            Some(Fault::Broken) => return Err(Failure::Refusal(Refusal::Body)),
            None => {}
        }
        match answered.map_err(|stopped| stopped.or(Refusal::Timeout))? {
            Some(Ok(response)) if response.status().is_informational() => {
                Err(Failure::Refusal(Refusal::BadAnswer))
            }
            Some(Ok(response)) => Ok(Exchanged::Answer(response, upstream)),
            Some(Err(mut error)) => {
                if let Some(unsent) = error.take_message() {
                    return Ok(Exchanged::Unsent(Box::new(unsent)));
                }
                if error.error().is_parse() {
                    return Err(Failure::Refusal(Refusal::BadAnswer));
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
    fn answer(
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
            exchange.finish();
        }
        Response::from_parts(parts, ReplyBody::Model(exchange))
    }
}

/// What became of one try.
enum Exchanged {
    Answer(Response<Incoming>, Box<Upstream>),
    /// Not a byte of it was written.
    Unsent(Box<Request<RequestBody>>),
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

fn take(request: &mut Request<RequestBody>) -> Request<RequestBody> {
    std::mem::replace(request, Request::new(RequestBody::EMPTY))
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

/// Takes out what belongs to one connection and not to the message, and what is between the client
/// and us. Framing stays under the control of the HTTP library, whatever `connection` names.
fn strip(headers: &mut HeaderMap) {
    let named = headers.remove(CONNECTION);
    // These two say how long the connection lasts, and name no header that would not go anyway.
    let plain = |value: &HeaderValue| matches!(value.as_bytes(), b"keep-alive" | b"close");
    if let Some(named) = named.filter(|value| !plain(value)) {
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
    while let Some(name) = headers.keys().find(|name| stays_here(name.as_str())) {
        let name = name.clone();
        headers.remove(name);
    }
}

/// What concerns this hop, is ours to say, or is none of the model's business.
fn stays_here(name: &str) -> bool {
    // Nearly all names pass here, on their first letter.
    if !matches!(
        name.as_bytes().first(),
        Some(b't' | b'u' | b'e' | b'k' | b'p' | b'a')
    ) {
        return false;
    }
    matches!(
        name,
        "te" | "upgrade"
            | "trailer"
            | "expect"
            | "keep-alive"
            | "transfer-encoding"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "authorization"
            | "penstock-deployment"
            | "azureml-model-deployment"
            | "penstock-error-code"
            | "penstock-model-status"
    )
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
    #[error("the client left in the middle of its answer")]
    ClientLeft,
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
    fn finish(&mut self) {
        let Some(mut flight) = self.flight.take() else {
            return;
        };
        flight.set_outcome(self.outcome);
        if let (Some(upstream), Some(slot)) = (self.upstream.take(), flight.slot()) {
            let mut pool = self.client.thread.pool.borrow_mut();
            pool.put(&slot.instance, upstream);
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
        let incoming = &mut self.incoming;
        let polled = match &mut self.upstream {
            // What the connection has read already goes first, then it reads on.
            Some(upstream) => upstream.drive(|upstream, cx| {
                let ready = Pin::new(&mut *incoming).poll_frame(cx);
                if ready.is_ready() {
                    return ready;
                }
                let _ = upstream.step(cx);
                Pin::new(&mut *incoming).poll_frame(cx)
            }),
            None => Pin::new(incoming).poll_frame(cx),
        };
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                let length = frame.data_ref().map_or(0, Bytes::len) as u64;
                if let Some(flight) = &mut self.flight {
                    flight.response_bytes += length;
                }
                if self.incoming.is_end_stream() {
                    self.finish();
                }
                Poll::Ready(Some(Ok(frame)))
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
