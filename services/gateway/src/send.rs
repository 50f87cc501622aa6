//! Sends one request to an instance and waits for the head of its response.
//!
//! Invariant: nothing is sent twice unless no byte of it was sent the first time, or its method or
//! an `Idempotency-Key` makes it idempotent.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use http::{HeaderMap, HeaderValue};
use runtime::descriptors::is_shortage;

use crate::body::{RequestBody, UploadError};
use crate::client::{ClientConnection, Interrupt, RequestError};
use crate::forwarded::Origin;
use crate::in_flight::InFlightRequest;
use crate::instance::ServedInstance;
use crate::reply::Refusal;
use crate::timer::now_us;
use crate::upstream::{
    IdleConnection, ResponseHead, SendProgress, Upstream, UpstreamError, UpstreamRequest,
};

/// How long an instance that refused a connection is tried last.
const SUSPECT_US: u64 = 1_000_000;

/// Out of descriptors: retry once, after closing idle connections.
const CONNECT_ATTEMPTS: u32 = 2;
const INSTANCE_CONNECTION: &str = "a connection to an instance";

/// A response's head, and the connection that its body arrives on.
pub type UpstreamResponse = (Box<ResponseHead>, Box<Upstream>);

/// A client's request, independent of the instance that will serve it.
pub struct ClientRequest<'a> {
    pub method: &'a http::Method,
    pub path: &'a str,
    pub headers: &'a HeaderMap,
    pub id: &'a HeaderValue,
    pub origin: Origin<'a>,
    pub passes_authorization: bool,
}

impl<'a> ClientRequest<'a> {
    /// Whether the request can safely be executed twice.
    fn is_idempotent(&self) -> bool {
        self.method.is_idempotent() || self.headers.contains_key("idempotency-key")
    }

    fn for_instance(&self, instance: &'a ServedInstance) -> UpstreamRequest<'a> {
        UpstreamRequest {
            method: self.method,
            path: self.path,
            headers: self.headers,
            host: &instance.host,
            id: self.id,
            origin: self.origin,
            passes_authorization: self.passes_authorization,
        }
    }
}

/// Which attempt this is; there are at most two.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attempt {
    First,
    Second,
}

impl Attempt {
    /// Advances to the second attempt, or fails after it.
    fn advance(&mut self) -> Result<(), Refusal> {
        match *self {
            Self::First => *self = Self::Second,
            Self::Second => return Err(Refusal::Unreachable),
        }
        Ok(())
    }
}

/// How an attempt ended.
enum AttemptOutcome {
    Head(Box<ResponseHead>),
    /// The instance closed the connection before the response head was complete.
    ClosedEarly,
}

/// Sends the request and waits for the response head. It is retried at most once, and only if no
/// byte was sent; an idempotent request also if a reused connection closed without a response and
/// the body can be sent again.
pub async fn send(
    client: &ClientConnection,
    in_flight: &mut InFlightRequest,
    request: &ClientRequest<'_>,
    mut body: RequestBody,
    at_us: u64,
) -> Result<UpstreamResponse, RequestError> {
    let mut attempt = Attempt::First;
    loop {
        let instance = in_flight.instance()?.clone();
        let pooled = match attempt {
            Attempt::First => client.worker.pool.borrow_mut().take(&instance, at_us),
            Attempt::Second => None,
        };
        let idle = match pooled {
            Some(idle) => idle,
            None => {
                match Box::pin(new_connection(client, in_flight, &instance, &mut attempt)).await? {
                    Some(idle) => idle,
                    None => continue,
                }
            }
        };
        let body_copy = if idle.is_reused() && attempt == Attempt::First {
            body.replay()
        } else {
            None
        };
        let can_resend = body_copy.is_some();
        let to_send = std::mem::replace(&mut body, body_copy.unwrap_or_default());
        let mut upstream = idle.begin(&request.for_instance(&instance), to_send);
        match await_head(client, in_flight, &mut upstream).await? {
            AttemptOutcome::Head(head) => return Ok((head, upstream)),
            AttemptOutcome::ClosedEarly => {}
        }
        let is_resendable = upstream.is_unsent() || request.is_idempotent();
        if !can_resend || upstream.has_response() || !is_resendable {
            return Err(RequestError::Refusal(Refusal::Unreachable));
        }
        attempt.advance()?;
    }
}

/// Opens a new connection to the instance. Returns `None` if the attempt failed before anything was
/// sent and another is to be made, on another instance if this one refused.
async fn new_connection(
    client: &ClientConnection,
    in_flight: &mut InFlightRequest,
    instance: &ServedInstance,
    attempt: &mut Attempt,
) -> Result<Option<IdleConnection>, RequestError> {
    let error = match connect(client, instance).await? {
        Ok(idle) if idle.is_alive() => return Ok(Some(idle)),
        // Closed before anything was sent.
        Ok(_) => {
            attempt.advance()?;
            return Ok(None);
        }
        Err(error) => error,
    };
    tracing::debug!(instance = %instance.id, %error, "instance refused a connection");
    instance.mark_suspect(now_us() + SUSPECT_US);
    attempt.advance()?;
    if !in_flight.move_to_other_instance(client.worker.rotation())? {
        return Err(RequestError::Refusal(Refusal::Unreachable));
    }
    Ok(None)
}

