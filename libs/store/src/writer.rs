//! The one task that writes. It groups the commits that wait into one transaction, checks each
//! against what is in the log and what the batch has staged so far, and answers when the disk has it.
//!
//! Invariants: a commit is written whole or not at all; one that is refused does not touch the
//! others of its batch; positions are given in the order in which they become visible; subscribers
//! hear of records in that order, before the committer gets its answer.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use contract::ids::{Bucket, Position};
use contract::log::{EVENT_BYTES_MAX, Record, RowChange, StreamName};
use contract::time::{Span, Timestamp};
use sqlx::Connection as _;
use tokio::sync::{mpsc, oneshot};

use crate::sqlite::{self, Connection, Location};
use crate::statements::{self, StoredCause};
use crate::{Cause, Commit, CommitError, Committed, CursorMove, Fence, StoreError, belongs};

/// Most commits in one transaction: enough to hide the disk's latency, few enough that the first
/// of them does not wait long.
const BATCH_COMMITS_MAX: usize = 512;

/// Past this much data a batch is written, however few commits it holds.
const BATCH_BYTES_MAX: usize = 1024 * 1024;

/// Commits that may wait for the writer; past it, committers wait for room.
pub(crate) const QUEUE_MAX: usize = 4096;

/// Stream versions, fences and cursors that are kept in memory before they are read again.
const CACHED_MAX: usize = 100_000;

/// How long an idempotency key of a request is remembered, by the time of the log.
const REQUEST_CAUSES_KEPT: Span = Span::from_secs(24 * 3600);

/// How often, by the time of the log, old keys are cleared away.
const PRUNE_EVERY: Span = Span::from_secs(3600);

pub(crate) type Subscribers = Arc<Mutex<Vec<mpsc::UnboundedSender<Vec<Arc<Record>>>>>>;

pub(crate) enum Job {
    Commit {
        prepared: Box<Prepared>,
        reply: oneshot::Sender<Result<Committed, CommitError>>,
    },
    Take {
        name: String,
        reply: oneshot::Sender<Result<Fence, StoreError>>,
    },
    /// Everything that was queued before is written first.
    Close,
}

/// A commit that has been checked as far as it can be without the log, with its events encoded.
pub(crate) struct Prepared {
    appends: Vec<PreparedAppend>,
    rows: Vec<RowChange>,
    cursor: Option<CursorMove>,
    fence: Option<Fence>,
    cause: Option<Cause>,
    bytes: usize,
}

struct PreparedAppend {
    stream: StreamName,
    bucket: Bucket,
    expected_version: u64,
    /// Records without their places (position, prev, version), and their data.
    events: Vec<(Record, String)>,
}

