//! The messages on the topics. Records follow the Kafka protocol binding of CloudEvents 1.0 in
//! binary mode: the event's data is the value, everything else is in headers. Frames and routes are
//! JSON.

use std::borrow::Cow;
use std::error::Error;
use std::str::FromStr;

use contract::chain::ChainHash;
use contract::events::Event;
use contract::frame::{Frame, FrameError};
use contract::ids::{Bucket, Position};
use contract::log::{Actor, RawRecord, Record, StreamName};
use contract::route::{Route, RouteUpdate};
use contract::time::Timestamp;
use rdkafka::message::{Header, Headers, OwnedHeaders};

const SPEC_VERSION: &str = "1.0";
const JSON: &str = "application/json";

/// Header names. CloudEvents attribute names are lower-case letters and digits, at most 20.
const CONTENT_TYPE: &str = "content-type";
const ID: &str = "ce_id";
const SOURCE: &str = "ce_source";
const TYPE: &str = "ce_type";
const SPEC: &str = "ce_specversion";
const TIME: &str = "ce_time";
const SUBJECT: &str = "ce_subject";
const POSITION: &str = "ce_penstockposition";
const PREV: &str = "ce_penstockprev";
/// The hash of the previous event in the bucket; absent if the event was published by a release
/// that predates the hash chain.
const PREV_HASH: &str = "ce_penstockprevhash";
const BUCKET: &str = "ce_penstockbucket";
/// The record's version in its stream.
const VERSION: &str = "ce_penstockversion";
/// The version of the event type, i.e. of the shape of the data.
const TYPE_VERSION: &str = "ce_penstocktypevers";
const ACTOR: &str = "ce_penstockactor";

/// Headers rather than part of the route, because the route of a deleted endpoint has no value.
const REVISION: &str = "penstock-revision";
const MEMBERS: &str = "penstock-members";

/// A message to be sent to a topic. It borrows what it can, since there are many.
#[derive(Debug, PartialEq)]
pub struct OutgoingMessage<'a> {
    pub key: Cow<'a, str>,
    pub headers: Vec<(&'static str, Cow<'a, str>)>,
    /// `None` is a tombstone.
    pub value: Option<Cow<'a, str>>,
}

impl OutgoingMessage<'_> {
    pub fn kafka_headers(&self) -> OwnedHeaders {
        let empty = OwnedHeaders::new_with_capacity(self.headers.len());
        let headers = self.headers.iter();
        headers.fold(empty, |headers, (key, value)| {
            headers.insert(Header {
                key,
                value: Some(&**value),
            })
        })
    }
}

/// The CloudEvents source. `prefix` distinguishes installations that share a Kafka cluster.
pub fn source_of(prefix: &str) -> String {
    format!("/penstock/{prefix}")
}

/// Encodes an event as stored, whether or not this release can read it.
pub fn encode_record<'a>(source: &'a str, event: &'a RawRecord) -> OutgoingMessage<'a> {
    let mut headers = vec![
        (SPEC, SPEC_VERSION.into()),
        (ID, event.id.as_str().into()),
        (SOURCE, source.into()),
        (TYPE, event.type_name.as_str().into()),
        (TIME, event.time.to_string().into()),
        (SUBJECT, event.stream.as_str().into()),
        (CONTENT_TYPE, JSON.into()),
        (POSITION, event.position.to_string().into()),
        (PREV, event.prev.to_string().into()),
        (BUCKET, event.bucket.to_string().into()),
        (VERSION, event.version.to_string().into()),
        (TYPE_VERSION, event.type_version.to_string().into()),
        (ACTOR, event.actor.as_str().into()),
    ];
    if let Some(hash) = event.prev_hash {
        headers.push((PREV_HASH, hash.to_string().into()));
    }
    OutgoingMessage {
        key: key_of(event).into(),
        headers,
        value: Some(event.data.as_str().into()),
    }
}

