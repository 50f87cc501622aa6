//! What is handed in and comes out: commits, events as they are stored, rows, snapshots, and what can go
//! wrong. Nothing here asks a database.

pub(crate) mod archive;
pub(crate) mod chain;
pub(crate) mod commit;
pub(crate) mod error;
pub(crate) mod kinds;
pub(crate) mod raw;
pub(crate) mod rows;
pub(crate) mod snapshot;
