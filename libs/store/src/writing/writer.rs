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

use crate::archive::shelf::Shelf;
use crate::model::commit::Committed;
use crate::model::error::{CommitError, StoreError};
use crate::model::raw::EventRow;
use crate::model::snapshot::SnapshotChange;
use crate::sql::columns::{CursorRow, StoredCause};
use crate::sql::connection::{Connection, Owned};
use crate::sql::location::Location;
use crate::sql::statements;
use crate::writing::alone::{Alone, Answer};
use crate::writing::catch_up;
use crate::writing::head::Head;
use crate::writing::known::Known;
use crate::writing::staging::{Outcome, Prepared, PreparedEvent, Staged, stage};

/// The maximum number of commits per transaction: enough to amortize the disk's latency, few enough that
/// the first of them does not wait long.
const BATCH_COMMITS_MAX: usize = 512;

/// A batch with at least this much data is written, however few commits it holds.
const BATCH_BYTES_MAX: usize = 1024 * 1024;

/// The capacity of the writer's queue; beyond it, committers wait.
pub(crate) const QUEUE_MAX: usize = 4096;

/// How long idempotency keys of requests are kept, by the time of the log.
const REQUEST_CAUSES_KEPT: Span = Span::from_secs(24 * 3600);

/// How often old keys are pruned, by the time of the log.
const PRUNE_EVERY: Span = Span::from_secs(3600);

/// The maximum number of attempts for a batch that the database rolls back in favor of another process.
const TRIES_MAX: u32 = 3;

/// How long the writer waits before it reconnects, after the first failed attempt and at most.
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(2);
const BACK_OFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(BACK_OFF_MIN)
    .with_max_delay(BACK_OFF_MAX)
    .without_max_times();

pub(crate) type Subscribers = Arc<Mutex<Vec<mpsc::UnboundedSender<Vec<Arc<Record>>>>>>;

pub(crate) enum Job {
    Commit(CommitJob),
    /// A task that runs in a transaction of its own.
    Alone {
        task: Alone,
        reply: oneshot::Sender<Result<Answer, StoreError>>,
    },
    /// Stops the writer after everything that was queued before.
    Close,
}

pub(crate) struct CommitJob {
    pub prepared: Box<Prepared>,
    pub reply: oneshot::Sender<Result<Committed, CommitError>>,
}

type Outcomes = Vec<Result<Outcome, CommitError>>;

pub(crate) struct Writer {
    location: Location,
    /// None after a failure, until the writer reconnects.
    connection: Option<Owned>,
    back_off: BackOff,
    known: Known,
    pruned: Option<Timestamp>,
    subscribers: Subscribers,
    head: Head,
    shelf: Shelf,
    /// Declared last, so that it is released last.
    _lock: Option<File>,
}

/// When the writer may reconnect.
struct BackOff {
    waits: <ExponentialBuilder as BackoffBuilder>::Backoff,
    until: Option<Instant>,
}

impl Default for BackOff {
    fn default() -> Self {
        Self {
            waits: BACK_OFF.build(),
            until: None,
        }
    }
}

impl BackOff {
    fn failed(&mut self) {
        let wait = self.waits.next().unwrap_or(BACK_OFF_MAX);
        self.until = Some(Instant::now() + wait);
    }

    async fn pass(&mut self) {
        if let Some(until) = self.until.take() {
            tokio::time::sleep_until(until).await;
        }
    }
}

impl Writer {
    pub(crate) fn new(
        location: Location,
        connection: Owned,
        known: Known,
        subscribers: Subscribers,
        head: Head,
        shelf: Shelf,
        lock: Option<File>,
    ) -> Self {
        Self {
            location,
            connection: Some(connection),
            back_off: BackOff::default(),
            known,
            pruned: None,
            subscribers,
            head,
            shelf,
            _lock: lock,
        }
    }

