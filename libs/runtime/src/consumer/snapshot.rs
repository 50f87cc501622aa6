//! Snapshots: the folded state of one bucket up to a position, as stored.
//!
//! Invariant: a snapshot follows from the bucket's events up to its position alone: no
//! measurements, no clock. So starting from it gives the same as folding the whole log.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use contract::ids::{Bucket, EndpointKey, Position};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use store::{
    Commit, CommitError, Fence, PartHash, Snapshot, SnapshotChange, SnapshotMeta, Store,
    StoreError, part_hash, snapshot_hash,
};

use super::fold::FoldedEntry;
use crate::parking;

/// The key of the part that concerns the whole bucket; other parts have the endpoint's key.
const BUCKET_PART: &str = "";

/// A snapshot is written after this many events that would have to be applied again, this many that
/// would have to be read again, or this long after the first of them.
const APPLIED_MAX: usize = 128;
const SKIPPED_MAX: usize = 8192;
const AGE_MAX: Duration = Duration::from_secs(300);
/// The same as `APPLIED_MAX` while catching up, so that an interrupted consumer does not start from
/// scratch.
const CATCH_UP_APPLIED_MAX: usize = 20_000;

/// How far a stored snapshot is behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Events that would have to be applied again.
    pub applied: usize,
    /// Events that would only have to be read again.
    pub skipped: usize,
}

/// Whether a snapshot is due of a bucket with this backlog, the first event of which is so old.
pub(super) fn is_due(backlog: Backlog, age: Duration, is_caught_up: bool) -> bool {
    let Backlog { applied, skipped } = backlog;
    match is_caught_up {
        true => applied >= APPLIED_MAX || skipped >= SKIPPED_MAX || age >= AGE_MAX,
        false => applied >= CATCH_UP_APPLIED_MAX,
    }
}

/// Parking state of the bucket.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BucketPart {
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    parked: BTreeSet<EndpointKey>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    skipped: BTreeSet<Position>,
}

/// The snapshot of a bucket in the store.
#[derive(Clone, Debug, Default)]
pub struct StoredSnapshot {
    /// `None` if there is no usable snapshot.
    pub(super) at: Option<Position>,
    pub(super) hashes: BTreeMap<String, PartHash>,
}

/// The initial state of a bucket.
#[derive(Debug)]
pub struct Initial<S> {
    /// Everything in the bucket up to here is included.
    pub position: Position,
    pub(super) entries: Vec<(EndpointKey, FoldedEntry<S>)>,
    pub(super) skipped: BTreeSet<Position>,
    /// Endpoints that were parked, and their history up to the position.
    pub(super) parked: Vec<(EndpointKey, Vec<store::LogEntry>)>,
    pub(super) stored: StoredSnapshot,
}

impl<S> Default for Initial<S> {
    /// An empty state.
    fn default() -> Self {
        Self {
            position: Position::START,
            entries: Vec::new(),
            skipped: BTreeSet::new(),
            parked: Vec::new(),
            stored: StoredSnapshot::default(),
        }
    }
}

impl<S> Initial<S> {
    /// Returns the states of all endpoints, or `None` if one of them was parked and so has no
    /// state.
    pub fn into_states(self) -> Option<BTreeMap<EndpointKey, S>> {
        let states = self.entries.into_iter();
        let states = states.map(|(key, entry)| (key, entry.state));
        self.parked.is_empty().then(|| states.collect())
    }
}

impl<S: DeserializeOwned> Initial<S> {
    /// Decodes a snapshot; `history` returns that of a parked endpoint.
    ///
    /// # Errors
    ///
    /// If a part is not in this version's format; the log must be folded from its start.
    pub fn decode(
        snapshot: &Snapshot,
        mut history: impl FnMut(&EndpointKey) -> Vec<store::LogEntry>,
    ) -> serde_json::Result<Self> {
        let position = snapshot.meta.position;
        let (mut entries, mut bucket_part) = (Vec::new(), BucketPart::default());
        let mut hashes = BTreeMap::new();
        for (key, doc) in &snapshot.parts {
            hashes.insert(key.clone(), part_hash(key, doc));
            if key == BUCKET_PART {
                bucket_part = serde_json::from_str(doc)?;
                continue;
            }
            let endpoint: EndpointKey = key.parse().map_err(serde::de::Error::custom)?;
            entries.push((endpoint, serde_json::from_str(doc)?));
        }
        let parked = bucket_part.parked.into_iter().map(|key| {
            let entries = history(&key);
            (key, entries)
        });
        Ok(Self {
            position,
            parked: parked.collect(),
            entries,
            skipped: bucket_part.skipped,
            stored: StoredSnapshot {
                at: Some(position),
                hashes,
            },
        })
    }
}

