//! The ends of chains of hashes.

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use serde::{Deserialize, Serialize};

/// The end of a bucket's chain. Kept elsewhere, it proves later that nothing up to there was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChainHead {
    pub bucket: Bucket,
    pub position: Position,
    pub hash: ChainHash,
}