/// The message key: the endpoint, `WORKSPACE/NAME`, which follows the stream's kind; otherwise the
/// stream.
fn key_of(event: &RawRecord) -> &str {
    let stream = event.stream.as_str();
    if event.bucket == Bucket::GLOBAL {
        return stream;
    }
    let mut slashes = stream.match_indices('/').map(|(at, _)| at);
    match (slashes.next(), slashes.next(), slashes.next()) {
        (Some(kind), Some(_), end) => &stream[kind + 1..end.unwrap_or(stream.len())],
        _ => stream,
    }
}

/// Why a message cannot be decoded.
pub type BoxedError = Box<dyn Error + Send + Sync>;

/// A part of a message that is not valid.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
struct InvalidPart {
    what: String,
    source: BoxedError,
}

/// The contents of a record's message, whether or not its event can be decoded.
struct RecordMessage<'a> {
    position: Position,
    prev: Position,
    prev_hash: Option<ChainHash>,
    bucket: Bucket,
    stream: &'a str,
    version: u64,
    id: &'a str,
    type_name: &'a str,
    type_version: u32,
    time: Timestamp,
    actor: &'a str,
    data: &'a str,
}

impl<'a> RecordMessage<'a> {
    /// Parses a message of `bucket`, or says what is wrong with it.
    fn parse<H: Headers>(
        bucket: Bucket,
        headers: Option<&'a H>,
        value: Option<&'a [u8]>,
    ) -> Result<Self, BoxedError> {
        let headers = HeaderReader::new(headers.ok_or("it has no headers")?);
        if headers.text(SPEC)? != SPEC_VERSION {
            return Err(format!("{SPEC} is not {SPEC_VERSION}").into());
        }
        let value = value.ok_or("it has no value")?;
        let message = Self {
            position: Position(headers.parsed(POSITION)?),
            prev: Position(headers.parsed(PREV)?),
            prev_hash: headers.parsed_if_present(PREV_HASH)?,
            bucket: Bucket(headers.parsed(BUCKET)?),
            stream: headers.text(SUBJECT)?,
            version: headers.parsed(VERSION)?,
            id: headers.text(ID)?,
            type_name: headers.text(TYPE)?,
            type_version: headers.parsed(TYPE_VERSION)?,
            time: headers.parsed(TIME)?,
            actor: headers.text(ACTOR)?,
            data: std::str::from_utf8(value)?,
        };
        if message.bucket != bucket {
            return Err(misplaced(message.position, message.bucket));
        }
        Ok(message)
    }
}

fn misplaced(position: Position, bucket: Bucket) -> BoxedError {
    format!("position {position} belongs to bucket {bucket}").into()
}

/// Decodes the record in a message of `bucket`, or says what is wrong with it.
pub fn decode_record<H: Headers>(
    bucket: Bucket,
    headers: Option<&H>,
    value: Option<&[u8]>,
) -> Result<Record, BoxedError> {
    let message = RecordMessage::parse(bucket, headers, value)?;
    let event = Event::decode(message.type_name, message.type_version, message.data)?;
    let record = Record {
        position: message.position,
        prev: message.prev,
        bucket: message.bucket,
        stream: parsed(SUBJECT, message.stream)?,
        version: message.version,
        id: parsed(ID, message.id)?,
        time: message.time,
        actor: Actor(message.actor.to_owned()),
        event,
    };
    let belongs_to = record.stream.bucket_key().bucket();
    match belongs_to == bucket {
        true => Ok(record),
        false => Err(misplaced(record.position, belongs_to)),
    }
}

