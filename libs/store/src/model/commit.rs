//! The input and result of [`Store::commit`](crate::Store::commit).

use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{NewEvent, Record, RowChange, StreamName};

use crate::model::snapshot::SnapshotChange;

/// A set of changes that is written atomically.
#[derive(Clone, Debug, Default)]
pub struct Commit {
    /// Events to append, in this order.
    pub appends: Vec<Append>,
    /// Changes to rows of read models; their keys are not empty.
    pub rows: Vec<RowChange>,
    /// The cursor to advance.
    pub cursor: Option<CursorMove>,
    /// The snapshot to write.
    pub snapshot: Option<SnapshotChange>,
    /// Proof that the caller still owns what it writes for.
    pub fence: Option<Fence>,
    /// For commits that may be repeated.
    pub idempotency_key: Option<IdempotencyKey>,
}

/// Events for one stream.
#[derive(Clone, Debug)]
pub struct Append {
    /// The stream.
    pub stream: StreamName,
    /// The version of the stream's last event that the caller has seen; 0 for a new stream.
    pub expected_version: u64,
    /// The events, each of at most [`EVENT_BYTES_MAX`](contract::log::EVENT_BYTES_MAX) bytes.
    pub events: Vec<NewEvent>,
}

/// Advances a consumer's cursor in a bucket to `to`; refused unless the stored cursor is `from`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CursorMove {
    /// The consumer's name.
    pub consumer: &'static str,
    /// The bucket.
    pub bucket: Bucket,
    /// The position that the caller believes to be stored; `Position::START` for no cursor.
    pub from: Position,
    /// The position up to which the bucket has been processed, inclusive.
    pub to: Position,
}

/// Proof of ownership: refused once another owner has taken the name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// `autoscaler/17` for a service's bucket, `relay` for single-owner work.
    pub name: String,
    /// How often the name was taken, from 1.
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

/// What became of a commit that was not refused.
#[derive(Clone, Debug)]
pub enum Committed {
    /// Written by this call, with the records as stored in the log.
    Written {
        /// In order of their positions.
        records: Vec<Arc<Record>>,
    },
    /// A commit with the same idempotency key was written before.
    Duplicate {
        /// The positions of the events that were written then.
        positions: Vec<Position>,
        /// The result that was stored with the key.
        result: Option<String>,
    },
}
