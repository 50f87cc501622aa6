//! What is written in a transaction of its own: fences and leases, events as another store had
//! them, the floor for new positions, and the many rows of a rebuild.

use contract::ids::Position;
use contract::log::RowChange;

use crate::connection::{Connection, Owned};
use crate::known::Known;
use crate::lease::FenceChange;
use crate::transfer::Restore;
use crate::{StoreError, postgres, statements};

pub(crate) enum Alone {
    Fence(FenceChange),
    Restore(Restore),
    /// New events get positions from here on.
    Floor(Position),
    /// At most one change of each row.
    Rows(Vec<RowChange>),
}

#[derive(Default)]
pub(crate) struct Answer {
    /// The generation that a fence has now, where it was changed; events that were written; rows that
    /// were not so already.
    pub number: Option<u64>,
    /// The newest position that was written.
    pub head: Position,
}

impl Alone {
    pub(crate) async fn write(
        self,
        connection: &mut Owned,
        known: &mut Known,
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
            Self::Restore(restore) => {
                lock(&mut inside).await?;
                restore.write(&mut inside).await?
            }
            Self::Floor(next) => {
                lock(&mut inside).await?;
                statements::set_next_position(&mut inside, *next).await?;
                Answer::default()
            }
            Self::Rows(changes) => {
                lock(&mut inside).await?;
                let changes: Vec<&RowChange> = changes.iter().collect();
                Answer {
                    number: Some(statements::write_rows(&mut inside, &changes).await?),
                    ..Answer::default()
                }
            }
        };
        let anew = match self {
            Self::Fence(_) | Self::Rows(_) => None,
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
        postgres::batch::lock_commits(connection, *limit).await?;
    }
    Ok(())
}
