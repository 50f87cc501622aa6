//! Auxiliary tables of services: in an SQLite file of their own, or next to the log in the store's
//! PostgreSQL database.
//!
//! Invariant: they have their own migrations table, so their migrations never conflict with the store's.

use std::path::Path;

use sqlx::migrate::Migrator;

use crate::model::error::StoreError;
use crate::sql::connection::{OwnedConnection, Pool};
use crate::sql::location::StoreLocation;
use crate::sql::{postgres, sqlite};

/// The migrations of a service's auxiliary tables, for either database.
pub struct AuxiliaryTables {
    /// For an SQLite file.
    pub sqlite: &'static Migrator,
    /// For a PostgreSQL database.
    pub postgres: &'static Migrator,
    /// The table of applied migrations in PostgreSQL; an SQLite file has the default one.
    pub migrations_table: &'static str,
}

/// The location of auxiliary tables.
#[derive(Clone, Debug)]
pub struct AuxiliaryDatabase {
    location: StoreLocation,
}

impl AuxiliaryDatabase {
    /// Tables in an SQLite file of their own.
    pub fn file(path: &Path) -> Self {
        Self {
            location: StoreLocation::Sqlite(sqlite::SqliteFile::at(path)),
        }
    }

    /// Tables in the database of a PostgreSQL store.
    ///
    /// # Errors
    ///
    /// [`StoreError::Refused`] if the URL is not one of a PostgreSQL database.
    pub fn database(url: &str) -> Result<Self, StoreError> {
        let database = postgres::PostgresDatabase::parse(url)?;
        Ok(Self {
            location: StoreLocation::Postgres(Box::new(database)),
        })
    }

    /// Creates or migrates the tables. Tables that a newer release has extended are left as they are.
    ///
    /// # Errors
    ///
    /// If the database cannot be opened, or a migration fails.
    pub async fn migrate(&self, tables: &AuxiliaryTables) -> Result<(), StoreError> {
        let of = match &self.location {
            StoreLocation::Sqlite(_) => tables.sqlite,
            StoreLocation::Postgres(_) => tables.postgres,
        };
        let mut migrator = Migrator {
            migrations: of.migrations.clone(),
            ..Migrator::DEFAULT
        };
        migrator.set_ignore_missing(true);
        let mut connection = self.location.open_migrator().await?;
        let run = match &mut connection {
            OwnedConnection::Sqlite(connection) => {
                migrator.run_direct(None, connection, false).await
            }
            OwnedConnection::Postgres(connection, _) => {
                migrator.dangerous_set_table_name(tables.migrations_table);
                migrator.run_direct(None, connection, false).await
            }
        };
        connection.close().await;
        run.map_err(|error| StoreError::database(format!("{self}: {error}")).caused_by(error))
    }

    /// Opens the connection for writing to a file. None for a database, which is written through its pool.
    ///
    /// # Errors
    ///
    /// If the file cannot be opened.
    pub async fn writer(&self) -> Result<Option<OwnedConnection>, StoreError> {
        match &self.location {
            StoreLocation::Sqlite(file) => file.open_writer().await.map(Some),
            StoreLocation::Postgres(_) => Ok(None),
        }
    }

    /// Opens a pool: read-only for a file, read-write for a database.
    ///
    /// # Errors
    ///
    /// If the file or the database cannot be opened.
    pub async fn pool(&self) -> Result<Pool, StoreError> {
        self.location.open_readers().await
    }
}

/// For display; without credentials.
impl std::fmt::Display for AuxiliaryDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.location.fmt(f)
    }
}
