//! The store's record of one archive file.

use contract::ids::Position;
use contract::time::Timestamp;
use serde::{Deserialize, Serialize};

/// One sealed file, as listed in the store. Files are contiguous from the start of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Archive {
    /// The position of its first event.
    pub first: Position,
    /// The position of its last event.
    pub last: Position,
    /// The file name within the archive folder.
    pub file: String,
    /// SHA-256 of its table of contents, in hexadecimal; that table holds the hash of every block.
    pub hash: String,
    /// The number of events in it.
    pub events: u64,
    /// The size of the file in bytes.
    pub bytes: u64,
    /// When it was sealed.
    pub sealed_at: Timestamp,
}
