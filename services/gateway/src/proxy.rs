//! One request from its head to the last byte of its answer.
//!
//! Invariants: nothing is sent to an instance without a slot on it; when this future or the answer's
//! body is dropped, the connection to the instance closes and the slot is free.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;

use crate::ask::{Answer, Asked, ask};
use crate::client::{Client, Failure};
use crate::exchange::{Exchange, ReplyBody};
use crate::flight::Flight;
use crate::framing::HeadError;
use crate::outcome::Outcome;
use crate::receive::receive;
use crate::reply::{AZURE_DEPLOYMENT, DEPLOYMENT, MODEL_STATUS, REQUEST_ID, Refusal};
use crate::router::Endpoint;
use crate::shard::count_refusal;
use crate::target::{Target, authorize};
use crate::timer::now_us;

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

/// Where a request goes.
struct Way {
    endpoint: Arc<Endpoint>,
    deployment: usize,
    /// Where in the request's path that begins which the instance is asked for.
    path_at: usize,
}

/// A refusal, and the deployment that the request was for.
struct Refused {
    refusal: Refusal,
    deployment: Option<HeaderValue>,
}

pub async fn handle(
    client: Rc<Client>,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody>, ClientLeft> {
    client.shared.begin_answer();
    let id = client.thread.request_id();
    let (mut parts, incoming) = request.into_parts();
    let served = serve(&client, &parts, incoming, &id).await;
    parts.headers.clear();
    client.thread.spare.replace(parts.headers);
    let refused = match served {
        Ok(response) => return Ok(response),
        Err(End::ClientLeft) => return Err(ClientLeft),
        Err(End::Refused(refused)) => refused,
    };
    client.shared.end_answer();
    let mut response = refused.refusal.response(id);
    if let Some(deployment) = refused.deployment {
        response.headers_mut().insert(DEPLOYMENT, deployment);
    }
    Ok(response.map(|body| ReplyBody::Whole(Some(body.into()))))
}

async fn serve(
    client: &Rc<Client>,
    parts: &Parts,
    incoming: Incoming,
    id: &HeaderValue,
) -> Result<Response<ReplyBody>, End> {
    let arrived_us = now_us();
    let way = route(client, parts)?;
    client.upload.begin();
    let mut flight = Flight::new(
        client.thread.meter.clone(),
        way.endpoint,
        way.deployment,
        arrived_us,
        client.upload.clone(),
    );
    let asked = Asked {
        method: &parts.method,
        path: &Target::path(parts)[way.path_at..],
        headers: &parts.headers,
        id,
    };
    match fly(client, &mut flight, &asked, incoming).await {
        Ok(found) => Ok(answer(client, flight, found, id)),
        // Dropped without a word, the flight counts the client as gone.
        Err(Failure::ClientLeft) => Err(End::ClientLeft),
        Err(Failure::Refusal(refusal)) => {
            let deployment = Some(flight.deployment().header.clone());
            flight.end_refused(refusal);
            Err(End::Refused(Refused {
                refusal,
                deployment,
            }))
        }
    }
}

/// From the choice of the deployment to the head of the answer.
async fn fly(
    client: &Client,
    flight: &mut Flight,
    asked: &Asked<'_>,
    incoming: Incoming,
) -> Result<Answer, Failure> {
    let body = receive(client, incoming, flight).await?;
    flight.admit()?;
    let at_us = served(client, flight).await?;
    let deadline_us = at_us + flight.deployment().timeout_us;
    client.shared.deadline.borrow_mut().set(deadline_us);
    let (head, upstream) = ask(client, flight, asked, body, at_us).await?;
    let (status, outcome) = passed_on(head.status);
    flight.answer(status, outcome)?;
    Ok((head, upstream))
}

/// What the client gets for a model's status, and what becomes of the request.
fn passed_on(of_model: StatusCode) -> (StatusCode, Outcome) {
    match Outcome::of(of_model) {
        Outcome::Success => (of_model, Outcome::Success),
        outcome => (StatusCode::FAILED_DEPENDENCY, outcome),
    }
}

/// The endpoint and the deployment of a request that may pass; counts those that may not.
fn route(client: &Client, parts: &Parts) -> Result<Way, Refusal> {
    let mut known = "";
    let mut find = || {
        if let Some(token) = parts.method.as_str().strip_prefix('!') {
            let reason = HeadError::of_token(token).unwrap_or(HeadError::Malformed);
            return Err(Refusal::Head(reason));
        }
        let target = Target::of(parts, client.thread.domain())?;
        let endpoint = client
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
        count_refusal(&client.thread.meter.shard, known, refusal.status().as_u16());
    }
    found
}

/// Since when the request is on an instance: at once, or after a turn in the queue.
async fn served(client: &Client, flight: &mut Flight) -> Result<u64, Failure> {
    let now = if client.upload.waited.get() {
        now_us()
    } else {
        flight.arrived_us()
    };
    if flight.try_serve(client.thread.rotation(), now)? {
        return Ok(now);
    }
    let patience_us = flight.deployment().queue_wait_us;
    client.shared.deadline.borrow_mut().set(now + patience_us);
    flight.queue()?;
    let state = flight.deployment().state.clone();
    if !state.has_instances() {
        client.thread.core.early.ask(state.endpoint.bucket());
    }
    let stopped = match client.wait(|cx| flight.poll_served(cx)).await {
        Ok(served) => return Ok(served?),
        Err(stopped) => stopped,
    };
    Err(stopped.or(if state.has_instances() {
        Refusal::QueuedTooLong {
            retry_after_secs: flight.deployment().retry_after_secs(),
        }
    } else {
        Refusal::NoInstance
    }))
}

/// The head of the answer for the client; the body follows as the instance sends it.
fn answer(
    client: &Rc<Client>,
    flight: Flight,
    (head, upstream): Answer,
    id: &HeaderValue,
) -> Response<ReplyBody> {
    let (status, outcome) = passed_on(head.status);
    let deployment = flight.deployment().header.clone();
    let body = Exchange::begin(client, flight, upstream);
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