/// A change of a stored snapshot, to be written to the store.
#[derive(Debug)]
pub struct Draft {
    position: Position,
    base: Option<Position>,
    parts: BTreeMap<String, Option<String>>,
    hashes: BTreeMap<String, PartHash>,
}

impl Draft {
    pub(super) fn make<'a, S: Serialize + 'a>(
        position: Position,
        stored: &StoredSnapshot,
        entries: impl Iterator<Item = (&'a EndpointKey, Option<&'a FoldedEntry<S>>)>,
        parked: BTreeSet<EndpointKey>,
        skipped: BTreeSet<Position>,
    ) -> serde_json::Result<Self> {
        let mut draft = Self {
            position,
            base: stored.at,
            parts: BTreeMap::new(),
            hashes: stored.hashes.clone(),
        };
        for (key, entry) in entries {
            let doc = entry.map(serde_json::to_string).transpose()?;
            draft.put(key.as_str(), doc);
        }
        let is_empty = parked.is_empty() && skipped.is_empty();
        let bucket_part = BucketPart { parked, skipped };
        let bucket_part = match is_empty {
            true => None,
            false => Some(serde_json::to_string(&bucket_part)?),
        };
        draft.put(BUCKET_PART, bucket_part);
        Ok(draft)
    }

    /// Adds a part, unless it is stored already or never was.
    fn put(&mut self, key: &str, doc: Option<String>) {
        let hash = doc.as_ref().map(|doc| part_hash(key, doc));
        if self.hashes.get(key) == hash.as_ref() {
            return;
        }
        match hash {
            Some(hash) => self.hashes.insert(key.to_owned(), hash),
            None => self.hashes.remove(key),
        };
        self.parts.insert(key.to_owned(), doc);
    }

    /// The complete snapshot, for tests without a store. The draft must be complete.
    pub fn into_snapshot(self, consumer: &str, bucket: Bucket, version: u32) -> Snapshot {
        let parts = self.parts.into_iter();
        Snapshot {
            meta: SnapshotMeta {
                consumer: consumer.to_owned(),
                bucket,
                version,
                position: self.position,
                event_hash: None,
            },
            parts: parts.filter_map(|(key, doc)| Some((key, doc?))).collect(),
        }
    }
}

/// Loads the initial state of a bucket: its stored snapshot, or nothing. `consumer` is the name
/// under which snapshots are stored.
///
/// # Errors
///
/// If the store cannot be read; retry.
pub async fn load<S: DeserializeOwned>(
    store: &Store,
    consumer: &str,
    bucket: Bucket,
    version: u32,
) -> Result<Initial<S>, StoreError> {
    let Some(snapshot) = store.snapshot(consumer, bucket, version).await? else {
        return Ok(Initial::default());
    };
    let mut histories = BTreeMap::new();
    if let Some(doc) = snapshot.parts.get(BUCKET_PART)
        && let Ok(bucket_part) = serde_json::from_str::<BucketPart>(doc)
    {
        for key in bucket_part.parked {
            let history = parking::history(store.clone(), key.clone(), snapshot.meta.position);
            histories.insert(key, history.await?);
        }
    }
    let initial = Initial::decode(&snapshot, |key| histories.remove(key).unwrap_or_default());
    Ok(initial.unwrap_or_else(|error| {
        tracing::warn!(consumer, %bucket, %error, "failed to decode a snapshot, rebuilding it from the log");
        Initial::default()
    }))
}

/// Stores a draft under the fence of its bucket.
pub(super) async fn save(
    store: Store,
    consumer: String,
    bucket: Bucket,
    version: u32,
    fence: Fence,
    draft: Draft,
) -> Result<StoredSnapshot, CommitError> {
    let Draft {
        position,
        base,
        parts,
        hashes,
    } = draft;
    let meta = SnapshotMeta {
        event_hash: store.event_hash(bucket, position).await?,
        consumer,
        bucket,
        version,
        position,
    };
    let hash = snapshot_hash(&meta, hashes.iter().map(|(key, hash)| (key.as_str(), hash)));
    let commit = Commit {
        snapshot: Some(SnapshotChange {
            meta,
            base,
            parts,
            hash,
        }),
        fence: Some(fence),
        ..Commit::default()
    };
    store.commit(commit).await?;
    Ok(StoredSnapshot {
        at: Some(position),
        hashes,
    })
}
