//! Snapshots: a consumer's folded state of one bucket, stored so that a start does not have to fold the
//! entire log. They are written in parts, one per endpoint; a change names only the parts that differ.
//!
//! Invariants: a snapshot is returned only if it is complete according to its hash, and only if the
//! bucket's chain still contains the event it was taken at. It holds nothing that the log does not:
//! without it, the log is folded from its start.

use std::collections::BTreeMap;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use sha2::{Digest, Sha256};

/// Prefixes of the hashed data (domain separation), so that neither hash collides with any other.
const PART_DOMAIN: &[u8] = b"penstock snapshot part 1";
const DOMAIN: &[u8] = b"penstock snapshot 1";

/// SHA-256 of one part, its key and its document; see [`part_hash`].
pub type PartHash = [u8; 32];

/// Returns the hash of a part: over key and document, each prefixed with its length.
pub fn part_hash(key: &str, doc: &str) -> PartHash {
    let mut hash = Sha256::new_with_prefix(PART_DOMAIN);
    feed(&mut hash, key);
    feed(&mut hash, doc);
    hash.finalize().into()
}

/// Returns the hash of a complete snapshot, in hexadecimal: over `meta`, then the key and the hash of each
/// part. The parts must be in order of their keys.
pub fn snapshot_hash<'a>(
    meta: &SnapshotMeta,
    parts: impl IntoIterator<Item = (&'a str, &'a PartHash)>,
) -> String {
    let mut hash = Sha256::new_with_prefix(DOMAIN);
    feed(&mut hash, &meta.consumer);
    for number in [
        u64::from(meta.bucket.0),
        u64::from(meta.version),
        meta.position.0,
    ] {
        hash.update(number.to_be_bytes());
    }
    hash.update([u8::from(meta.event_hash.is_some())]);
    hash.update(meta.event_hash.unwrap_or_default().0);
    for (key, part) in parts {
        feed(&mut hash, key);
        hash.update(part);
    }
    let digest = hash.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn feed(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_be_bytes());
    hash.update(text.as_bytes());
}

/// Identifies a snapshot: its consumer, bucket, fold version and position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// `autoscaler`, or `node/ID` for a node's agent.
    pub consumer: String,
    /// The bucket.
    pub bucket: Bucket,
    /// The version of the fold that produced it; snapshots of other versions are unusable.
    pub version: u32,
    /// It covers all events of the bucket up to and including this position.
    pub position: Position,
    /// The chain hash of the bucket's last event at or below `position` (see [`contract::chain`]), which
    /// ties the snapshot to this log; None if the bucket has no such event.
    pub event_hash: Option<ChainHash>,
}

/// A change to a stored snapshot, part of a [`Commit`](crate::Commit).
#[derive(Clone, Debug)]
pub struct SnapshotChange {
    /// Identifies the snapshot after this change.
    pub meta: SnapshotMeta,
    /// The position of the stored snapshot that `parts` applies to. None: `parts` is the complete snapshot
    /// and replaces the stored one.
    pub base: Option<Position>,
    /// Changed parts by key (an endpoint's key, or "" for state of the bucket itself), as JSON; None
    /// deletes the part.
    pub parts: BTreeMap<String, Option<String>>,
    /// [`snapshot_hash`] of the complete snapshot after this change.
    pub hash: String,
}

impl SnapshotChange {
    /// The size of the written keys and documents in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let parts = self.parts.iter();
        parts
            .map(|(key, doc)| key.len() + doc.as_ref().map_or(0, String::len))
            .sum()
    }

    /// Merges a later change that is based on this one.
    pub(crate) fn merge(&mut self, later: &Self) {
        self.meta.clone_from(&later.meta);
        self.hash.clone_from(&later.hash);
        let parts = later.parts.iter();
        self.parts
            .extend(parts.map(|(key, doc)| (key.clone(), doc.clone())));
    }
}

/// A stored snapshot whose hash was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Identifies it.
    pub meta: SnapshotMeta,
    /// Documents by key.
    pub parts: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> SnapshotMeta {
        SnapshotMeta {
            consumer: "autoscaler".to_owned(),
            bucket: Bucket(3),
            version: 1,
            position: Position(7),
            event_hash: Some(ChainHash::START),
        }
    }

    #[test]
    fn moving_bytes_between_key_and_document_changes_the_hash() {
        let text = "a0\u{0}\u{2}12";
        let splits = text.char_indices().map(|(at, _)| text.split_at(at));
        let hashes = splits.map(|(key, doc)| part_hash(key, doc));
        let distinct: std::collections::BTreeSet<PartHash> = hashes.collect();
        assert_eq!(distinct.len(), text.chars().count());
    }

    #[test]
    fn the_hash_covers_every_field_of_a_snapshot() {
        let (one, other) = (part_hash("a", "1"), part_hash("b", "2"));
        let all = [("a", &one), ("b", &other)];
        let changes: [fn(&mut SnapshotMeta); 6] = [
            |_| {},
            |meta| meta.consumer.push('s'),
            |meta| meta.bucket = Bucket(4),
            |meta| meta.version = 2,
            |meta| meta.position = Position(8),
            |meta| meta.event_hash = None,
        ];
        let mut hashes: Vec<String> = changes
            .iter()
            .map(|change| {
                let mut meta = meta();
                change(&mut meta);
                snapshot_hash(&meta, all)
            })
            .collect();
        for parts in [&all[..1], &[], &[("a", &other), ("b", &other)]] {
            hashes.push(snapshot_hash(&meta(), parts.iter().copied()));
        }
        hashes.push(snapshot_hash(&meta(), [("a", &one), ("c", &other)]));
        assert!(hashes.iter().all(|hash| hash.len() == 64), "{hashes:?}");
        let distinct: std::collections::BTreeSet<&String> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len(), "{hashes:?}");
    }
}
