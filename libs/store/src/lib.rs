//! The event store: the log itself, read models, cursors, fences and causes.
//!
//! [`Store::commit`] is the only way to write. Positions become visible in order and without gaps.
//! What a commit has acknowledged survives the loss of power. One process at a time owns a store.
//!
//! `sqlite` holds what is particular to SQLite (opening, pragmas, the lock, migrations) and
//! `statements` every SQL text; nothing above them knows the dialect.

mod commit;
mod kinds;
mod rows;
mod sqlite;
mod statements;
mod store;
mod verify;
mod writer;

pub use commit::*;
pub use kinds::belongs;
pub use rows::{PAGE_ROWS_MAX, Projector, Row, RowQuery, rebuild};
pub use store::{READ_LIMIT_MAX, Store};
pub use verify::{PROBLEMS_MAX, VerifyReport, verify};
