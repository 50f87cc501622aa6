//! The event store: the log itself, read models, snapshots, cursors, fences and causes.
//!
//! [`Store::commit`] is the only way to write. Positions become visible in order. What a commit has
//! acknowledged survives the loss of power. In SQLite one process at a time owns a store and positions
//! have no gaps; in PostgreSQL many processes write it, one commit after the other.
//!
//! `sqlite` and `postgres` hold what is particular to either (opening, locks, migrations, inserts of
//! many rows) and `statements` every other SQL text; nothing above them knows the dialect.

mod alone;
mod backup;
mod beside;
mod chain;
mod commit;
mod connection;
mod damage;
mod head;
mod kinds;
mod known;
mod lease;
mod location;
mod migrate;
mod page;
mod postgres;
mod raw;
mod rebuild;
mod replay;
mod rows;
mod snapshot;
mod sqlite;
mod staging;
mod statements;
mod store;
mod transfer;
mod verify;
mod writer;

/// For tables that stand beside the log: connections with the limits that the store itself keeps to.
pub mod sql {
    pub use crate::beside::{Beside, Tables};
    pub use crate::connection::{Connection, Owned, Pool, Pooled, Transaction, limited};
}

pub use backup::backup;
pub use chain::{ChainHead, heads};
pub use commit::*;
pub use contract::log::RawRecord;
pub use kinds::belongs;
pub use migrate::{FORMAT, Migrated, StoreFormat, inspect, migrate, migrate_with};
pub use raw::{Entry, Unreadable, decode};
pub use rebuild::{rebuild, rebuild_with};
pub use replay::Replay;
pub use rows::{PAGE_ROWS_MAX, Projector, Row, RowQuery};
pub use snapshot::{PartHash, Snapshot, SnapshotChange, SnapshotMeta, part_hash, snapshot_hash};
pub use store::{READ_LIMIT_MAX, Store};
pub use transfer::{
    LogHash, LogHasher, POSITIONS_SKIPPED, append_raw, copy, go_on_above, log_hash,
};
pub use verify::{PROBLEMS_MAX, VerifyReport, verify, verify_against};
