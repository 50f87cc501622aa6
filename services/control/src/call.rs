//! A parsed request: the principal, the parameters and the body.

use std::collections::BTreeMap;

use bytes::Bytes;
use contract::events::AccessRole;
use contract::ids::{DeploymentRef, Name, Position};
use contract::log::Actor;
use contract::problem::Finding;
use contract::time::{Span, Timestamp};
use documents::{Document, SyntaxError, read_trees, read_typed};
use domain::endpoint::commands::Precondition;
use http::{HeaderMap, HeaderName, Method, StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};
use store::IdempotencyKey;

use crate::error::ApiError;

/// The header in which a write returns its position, and a read requires it.
pub const POSITION: HeaderName = HeaderName::from_static("penstock-position");
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Longest Idempotency-Key: four UUIDs.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 144;
/// Positions in the API; the store's are signed.
pub const POSITION_MAX: u64 = i64::MAX as u64;
pub const PAGE_DEFAULT: usize = 100;
pub const PAGE_MAX: usize = 1000;

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// The token's name.
    pub name: String,
    pub role: AccessRole,
}

/// One API request.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: Method,
    pub path: String,
    pub params: BTreeMap<String, String>,
    pub query: BTreeMap<String, String>,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// None on routes that need no token.
    pub principal: Option<Principal>,
    /// Whether the caller may see the details of health: it has a token, is on this machine, or is another
    /// process of this installation.
    pub is_trusted: bool,
    pub now: Timestamp,
}

/// Which page of a list to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    pub limit: usize,
    pub before: Option<Position>,
}

