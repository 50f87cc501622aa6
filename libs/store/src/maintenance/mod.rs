//! Operations on an entire store, through its handle: checks, copies, rebuilds.

pub(crate) mod backup;
pub(crate) mod heads;
pub(crate) mod rebuild;
pub(crate) mod retained;
pub(crate) mod saved_heads;
pub(crate) mod seal;
pub(crate) mod transfer;
pub(crate) mod verify;
