//! SQLite specifics: opening, locking and migrating a store, with durable writes.
//!
//! Invariants: one process at a time has the store open; every acknowledged transaction has reached the
//! disk (`synchronous=FULL`).

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use crate::model::error::StoreError;
use crate::sql::connection::{OwnedConnection, Pool};
use crate::sql::db_error::as_damaged;

pub(crate) mod inserts;
pub(crate) mod tables;

/// The maximum number of concurrent readers. Reads are short; more connections only cost memory.
const READERS_MAX: u32 = 4;

/// How long a statement waits for a lock. Only a checkpoint can block it.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// The writer's page cache: large enough for the tails of the indexes, so that they are not read or
/// written again for each batch.
const CACHE_KIB: u32 = 16 * 1024;

/// After how many pages (of 4 KiB) the write-ahead log is checkpointed.
const CHECKPOINT_PAGES: u32 = 4_000;

pub(crate) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// The SQLite file of a store.
#[derive(Clone, Debug)]
pub(crate) struct SqliteFile {
    path: PathBuf,
}

impl SqliteFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn at(path: &Path) -> Self {
        Self { path: path.into() }
    }

    pub(crate) fn parse(url: &str, path: &str) -> Result<Self, StoreError> {
        if path.is_empty() || path.starts_with(":memory:") {
            return Err(StoreError::refused(format!(
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

    /// Opens the connection for writing.
    pub(crate) async fn open_writer(&self) -> Result<OwnedConnection, StoreError> {
        self.options()
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .pragma("cache_size", format!("-{CACHE_KIB}"))
            // Pages that a transaction changes repeatedly are written once. Transactions are bounded.
            .pragma("cache_spill", "OFF")
            .pragma("wal_autocheckpoint", CHECKPOINT_PAGES.to_string())
            .connect()
            .await
            .map(OwnedConnection::Sqlite)
            .map_err(|error| self.failed(error))
    }

    /// Opens read-only connections.
    pub(crate) async fn open_readers(&self) -> Result<Pool, StoreError> {
        SqlitePoolOptions::new()
            .max_connections(READERS_MAX)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_before_acquire(false)
            .connect_with(self.options().read_only(true))
            .await
            .map(Pool::Sqlite)
            .map_err(|error| self.failed(error))
    }

    /// Locks the store for this process, until the file is dropped or the process ends.
    ///
    /// The lock is on a separate file: closing any handle to the database itself would drop the locks that
    /// SQLite holds on it.
    pub(crate) fn lock(&self) -> Result<File, StoreError> {
        if let Some(folder) = self.path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|error| {
                StoreError::refused(format!(
                    "the folder {} cannot be created: {error}",
                    folder.display()
                ))
                .caused_by(error)
            })?;
        }
        let path = lock_path(&self.path);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| {
                StoreError::refused(format!("{} cannot be opened: {error}", path.display()))
                    .caused_by(error)
            })?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => {
                Err(StoreError::InUse(self.path.display().to_string()))
            }
            Err(TryLockError::Error(error)) => Err(StoreError::refused(format!(
                "{} cannot be locked: {error}",
                path.display()
            ))
            .caused_by(error)),
        }
    }

    fn failed(&self, error: sqlx::Error) -> StoreError {
        let path = self.path.display();
        as_damaged(&error).unwrap_or_else(|| {
            StoreError::database(format!("{path} cannot be opened: {error}")).caused_by(error)
        })
    }
}

fn lock_path(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// Milliseconds since 1970, by this machine's clock.
pub(crate) const NOW: &str = "CAST(unixepoch('subsec') * 1000 AS INTEGER)";

/// What makes bytes of a text, before and after it.
pub(crate) const AS_BYTES: (&str, &str) = ("CAST(", " AS BLOB)");

/// Whether the kind of an event's stream is not in a list such as `,usage/,access/,`.
pub(crate) const KIND_IS_INCLUDED: &str =
    "instr($5, ',' || substr(stream, 1, instr(stream, '/')) || ',') = 0";

/// Whether a table of the store exists already.
pub(crate) const TABLE_EXISTS: &str =
    "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = $1";
