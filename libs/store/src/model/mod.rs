//! The store's inputs and outputs: commits, stored events, rows, snapshots and errors. Nothing here
//! accesses a database.

pub(crate) mod archive;
pub(crate) mod chain;
pub(crate) mod commit;
pub(crate) mod error;
pub(crate) mod kinds;
pub(crate) mod raw;
pub(crate) mod rows;
pub(crate) mod snapshot;
