//! What is specific to a SQLite file.

use sqlx::migrate::Migrator;

pub(super) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// Deletes panes from before a second, up to a limit.
pub(super) const PRUNE_PANES: &str = "DELETE FROM history_panes WHERE rowid IN \
     (SELECT rowid FROM history_panes WHERE second < $1 LIMIT $2)";
