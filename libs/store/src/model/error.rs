//! Errors of commits and of the store.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::StreamName;

/// Why a commit was not written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    /// Someone else has appended to a stream since the caller read it.
    #[error(
        "stream `{stream}` is at version {actual}, not {expected}: it was written concurrently; read it again and retry"
    )]
    Conflict {
        /// The stream.
        stream: StreamName,
        /// The version that the caller has seen.
        expected: u64,
        /// The stored version.
        actual: u64,
    },
    /// Another owner has taken the fence.
    #[error("`{name}` was taken over (generation {actual}, ours {ours})")]
    Fenced {
        /// The fence's name.
        name: String,
        /// The caller's generation.
        ours: u64,
        /// The stored generation.
        actual: u64,
    },
    /// The stored cursor is not where the caller believes it to be.
    #[error("the cursor of `{consumer}` in bucket {bucket} is at {actual}, not {expected}")]
    CursorMoved {
        /// The consumer's name.
        consumer: &'static str,
        /// The bucket.
        bucket: Bucket,
        /// The position that the caller moves it from.
        expected: Position,
        /// The stored position.
        actual: Position,
    },
    /// The change is based on a snapshot other than the stored one.
    #[error(
        "the snapshot of `{consumer}` in bucket {bucket} is at {}, not {}: write it in full",
        describe(actual),
        describe(expected)
    )]
    SnapshotMoved {
        /// The consumer's name.
        consumer: String,
        /// The bucket.
        bucket: Bucket,
        /// The position of the snapshot that the change is based on.
        expected: Option<Position>,
        /// None if no snapshot of the same version is stored.
        actual: Option<Position>,
    },
    /// The stored snapshot covers more of the log than the new one.
    #[error(
        "the stored snapshot of `{consumer}` in bucket {bucket} is at {stored}, ahead of ours at {ours}: read further in the log before writing it"
    )]
    SnapshotBehind {
        /// The consumer's name.
        consumer: String,
        /// The bucket.
        bucket: Bucket,
        /// The position of the stored snapshot.
        stored: Position,
        /// The position of the new snapshot.
        ours: Position,
    },
    /// The stored body hash of the key differs.
    #[error("the idempotency key was already used for a different request")]
    IdempotencyKeyReused,
    /// An event is too large.
    #[error("an event of {bytes} bytes is larger than the limit of {limit}")]
    TooLarge {
        /// The size of its data as JSON, in bytes.
        bytes: usize,
        /// The largest size allowed, in bytes.
        limit: usize,
    },
    /// The store failed, or the commit is invalid.
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
        #[source]
        detail: Failure,
    },
    /// The database reports corruption.
    #[error(
        "the store is damaged: {0}. To see where, what is still readable, and how to recover, run `penstock events verify`, \
         or, without a server, `penstock store verify`"
    )]
    Damaged(#[source] Failure),
    /// An archive is missing or was modified: the events in it cannot be read until it is back.
    #[error("{0}")]
    ArchiveUnavailable(#[source] Failure),
    /// The request, the folder or the database is unsuitable: a retry fails, too.
    #[error("{0}")]
    Refused(#[source] Failure),
    /// Another process has this file open.
    #[error("{0} is in use by another process: stop it first, or use another data folder")]
    InUse(String),
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
            Self::Database(failure)
            | Self::Damaged(failure)
            | Self::ArchiveUnavailable(failure)
            | Self::Refused(failure)
            | Self::Unreadable {
                detail: failure, ..
            } => {
                failure.cause = Some(Arc::new(cause));
            }
            Self::InUse(_) | Self::Closed => {}
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

    pub(crate) fn caused_by(mut self, cause: impl Error + Send + Sync + 'static) -> Self {
        self.cause = Some(Arc::new(cause));
        self
    }

    /// Puts the words into a sentence.
    pub(crate) fn within(self, sentence: impl FnOnce(&str) -> String) -> Self {
        Self {
            text: sentence(&self.text),
            cause: self.cause,
        }
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
