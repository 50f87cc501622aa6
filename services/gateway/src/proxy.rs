//! One request from its head to the last byte of its answer.
//!
//! Invariants: nothing is sent to an instance without a slot on it; nothing is sent twice unless
//! not one byte of it left the first time, or its method or an `Idempotency-Key` says that twice is
//! as once; when this future or the answer's body is dropped, the connection to the instance closes
//! and the slot is free.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body::Body;
use hyper::body::Incoming;
use runtime::descriptors::is_lack;

use crate::admission::Slot;
use crate::body::{Fault, RequestBody, Streamed, Upload};
use crate::config::REPLAY_BYTES_MAX;
use crate::exchange::{Exchange, ReplyBody};
use crate::framing::HeadError;
use crate::guard::Shared;
use crate::instance::Instance;
use crate::meter::{Flight, Outcome, count_refusal};
use crate::pool::Counted;
use crate::reply::{AZURE_DEPLOYMENT, DEPLOYMENT, MODEL_STATUS, REQUEST_ID, Refusal};
use crate::router::Endpoint;
use crate::target::{Target, authorize};
use crate::thread::Thread;
use crate::timer::now_us;
use crate::upstream::{Ask, Broken, Head, Upstream};

/// How long an instance that refused a connection comes last.
const SUSPECT_US: u64 = 1_000_000;

