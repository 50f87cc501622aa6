//! What is particular to SQLite: how a store is opened, locked, migrated and written in full.
//!
//! Invariant: one process at a time has the store open, and every transaction that was answered
//! has reached the disk (`synchronous=FULL`).

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use contract::ids::BUCKETS;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection as _};

use crate::{StoreError, statements};

pub(crate) type Db = sqlx::Sqlite;
pub(crate) type Connection = sqlx::SqliteConnection;
pub(crate) type Pool = sqlx::SqlitePool;

/// The format that this binary writes, and the newest that it can read.
pub(crate) const FORMAT: u64 = 1;

/// Readers at once. Reads are short; more connections only cost memory.
const READERS_MAX: u32 = 4;

/// How long a statement waits for another one's lock. Only a checkpoint can be in the way.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// Where a store is. Kept, so that the writer can open its connection anew after a failure.
#[derive(Clone, Debug)]
pub(crate) struct Location {
    path: PathBuf,
}

impl Location {
    pub(crate) fn parse(url: &str) -> Result<Self, StoreError> {
        let path = url.strip_prefix("sqlite:").ok_or_else(|| {
            StoreError::Refused(format!(
                "`{url}` is not a store this binary can open: use sqlite:PATH"
            ))
        })?;
        if path.is_empty() || path.starts_with(":memory:") {
            return Err(StoreError::Refused(format!(
                "`{url}` names no file: use sqlite:PATH, such as sqlite:/var/lib/penstock/log.db"
            )));
        }
        Ok(Self { path: path.into() })
    }

    fn options(&self) -> SqliteConnectOptions {
        SqliteConnectOptions::new()
            .filename(&self.path)
            .busy_timeout(BUSY_TIMEOUT)
            .disable_statement_logging()
    }

    /// The connection that writes.
    pub(crate) async fn open_writer(&self) -> Result<Connection, StoreError> {
        self.options()
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .connect()
            .await
            .map_err(|error| self.failed(&error))
    }

    /// Connections that cannot write.
    pub(crate) async fn open_readers(&self) -> Result<Pool, StoreError> {
        SqlitePoolOptions::new()
            .max_connections(READERS_MAX)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_before_acquire(false)
            .connect_with(self.options().read_only(true))
            .await
            .map_err(|error| self.failed(&error))
    }

    /// Takes the store for this process, until the file is dropped or the process ends.
    ///
    /// The lock is on a file beside the database: closing any handle to the database itself would
    /// drop the locks that SQLite holds on it.
    pub(crate) fn lock(&self) -> Result<File, StoreError> {
        if let Some(folder) = self.path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|error| {
                StoreError::Refused(format!(
                    "the folder {} cannot be made: {error}",
                    folder.display()
                ))
            })?;
        }
        let path = lock_path(&self.path);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| {
                StoreError::Refused(format!("{} cannot be opened: {error}", path.display()))
            })?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(StoreError::Refused(format!(
                "{} is in use by another process: stop it first, or use another data directory",
                self.path.display()
            ))),
            Err(TryLockError::Error(error)) => Err(StoreError::Refused(format!(
                "{} cannot be locked: {error}",
                path.display()
            ))),
        }
    }

    /// Brings the tables up to this binary's, and refuses a store that only a newer one can read.
    pub(crate) async fn migrate(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if let Some(format) = statements::format(connection).await? {
            self.check_format(&format)?;
        }
        // Migrations only add, so what a newer binary of the same format has added does no harm.
        let mut migrator = Migrator {
            migrations: MIGRATIONS.migrations.clone(),
            ..Migrator::DEFAULT
        };
        migrator.set_ignore_missing(true);
        migrator
            .run_direct(None, connection, false)
            .await
            .map_err(|error| StoreError::Database(format!("{}: {error}", self.path.display())))?;
        statements::set_meta_once(connection, "format", &FORMAT.to_string()).await?;
        statements::set_meta_once(connection, "buckets", &BUCKETS.to_string()).await?;
        self.check_buckets(connection).await
    }

    fn check_format(&self, format: &str) -> Result<(), StoreError> {
        let known = format.parse::<u64>().is_ok_and(|format| format <= FORMAT);
        if known {
            return Ok(());
        }
        Err(StoreError::Refused(format!(
            "{} has store format {format}, and this binary knows formats up to {FORMAT}: use the release that wrote it or a newer one",
            self.path.display()
        )))
    }

    async fn check_buckets(&self, connection: &mut Connection) -> Result<(), StoreError> {
        let stored = statements::meta(connection, "buckets").await?;
        if stored.as_deref() == Some(BUCKETS.to_string().as_str()) {
            return Ok(());
        }
        Err(StoreError::Refused(format!(
            "{} was made with {} buckets, and this binary works with {BUCKETS}",
            self.path.display(),
            stored.unwrap_or_default()
        )))
    }

    fn failed(&self, error: &sqlx::Error) -> StoreError {
        StoreError::Database(format!("{} cannot be opened: {error}", self.path.display()))
    }
}

fn lock_path(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// Closes the writing connection, which folds the write-ahead log into the database.
pub(crate) async fn close(connection: Connection) {
    if let Err(error) = connection.close().await {
        tracing::warn!(%error, "the store's connection did not close cleanly");
    }
}

/// Whether a table of the store exists already.
pub(crate) const TABLE_EXISTS: &str =
    "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = $1";
