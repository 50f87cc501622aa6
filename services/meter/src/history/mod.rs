//! The history of one-second panes, and the open minutes beside them.
//!
//! Invariant: panes and open minutes are saved in one transaction, so that after a crash a frame is
//! in both or in neither, and only by the newest owner of their bucket. What is not covered by every
//! gateway is a gap, and is said to be one.
//!
//! It is in a file of its own where the log is in one, and in tables beside the log in PostgreSQL,
//! where several meters write it and every control reads it.

mod postgres;
mod read;
mod sql;
mod sqlite;
#[cfg(test)]
mod tests;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contract::ids::{Bucket, EndpointKey};
use contract::time::Timestamp;
use runtime::retry::until_opened;
use store::StoreError;
use store::sql::{Beside, Pool, Pooled, Tables};
use tokio::sync::Mutex;

pub use read::{GapSpan, POINTS_MAX, Point, Query};
use read::{StepFrame, covered, read};
pub(crate) use write::{Owned, Save, Saved};

static TABLES: Tables = Tables {
    sqlite: &sqlite::MIGRATIONS,
    postgres: &postgres::MIGRATIONS,
    listed_in: postgres::MIGRATIONS_LISTED_IN,
};

/// Where history is kept.
#[derive(Clone, PartialEq, Eq)]
pub enum HistoryPlace {
    File(PathBuf),
    /// The URL of a database of PostgreSQL, most often the store's.
    Database(String),
}

impl HistoryPlace {
    /// Beside the log where that is in PostgreSQL, else in a file of the data folder.
    pub fn of_store(url: &str, data: &Path) -> Self {
        match url.starts_with("postgres://") || url.starts_with("postgresql://") {
            true => Self::Database(url.to_owned()),
            false => Self::File(data.join("history.db")),
        }
    }

    fn beside(&self) -> Result<Beside, StoreError> {
        match self {
            Self::File(path) => Ok(Beside::file(path)),
            Self::Database(url) => Beside::database(url),
        }
    }
}

/// Without the URL, which may hold a password.
impl std::fmt::Debug for HistoryPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Database(_) => f.debug_tuple("Database").finish_non_exhaustive(),
        }
    }
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("the history in {place} failed: {detail}")]
    Database { place: String, detail: String },
    #[error("the history cannot be opened: {0}")]
    NotOpened(String),
    #[error("{0}")]
    Refused(String),
}

/// A cheap handle to the history.
#[derive(Clone)]
pub struct History {
    inner: Arc<Inner>,
}

struct Inner {
    /// For people.
    place: String,
    writer: Writer,
    pool: Pool,
}

enum Writer {
    /// A file has one.
    File(Mutex<store::sql::Owned>),
    /// A database is written through the pool.
    Pool,
    Nobody,
}

impl History {
    /// Opens the history, or makes it.
    pub async fn open(place: &HistoryPlace) -> Result<Self, HistoryError> {
        Self::open_when_there(place, true).await
    }

    /// Opens it for reading only, as processes without a meter do. Also this makes its tables, since
    /// it is not known who comes first.
    pub async fn open_reader(place: &HistoryPlace) -> Result<Self, HistoryError> {
        Self::open_when_there(place, false).await
    }

    /// A file is there or not; a server may be away just now.
    async fn open_when_there(place: &HistoryPlace, writes: bool) -> Result<Self, HistoryError> {
        let opened = match place {
            HistoryPlace::File(_) => Self::open_for(place, writes).await,
            _ => until_opened(|| Self::open_for(place, writes)).await,
        };
        opened.map_err(not_opened)
    }

