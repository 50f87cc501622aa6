//! The only write path: one task that checks commits, assigns positions and writes.

pub(crate) mod cache;
pub(crate) mod catch_up;
pub(crate) mod exclusive;
pub(crate) mod head;
pub(crate) mod lease;
pub(crate) mod restore;
pub(crate) mod sealing;
pub(crate) mod staging;
pub(crate) mod writer;
