//! The store handle: opens the store, sends commits to the writer, and reads.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record, StreamName};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinHandle};
use uuid::Uuid;

use crate::archive::archive_set::{self, ArchiveSet};
use crate::archive::combined;
use crate::log::follow;
use crate::log::shared_pages::SharedPages;
use crate::model::archive::Archive;
use crate::model::commit::{Commit, Committed, IdempotencyKey};
use crate::model::error::{CommitError, StoreError};
use crate::model::raw::{LogEntry, decode};
use crate::model::rows::{Row, RowQuery};
use crate::schema::{chain, migrate};
use crate::sql::connection::{Pool, PooledConnection};
use crate::sql::location::StoreLocation;
use crate::sql::page::PageQuery;
use crate::sql::{damage, statements};
use crate::writing::cache::WriterCache;
use crate::writing::exclusive::{ExclusiveTask, Fences, TaskOutput};
use crate::writing::head::LogHead;
use crate::writing::staging::PreparedCommit;
use crate::writing::writer::{CommitJob, Job, QUEUE_MAX, Subscribers, Writer};

/// The maximum number of records per read, whatever limit is requested.
pub const READ_LIMIT_MAX: usize = 10_000;

/// A cheap handle to an open store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    jobs: mpsc::Sender<Job>,
    readers: Pool,
    subscribers: Subscribers,
    head: LogHead,
    archive_set: ArchiveSet,
    shared_pages: SharedPages,
    follower: OnceLock<AbortHandle>,
    runtime: Handle,
    location: StoreLocation,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(follower) = self.follower.get() {
            follower.abort();
        }
    }
}

