//! Handles one request, from its head to the last byte of its response.
//!
//! Invariants: nothing is sent to an instance without a slot on it; when this future or the
//! response body is dropped, the connection to the instance closes and the slot is released.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use contract::resources::{AuthMode, ErrorMapping, Protocol};
use http::header::{CONNECTION, CONTENT_TYPE, LOCATION};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;

use crate::client::{ClientConnection, RequestError};
use crate::exchange::{Exchange, ResponseBody};
use crate::forwarded::Origin;
use crate::framing::HeadError;
use crate::in_flight::InFlightRequest;
use crate::outcome::RequestOutcome;
use crate::paths::{DeploymentPaths, PathKind};
use crate::receive::receive_body;
use crate::reply::{AZURE_DEPLOYMENT, DEPLOYMENT, REQUEST_ID, Refusal, mark_model_error};
use crate::router::ServedEndpoint;
use crate::send::{ClientRequest, UpstreamResponse, await_body, send};
use crate::shard::count_refusal;
use crate::target::{Target, authorize, is_health_check};
use crate::timer::now_us;

/// The client has closed its connection, so there is no one to respond to.
#[derive(Debug, thiserror::Error)]
#[error("the client disconnected before the response")]
pub struct ClientLeft;

/// Why a request is not proxied; it may end without any response.
enum ProxyError {
    Refused(RefusedRequest),
    ClientLeft,
}

/// Where a request is routed.
struct RouteMatch<'a> {
    endpoint: Arc<ServedEndpoint>,
    deployment: usize,
    /// What precedes the endpoint's paths.
    prefix: &'a str,
    /// The instance's path and query.
    path: Cow<'a, str>,
}

/// A refusal, how it is answered, and the deployment that the request was for.
struct RefusedRequest {
    refusal: Refusal,
    error_mapping: ErrorMapping,
    protocol: Protocol,
    deployment: Option<HeaderValue>,
}

