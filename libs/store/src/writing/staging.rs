//! Checks commits: first as far as possible without the log, then one by one against the log and what
//! the batch has staged so far.
//!
//! Invariant: a refused commit leaves no trace.

use std::collections::BTreeMap;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::{EVENT_BYTES_MAX, Record, RowChange, StreamName};

use crate::model::commit::{Commit, CursorMove, Fence, IdempotencyKey};
use crate::model::error::{CommitError, StoreError};
use crate::model::kinds::belongs;
use crate::model::raw::EventRow;
use crate::model::snapshot::SnapshotChange;
use crate::sql::columns::{SnapshotPosition, StoredIdempotencyKey};
use crate::sql::connection::Connection;
use crate::writing::cache::WriterCache;
use crate::writing::catch_up::ReadSet;

/// A commit that was checked as far as possible without the log, with its events encoded.
pub(crate) struct PreparedCommit {
    pub appends: Vec<PreparedAppend>,
    pub rows: Vec<RowChange>,
    pub cursor: Option<CursorMove>,
    pub snapshot: Option<SnapshotChange>,
    pub fence: Option<Fence>,
    pub idempotency_key: Option<IdempotencyKey>,
    pub bytes: usize,
}

pub(crate) struct PreparedAppend {
    pub stream: StreamName,
    pub bucket: Bucket,
    pub expected_version: u64,
    /// Without positions until they are staged.
    pub events: Vec<PreparedEvent>,
}

pub(crate) struct PreparedEvent {
    pub record: Record,
    pub data: String,
    pub prev_hash: ChainHash,
}

impl PreparedEvent {
    pub(crate) fn row(&self) -> EventRow<'_> {
        EventRow::from_record(&self.record, &self.data, self.prev_hash)
    }
}

impl PreparedCommit {
    /// Runs in the caller's task, so that encoding does not block the writer.
    pub(crate) fn new(commit: Commit) -> Result<Self, CommitError> {
        if let Some(row) = commit.rows.iter().find(|row| row.key.is_empty()) {
            return Err(StoreError::refused(format!(
                "a row of `{}` has no key: give it one",
                row.model
            ))
            .into());
        }
        let mut bytes = 0;
        let mut appends = Vec::with_capacity(commit.appends.len());
        for append in commit.appends {
            let bucket = append.stream.bucket_key().bucket();
            let mut events = Vec::with_capacity(append.events.len());
            for event in append.events {
                let data = event.event.data_json().map_err(|error| {
                    StoreError::refused(format!("an event cannot be written: {error}"))
                        .caused_by(error)
                })?;
                if data.len() > EVENT_BYTES_MAX {
                    return Err(CommitError::TooLarge {
                        bytes: data.len(),
                        limit: EVENT_BYTES_MAX,
                    });
                }
                if !belongs(&event.event, &append.stream) {
                    return Err(StoreError::refused(format!(
                        "an event `{}` does not belong in stream `{}`, which another service writes",
                        event.event.type_name(),
                        append.stream
                    ))
                    .into());
                }
                bytes += data.len();
                let record = Record {
                    position: Position::START,
                    prev: Position::START,
                    bucket,
                    stream: append.stream.clone(),
                    version: 0,
                    id: event.id,
                    time: event.time,
                    actor: event.actor,
                    event: event.event,
                };
                events.push(PreparedEvent {
                    record,
                    data,
                    prev_hash: ChainHash::START,
                });
            }
            appends.push(PreparedAppend {
                stream: append.stream,
                bucket,
                expected_version: append.expected_version,
                events,
            });
        }
        let docs = commit.rows.iter().filter_map(|row| row.doc.as_ref());
        bytes += docs.map(String::len).sum::<usize>();
        bytes += commit.snapshot.as_ref().map_or(0, SnapshotChange::bytes);
        Ok(Self {
            appends,
            rows: commit.rows,
            cursor: commit.cursor,
            snapshot: commit.snapshot,
            fence: commit.fence,
            idempotency_key: commit.idempotency_key,
            bytes,
        })
    }