    pub(crate) async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(first) = jobs.recv().await {
            let gathered = gather(first, &mut jobs);
            if !gathered.batch.is_empty() {
                Box::pin(self.write_all(gathered.batch)).await;
            }
            match gathered.then {
                Then::GoOn => {}
                Then::Alone(task, reply) => {
                    let _ = reply.send(Box::pin(self.write_alone(task)).await);
                }
                Then::Close => break,
            }
        }
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
    }

    async fn write_all(&mut self, mut batch: Vec<CommitJob>) {
        let mut tries = 1;
        loop {
            let failure = match self.write(&mut batch).await {
                Ok(outcomes) => return self.answer(batch, outcomes),
                Err(failure) => failure,
            };
            match failure.kind {
                FailureKind::GivenUp if tries < TRIES_MAX => tries += 1,
                // The database rejected something that the checks could not detect, such as a duplicate
                // event id. Commits are retried one by one so that only the bad one fails. Each is checked
                // again, so a version that was written without holding the lock is now a conflict.
                FailureKind::Refused => return self.write_each(batch).await,
                _ => return fail(batch, &failure.error),
            }
        }
    }

    async fn write_each(&mut self, batch: Vec<CommitJob>) {
        for job in batch {
            let mut alone = vec![job];
            match self.write(&mut alone).await {
                Ok(outcomes) => self.answer(alone, outcomes),
                Err(failure) => fail(alone, &failure.error),
            }
        }
    }

    /// Writes a batch in one transaction. After an error nothing of it is in the log, as far as can be
    /// known, and the connection and the cache are discarded.
    async fn write(&mut self, batch: &mut [CommitJob]) -> Result<Outcomes, Failure> {
        let mut connection = self.connect().await?;
        self.known.forget_if_many();
        let written = self.transact(&mut connection, batch).await;
        match &written {
            Ok(_) => self.connection = Some(connection),
            Err(Failure { error, .. }) => {
                tracing::error!(%error, commits = batch.len(), "failed to write a batch");
                connection.discard().await;
            }
        }
        written
    }

    async fn write_alone(&mut self, task: Alone) -> Result<Answer, StoreError> {
        let mut connection = self.connect().await?;
        let written = task
            .write(&mut connection, &mut self.known, &self.shelf)
            .await;
        match &written {
            Ok(answer) => {
                self.head.advance(answer.head);
                self.connection = Some(connection);
            }
            // Nothing was written and the connection may be fine, but the cache may have been modified.
            // Reconnecting reloads it.
            Err(_) => connection.discard().await,
        }
        written
    }

    async fn connect(&mut self) -> Result<Owned, StoreError> {
        if let Some(connection) = self.connection.take() {
            return Ok(connection);
        }
        self.back_off.pass().await;
        let opened = async {
            let mut connection = self.location.open_writer().await?;
            self.known = Known::read(&mut connection.get()).await?;
            Ok(connection)
        };
        let opened = opened.await;
        match &opened {
            Ok(_) => self.back_off = BackOff::default(),
            Err(_) => self.back_off.failed(),
        }
        opened
    }

    async fn transact(
        &mut self,
        connection: &mut Owned,
        batch: &mut [CommitJob],
    ) -> Result<Outcomes, Failure> {
        let fenced = batch.iter().any(|job| job.prepared.fence.is_some());
        let mut transaction = connection.begin_batch(fenced).await?;
        let mut inside = transaction.get();
        if let Connection::Postgres(connection, limit) = &mut inside {
            let mut wants = catch_up::Wants::default();
            for job in batch.iter() {
                job.prepared.want(&mut wants);
            }
            catch_up::know(connection, *limit, &wants, &mut self.known).await?;
        }
        let mut staged = Staged::default();
        let mut outcomes = Vec::with_capacity(batch.len());
        for job in batch.iter_mut() {
            let known = &mut self.known;
            match stage(known, &mut staged, &mut inside, &mut job.prepared).await {
                // The database failed, not the commit: roll back the entire batch.
                Err(CommitError::Store(error)) => return Err(error.into()),
                outcome => outcomes.push(outcome),
            }
        }
        write_staged(&mut inside, &staged, &events_of(batch, &outcomes)).await?;
        if let Some(now) = self.due_for_pruning() {
            let before = Timestamp::from_millis(now.millis() - REQUEST_CAUSES_KEPT.millis() as i64);
            statements::prune_causes(&mut inside, before).await?;
            self.pruned = Some(now);
        }
        transaction.commit().await?;
        Ok(outcomes)
    }

    fn due_for_pruning(&self) -> Option<Timestamp> {
        let now = self.known.last_time?;
        let due = self
            .pruned
            // A clock that was set back must not stop pruning for good.
            .is_none_or(|last| now.since(last) >= PRUNE_EVERY || last.since(now) >= PRUNE_EVERY);
        due.then_some(now)
    }

    fn answer(&self, batch: Vec<CommitJob>, outcomes: Outcomes) {
        self.head.advance(last_position(&batch, &outcomes));
        // A caller may have stopped waiting; its commit stands all the same.
        for (job, outcome) in batch.into_iter().zip(outcomes) {
            let _ = job.reply.send(self.committed(*job.prepared, outcome));
        }
    }

    fn committed(
        &self,
        prepared: Prepared,
        outcome: Result<Outcome, CommitError>,
    ) -> Result<Committed, CommitError> {
        if let Outcome::Before(cause) = outcome? {
            return Ok(Committed::Before {
                positions: cause.positions()?,
                result: cause.result,
            });
        }
        let events = prepared.appends.into_iter().flat_map(|a| a.events);
        let records: Vec<Arc<Record>> = events.map(|event| Arc::new(event.record)).collect();
        self.tell(&records);
        Ok(Committed::Now { records })
    }

    fn tell(&self, records: &[Arc<Record>]) {
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
struct Gathered {
    batch: Vec<CommitJob>,
    then: Then,
}

enum Then {
    GoOn,
    Alone(Alone, oneshot::Sender<Result<Answer, StoreError>>),
    Close,
}

/// Takes waiting jobs, up to a full batch.
fn gather(first: Job, jobs: &mut mpsc::Receiver<Job>) -> Gathered {
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut next = Some(first);
    let mut then = Then::GoOn;
    while let Some(job) = next {
        match job {
            Job::Close => {
                then = Then::Close;
                break;
            }
            Job::Alone { task, reply } => {
                then = Then::Alone(task, reply);
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
    Gathered { batch, then }
}

async fn write_staged(
    connection: &mut Connection<'_>,
    staged: &Staged,
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
    let causes = staged
        .causes
        .iter()
        .map(|(key, cause)| (key.as_str(), cause));
    let causes: Vec<(&str, &StoredCause)> = causes.collect();
    statements::write_causes(connection, &causes).await
}

/// The commits that this batch writes: neither refused nor duplicates.
fn written<'b>(
    batch: &'b [CommitJob],
    outcomes: &'b [Result<Outcome, CommitError>],
) -> impl DoubleEndedIterator<Item = &'b Prepared> {
    let with_outcomes = batch.iter().zip(outcomes);
    with_outcomes
        .filter(|(_, outcome)| matches!(outcome, Ok(Outcome::Now)))
        .map(|(job, _)| &*job.prepared)
}

/// The events to insert, in order of position.
fn events_of<'b>(
    batch: &'b [CommitJob],
    outcomes: &'b [Result<Outcome, CommitError>],
) -> Vec<EventRow<'b>> {
    let appends = written(batch, outcomes).flat_map(|prepared| &prepared.appends);
    let events = appends.flat_map(|append| &append.events);
    events.map(PreparedEvent::row).collect()
}

