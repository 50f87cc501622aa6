//! The handle to an open store, for commits and reads.

pub(crate) mod follow;
pub(crate) mod leases;
pub(crate) mod page_reader;
pub(crate) mod replay;
pub(crate) mod shared_pages;
pub(crate) mod snapshots;
pub(crate) mod store;
