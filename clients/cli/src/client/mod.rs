//! The HTTP client of the control API: paths, tokens, problem documents, read-your-writes.
//!
//! Invariant: after a write, each read carries the position of that write, so that a command sees its
//! own writes.

pub mod config;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use contract::problem::Problem;
use reqwest::header::{HeaderMap, HeaderName};
use reqwest::{Method, RequestBuilder, Response, Url};
use serde_json::Value;

use config::ConnectionSettings;

/// The header with the position of a write; a read that carries it waits for that position.
pub const POSITION_HEADER: &str = "penstock-position";
/// The header with the gateway's error code; control never sends it.
const GATEWAY_HEADER: &str = "penstock-error-code";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "the server at {server} cannot be reached: {reason}. Start it with `penstock serve`, or name another with --server"
    )]
    Unreachable {
        server: String,
        reason: String,
        source: Option<reqwest::Error>,
    },
    #[error(
        "the gateway answered at {server}: it serves models, and this command needs the control API. Its address is `server` in client.json, in the data folder of the process that runs control, and `control` in that process's line `ready`. Name it with --server, or leave --server and PENSTOCK_SERVER out on that machine"
    )]
    Gateway { server: String },
    #[error("{}", refusal(.0))]
    Refused(Box<ProblemResponse>),
    #[error("the answer of {url} cannot be read: {reason}")]
    Unreadable {
        url: String,
        reason: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("`{part}` cannot be part of a request: {reason}")]
    BadRequest {
        part: String,
        reason: String,
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

/// A response other than 2xx.
#[derive(Debug)]
pub struct ProblemResponse {
    pub status: u16,
    pub problem: Problem,
}

/// Formats a problem document for people: the detail, then one line per fault with its field.
pub fn refusal(refusal: &ProblemResponse) -> String {
    let problem = &refusal.problem;
    let mut text = if problem.detail.is_empty() {
        format!("{} ({})", problem.title, refusal.status)
    } else {
        problem.detail.clone()
    };
    for fault in &problem.errors {
        let pointer = if fault.pointer.is_empty() {
            "/"
        } else {
            &fault.pointer
        };
        text.push_str(&format!("\n  {pointer}: {}", fault.detail));
    }
    if refusal.status == 401 {
        text.push_str("\n  Give a token with PENSTOCK_TOKEN, or name a client.json with one by PENSTOCK_CONFIG.");
    }
    text
}

/// A 2xx response with its complete body.
#[derive(Debug)]
pub struct ApiResponse {
    pub status: u16,
    pub headers: HeaderMap,
    pub text: String,
    url: String,
}

impl ApiResponse {
    pub fn json(&self) -> Result<Value, ClientError> {
        serde_json::from_str(&self.text).map_err(|error| ClientError::Unreadable {
            url: self.url.clone(),
            reason: error.to_string(),
            source: error.into(),
        })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    connection: ConnectionSettings,
    position: AtomicU64,
    has_written: AtomicBool,
}

/// Names and values of a query; absent values are left out.
pub type QueryPairs<'a> = &'a [(&'a str, Option<String>)];

impl Client {
    pub fn new(connection: ConnectionSettings) -> Result<Self, ClientError> {
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("penstock/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT);
        if !connection.server.starts_with("https:") {
            // A proxy would read the token.
            http = http.no_proxy();
        }
        let http = http.build().map_err(|error| ClientError::Unreachable {
            server: connection.server.clone(),
            reason: error.to_string(),
            source: Some(error),
        })?;
        Ok(Self {
            http,
            connection,
            position: AtomicU64::new(0),
            has_written: AtomicBool::new(false),
        })
    }

    pub fn server(&self) -> &str {
        &self.connection.server
    }

    /// The gateway's address, where the client's configuration names it.
    pub fn gateway(&self) -> Option<&str> {
        self.connection.gateway.as_deref()
    }

    pub fn http(&self) -> &reqwest::Client {
        &self.http
    }

    pub async fn get(
        &self,
        path: &[&str],
        query: QueryPairs<'_>,
    ) -> Result<ApiResponse, ClientError> {
        self.send(self.request(Method::GET, path, query)?).await
    }

    /// As [`get`](Self::get); `None` on 404.
    pub async fn find(&self, path: &[&str]) -> Result<Option<ApiResponse>, ClientError> {
        match self.get(path, &[]).await {
            Ok(answer) => Ok(Some(answer)),
            Err(ClientError::Refused(refusal)) if refusal.status == 404 => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub async fn put(
        &self,
        path: &[&str],
        query: QueryPairs<'_>,
        body: &Value,
    ) -> Result<ApiResponse, ClientError> {
        let request = self.request(Method::PUT, path, query)?.json(body);
        self.send(request).await
    }

    #[expect(clippy::disallowed_methods, reason = "a unique key for each request")]
    pub async fn post(&self, path: &[&str], body: &Value) -> Result<ApiResponse, ClientError> {
        let key = uuid::Uuid::new_v4().to_string();
        let request = self
            .request(Method::POST, path, &[])?
            .header("idempotency-key", key)
            .json(body);
        self.send(request).await
    }

    pub async fn delete(&self, path: &[&str]) -> Result<ApiResponse, ClientError> {
        self.send(self.request(Method::DELETE, path, &[])?).await
    }

    /// A streaming response: server-sent events, or a followed log.
    pub async fn stream(
        &self,
        path: &[&str],
        query: QueryPairs<'_>,
        headers: &[(HeaderName, String)],
    ) -> Result<Response, ClientError> {
        let url = self.url(path, query)?;
        let mut request = self.authorized(self.http.get(url.clone()));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let response = request.send().await.map_err(|e| self.unreachable(e))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let is_gateway = response.headers().contains_key(GATEWAY_HEADER);
        let status = response.status().as_u16();
        let text = response.text().await.unwrap_or_default();
        Err(self.refused(is_gateway, status, &text))
    }

    /// Waits until the read models reflect this client's writes, so that the next command sees them.
    /// Errors are ignored: the writes are durable either way.
    pub async fn settle(&self) {
        if self.position.load(Ordering::Relaxed) > 0 && self.has_written.load(Ordering::Relaxed) {
            let _ = self
                .get(&["v1", "endpoints"], &[("limit", Some("1".into()))])
                .await;
        }
    }

    fn request(
        &self,
        method: Method,
        path: &[&str],
        query: QueryPairs<'_>,
    ) -> Result<RequestBuilder, ClientError> {
        let reads = method == Method::GET;
        self.has_written.fetch_or(!reads, Ordering::Relaxed);
        let mut request = self.http.request(method, self.url(path, query)?);
        // Verifying, replaying or archiving a long log may take arbitrarily long.
        if !matches!(path.get(1), Some(&("events" | "archive"))) {
            request = request.timeout(REQUEST_TIMEOUT);
        }
        let last_position = self.position.load(Ordering::Relaxed);
        let request = if reads && last_position > 0 {
            request.header(POSITION_HEADER, last_position.to_string())
        } else {
            request
        };
        Ok(self.authorized(request))
    }

    fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.connection.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    fn url(&self, path: &[&str], query: QueryPairs<'_>) -> Result<Url, ClientError> {
        let server = &self.connection.server;
        let mut url = Url::parse(server).map_err(|error| ClientError::BadRequest {
            part: server.clone(),
            reason: error.to_string(),
            source: Some(error.into()),
        })?;
        if let Some(invalid) = path
            .iter()
            .find(|part| part.is_empty() || **part == "." || **part == "..")
        {
            return Err(ClientError::BadRequest {
                part: (*invalid).to_owned(),
                reason: "a name has at least one character, and is not made of dots".into(),
                source: None,
            });
        }
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        for (name, value) in query {
            if let Some(value) = value {
                url.query_pairs_mut().append_pair(name, value);
            }
        }
        Ok(url)
    }

    async fn send(&self, request: RequestBuilder) -> Result<ApiResponse, ClientError> {
        let response = request.send().await.map_err(|e| self.unreachable(e))?;
        let (url, status) = (response.url().to_string(), response.status());
        let headers = response.headers().clone();
        let text = response
            .text()
            .await
            .map_err(|error| ClientError::Unreadable {
                url: url.clone(),
                reason: root_cause(&error),
                source: error.into(),
            })?;
        if !status.is_success() {
            let is_gateway = headers.contains_key(GATEWAY_HEADER);
            return Err(self.refused(is_gateway, status.as_u16(), &text));
        }
        let answer = ApiResponse {
            status: status.as_u16(),
            headers,
            text,
            url,
        };
        self.record_position(&answer);
        Ok(answer)
    }

    fn record_position(&self, answer: &ApiResponse) {
        let position = answer
            .header(POSITION_HEADER)
            .and_then(|text| text.parse().ok());
        if let Some(position) = position {
            self.position.fetch_max(position, Ordering::Relaxed);
        }
    }

    fn refused(&self, is_gateway: bool, status: u16, text: &str) -> ClientError {
        match is_gateway {
            true => ClientError::Gateway {
                server: self.connection.server.clone(),
            },
            false => refused(status, text),
        }
    }

    fn unreachable(&self, error: reqwest::Error) -> ClientError {
        let reason = if error.is_timeout() {
            "it did not answer in time".to_owned()
        } else {
            root_cause(&error)
        };
        ClientError::Unreachable {
            server: self.connection.server.clone(),
            reason,
            source: Some(error),
        }
    }
}

/// The innermost cause, which is the most specific one.
pub fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// The error of a problem document, or of any other body if something else answered.
fn refused(status: u16, text: &str) -> ClientError {
    let problem = serde_json::from_str::<Problem>(text).unwrap_or_else(|_| {
        // Control answers 404 with a problem document.
        let hint = match status {
            404 => "; it may not be a control API: see --server",
            _ => "",
        };
        Problem {
            kind: "about:blank".into(),
            title: "the request was refused".into(),
            status,
            detail: format!("the server answered {status}: {}{hint}", excerpt(text)),
            code: String::new(),
            errors: Vec::new(),
        }
    });
    ClientError::Refused(Box::new(ProblemResponse { status, problem }))
}

fn excerpt(text: &str) -> String {
    let line: String = text.trim().chars().take(200).collect();
    if line.is_empty() {
        "without a reason".into()
    } else {
        line.replace('\n', " ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(server: &str) -> Client {
        Client::new(ConnectionSettings {
            server: server.into(),
            gateway: None,
            token: None,
        })
        .unwrap()
    }

    #[test]
    fn names_are_escaped_in_paths_and_absent_values_left_out_of_queries() {
        let url = client("http://h:1")
            .url(
                &["v1", "decisions", "a/b?c"],
                &[("limit", Some("5".into())), ("since", None)],
            )
            .unwrap();
        assert_eq!(url.as_str(), "http://h:1/v1/decisions/a%2Fb%3Fc?limit=5");
    }

    #[test]
    fn a_name_of_dots_cannot_escape_its_path() {
        assert!(
            client("http://h:1")
                .url(&["v1", "endpoints", ".."], &[])
                .is_err()
        );
    }

    #[test]
    fn a_problem_is_shown_with_one_line_per_fault() {
        let text = r#"{"type":"t","title":"Invalid","status":422,"detail":"The document is refused.","code":"invalid-document",
            "errors":[{"pointer":"/spec/instances","detail":"at most 1000"},{"pointer":"","detail":"no spec"}]}"#;
        assert_eq!(
            refused(422, text).to_string(),
            "The document is refused.\n  /spec/instances: at most 1000\n  /: no spec"
        );
    }

    #[test]
    fn a_response_without_a_problem_document_is_still_readable() {
        assert_eq!(
            refused(502, "<html>\nbad gateway").to_string(),
            "the server answered 502: <html> bad gateway"
        );
        let elsewhere = refused(404, "").to_string();
        assert!(elsewhere.contains("see --server"), "{elsewhere}");
    }
}
