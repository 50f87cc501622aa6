//! The columns of each table, and conversions from and to them.

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::RawRecord;
use contract::time::Timestamp;

use crate::model::error::StoreError;
use crate::model::snapshot::{SnapshotChange, SnapshotMeta};

/// The columns of an event, in the order in which every query names them.
pub(crate) type RawColumns = (
    i64,
    i64,
    i64,
    String,
    i64,
    String,
    String,
    i64,
    i64,
    String,
    String,
    Option<Vec<u8>>,
);

pub(crate) fn from_columns(columns: RawColumns) -> RawRecord {
    let (position, prev, bucket, stream, version, id, type_name, type_version, time, ..) = columns;
    let (.., actor, data, prev_hash) = columns;
    RawRecord {
        position: Position(position as u64),
        prev: Position(prev as u64),
        prev_hash: prev_hash.as_deref().and_then(ChainHash::from_bytes),
        // Invalid values are mapped to a bucket that does not exist, so that checks find them.
        bucket: Bucket(u16::try_from(bucket).unwrap_or(u16::MAX)),
        stream,
        version: version as u64,
        id,
        type_name,
        type_version: u32::try_from(type_version).unwrap_or(u32::MAX),
        time: Timestamp::from_millis(time),
        actor,
        data,
    }
}

/// A cursor to be written.
pub(crate) struct CursorRow<'a> {
    pub consumer: &'a str,
    pub bucket: Bucket,
    pub position: Position,
}

/// A stored idempotency key, without the key itself.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct StoredIdempotencyKey {
    pub body_hash: String,
    pub result: Option<String>,
    /// The positions that the commit wrote, as a JSON list.
    pub positions: String,
    pub time: i64,
}

impl StoredIdempotencyKey {
    pub(crate) fn positions(&self) -> Result<Vec<Position>, StoreError> {
        serde_json::from_str(&self.positions).map_err(|error| {
            StoreError::database(format!("positions of an idempotency key: {error}"))
                .caused_by(error)
        })
    }
}

pub(crate) type IdempotencyKeyColumns = (String, String, Option<String>, String, i64);

pub(crate) fn parse_position(text: &str) -> Result<Position, StoreError> {
    let parsed = text.parse().map(Position);
    parsed.map_err(|error| {
        StoreError::database(format!("`{text}` is not a position")).caused_by(error)
    })
}

/// The version and position of a stored snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotPosition {
    pub version: u32,
    pub position: Position,
}

/// Maps invalid values to a version that no fold has.
pub(crate) fn version_of(version: i64) -> u32 {
    u32::try_from(version).unwrap_or(u32::MAX)
}

pub(crate) fn snapshot_position_of((version, position): (i64, i64)) -> SnapshotPosition {
    SnapshotPosition {
        version: version_of(version),
        position: Position(position as u64),
    }
}

/// The parts of snapshots to be written or deleted.
pub(crate) struct SnapshotParts<'a> {
    /// Key and document.
    pub upserts: Vec<(&'a SnapshotMeta, &'a str, &'a str)>,
    pub deletions: Vec<(&'a SnapshotMeta, &'a str)>,
}

impl<'a> SnapshotParts<'a> {
    pub(crate) fn of(changes: &[&'a SnapshotChange]) -> Self {
        let (mut upserts, mut deletions) = (Vec::new(), Vec::new());
        for change in changes {
            for (key, doc) in &change.parts {
                match doc {
                    Some(doc) => upserts.push((&change.meta, key.as_str(), doc.as_str())),
                    None => deletions.push((&change.meta, key.as_str())),
                }
            }
        }
        Self { upserts, deletions }
    }
}

/// Returns the snapshots that are replaced completely.
pub(crate) fn fully_replaced<'a>(changes: &[&'a SnapshotChange]) -> Vec<&'a SnapshotMeta> {
    let full = changes.iter().filter(|change| change.base.is_none());
    full.map(|change| &change.meta).collect()
}

/// The conflict clauses of upserts of snapshots and of their parts.
pub(crate) const UPDATE_SNAPSHOT: &str = " ON CONFLICT (consumer, bucket) DO UPDATE SET \
     version = excluded.version, position = excluded.position, event_hash = excluded.event_hash, \
     hash = excluded.hash";
pub(crate) const UPDATE_PART: &str =
    " ON CONFLICT (consumer, bucket, key) DO UPDATE SET doc = excluded.doc";

/// The conflict clause of upserts of read-model rows. Unchanged rows are neither written nor counted.
pub(crate) const UPDATE_CHANGED_ROWS: &str = " ON CONFLICT (model, key) DO UPDATE SET \
     endpoint = excluded.endpoint, deployment = excluded.deployment, position = excluded.position, \
     time = excluded.time, doc = excluded.doc \
     WHERE rows.endpoint <> excluded.endpoint OR rows.deployment <> excluded.deployment \
     OR rows.position <> excluded.position OR rows.time <> excluded.time OR rows.doc <> excluded.doc";
