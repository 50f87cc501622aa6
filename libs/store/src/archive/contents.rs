//! The contents of an archive: a header line, a line per event, and the table of contents at the end. All of
//! it is text, one JSON value per line, compressed with gzip: `zcat` shows it.

use std::collections::BTreeMap;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::RawRecord;
use contract::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::model::chain::BucketHead;
use crate::model::raw::EventRow;

/// The version of the file format. Readers refuse other versions.
pub(crate) const FORMAT: u32 = 1;

/// The header, the first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ArchiveHeader {
    pub penstock_archive: u32,
    pub first: Position,
    pub last: Position,
    pub events: u64,
    /// The hash of the previous file.
    pub previous: Option<String>,
    /// The heads of the buckets' chains before the first event.
    pub heads: Vec<BucketHead>,
}

/// An event as stored in the table.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EventLine {
    position: Position,
    prev: Position,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    prev_hash: Option<ChainHash>,
    bucket: u16,
    stream: String,
    version: u64,
    id: String,
    #[serde(rename = "type")]
    type_name: String,
    type_version: u32,
    /// Milliseconds since 1970.
    time: i64,
    actor: String,
    /// As text, so that its bytes are preserved, JSON or not.
    data: String,
}

impl From<RawRecord> for EventLine {
    fn from(event: RawRecord) -> Self {
        Self {
            position: event.position,
            prev: event.prev,
            prev_hash: event.prev_hash,
            bucket: event.bucket.0,
            stream: event.stream,
            version: event.version,
            id: event.id,
            type_name: event.type_name,
            type_version: event.type_version,
            time: event.time.millis(),
            actor: event.actor,
            data: event.data,
        }
    }
}

impl From<EventLine> for RawRecord {
    fn from(line: EventLine) -> Self {
        Self {
            position: line.position,
            prev: line.prev,
            prev_hash: line.prev_hash,
            bucket: Bucket(line.bucket),
            stream: line.stream,
            version: line.version,
            id: line.id,
            type_name: line.type_name,
            type_version: line.type_version,
            time: Timestamp::from_millis(line.time),
            actor: line.actor,
            data: line.data,
        }
    }
}

/// The table of contents, the last line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Contents {
    pub events: u64,
    /// SHA-256 of the compressed header.
    pub beginning: String,
    /// The offset of the first block: the length of the compressed header.
    pub blocks_at: u64,
    pub blocks: Vec<Block>,
    /// For each stream its last version in this file, and the blocks that contain it.
    pub streams: BTreeMap<String, (u64, Vec<usize>)>,
    /// The heads of the buckets' chains after the last event.
    pub heads: Vec<BucketHead>,
}

/// Events that are compressed together.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Block {
    pub first: Position,
    pub last: Position,
    pub events: u64,
    /// The offset in the file.
    pub at: u64,
    pub bytes: u64,
    /// SHA-256 of the compressed bytes.
    pub sha256: String,
    /// The lowest and the highest event id.
    pub ids: (String, String),
    /// The buckets of its events, as a bitmap in hexadecimal.
    pub buckets: String,
}

impl Block {
    pub(crate) fn has_bucket(&self, bucket: Bucket) -> bool {
        // A block with an invalid bitmap, or a bucket out of range, is never skipped.
        let bitmap = u128::from_str_radix(&self.buckets, 16).unwrap_or(u128::MAX);
        bucket.0 >= 128 || bitmap >> bucket.0 & 1 == 1
    }

    pub(crate) fn may_have_id(&self, id: &str) -> bool {
        (self.ids.0.as_str()..=self.ids.1.as_str()).contains(&id)
    }
}

impl Contents {
    /// Returns the head of a bucket's chain after the last event of this file.
    pub(crate) fn head(&self, bucket: Bucket) -> Option<(Position, ChainHash)> {
        let mut heads = self.heads.iter();
        let head = heads.find(|head| head.bucket == bucket)?;
        Some((head.position, head.hash))
    }
}

/// Tracks the heads of the buckets' chains, event by event.
#[derive(Clone, Default)]
pub(crate) struct ChainHeads {
    heads: BTreeMap<Bucket, BucketHead>,
}

impl ChainHeads {
    pub(crate) fn new(heads: &[BucketHead]) -> Self {
        Self {
            heads: heads.iter().map(|head| (head.bucket, *head)).collect(),
        }
    }

    /// Advances the chain of the event's bucket. Fails if the event does not continue it.
    pub(crate) fn append(&mut self, event: &RawRecord) -> Result<(), String> {
        let before = self.heads.get(&event.bucket);
        let prev = before.map_or(Position::START, |head| head.position);
        let hash = before.map_or(ChainHash::START, |head| head.hash);
        if (event.prev, event.prev_hash) != (prev, Some(hash)) {
            return Err(format!(
                "position {} does not continue the chain of bucket {}, which is at {prev}",
                event.position, event.bucket
            ));
        }
        let head = BucketHead {
            bucket: event.bucket,
            position: event.position,
            hash: EventRow::from_raw(event).hash(),
        };
        self.heads.insert(event.bucket, head);
        Ok(())
    }

    pub(crate) fn to_vec(&self) -> Vec<BucketHead> {
        self.heads.values().copied().collect()
    }
}