    async fn open_for(place: &HistoryPlace, writes: bool) -> Result<Self, StoreError> {
        let beside = place.beside()?;
        beside.migrate(&TABLES).await?;
        let writer = match writes {
            true => beside
                .writer()
                .await?
                .map_or(Writer::Pool, |writer| Writer::File(Mutex::new(writer))),
            false => Writer::Nobody,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                place: beside.to_string(),
                writer,
                pool: beside.pool().await?,
            }),
        })
    }

    fn failed(&self, error: impl std::fmt::Display) -> HistoryError {
        HistoryError::Database {
            place: self.inner.place.clone(),
            detail: error.to_string(),
        }
    }

    async fn pooled(&self) -> Result<Pooled, HistoryError> {
        let pooled = self.inner.pool.acquire().await;
        pooled.map_err(|error| self.failed(error))
    }

    fn read_only(&self) -> HistoryError {
        self.failed("it was opened for reading only")
    }

    /// Makes an owner of buckets the only one who may save them; gives what was saved of each.
    pub(crate) async fn claim(
        &self,
        generations: &BTreeMap<Bucket, u64>,
    ) -> Result<BTreeMap<Bucket, Saved>, HistoryError> {
        let claimed = match &self.inner.writer {
            Writer::File(writer) => write::claim(&mut writer.lock().await.get(), generations).await,
            Writer::Pool => write::claim(&mut self.pooled().await?.get(), generations).await,
            Writer::Nobody => return Err(self.read_only()),
        };
        claimed.map_err(|error| self.failed(error))
    }

    /// Saves all of it or nothing, but for buckets that a newer owner has claimed. Gives those. What
    /// is `again`, because it failed before, is not saved twice.
    pub(crate) async fn save(
        &self,
        save: &Save,
        again: bool,
    ) -> Result<BTreeSet<Bucket>, HistoryError> {
        let saved = match &self.inner.writer {
            Writer::File(writer) => match writer.lock().await.begin().await {
                Ok(transaction) => write_all(transaction, save, again).await,
                Err(error) => Err(error),
            },
            Writer::Pool => match self.pooled().await?.begin().await {
                Ok(transaction) => write_all(transaction, save, again).await,
                Err(error) => Err(error),
            },
            Writer::Nobody => return Err(self.read_only()),
        };
        saved.map_err(|error| self.failed(error))
    }

    /// Deletes what is older than a second, a part of it at a time.
    pub(crate) async fn prune(&self, before: i64) -> Result<(), HistoryError> {
        let pruned = match &self.inner.writer {
            Writer::File(writer) => write::prune(&mut writer.lock().await.get(), before).await,
            Writer::Pool => write::prune(&mut self.pooled().await?.get(), before).await,
            Writer::Nobody => return Err(self.read_only()),
        };
        pruned.map_err(|error| self.failed(error))
    }

    /// Points of the live role, oldest first, then by endpoint and deployment. Steps of which
    /// nothing is known have none.
    pub async fn points(&self, query: &Query) -> Result<Vec<Point>, HistoryError> {
        let frame = StepFrame::new(query)?;
        let mut pooled = self.pooled().await?;
        let snapshot = pooled.snapshot().await;
        let mut snapshot = snapshot.map_err(|error| self.failed(error))?;
        let found = read(&mut snapshot.get(), query, frame).await;
        let found = found.map_err(|error| self.failed(error))?;
        Ok(found.into_points(frame))
    }

    /// What is missing between two instants.
    pub async fn gaps(
        &self,
        endpoint: &EndpointKey,
        from: Timestamp,
        to: Timestamp,
    ) -> Result<Vec<GapSpan>, HistoryError> {
        let mut reader = self.pooled().await?;
        let spans = covered(&mut reader.get(), endpoint.bucket(), from.secs(), to.secs()).await;
        let spans = spans.map_err(|error| self.failed(error))?;
        Ok(read::between(&spans, from, to))
    }
}

async fn write_all(
    mut transaction: store::sql::Transaction<'_>,
    save: &Save,
    again: bool,
) -> sqlx::Result<BTreeSet<Bucket>> {
    if again && write::is_written(&mut transaction.get(), save).await? {
        return Ok(BTreeSet::new());
    }
    let refused = write::write(&mut transaction.get(), save).await?;
    transaction.commit().await?;
    Ok(refused)
}

fn not_opened(error: StoreError) -> HistoryError {
    HistoryError::NotOpened(error.to_string())
}
