//! Migrations: which tables this binary needs, which a store has, and bringing it up to date.
//!
//! Invariants: migrations only add, so a store that a newer binary of the same format has extended can
//! be used; a store of a newer format is refused and left unchanged.

use contract::ids::{BUCKETS, Position};
use serde::Serialize;
use sqlx::migrate::{MigrateError, Migrator};

use crate::model::error::StoreError;
use crate::schema::chain::{self, ChainProgress};
use crate::schema::format::{FORMAT, known_format};
use crate::sql::connection::{Connection, OwnedConnection, run};
use crate::sql::db_error::as_damaged;
use crate::sql::location::StoreLocation;
use crate::sql::{damage, statements};

/// The format of a store, compared with this binary's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreFormat {
    /// The store's location, without credentials.
    pub store: String,
    /// None if the store has no tables yet.
    pub format: Option<u64>,
    /// The format that this binary writes, or the store's own if archives have raised it.
    pub known: u64,
    /// The names of the migrations that the store has, such as `0001_log`.
    pub applied: Vec<String>,
    /// The names of those that it still needs.
    pub pending: Vec<String>,
}

/// The result of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Migrated {
    /// The store's location, without credentials.
    pub store: String,
    /// The format before; None if the store had no tables.
    pub from: Option<u64>,
    /// The format now.
    pub to: u64,
    /// The names of the migrations that were applied.
    pub applied: Vec<String>,
}

/// Inspects a store without changing it.
///
/// # Errors
///
/// [`StoreError::Refused`] if the URL is invalid, the store is of a newer format, or another process has it
/// open in SQLite; others if the database fails.
pub async fn inspect(url: &str) -> Result<StoreFormat, StoreError> {
    let location = StoreLocation::parse(url)?;
    if location.is_missing() {
        return Ok(StoreFormat {
            store: location.to_string(),
            format: None,
            known: FORMAT,
            applied: Vec::new(),
            pending: names(location.migrations()),
        });
    }
    let _lock = location.lock()?;
    let mut connection = location.open_migrator().await?;
    let found = read_format(&location, &mut connection).await;
    connection.close().await;
    described(&location, found).await
}

/// Migrates a store to this binary's format; does nothing if it is up to date.
///
/// # Errors
///
/// The same as [`inspect`]; also [`StoreError::Refused`] if the store is damaged or has another number of
/// buckets.
pub async fn migrate(url: &str) -> Result<Migrated, StoreError> {
    migrate_with(url, |_, _| {}).await
}

/// The same. `progress` receives the position up to which events are chained, and the last one.
///
/// # Errors
///
/// The same.
pub async fn migrate_with(
    url: &str,
    mut progress: impl FnMut(Position, Position) + Send,
) -> Result<Migrated, StoreError> {
    let location = StoreLocation::parse(url)?;
    let _lock = location.lock()?;
    let mut connection = location.open_migrator().await?;
    let done = upgrade(&location, &mut connection, &mut progress).await;
    connection.close().await;
    described(&location, done).await
}

async fn described<T>(
    location: &StoreLocation,
    done: Result<T, StoreError>,
) -> Result<T, StoreError> {
    match done {
        Err(StoreError::Damaged(damage)) => Err(damage::open_error(location, damage).await),
        done => done,
    }
}

async fn upgrade(
    location: &StoreLocation,
    connection: &mut OwnedConnection,
    progress: &mut ChainProgress<'_>,
) -> Result<Migrated, StoreError> {
    let before = read_format(location, connection).await?;
    apply(location, connection, progress).await?;
    Ok(Migrated {
        store: location.to_string(),
        from: before.format,
        to: before.format.unwrap_or_default().max(FORMAT),
        applied: before.pending,
    })
}

