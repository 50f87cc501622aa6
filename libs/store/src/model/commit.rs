//! What is handed to [`Store::commit`](crate::Store::commit), and what comes back.

use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{NewEvent, Record, RowChange, StreamName};

use crate::model::snapshot::SnapshotChange;

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
