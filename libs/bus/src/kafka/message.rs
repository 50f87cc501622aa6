//! What lies on the topics. Records follow the Kafka protocol binding of CloudEvents 1.0 in binary
//! mode: the event's data is the value, all else is in headers. Frames and routes are JSON.

use contract::events::Event;
use contract::frame::Frame;
use contract::ids::{Bucket, Position};
use contract::log::{Actor, Record, StreamName};
use contract::route::{Route, RouteUpdate};
use rdkafka::message::{Header, Headers, OwnedHeaders};

use crate::StoredEvent;

const SPEC_VERSION: &str = "1.0";
const JSON: &str = "application/json";

/// Names of the headers. Names of CloudEvents attributes are lower-case letters and digits, 20 at most.
const CONTENT_TYPE: &str = "content-type";
const ID: &str = "ce_id";
const SOURCE: &str = "ce_source";
const TYPE: &str = "ce_type";
const SPEC: &str = "ce_specversion";
const TIME: &str = "ce_time";
const SUBJECT: &str = "ce_subject";
const POSITION: &str = "ce_penstockposition";
const PREV: &str = "ce_penstockprev";
const BUCKET: &str = "ce_penstockbucket";
/// Of the record in its stream.
const VERSION: &str = "ce_penstockversion";
/// Of the type: which shape the data has.
const TYPE_VERSION: &str = "ce_penstocktypevers";
const ACTOR: &str = "ce_penstockactor";

/// These stand beside a route, because the route of an endpoint that is gone has no value.
const REVISION: &str = "penstock-revision";
const MEMBERS: &str = "penstock-members";

/// A message on its way to a topic.
#[derive(Debug, PartialEq)]
pub struct Outgoing {
    pub key: String,
    pub headers: Vec<(&'static str, String)>,
    /// None: a tombstone.
    pub value: Option<String>,
}

impl Outgoing {
    pub fn kafka_headers(&self) -> OwnedHeaders {
        let empty = OwnedHeaders::new_with_capacity(self.headers.len());
        let headers = self.headers.iter();
        headers.fold(empty, |headers, (key, value)| {
            headers.insert(Header {
                key,
                value: Some(value.as_str()),
            })
        })
    }
}

/// `prefix` tells two installations on one Kafka apart.
pub fn encode_record(prefix: &str, record: &Record) -> Result<Outgoing, serde_json::Error> {
    let event = StoredEvent {
        position: record.position,
        prev: record.prev,
        bucket: record.bucket,
        stream: record.stream.to_string(),
        version: record.version,
        id: record.id.to_string(),
        type_name: record.event.type_name().to_owned(),
        type_version: record.event.version(),
        time: record.time,
        actor: record.actor.to_string(),
        data: record.event.data_json()?,
    };
    Ok(encode_stored(prefix, &event))
}

/// The same for an event that nobody here can read.
pub fn encode_stored(prefix: &str, event: &StoredEvent) -> Outgoing {
    let stream = event.stream.parse::<StreamName>().ok();
    let endpoint = stream.and_then(|stream| stream.endpoint());
    let key = endpoint.map_or_else(|| event.stream.clone(), |endpoint| endpoint.to_string());
    let headers = vec![
        (SPEC, SPEC_VERSION.to_owned()),
        (ID, event.id.clone()),
        (SOURCE, format!("/penstock/{prefix}")),
        (TYPE, event.type_name.clone()),
        (TIME, event.time.to_string()),
        (SUBJECT, event.stream.clone()),
        (CONTENT_TYPE, JSON.to_owned()),
        (POSITION, event.position.to_string()),
        (PREV, event.prev.to_string()),
        (BUCKET, event.bucket.to_string()),
        (VERSION, event.version.to_string()),
        (TYPE_VERSION, event.type_version.to_string()),
        (ACTOR, event.actor.clone()),
    ];
    Outgoing {
        key,
        headers,
        value: Some(event.data.clone()),
    }
}

/// The record in a message of `bucket`, or what is wrong with it.
pub fn decode_record<H: Headers>(
    bucket: Bucket,
    headers: Option<&H>,
    value: Option<&[u8]>,
) -> Result<Record, String> {
    let headers = Found::new(headers.ok_or("it has no headers")?);
    if headers.text(SPEC)? != SPEC_VERSION {
        return Err(format!("{SPEC} is not {SPEC_VERSION}"));
    }
    let value = value.ok_or("it has no value")?;
    let value = std::str::from_utf8(value).map_err(|error| error.to_string())?;
    let event = Event::decode(headers.text(TYPE)?, headers.parsed(TYPE_VERSION)?, value)
        .map_err(|error| error.to_string())?;
    let record = Record {
        position: Position(headers.parsed(POSITION)?),
        prev: Position(headers.parsed(PREV)?),
        bucket: Bucket(headers.parsed(BUCKET)?),
        stream: headers.parsed(SUBJECT)?,
        version: headers.parsed(VERSION)?,
        id: headers.parsed(ID)?,
        time: headers.parsed(TIME)?,
        actor: Actor(headers.text(ACTOR)?.to_owned()),
        event,
    };
    if record.bucket != bucket || record.stream.bucket_key().bucket() != bucket {
        return Err(format!(
            "position {} belongs to bucket {}",
            record.position, record.bucket
        ));
    }
    Ok(record)
}

pub fn encode_frame(frame: &Frame) -> Result<Outgoing, serde_json::Error> {
    Ok(Outgoing {
        key: frame.source.id.clone(),
        headers: Vec::new(),
        value: Some(serde_json::to_string(frame)?),
    })
}

pub fn decode_frame(value: Option<&[u8]>) -> Result<Frame, String> {
    let value = value.ok_or("it has no value")?;
    serde_json::from_slice(value).map_err(|error| error.to_string())
}

pub fn encode_route(update: &RouteUpdate) -> Result<Outgoing, serde_json::Error> {
    let route = update.route.as_ref();
    Ok(Outgoing {
        key: update.endpoint.to_string(),
        headers: vec![
            (REVISION, update.revision.to_string()),
            (MEMBERS, update.members.to_string()),
        ],
        value: route.map(serde_json::to_string).transpose()?,
    })
}

pub fn decode_route<H: Headers>(
    key: Option<&[u8]>,
    headers: Option<&H>,
    value: Option<&[u8]>,
) -> Result<RouteUpdate, String> {
    let headers = Found::new(headers.ok_or("it has no headers")?);
    let key =
        std::str::from_utf8(key.ok_or("it has no key")?).map_err(|error| error.to_string())?;
    let route: Option<Route> = value
        .map(serde_json::from_slice)
        .transpose()
        .map_err(|error| error.to_string())?;
    Ok(RouteUpdate {
        endpoint: key.parse().map_err(|error| format!("its key: {error}"))?,
        revision: Position(headers.parsed(REVISION)?),
        members: Position(headers.parsed(MEMBERS)?),
        route,
    })
}

struct Found<'a, H>(&'a H);

impl<'a, H: Headers> Found<'a, H> {
    fn new(headers: &'a H) -> Self {
        Self(headers)
    }

    fn text(&self, name: &str) -> Result<&'a str, String> {
        let mut headers = self.0.iter();
        let header = headers.find(|header| header.key == name);
        let value = header.and_then(|header| header.value);
        let value = value.ok_or_else(|| format!("it has no header {name}"))?;
        std::str::from_utf8(value).map_err(|_| format!("its header {name} is not text"))
    }

    fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
        &self,
        name: &str,
    ) -> Result<T, String> {
        let text = self.text(name)?;
        text.parse()
            .map_err(|error| format!("its header {name}: {error}"))
    }
}
