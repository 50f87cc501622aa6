//! The handle that everything else holds: opens the store, hands commits to the writer, reads.

use std::sync::{Arc, Mutex, PoisonError};

use contract::ids::{Bucket, Position};
use contract::log::{Record, StreamName};
use sqlx::pool::PoolConnection;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::rows::{Row, RowQuery};
use crate::sqlite::{Db, Location, Pool};
use crate::writer::{Job, Prepared, QUEUE_MAX, Subscribers, Writer};
use crate::{Cause, Commit, CommitError, Committed, Fence, StoreError, statements};

/// Most records that one read returns, whatever it asks for.
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
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Opens `sqlite:PATH`, makes it if there is none, and brings its tables up to date. Refused
    /// while another process has it, and for a store that only a newer release can read.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let location = Location::parse(url)?;
        let lock = location.lock()?;
        let mut connection = location.open_writer().await?;
        location.migrate(&mut connection).await?;
        let readers = location.open_readers().await?;
        let subscribers = Subscribers::default();
        let writer = Writer::new(location, connection, subscribers.clone(), lock).await?;
        let (jobs, waiting) = mpsc::channel(QUEUE_MAX);
        let writer = tokio::spawn(writer.run(waiting));
        Ok(Self {
            inner: Arc::new(Inner {
                jobs,
                readers,
                subscribers,
                writer: Mutex::new(Some(writer)),
            }),
        })
    }

    /// Writes all of it or nothing. Returns when it would survive the loss of power. A caller that
    /// stops waiting does not take the commit back.
    pub async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        let prepared = Box::new(Prepared::new(commit)?);
        let (reply, answer) = oneshot::channel();
        let job = Job::Commit { prepared, reply };
        let sent = self.inner.jobs.send(job).await;
        sent.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// What a commit with this cause gave, if there was one: for callers that would refuse the repeat
    /// before it reaches [`commit`](Self::commit).
    pub async fn repeated(&self, cause: &Cause) -> Result<Option<Committed>, CommitError> {
        let stored = statements::cause(&mut *self.reader().await?, &cause.key).await?;
        match stored {
            None => Ok(None),
            Some(before) if before.body_hash != cause.body_hash => Err(CommitError::CauseReused),
            Some(before) => Ok(Some(Committed::Before {
                positions: before.positions()?,
                result: before.result,
            })),
        }
    }

    /// Takes ownership of what the name stands for: every fence taken before is refused from now on.
    pub async fn take(&self, name: &str) -> Result<Fence, StoreError> {
        let (reply, answer) = oneshot::channel();
        let name = name.to_owned();
        let sent = self.inner.jobs.send(Job::Take { name, reply }).await;
        sent.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// Every commit of this process from now on, in order of position, one list per commit.
    pub fn committed(&self) -> mpsc::UnboundedReceiver<Vec<Arc<Record>>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.inner
            .subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(sender);
        receiver
    }

    pub async fn read_stream(
        &self,
        stream: &StreamName,
        after_version: u64,
        limit: usize,
    ) -> Result<Vec<Record>, StoreError> {
        let limit = limit.min(READ_LIMIT_MAX);
        let mut reader = self.reader().await?;
        statements::read_stream(&mut reader, stream.as_str(), after_version, limit).await
    }

    pub async fn read_bucket(
        &self,
        bucket: Bucket,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Record>, StoreError> {
        let limit = limit.min(READ_LIMIT_MAX);
        let mut reader = self.reader().await?;
        statements::read_bucket(&mut reader, bucket, after, limit).await
    }

    pub async fn read_all(&self, after: Position, limit: usize) -> Result<Vec<Record>, StoreError> {
        let limit = limit.min(READ_LIMIT_MAX);
        statements::read_all(&mut *self.reader().await?, after, limit).await
    }

    pub async fn read_event(&self, id: Uuid) -> Result<Option<Record>, StoreError> {
        statements::read_event(&mut *self.reader().await?, id).await
    }

    /// The newest position in the log.
    pub async fn head(&self) -> Result<Position, StoreError> {
        statements::head(&mut *self.reader().await?).await
    }

    pub async fn cursor(&self, consumer: &str, bucket: Bucket) -> Result<Position, StoreError> {
        statements::cursor(&mut *self.reader().await?, consumer, bucket).await
    }

    /// All cursors of a consumer; a bucket that is missing stands at the start.
    pub async fn cursors(
        &self,
        consumer: &str,
    ) -> Result<std::collections::BTreeMap<Bucket, Position>, StoreError> {
        statements::cursors(&mut *self.reader().await?, consumer).await
    }

    pub async fn row(&self, model: &str, key: &str) -> Result<Option<Row>, StoreError> {
        statements::row(&mut *self.reader().await?, model, key).await
    }

    /// Newest first. A page holds more rows than asked for where it would otherwise end between
    /// rows of the same position.
    pub async fn rows(&self, query: RowQuery) -> Result<Vec<Row>, StoreError> {
        statements::rows(&mut *self.reader().await?, &query).await
    }

    pub(crate) async fn reader(&self) -> Result<PoolConnection<Db>, StoreError> {
        Ok(self.inner.readers.acquire().await?)
    }

    /// Writes what was handed over before, then lets go of the files. Later calls are refused.
    pub async fn close(&self) {
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
            tracing::error!(%error, "the store's writer ended badly");
        }
    }
}