impl Store {
    /// Opens `sqlite:PATH` (creating it if it does not exist) or `postgres://USER:PASSWORD@HOST/DATABASE`,
    /// and migrates its tables. Refused for a store that only a newer release can read, and in SQLite while
    /// another process has it open.
    ///
    /// # Errors
    ///
    /// [`StoreError::Refused`] if the URL is invalid, the store is of a newer format or damaged, or another
    /// process has it open in SQLite; [`StoreError::Database`] if the database fails.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, None).await
    }

    /// The same, with the archive folder of this process. Without one, it is the folder that was recorded
    /// when the archives were sealed, or the folder `archive` next to an SQLite file.
    ///
    /// # Errors
    ///
    /// The same.
    pub async fn open_with(url: &str, archives: Option<&Path>) -> Result<Self, StoreError> {
        let location = StoreLocation::parse(url)?;
        let default_folder = location.path().map(archive_set::default_folder);
        let archive_set = ArchiveSet::new(archives.map(Path::to_owned), default_folder);
        match Self::open_at(location.clone(), archive_set).await {
            Err(StoreError::Damaged(damage)) => Err(damage::open_error(&location, damage).await),
            opened => opened,
        }
    }

    async fn open_at(location: StoreLocation, archive_set: ArchiveSet) -> Result<Self, StoreError> {
        let lock = location.lock()?;
        let mut migrator = location.open_migrator().await?;
        let mut progress = chain::log_progress(&location);
        let migrated = migrate::apply(&location, &mut migrator, &mut progress).await;
        migrator.close().await;
        migrated?;
        let mut connection = location.open_writer().await?;
        let head = LogHead::at(statements::head(&mut connection.get()).await?);
        let cache = WriterCache::load(&mut connection.get()).await?;
        archive_set.load(&mut connection.get()).await?;
        let readers = location.open_readers().await?;
        let subscribers = Subscribers::default();
        let (writer_subscribers, writer_head) = (subscribers.clone(), head.clone());
        let writer = Writer::new(
            location.clone(),
            connection,
            cache,
            writer_subscribers,
            writer_head,
            archive_set.clone(),
            lock,
        );
        let (jobs, queue) = mpsc::channel(QUEUE_MAX);
        let writer = tokio::spawn(writer.run(queue));
        Ok(Self {
            inner: Arc::new(Inner {
                jobs,
                readers,
                subscribers,
                head,
                archive_set,
                shared_pages: SharedPages::default(),
                follower: OnceLock::new(),
                runtime: Handle::current(),
                location,
                writer: Mutex::new(Some(writer)),
            }),
        })
    }

    /// Writes the commit atomically. Returns once it would survive power loss. Dropping the future does not
    /// cancel the commit.
    ///
    /// # Errors
    ///
    /// A variant of [`CommitError`] for each reason why nothing was written. After [`CommitError::Store`] the
    /// commit may have been written all the same, if the database became unreachable.
    pub async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        let prepared = Box::new(PreparedCommit::new(commit)?);
        let (reply, answer) = oneshot::channel();
        let job = Job::Commit(CommitJob { prepared, reply });
        let sent = self.inner.jobs.send(job).await;
        sent.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// Returns the result of an earlier commit with this idempotency key, if there is one: for callers that
    /// would refuse the repeat before it reaches [`commit`](Self::commit).
    ///
    /// # Errors
    ///
    /// [`CommitError::IdempotencyKeyReused`] if the stored body hash differs, [`CommitError::Store`] if the
    /// store cannot be read or is closed.
    pub async fn find_committed(
        &self,
        idempotency_key: &IdempotencyKey,
    ) -> Result<Option<Committed>, CommitError> {
        let stored =
            statements::idempotency_key(&mut self.reader().await?.get(), &idempotency_key.key)
                .await?;
        match stored {
            None => Ok(None),
            Some(before) if before.body_hash != idempotency_key.body_hash => {
                Err(CommitError::IdempotencyKeyReused)
            }
            Some(before) => Ok(Some(Committed::Duplicate {
                positions: before.positions()?,
                result: before.result,
            })),
        }
    }

    pub(crate) async fn run_exclusive(
        &self,
        task: ExclusiveTask,
    ) -> Result<TaskOutput, StoreError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.inner.jobs.send(Job::Exclusive { task, reply }).await;
        sent.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// Watches the highest position known to be committed by any process. It never decreases, and everything
    /// below it can be read.
    pub fn head_watch(&self) -> watch::Receiver<Position> {
        let inner = &self.inner;
        if let Pool::Postgres(pool, limit) = &inner.readers {
            inner.follower.get_or_init(|| {
                let following = follow::follow(pool.clone(), *limit, inner.head.clone());
                inner.runtime.spawn(following).abort_handle()
            });
        }
        inner.head.watch()
    }

    /// Subscribes to the commits of this process from now on, in order of position, one list per commit.
    ///
    /// The channel has no bound: a commit must neither wait for a subscriber nor lose records to a slow one. In
    /// a server the only one is the relay to the bus of the same process, which does nothing but publish.
    pub fn subscribe(&self) -> mpsc::UnboundedReceiver<Vec<Arc<Record>>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.inner
            .subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(sender);
        receiver
    }

    /// Reads up to `limit` records of a stream above a version, in order; at most [`READ_LIMIT_MAX`].
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed; [`StoreError::Unreadable`] if an event cannot be decoded.
    pub async fn read_stream(
        &self,
        stream: &StreamName,
        after_version: u64,
        limit: usize,
    ) -> Result<Vec<Record>, StoreError> {
        let limit = limit.min(READ_LIMIT_MAX);
        let mut reader = self.reader().await?;
        let (archive_set, name) = (&self.inner.archive_set, stream.as_str());
        decode_all(
            &combined::stream(archive_set, &mut reader.get(), name, after_version, limit).await?,
        )
    }

    /// Reads up to `limit` records of a bucket above a position, in order; at most [`READ_LIMIT_MAX`].
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed; [`StoreError::Unreadable`] if an event cannot be decoded.
    pub async fn read_bucket(
        &self,
        bucket: Bucket,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Record>, StoreError> {
        decode_all(&self.read_bucket_raw(bucket, after, limit).await?)
    }

    /// Reads up to `limit` records of the log above a position, in order; at most [`READ_LIMIT_MAX`].
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed; [`StoreError::Unreadable`] if an event cannot be decoded.
    pub async fn read_all(&self, after: Position, limit: usize) -> Result<Vec<Record>, StoreError> {
        decode_all(&self.read_raw(after, limit).await?)
    }

    /// The same as [`read_bucket`](Self::read_bucket), but does not fail for events that cannot be
    /// decoded.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn read_bucket_entries(
        &self,
        bucket: Bucket,
        after: Position,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let raw = self.read_bucket_raw(bucket, after, limit).await?;
        Ok(raw.into_iter().map(LogEntry::from).collect())
    }

    /// The same as [`read_all`](Self::read_all), but does not fail for events that cannot be decoded.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn read_all_entries(
        &self,
        after: Position,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let raw = self.read_raw(after, limit).await?;
        Ok(raw.into_iter().map(LogEntry::from).collect())
    }

    /// Reads events in their stored form.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn read_raw(
        &self,
        after: Position,
        limit: usize,
    ) -> Result<Vec<RawRecord>, StoreError> {
        self.select(None, after, limit).await
    }

    /// Reads the selected events in order of position. Does not fail for events that cannot be decoded. The
    /// fastest way to read many events.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn read_page(&self, query: &PageQuery<'_>) -> Result<Vec<LogEntry>, StoreError> {
        let query = PageQuery {
            limit: query.limit.min(READ_LIMIT_MAX),
            ..*query
        };
        let mut reader = self.reader().await?;
        let pages = combined::pages(self.archive_set(), &mut reader.get(), &query).await?;
        drop(reader);
        let mut entries = Vec::new();
        for page in pages {
            entries.extend(page.decode()?.into_iter().map(LogEntry::from));
        }
        Ok(entries)
    }

    async fn select(
        &self,
        bucket: Option<Bucket>,
        after: Position,
        limit: usize,
    ) -> Result<Vec<RawRecord>, StoreError> {
        let between = (after, Position(u64::MAX));
        let limit = limit.min(READ_LIMIT_MAX);
        let mut reader = self.reader().await?;
        combined::select(
            self.archive_set(),
            &mut reader.get(),
            bucket,
            between,
            limit,
        )
        .await
    }

    async fn read_bucket_raw(
        &self,
        bucket: Bucket,
        after: Position,
        limit: usize,
    ) -> Result<Vec<RawRecord>, StoreError> {
        self.select(Some(bucket), after, limit).await
    }

    /// Returns the record of the event with this id, if there is one.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed; [`StoreError::Unreadable`] if the event cannot be decoded.
    pub async fn read_event(&self, id: Uuid) -> Result<Option<Record>, StoreError> {
        let mut reader = self.reader().await?;
        let found =
            combined::event(&self.inner.archive_set, &mut reader.get(), &id.to_string()).await?;
        found.as_ref().map(decode).transpose()
    }

    /// Returns the highest position in the log.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn head(&self) -> Result<Position, StoreError> {
        statements::head(&mut self.reader().await?.get()).await
    }

    /// Returns the highest position of each of these buckets; [`Position::START`] for an empty one.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn bucket_heads(
        &self,
        buckets: &[Bucket],
    ) -> Result<BTreeMap<Bucket, Position>, StoreError> {
        let mut heads = BTreeMap::new();
        let mut reader = self.reader().await?;
        for bucket in buckets {
            let head = statements::bucket_head(&mut reader.get(), *bucket).await?;
            heads.insert(*bucket, head);
        }
        Ok(heads)
    }

    /// Returns a consumer's cursor in a bucket; [`Position::START`] if it has none.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn cursor(&self, consumer: &str, bucket: Bucket) -> Result<Position, StoreError> {
        statements::cursor(&mut self.reader().await?.get(), consumer, bucket).await
    }

    /// Returns all cursors of a consumer; a missing bucket is at the start.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn cursors(&self, consumer: &str) -> Result<BTreeMap<Bucket, Position>, StoreError> {
        statements::cursors(&mut self.reader().await?.get(), consumer).await
    }

    /// Returns the row of a read model with this key, if there is one.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn row(&self, model: &str, key: &str) -> Result<Option<Row>, StoreError> {
        statements::row(&mut self.reader().await?.get(), model, key).await
    }

    /// Returns rows, newest first. A page exceeds the limit if it would otherwise end between rows of the
    /// same position.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn rows(&self, query: RowQuery) -> Result<Vec<Row>, StoreError> {
        statements::rows(&mut self.reader().await?.get(), &query).await
    }

    /// Replaces tables whose content follows from the log by empty ones, if one of them has unreadable pages.
    /// Returns whether it did.
    pub(crate) async fn recreate_if_damaged(
        &self,
        tables: &'static [&'static str],
        fences: Option<Arc<Fences>>,
    ) -> Result<bool, StoreError> {
        let is_damaged = damage::is_damaged(self.location(), tables).await?;
        if is_damaged {
            self.run_exclusive(ExclusiveTask::Recreate(tables, fences))
                .await?;
        }
        Ok(is_damaged)
    }

    pub(crate) fn location(&self) -> &StoreLocation {
        &self.inner.location
    }

    pub(crate) fn archive_set(&self) -> &ArchiveSet {
        &self.inner.archive_set
    }

    pub(crate) fn shared_pages(&self) -> &SharedPages {
        &self.inner.shared_pages
    }

    /// Returns the archives, which hold the beginning of the log, in order.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn archives(&self) -> Result<Vec<Archive>, StoreError> {
        self.archive_set()
            .load(&mut self.reader().await?.get())
            .await?;
        Ok(self.archive_set().archives().to_vec())
    }

    pub(crate) async fn reader(&self) -> Result<PooledConnection, StoreError> {
        self.inner.readers.acquire().await
    }

    /// Writes everything that was queued before, then closes the store. Later calls are refused.
    pub async fn close(&self) {
        if let Some(follower) = self.inner.follower.get() {
            follower.abort();
        }
        self.inner.readers.close().await;
        let _ = self.inner.jobs.send(Job::Close).await;
        let writer = self
            .inner
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(writer) = writer
            && let Err(error) = writer.await
        {
            tracing::error!(%error, "store writer failed");
        }
    }
}

fn decode_all(raw: &[RawRecord]) -> Result<Vec<Record>, StoreError> {
    raw.iter().map(decode).collect()
}
