//! Archives: the beginning of the log in sealed files, and reading it as if it still stood in the table.
//!
//! Invariants: files follow each other without a gap; a file is listed only when it is whole, on the disk
//! and read back; what is listed is read from the file, whatever the table still has of it; a file that is
//! missing or is not as it was sealed is an error that names it, and never a gap.

pub(crate) mod carrying;
pub(crate) mod contents;
pub(crate) mod file;
pub(crate) mod joint;
pub(crate) mod making;
pub(crate) mod recent;
pub(crate) mod shelf;
