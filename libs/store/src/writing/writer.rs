//! The only task of this process that writes. It groups waiting commits into one transaction, checks each
//! against the log and what the batch has staged so far, and replies once the transaction is durable.
//!
//! Invariants: commits are atomic; a refused commit does not affect the others of its batch; positions
//! are assigned in the order in which they become visible; subscribers receive records in that order,
//! before the committer gets its reply.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use contract::ids::Position;
use contract::log::{Record, RowChange};
use contract::time::{Span, Timestamp};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::archive::archive_set::ArchiveSet;
use crate::model::commit::Committed;
use crate::model::error::{CommitError, StoreError};
use crate::model::raw::EventRow;
use crate::model::snapshot::SnapshotChange;
use crate::sql::columns::{CursorRow, StoredIdempotencyKey};
use crate::sql::connection::{Connection, OwnedConnection};
use crate::sql::damage::{self, SNAPSHOT_TABLES};
use crate::sql::location::StoreLocation;
use crate::sql::statements;
use crate::writing::cache::WriterCache;
use crate::writing::catch_up;
use crate::writing::exclusive::{ExclusiveTask, TaskOutput};
use crate::writing::head::LogHead;
use crate::writing::staging::{PreparedCommit, PreparedEvent, StageOutcome, StagedBatch, stage};

/// The maximum number of commits per transaction: enough to amortize the disk's latency, few enough that
/// the first of them does not wait long.
const BATCH_COMMITS_MAX: usize = 512;

/// A batch with at least this much data is written, however few commits it holds.
const BATCH_BYTES_MAX: usize = 1024 * 1024;

/// The capacity of the writer's queue; beyond it, committers wait.
pub(crate) const QUEUE_MAX: usize = 4096;

/// How long idempotency keys of requests are kept, by the time of the log.
const REQUEST_KEY_RETENTION: Span = Span::from_secs(24 * 3600);

/// How often old keys are pruned, by the time of the log.
const PRUNE_INTERVAL: Span = Span::from_secs(3600);

/// The maximum number of attempts for a batch that the database rolls back in favor of another process.
const ATTEMPTS_MAX: u32 = 3;

/// How long the writer waits before it reconnects, after the first failed attempt and at most.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
const BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(BACKOFF_MIN)
    .with_max_delay(BACKOFF_MAX)
    .without_max_times();

pub(crate) type Subscribers = Arc<Mutex<Vec<mpsc::UnboundedSender<Vec<Arc<Record>>>>>>;

pub(crate) enum Job {
    Commit(CommitJob),
    /// A task that runs in a transaction of its own.
    Exclusive {
        task: ExclusiveTask,
        reply: oneshot::Sender<Result<TaskOutput, StoreError>>,
    },
    /// Stops the writer after everything that was queued before.
    Close,
}

pub(crate) struct CommitJob {
    pub prepared: Box<PreparedCommit>,
    pub reply: oneshot::Sender<Result<Committed, CommitError>>,
}

impl CommitJob {
    fn has_snapshot(&self) -> bool {
        self.prepared.snapshot.is_some()
    }
}

type BatchOutcomes = Vec<Result<StageOutcome, CommitError>>;

pub(crate) struct Writer {
    location: StoreLocation,
    /// None after a failure, until the writer reconnects.
    connection: Option<OwnedConnection>,
    backoff: Backoff,
    cache: WriterCache,
    last_pruned: Option<Timestamp>,
    subscribers: Subscribers,
    head: LogHead,
    archive_set: ArchiveSet,
    /// Declared last, so that it is released last.
    _lock: Option<File>,
}

/// When the writer may reconnect.
struct Backoff {
    delays: <ExponentialBuilder as BackoffBuilder>::Backoff,
    until: Option<Instant>,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            delays: BACKOFF.build(),
            until: None,
        }
    }
}

impl Backoff {
    fn record_failure(&mut self) {
        let delay = self.delays.next().unwrap_or(BACKOFF_MAX);
        self.until = Some(Instant::now() + delay);
    }

    async fn wait(&mut self) {
        if let Some(until) = self.until.take() {
            tokio::time::sleep_until(until).await;
        }
    }
}