impl Prepared {
    /// Runs in the committer's task, so that encoding does not hold up the writer.
    pub(crate) fn new(commit: Commit) -> Result<Self, CommitError> {
        if let Some(row) = commit.rows.iter().find(|row| row.key.is_empty()) {
            return Err(StoreError::Refused(format!(
                "a row of `{}` has no key: name it",
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
                    StoreError::Refused(format!("an event cannot be written: {error}"))
                })?;
                if data.len() > EVENT_BYTES_MAX {
                    return Err(CommitError::TooLarge {
                        bytes: data.len(),
                        limit: EVENT_BYTES_MAX,
                    });
                }
                if !belongs(&event.event, &append.stream) {
                    return Err(StoreError::Refused(format!(
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
                events.push((record, data));
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
        Ok(Self {
            appends,
            rows: commit.rows,
            cursor: commit.cursor,
            fence: commit.fence,
            cause: commit.cause,
            bytes,
        })
    }
}

/// What became of one job of a batch, before it is answered.
enum Outcome {
    Now,
    Before(StoredCause),
    Taken(Fence),
}

/// What the writer knows of the log. Always equal to what the database says; read again after any
/// failure.
#[derive(Default)]
struct Known {
    head: Position,
    bucket_heads: BTreeMap<Bucket, Position>,
    last_time: Option<Timestamp>,
    versions: HashMap<StreamName, u64>,
    fences: HashMap<String, u64>,
    cursors: HashMap<(&'static str, Bucket), Position>,
}

impl Known {
    async fn read(connection: &mut Connection) -> Result<Self, StoreError> {
        Ok(Self {
            head: statements::head(connection).await?,
            bucket_heads: statements::bucket_heads(connection).await?,
            last_time: statements::last_time(connection).await?,
            ..Self::default()
        })
    }

    fn forget_if_many(&mut self) {
        if self.versions.len() + self.fences.len() + self.cursors.len() > CACHED_MAX {
            self.versions.clear();
            self.fences.clear();
            self.cursors.clear();
        }
    }

    async fn version(
        &mut self,
        connection: &mut Connection,
        stream: &StreamName,
    ) -> Result<u64, StoreError> {
        if let Some(version) = self.versions.get(stream) {
            return Ok(*version);
        }
        let version = statements::stream_version(connection, stream.as_str()).await?;
        self.versions.insert(stream.clone(), version);
        Ok(version)
    }

    async fn generation(
        &mut self,
        connection: &mut Connection,
        name: &str,
    ) -> Result<u64, StoreError> {
        if let Some(generation) = self.fences.get(name) {
            return Ok(*generation);
        }
        let generation = statements::fence(connection, name).await?;
        self.fences.insert(name.to_owned(), generation);
        Ok(generation)
    }

    async fn cursor(
        &mut self,
        connection: &mut Connection,
        consumer: &'static str,
        bucket: Bucket,
    ) -> Result<Position, StoreError> {
        if let Some(position) = self.cursors.get(&(consumer, bucket)) {
            return Ok(*position);
        }
        let position = statements::cursor(connection, consumer, bucket).await?;
        self.cursors.insert((consumer, bucket), position);
        Ok(position)
    }
}

/// What a batch will write besides its events. Later changes of the same thing win.
#[derive(Default)]
struct Staged {
    rows: BTreeMap<(&'static str, String), RowChange>,
    cursors: BTreeMap<(&'static str, Bucket), CursorMove>,
    fences: BTreeMap<String, u64>,
    causes: BTreeMap<String, StoredCause>,
}

pub(crate) struct Writer {
    location: Location,
    /// None after a failure, until it is opened again.
    connection: Option<Connection>,
    known: Known,
    pruned: Option<Timestamp>,
    subscribers: Subscribers,
    /// Released last.
    _lock: File,
}

impl Writer {
    pub(crate) async fn new(
        location: Location,
        mut connection: Connection,
        subscribers: Subscribers,
        lock: File,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            known: Known::read(&mut connection).await?,
            location,
            connection: Some(connection),
            pruned: None,
            subscribers,
            _lock: lock,
        })
    }

    pub(crate) async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(first) = jobs.recv().await {
            let (batch, closing) = gather(first, &mut jobs);
            self.write_all(batch).await;
            if closing {
                break;
            }
        }
        if let Some(connection) = self.connection.take() {
            sqlite::close(connection).await;
        }
    }

    async fn write_all(&mut self, mut batch: Vec<Job>) {
        match self.write(&mut batch).await {
            Ok(outcomes) => self.answer(batch, outcomes),
            // Something in the batch breaks a constraint that could not be foreseen (an event id
            // that is in the log already). It must fail alone.
            Err(error) if is_constraint(&error) && batch.len() > 1 => {
                for job in batch {
                    let mut alone = vec![job];
                    match self.write(&mut alone).await {
                        Ok(outcomes) => self.answer(alone, outcomes),
                        Err(error) => fail(alone, &error),
                    }
                }
            }
            Err(error) => fail(batch, &error),
        }
    }

    /// Writes a batch in one transaction. After an error nothing of it is in the log, as far as
    /// can be known; connection and knowledge are made anew.
    async fn write(
        &mut self,
        batch: &mut [Job],
    ) -> Result<Vec<Result<Outcome, CommitError>>, Failure> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let mut connection = self.location.open_writer().await?;
                self.known = Known::read(&mut connection).await?;
                connection
            }
        };
        self.known.forget_if_many();
        let written = self.transact(&mut connection, batch).await;
        match &written {
            Ok(_) => self.connection = Some(connection),
            Err(Failure { error, .. }) => {
                tracing::error!(%error, commits = batch.len(), "the store could not write");
                sqlite::close(connection).await;
            }
        }
        written
    }

    async fn transact(
        &mut self,
        connection: &mut Connection,
        batch: &mut [Job],
    ) -> Result<Vec<Result<Outcome, CommitError>>, Failure> {
        let mut transaction = connection.begin().await?;
        let mut staged = Staged::default();
        let mut outcomes = Vec::with_capacity(batch.len());
        for job in batch.iter_mut() {
            let outcome = match job {
                Job::Commit { prepared, .. } => {
                    self.stage(&mut transaction, &mut staged, prepared).await
                }
                Job::Take { name, .. } => self.take(&mut transaction, &mut staged, name).await,
                Job::Close => continue,
            };
            match outcome {
                // The database failed, not the commit: the whole batch is undone.
                Err(CommitError::Store(error)) => return Err(error.into()),
                outcome => outcomes.push(outcome),
            }
        }
        let events = staged_events(batch, &outcomes);
        statements::insert_events(&mut transaction, &events).await?;
        let rows: Vec<&RowChange> = staged.rows.values().collect();
        statements::write_rows(&mut transaction, &rows).await?;
        let cursors: Vec<CursorMove> = staged.cursors.into_values().collect();
        statements::write_cursors(&mut transaction, &cursors).await?;
        for (name, generation) in &staged.fences {
            statements::write_fence(&mut transaction, name, *generation).await?;
        }
        let causes: Vec<(&String, &StoredCause)> = staged.causes.iter().collect();
        statements::write_causes(&mut transaction, &causes).await?;
        if let Some(now) = self.due_for_pruning() {
            let before = Timestamp::from_millis(now.millis() - REQUEST_CAUSES_KEPT.millis() as i64);
            statements::prune_causes(&mut transaction, before).await?;
            self.pruned = Some(now);
        }
        transaction.commit().await?;
        Ok(outcomes)
    }

    /// Checks one commit, and if nothing speaks against it gives its events their places.
    async fn stage(
        &mut self,
        connection: &mut Connection,
        staged: &mut Staged,
        commit: &mut Prepared,
    ) -> Result<Outcome, CommitError> {
        let known = &mut self.known;
        if let Some(fence) = &commit.fence {
            check_fence(known, connection, fence).await?;
        }
        if let Some(cause) = &commit.cause
            && let Some(before) = find_cause(staged, connection, cause).await?
        {
            return Ok(Outcome::Before(before));
        }
        if let Some(cursor) = &commit.cursor {
            check_cursor(known, connection, cursor).await?;
        }
        check_versions(known, connection, &commit.appends).await?;

        // From here on nothing can refuse the commit.
        let positions = place(known, &mut commit.appends);
        for row in &commit.rows {
            staged
                .rows
                .insert((row.model, row.key.clone()), row.clone());
        }
        if let Some(cursor) = &commit.cursor {
            let key = (cursor.consumer, cursor.bucket);
            known.cursors.insert(key, cursor.to);
            staged.cursors.insert(key, cursor.clone());
        }
        if let Some(cause) = &commit.cause {
            let stored = StoredCause {
                body_hash: cause.body_hash.clone(),
                result: cause.result.clone(),
                positions: serde_json::to_string(&positions)
                    .map_err(|error| StoreError::Database(error.to_string()))?,
                time: known.last_time.unwrap_or_default().millis(),
            };
            staged.causes.insert(cause.key.clone(), stored);
        }
        Ok(Outcome::Now)
    }

    async fn take(
        &mut self,
        connection: &mut Connection,
        staged: &mut Staged,
        name: &str,
    ) -> Result<Outcome, CommitError> {
        let generation = self.known.generation(connection, name).await? + 1;
        self.known.fences.insert(name.to_owned(), generation);
        staged.fences.insert(name.to_owned(), generation);
        Ok(Outcome::Taken(Fence {
            name: name.to_owned(),
            generation,
        }))
    }

    fn due_for_pruning(&self) -> Option<Timestamp> {
        let now = self.known.last_time?;
        let due = self
            .pruned
            // A clock that was set back must not stop the clearing for good.
            .is_none_or(|last| now.since(last) >= PRUNE_EVERY || last.since(now) >= PRUNE_EVERY);
        due.then_some(now)
    }

    fn answer(&self, batch: Vec<Job>, outcomes: Vec<Result<Outcome, CommitError>>) {
        // Whoever has stopped waiting does not want the answer: its commit stands all the same.
        for (job, outcome) in batch.into_iter().zip(outcomes) {
            match job {
                Job::Commit { prepared, reply } => {
                    let _ = reply.send(self.committed(*prepared, outcome));
                }
                Job::Take { reply, .. } => {
                    let _ = reply.send(match outcome {
                        Ok(Outcome::Taken(fence)) => Ok(fence),
                        _ => Err(StoreError::Closed),
                    });
                }
                Job::Close => {}
            }
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
        let records: Vec<Arc<Record>> = events.map(|(record, _)| Arc::new(record)).collect();
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

/// Takes what else is waiting, up to a batch. The flag says that the store is being closed.
fn gather(first: Job, jobs: &mut mpsc::Receiver<Job>) -> (Vec<Job>, bool) {
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut next = Some(first);
    while let Some(job) = next {
        match &job {
            Job::Close => return (batch, true),
            Job::Commit { prepared, .. } => bytes += prepared.bytes,
            Job::Take { .. } => {}
        }
        batch.push(job);
        let full = batch.len() >= BATCH_COMMITS_MAX || bytes >= BATCH_BYTES_MAX;
        next = if full { None } else { jobs.try_recv().ok() };
    }
    (batch, false)
}

async fn check_fence(
    known: &mut Known,
    connection: &mut Connection,
    fence: &Fence,
) -> Result<(), CommitError> {
    let actual = known.generation(connection, &fence.name).await?;
    if actual == fence.generation {
        return Ok(());
    }
    Err(CommitError::Fenced {
        name: fence.name.clone(),
        ours: fence.generation,
        actual,
    })
}

async fn find_cause(
    staged: &Staged,
    connection: &mut Connection,
    cause: &Cause,
) -> Result<Option<StoredCause>, CommitError> {
    let before = match staged.causes.get(&cause.key) {
        Some(before) => Some(before.clone()),
        None => statements::cause(connection, &cause.key).await?,
    };
    match before {
        Some(before) if before.body_hash != cause.body_hash => Err(CommitError::CauseReused),
        before => Ok(before),
    }
}

async fn check_cursor(
    known: &mut Known,
    connection: &mut Connection,
    cursor: &CursorMove,
) -> Result<(), CommitError> {
    let actual = known
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

async fn check_versions(
    known: &mut Known,
    connection: &mut Connection,
    appends: &[PreparedAppend],
) -> Result<(), CommitError> {
    // Two appends of one commit may go to the same stream.
    let mut ahead: BTreeMap<&StreamName, u64> = BTreeMap::new();
    for append in appends {
        let actual = match ahead.get(&append.stream) {
            Some(version) => *version,
            None => known.version(connection, &append.stream).await?,
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

/// Gives every event its position, its version and its bucket's previous position.
fn place(known: &mut Known, appends: &mut [PreparedAppend]) -> Vec<Position> {
    let mut positions = Vec::new();
    for append in appends {
        let mut version = append.expected_version;
        for (record, _) in &mut append.events {
            version += 1;
            known.head = Position(known.head.0 + 1);
            record.version = version;
            record.position = known.head;
            record.prev = known
                .bucket_heads
                .insert(append.bucket, known.head)
                .unwrap_or(Position::START);
            assert!(record.prev < record.position, "positions only rise");
            known.last_time = Some(record.time);
            positions.push(record.position);
        }
        known.versions.insert(append.stream.clone(), version);
    }
    positions
}

/// The events of those commits that were not refused, in order of position.
fn staged_events<'b>(
    batch: &'b [Job],
    outcomes: &[Result<Outcome, CommitError>],
) -> Vec<(&'b Record, &'b str)> {
    let mut events = Vec::new();
    for (job, outcome) in batch.iter().zip(outcomes) {
        let (Job::Commit { prepared, .. }, Ok(Outcome::Now)) = (job, outcome) else {
            continue;
        };
        for append in &prepared.appends {
            events.extend(append.events.iter().map(|(r, data)| (r, data.as_str())));
        }
    }
    events
}

fn fail(batch: Vec<Job>, failure: &Failure) {
    for job in batch {
        match job {
            Job::Commit { reply, .. } => {
                let _ = reply.send(Err(failure.error.clone().into()));
            }
            Job::Take { reply, .. } => {
                let _ = reply.send(Err(failure.error.clone()));
            }
            Job::Close => {}
        }
    }
}

/// Why a whole batch was not written.
#[derive(Debug)]
struct Failure {
    error: StoreError,
    constraint: bool,
}

fn is_constraint(failure: &Failure) -> bool {
    failure.constraint
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        let constraint = error
            .as_database_error()
            .is_some_and(|error| error.is_unique_violation());
        Self {
            error: error.into(),
            constraint,
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self {
            error,
            constraint: false,
        }
    }
}