/// For want of descriptors once more, when what rests has been closed.
const CONNECT_TRIES: u32 = 2;
const TO_AN_INSTANCE: &str = "a connection to an instance";

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
pub enum Stopped {
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

/// Where a request goes.
struct Way {
    endpoint: Arc<Endpoint>,
    deployment: usize,
    /// Where in the request's path that begins which the instance is asked for.
    path_at: usize,
}

/// An answer's head, and the connection that its body comes on.
type Answer = (Box<Head>, Box<Upstream>);

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
        let (mut parts, incoming) = request.into_parts();
        let served = self.serve(&parts, incoming, &id).await;
        parts.headers.clear();
        self.thread.spare.replace(parts.headers);
        let refused = match served {
            Ok(response) => return Ok(response),
            Err(End::ClientLeft) => return Err(ClientLeft),
            Err(End::Refused(refused)) => refused,
        };
        self.shared.active.set(false);
        let mut response = refused.refusal.response(id);
        if let Some(deployment) = refused.deployment {
            response.headers_mut().insert(DEPLOYMENT, deployment);
        }
        Ok(response.map(|body| ReplyBody::Whole(Some(body.into()))))
    }

    async fn serve(
        self: &Rc<Self>,
        parts: &Parts,
        incoming: Incoming,
        id: &HeaderValue,
    ) -> Result<Response<ReplyBody>, End> {
        let arrived_us = now_us();
        let way = self.route(parts)?;
        self.upload.begin();
        let mut flight = Flight::new(
            self.thread.meter.clone(),
            way.endpoint,
            way.deployment,
            arrived_us,
            self.upload.clone(),
        );
        let asked = Asked {
            method: &parts.method,
            path: &Target::path(parts)[way.path_at..],
            headers: &parts.headers,
            id,
        };
        match self.fly(&mut flight, &asked, incoming).await {
            Ok(answer) => Ok(self.answer(flight, answer, id)),
            // Dropped without a word, the flight counts the client as gone.
            Err(Failure::ClientLeft) => Err(End::ClientLeft),
            Err(Failure::Refusal(refusal)) => {
                let deployment = Some(flight.deployment().header.clone());
                flight.answer(refusal.status());
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
        asked: &Asked<'_>,
        incoming: Incoming,
    ) -> Result<Answer, Failure> {
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
        self.ask(flight, asked, body, at_us).await
    }

    /// The endpoint and the deployment of a request that may pass; counts those that may not.
    fn route(&self, parts: &Parts) -> Result<Way, Refusal> {
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
            if endpoint.auth == contract::resources::AuthMode::Key {
                authorize(&endpoint, &parts.headers)?;
            }
            let deployment = choose(&endpoint, &parts.headers)?;
            Ok(Way {
                endpoint,
                deployment,
                path_at: Target::path(parts).len() - target.rest.len(),
            })
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
            if frame.is_pending() {
                self.upload.waited.set(true);
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
    pub fn poll_stopped(&self, cx: &mut Context<'_>) -> Poll<Stopped> {
        if self.shared.deadline.borrow_mut().poll(cx).is_ready() {
            return Poll::Ready(Stopped::Deadline);
        }
        // A body that is read tells by itself when its sender leaves, one that has to wait does not.
        let left = if self.upload.running.get() {
            self.shared.poll_left_sending(cx)
        } else {
            self.shared.poll_left(cx)
        };
        left.map(|()| Stopped::ClientLeft)
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
        let now = if self.upload.waited.get() {
            now_us()
        } else {
            flight.arrived_us()
        };
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
    /// and only where no byte of the first was sent; for an idempotent request also where a
    /// connection that had rested closed without a word and the body can be sent again.
    async fn ask(
        &self,
        flight: &mut Flight,
        asked: &Asked<'_>,
        mut body: RequestBody,
        at_us: u64,
    ) -> Result<Answer, Failure> {
        let mut second = false;
        loop {
            let Some(slot) = flight.slot() else {
                return Err(Failure::Refusal(Refusal::Internal));
            };
            let instance = slot.instance.clone();
            let pooled = if second {
                None
            } else {
                self.thread.pool.borrow_mut().take(&instance, at_us)
            };
            let mut upstream = match pooled {
                Some(upstream) => upstream,
                None => {
                    let timeout = self.thread.core.config.connect_timeout;
                    let connecting = Box::pin(self.connect(&instance, timeout));
                    match connecting.await? {
                        Ok(upstream) if upstream.is_alive() => upstream,
                        // Closed before anything was sent.
                        Ok(_) if second => return Err(Failure::Refusal(Refusal::Unreachable)),
                        Ok(_) => {
                            second = true;
                            continue;
                        }
                        Err(error) => {
                            tracing::debug!(instance = %instance.id, %error, "an instance refused a connection");
                            instance.suspect(now_us() + SUSPECT_US);
                            if second {
                                return Err(Failure::Refusal(Refusal::Unreachable));
                            }
                            second = true;
                            self.move_on(flight, &instance)?;
                            continue;
                        }
                    }
                }
            };
            let copy = if upstream.reused && !second {
                body.replay()
            } else {
                None
            };
            let again = copy.is_some();
            let sent = std::mem::replace(&mut body, copy.unwrap_or_default());
            match self.exchange(&mut upstream, &instance, asked, sent).await? {
                Exchanged::Answer(head) => return Ok((head, upstream)),
                Exchanged::Failed { answered: false }
                    if again && (upstream.none_sent() || asked.is_idempotent()) =>
                {
                    second = true;
                }
                Exchanged::Failed { .. } => return Err(Failure::Refusal(Refusal::Unreachable)),
            }
        }
    }

    /// Takes the request from an instance that cannot be reached to another one.
    fn move_on(&self, flight: &mut Flight, from: &Arc<Instance>) -> Result<(), Refusal> {
        let rotation = self.thread.rotation();
        let state = &flight.deployment().state;
        let slot = state
            .other_slot(from, rotation)
            .ok_or(Refusal::Unreachable)?;
        flight.serve(slot, now_us());
        Ok(())
    }

    async fn connect(
        &self,
        instance: &Instance,
        timeout: Duration,
    ) -> Result<std::io::Result<Box<Upstream>>, Failure> {
        let thread = &self.thread;
        thread.make_room_for_an_upstream();
        for _ in 0..CONNECT_TRIES {
            let mut connecting = pin!(Upstream::connect(instance, timeout));
            let connected = self.wait(|cx| connecting.as_mut().poll(cx)).await;
            match connected.map_err(|stopped| stopped.or(Refusal::Timeout))? {
                Ok(mut upstream) => {
                    upstream.counted = Some(Counted::among(&thread.core.upstreams));
                    return Ok(Ok(upstream));
                }
                Err(error) if is_lack(&error) => thread.give_way(TO_AN_INSTANCE, &error),
                Err(error) => return Ok(Err(error)),
            }
        }
        // No word about the instance.
        Err(Refusal::Lacking.into())
    }

    async fn exchange(
        &self,
        upstream: &mut Upstream,
        instance: &Instance,
        asked: &Asked<'_>,
        body: RequestBody,
    ) -> Result<Exchanged, Failure> {
        let mut body = Some(body);
        let mut spare = self.thread.spare.take();
        let answered = self
            .wait(|cx| {
                if let Some(body) = body.take() {
                    upstream.begin(cx, &asked.of(instance), body);
                }
                upstream.poll_head(cx, &mut spare)
            })
            .await;
        match self.upload.fault.get() {
            Some(Fault::TooLarge) => return Err(Failure::Refusal(Refusal::BodyTooLarge)),
            Some(Fault::Broken) => return Err(Failure::Refusal(Refusal::Body)),
            None => {}
        }
        match answered.map_err(|stopped| stopped.or(Refusal::Timeout))? {
            Ok(head) => Ok(Exchanged::Answer(head)),
            Err(Broken::Malformed) => Err(Failure::Refusal(Refusal::BadAnswer)),
            Err(Broken::Off | Broken::Request) => Ok(Exchanged::Failed {
                answered: upstream.answered(),
            }),
        }
    }

    /// The head of the answer for the client; the body follows as the instance sends it.
    fn answer(
        self: &Rc<Self>,
        mut flight: Flight,
        (head, upstream): Answer,
        id: &HeaderValue,
    ) -> Response<ReplyBody> {
        let outcome = Outcome::of(head.status);
        let status = match outcome {
            Outcome::Success => head.status,
            _ => StatusCode::FAILED_DEPENDENCY,
        };
        let deployment = flight.deployment().header.clone();
        flight.answer(status);
        let body = Exchange::begin(self, flight, upstream, outcome);
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = head.headers;
        // None of these is there: what an instance says of them is not passed on.
        let headers = response.headers_mut();
        headers.append(DEPLOYMENT, deployment);
        headers.append(REQUEST_ID, id.clone());
        if outcome != Outcome::Success {
            headers.append(MODEL_STATUS, HeaderValue::from(head.status.as_u16()));
        }
        if let Some(reason) = head.reason {
            response.extensions_mut().insert(reason);
        }
        response
    }
}

/// What a client asks, whichever instance will answer.
struct Asked<'a> {
    method: &'a http::Method,
    path: &'a str,
    headers: &'a HeaderMap,
    id: &'a HeaderValue,
}

impl<'a> Asked<'a> {
    /// Whether the client holds that being done twice is as being done once.
    fn is_idempotent(&self) -> bool {
        self.method.is_idempotent() || self.headers.contains_key("idempotency-key")
    }

    fn of(&self, instance: &'a Instance) -> Ask<'a> {
        Ask {
            method: self.method,
            path: self.path,
            headers: self.headers,
            host: &instance.host,
            id: self.id,
        }
    }
}

/// What became of one try.
enum Exchanged {
    Answer(Box<Head>),
    Failed {
        /// Part of an answer had come.
        answered: bool,
    },
}

/// The deployment that the request names, or the one whose turn it is.
fn choose(endpoint: &Endpoint, headers: &HeaderMap) -> Result<usize, Refusal> {
    // Few requests name one, and fewer names are looked at than it takes to hash two.
    let find = |wanted: HeaderName| headers.iter().find(|(name, _)| **name == wanted);
    let named = find(DEPLOYMENT).or_else(|| find(AZURE_DEPLOYMENT));
    if let Some((_, name)) = named {
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
