//! Archives: the beginning of the log in sealed files, and reading it as if it were still in the table.
//!
//! Invariants: files are contiguous; a file is listed only once it is complete, durable and read back;
//! listed events are read from the file, whatever the table still has of them; a file that is missing or
//! modified is an error that names it, and never a gap.

pub(crate) mod archive_set;
pub(crate) mod builder;
pub(crate) mod combined;
pub(crate) mod contents;
pub(crate) mod copying;
pub(crate) mod file;
pub(crate) mod lru;
