//! Errors of commits and of the store.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

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

/// A failure of the store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The database failed, or cannot be reached.
    #[error("the store failed: {0}")]
    Database(#[source] Failure),
    /// This release cannot decode an event.
    #[error("an event in the log cannot be read (position {position}): {detail}")]
    Unreadable {
        /// Its position.
        position: Position,
        /// Why it cannot be decoded.
        detail: String,
    },
    /// The database reports corruption.
    #[error(
        "the store is damaged: {0}. Run `penstock events verify` to see where, what is still readable, and how to recover"
    )]
    Damaged(#[source] Failure),
    /// The request, the folder or the database is unsuitable: a retry fails, too.
    #[error("{0}")]
    Refused(#[source] Failure),
    /// The store was shut down.
    #[error("the store is shut down")]
    Closed,
}

impl StoreError {
    /// The database failed: what happened, as the end of a sentence.
    pub fn database(what: impl Into<Failure>) -> Self {
        Self::Database(what.into())
    }

    /// The database is corrupt: what it reported.
    pub fn damaged(what: impl Into<Failure>) -> Self {
        Self::Damaged(what.into())
    }

    /// The request is refused with this sentence.
    pub fn refused(sentence: impl Into<Failure>) -> Self {
        Self::Refused(sentence.into())
    }

    /// Keeps the error that was the cause; its text should be in the sentence already.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Error + Send + Sync + 'static) -> Self {
        match &mut self {
            Self::Database(failure) | Self::Damaged(failure) | Self::Refused(failure) => {
                failure.cause = Some(Arc::new(cause));
            }
            Self::Unreadable { .. } | Self::Closed => {}
        }
        self
    }
}

/// What went wrong in words, and the error that caused it, if there was one.
#[derive(Debug, Clone)]
pub struct Failure {
    text: String,
    cause: Option<Arc<dyn Error + Send + Sync>>,
}

impl Failure {
    /// What went wrong in words.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl<T: Into<String>> From<T> for Failure {
    fn from(text: T) -> Self {
        Self {
            text: text.into(),
            cause: None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}