impl Writer {
    pub(crate) fn new(
        location: StoreLocation,
        connection: OwnedConnection,
        cache: WriterCache,
        subscribers: Subscribers,
        head: LogHead,
        archive_set: ArchiveSet,
        lock: Option<File>,
    ) -> Self {
        Self {
            location,
            connection: Some(connection),
            backoff: Backoff::default(),
            cache,
            last_pruned: None,
            subscribers,
            head,
            archive_set,
            _lock: lock,
        }
    }

    pub(crate) async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(first) = jobs.recv().await {
            let next = gather(first, &mut jobs);
            if !next.batch.is_empty() {
                Box::pin(self.write_all(next.batch)).await;
            }
            match next.then {
                AfterBatch::Continue => {}
                AfterBatch::Exclusive(task, reply) => {
                    let _ = reply.send(Box::pin(self.write_exclusive(task)).await);
                }
                AfterBatch::Close => break,
            }
        }
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
    }

    async fn write_all(&mut self, mut batch: Vec<CommitJob>) {
        let mut attempts = 1;
        loop {
            let failure = match self.write(&mut batch).await {
                Ok(outcomes) => return self.reply(batch, outcomes),
                Err(failure) => failure,
            };
            match failure.kind {
                BatchFailureKind::RolledBack if attempts < ATTEMPTS_MAX => attempts += 1,
                // The database rejected something that the checks could not detect, such as a duplicate
                // event id. Commits are retried one by one so that only the bad one fails. Each is checked
                // again, so a version that was written without holding the lock is now a conflict.
                BatchFailureKind::Refused => return self.write_each(batch).await,
                // Other commits do not need the snapshots.
                BatchFailureKind::Damaged if batch.iter().any(CommitJob::has_snapshot) => {
                    self.discard_damaged_snapshots().await;
                    return self.write_each(batch).await;
                }
                _ => return fail_all(batch, &failure.error),
            }
        }
    }

    async fn write_each(&mut self, batch: Vec<CommitJob>) {
        for job in batch {
            let mut single = vec![job];
            match self.write(&mut single).await {
                Ok(outcomes) => self.reply(single, outcomes),
                Err(failure) => fail_all(single, &failure.error),
            }
        }
    }

    /// Discards all snapshots if one is damaged: their consumers write new ones.
    async fn discard_damaged_snapshots(&mut self) {
        let discarded = match damage::is_damaged(&self.location, SNAPSHOT_TABLES).await {
            Ok(true) => {
                let task = ExclusiveTask::Recreate(SNAPSHOT_TABLES, None);
                self.write_exclusive(task).await.map(|_| ())
            }
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = discarded {
            tracing::error!(%error, "failed to discard damaged snapshots");
        }
    }

    /// Writes a batch in one transaction. After an error nothing of it is in the log, as far as can be
    /// known, and the connection and the cache are discarded.
    async fn write(&mut self, batch: &mut [CommitJob]) -> Result<BatchOutcomes, BatchFailure> {
        let mut connection = self.connect().await?;
        self.cache.evict_if_full();
        let written = self.write_in_transaction(&mut connection, batch).await;
        match &written {
            Ok(_) => self.connection = Some(connection),
            Err(BatchFailure { error, .. }) => {
                tracing::error!(%error, commits = batch.len(), "failed to write a batch");
                connection.discard().await;
            }
        }
        written
    }

    async fn write_exclusive(&mut self, task: ExclusiveTask) -> Result<TaskOutput, StoreError> {
        let mut connection = self.connect().await?;
        let written = task
            .write(&mut connection, &mut self.cache, &self.archive_set)
            .await;
        match &written {
            Ok(output) => {
                self.head.advance(output.head);
                self.connection = Some(connection);
            }
            // Nothing was written and the connection may be fine, but the cache may have been modified.
            // Reconnecting reloads it.
            Err(_) => connection.discard().await,
        }
        written
    }

    async fn connect(&mut self) -> Result<OwnedConnection, StoreError> {
        if let Some(connection) = self.connection.take() {
            return Ok(connection);
        }
        self.backoff.wait().await;
        let opened = async {
            let mut connection = self.location.open_writer().await?;
            self.cache = WriterCache::load(&mut connection.get()).await?;
            Ok(connection)
        };
        let opened = opened.await;
        match &opened {
            Ok(_) => self.backoff = Backoff::default(),
            Err(_) => self.backoff.record_failure(),
        }
        opened
    }

    async fn write_in_transaction(
        &mut self,
        connection: &mut OwnedConnection,
        batch: &mut [CommitJob],
    ) -> Result<BatchOutcomes, BatchFailure> {
        let fenced = batch.iter().any(|job| job.prepared.fence.is_some());
        let mut transaction = connection.begin_batch(fenced).await?;
        let mut tx = transaction.get();
        if let Connection::Postgres(connection, limit) = &mut tx {
            let mut reads = catch_up::ReadSet::default();
            for job in batch.iter() {
                job.prepared.add_reads_to(&mut reads);
            }
            catch_up::refresh(connection, *limit, &reads, &mut self.cache).await?;
        }
        let mut staged = StagedBatch::default();
        let mut outcomes = Vec::with_capacity(batch.len());
        for job in batch.iter_mut() {
            let cache = &mut self.cache;
            match stage(cache, &mut staged, &mut tx, &mut job.prepared).await {
                // The database failed, not the commit: roll back the entire batch.
                Err(CommitError::Store(error)) => return Err(error.into()),
                outcome => outcomes.push(outcome),
            }
        }
        write_staged(&mut tx, &staged, &events_of(batch, &outcomes)).await?;
        if let Some(now) = self.due_for_pruning() {
            let before =
                Timestamp::from_millis(now.millis() - REQUEST_KEY_RETENTION.millis() as i64);
            statements::prune_request_keys(&mut tx, before).await?;
            self.last_pruned = Some(now);
        }
        transaction.commit().await?;
        Ok(outcomes)
    }

    fn due_for_pruning(&self) -> Option<Timestamp> {
        let now = self.cache.last_time?;
        let due = self
            .last_pruned
            // A clock that was set back must not stop pruning for good.
            .is_none_or(|last| {
                now.since(last) >= PRUNE_INTERVAL || last.since(now) >= PRUNE_INTERVAL
            });
        due.then_some(now)
    }

    fn reply(&self, batch: Vec<CommitJob>, outcomes: BatchOutcomes) {
        self.head.advance(last_position(&batch, &outcomes));
        // A caller may have stopped waiting; its commit stands all the same.
        for (job, outcome) in batch.into_iter().zip(outcomes) {
            let _ = job.reply.send(self.committed(*job.prepared, outcome));
        }
    }

    fn committed(
        &self,
        prepared: PreparedCommit,
        outcome: Result<StageOutcome, CommitError>,
    ) -> Result<Committed, CommitError> {
        if let StageOutcome::Duplicate(stored) = outcome? {
            return Ok(Committed::Duplicate {
                positions: stored.positions()?,
                result: stored.result,
            });
        }
        let events = prepared.appends.into_iter().flat_map(|a| a.events);
        let records: Vec<Arc<Record>> = events.map(|event| Arc::new(event.record)).collect();
        self.notify_subscribers(&records);
        Ok(Committed::Written { records })
    }

    fn notify_subscribers(&self, records: &[Arc<Record>]) {
        if records.is_empty() {
            return;
        }
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|subscriber| subscriber.send(records.to_vec()).is_ok());
    }
}