async fn connect(
    client: &ClientConnection,
    instance: &ServedInstance,
) -> Result<std::io::Result<IdleConnection>, RequestError> {
    let worker = &client.worker;
    let timeout = worker.shared.config.connect_timeout;
    worker.make_room_for_upstream();
    for _ in 0..CONNECT_ATTEMPTS {
        let mut connecting = pin!(IdleConnection::connect(
            instance,
            timeout,
            &worker.shared.upstreams
        ));
        let connected = client.wait(|cx| connecting.as_mut().poll(cx)).await;
        match connected.map_err(|interrupt| interrupt.into_error(Refusal::Timeout))? {
            Ok(idle) => return Ok(Ok(idle)),
            Err(error) if is_shortage(&error) => {
                worker.handle_descriptor_shortage(INSTANCE_CONNECTION, &error)
            }
            Err(error) => return Ok(Err(error)),
        }
    }
    // This says nothing about the instance.
    Err(Refusal::OutOfDescriptors.into())
}

/// Limits the wait for a response while the request's body is still being sent: the time of the model
/// begins when it has the request, or when it stops accepting more of it.
struct UploadWait {
    progress: SendProgress,
    received: u64,
    /// Since when there has been nothing to do but wait.
    since_us: u64,
}

impl UploadWait {
    /// Returns `None` if the body was received in full before.
    fn begin(client: &ClientConnection, upstream: &Upstream) -> Option<Self> {
        client.upload.is_streaming().then(|| Self {
            progress: upstream.send_progress(),
            received: client.upload.bytes.get(),
            since_us: now_us(),
        })
    }

    /// Called when there is nothing to do but wait: moves the deadline if there was progress since the last
    /// time, and does not count the wait for the client. Returns whether there is more to send.
    fn update(
        &mut self,
        client: &ClientConnection,
        in_flight: &InFlightRequest,
        upstream: &Upstream,
    ) -> bool {
        let (progress, received) = (upstream.send_progress(), client.upload.bytes.get());
        let has_moved = progress != self.progress || received != self.received;
        let now_us = now_us();
        if self.progress.awaits_client {
            in_flight.waited_for_client(now_us.saturating_sub(self.since_us));
        }
        if let Some(end_us) = client.connection.request_end_us.get()
            && has_moved
        {
            let limits = &in_flight.deployment().limits;
            let deadline_us = if progress.awaits_client {
                limits.next_byte(end_us, now_us)
            } else {
                limits.first_byte(end_us, now_us)
            };
            client.connection.deadline.borrow_mut().set(deadline_us);
        }
        *self = Self {
            progress,
            received,
            since_us: now_us,
        };
        !progress.is_sent
    }
}

async fn await_head(
    client: &ClientConnection,
    in_flight: &InFlightRequest,
    upstream: &mut Upstream,
) -> Result<AttemptOutcome, RequestError> {
    let mut spare_headers = client.worker.spare_headers.take();
    let mut upload = UploadWait::begin(client, upstream);
    let result = poll_fn(|cx| match upstream.poll_head(cx, &mut spare_headers) {
        Poll::Ready(head) => Poll::Ready(Ok(head)),
        Poll::Pending => {
            if let Some(wait) = &mut upload
                && !wait.update(client, in_flight, upstream)
            {
                upload = None;
            }
            client.poll_interrupt(cx).map(Err)
        }
    })
    .await;
    check_upload(client)?;
    match result.map_err(|interrupt| too_late(interrupt, upstream))? {
        Ok(head) => Ok(AttemptOutcome::Head(head)),
        Err(UpstreamError::Malformed) => Err(RequestError::Refusal(Refusal::BadResponse)),
        Err(UpstreamError::ClosedEarly | UpstreamError::RequestBody) => {
            Ok(AttemptOutcome::ClosedEarly)
        }
    }
}

/// The error after a limit of time: the client's, if it has not sent what it announced.
fn too_late(interrupt: Interrupt, upstream: &Upstream) -> RequestError {
    interrupt.into_error(if upstream.send_progress().awaits_client {
        Refusal::Body
    } else {
        Refusal::Timeout
    })
}

/// Waits until the response that has begun may be passed on. One that breaks off before is refused.
pub async fn await_body(
    client: &ClientConnection,
    in_flight: &InFlightRequest,
    upstream: &mut Upstream,
) -> Result<(), RequestError> {
    let mut moved = None;
    let result = poll_fn(|cx| match upstream.poll_begun(cx) {
        Poll::Ready(begun) => Poll::Ready(Ok(begun)),
        Poll::Pending => {
            let now_moved = Some((upstream.unread_bytes(), client.upload.bytes.get()));
            if let Some(end_us) = client.connection.request_end_us.get()
                && now_moved != moved
            {
                let limits = in_flight.deployment().limits;
                let deadline_us = limits.next_byte(end_us, now_us());
                client.connection.deadline.borrow_mut().set(deadline_us);
            }
            moved = now_moved;
            client.poll_interrupt(cx).map(Err)
        }
    })
    .await;
    check_upload(client)?;
    result
        .map_err(|interrupt| too_late(interrupt, upstream))?
        .map_err(|_| RequestError::Refusal(Refusal::Unreachable))
}

/// Refuses a request whose body cannot be passed on.
fn check_upload(client: &ClientConnection) -> Result<(), Refusal> {
    match client.upload.error() {
        Some(UploadError::TooLarge) => Err(Refusal::BodyTooLarge),
        Some(UploadError::Broken) => Err(Refusal::Body),
        None => Ok(()),
    }
}
