//! An open store: the handle that commits and reads.

pub(crate) mod replay;
pub(crate) mod store;