/// Jobs that are written together, and what follows them.
struct NextBatch {
    batch: Vec<CommitJob>,
    then: AfterBatch,
}

enum AfterBatch {
    Continue,
    Exclusive(
        ExclusiveTask,
        oneshot::Sender<Result<TaskOutput, StoreError>>,
    ),
    Close,
}

/// Takes waiting jobs, up to a full batch.
fn gather(first: Job, jobs: &mut mpsc::Receiver<Job>) -> NextBatch {
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut next = Some(first);
    let mut then = AfterBatch::Continue;
    while let Some(job) = next {
        match job {
            Job::Close => {
                then = AfterBatch::Close;
                break;
            }
            Job::Exclusive { task, reply } => {
                then = AfterBatch::Exclusive(task, reply);
                break;
            }
            Job::Commit(job) => {
                bytes += job.prepared.bytes;
                batch.push(job);
            }
        }
        let full = batch.len() >= BATCH_COMMITS_MAX || bytes >= BATCH_BYTES_MAX;
        next = if full { None } else { jobs.try_recv().ok() };
    }
    NextBatch { batch, then }
}

async fn write_staged(
    connection: &mut Connection<'_>,
    staged: &StagedBatch,
    events: &[EventRow<'_>],
) -> sqlx::Result<()> {
    statements::insert_events(connection, events).await?;
    let rows: Vec<&RowChange> = staged.rows.values().collect();
    statements::write_rows(connection, &rows).await?;
    let cursor = |((consumer, bucket), position): (&(&'static str, _), &Position)| CursorRow {
        consumer,
        bucket: *bucket,
        position: *position,
    };
    let cursors: Vec<CursorRow<'_>> = staged.cursors.iter().map(cursor).collect();
    statements::write_cursors(connection, &cursors).await?;
    let snapshots: Vec<&SnapshotChange> = staged.snapshots.values().collect();
    statements::write_snapshots(connection, &snapshots).await?;
    let idempotency_keys = staged
        .idempotency_keys
        .iter()
        .map(|(key, stored)| (key.as_str(), stored));
    let idempotency_keys: Vec<(&str, &StoredIdempotencyKey)> = idempotency_keys.collect();
    statements::write_idempotency_keys(connection, &idempotency_keys).await
}

/// The commits that this batch writes: neither refused nor duplicates.
fn accepted<'b>(
    batch: &'b [CommitJob],
    outcomes: &'b [Result<StageOutcome, CommitError>],
) -> impl DoubleEndedIterator<Item = &'b PreparedCommit> {
    let with_outcomes = batch.iter().zip(outcomes);
    with_outcomes
        .filter(|(_, outcome)| matches!(outcome, Ok(StageOutcome::Accepted)))
        .map(|(job, _)| &*job.prepared)
}

