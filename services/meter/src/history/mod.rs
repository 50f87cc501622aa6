//! The history of one-second panes, together with the open minutes.
//!
//! Invariant: panes and open minutes are saved in one transaction, so that after a crash a frame is
//! in both or in neither, and only by the newest owner of their bucket. Seconds that not every gateway
//! has reported are exposed as gaps.
//!
//! It is in a separate file if the log is in a SQLite file, and in tables next to the log in PostgreSQL,
//! where several meters write it and every control reads it.

mod backup;
mod past;
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
use domain::measure::Past;
use runtime::retry::open_when_available;
use store::StoreError;
use store::sql::{AuxiliaryDatabase, AuxiliaryTables, Pool, PooledConnection};
use tokio::sync::Mutex;

pub use backup::backup_history;
pub use past::PastQuery;
pub use read::{GapSpan, POINTS_MAX, Point, PointsQuery};
use read::{StepGrid, read, read_coverage};
pub(crate) use write::{BucketSave, SaveBatch, SavedBucket};

static TABLES: AuxiliaryTables = AuxiliaryTables {
    sqlite: &sqlite::MIGRATIONS,
    postgres: &postgres::MIGRATIONS,
    migrations_table: postgres::MIGRATIONS_LISTED_IN,
};

/// Where the history is stored.
#[derive(Clone, PartialEq, Eq)]
pub enum HistoryLocation {
    File(PathBuf),
    /// The URL of a PostgreSQL database, usually that of the store.
    Database(String),
}

impl HistoryLocation {
    /// Next to the log if that is in PostgreSQL, otherwise a file in the data folder.
    pub fn for_store(url: &str, data: &Path) -> Self {
        match url.starts_with("postgres://") || url.starts_with("postgresql://") {
            true => Self::Database(url.to_owned()),
            false => Self::File(data.join("history.db")),
        }
    }

    fn auxiliary_tables(&self) -> Result<AuxiliaryDatabase, StoreError> {
        match self {
            Self::File(path) => Ok(AuxiliaryDatabase::file(path)),
            Self::Database(url) => AuxiliaryDatabase::database(url),
        }
    }
}

