//! Sends requests and reports their results. Owns the connections.
//!
//! Invariant: at most `connections_max` requests are open; each ends in exactly one
//! [`CompletedRequest`].

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::Instant;

const DEPLOYMENT_HEADER: &str = "penstock-deployment";
const ERROR_CODE_HEADER: &str = "penstock-error-code";

/// The request that is sent repeatedly.
#[derive(Clone, Debug)]
pub struct RequestTemplate {
    pub url: String,
    pub key: Option<String>,
    pub deployment: Option<String>,
    pub body: Bytes,
}

/// A request that ended, and its result.
#[derive(Clone, Debug)]
pub struct CompletedRequest {
    /// When it was due, from the start.
    pub due: Duration,
    /// From when it was due until it could be sent.
    pub lag: Duration,
    /// Whether all connections were in use when it was due.
    pub queued: bool,
    /// From when it was due until its end: what a client arriving at that moment would have seen.
    pub latency: Duration,
    /// From when it was sent until its end.
    pub service: Duration,
    pub result: Result<ResponseInfo, RequestFailure>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseInfo {
    pub status: u16,
    pub error_code: Option<String>,
    pub deployment: Option<String>,
}

/// Why there was no complete response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestFailure {
    Connect(String),
    Timeout,
    ClosedEarly,
}

pub struct Sender {
    authority: String,
    path: Uri,
    headers: HeaderMap,
    body: Bytes,
    timeout: Duration,
    slots: Semaphore,
    /// A stack, so that few connections stay open at a low rate.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Sender {
    pub fn new(
        template: &RequestTemplate,
        connections_max: usize,
        timeout: Duration,
    ) -> Result<Arc<Self>> {
        let uri: Uri = template
            .url
            .parse()
            .with_context(|| format!("`{}` is not a URL", template.url))?;
        if uri.scheme_str() != Some("http") {
            bail!("`{uri}`: only http:// URLs are supported");
        }
        let Some(authority) = uri.authority() else {
            bail!("`{uri}` has no host");
        };
        let port = authority.port_u16().unwrap_or(80);
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        Ok(Arc::new(Self {
            authority: format!("{}:{port}", authority.host()),
            path: path.parse().context("invalid path in the URL")?,
            headers: headers(template, authority.as_str())?,
            body: template.body.clone(),
            timeout,
            slots: Semaphore::new(connections_max),
            idle: Mutex::default(),
        }))
    }

    /// Sends the request that was due at `start + due`.
    pub async fn send(&self, start: Instant, due: Duration) -> CompletedRequest {
        let (slot, queued) = match self.slots.try_acquire() {
            Ok(slot) => (Some(slot), false),
            // The semaphore is never closed, so acquiring cannot fail.
            Err(_) => (self.slots.acquire().await.ok(), true),
        };
        let sent_at = Instant::now();
        let result = match tokio::time::timeout(self.timeout, self.exchange()).await {
            Ok(result) => result,
            Err(_) => Err(RequestFailure::Timeout),
        };
        let ended_at = Instant::now();
        drop(slot);
        let due_at = start + due;
        CompletedRequest {
            due,
            lag: sent_at.saturating_duration_since(due_at),
            queued,
            latency: ended_at.saturating_duration_since(due_at),
            service: ended_at.saturating_duration_since(sent_at),
            result,
        }
    }

    async fn exchange(&self) -> Result<ResponseInfo, RequestFailure> {
        let mut request = self.request();
        if let Some(mut connection) = self.take_idle().await {
            match connection.try_send_request(request).await {
                Ok(response) => return self.finish(connection, response).await,
                // The server closed the idle connection before anything was sent: not an error.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(RequestFailure::ClosedEarly),
                },
            }
        }
        let mut connection = self.connect().await?;
        match connection.send_request(request).await {
            Ok(response) => self.finish(connection, response).await,
            Err(_) => Err(RequestFailure::ClosedEarly),
        }
    }

    async fn finish(
        &self,
        connection: SendRequest<Full<Bytes>>,
        response: Response<Incoming>,
    ) -> Result<ResponseInfo, RequestFailure> {
        let response_info = ResponseInfo {
            status: response.status().as_u16(),
            error_code: header_text(response.headers(), ERROR_CODE_HEADER),
            deployment: header_text(response.headers(), DEPLOYMENT_HEADER),
        };
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            frame.map_err(|_| RequestFailure::ClosedEarly)?;
        }
        self.lock_idle().push(connection);
        Ok(response_info)
    }

    async fn take_idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        loop {
            let mut connection = self.lock_idle().pop()?;
            if connection.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, RequestFailure> {
        let stream = TcpStream::connect(&self.authority)
            .await
            .map_err(|error| RequestFailure::Connect(error_kind(&error)))?;
        let _ = stream.set_nodelay(true);
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|_| RequestFailure::ClosedEarly)?;
        // Whoever waits for the response gets its error.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(sender)
    }

    fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.path.clone();
        *request.headers_mut() = self.headers.clone();
        request
    }

    fn lock_idle(&self) -> std::sync::MutexGuard<'_, Vec<SendRequest<Full<Bytes>>>> {
        // A panic cannot leave it inconsistent.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn headers(template: &RequestTemplate, host: &str) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert(HOST, HeaderValue::from_str(host)?);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(key) = &template.key {
        let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
            .context("the key has characters that are not allowed in a header")?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    if let Some(deployment) = &template.deployment {
        let value = HeaderValue::from_str(deployment)
            .with_context(|| format!("`{deployment}` is not a valid deployment name"))?;
        headers.insert(DEPLOYMENT_HEADER, value);
    }
    Ok(headers)
}

fn header_text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}

/// The error kind without addresses and numbers, so that equal causes are counted together.
fn error_kind(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::Other => error.to_string(),
        kind => kind.to_string(),
    }
}