/// The events to insert, in order of position.
fn events_of<'b>(
    batch: &'b [CommitJob],
    outcomes: &'b [Result<StageOutcome, CommitError>],
) -> Vec<EventRow<'b>> {
    let appends = accepted(batch, outcomes).flat_map(|prepared| &prepared.appends);
    let events = appends.flat_map(|append| &append.events);
    events.map(PreparedEvent::row).collect()
}

fn last_position(batch: &[CommitJob], outcomes: &[Result<StageOutcome, CommitError>]) -> Position {
    let mut backwards = accepted(batch, outcomes).rev();
    let last = backwards.find_map(|prepared| prepared.appends.last()?.events.last());
    last.map_or(Position::START, |event| event.record.position)
}

fn fail_all(batch: Vec<CommitJob>, error: &StoreError) {
    for job in batch {
        let _ = job.reply.send(Err(error.clone().into()));
    }
}

/// Why a batch was not written.
#[derive(Debug)]
struct BatchFailure {
    error: StoreError,
    kind: BatchFailureKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BatchFailureKind {
    /// The database rejected the data: a constraint, or a text that it cannot store.
    Refused,
    /// The database rolled back the transaction because of a concurrent one.
    RolledBack,
    /// A page that the batch needs cannot be read.
    Damaged,
    /// Anything else. Whether the batch was written may be unknown.
    Other,
}

impl From<sqlx::Error> for BatchFailure {
    fn from(error: sqlx::Error) -> Self {
        let kind = error
            .as_database_error()
            .map_or(BatchFailureKind::Other, |error| {
                let code = error.code().unwrap_or_default().into_owned();
                let of_postgres = error
                    .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
                    .is_some();
                match of_postgres {
                    true if code.starts_with("22") || code.starts_with("23") => {
                        BatchFailureKind::Refused
                    }
                    true if code.starts_with("40") => BatchFailureKind::RolledBack,
                    false if error.is_unique_violation() => BatchFailureKind::Refused,
                    _ => BatchFailureKind::Other,
                }
            });
        match kind {
            BatchFailureKind::Other => StoreError::from(error).into(),
            kind => Self {
                error: error.into(),
                kind,
            },
        }
    }
}

impl From<StoreError> for BatchFailure {
    fn from(error: StoreError) -> Self {
        let kind = match error {
            StoreError::Damaged(_) => BatchFailureKind::Damaged,
            _ => BatchFailureKind::Other,
        };
        Self { error, kind }
    }
}
