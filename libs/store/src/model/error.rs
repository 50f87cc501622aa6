//! Errors of commits and of the store.

use contract::ids::{Bucket, Position};
use contract::log::StreamName;

#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    #[error(
        "stream `{stream}` is at version {actual}, not {expected}: it was written concurrently; read it again and retry"
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
    #[error("the cursor of `{consumer}` in bucket {bucket} is at {actual}, not {expected}")]
    CursorMoved {
        consumer: &'static str,
        bucket: Bucket,
        expected: Position,
        actual: Position,
    },
    #[error(
        "the snapshot of `{consumer}` in bucket {bucket} is at {}, not {}: write it in full",
        describe(actual),
        describe(expected)
    )]
    SnapshotMoved {
        consumer: String,
        bucket: Bucket,
        expected: Option<Position>,
        /// None if no snapshot of the same version is stored.
        actual: Option<Position>,
    },
    #[error(
        "the stored snapshot of `{consumer}` in bucket {bucket} is at {stored}, ahead of ours at {ours}: read further in the log before writing it"
    )]
    SnapshotBehind {
        consumer: String,
        bucket: Bucket,
        stored: Position,
        ours: Position,
    },
    #[error("the idempotency key was already used for a different request")]
    IdempotencyKeyReused,
    #[error("an event of {bytes} bytes is larger than the limit of {limit}")]
    TooLarge { bytes: usize, limit: usize },
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn describe(position: &Option<Position>) -> String {
    position.map_or_else(|| "no position".to_owned(), |position| position.to_string())
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("the store failed: {0}")]
    Database(String),
    #[error("an event in the log cannot be read (position {position}): {detail}")]
    Unreadable { position: Position, detail: String },
    #[error(
        "the store is damaged: {0}. Run `penstock events verify` to see where, what is still readable, and how to recover"
    )]
    Damaged(String),
    #[error("{0}")]
    Refused(String),
    #[error("the store is shut down")]
    Closed,
}
