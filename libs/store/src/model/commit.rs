//! What is handed to [`Store::commit`](crate::Store::commit), and what comes back.

use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{NewEvent, Record, RowChange, StreamName};

use crate::SnapshotChange;

/// All or nothing.
#[derive(Clone, Debug, Default)]
pub struct Commit {
    pub appends: Vec<Append>,
    pub rows: Vec<RowChange>,
    pub cursor: Option<CursorMove>,
    pub snapshot: Option<SnapshotChange>,
    pub fence: Option<Fence>,
    pub cause: Option<Cause>,
}

/// Events for one stream.
#[derive(Clone, Debug)]
pub struct Append {
    pub stream: StreamName,
    /// The version of the stream's last event, as the writer knows it; 0 for a new stream.
    pub expected_version: u64,
    pub events: Vec<NewEvent>,
}

/// A consumer has reached `to` in a bucket; refused unless the stored cursor is `from`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CursorMove {
    pub consumer: &'static str,
    pub bucket: Bucket,
    pub from: Position,
    pub to: Position,
}

/// Proof of ownership: refused once somebody else has taken what it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// `autoscaler/17` for a service's bucket, `relay` for single-owner work.
    pub name: String,
    pub generation: u64,
}

/// What led to this commit; unique. A repeat with the same body returns the first result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// `CONSUMER:EVENT_ID`, or `http:TOKEN:METHOD:PATH:IDEMPOTENCY_KEY`.
    pub key: String,
    /// Hash of what was asked for; a repeat with another one is refused.
    pub body_hash: String,
    /// Kept with the cause and given back on a repeat (an HTTP answer, say).
    pub result: Option<String>,
}

#[derive(Clone, Debug)]
pub enum Committed {
    /// Written now, with the records as they stand in the log.
    Now { records: Vec<Arc<Record>> },
    /// The same cause was committed before.
    Before {
        positions: Vec<Position>,
        result: Option<String>,
    },
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    #[error(
        "stream `{stream}` is at version {actual}, not {expected}: somebody else has written; read again and retry"
    )]
    Conflict {
        stream: StreamName,
        expected: u64,
        actual: u64,
    },
    #[error("`{name}` was taken over (generation {actual}, ours {ours})")]
    Fenced {
        name: String,
        ours: u64,
        actual: u64,
    },
    #[error("cursor of `{consumer}` in bucket {bucket} stands at {actual}, not {expected}")]
    CursorMoved {
        consumer: &'static str,
        bucket: Bucket,
        expected: Position,
        actual: Position,
    },
    #[error(
        "the snapshot of `{consumer}` in bucket {bucket} stands at {}, not {}: write it whole",
        place(actual),
        place(expected)
    )]
    SnapshotMoved {
        consumer: String,
        bucket: Bucket,
        expected: Option<Position>,
        /// None where none of the same version is stored.
        actual: Option<Position>,
    },
    #[error(
        "the snapshot of `{consumer}` in bucket {bucket} stands at {stored} already, and ours only at {ours}: read on in the log before it is written"
    )]
    SnapshotBehind {
        consumer: String,
        bucket: Bucket,
        stored: Position,
        ours: Position,
    },
    #[error("the idempotency key was used before with another request")]
    CauseReused,
    #[error("an event of {bytes} bytes is larger than the limit of {limit}")]
    TooLarge { bytes: usize, limit: usize },
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn place(at: &Option<Position>) -> String {
    at.map_or_else(|| "no position".to_owned(), |at| at.to_string())
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("the store failed: {0}")]
    Database(String),
    #[error("an event in the log cannot be read (position {position}): {detail}")]
    Unreadable { position: Position, detail: String },
    #[error(
        "the store is damaged: {0}. `penstock events verify` says where, what is still whole, and how to go on"
    )]
    Damaged(String),
    #[error("{0}")]
    Refused(String),
    #[error("the store is shut down")]
    Closed,
}
