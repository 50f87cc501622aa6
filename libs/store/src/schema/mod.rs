//! The schema of a store: its format, and migrations to this binary's.

pub(crate) mod chain;
pub(crate) mod format;
pub(crate) mod migrate;
