//! Maps database errors to store errors.

use crate::model::error::StoreError;

/// SQLite's primary result codes for a corrupt file.
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_NOTADB: i32 = 26;

/// PostgreSQL's: `data_corrupted` and `index_corrupted`.
const POSTGRES_CORRUPT: [&str; 2] = ["XX001", "XX002"];

/// Returns [`StoreError::Damaged`] if the database reports corruption.
pub(crate) fn as_damaged(error: &sqlx::Error) -> Option<StoreError> {
    let error = error.as_database_error()?;
    let damaged = || StoreError::damaged(error.message());
    let code = error.code().unwrap_or_default();
    if POSTGRES_CORRUPT.contains(&code.as_ref()) {
        return Some(damaged());
    }
    let of_sqlite = error
        .try_downcast_ref::<sqlx::sqlite::SqliteError>()
        .is_some();
    // The lowest byte of an extended code is the primary one.
    let primary = code.parse::<i32>().map(|code| code & 0xff);
    let is_corrupt = matches!(primary, Ok(SQLITE_CORRUPT | SQLITE_NOTADB));
    (of_sqlite && is_corrupt).then(damaged)
}

/// Whether the database reports corruption.
pub(crate) fn is_damage(error: &sqlx::Error) -> bool {
    as_damaged(error).is_some()
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::PoolClosed => Self::Closed,
            error => as_damaged(&error)
                .unwrap_or_else(|| Self::database(error.to_string()).caused_by(error)),
        }
    }
}
