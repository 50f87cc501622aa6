//! The number of a store's format, and which of them this binary can read.

use crate::model::error::StoreError;
use crate::sql::location::Location;

/// The format that this binary writes, and the newest that it can read.
pub const FORMAT: u64 = 2;

pub(crate) fn known_format(location: &Location, format: &str) -> Result<u64, StoreError> {
    match format.parse::<u64>() {
        Ok(known) if known <= FORMAT => Ok(known),
        _ => Err(StoreError::Refused(format!(
            "{location} has store format {format}, and this binary knows formats up to {FORMAT}: use the release that wrote it or a newer one"
        ))),
    }
}