/// Omits the URL, which may contain a password.
impl std::fmt::Debug for HistoryLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Database(_) => f.debug_tuple("Database").finish_non_exhaustive(),
        }
    }
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("the history in {location} failed: {source}")]
    Database {
        location: String,
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    #[error("the history in {location} was opened for reading only")]
    ReadOnly { location: String },
    #[error("the history cannot be opened: {0}")]
    CannotOpen(#[source] StoreError),
    #[error("{0}")]
    InvalidQuery(String),
}

/// A cheap handle to the history.
#[derive(Clone)]
pub struct HistoryStore {
    inner: Arc<Inner>,
}

struct Inner {
    /// The location as shown in errors.
    location: String,
    writer: Writer,
    pool: Pool,
}

enum Writer {
    /// A file has a single writer.
    File(Mutex<store::sql::OwnedConnection>),
    /// A database is written to through the pool.
    Pool,
    ReadOnly,
}

impl HistoryStore {
    /// Opens the history, creating it if necessary.
    pub async fn open(location: &HistoryLocation) -> Result<Self, HistoryError> {
        Self::open_with_retries(location, true).await
    }

    /// Opens the history read-only, for processes without a meter. Creates the tables too, since a reader
    /// may come first.
    pub async fn open_read_only(location: &HistoryLocation) -> Result<Self, HistoryError> {
        Self::open_with_retries(location, false).await
    }

    /// Retries for a database, whose server may be temporarily unavailable.
    async fn open_with_retries(
        location: &HistoryLocation,
        writes: bool,
    ) -> Result<Self, HistoryError> {
        let opened = match location {
            HistoryLocation::File(_) => Self::open_for(location, writes).await,
            _ => open_when_available(|| Self::open_for(location, writes)).await,
        };
        opened.map_err(HistoryError::CannotOpen)
    }

    async fn open_for(location: &HistoryLocation, writes: bool) -> Result<Self, StoreError> {
        let tables = location.auxiliary_tables()?;
        tables.migrate(&TABLES).await?;
        let writer = match writes {
            true => tables
                .writer()
                .await?
                .map_or(Writer::Pool, |writer| Writer::File(Mutex::new(writer))),
            false => Writer::ReadOnly,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                location: tables.to_string(),
                writer,
                pool: tables.pool().await?,
            }),
        })
    }

    fn failed(&self, error: impl std::error::Error + Send + Sync + 'static) -> HistoryError {
        HistoryError::Database {
            location: self.inner.location.clone(),
            source: Arc::new(error),
        }
    }

    async fn pooled(&self) -> Result<PooledConnection, HistoryError> {
        let pooled = self.inner.pool.acquire().await;
        pooled.map_err(|error| self.failed(error))
    }

    fn read_only(&self) -> HistoryError {
        HistoryError::ReadOnly {
            location: self.inner.location.clone(),
        }
    }

    /// Fences out earlier owners of the buckets, and returns what was saved of each.
    pub(crate) async fn claim(
        &self,
        generations: &BTreeMap<Bucket, u64>,
    ) -> Result<BTreeMap<Bucket, SavedBucket>, HistoryError> {
        let saved = match &self.inner.writer {
            Writer::File(writer) => write::claim(&mut writer.lock().await.get(), generations).await,
            Writer::Pool => write::claim(&mut self.pooled().await?.get(), generations).await,
            Writer::ReadOnly => return Err(self.read_only()),
        };
        saved.map_err(|error| self.failed(error))
    }

    /// Saves a batch atomically, except for buckets claimed by a newer owner, which are returned. With
    /// `is_retry`, after a failure, a batch that has been saved already is not saved twice.
    pub(crate) async fn save(
        &self,
        batch: &SaveBatch,
        is_retry: bool,
    ) -> Result<BTreeSet<Bucket>, HistoryError> {
        let saved = match &self.inner.writer {
            Writer::File(writer) => match writer.lock().await.begin().await {
                Ok(transaction) => write_all(transaction, batch, is_retry).await,
                Err(error) => Err(error),
            },
            Writer::Pool => match self.pooled().await?.begin().await {
                Ok(transaction) => write_all(transaction, batch, is_retry).await,
                Err(error) => Err(error),
            },
            Writer::ReadOnly => return Err(self.read_only()),
        };
        saved.map_err(|error| self.failed(error))
    }

    /// Deletes rows from before a second, a limited number per call, and what only windows of rules need
    /// from before another.
    pub(crate) async fn prune(&self, before: i64, windows_before: i64) -> Result<(), HistoryError> {
        let pruned = match &self.inner.writer {
            Writer::File(writer) => {
                let mut writer = writer.lock().await;
                write::prune(&mut writer.get(), before, windows_before).await
            }
            Writer::Pool => {
                let mut pooled = self.pooled().await?;
                write::prune(&mut pooled.get(), before, windows_before).await
            }
            Writer::ReadOnly => return Err(self.read_only()),
        };
        pruned.map_err(|error| self.failed(error))
    }

    /// Returns points of the live role, oldest first, then by endpoint and deployment. Steps without data
    /// have none.
    pub async fn points(&self, query: &PointsQuery) -> Result<Vec<Point>, HistoryError> {
        let grid = StepGrid::new(query)?;
        let mut pooled = self.pooled().await?;
        let snapshot = pooled.snapshot().await;
        let mut snapshot = snapshot.map_err(|error| self.failed(error))?;
        let rows = read(&mut snapshot.get(), query, grid).await;
        let rows = rows.map_err(|error| self.failed(error))?;
        Ok(rows.into_points(grid))
    }

    /// Returns what was measured of a deployment, for the windows of its rules.
    ///
    /// # Errors
    ///
    /// The history cannot be read.
    pub async fn past(&self, query: &PastQuery) -> Result<Past, HistoryError> {
        let mut pooled = self.pooled().await?;
        let snapshot = pooled.snapshot().await;
        let mut snapshot = snapshot.map_err(|error| self.failed(error))?;
        let past = past::read(&mut snapshot.get(), query).await;
        past.map_err(|error| self.failed(error))
    }

    /// Returns the gaps between two times.
    pub async fn gaps(
        &self,
        endpoint: &EndpointKey,
        from: Timestamp,
        to: Timestamp,
    ) -> Result<Vec<GapSpan>, HistoryError> {
        let mut reader = self.pooled().await?;
        let spans =
            read_coverage(&mut reader.get(), endpoint.bucket(), from.secs(), to.secs()).await;
        let spans = spans.map_err(|error| self.failed(error))?;
        Ok(read::gaps_between(&spans, from, to))
    }
}

async fn write_all(
    mut transaction: store::sql::Transaction<'_>,
    batch: &SaveBatch,
    is_retry: bool,
) -> sqlx::Result<BTreeSet<Bucket>> {
    if is_retry && write::is_written(&mut transaction.get(), batch).await? {
        return Ok(BTreeSet::new());
    }
    let refused = write::write(&mut transaction.get(), batch).await?;
    transaction.commit().await?;
    Ok(refused)
}
