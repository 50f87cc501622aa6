//! The tables of a store: which format it has, and how it is brought up to this binary's.

pub(crate) mod chain;
pub(crate) mod format;
pub(crate) mod migrate;