/// Writes numbers such as `2.0` as `2`: to JSON Schema, and so to generated clients, they are the same.
fn write_whole_numbers(value: &mut Value) {
    /// Floating point numbers up to this are exact.
    const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().unwrap_or(f64::NAN);
            if float.fract() == 0.0 && float.abs() <= WHOLE_MAX {
                *value = Value::from(float as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(write_whole_numbers),
        Value::Object(fields) => fields.values_mut().for_each(write_whole_numbers),
        _ => {}
    }
}

/// A position of the log; none if the text is no whole number, or beyond [`POSITION_MAX`].
pub fn parse_position(text: &str) -> Option<Position> {
    let position = text
        .parse()
        .ok()
        .filter(|position| *position <= POSITION_MAX);
    position.map(Position)
}

impl Call {
    pub fn actor(&self) -> Actor {
        let name = self
            .principal
            .as_ref()
            .map_or("nobody", |principal| &principal.name);
        Actor::token(name)
    }

    /// A name from the path.
    pub fn name(&self, param: &str) -> Result<Name, ApiError> {
        let text = self
            .params
            .get(param)
            .map(String::as_str)
            .unwrap_or_default();
        text.parse().map_err(|error: contract::ids::InvalidName| {
            ApiError::new(StatusCode::BAD_REQUEST, "invalid-name", error.to_string())
        })
    }

    pub fn endpoint(&self) -> Result<Name, ApiError> {
        self.name("endpoint")
    }

    pub fn deployment(&self) -> Result<DeploymentRef, ApiError> {
        Ok(DeploymentRef {
            endpoint: self.name("endpoint")?,
            deployment: self.name("deployment")?,
        })
    }

    /// The body as one document, YAML or JSON.
    pub fn document(&self) -> Result<Document, ApiError> {
        let text = std::str::from_utf8(&self.body).map_err(|_| {
            ApiError::invalid(vec![Finding::new(
                "",
                "the body is not UTF-8 text; send JSON or YAML",
            )])
        })?;
        let (mut trees, faults) = read_trees(text);
        if !faults.is_empty() {
            let finding = |fault: SyntaxError| {
                let detail = format!(
                    "line {}, column {}: {}",
                    fault.location.line, fault.location.column, fault.detail
                );
                Finding::new(fault.pointer, detail)
            };
            return Err(ApiError::invalid(faults.into_iter().map(finding).collect()));
        }
        match (trees.pop(), trees.is_empty()) {
            (Some(tree), true) => Ok(Document { tree }),
            (None, _) => Err(ApiError::invalid(vec![Finding::new(
                "",
                "the body is empty; send one document",
            )])),
            (Some(_), false) => {
                let detail = "the body has several documents; send one at a time";
                Err(ApiError::invalid(vec![Finding::new("", detail)]))
            }
        }
    }

    /// The body as a typed value; an empty body is an empty object.
    pub fn parse_body<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let mut value = if self.body.iter().all(u8::is_ascii_whitespace) {
            Value::Object(serde_json::Map::new())
        } else {
            self.document()?.tree.value
        };
        // A list would be read as the fields in their order.
        if !value.is_object() {
            let detail =
                "the body is no object; send the fields by name, such as {\"instances\": 2}";
            return Err(ApiError::invalid(vec![Finding::new("", detail)]));
        }
        write_whole_numbers(&mut value);
        read_typed(&value, "").map_err(ApiError::invalid)
    }

    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.query.get(name).map(String::as_str) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => Err(ApiError::bad_request(format!(
                "`{name}={other}` is invalid; write true or false"
            ))),
        }
    }

    pub fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let Some(text) = self.query.get(name) else {
            return Ok(None);
        };
        let number = text.parse().map_err(|_| {
            ApiError::bad_request(format!("`{name}={text}` is invalid; write a whole number"))
        })?;
        Ok(Some(number))
    }

    /// A timestamp, or a duration before now.
    pub fn time(&self, name: &str) -> Result<Option<Timestamp>, ApiError> {
        let Some(text) = self.query.get(name) else {
            return Ok(None);
        };
        if let Ok(span) = text.parse::<Span>() {
            return Ok(Some(self.now - span));
        }
        let time = text.parse().map_err(|_| ApiError::bad_request(format!("`{name}={text}` is invalid; write a timestamp such as 2026-03-29T01:00:00Z, or a duration such as 10m")))?;
        Ok(Some(time))
    }

    pub fn span(&self, name: &str) -> Result<Option<Span>, ApiError> {
        let Some(text) = self.query.get(name) else {
            return Ok(None);
        };
        let span = text.parse().map_err(|error: contract::time::InvalidSpan| {
            ApiError::bad_request(format!("{name}: {error}"))
        })?;
        Ok(Some(span))
    }

    /// A position of the log.
    pub fn position(&self, name: &str) -> Result<Option<Position>, ApiError> {
        let Some(text) = self.query.get(name) else {
            return Ok(None);
        };
        let position = parse_position(text).ok_or_else(|| {
            ApiError::bad_request(format!(
                "`{name}={text}` is not a position; write a whole number"
            ))
        })?;
        Ok(Some(position))
    }

    pub fn page(&self) -> Result<PageRequest, ApiError> {
        let limit = self.limit()?;
        let before = match self.query.get("cursor") {
            None => None,
            Some(text) => Some(parse_position(text).ok_or_else(|| {
                ApiError::bad_request(format!(
                    "`cursor={text}` is not a cursor; use the `nextCursor` of the previous page"
                ))
            })?),
        };
        Ok(PageRequest { limit, before })
    }

    pub fn limit(&self) -> Result<usize, ApiError> {
        let limit = self.number("limit")?.unwrap_or(PAGE_DEFAULT as u64);
        match usize::try_from(limit) {
            Ok(limit) if (1..=PAGE_MAX).contains(&limit) => Ok(limit),
            _ => Err(ApiError::bad_request(format!(
                "`limit={limit}` is out of range; use 1 to {PAGE_MAX}"
            ))),
        }
    }

    pub fn header(&self, name: &HeaderName) -> Result<Option<&str>, ApiError> {
        let Some(value) = self.headers.get(name) else {
            return Ok(None);
        };
        let text = value
            .to_str()
            .map_err(|_| ApiError::bad_request(format!("the header {name} is not plain text")))?;
        Ok(Some(text))
    }

    /// The position that a read must reflect.
    pub fn min_position(&self) -> Result<Option<Position>, ApiError> {
        let Some(text) = self.header(&POSITION)? else {
            return Ok(None);
        };
        let position = parse_position(text).ok_or_else(|| {
            ApiError::bad_request(format!(
                "the header {POSITION} must be a position, not `{text}`"
            ))
        })?;
        Ok(Some(position))
    }

    /// `If-Match` and `If-None-Match`; the latter holds if both are given.
    pub fn precondition(&self) -> Result<Precondition, ApiError> {
        let by_match = match self.header(&header::IF_MATCH)?.map(str::trim) {
            None => Precondition::None,
            Some("*") => Precondition::Present,
            Some(text) => {
                let revision = text
                    .strip_prefix('"')
                    .and_then(|text| text.strip_suffix('"'));
                let revision = revision.unwrap_or(text).parse().map_err(|_| {
                    ApiError::bad_request(format!(
                        "If-Match must be an ETag such as \"3\", not `{text}`"
                    ))
                })?;
                Precondition::Revision(revision)
            }
        };
        match self.header(&header::IF_NONE_MATCH)?.map(str::trim) {
            None => Ok(by_match),
            Some("*") => Ok(Precondition::Absent),
            Some(_) => Err(ApiError::bad_request(
                "If-None-Match takes only `*`: the resource must not exist yet",
            )),
        }
    }

    /// The idempotency key, if the caller sent one. A repeat of the request has an equal one.
    pub fn idempotency_key(&self) -> Result<Option<IdempotencyKey>, ApiError> {
        let Some(key) = self.header(&IDEMPOTENCY_KEY)? else {
            return Ok(None);
        };
        let printable = key.bytes().all(|b| b.is_ascii_graphic());
        if key.is_empty() || key.len() > IDEMPOTENCY_KEY_BYTES_MAX || !printable {
            return Err(ApiError::bad_request(format!(
                "an Idempotency-Key has 1 to {IDEMPOTENCY_KEY_BYTES_MAX} visible characters; use a UUID"
            )));
        }
        let token = self
            .principal
            .as_ref()
            .map_or("", |principal| &principal.name);
        Ok(Some(IdempotencyKey {
            key: format!("http:{token}:{}:{}:{key}", self.method, self.path),
            body_hash: hex::encode(Sha256::digest(&self.body)),
            result: None,
        }))
    }
}
