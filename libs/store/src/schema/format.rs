//! The number of a store's format, and which of them this binary can read.

use crate::model::error::StoreError;
use crate::sql::location::Location;

/// The format that this binary gives to a store.
pub const FORMAT: u64 = 2;

/// The format of a store whose log begins in archives: what knows none of them would take it for a log with
/// its beginning missing.
pub const FORMAT_WITH_ARCHIVES: u64 = 3;

/// The newest that this binary can read.
const NEWEST: u64 = FORMAT_WITH_ARCHIVES;

pub(crate) fn known_format(location: &Location, format: &str) -> Result<u64, StoreError> {
    match format.parse::<u64>() {
        Ok(known) if known <= NEWEST => Ok(known),
        _ => Err(StoreError::Refused(format!(
            "{location} has store format {format}, and this binary knows formats up to {NEWEST}: use the release that wrote it or a newer one"
        ))),
    }
}
