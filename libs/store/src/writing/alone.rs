//! Tasks that run in a transaction of their own: fences and leases, restored events of another store,
//! the position floor, sealing, and the bulk rows of a rebuild.

use std::sync::Arc;

use contract::ids::Position;
use contract::log::RowChange;

use crate::archive::shelf::Shelf;
use crate::model::commit::Fence;
use crate::model::error::StoreError;
use crate::sql::connection::{Connection, Owned};
use crate::sql::{postgres, statements};
use crate::writing::known::Known;
use crate::writing::lease::{self, FenceChange};
use crate::writing::restore::Restore;
use crate::writing::sealing::Sealing;

pub(crate) enum Alone {
    Fence(FenceChange),
    /// Takes all of these fences at once, in order of their names.
    Take(Vec<String>),
    Restore(Restore),
    /// Sets the lowest position that new events get.
    Floor(Position),
    /// Writes rows, with at most one change per row. Fails if another owner has taken one of the fences.
    Rows(Vec<RowChange>, Arc<Fences>),
    /// Lists the next archive file.
    Seal(Box<Sealing>, Arc<Fences>),
    /// Deletes archived events between two positions from the table, except the last of each stream.
    Clear((Position, Position), Arc<Fences>),
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
        known: &mut Known,
    ) -> Result<(), StoreError> {
        if let Connection::Postgres(connection, limit) = connection {
            let names = self.fences.iter().map(|fence| fence.name.as_str());
            known.fences =
                postgres::locks::lock_fences(connection, *limit, names.collect()).await?;
        }
        for fence in &self.fences {
            if known.generation(connection, &fence.name).await? != fence.generation {
                return Err(self.lost.clone());
            }
        }
        Ok(())
    }
}

#[derive(Default)]
pub(crate) struct Answer {
    /// The new generation of a changed fence, or the number of events written, rows changed or events
    /// deleted.
    pub number: Option<u64>,
    /// The fences that were taken.
    pub fences: Vec<Fence>,
    /// The highest position that was written.
    pub head: Position,
}

impl Alone {
    pub(crate) async fn write(
        self,
        connection: &mut Owned,
        known: &mut Known,
        shelf: &Shelf,
    ) -> Result<Answer, StoreError> {
        let mut transaction = connection.begin().await?;
        let mut inside = transaction.get();
        let answer = match &self {
            // Needs no lock: the change locks its only row.
            Self::Fence(change) => {
                let number = change.write(&mut inside, known).await?;
                Answer {
                    number,
                    ..Answer::default()
                }
            }
            Self::Take(names) => Answer {
                fences: lease::take_all(&mut inside, known, names).await?,
                ..Answer::default()
            },
            Self::Restore(restore) => {
                lock(&mut inside).await?;
                let (number, head) = restore.write(&mut inside, shelf).await?;
                Answer {
                    number: Some(number),
                    head,
                    ..Answer::default()
                }
            }
            Self::Floor(next) => {
                lock(&mut inside).await?;
                statements::set_next_position(&mut inside, *next).await?;
                Answer::default()
            }
            Self::Seal(sealing, fences) => {
                fences.check(&mut inside, known).await?;
                sealing.write(&mut inside).await?;
                Answer::default()
            }
            Self::Clear(between, fences) => {
                fences.check(&mut inside, known).await?;
                Answer {
                    number: Some(statements::clear(&mut inside, *between).await?),
                    ..Answer::default()
                }
            }
            Self::Rows(changes, fences) => {
                fences.check(&mut inside, known).await?;
                let changes: Vec<&RowChange> = changes.iter().collect();
                Answer {
                    number: Some(statements::write_rows(&mut inside, &changes).await?),
                    ..Answer::default()
                }
            }
        };
        let anew = match self {
            Self::Fence(_) | Self::Take(_) | Self::Rows(..) | Self::Seal(..) | Self::Clear(..) => {
                None
            }
            Self::Restore(_) | Self::Floor(_) => Some(Known::read(&mut inside).await?),
        };
        transaction.commit().await?;
        if let Some(anew) = anew {
            *known = anew;
        }
        Ok(answer)
    }
}

async fn lock(connection: &mut Connection<'_>) -> Result<(), StoreError> {
    if let Connection::Postgres(connection, limit) = connection {
        postgres::locks::lock_commits(connection, *limit).await?;
    }
    Ok(())
}
