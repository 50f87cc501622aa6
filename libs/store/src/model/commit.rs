//! The input and result of [`Store::commit`](crate::Store::commit).

use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{NewEvent, Record, RowChange, StreamName};

use crate::model::snapshot::SnapshotChange;

/// A set of changes that is written atomically.
#[derive(Clone, Debug, Default)]
pub struct Commit {
    pub appends: Vec<Append>,
    pub rows: Vec<RowChange>,
    pub cursor: Option<CursorMove>,
    pub snapshot: Option<SnapshotChange>,
    pub fence: Option<Fence>,
    pub idempotency_key: Option<IdempotencyKey>,
}

/// Events for one stream.
#[derive(Clone, Debug)]
pub struct Append {
    pub stream: StreamName,
    /// The version of the stream's last event that the caller has seen; 0 for a new stream.
    pub expected_version: u64,
    pub events: Vec<NewEvent>,
}

/// Advances a consumer's cursor in a bucket to `to`; refused unless the stored cursor is `from`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CursorMove {
    pub consumer: &'static str,
    pub bucket: Bucket,
    pub from: Position,
    pub to: Position,
}

/// Proof of ownership: refused once another owner has taken the name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// `autoscaler/17` for a service's bucket, `relay` for single-owner work.
    pub name: String,
    pub generation: u64,
}

/// Makes a commit idempotent: a repeat with the same key and body returns the first result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// `CONSUMER:EVENT_ID`, or `http:TOKEN:METHOD:PATH:IDEMPOTENCY_KEY`.
    pub key: String,
    /// Hash of the request; a repeat with a different hash is refused.
    pub body_hash: String,
    /// Stored with the key and returned on a repeat (an HTTP response, for example).
    pub result: Option<String>,
}

#[derive(Clone, Debug)]
pub enum Committed {
    /// Written by this call, with the records as stored in the log.
    Written { records: Vec<Arc<Record>> },
    /// A commit with the same idempotency key was written before.
    Duplicate {
        positions: Vec<Position>,
        result: Option<String>,
    },
}