fn last_position(batch: &[CommitJob], outcomes: &[Result<Outcome, CommitError>]) -> Position {
    let mut backwards = written(batch, outcomes).rev();
    let last = backwards.find_map(|prepared| prepared.appends.last()?.events.last());
    last.map_or(Position::START, |event| event.record.position)
}

fn fail(batch: Vec<CommitJob>, error: &StoreError) {
    for job in batch {
        let _ = job.reply.send(Err(error.clone().into()));
    }
}

/// Why a batch was not written.
#[derive(Debug)]
struct Failure {
    error: StoreError,
    kind: FailureKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FailureKind {
    /// The database rejected the data: a constraint, or a text that it cannot store.
    Refused,
    /// The database rolled back the transaction because of a concurrent one.
    GivenUp,
    /// Anything else. Whether the batch was written may be unknown.
    Broken,
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        let kind = error
            .as_database_error()
            .map_or(FailureKind::Broken, |error| {
                let code = error.code().unwrap_or_default().into_owned();
                let of_postgres = error
                    .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
                    .is_some();
                match of_postgres {
                    true if code.starts_with("22") || code.starts_with("23") => {
                        FailureKind::Refused
                    }
                    true if code.starts_with("40") => FailureKind::GivenUp,
                    false if error.is_unique_violation() => FailureKind::Refused,
                    _ => FailureKind::Broken,
                }
            });
        Self {
            error: error.into(),
            kind,
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self {
            error,
            kind: FailureKind::Broken,
        }
    }
}
