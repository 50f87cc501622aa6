//! Database access: opening, connections with time limits, and all SQL.
//!
//! `sqlite` and `postgres` contain what is specific to each (opening, locks, migrations, bulk inserts) and
//! `statements` all other SQL; nothing above them knows the dialect.

pub(crate) mod auxiliary;
pub(crate) mod columns;
pub(crate) mod connection;
pub(crate) mod damage;
pub(crate) mod db_error;
pub(crate) mod location;
pub(crate) mod page;
pub(crate) mod postgres;
pub(crate) mod sqlite;
pub(crate) mod statements;

pub use auxiliary::{AuxiliaryDatabase, AuxiliaryTables};
pub use connection::{
    Connection, OwnedConnection, Pool, PooledConnection, Transaction, with_timeout,
};
