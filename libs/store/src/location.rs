//! Where a store is: a file of SQLite or a database of PostgreSQL. Kept, so that the writer can
//! open its connection anew after a failure.

use std::fs::File;

use sqlx::migrate::Migrator;

use crate::connection::{Owned, Pool};
use crate::{StoreError, postgres, sqlite};

#[derive(Clone, Debug)]
pub(crate) enum Location {
    Sqlite(sqlite::Place),
    Postgres(Box<postgres::Place>),
}

impl Location {
    pub(crate) fn parse(url: &str) -> Result<Self, StoreError> {
        if let Some(path) = url.strip_prefix("sqlite:") {
            return Ok(Self::Sqlite(sqlite::Place::parse(url, path)?));
        }
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return Ok(Self::Postgres(Box::new(postgres::Place::parse(url)?)));
        }
        // It is not repeated in full: a mistyped URL may hold a password.
        let scheme = url.split("://").next().unwrap_or_default();
        let shown = if scheme.len() < url.len() {
            scheme
        } else {
            url
        };
        Err(StoreError::Refused(format!(
            "`{shown}` is not a store this binary can open: use sqlite:PATH or postgres://USER:PASSWORD@HOST:PORT/DATABASE"
        )))
    }

    /// Takes the store for this process, where only one may have it.
    pub(crate) fn lock(&self) -> Result<Option<File>, StoreError> {
        match self {
            Self::Sqlite(place) => place.lock().map(Some),
            Self::Postgres(_) => Ok(None),
        }
    }

    pub(crate) async fn open_writer(&self) -> Result<Owned, StoreError> {
        match self {
            Self::Sqlite(place) => place.open_writer().await,
            Self::Postgres(place) => place.open_writer().await,
        }
    }

    /// A connection for changing tables, which may take its time.
    pub(crate) async fn open_migrator(&self) -> Result<Owned, StoreError> {
        match self {
            Self::Sqlite(place) => place.open_writer().await,
            Self::Postgres(place) => place.open_migrator().await,
        }
    }

    pub(crate) async fn open_readers(&self) -> Result<Pool, StoreError> {
        match self {
            Self::Sqlite(place) => place.open_readers().await,
            Self::Postgres(place) => place.open_readers().await,
        }
    }

    /// Whether there is anything to open yet.
    pub(crate) fn is_missing(&self) -> bool {
        match self {
            Self::Sqlite(place) => !place.path().exists(),
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

/// For people; without credentials.
impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite(place) => place.path().display().fmt(f),
            Self::Postgres(place) => f.write_str(place.name()),
        }
    }
}
