//! The event store: the log itself, read models, cursors and fences.
//!
//! [`Store::commit`] is the only way to write. Positions become visible in order. What a commit has
//! acknowledged survives the loss of power.

mod commit;

pub use commit::*;
