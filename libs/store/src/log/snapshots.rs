//! Reads the stored snapshots of consumers.
//!
//! Invariant: a snapshot is returned only if it is complete according to its hash, and only if the bucket's
//! chain still contains the event it was taken at.

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};

use crate::archive::archive_set::ArchiveSet;
use crate::archive::combined;
use crate::log::store::Store;
use crate::model::error::StoreError;
use crate::model::snapshot::{PartHash, Snapshot, part_hash, snapshot_hash};
use crate::sql::connection::Connection;
use crate::sql::statements;

/// Why no snapshot is returned.
enum NoSnapshot {
    /// No snapshot is stored.
    Missing,
    OtherVersion(u32),
    /// The stored snapshot is damaged or of another log, with the reason.
    Unusable(String),
    /// The store could not be read.
    Failed(StoreError),
}

impl From<StoreError> for NoSnapshot {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Damaged(detail) => Self::Unusable(format!("it is damaged: {detail}")),
            error => Self::Failed(error),
        }
    }
}

impl From<sqlx::Error> for NoSnapshot {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::ColumnDecode { .. } => Self::Unusable(format!("it is damaged: {error}")),
            error => StoreError::from(error).into(),
        }
    }
}

impl Store {
    /// Returns the stored snapshot of this consumer, bucket and fold version. None if there is none, if it
    /// is of another version or damaged, or if it is of another log: it is past the end of this one, or the
    /// bucket's last event at or below its position has a different hash. The reason is logged. Fails only
    /// if the store cannot be read.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn snapshot(
        &self,
        consumer: &str,
        bucket: Bucket,
        version: u32,
    ) -> Result<Option<Snapshot>, StoreError> {
        let mut reader = self.reader().await?;
        // One database snapshot, so that a concurrent replacement is never read partially.
        let mut transaction = reader.snapshot().await?;
        match read(
            self.archive_set(),
            &mut transaction.get(),
            consumer,
            bucket,
            version,
        )
        .await
        {
            Ok(snapshot) => {
                transaction.rollback().await?;
                Ok(Some(snapshot))
            }
            Err(NoSnapshot::Missing) => Ok(None),
            Err(NoSnapshot::OtherVersion(stored)) => {
                tracing::info!(
                    consumer, %bucket, stored, version,
                    "stored snapshot is of another version, folding the log from its start"
                );
                Ok(None)
            }
            Err(NoSnapshot::Unusable(reason)) => {
                tracing::warn!(
                    consumer, %bucket, reason,
                    "stored snapshot is unusable, folding the log from its start"
                );
                Ok(None)
            }
            Err(NoSnapshot::Failed(error)) => Err(error),
        }
    }
}

impl Store {
    /// Returns the hash of a bucket's last event at or below a position, for a snapshot taken there.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or is closed.
    pub async fn event_hash(
        &self,
        bucket: Bucket,
        at: Position,
    ) -> Result<Option<ChainHash>, StoreError> {
        let mut reader = self.reader().await?;
        let last =
            combined::last_of_bucket(self.archive_set(), &mut reader.get(), bucket, at).await?;
        Ok(last.map(|(_, hash)| hash))
    }
}

async fn read(
    archive_set: &ArchiveSet,
    connection: &mut Connection<'_>,
    consumer: &str,
    bucket: Bucket,
    version: u32,
) -> Result<Snapshot, NoSnapshot> {
    let stored = statements::snapshot(connection, consumer, bucket).await?;
    let (meta, hash) = stored.ok_or(NoSnapshot::Missing)?;
    if meta.version != version {
        return Err(NoSnapshot::OtherVersion(meta.version));
    }
    let parts = statements::snapshot_parts(connection, consumer, bucket).await?;
    let hashes = parts.iter().map(|(key, doc)| (key, part_hash(key, doc)));
    let hashes: Vec<(&String, PartHash)> = hashes.collect();
    if snapshot_hash(&meta, hashes.iter().map(|(key, hash)| (key.as_str(), hash))) != hash {
        return Err(NoSnapshot::Unusable(
            "it is damaged: its hash does not match its parts".to_owned(),
        ));
    }
    let at = meta.position;
    // Positions above the head may still be assigned to events that the snapshot would wrongly claim to cover.
    let head = statements::head(connection).await?;
    if at > head {
        return Err(NoSnapshot::Unusable(format!(
            "it is of another log: it is at {at}, but this log ends at {head}"
        )));
    }
    let last = combined::last_of_bucket(archive_set, connection, bucket, at).await?;
    if last.map(|(_, hash)| hash) != meta.event_hash {
        return Err(NoSnapshot::Unusable(format!(
            "it is of another log: it was taken with a different last event of the bucket up to {at}"
        )));
    }
    Ok(Snapshot { meta, parts })
}
