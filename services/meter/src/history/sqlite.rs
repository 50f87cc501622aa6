//! What is particular to a file of SQLite.

use sqlx::migrate::Migrator;

pub(super) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// Deletes panes from before a second, at most so many.
pub(super) const PRUNE_PANES: &str = "DELETE FROM history_panes WHERE rowid IN \
     (SELECT rowid FROM history_panes WHERE second < $1 LIMIT $2)";
