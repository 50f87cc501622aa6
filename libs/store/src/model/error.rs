//! What can go wrong, in sentences: with a commit, and with the store.

use contract::ids::{Bucket, Position};
use contract::log::StreamName;

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
