//! Tables of others: in a file of their own, or beside the log in the database of the store.
//!
//! Invariant: they keep a list of migrations of their own, so that theirs and the store's never meet.

use std::path::Path;

use sqlx::migrate::Migrator;

use crate::model::error::StoreError;
use crate::sql::connection::{Owned, Pool};
use crate::sql::location::Location;
use crate::sql::{postgres, sqlite};

/// The tables of one service, for either database.
pub struct Tables {
    pub sqlite: &'static Migrator,
    pub postgres: &'static Migrator,
    /// Where PostgreSQL lists the migrations that were applied; a file has the usual list.
    pub listed_in: &'static str,
}

/// Where they are.
#[derive(Clone, Debug)]
pub struct Beside {
    location: Location,
}

impl Beside {
    pub fn file(path: &Path) -> Self {
        Self {
            location: Location::Sqlite(sqlite::Place::at(path)),
        }
    }

    /// In the database of a store in PostgreSQL.
    pub fn database(url: &str) -> Result<Self, StoreError> {
        let place = postgres::Place::parse(url)?;
        Ok(Self {
            location: Location::Postgres(Box::new(place)),
        })
    }

    /// Makes the tables, or brings them up to date. Tables that a newer release has extended stay.
    pub async fn migrate(&self, tables: &Tables) -> Result<(), StoreError> {
        let of = match &self.location {
            Location::Sqlite(_) => tables.sqlite,
            Location::Postgres(_) => tables.postgres,
        };
        let mut migrator = Migrator {
            migrations: of.migrations.clone(),
            ..Migrator::DEFAULT
        };
        migrator.set_ignore_missing(true);
        let mut connection = self.location.open_migrator().await?;
        let run = match &mut connection {
            Owned::Sqlite(connection) => migrator.run_direct(None, connection, false).await,
            Owned::Postgres(connection, _) => {
                migrator.dangerous_set_table_name(tables.listed_in);
                migrator.run_direct(None, connection, false).await
            }
        };
        connection.close().await;
        run.map_err(|error| StoreError::Database(format!("{self}: {error}")))
    }

    /// The connection that writes a file. A database is written through its pool.
    pub async fn writer(&self) -> Result<Option<Owned>, StoreError> {
        match &self.location {
            Location::Sqlite(place) => place.open_writer().await.map(Some),
            Location::Postgres(_) => Ok(None),
        }
    }

    /// Connections to a database, or connections to a file that cannot write.
    pub async fn pool(&self) -> Result<Pool, StoreError> {
        self.location.open_readers().await
    }
}

/// For people; without credentials.
impl std::fmt::Display for Beside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.location.fmt(f)
    }
}
