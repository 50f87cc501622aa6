//! Backs up a store to an SQLite file, from which a store of either kind can be restored.
//!
//! The archives of an SQLite store are copied to the folder `archive` next to the backup, which several
//! backups of one store share. A store in PostgreSQL is copied with its entire log into the file.
//!
//! Invariants: the file gets its final name only once it is complete and durable; it never overwrites
//! another; opened as a store, it assigns positions above every position that was assigned before.

use std::fs::File;
use std::path::{Path, PathBuf};

use contract::ids::Position;
use sqlx::SqliteConnection;

use crate::archive::archive_set::{self, ArchiveSet, FOLDER};
use crate::archive::copying::copy_all;
use crate::log::store::Store;
use crate::maintenance::transfer::{LogHash, copy, log_hash, skip_positions_above};
use crate::model::error::StoreError;
use crate::sql::auxiliary::AuxiliaryDatabase;
use crate::sql::connection::PooledConnection;
use crate::sql::damage::SNAPSHOT_TABLES;
use crate::sql::location::StoreLocation;
use crate::sql::statements;

/// Copies a store into a new file and returns the hash of its log. `progress` receives the number of copied
/// events and the total.
///
/// # Errors
///
/// [`StoreError::Refused`] if the file exists or cannot be written, others if the store cannot be read. No
/// partial file is left behind.
pub async fn backup(
    store: &Store,
    to: &Path,
    progress: impl FnMut(u64, u64),
) -> Result<LogHash, StoreError> {
    write_new_file(to, async |partial| write(store, partial, progress).await).await
}

/// Copies an SQLite file other than the store's, such as the history, into a new one.
///
/// # Errors
///
/// [`StoreError::Refused`] if the target exists or cannot be written, others if the original cannot be read.
pub async fn backup_file(from: &Path, to: &Path) -> Result<(), StoreError> {
    write_new_file(to, async |partial| {
        let readers = AuxiliaryDatabase::file(from).pool().await?;
        let copied = match readers.acquire().await? {
            PooledConnection::Sqlite(mut connection) => copy_pages(&mut connection, partial).await,
            PooledConnection::Postgres(..) => Ok(()),
        };
        readers.close().await;
        copied
    })
    .await
}

/// Has an SQLite file written under another name, and gives it its own once it is complete and durable.
/// `write` must close the file.
///
/// # Errors
///
/// [`StoreError::Refused`] if the file exists or cannot be written, and those of `write`. No partial file is
/// left behind.
pub async fn write_new_file<T>(
    to: &Path,
    write: impl AsyncFnOnce(&Path) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    if to.exists() {
        return Err(StoreError::refused(format!(
            "{} exists already: choose another file",
            to.display()
        )));
    }
    let partial = with_suffix(to, ".partial");
    remove_partial(&partial)?;
    let written = write(&partial).await;
    let _ = std::fs::remove_file(with_suffix(&partial, ".lock"));
    let done = written.and_then(|written| finish(&partial, to).map(|()| written));
    if done.is_err() {
        let _ = remove_partial(&partial);
    }
    done
}

async fn copy_pages(connection: &mut SqliteConnection, to: &Path) -> Result<(), StoreError> {
    sqlx::query("VACUUM INTO $1")
        .bind(to.display().to_string())
        .execute(connection)
        .await?;
    Ok(())
}

async fn write(
    store: &Store,
    partial: &Path,
    progress: impl FnMut(u64, u64),
) -> Result<LogHash, StoreError> {
    let url = format!("sqlite:{}", partial.display());
    let mut reader = store.reader().await?;
    let copied_pages = match &mut reader {
        PooledConnection::Sqlite(connection) => {
            match copy_pages(connection, partial).await {
                // A backup does not need the snapshots.
                Err(StoreError::Damaged(_))
                    if store.recreate_if_damaged(SNAPSHOT_TABLES, None).await? =>
                {
                    remove_partial(partial)?;
                    copy_pages(connection, partial).await?;
                }
                copied => copied?,
            }
            true
        }
        PooledConnection::Postgres(..) => false,
    };
    drop(reader);
    if copied_pages {
        copy_archives(store, &url, partial).await?;
    }
    let target = Store::open(&url).await?;
    let hash = match copied_pages {
        true => {
            let head = target.head().await?;
            log_hash(&target, head).await
        }
        false => copy(store, &target, progress).await,
    };
    let done = match &hash {
        Ok(hash) => skip_positions_above(&target, hash.head).await,
        Err(_) => Ok(()),
    };
    target.close().await;
    done.and(hash)
}

/// Copies the archives to the folder `archive` next to the copy, the default folder of an SQLite store.
async fn copy_archives(store: &Store, url: &str, partial: &Path) -> Result<(), StoreError> {
    let mut copy = StoreLocation::parse(url)?.open_writer().await?;
    let archives = statements::archives(&mut copy.get(), Position::START).await;
    let cleared = statements::remove_meta(&mut copy.get(), FOLDER).await;
    copy.close().await;
    cleared?;
    let archives = archives?;
    if archives.is_empty() {
        return Ok(());
    }
    let (from, to) = (
        store.archive_set().folder()?,
        archive_set::default_folder(partial),
    );
    let copy_files = move |_: &ArchiveSet| copy_all(&from, &to, &archives);
    store.archive_set().run_blocking(copy_files).await
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Removes the files of an earlier attempt.
fn remove_partial(partial: &Path) -> Result<(), StoreError> {
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let path = with_suffix(partial, suffix);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed(&path, error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn finish(partial: &Path, to: &Path) -> Result<(), StoreError> {
    let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all());
    sync(partial).map_err(|error| failed(partial, error))?;
    std::fs::rename(partial, to).map_err(|error| failed(to, error))?;
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    sync(folder).map_err(|error| failed(folder, error))
}

fn failed(path: &Path, error: std::io::Error) -> StoreError {
    StoreError::refused(format!("{} cannot be written: {error}", path.display())).caused_by(error)
}
