//! Tasks that run in a transaction of their own: fences and leases, restored events of another store,
//! the position floor, sealing, and the bulk rows of a rebuild.

use std::sync::Arc;

use contract::ids::Position;
use contract::log::RowChange;

use crate::archive::archive_set::ArchiveSet;
use crate::model::commit::Fence;
use crate::model::error::StoreError;
use crate::model::rows::VIEWS;
use crate::sql::connection::{Connection, OwnedConnection};
use crate::sql::damage::ROW_TABLES;
use crate::sql::{postgres, sqlite, statements};
use crate::writing::cache::WriterCache;
use crate::writing::lease::{self, FenceChange};
use crate::writing::restore::RestoreBatch;
use crate::writing::sealing::NewArchive;

pub(crate) enum ExclusiveTask {
    ChangeFence(FenceChange),
    /// Takes all of these fences at once, in order of their names.
    TakeFences(Vec<String>),
    Restore(RestoreBatch),
    /// Sets the lowest position that new events get.
    RaiseFloor(Position),
    /// Writes rows, with at most one change per row. Fails if another owner has taken one of the fences.
    WriteRows(Vec<RowChange>, Arc<Fences>),
    /// Replaces damaged tables of an SQLite store by empty ones: [`ROW_TABLES`], whose fences must still be
    /// current, or `SNAPSHOT_TABLES`.
    Recreate(&'static [&'static str], Option<Arc<Fences>>),
    /// Lists the next archive file.
    ListArchive(Box<NewArchive>, Arc<Fences>),
    /// Deletes archived events between two positions from the table, except the last of each stream.
    ClearSealed((Position, Position), Arc<Fences>),
}

/// Fences that must still be current when a task writes.
pub(crate) struct Fences {
    /// In order of their names.
    pub fences: Vec<Fence>,
    /// The error if one of them is not.
    pub lost: StoreError,
}

impl Fences {
    /// Locks and checks the fences until the end of the transaction, then takes the commit lock.
    async fn check(
        &self,
        connection: &mut Connection<'_>,
        cache: &mut WriterCache,
    ) -> Result<(), StoreError> {
        if let Connection::Postgres(connection, limit) = connection {
            let names = self.fences.iter().map(|fence| fence.name.as_str());
            cache.fences =
                postgres::locks::lock_fences(connection, *limit, names.collect()).await?;
        }
        for fence in &self.fences {
            if cache.generation(connection, &fence.name).await? != fence.generation {
                return Err(self.lost.clone());
            }
        }
        Ok(())
    }
}

#[derive(Default)]
pub(crate) struct TaskOutput {
    /// The new generation of a changed fence, or the number of events written, rows changed or events
    /// deleted.
    pub number: Option<u64>,
    /// The fences that were taken.
    pub fences: Vec<Fence>,
    /// The highest position that was written.
    pub head: Position,
}

impl ExclusiveTask {
    pub(crate) async fn write(
        self,
        connection: &mut OwnedConnection,
        cache: &mut WriterCache,
        archive_set: &ArchiveSet,
    ) -> Result<TaskOutput, StoreError> {
        let mut transaction = connection.begin().await?;
        let mut tx = transaction.get();
        let output = match &self {
            // Needs no lock: the change locks its only row.
            Self::ChangeFence(change) => {
                let number = change.write(&mut tx, cache).await?;
                TaskOutput {
                    number,
                    ..TaskOutput::default()
                }
            }
            Self::TakeFences(names) => TaskOutput {
                fences: lease::acquire_fences(&mut tx, cache, names).await?,
                ..TaskOutput::default()
            },
            Self::Restore(restore) => {
                lock(&mut tx).await?;
                let (number, head) = restore.write(&mut tx, archive_set).await?;
                TaskOutput {
                    number: Some(number),
                    head,
                    ..TaskOutput::default()
                }
            }
            Self::RaiseFloor(next) => {
                lock(&mut tx).await?;
                statements::set_next_position(&mut tx, *next).await?;
                TaskOutput::default()
            }
            Self::Recreate(tables, fences) => {
                if let Some(fences) = fences {
                    fences.check(&mut tx, cache).await?;
                }
                recreate(&mut tx, tables).await?;
                TaskOutput::default()
            }
            Self::ListArchive(archive, fences) => {
                fences.check(&mut tx, cache).await?;
                archive.write(&mut tx).await?;
                TaskOutput::default()
            }
            Self::ClearSealed(between, fences) => {
                fences.check(&mut tx, cache).await?;
                TaskOutput {
                    number: Some(statements::clear(&mut tx, *between).await?),
                    ..TaskOutput::default()
                }
            }
            Self::WriteRows(changes, fences) => {
                fences.check(&mut tx, cache).await?;
                let changes: Vec<&RowChange> = changes.iter().collect();
                TaskOutput {
                    number: Some(statements::write_rows(&mut tx, &changes).await?),
                    ..TaskOutput::default()
                }
            }
        };
        let reloaded = match self {
            Self::ChangeFence(_)
            | Self::TakeFences(_)
            | Self::WriteRows(..)
            | Self::ListArchive(..)
            | Self::ClearSealed(..) => None,
            Self::Restore(_) | Self::RaiseFloor(_) | Self::Recreate(..) => {
                Some(WriterCache::load(&mut tx).await?)
            }
        };
        transaction.commit().await?;
        if let Some(reloaded) = reloaded {
            *cache = reloaded;
        }
        Ok(output)
    }
}

/// A cursor is removed with the rows that it covers, so that they are written again.
async fn recreate(
    connection: &mut Connection<'_>,
    tables: &'static [&'static str],
) -> Result<(), StoreError> {
    tracing::warn!(
        ?tables,
        "recreating damaged tables, to be filled again from the log"
    );
    if let Connection::Sqlite(connection) = connection {
        sqlite::tables::recreate(connection, tables).await?;
    }
    if tables == ROW_TABLES {
        statements::remove_cursors(connection, VIEWS).await?;
    }
    Ok(())
}

async fn lock(connection: &mut Connection<'_>) -> Result<(), StoreError> {
    if let Connection::Postgres(connection, limit) = connection {
        postgres::locks::lock_commits(connection, *limit).await?;
    }
    Ok(())
}
