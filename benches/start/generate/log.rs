//! The generated log: assigns positions, versions and buckets as the store does.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::{Bucket, Position};
use contract::log::{Actor, RawRecord, Record, StreamName};
use contract::time::Timestamp;
use runtime::ids::{Ids, SeededIds};

/// The log, with events that are not yet written to the store.
pub struct Log {
    pub ids: SeededIds,
    position: u64,
    /// The last position of each bucket.
    newest: BTreeMap<Bucket, Position>,
    versions: BTreeMap<StreamName, u64>,
    pub unwritten: Vec<RawRecord>,
    pub counts: BTreeMap<&'static str, u64>,
    pub bytes: u64,
}

impl Log {
    pub fn new(seed: u64) -> Self {
        Self {
            ids: SeededIds::new(seed),
            position: 0,
            newest: BTreeMap::new(),
            versions: BTreeMap::new(),
            unwritten: Vec::new(),
            counts: BTreeMap::new(),
            bytes: 0,
        }
    }

    pub fn written(&self) -> u64 {
        self.position
    }

    /// Appends an event in the current version.
    pub fn append(
        &mut self,
        stream: &StreamName,
        time: Timestamp,
        actor: &Actor,
        event: Event,
    ) -> anyhow::Result<Record> {
        let place = self.place(stream);
        let record = Record {
            position: place.position,
            prev: place.prev,
            bucket: place.bucket,
            stream: stream.clone(),
            version: place.version,
            id: self.ids.event_id(time),
            time,
            actor: actor.clone(),
            event,
        };
        let raw = RawRecord::of(&record)?;
        self.push(record.event.type_name(), raw);
        Ok(record)
    }

    /// Appends the raw data of an event in an old version, which is not applied to any state here.
    pub fn append_data(
        &mut self,
        stream: &StreamName,
        time: Timestamp,
        actor: &Actor,
        (type_name, type_version): (&'static str, u32),
        data: String,
    ) {
        let place = self.place(stream);
        let raw = RawRecord {
            position: place.position,
            prev: place.prev,
            prev_hash: None,
            bucket: place.bucket,
            stream: stream.as_str().to_owned(),
            version: place.version,
            id: self.ids.event_id(time).to_string(),
            type_name: type_name.to_owned(),
            type_version,
            time,
            actor: actor.0.clone(),
            data,
        };
        self.push(type_name, raw);
    }

    fn push(&mut self, type_name: &'static str, raw: RawRecord) {
        *self.counts.entry(type_name).or_default() += 1;
        self.bytes += raw.data.len() as u64;
        self.unwritten.push(raw);
    }

    fn place(&mut self, stream: &StreamName) -> NextPosition {
        self.position += 1;
        let position = Position(self.position);
        let bucket = stream.bucket_key().bucket();
        let version = self.versions.entry(stream.clone()).or_default();
        *version += 1;
        NextPosition {
            position,
            prev: self.newest.insert(bucket, position).unwrap_or_default(),
            bucket,
            version: *version,
        }
    }
}

/// The position and version of the next event of a stream.
struct NextPosition {
    position: Position,
    prev: Position,
    bucket: Bucket,
    version: u64,
}
