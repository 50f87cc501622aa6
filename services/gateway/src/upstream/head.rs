//! Writes request heads and parses response heads.

use std::mem::MaybeUninit;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use hyper::ext::ReasonPhrase;

use crate::forwarded::Origin;
use crate::framing::content_length;
use crate::hop_by_hop::{ConnectionOptions, tokens};
use crate::reply::REQUEST_ID;

/// Maximum size of a response head, including interim responses before it.
pub const RESPONSE_HEAD_BYTES_MAX: usize = 256 * 1024;
/// Maximum number of response headers.
pub const RESPONSE_HEADERS_MAX: usize = 100;

/// The response is not valid HTTP/1.1, or is ambiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the response is not valid HTTP/1.1")]
pub struct MalformedResponse;

/// A request to an instance.
#[derive(Clone, Copy, Debug)]
pub struct UpstreamRequest<'a> {
    pub method: &'a Method,
    /// Path and query.
    pub path: &'a str,
    /// The client's headers; hop-by-hop ones are not forwarded.
    pub headers: &'a HeaderMap,
    pub host: &'a HeaderValue,
    pub id: &'a HeaderValue,
    pub origin: Origin<'a>,
    /// Whether the instance gets the client's `authorization`.
    pub passes_authorization: bool,
}

impl UpstreamRequest<'_> {
    /// Writes the head. A length in the client's headers has been validated and is that of the
    /// body.
    pub fn write(&self, out: &mut Vec<u8>, chunked: bool) {
        for piece in [
            self.method.as_str().as_bytes(),
            b" ",
            self.path.as_bytes(),
            b" HTTP/1.1\r\nhost: ",
            self.host.as_bytes(),
            b"\r\nx-request-id: ",
            self.id.as_bytes(),
            b"\r\n",
        ] {
            out.extend_from_slice(piece);
        }
        let mut connection_options = ConnectionOptions::default();
        // Scanning the few headers beats hashing a name.
        for (_, connection) in self.headers.iter().filter(|(name, _)| **name == CONNECTION) {
            connection_options.add(connection.as_bytes());
        }
        let mut host: &[u8] = b"";
        for (name, value) in self.headers {
            if name == HOST {
                host = value.as_bytes();
                continue;
            }
            let is_passed = self.passes_authorization && name == AUTHORIZATION;
            let is_dropped = name == REQUEST_ID
                || connection_options.is_hop_by_hop(name)
                || self.origin.replaces(name);
            if is_dropped && !is_passed {
                continue;
            }
            out.extend_from_slice(name.as_str().as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        self.origin.write(host, self.headers, out);
        if chunked {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// How the end of a response body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseLength {
    Known(u64),
    Chunked,
    /// It ends with the connection.
    UntilClose,
}

/// The head of a response, without hop-by-hop headers.
#[derive(Debug)]
pub struct ResponseHead {
    pub status: StatusCode,
    /// Set if it is not the canonical reason.
    pub reason: Option<ReasonPhrase>,
    pub headers: HeaderMap,
    pub length: ResponseLength,
    /// Whether the instance allows another request on this connection.
    pub is_keep_alive: bool,
}

/// What some bytes begin with.
#[derive(Debug)]
pub enum ParsedHead {
    Partial,
    /// An interim response of this many bytes.
    Interim(usize),
    /// A head of this many bytes.
    Final(Box<ResponseHead>, usize),
}

/// What a response's headers say about its framing.
#[derive(Default)]
struct ResponseFraming {
    chunked: bool,
    length: Option<u64>,
    close: bool,
    keep_alive: bool,
    connection_options: ConnectionOptions,
}

impl ResponseFraming {
    fn read(headers: &[httparse::Header<'_>]) -> Result<Self, MalformedResponse> {
        let mut framing = Self::default();
        for header in headers {
            let name = header.name;
            match name.len() {
                10 if name.eq_ignore_ascii_case("connection") => framing.connection(header.value),
                14 if name.eq_ignore_ascii_case("content-length") => {
                    framing.length(header.value)?
                }
                17 if name.eq_ignore_ascii_case("transfer-encoding") => {
                    // The coding is not forwarded, so no other can be supported.
                    if framing.chunked || !header.value.eq_ignore_ascii_case(b"chunked") {
                        return Err(MalformedResponse);
                    }
                    framing.chunked = true;
                }
                _ => {}
            }
        }
        if framing.chunked && framing.length.is_some() {
            return Err(MalformedResponse);
        }
        Ok(framing)
    }

    fn connection(&mut self, value: &[u8]) {
        if value == b"keep-alive" {
            self.keep_alive = true;
            return;
        }
        for token in tokens(value) {
            self.close |= token.eq_ignore_ascii_case(b"close");
            self.keep_alive |= token.eq_ignore_ascii_case(b"keep-alive");
        }
        self.connection_options.add(value);
    }

    /// The same length may be repeated.
    fn length(&mut self, value: &[u8]) -> Result<(), MalformedResponse> {
        for length in value.split(|byte| *byte == b',') {
            let length = content_length(length.trim_ascii()).ok_or(MalformedResponse)?;
            if self
                .length
                .replace(length)
                .is_some_and(|previous| previous != length)
            {
                return Err(MalformedResponse);
            }
        }
        Ok(())
    }
}

/// Parses the head of a response. `spare` is a map whose allocation is reused.
pub fn parse(
    bytes: &Bytes,
    method: &Method,
    spare: &mut HeaderMap,
) -> Result<ParsedHead, MalformedResponse> {
    let mut fields =
        [const { MaybeUninit::<httparse::Header<'_>>::uninit() }; RESPONSE_HEADERS_MAX];
    let mut response = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut response,
        bytes,
        &mut fields,
    );
    let length = match parsed {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(ParsedHead::Partial),
        Err(_) => return Err(MalformedResponse),
    };
    let status =
        StatusCode::from_u16(response.code.unwrap_or_default()).map_err(|_| MalformedResponse)?;
    // No upgrade was requested.
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(MalformedResponse);
    }
    if status.is_informational() {
        return Ok(ParsedHead::Interim(length));
    }
    let framing = ResponseFraming::read(response.headers)?;
    let is_http_1_0 = response.version == Some(0);
    if is_http_1_0 && framing.chunked {
        return Err(MalformedResponse);
    }
    let is_keep_alive = !framing.close && (!is_http_1_0 || framing.keep_alive);
    let has_no_body = method == Method::HEAD
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    let body = match framing.length {
        _ if has_no_body => ResponseLength::Known(0),
        _ if framing.chunked => ResponseLength::Chunked,
        Some(length) => ResponseLength::Known(length),
        None => ResponseLength::UntilClose,
    };
    let reason = response
        .reason
        .filter(|reason| Some(*reason) != status.canonical_reason());
    let head = ResponseHead {
        status,
        reason: reason.and_then(|reason| ReasonPhrase::try_from(reason.as_bytes()).ok()),
        headers: forwarded_headers(bytes, response.headers, &framing, spare)?,
        length: body,
        is_keep_alive,
    };
    Ok(ParsedHead::Final(Box::new(head), length))
}

/// Collects the headers for the client. Their values share the bytes they were parsed from.
fn forwarded_headers(
    bytes: &Bytes,
    fields: &[httparse::Header<'_>],
    framing: &ResponseFraming,
    spare: &mut HeaderMap,
) -> Result<HeaderMap, MalformedResponse> {
    let mut headers = std::mem::take(spare);
    let mut has_length = false;
    for field in fields {
        // The only common hop-by-hop headers.
        if field.name.eq_ignore_ascii_case("connection")
            || field.name.eq_ignore_ascii_case("transfer-encoding")
        {
            continue;
        }
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| MalformedResponse)?;
        // The request id is set by the gateway.
        if name == REQUEST_ID || framing.connection_options.is_hop_by_hop(&name) {
            continue;
        }
        if name == CONTENT_LENGTH {
            // Forwarded once, even if the instance repeats it.
            if std::mem::replace(&mut has_length, true) {
                continue;
            }
            // A list of equal lengths is one length.
            if field.value.contains(&b',') {
                headers.append(name, framing.length.unwrap_or_default().into());
                continue;
            }
        }
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(field.value));
        headers.append(name, value.map_err(|_| MalformedResponse)?);
    }
    Ok(headers)
}