    /// Adds what has to be read of the log to check this commit.
    pub(crate) fn add_reads_to<'a>(&'a self, reads: &mut ReadSet<'a>) {
        reads
            .fences
            .extend(self.fence.iter().map(|fence| fence.name.as_str()));
        reads.idempotency_keys.extend(
            self.idempotency_key
                .iter()
                .map(|idempotency_key| idempotency_key.key.as_str()),
        );
        let cursors = self.cursor.iter();
        reads
            .cursors
            .extend(cursors.map(|cursor| (cursor.consumer, cursor.bucket)));
        let snapshots = self.snapshot.iter().map(|change| &change.meta);
        reads
            .snapshots
            .extend(snapshots.map(|meta| (meta.consumer.as_str(), meta.bucket)));
        for append in &self.appends {
            reads.streams.insert(&append.stream);
            reads.buckets.insert(append.bucket);
        }
    }
}

/// The result of staging a commit that was not refused.
pub(crate) enum StageOutcome {
    Accepted,
    Duplicate(StoredIdempotencyKey),
}

/// What a batch writes besides its events. Later changes to the same key win.
#[derive(Default)]
pub(crate) struct StagedBatch {
    pub rows: BTreeMap<(&'static str, String), RowChange>,
    pub cursors: BTreeMap<(&'static str, Bucket), Position>,
    pub snapshots: BTreeMap<(String, Bucket), SnapshotChange>,
    pub idempotency_keys: BTreeMap<String, StoredIdempotencyKey>,
}

/// Checks one commit and, if it passes, assigns positions to its events.
pub(crate) async fn stage(
    cache: &mut WriterCache,
    staged: &mut StagedBatch,
    connection: &mut Connection<'_>,
    commit: &mut PreparedCommit,
) -> Result<StageOutcome, CommitError> {
    if let Some(fence) = &commit.fence {
        check_fence(cache, connection, fence).await?;
    }
    if let Some(idempotency_key) = &commit.idempotency_key
        && let Some(before) =
            find_idempotency_key(cache, staged, connection, idempotency_key).await?
    {
        return Ok(StageOutcome::Duplicate(before));
    }
    if let Some(cursor) = &commit.cursor {
        check_cursor(cache, connection, cursor).await?;
    }
    if let Some(change) = &commit.snapshot {
        check_snapshot(cache, connection, change).await?;
    }
    check_versions(cache, connection, &commit.appends).await?;
    for append in &commit.appends {
        cache.load_head_hash(connection, append.bucket).await?;
    }

    // The commit can no longer be refused.
    let positions = assign_positions(cache, &mut commit.appends);
    for row in &commit.rows {
        let key = (row.model, row.key.clone());
        staged.rows.insert(key, row.clone());
    }
    if let Some(cursor) = &commit.cursor {
        let key = (cursor.consumer, cursor.bucket);
        cache.cursors.insert(key, cursor.to);
        staged.cursors.insert(key, cursor.to);
    }
    if let Some(change) = &commit.snapshot {
        stage_snapshot(cache, staged, change);
    }
    if let Some(idempotency_key) = &commit.idempotency_key {
        let stored = StoredIdempotencyKey {
            body_hash: idempotency_key.body_hash.clone(),
            result: idempotency_key.result.clone(),
            positions: serde_json::to_string(&positions)
                .map_err(|error| StoreError::database(error.to_string()).caused_by(error))?,
            time: cache.last_time.unwrap_or_default().millis(),
        };
        staged
            .idempotency_keys
            .insert(idempotency_key.key.clone(), stored);
    }
    Ok(StageOutcome::Accepted)
}

async fn check_fence(
    cache: &mut WriterCache,
    connection: &mut Connection<'_>,
    fence: &Fence,
) -> Result<(), CommitError> {
    let actual = cache.generation(connection, &fence.name).await?;
    if actual == fence.generation {
        return Ok(());
    }
    Err(CommitError::Fenced {
        name: fence.name.clone(),
        ours: fence.generation,
        actual,
    })
}

async fn find_idempotency_key(
    cache: &WriterCache,
    staged: &StagedBatch,
    connection: &mut Connection<'_>,
    idempotency_key: &IdempotencyKey,
) -> Result<Option<StoredIdempotencyKey>, CommitError> {
    let before = match staged.idempotency_keys.get(&idempotency_key.key) {
        Some(before) => Some(before.clone()),
        None => {
            cache
                .idempotency_key(connection, &idempotency_key.key)
                .await?
        }
    };
    match before {
        Some(before) if before.body_hash != idempotency_key.body_hash => {
            Err(CommitError::IdempotencyKeyReused)
        }
        before => Ok(before),
    }
}

async fn check_cursor(
    cache: &mut WriterCache,
    connection: &mut Connection<'_>,
    cursor: &CursorMove,
) -> Result<(), CommitError> {
    let actual = cache
        .cursor(connection, cursor.consumer, cursor.bucket)
        .await?;
    if actual == cursor.from {
        return Ok(());
    }
    Err(CommitError::CursorMoved {
        consumer: cursor.consumer,
        bucket: cursor.bucket,
        expected: cursor.from,
        actual,
    })
}

async fn check_snapshot(
    cache: &mut WriterCache,
    connection: &mut Connection<'_>,
    change: &SnapshotChange,
) -> Result<(), CommitError> {
    let meta = &change.meta;
    let stored = cache
        .snapshot(connection, &meta.consumer, meta.bucket)
        .await?;
    // A snapshot of another version is unusable, and so is one past the end of the log, which belongs to
    // another log. Either may be replaced.
    let in_use = |at: &SnapshotPosition| at.version == meta.version && at.position <= cache.head;
    let stored = stored.filter(in_use).map(|at| at.position);
    if change.base.is_some() && change.base != stored {
        return Err(CommitError::SnapshotMoved {
            consumer: meta.consumer.clone(),
            bucket: meta.bucket,
            expected: change.base,
            actual: stored,
        });
    }
    match stored {
        Some(stored) if meta.position < stored => Err(CommitError::SnapshotBehind {
            consumer: meta.consumer.clone(),
            bucket: meta.bucket,
            stored,
            ours: meta.position,
        }),
        _ => Ok(()),
    }
}

/// Merges a change into what the batch has staged of the same snapshot, unless it replaces all of it.
fn stage_snapshot(cache: &mut WriterCache, staged: &mut StagedBatch, change: &SnapshotChange) {
    let meta = &change.meta;
    let key = (meta.consumer.clone(), meta.bucket);
    let position = SnapshotPosition {
        version: meta.version,
        position: meta.position,
    };
    cache.snapshots.insert(key.clone(), Some(position));
    match staged.snapshots.get_mut(&key) {
        Some(before) if change.base.is_some() => before.merge(change),
        _ => {
            staged.snapshots.insert(key, change.clone());
        }
    }
}

async fn check_versions(
    cache: &mut WriterCache,
    connection: &mut Connection<'_>,
    appends: &[PreparedAppend],
) -> Result<(), CommitError> {
    // Two appends of one commit may go to the same stream.
    let mut ahead: BTreeMap<&StreamName, u64> = BTreeMap::new();
    for append in appends {
        let actual = match ahead.get(&append.stream) {
            Some(version) => *version,
            None => cache.version(connection, &append.stream).await?,
        };
        if actual != append.expected_version {
            return Err(CommitError::Conflict {
                stream: append.stream.clone(),
                expected: append.expected_version,
                actual,
            });
        }
        ahead.insert(&append.stream, actual + append.events.len() as u64);
    }
    Ok(())
}

/// Assigns each event its position, its version and its link in the chain of its bucket.
fn assign_positions(cache: &mut WriterCache, appends: &mut [PreparedAppend]) -> Vec<Position> {
    let mut positions = Vec::new();
    for append in appends {
        let mut version = append.expected_version;
        for event in &mut append.events {
            version += 1;
            let record = &mut event.record;
            record.version = version;
            (record.position, record.prev, event.prev_hash) = cache.allocate(append.bucket);
            assert!(record.prev < record.position, "positions only rise");
            cache.last_time = Some(record.time);
            positions.push(record.position);
            cache.set_bucket_head(&event.row());
        }
        match cache.versions.get_mut(append.stream.as_str()) {
            Some(cached) => *cached = version,
            None => {
                let stream = append.stream.as_str().to_owned();
                cache.versions.insert(stream, version);
            }
        }
    }
    positions
}
