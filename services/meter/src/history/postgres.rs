//! What is specific to PostgreSQL, where the tables share a database with the log and several meters
//! write them.

use sqlx::migrate::Migrator;

pub(super) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// The migrations table; the store has its own.
pub(super) const MIGRATIONS_LISTED_IN: &str = "history_migrations";

/// Deletes panes from before a second, up to a limit. Skips rows that another meter is deleting.
pub(super) const PRUNE_PANES: &str = "DELETE FROM history_panes WHERE ctid = ANY(ARRAY(\
     SELECT ctid FROM history_panes WHERE second < $1 LIMIT $2 FOR UPDATE SKIP LOCKED))";
