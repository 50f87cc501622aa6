//! What is written in a transaction of its own: fences and leases, events as another store had
//! them, the floor for new positions, and the many rows of a rebuild.

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
    /// All of these fences at once, in order of their names.
    Take(Vec<String>),
    Restore(Restore),
    /// New events get positions from here on.
    Floor(Position),
    /// At most one change of each row; nothing, if somebody else has taken one of the fences.
    Rows(Vec<RowChange>, Arc<Fences>),
    /// The next file of archives is listed.
    Seal(Box<Sealing>, Arc<Fences>),
    /// Events between two positions, which stand in files, leave the table, but for the last of each stream.
    Clear((Position, Position), Arc<Fences>),
}

/// What must still be ours where many rows are written.
pub(crate) struct Fences {
    /// In order of their names.
    pub fences: Vec<Fence>,
    /// What is said where it is not.
    pub lost: StoreError,
}

impl Fences {
    /// Holds them until the end of the transaction. Takes the lock of commits after them.
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
    /// The generation that a fence has now, where it was changed; events that were written; rows that
    /// were not so already.
    pub number: Option<u64>,
    /// Those that were taken.
    pub fences: Vec<Fence>,
    /// The newest position that was written.
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
            // One row, locked by the change itself.
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
