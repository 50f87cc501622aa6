//! The databases: opening them, connections with limits, and every SQL text.
//!
//! `sqlite` and `postgres` hold what is particular to either (opening, locks, migrations, inserts of
//! many rows) and `statements` every other SQL text; nothing above them knows the dialect.

pub(crate) mod beside;
pub(crate) mod columns;
pub(crate) mod connection;
pub(crate) mod damage;
pub(crate) mod fault;
pub(crate) mod location;
pub(crate) mod page;
pub(crate) mod postgres;
pub(crate) mod sqlite;
pub(crate) mod statements;

pub use beside::{Beside, Tables};
pub use connection::{Connection, Owned, Pool, Pooled, Transaction, limited};