/// Decodes the event in a message of `bucket` as stored by its publisher. It may have been written
/// by a newer release: neither its data nor its stream need be known here.
pub fn decode_stored<H: Headers>(
    bucket: Bucket,
    headers: Option<&H>,
    value: Option<&[u8]>,
) -> Result<RawRecord, BoxedError> {
    let message = RecordMessage::parse(bucket, headers, value)?;
    let stream = message.stream.parse::<StreamName>().ok();
    let belongs_to = stream.map_or(bucket, |stream| stream.bucket_key().bucket());
    if belongs_to != bucket {
        return Err(misplaced(message.position, belongs_to));
    }
    let texts = [
        message.stream,
        message.id,
        message.type_name,
        message.actor,
        message.data,
    ];
    if texts.iter().any(|text| text.contains('\0')) {
        return Err(format!(
            "position {} contains a NUL character, which no event may",
            message.position
        )
        .into());
    }
    Ok(RawRecord {
        position: message.position,
        prev: message.prev,
        prev_hash: message.prev_hash,
        bucket: message.bucket,
        stream: message.stream.to_owned(),
        version: message.version,
        id: message.id.to_owned(),
        type_name: message.type_name.to_owned(),
        type_version: message.type_version,
        time: message.time,
        actor: message.actor.to_owned(),
        data: message.data.to_owned(),
    })
}

pub fn encode_frame(frame: &Frame) -> Result<OutgoingMessage<'_>, serde_json::Error> {
    Ok(OutgoingMessage {
        key: frame.source.id.as_str().into(),
        headers: Vec::new(),
        value: Some(frame.encode()?.into()),
    })
}

pub fn decode_frame(value: Option<&[u8]>) -> Result<Frame, FrameError> {
    Frame::decode(value.unwrap_or_default())
}

pub fn encode_route(update: &RouteUpdate) -> Result<OutgoingMessage<'_>, serde_json::Error> {
    let route = update.route.as_ref();
    Ok(OutgoingMessage {
        key: update.endpoint.as_str().into(),
        headers: vec![
            (REVISION, update.revision.to_string().into()),
            (MEMBERS, update.members.to_string().into()),
        ],
        value: route
            .map(serde_json::to_string)
            .transpose()?
            .map(Cow::Owned),
    })
}

pub fn decode_route<H: Headers>(
    key: Option<&[u8]>,
    headers: Option<&H>,
    value: Option<&[u8]>,
) -> Result<RouteUpdate, BoxedError> {
    let headers = HeaderReader::new(headers.ok_or("it has no headers")?);
    let key = std::str::from_utf8(key.ok_or("it has no key")?)?;
    let route: Option<Route> = value.map(serde_json::from_slice).transpose()?;
    Ok(RouteUpdate {
        endpoint: part("its key", key)?,
        revision: Position(headers.parsed(REVISION)?),
        members: Position(headers.parsed(MEMBERS)?),
        route,
    })
}

struct HeaderReader<'a, H>(&'a H);

impl<'a, H: Headers> HeaderReader<'a, H> {
    fn new(headers: &'a H) -> Self {
        Self(headers)
    }

    fn text(&self, name: &str) -> Result<&'a str, BoxedError> {
        let mut headers = self.0.iter();
        let header = headers.find(|header| header.key == name);
        let value = header.and_then(|header| header.value);
        let value = value.ok_or_else(|| format!("it has no header {name}"))?;
        std::str::from_utf8(value).map_err(|error| invalid(format!("its header {name}"), error))
    }

    fn parsed<T: FromStr<Err: Into<BoxedError>>>(&self, name: &str) -> Result<T, BoxedError> {
        parsed(name, self.text(name)?)
    }

    fn parsed_if_present<T: FromStr<Err: Into<BoxedError>>>(
        &self,
        name: &str,
    ) -> Result<Option<T>, BoxedError> {
        match self.0.iter().any(|header| header.key == name) {
            true => self.parsed(name).map(Some),
            false => Ok(None),
        }
    }
}

fn parsed<T: FromStr<Err: Into<BoxedError>>>(name: &str, text: &str) -> Result<T, BoxedError> {
    part(&format!("its header {name}"), text)
}

/// Parses a part of a message.
fn part<T: FromStr<Err: Into<BoxedError>>>(what: &str, text: &str) -> Result<T, BoxedError> {
    text.parse()
        .map_err(|error| invalid(what.to_owned(), error))
}

fn invalid(what: String, error: impl Into<BoxedError>) -> BoxedError {
    Box::new(InvalidPart {
        what,
        source: error.into(),
    })
}
