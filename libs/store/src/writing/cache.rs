//! The writer's cache of log state, against which it checks a batch.
//!
//! Invariant: always equal to the database. In SQLite nobody else writes, so the cache is kept across
//! batches and reloaded after a failure. In PostgreSQL it is refreshed for each batch, under the locks
//! that keep it valid until the batch is committed.

use std::collections::{BTreeMap, HashMap};

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::StreamName;
use contract::time::Timestamp;

use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::columns::{SnapshotPosition, StoredIdempotencyKey};
use crate::sql::connection::Connection;
use crate::sql::statements;

/// The maximum number of cached stream versions, fences, cursors and snapshot positions; beyond it, they
/// are evicted.
const CACHED_MAX: usize = 100_000;

/// The last event of a bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CachedHead {
    pub position: Position,
    /// Loaded on first use.
    pub hash: Option<ChainHash>,
}

#[derive(Default)]
pub(crate) struct WriterCache {
    /// The last position that was assigned.
    pub head: Position,
    /// The lowest position that may be assigned.
    pub floor: Position,
    /// The heads of all non-empty buckets.
    pub bucket_heads: BTreeMap<Bucket, CachedHead>,
    pub last_time: Option<Timestamp>,
    pub versions: HashMap<String, u64>,
    pub fences: HashMap<String, u64>,
    pub cursors: HashMap<(&'static str, Bucket), Position>,
    /// None if no snapshot is stored.
    pub snapshots: HashMap<(String, Bucket), Option<SnapshotPosition>>,
    /// The stored keys that the batch names; None if they are looked up one by one.
    pub idempotency_keys: Option<BTreeMap<String, StoredIdempotencyKey>>,
}

impl WriterCache {
    /// Loads the state that is kept across batches.
    pub(crate) async fn load(connection: &mut Connection<'_>) -> Result<Self, StoreError> {
        if let Connection::Postgres(..) = connection {
            return Ok(Self::default());
        }
        let heads = statements::bucket_heads(connection).await?.into_iter();
        let heads = heads.map(|(bucket, position)| {
            let hash = None;
            (bucket, CachedHead { position, hash })
        });
        Ok(Self {
            head: statements::head(connection).await?,
            floor: statements::next_position(connection)
                .await?
                .unwrap_or_default(),
            bucket_heads: heads.collect(),
            last_time: statements::last_time(connection).await?,
            ..Self::default()
        })
    }

    pub(crate) fn evict_if_full(&mut self) {
        let cached = self.versions.len() + self.fences.len() + self.cursors.len();
        if cached + self.snapshots.len() > CACHED_MAX {
            self.versions.clear();
            self.fences.clear();
            self.cursors.clear();
            self.snapshots.clear();
        }
    }

    /// Ensures that the hash of the bucket's last event is loaded.
    pub(crate) async fn load_head_hash(
        &mut self,
        connection: &mut Connection<'_>,
        bucket: Bucket,
    ) -> Result<(), StoreError> {
        let Some(head) = self.bucket_heads.get_mut(&bucket) else {
            return Ok(());
        };
        if head.hash.is_some() {
            return Ok(());
        }
        let last = statements::read_at(connection, head.position).await?;
        let last = last.ok_or_else(|| {
            let at = head.position;
            StoreError::database(format!(
                "the last event of bucket {bucket}, at {at}, is missing"
            ))
        })?;
        head.hash = Some(EventRow::from_raw(&last).hash());
        Ok(())
    }

    /// Allocates the next position for an event of this bucket. Returns it with the position and the hash
    /// of the bucket's last event; the hash must be loaded.
    pub(crate) fn allocate(&mut self, bucket: Bucket) -> (Position, Position, ChainHash) {
        self.head = Position((self.head.0 + 1).max(self.floor.0));
        match self.bucket_heads.get(&bucket) {
            None => (self.head, Position::START, ChainHash::START),
            Some(head) => {
                let hash = head.hash.unwrap_or_default();
                assert!(
                    head.hash.is_some(),
                    "the hash of a non-empty bucket is loaded"
                );
                (self.head, head.position, hash)
            }
        }
    }

    /// Makes this event the head of its bucket.
    pub(crate) fn set_bucket_head(&mut self, event: &EventRow<'_>) {
        let head = CachedHead {
            position: event.position,
            hash: Some(event.hash()),
        };
        self.bucket_heads.insert(event.bucket, head);
    }

    pub(crate) async fn version(
        &mut self,
        connection: &mut Connection<'_>,
        stream: &StreamName,
    ) -> Result<u64, StoreError> {
        if let Some(version) = self.versions.get(stream.as_str()) {
            return Ok(*version);
        }
        let version = statements::stream_version(connection, stream.as_str()).await?;
        self.versions.insert(stream.as_str().to_owned(), version);
        Ok(version)
    }

    pub(crate) async fn generation(
        &mut self,
        connection: &mut Connection<'_>,
        name: &str,
    ) -> Result<u64, StoreError> {
        if let Some(generation) = self.fences.get(name) {
            return Ok(*generation);
        }
        let generation = statements::fence(connection, name).await?;
        self.fences.insert(name.to_owned(), generation);
        Ok(generation)
    }

    pub(crate) async fn cursor(
        &mut self,
        connection: &mut Connection<'_>,
        consumer: &'static str,
        bucket: Bucket,
    ) -> Result<Position, StoreError> {
        if let Some(position) = self.cursors.get(&(consumer, bucket)) {
            return Ok(*position);
        }
        let position = statements::cursor(connection, consumer, bucket).await?;
        self.cursors.insert((consumer, bucket), position);
        Ok(position)
    }

    pub(crate) async fn snapshot(
        &mut self,
        connection: &mut Connection<'_>,
        consumer: &str,
        bucket: Bucket,
    ) -> Result<Option<SnapshotPosition>, StoreError> {
        let key = (consumer.to_owned(), bucket);
        if let Some(position) = self.snapshots.get(&key) {
            return Ok(*position);
        }
        let position = statements::snapshot_position(connection, consumer, bucket).await?;
        self.snapshots.insert(key, position);
        Ok(position)
    }

    pub(crate) async fn idempotency_key(
        &self,
        connection: &mut Connection<'_>,
        key: &str,
    ) -> Result<Option<StoredIdempotencyKey>, StoreError> {
        match &self.idempotency_keys {
            Some(idempotency_keys) => Ok(idempotency_keys.get(key).cloned()),
            None => statements::idempotency_key(connection, key).await,
        }
    }
}
