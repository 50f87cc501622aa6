//! Heads: a request's is written here, an answer's is read.

use std::mem::MaybeUninit;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use hyper::ext::ReasonPhrase;

use crate::framing::content_length;
use crate::hop::{Named, tokens};
use crate::reply::REQUEST_ID;

/// Longest head of an answer, together with the interim answers before it.
pub const HEAD_BYTES_MAX: usize = 256 * 1024;
/// Most headers of an answer.
pub const HEADERS_MAX: usize = 100;

/// The answer is not valid HTTP/1.1, or can be read in two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer is not valid HTTP/1.1")]
pub struct Malformed;

/// What an instance is asked.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    pub method: &'a Method,
    /// Path and query.
    pub path: &'a str,
    /// The client's; what belongs to its hop is left out.
    pub headers: &'a HeaderMap,
    pub host: &'a HeaderValue,
    pub id: &'a HeaderValue,
}

impl Ask<'_> {
    /// Writes the head. A length in the client's headers has been checked, and is the body's.
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
        let mut named = Named::default();
        for connection in self.headers.get_all(CONNECTION) {
            named.add(connection.as_bytes());
        }
        for (name, value) in self.headers {
            if name == HOST || name == REQUEST_ID || named.stays_here(name) {
                continue;
            }
            out.extend_from_slice(name.as_str().as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        if chunked {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// How the end of an answer's body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    Known(u64),
    Chunked,
    /// It ends with the connection.
    UntilClose,
}

/// The head of an answer, without what belongs to the hop.
#[derive(Debug)]
pub struct Head {
    pub status: StatusCode,
    /// Where it is not the usual one.
    pub reason: Option<ReasonPhrase>,
    pub headers: HeaderMap,
    pub length: Length,
    /// The instance will take another request on this connection, as far as it says.
    pub keeps_alive: bool,
}

/// What stands at the beginning of some bytes.
#[derive(Debug)]
pub enum Parsed {
    Partial,
    /// An interim answer of so many bytes.
    Interim(usize),
    /// A head of so many bytes.
    Head(Box<Head>, usize),
}

/// What an answer's headers say of its framing.
#[derive(Default)]
struct Framing {
    chunked: bool,
    length: Option<u64>,
    close: bool,
    keep_alive: bool,
    named: Named,
}

impl Framing {
    fn read(headers: &[httparse::Header<'_>]) -> Result<Self, Malformed> {
        let mut framing = Self::default();
        for header in headers {
            let name = header.name;
            match name.len() {
                10 if name.eq_ignore_ascii_case("connection") => framing.connection(header.value),
                14 if name.eq_ignore_ascii_case("content-length") => {
                    framing.length(header.value)?
                }
                17 if name.eq_ignore_ascii_case("transfer-encoding") => {
                    // The coding is not passed on, so no other can be.
                    if framing.chunked || !header.value.eq_ignore_ascii_case(b"chunked") {
                        return Err(Malformed);
                    }
                    framing.chunked = true;
                }
                _ => {}
            }
        }
        if framing.chunked && framing.length.is_some() {
            return Err(Malformed);
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
        self.named.add(value);
    }

    /// The same length may be given more than once.
    fn length(&mut self, value: &[u8]) -> Result<(), Malformed> {
        for length in value.split(|byte| *byte == b',') {
            let length = content_length(length.trim_ascii()).ok_or(Malformed)?;
            if self.length.replace(length).is_some_and(|old| old != length) {
                return Err(Malformed);
            }
        }
        Ok(())
    }
}

/// Reads the head of an answer. `spare` is a map whose room is used again.
pub fn parse(bytes: &Bytes, method: &Method, spare: &mut HeaderMap) -> Result<Parsed, Malformed> {
    let mut fields = [const { MaybeUninit::<httparse::Header<'_>>::uninit() }; HEADERS_MAX];
    let mut answer = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut answer,
        bytes,
        &mut fields,
    );
    let length = match parsed {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(Parsed::Partial),
        Err(_) => return Err(Malformed),
    };
    let status = StatusCode::from_u16(answer.code.unwrap_or_default()).map_err(|_| Malformed)?;
    // Nobody asked for another protocol.
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Malformed);
    }
    if status.is_informational() {
        return Ok(Parsed::Interim(length));
    }
    let framing = Framing::read(answer.headers)?;
    let old = answer.version == Some(0);
    if old && framing.chunked {
        return Err(Malformed);
    }
    let keeps_alive = !framing.close && (!old || framing.keep_alive);
    let bodiless = method == Method::HEAD
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    let body = match framing.length {
        _ if bodiless => Length::Known(0),
        _ if framing.chunked => Length::Chunked,
        Some(length) => Length::Known(length),
        None => Length::UntilClose,
    };
    let reason = answer
        .reason
        .filter(|reason| Some(*reason) != status.canonical_reason());
    let head = Head {
        status,
        reason: reason.and_then(|reason| ReasonPhrase::try_from(reason.as_bytes()).ok()),
        headers: passed_on(bytes, answer.headers, &framing, spare)?,
        length: body,
        keeps_alive,
    };
    Ok(Parsed::Head(Box::new(head), length))
}

/// The headers that the client gets. Their values share the bytes they were read from.
fn passed_on(
    bytes: &Bytes,
    fields: &[httparse::Header<'_>],
    framing: &Framing,
    spare: &mut HeaderMap,
) -> Result<HeaderMap, Malformed> {
    let mut headers = std::mem::take(spare);
    let mut length_said = false;
    for field in fields {
        // The only ones of the hop that are common.
        if field.name.eq_ignore_ascii_case("connection")
            || field.name.eq_ignore_ascii_case("transfer-encoding")
        {
            continue;
        }
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Malformed)?;
        // The request's id is ours to say.
        if name == REQUEST_ID || framing.named.stays_here(&name) {
            continue;
        }
        if name == CONTENT_LENGTH {
            // Said once, however often the instance did.
            if std::mem::replace(&mut length_said, true) {
                continue;
            }
            // A list of equal lengths is one length.
            if field.value.contains(&b',') {
                headers.append(name, framing.length.unwrap_or_default().into());
                continue;
            }
        }
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(field.value));
        headers.append(name, value.map_err(|_| Malformed)?);
    }
    Ok(headers)
}
