//! The log as it grows: positions, streams and buckets as the store has them.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::{Bucket, Position};
use contract::log::{Actor, RawRecord, Record, StreamName};
use contract::time::Timestamp;
use runtime::ids::{Ids, SeededIds};

/// What has been written, and what waits to be handed to the store.
pub struct Log {
    pub ids: SeededIds,
    position: u64,
    /// The newest position of each bucket.
    newest: BTreeMap<Bucket, Position>,
    versions: BTreeMap<StreamName, u64>,
    pub waiting: Vec<RawRecord>,
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
            waiting: Vec::new(),
            counts: BTreeMap::new(),
            bytes: 0,
        }
    }

    pub fn written(&self) -> u64 {
        self.position
    }

    /// Appends an event as this build writes it.
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
        self.hold(record.event.type_name(), raw);
        Ok(record)
    }

    /// Appends the data of an event that nothing here goes by, in a version that this build may only read.
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
        self.hold(type_name, raw);
    }

    fn hold(&mut self, type_name: &'static str, raw: RawRecord) {
        *self.counts.entry(type_name).or_default() += 1;
        self.bytes += raw.data.len() as u64;
        self.waiting.push(raw);
    }

    fn place(&mut self, stream: &StreamName) -> Place {
        self.position += 1;
        let position = Position(self.position);
        let bucket = stream.bucket_key().bucket();
        let version = self.versions.entry(stream.clone()).or_default();
        *version += 1;
        Place {
            position,
            prev: self.newest.insert(bucket, position).unwrap_or_default(),
            bucket,
            version: *version,
        }
    }
}

/// Where the next event of a stream stands.
struct Place {
    position: Position,
    prev: Position,
    bucket: Bucket,
    version: u64,
}
