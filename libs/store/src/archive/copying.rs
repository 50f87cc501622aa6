//! Copies archives to another folder, for a copy of the store.
//!
//! Invariant: an existing file is never overwritten; if it is not the same archive, the copy is refused.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::archive::builder::{failed, rename};
use crate::archive::file::ArchiveFile;
use crate::model::archive::Archive;
use crate::model::error::StoreError;

/// Hard-links the files if both folders are on one file system, and copies them otherwise.
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
    match fs::hard_link(&source, &target) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return match ArchiveFile::open(to, archive) {
                Ok(_) => Ok(()),
                Err(_) => Err(StoreError::refused(format!(
                    "{} exists already and belongs to another store, or is damaged: copy into another folder",
                    target.display()
                ))),
            };
        }
        Err(_) => {}
    }
    let partial = target.with_extension("partial");
    fs::copy(&source, &partial)
        .and_then(|_| File::open(&partial)?.sync_all())
        .map_err(|error| failed(&partial, error))?;
    rename(&partial, &target)
}