pub async fn handle(
    client: Rc<ClientConnection>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, ClientLeft> {
    client.connection.begin_response();
    let (mut parts, incoming) = request.into_parts();
    let own_id = || client_request_id(&parts.headers);
    let id = client.connection.has_request_ids().then(own_id).flatten();
    let id = id.unwrap_or_else(|| client.worker.request_id());
    client.upload.begin(&incoming);
    let exists = |name: &str| client.worker.endpoint(name).is_some();
    if is_health_check(&parts, client.worker.domain(), exists) {
        client.connection.end_response();
        let mut response = healthy(id);
        close_if_unread(&client, response.headers_mut());
        return Ok(response);
    }
    let result = serve(&client, &parts, incoming, &id).await;
    parts.headers.clear();
    client.worker.spare_headers.replace(parts.headers);
    let refused = match result {
        Ok(response) => return Ok(response),
        Err(ProxyError::ClientLeft) => return Err(ClientLeft),
        Err(ProxyError::Refused(refused)) => refused,
    };
    client.connection.end_response();
    let mut response = refused
        .refusal
        .response(id, refused.error_mapping, refused.protocol);
    if let Some(deployment) = refused.deployment {
        response.headers_mut().insert(DEPLOYMENT, deployment);
    }
    close_if_unread(&client, response.headers_mut());
    Ok(response.map(|body| ResponseBody::Full(Some(body.into()))))
}

/// Says that the connection closes, if the body of its request is left behind.
fn close_if_unread(client: &ClientConnection, headers: &mut HeaderMap) {
    if client.leaves_body() {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

/// The response to a check of the gateway's own health: that it responds at all.
fn healthy(id: HeaderValue) -> Response<ResponseBody> {
    let body = Bytes::from_static(b"ok\n");
    let mut response = Response::new(ResponseBody::Full(Some(body)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(REQUEST_ID, id);
    response
}

async fn serve(
    client: &Rc<ClientConnection>,
    parts: &Parts,
    incoming: Incoming,
    id: &HeaderValue,
) -> Result<Response<ResponseBody>, ProxyError> {
    let arrived_us = now_us();
    let matched = match_route(client, parts).map_err(ProxyError::Refused)?;
    let is_counted = matched.endpoint.deployments[matched.deployment].counts(&parts.method);
    let mut in_flight = InFlightRequest::new(
        client.worker.meter.clone(),
        matched.endpoint,
        matched.deployment,
        arrived_us,
        is_counted,
        client.upload.clone(),
    );
    let request = ClientRequest {
        method: &parts.method,
        path: &matched.path,
        headers: &parts.headers,
        id,
        origin: Origin {
            peer: &client.peer,
            authority: parts.uri.authority().map(|host| host.as_str()),
            prefix: matched.prefix,
        },
        passes_authorization: in_flight.deployment().passes_authorization,
    };
    match forward(client, &mut in_flight, &request, incoming).await {
        Ok(response) => Ok(build_response(client, in_flight, response, &request)),
        // Dropping the request without an outcome counts it as `client_left`.
        Err(RequestError::ClientLeft) => Err(ProxyError::ClientLeft),
        Err(RequestError::Refusal(refusal)) => {
            let deployment = in_flight.deployment();
            let refused = RefusedRequest {
                refusal,
                error_mapping: deployment.error_mapping,
                protocol: deployment.protocol,
                deployment: Some(deployment.name_header.clone()),
            };
            in_flight.refuse(refusal);
            Err(ProxyError::Refused(refused))
        }
    }
}

/// From the choice of the deployment to the head of the response.
async fn forward(
    client: &ClientConnection,
    in_flight: &mut InFlightRequest,
    request: &ClientRequest<'_>,
    incoming: Incoming,
) -> Result<UpstreamResponse, RequestError> {
    let body = receive_body(client, incoming, in_flight).await?;
    in_flight.admit()?;
    let at_us = acquire_instance(client, in_flight).await?;
    let limits = in_flight.deployment().limits;
    let end_us = limits.end(at_us);
    client.connection.request_end_us.set(Some(end_us));
    let deadline_us = limits.first_byte(end_us, at_us);
    client.connection.deadline.borrow_mut().set(deadline_us);
    let (head, mut upstream) = send(client, in_flight, request, body, at_us).await?;
    if !upstream.is_begun() {
        Box::pin(await_body(client, in_flight, &mut upstream)).await?;
    }
    let mapping = in_flight.deployment().error_mapping;
    let (status, outcome) = client_status(head.status, mapping);
    in_flight.begin_response(status, outcome)?;
    Ok((head, upstream))
}

/// Returns the client's status for a model's status, and the request's outcome.
fn client_status(model_status: StatusCode, mapping: ErrorMapping) -> (StatusCode, RequestOutcome) {
    let outcome = RequestOutcome::from_model_status(model_status);
    match (outcome, mapping) {
        (RequestOutcome::Success, _) | (_, ErrorMapping::Pass) => (model_status, outcome),
        (_, ErrorMapping::Azure) => (StatusCode::FAILED_DEPENDENCY, outcome),
    }
}

/// Finds the endpoint and deployment of a request that is allowed; counts those that are not.
fn match_route<'a>(
    client: &ClientConnection,
    parts: &'a Parts,
) -> Result<RouteMatch<'a>, RefusedRequest> {
    let mut endpoint_name = Cow::Borrowed("");
    let (mut error_mapping, mut protocol) = (ErrorMapping::default(), Protocol::default());
    let mut resolve = || {
        if let Some(token) = parts.method.as_str().strip_prefix('!') {
            let reason = HeadError::from_token(token).unwrap_or(HeadError::Malformed);
            return Err(Refusal::Head(reason));
        }
        let exists = |name: &str| client.worker.endpoint(name).is_some();
        let target = Target::parse(parts, client.worker.domain(), exists)?;
        let endpoint = client
            .worker
            .endpoint(&target.endpoint)
            .ok_or(Refusal::UnknownEndpoint)?;
        (error_mapping, protocol) = (endpoint.error_mapping, endpoint.protocol);
        // Without routes, other paths are as unknown as those of no endpoint.
        endpoint.shares(target.kind)?;
        endpoint_name = target.endpoint.clone();
        target.check_segments()?;
        if endpoint.auth == AuthMode::Key {
            authorize(&endpoint, &parts.headers)?;
        }
        let named = || named_deployment(&parts.headers);
        let named = client.connection.names_deployments().then(named).flatten();
        let deployment = choose_deployment(&endpoint, target.kind, named)?;
        let path = match &endpoint.deployments[deployment].paths {
            Some(paths) => paths.upstream_path(target.kind, target.path),
            None => Cow::Borrowed(target.path),
        };
        Ok(RouteMatch {
            endpoint,
            deployment,
            prefix: target.prefix(parts),
            path,
        })
    };
    resolve().map_err(|refusal| {
        let status = refusal.status(error_mapping).as_u16();
        count_refusal(&client.worker.meter.shard, &endpoint_name, status);
        RefusedRequest {
            refusal,
            error_mapping,
            protocol,
            deployment: None,
        }
    })
}

/// Gets the request onto an instance, immediately or through the queue; returns since when.
async fn acquire_instance(
    client: &ClientConnection,
    in_flight: &mut InFlightRequest,
) -> Result<u64, RequestError> {
    let now = in_flight.received_us();
    if in_flight.try_serve(client.worker.rotation(), now)? {
        return Ok(now);
    }
    let queue_wait_us = in_flight.deployment().queue_wait_us;
    client
        .connection
        .deadline
        .borrow_mut()
        .set(now + queue_wait_us);
    in_flight.queue()?;
    let state = in_flight.deployment().state.clone();
    if !state.has_instances() {
        client
            .worker
            .shared
            .early_frames
            .request(state.endpoint.bucket());
    }
    let interrupt = match client.wait(|cx| in_flight.poll_served(cx)).await {
        Ok(result) => return Ok(result?),
        Err(interrupt) => interrupt,
    };
    let retry_after_secs = in_flight.deployment().retry_after_secs();
    Err(interrupt.into_error(if state.has_instances() {
        Refusal::QueuedTooLong { retry_after_secs }
    } else {
        Refusal::NoInstance { retry_after_secs }
    }))
}

/// Builds the response head for the client; the body follows as the instance sends it.
fn build_response(
    client: &Rc<ClientConnection>,
    in_flight: InFlightRequest,
    (mut head, upstream): UpstreamResponse,
    request: &ClientRequest<'_>,
) -> Response<ResponseBody> {
    if head.status != StatusCode::OK
        && let Ok(instance) = in_flight.instance()
    {
        let paths = in_flight.deployment().paths.as_deref();
        rewrite_location(
            &mut head.headers,
            &instance.address,
            request.origin.prefix,
            paths,
        );
    }
    let mapping = in_flight.deployment().error_mapping;
    let (status, outcome) = client_status(head.status, mapping);
    let deployment = in_flight.deployment().name_header.clone();
    let body = Exchange::begin(client, in_flight, upstream, &head.headers);
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = head.headers;
    // None of these is present yet: an instance's own values are dropped.
    let headers = response.headers_mut();
    headers.append(DEPLOYMENT, deployment);
    headers.append(REQUEST_ID, request.id.clone());
    close_if_unread(client, headers);
    if outcome != RequestOutcome::Success {
        mark_model_error(headers, head.status, mapping);
    }
    if let Some(reason) = head.reason {
        response.extensions_mut().insert(reason);
    }
    response
}

/// Maximum length of a client's own request id.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Returns the client's own id of the request if it is well-formed. It is for the client and the instance; Penstock
/// itself must not rely on it.
fn client_request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut ids = headers.iter().filter(|(name, _)| **name == REQUEST_ID);
    let (_, id) = ids.next()?;
    let is_valid = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    let is_well_formed = (1..=REQUEST_ID_BYTES_MAX).contains(&id.len())
        && id.as_bytes().iter().all(is_valid)
        && ids.next().is_none();
    is_well_formed.then(|| id.clone())
}

/// Makes a location at the instance's own address one at the endpoint, on the host that the client knows.
/// Leaves one that no path of the endpoint reaches.
fn rewrite_location(
    headers: &mut HeaderMap,
    address: &str,
    prefix: &str,
    paths: Option<&DeploymentPaths>,
) {
    let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
    let path = location.and_then(|location| own_path(location, address));
    let path = path.and_then(|path| match paths {
        Some(paths) => paths.endpoint_path(path),
        None => Some(path.into()),
    });
    let Some(path) = path.filter(|path| !leads_elsewhere(path)) else {
        return;
    };
    let slash = if path.starts_with('/') { "" } else { "/" };
    if let Ok(value) = HeaderValue::try_from(format!("{prefix}{slash}{path}")) {
        headers.insert(LOCATION, value);
    }
}

/// What follows the address in a location there.
fn own_path<'a>(location: &'a str, address: &str) -> Option<&'a str> {
    // An instance that knows of a client's TLS writes https, or no scheme.
    let (scheme, rest) = location.split_once("//")?;
    let (host, path) = rest.split_at_checked(address.len())?;
    let is_own = ["http:", "https:", ""]
        .iter()
        .any(|own| scheme.eq_ignore_ascii_case(own))
        && host.eq_ignore_ascii_case(address)
        && (path.is_empty() || path.starts_with(['/', '?', '#']));
    is_own.then_some(path)
}

/// Whether a browser may take the second part of the path for a host name, which two slashes begin.
fn leads_elsewhere(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|rest| {
        let first = rest.bytes().next();
        first.is_some_and(|byte| matches!(byte, b'/' | b'\\') || !byte.is_ascii_graphic())
    })
}

/// The deployment that the request names, if it does.
fn named_deployment(headers: &HeaderMap) -> Option<&HeaderValue> {
    // Scanning the few headers beats hashing two names.
    let find = |header: HeaderName| headers.iter().find(|(name, _)| **name == header);
    let named = find(DEPLOYMENT).or_else(|| find(AZURE_DEPLOYMENT));
    named.map(|(_, name)| name)
}

/// Returns the named deployment, or else the next by the shares of its path.
fn choose_deployment(
    endpoint: &ServedEndpoint,
    kind: PathKind,
    named: Option<&HeaderValue>,
) -> Result<usize, Refusal> {
    if let Some(name) = named {
        let named = endpoint.deployment(name.as_bytes());
        let named = named.ok_or(Refusal::UnknownDeployment)?;
        return match endpoint.deployments[named].opens(kind) {
            true => Ok(named),
            false => Err(Refusal::UnknownPath),
        };
    }
    endpoint.shares(kind)?.pick()
}
