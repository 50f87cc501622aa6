//! A file that holds a part of the log's beginning.

use contract::ids::Position;
use contract::time::Timestamp;
use serde::{Deserialize, Serialize};

/// One sealed file, as the store knows it. Files follow each other without a gap, from the log's start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Archive {
    /// The positions of its first and of its last event.
    pub first: Position,
    pub last: Position,
    /// Its name in the folder of archives.
    pub file: String,
    /// SHA-256 of its list of contents, in hexadecimal; that list has the hash of every block.
    pub hash: String,
    pub events: u64,
    /// The size of the file.
    pub bytes: u64,
    pub sealed_at: Timestamp,
}
