//! What is particular to PostgreSQL, where the tables stand beside the log's and several meters
//! write them.

use sqlx::migrate::Migrator;

pub(super) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// The store keeps its own list.
pub(super) const MIGRATIONS_LISTED_IN: &str = "history_migrations";

/// Deletes panes from before a second, at most so many. What another meter is deleting is left to it.
pub(super) const PRUNE_PANES: &str = "DELETE FROM history_panes WHERE ctid = ANY(ARRAY(\
     SELECT ctid FROM history_panes WHERE second < $1 LIMIT $2 FOR UPDATE SKIP LOCKED))";
