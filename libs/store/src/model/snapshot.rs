//! Snapshots: what a consumer of the log has folded of one bucket, kept so that a start need not fold the
//! whole log. They are written in parts, one for each endpoint, of which a change names those that differ.
//!
//! Invariants: a snapshot is given out only whole, as its hash says, and only where the bucket's chain of
//! events still leads to where it was made. It holds nothing that the log does not: without it, the log is
//! folded from its start.

use std::collections::BTreeMap;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use sha2::{Digest, Sha256};

/// Stand before what is hashed, so that neither hash is one of anything else.
const PART_DOMAIN: &[u8] = b"penstock snapshot part 1";
const DOMAIN: &[u8] = b"penstock snapshot 1";

/// SHA-256 of one part, its key and its document; see [`part_hash`].
pub type PartHash = [u8; 32];

/// The hash of a part: over key and document, each after its length.
pub fn part_hash(key: &str, doc: &str) -> PartHash {
    let mut hash = Sha256::new_with_prefix(PART_DOMAIN);
    feed(&mut hash, key);
    feed(&mut hash, doc);
    hash.finalize().into()
}

/// The hash of a whole snapshot, in hexadecimal: over what `meta` says, then the key and the hash of each
/// part. The parts must come in order of their keys.
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

/// Whose snapshot it is, of what, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// `autoscaler`, or `node/ID` for a node's agent.
    pub consumer: String,
    pub bucket: Bucket,
    /// Of the fold that made it: another version's is of no use.
    pub version: u32,
    /// Everything of the bucket up to here is in it.
    pub position: Position,
    /// The chain hash of the bucket's last event at or below `position` (see [`contract::chain`]), so that
    /// a snapshot of another log is not taken for one of this; None where the bucket has none.
    pub event_hash: Option<ChainHash>,
}

/// A change of a stored snapshot, part of a [`Commit`](crate::Commit).
#[derive(Clone, Debug)]
pub struct SnapshotChange {
    pub meta: SnapshotMeta,
    /// The position of the stored snapshot that `parts` is a change of; None: `parts` is all of it, and what
    /// is stored is replaced.
    pub base: Option<Position>,
    /// Changed parts by key (an endpoint's key, or "" for what is of the bucket as a whole), as JSON; None:
    /// the part is gone.
    pub parts: BTreeMap<String, Option<String>>,
    /// [`snapshot_hash`] of the whole snapshot after this change.
    pub hash: String,
}

impl SnapshotChange {
    /// The texts that are written, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let parts = self.parts.iter();
        parts
            .map(|(key, doc)| key.len() + doc.as_ref().map_or(0, String::len))
            .sum()
    }

    /// Makes one change of this one and of a later one that is based on it.
    pub(crate) fn take_in(&mut self, later: &Self) {
        self.meta.clone_from(&later.meta);
        self.hash.clone_from(&later.hash);
        let parts = later.parts.iter();
        self.parts
            .extend(parts.map(|(key, doc)| (key.clone(), doc.clone())));
    }
}

/// A stored snapshot whose hash is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
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
    fn bytes_that_move_between_key_and_document_make_another_hash() {
        let whole = "a0\u{0}\u{2}12";
        let splits = whole.char_indices().map(|(at, _)| whole.split_at(at));
        let hashes = splits.map(|(key, doc)| part_hash(key, doc));
        let distinct: std::collections::BTreeSet<PartHash> = hashes.collect();
        assert_eq!(distinct.len(), whole.chars().count());
    }

    #[test]
    fn everything_about_a_snapshot_counts_in_its_hash() {
        let (one, other) = (part_hash("a", "1"), part_hash("b", "2"));
        let whole = [("a", &one), ("b", &other)];
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
                snapshot_hash(&meta, whole)
            })
            .collect();
        for parts in [&whole[..1], &[], &[("a", &other), ("b", &other)]] {
            hashes.push(snapshot_hash(&meta(), parts.iter().copied()));
        }
        hashes.push(snapshot_hash(&meta(), [("a", &one), ("c", &other)]));
        assert!(hashes.iter().all(|hash| hash.len() == 64), "{hashes:?}");
        let distinct: std::collections::BTreeSet<&String> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len(), "{hashes:?}");
    }
}
