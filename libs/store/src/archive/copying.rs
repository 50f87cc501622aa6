//! Copies archives to another folder, for a copy of the store.
//!
//! Invariants: an existing file is never overwritten; if it is not the same archive, the copy is refused. A copy
//! is a file of its own, not a hard link, so that what overwrites the original does not reach it.

use std::fs::{self, File};
use std::path::Path;

use crate::archive::builder::{failed, rename};
use crate::archive::file::ArchiveFile;
use crate::model::archive::Archive;
use crate::model::error::StoreError;

/// Copies the files that the other folder does not have yet.
pub(crate) fn copy_all(from: &Path, to: &Path, archives: &[Archive]) -> Result<(), StoreError> {
    if from == to {
        return Ok(());
    }
    fs::create_dir_all(to).map_err(|error| failed(to, error))?;
    archives
        .iter()
        .try_for_each(|archive| copy_one(from, to, archive))
}

fn copy_one(from: &Path, to: &Path, archive: &Archive) -> Result<(), StoreError> {
    let (source, target) = (from.join(&archive.file), to.join(&archive.file));
    // Checks that it is the file that was sealed.
    ArchiveFile::open(from, archive)?;
    if target.exists() {
        return match ArchiveFile::open(to, archive) {
            Ok(_) => Ok(()),
            Err(error) => Err(StoreError::refused(format!(
                "{} exists already and belongs to another store, or is damaged: copy into another folder",
                target.display()
            ))
            .caused_by(error)),
        };
    }
    let partial = target.with_extension("partial");
    fs::copy(&source, &partial)
        .and_then(|_| File::open(&partial)?.sync_all())
        .map_err(|error| failed(&partial, error))?;
    rename(&partial, &target)
}
