//! The event store: the log, read models, snapshots, cursors, fences and idempotency keys.
//!
//! [`Store::commit`] is the only way to write. Positions become visible in order, and acknowledged
//! commits survive power loss. Positions have no gaps, except that a restored store skips at least
//! [`POSITIONS_SKIPPED`]; [`verify()`] checks that. In SQLite one process at a time owns a store; in
//! PostgreSQL many processes write to it, one commit at a time.
//!
//! Each folder imports only from those before it: `model` (inputs and outputs), `sql` (the databases and
//! all SQL), `schema` (formats and migrations), `archive` (the oldest part of the log, in files),
//! `writing` (the single writer task), `log` (the handle), `maintenance` (operations on an entire
//! store). `tests/tidy.rs` rejects import cycles.

#![warn(missing_docs, clippy::missing_errors_doc)]

mod archive;
mod log;
mod maintenance;
mod model;
mod schema;
/// Database access for auxiliary tables, with the same timeouts that the store itself uses.
pub mod sql;
mod writing;

pub use contract::log::RawRecord;
pub use log::page_reader::{PageReader, UndecodedPage};
pub use log::replay::LogReplay;
pub use log::store::{READ_LIMIT_MAX, Store};
pub use maintenance::backup::{backup, backup_file, write_new_file};
pub use maintenance::heads::heads;
pub use maintenance::rebuild::{rebuild, rebuild_with};
pub use maintenance::retained::check_retained;
pub use maintenance::saved_heads::SavedHeads;
pub use maintenance::seal::{
    ARCHIVE_EVENTS_MAX, ARCHIVE_LEASE, BlockingConsumer, SealLimits, Sealable, SealedFile, seal,
    sealable,
};
pub use maintenance::transfer::{
    LogHash, LogHasher, append_raw, copy, log_hash, skip_positions_above,
};
pub use maintenance::verify::{PROBLEMS_MAX, VerifyReport, verify, verify_against};
pub use model::archive::Archive;
pub use model::chain::BucketHead;
pub use model::commit::{Append, Commit, Committed, CursorMove, Fence, IdempotencyKey};
pub use model::error::{CommitError, Failure, StoreError};
pub use model::kinds::belongs;
pub use model::raw::{LogEntry, Unreadable, decode};
pub use model::rows::{PAGE_ROWS_MAX, Projector, Row, RowQuery};
pub use model::snapshot::{
    PartHash, Snapshot, SnapshotChange, SnapshotMeta, part_hash, snapshot_hash,
};
pub use schema::format::{FORMAT, FORMAT_WITH_ARCHIVES};
pub use schema::migrate::{Migrated, StoreFormat, inspect, migrate, migrate_with};
pub use sql::damage::{damage_in, describe_damage};
pub use sql::page::PageQuery;
pub use writing::restore::POSITIONS_SKIPPED;
