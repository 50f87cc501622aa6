//! The version numbers of the store format, and those that this binary can read.

use crate::model::error::StoreError;
use crate::sql::location::StoreLocation;

/// The format of stores that this binary creates.
pub const FORMAT: u64 = 2;

/// The format of a store whose log begins in archives: to a release without archives, the beginning of the
/// log would appear to be missing.
pub const FORMAT_WITH_ARCHIVES: u64 = 3;

/// The newest format that this binary can read.
const NEWEST: u64 = FORMAT_WITH_ARCHIVES;

pub(crate) fn known_format(location: &StoreLocation, format: &str) -> Result<u64, StoreError> {
    match format.parse::<u64>() {
        Ok(version) if version <= NEWEST => Ok(version),
        _ => Err(StoreError::refused(format!(
            "{location} has store format {format}, but this binary supports formats up to {NEWEST}: use the release that wrote it or a newer one"
        ))),
    }
}
