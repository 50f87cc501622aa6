//! Giving out what consumers have stored of their folds.
//!
//! Invariant: a snapshot is given out only whole, as its hash says, and only where the bucket's chain of
//! events still leads to where it was made.

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};

use crate::archive::joint;
use crate::archive::shelf::Shelf;
use crate::log::store::Store;
use crate::model::error::StoreError;
use crate::model::snapshot::{PartHash, Snapshot, part_hash, snapshot_hash};
use crate::sql::connection::Connection;
use crate::sql::statements;

/// Why there is no snapshot to give out.
enum Without {
    /// None is stored.
    Missing,
    OtherVersion(u32),
    /// What is stored is damaged, or of another log: a sentence.
    Unusable(String),
    /// The store cannot be read.
    Failed(StoreError),
}

impl From<StoreError> for Without {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Damaged(detail) => Self::Unusable(format!("it is damaged: {detail}")),
            error => Self::Failed(error),
        }
    }
}

impl From<sqlx::Error> for Without {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::ColumnDecode { .. } => Self::Unusable(format!("it is damaged: {error}")),
            error => StoreError::from(error).into(),
        }
    }
}

impl Store {
    /// The stored snapshot of this consumer, bucket and version of its fold. None where there is none, where
    /// it is of another version or damaged, and where it is of another log: it stands past the end of this
    /// one, or the bucket's last event at or below its position has another hash. Why what is stored is not
    /// given out stands in the log of the process. Fails only where the store cannot be read.
    pub async fn snapshot(
        &self,
        consumer: &str,
        bucket: Bucket,
        version: u32,
    ) -> Result<Option<Snapshot>, StoreError> {
        let mut reader = self.reader().await?;
        // One moment, so that one that is being replaced is never seen half.
        let mut moment = reader.snapshot().await?;
        match read(self.shelf(), &mut moment.get(), consumer, bucket, version).await {
            Ok(snapshot) => {
                moment.rollback().await?;
                Ok(Some(snapshot))
            }
            Err(Without::Missing) => Ok(None),
            Err(Without::OtherVersion(stored)) => {
                tracing::info!(
                    consumer, %bucket, stored, version,
                    "the stored snapshot is of another version, so the log is folded from its start"
                );
                Ok(None)
            }
            Err(Without::Unusable(reason)) => {
                tracing::warn!(
                    consumer, %bucket, reason,
                    "the stored snapshot is of no use, so the log is folded from its start"
                );
                Ok(None)
            }
            Err(Without::Failed(error)) => Err(error),
        }
    }
}

impl Store {
    /// The hash of a bucket's last event at or below a position, for the snapshot that stands there.
    pub async fn event_hash(
        &self,
        bucket: Bucket,
        at: Position,
    ) -> Result<Option<ChainHash>, StoreError> {
        let mut reader = self.reader().await?;
        let last = joint::last_of_bucket(self.shelf(), &mut reader.get(), bucket, at).await?;
        Ok(last.map(|(_, hash)| hash))
    }
}

async fn read(
    shelf: &Shelf,
    connection: &mut Connection<'_>,
    consumer: &str,
    bucket: Bucket,
    version: u32,
) -> Result<Snapshot, Without> {
    let stored = statements::snapshot(connection, consumer, bucket).await?;
    let (meta, hash) = stored.ok_or(Without::Missing)?;
    if meta.version != version {
        return Err(Without::OtherVersion(meta.version));
    }
    let parts = statements::snapshot_parts(connection, consumer, bucket).await?;
    let hashes = parts.iter().map(|(key, doc)| (key, part_hash(key, doc)));
    let hashes: Vec<(&String, PartHash)> = hashes.collect();
    if snapshot_hash(&meta, hashes.iter().map(|(key, hash)| (key.as_str(), hash))) != hash {
        return Err(Without::Unusable(
            "it is damaged: its hash is not that of its parts".to_owned(),
        ));
    }
    let at = meta.position;
    // Events may still get positions above the end of the log, and it would hold them without knowing.
    let head = statements::head(connection).await?;
    if at > head {
        return Err(Without::Unusable(format!(
            "it is of another log: it stands at {at}, and this log ends at {head}"
        )));
    }
    let last = joint::last_of_bucket(shelf, connection, bucket, at).await?;
    if last.map(|(_, hash)| hash) != meta.event_hash {
        return Err(Without::Unusable(format!(
            "it is of another log: the last event of the bucket up to {at} is another one than it was made with"
        )));
    }
    Ok(Snapshot { meta, parts })
}
