//! The location of a store: an SQLite file or a PostgreSQL database. Kept so that the writer can
//! reconnect after a failure.

use std::fs::File;
use std::path::Path;

use sqlx::migrate::Migrator;

use crate::model::error::StoreError;
use crate::sql::connection::{OwnedConnection, Pool};
use crate::sql::{postgres, sqlite};

#[derive(Clone, Debug)]
pub(crate) enum StoreLocation {
    Sqlite(sqlite::SqliteFile),
    Postgres(Box<postgres::PostgresDatabase>),
}

impl StoreLocation {
    pub(crate) fn parse(url: &str) -> Result<Self, StoreError> {
        if let Some(path) = url.strip_prefix("sqlite:") {
            return Ok(Self::Sqlite(sqlite::SqliteFile::parse(url, path)?));
        }
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return Ok(Self::Postgres(Box::new(postgres::PostgresDatabase::parse(
                url,
            )?)));
        }
        Err(StoreError::refused(invalid_url(url)))
    }

    /// Locks the store for this process, if only one process may open it.
    pub(crate) fn lock(&self) -> Result<Option<File>, StoreError> {
        match self {
            Self::Sqlite(file) => file.lock().map(Some),
            Self::Postgres(_) => Ok(None),
        }
    }

    pub(crate) async fn open_writer(&self) -> Result<OwnedConnection, StoreError> {
        match self {
            Self::Sqlite(file) => file.open_writer().await,
            Self::Postgres(database) => database.open_writer().await,
        }
    }

    /// Opens a connection for migrations, which may take long.
    pub(crate) async fn open_migrator(&self) -> Result<OwnedConnection, StoreError> {
        match self {
            Self::Sqlite(file) => file.open_writer().await,
            Self::Postgres(database) => database.open_migrator().await,
        }
    }

    pub(crate) async fn open_readers(&self) -> Result<Pool, StoreError> {
        match self {
            Self::Sqlite(file) => file.open_readers().await,
            Self::Postgres(database) => database.open_readers().await,
        }
    }

    /// The path of an SQLite store.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::Sqlite(file) => Some(file.path()),
            Self::Postgres(_) => None,
        }
    }

    /// Whether the store does not exist yet.
    pub(crate) fn is_missing(&self) -> bool {
        match self {
            Self::Sqlite(file) => !file.path().exists(),
            Self::Postgres(_) => false,
        }
    }

    pub(crate) fn migrations(&self) -> &'static Migrator {
        match self {
            Self::Sqlite(_) => &sqlite::MIGRATIONS,
            Self::Postgres(_) => &postgres::MIGRATIONS,
        }
    }
}

/// Returns an error with the correct forms. The URL is not repeated, as it may contain a password.
fn invalid_url(text: &str) -> String {
    const DATABASE: &str = "postgres://USER:PASSWORD@HOST:PORT/DATABASE";
    match text.split_once("://") {
        Some(("kafka", _)) => format!(
            "a store is a file or a database, and kafka:// is a bus: write sqlite:PATH, or {DATABASE}"
        ),
        Some((scheme, _)) => {
            format!(
                "`{scheme}://` is not a supported kind of store: write sqlite:PATH for a file, or {DATABASE}"
            )
        }
        None if text.is_empty() || text.contains(['@', '=']) => {
            format!("the store's URL has no scheme: write sqlite:PATH for a file, or {DATABASE}")
        }
        None => format!(
            "`{text}` has no scheme: for that file write sqlite:{text}, for a database {DATABASE}"
        ),
    }
}

/// For display; without credentials.
impl std::fmt::Display for StoreLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite(file) => file.path().display().fmt(f),
            Self::Postgres(database) => f.write_str(database.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        StoreLocation::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_error_for_a_bare_path_suggests_its_url() {
        let message = refused("/var/lib/penstock.db");
        assert!(
            message.contains("write sqlite:/var/lib/penstock.db,"),
            "{message}"
        );
    }

    #[test]
    fn a_url_that_may_contain_a_password_is_not_repeated() {
        for text in [
            "mysql://me:secret@host/db",
            "postgres:me:secret@host/db",
            "host=db password=secret",
        ] {
            let message = refused(text);
            assert!(!message.contains("secret"), "{message}");
            assert!(message.contains("write sqlite:PATH"), "{message}");
        }
    }
}
