//! The heads of the hash chains, to be recorded outside the store.

use contract::ids::{Bucket, Position};

use crate::log::store::Store;
use crate::model::chain::BucketHead;
use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::statements;

/// Returns the chain heads of all non-empty buckets, read in one database snapshot.
///
/// # Errors
///
/// If the store cannot be read or is closed.
pub async fn heads(store: &Store) -> Result<Vec<BucketHead>, StoreError> {
    let mut reader = store.reader().await?;
    let mut snapshot = reader.snapshot().await?;
    let mut heads = Vec::new();
    for bucket in Bucket::all() {
        let last =
            statements::last_of_bucket(&mut snapshot.get(), bucket, Position(u64::MAX)).await?;
        heads.extend(last.map(|event| BucketHead {
            bucket,
            position: event.position,
            hash: EventRow::from_raw(&event).hash(),
        }));
    }
    snapshot.rollback().await?;
    Ok(heads)
}
