//! Snapshots: what is folded of one bucket up to a position, as the store keeps it.
//!
//! Invariant: a snapshot holds what follows from the bucket's events up to its position, and nothing
//! else: no measurements, no clock. So whoever begins with it gets what the whole log gives.

use std::collections::{BTreeMap, BTreeSet};

use contract::ids::{Bucket, EndpointKey, Position};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use store::{
    Commit, CommitError, Fence, PartHash, Snapshot, SnapshotChange, SnapshotMeta, Store,
    StoreError, part_hash, snapshot_hash,
};

use super::fold::Entry;
use crate::parking;

/// The part that is of the bucket as a whole; those of endpoints have the endpoint's key.
const OF_BUCKET: &str = "";

/// What people and poison have made of the bucket so far.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OfBucket {
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    parked: BTreeSet<EndpointKey>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    skipped: BTreeSet<Position>,
}

/// What the store has of a bucket.
#[derive(Clone, Debug, Default)]
pub struct Stored {
    /// None: nothing that could be gone on from.
    pub(super) at: Option<Position>,
    pub(super) hashes: BTreeMap<String, PartHash>,
}

/// What a bucket begins with.
#[derive(Debug)]
pub struct Initial<S> {
    /// Everything of the bucket up to here is in it.
    pub position: Position,
    pub(super) entries: Vec<(EndpointKey, Entry<S>)>,
    pub(super) skipped: BTreeSet<Position>,
    /// Endpoints that were parked, and their history up to the position.
    pub(super) parked: Vec<(EndpointKey, Vec<store::Entry>)>,
    pub(super) stored: Stored,
}

impl<S> Default for Initial<S> {
    /// With nothing.
    fn default() -> Self {
        Self {
            position: Position::START,
            entries: Vec::new(),
            skipped: BTreeSet::new(),
            parked: Vec::new(),
            stored: Stored::default(),
        }
    }
}

impl<S> Initial<S> {
    /// The states of all endpoints. None where one of them was parked, of which there is none.
    pub fn into_states(self) -> Option<BTreeMap<EndpointKey, S>> {
        let states = self.entries.into_iter();
        let states = states.map(|(key, entry)| (key, entry.state));
        self.parked.is_empty().then(|| states.collect())
    }
}

impl<S: DeserializeOwned> Initial<S> {
    /// Reads what a snapshot holds; `history` gives that of a parked endpoint.
    ///
    /// # Errors
    ///
    /// Where a part is not what this version of the fold writes: fold the log from its start.
    pub fn decode(
        snapshot: &Snapshot,
        mut history: impl FnMut(&EndpointKey) -> Vec<store::Entry>,
    ) -> serde_json::Result<Self> {
        let position = snapshot.meta.position;
        let (mut entries, mut of_bucket) = (Vec::new(), OfBucket::default());
        let mut hashes = BTreeMap::new();
        for (key, doc) in &snapshot.parts {
            hashes.insert(key.clone(), part_hash(key, doc));
            if key == OF_BUCKET {
                of_bucket = serde_json::from_str(doc)?;
                continue;
            }
            let endpoint: EndpointKey = key.parse().map_err(serde::de::Error::custom)?;
            entries.push((endpoint, serde_json::from_str(doc)?));
        }
        let parked = of_bucket.parked.into_iter().map(|key| {
            let past = history(&key);
            (key, past)
        });
        Ok(Self {
            position,
            parked: parked.collect(),
            entries,
            skipped: of_bucket.skipped,
            stored: Stored {
                at: Some(position),
                hashes,
            },
        })
    }
}

/// A change of a stored snapshot, on its way into the store.
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
        stored: &Stored,
        entries: impl Iterator<Item = (&'a EndpointKey, Option<&'a Entry<S>>)>,
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
        let none = parked.is_empty() && skipped.is_empty();
        let of_bucket = OfBucket { parked, skipped };
        let of_bucket = match none {
            true => None,
            false => Some(serde_json::to_string(&of_bucket)?),
        };
        draft.put(OF_BUCKET, of_bucket);
        Ok(draft)
    }

    /// What is stored already, or never was, is left out.
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

    /// The whole snapshot, of a draft that holds everything; for tests without a store.
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

/// Reads what a bucket begins with: the stored snapshot, or nothing. `consumer` is the name that snapshots
/// are stored under.
///
/// # Errors
///
/// Where the store cannot be read: try again.
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
    if let Some(doc) = snapshot.parts.get(OF_BUCKET)
        && let Ok(of_bucket) = serde_json::from_str::<OfBucket>(doc)
    {
        for key in of_bucket.parked {
            let past = parking::history(store.clone(), key.clone(), snapshot.meta.position);
            histories.insert(key, past.await?);
        }
    }
    let initial = Initial::decode(&snapshot, |key| histories.remove(key).unwrap_or_default());
    Ok(initial.unwrap_or_else(|error| {
        tracing::warn!(consumer, %bucket, %error, "a snapshot cannot be read and is rebuilt from the log");
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
) -> Result<Stored, CommitError> {
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
    Ok(Stored {
        at: Some(position),
        hashes,
    })
}
