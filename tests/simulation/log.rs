//! The log, in memory. It guarantees no more than the real one: order within a bucket, expected versions,
//! and that a writer whose fence another has taken is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{NewEvent, Record, StreamKind, StreamName};
use store::{Append, Fence, LogEntry, Unreadable};

#[derive(Default)]
pub struct Log {
    pub records: Vec<Arc<Record>>,
    by_bucket: BTreeMap<Bucket, Vec<Arc<Record>>>,
    versions: BTreeMap<StreamName, u64>,
    /// The newest generation of each fence.
    fences: BTreeMap<String, u64>,
    /// Events that no service can decode.
    pub unreadable: BTreeSet<Position>,
}

/// Why an append was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The stream is not at the expected version.
    Conflict,
    /// Another writer has taken the fence.
    Fenced,
}

impl Log {
    pub fn acquire_fence(&mut self, name: String) -> Fence {
        let newest = self.fences.entry(name.clone()).or_default();
        *newest += 1;
        let generation = *newest;
        Fence { name, generation }
    }

    pub fn is_current(&self, fence: &Fence) -> bool {
        self.fences.get(&fence.name) == Some(&fence.generation)
    }

    /// Appends under a fence, at the expected version.
    pub fn append(&mut self, append: Append, fence: &Fence) -> Result<Vec<Arc<Record>>, Refusal> {
        if !self.is_current(fence) {
            return Err(Refusal::Fenced);
        }
        let version = self.versions.get(&append.stream).copied();
        if append.expected_version != version.unwrap_or_default() {
            return Err(Refusal::Conflict);
        }
        Ok(self.write(&append.stream, append.events))
    }

    /// Appends whatever the version is.
    pub fn write(&mut self, stream: &StreamName, events: Vec<NewEvent>) -> Vec<Arc<Record>> {
        let version = self.versions.entry(stream.clone()).or_default();
        let bucket = stream.bucket_key().bucket();
        let mut written = Vec::new();
        for event in events {
            *version += 1;
            let in_bucket = self.by_bucket.entry(bucket).or_default();
            let record = Arc::new(Record {
                position: Position(self.records.len() as u64 + 1),
                prev: in_bucket
                    .last()
                    .map_or(Position::START, |last| last.position),
                bucket,
                stream: stream.clone(),
                version: *version,
                id: event.id,
                time: event.time,
                actor: event.actor,
                event: event.event,
            });
            in_bucket.push(record.clone());
            self.records.push(record.clone());
            written.push(record);
        }
        written
    }

    /// The buckets that have records.
    pub fn buckets(&self) -> Vec<Bucket> {
        self.by_bucket.keys().copied().collect()
    }

    pub fn bucket(&self, bucket: Bucket) -> &[Arc<Record>] {
        self.by_bucket.get(&bucket).map_or(&[], Vec::as_slice)
    }

    /// A record as services read it.
    pub fn entry(&self, record: &Arc<Record>) -> LogEntry {
        match self.unreadable.contains(&record.position) {
            false => LogEntry::Record(record.clone()),
            true => LogEntry::Unreadable(Unreadable {
                position: record.position,
                prev: record.prev,
                bucket: record.bucket,
                stream: record.stream.to_string(),
                version: record.version,
                time: record.time,
                actor: record.actor.0.clone(),
                type_name: "not-invented-yet".to_owned(),
                detail: "the simulation says so".to_owned(),
            }),
        }
    }

    /// As `runtime::parking::history`.
    pub fn history(&self, key: &EndpointKey, to: Position) -> Vec<LogEntry> {
        let records = self.bucket(key.bucket()).iter();
        records
            .take_while(|record| record.position <= to)
            .filter(|record| record.stream.kind() != Some(StreamKind::Parking))
            .filter(|record| record.endpoint().as_ref() == Some(key))
            .map(|record| self.entry(record))
            .collect()
    }
}
