//! Events as they are stored, not decoded: what copies, comparisons and readers that must survive a
//! damaged event work with.

use std::sync::Arc;

use contract::chain::{ChainHash, Fields};
use contract::events::Event;
use contract::ids::{Bucket, Position};
use contract::log::{Actor, RawRecord, Record, StreamName};
use contract::time::Timestamp;
use uuid::Uuid;

use crate::model::error::StoreError;

/// The event of a raw record, checked as far as it can be alone.
pub fn decode(raw: &RawRecord) -> Result<Record, StoreError> {
    EventRow::raw(raw).decode()
}

/// One place in the log, whether or not its event can be read.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    Record(Arc<Record>),
    Unreadable(Unreadable),
}

/// An event that cannot be decoded, with all that can be said about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    pub position: Position,
    pub prev: Position,
    pub bucket: Bucket,
    pub stream: String,
    pub version: u64,
    pub time: Timestamp,
    pub actor: String,
    pub type_name: String,
    pub detail: String,
}

impl Entry {
    pub fn position(&self) -> Position {
        match self {
            Self::Record(record) => record.position,
            Self::Unreadable(unreadable) => unreadable.position,
        }
    }
}

impl From<Result<Record, Box<Unreadable>>> for Entry {
    fn from(read: Result<Record, Box<Unreadable>>) -> Self {
        match read {
            Ok(record) => Self::Record(Arc::new(record)),
            Err(unreadable) => Self::Unreadable(*unreadable),
        }
    }
}

impl From<RawRecord> for Entry {
    fn from(raw: RawRecord) -> Self {
        EventRow::raw(&raw).read().into()
    }
}

/// An event on its way into the table, or out of it.
#[derive(Clone, Copy)]
pub(crate) struct EventRow<'a> {
    pub position: Position,
    pub prev: Position,
    pub prev_hash: Option<ChainHash>,
    pub bucket: Bucket,
    pub stream: &'a str,
    pub version: u64,
    pub id: Id<'a>,
    pub type_name: &'a str,
    pub type_version: u32,
    pub time: Timestamp,
    pub actor: &'a str,
    pub data: &'a str,
}

/// An event's id: made by this process, or as it was stored.
#[derive(Clone, Copy)]
pub(crate) enum Id<'a> {
    Made(Uuid),
    Stored(&'a str),
}

impl std::fmt::Display for Id<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Made(id) => id.fmt(f),
            Self::Stored(id) => f.write_str(id),
        }
    }
}

impl<'a> EventRow<'a> {
    pub(crate) fn of(record: &'a Record, data: &'a str, prev_hash: ChainHash) -> Self {
        Self {
            position: record.position,
            prev: record.prev,
            prev_hash: Some(prev_hash),
            bucket: record.bucket,
            stream: record.stream.as_str(),
            version: record.version,
            id: Id::Made(record.id),
            type_name: record.event.type_name(),
            type_version: record.event.version(),
            time: record.time,
            actor: &record.actor.0,
            data,
        }
    }

    /// What the next event of the bucket carries.
    pub(crate) fn hash(&self) -> ChainHash {
        let made;
        let id = match self.id {
            Id::Stored(id) => id,
            Id::Made(id) => {
                made = id.to_string();
                &made
            }
        };
        let fields = Fields {
            numbers: [
                self.position.0,
                self.prev.0,
                u64::from(self.bucket.0),
                self.version,
                u64::from(self.type_version),
                self.time.millis() as u64,
            ],
            texts: [self.stream, id, self.type_name, self.actor, self.data],
        };
        fields.chained(self.prev_hash.unwrap_or_default())
    }

    /// The event itself, or all that can be said about it.
    pub(crate) fn read(self) -> Result<Record, Box<Unreadable>> {
        self.read_since(Timestamp::MIN)
    }

    /// The same, without the slices of usage that ended by `slices_from`.
    pub(crate) fn read_since(self, slices_from: Timestamp) -> Result<Record, Box<Unreadable>> {
        let unreadable = |error| Unreadable {
            position: self.position,
            prev: self.prev,
            bucket: self.bucket,
            stream: self.stream.to_owned(),
            version: self.version,
            time: self.time,
            actor: self.actor.to_owned(),
            type_name: self.type_name.to_owned(),
            detail: match error {
                StoreError::Unreadable { detail, .. } => detail,
                error => error.to_string(),
            },
        };
        self.decode_since(slices_from)
            .map_err(|error| Box::new(unreadable(error)))
    }

    /// The event itself, checked as far as it can be alone.
    pub(crate) fn decode(self) -> Result<Record, StoreError> {
        self.decode_since(Timestamp::MIN)
    }

    fn decode_since(self, slices_from: Timestamp) -> Result<Record, StoreError> {
        let unreadable = |detail: String| StoreError::Unreadable {
            position: self.position,
            detail,
        };
        let event = Event::decode_since(self.type_name, self.type_version, self.data, slices_from)
            .map_err(|error| unreadable(error.to_string()))?;
        let stream: StreamName = self
            .stream
            .parse()
            .map_err(|_| unreadable(format!("`{}` is not a stream", self.stream)))?;
        let id = match self.id {
            Id::Made(id) => id,
            Id::Stored(text) => Uuid::parse_str(text)
                .map_err(|error| unreadable(format!("event id `{text}`: {error}")))?,
        };
        if self.bucket > Bucket::GLOBAL {
            return Err(unreadable(format!("bucket {} is not known", self.bucket)));
        }
        Ok(Record {
            position: self.position,
            prev: self.prev,
            bucket: self.bucket,
            stream,
            version: self.version,
            id,
            time: self.time,
            actor: Actor(self.actor.to_owned()),
            event,
        })
    }

    pub(crate) fn raw(raw: &'a RawRecord) -> Self {
        Self {
            position: raw.position,
            prev: raw.prev,
            prev_hash: raw.prev_hash,
            bucket: raw.bucket,
            stream: &raw.stream,
            version: raw.version,
            id: Id::Stored(&raw.id),
            type_name: &raw.type_name,
            type_version: raw.type_version,
            time: raw.time,
            actor: &raw.actor,
            data: &raw.data,
        }
    }
}