async fn read_format(
    location: &StoreLocation,
    connection: &mut OwnedConnection,
) -> Result<StoreFormat, StoreError> {
    let mut connection = connection.get();
    let format = statements::format(&mut connection).await?;
    let format = format
        .map(|text| known_format(location, &text))
        .transpose()?;
    let applied_versions = applied(&mut connection).await?;
    let migrations = location.migrations();
    // Adding the column is not all of that migration: the events must also be chained.
    let is_chained = format.is_none_or(|format| format >= chain::FORMAT);
    let is_done = |version: i64| {
        applied_versions.contains(&version) && (is_chained || version != chain::MIGRATION)
    };
    Ok(StoreFormat {
        store: location.to_string(),
        format,
        known: format.unwrap_or_default().max(FORMAT),
        applied: names_where(migrations, is_done),
        pending: names_where(migrations, |version| !is_done(version)),
    })
}

/// Migrates the tables, and refuses a store that only a newer binary can read.
pub(crate) async fn apply(
    location: &StoreLocation,
    connection: &mut OwnedConnection,
    progress: &mut ChainProgress<'_>,
) -> Result<(), StoreError> {
    if let Some(format) = statements::format(&mut connection.get()).await? {
        known_format(location, &format)?;
    }
    let mut migrator = Migrator {
        migrations: location.migrations().migrations.clone(),
        ..Migrator::DEFAULT
    };
    migrator.set_ignore_missing(true);
    let run = match connection {
        OwnedConnection::Sqlite(connection) => migrator.run_direct(None, connection, false).await,
        OwnedConnection::Postgres(connection, _) => {
            migrator.run_direct(None, connection, false).await
        }
    };
    run.map_err(|error| failed(location, error))?;
    let format = statements::meta(&mut connection.get(), "format").await?;
    // Another process may have created the tables in the meantime.
    let format = format.map(|format| known_format(location, &format));
    if format.transpose()?.is_none_or(|format| format < FORMAT) {
        chain::upgrade(location, connection, progress).await?;
    }
    let connection = &mut connection.get();
    statements::set_meta_once(connection, "buckets", &BUCKETS.to_string()).await?;
    check_buckets(location, connection).await
}

fn failed(location: &StoreLocation, error: MigrateError) -> StoreError {
    let damaged = match &error {
        MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _) => {
            as_damaged(source)
        }
        _ => None,
    };
    damaged.unwrap_or_else(|| StoreError::database(format!("{location}: {error}")).caused_by(error))
}

async fn check_buckets(
    location: &StoreLocation,
    connection: &mut Connection<'_>,
) -> Result<(), StoreError> {
    let stored = statements::meta(connection, "buckets").await?;
    if stored.as_deref() == Some(BUCKETS.to_string().as_str()) {
        return Ok(());
    }
    Err(StoreError::refused(format!(
        "{location} was created with {} buckets, but this binary uses {BUCKETS}",
        stored.unwrap_or_default()
    )))
}

/// Returns the versions of the applied migrations.
async fn applied(connection: &mut Connection<'_>) -> Result<Vec<i64>, StoreError> {
    if !statements::table_exists(connection, "_sqlx_migrations").await? {
        return Ok(Vec::new());
    }
    Ok(run!(
        connection,
        query_scalar<i64>.fetch_all,
        "SELECT version FROM _sqlx_migrations WHERE success ORDER BY version"
    )?)
}

fn names(migrations: &Migrator) -> Vec<String> {
    names_where(migrations, |_| true)
}

fn names_where(migrations: &Migrator, wanted: impl Fn(i64) -> bool) -> Vec<String> {
    let chosen = migrations.iter().filter(|m| wanted(m.version));
    chosen
        .map(|m| format!("{:04}_{}", m.version, m.description.replace(' ', "_")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_databases_have_the_same_migration_names() {
        let sqlite = names(&crate::sql::sqlite::MIGRATIONS);
        assert_eq!(sqlite, names(&crate::sql::postgres::MIGRATIONS));
        assert!(sqlite.contains(&"0001_log".to_owned()), "{sqlite:?}");
    }
}
