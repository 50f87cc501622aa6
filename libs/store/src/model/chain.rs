//! The heads of the buckets' hash chains.

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use serde::{Deserialize, Serialize};

/// The head of a bucket's hash chain. Recorded elsewhere, it later proves that nothing up to it was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BucketHead {
    /// The bucket.
    pub bucket: Bucket,
    /// The position of the bucket's last event.
    pub position: Position,
    /// The hash of that event, which the bucket's next event carries.
    pub hash: ChainHash,
}
