//! The states that a consumer folds from the log: one per endpoint, a pure function of its events.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, StreamKind, StreamName};
use contract::time::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How a consumer folds the events of one endpoint.
///
/// Invariant: the state is a pure function of the applied events and contains nothing else: it goes
/// into snapshots, and starting from a snapshot must give the same as folding the whole log.
pub trait Fold: Send + Sync + 'static {
    /// The state of one endpoint.
    type State: Default + Serialize + DeserializeOwned + Send + 'static;
    /// What an event changes besides the state, for the service to act on.
    type Effect: Send + 'static;

    /// The version of the fold. Must be raised with every change of what is folded from recorded
    /// events or of how the state is encoded; snapshots of other versions are rebuilt.
    const VERSION: u32;

    /// The kinds of streams whose events are applied. Others are not even read.
    const READS: &'static [StreamKind];

    /// Applies one record to the state. Must depend on state and record alone. May panic on an
    /// event that it cannot process, which parks the endpoint.
    fn apply(&self, key: &EndpointKey, state: &mut Self::State, record: &Record) -> Self::Effect;

    /// Whether events of a kind only have effects and never change the state, so that they may be
    /// excluded.
    fn has_effects_only(&self, _kind: StreamKind) -> bool {
        false
    }

    /// The position up to which events with effects only are irrelevant.
    fn effects_from(&self) -> Position {
        Position::START
    }

    /// Whether the consumer writes this stream, so that its version must be tracked.
    fn writes(&self, stream: &StreamName) -> bool;
}

/// The state of one endpoint, with what every consumer tracks of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FoldedEntry<S> {
    /// The folded state.
    pub state: S,
    /// Versions of the streams that the consumer writes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub versions: BTreeMap<StreamName, u64>,
    /// The position of the last applied record.
    pub position: Position,
    /// The latest recorded time; later writes never precede it.
    pub recorded: Timestamp,
}

impl<S> FoldedEntry<S> {
    /// The version of a stream that the consumer writes; 0 for a new one.
    pub fn version(&self, stream: &StreamName) -> u64 {
        self.versions.get(stream).copied().unwrap_or(0)
    }
}

/// Entries by bucket, since buckets are added and removed as a whole. Boxed, since a map moves its
/// values as it grows, and these are large.
#[derive(Debug)]
pub struct Entries<S> {
    buckets: BTreeMap<Bucket, BTreeMap<EndpointKey, Box<FoldedEntry<S>>>>,
}

impl<S> Default for Entries<S> {
    fn default() -> Self {
        Self {
            buckets: BTreeMap::new(),
        }
    }
}

impl<S> Entries<S> {
    /// The entry of an endpoint, if any of its events was applied.
    pub fn get(&self, key: &EndpointKey) -> Option<&FoldedEntry<S>> {
        self.buckets.get(&key.bucket())?.get(key).map(AsRef::as_ref)
    }

    /// The entries of one bucket, by key.
    pub fn of(&self, bucket: Bucket) -> impl Iterator<Item = (&EndpointKey, &FoldedEntry<S>)> {
        let of_bucket = self.buckets.get(&bucket).into_iter().flatten();
        of_bucket.map(|(key, entry)| (key, entry.as_ref()))
    }

    /// All entries, by bucket and key.
    pub fn iter(&self) -> impl Iterator<Item = (&EndpointKey, &FoldedEntry<S>)> {
        let all = self.buckets.values().flatten();
        all.map(|(key, entry)| (key, entry.as_ref()))
    }

    /// The number of endpoints.
    pub fn len(&self) -> usize {
        self.buckets.values().map(BTreeMap::len).sum()
    }

    /// Whether there are no endpoints.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn get_or_default(&mut self, key: &EndpointKey) -> &mut FoldedEntry<S>
    where
        S: Default,
    {
        let of_bucket = self.buckets.entry(key.bucket()).or_default();
        of_bucket.entry(key.clone()).or_default()
    }

    pub(super) fn insert(&mut self, key: EndpointKey, entry: FoldedEntry<S>) {
        let of_bucket = self.buckets.entry(key.bucket()).or_default();
        of_bucket.insert(key, Box::new(entry));
    }

    pub(super) fn remove(&mut self, key: &EndpointKey) {
        if let Some(of_bucket) = self.buckets.get_mut(&key.bucket()) {
            of_bucket.remove(key);
        }
    }

    pub(super) fn remove_all(&mut self, bucket: Bucket) {
        self.buckets.remove(&bucket);
    }
}

/// The entries of a consumer, which it modifies and others read.
#[derive(Debug)]
pub struct SharedEntries<S> {
    entries: Arc<Mutex<Entries<S>>>,
}

impl<S> Clone for SharedEntries<S> {
    fn clone(&self) -> Self {
        Self {
            entries: self.entries.clone(),
        }
    }
}

impl<S> Default for SharedEntries<S> {
    fn default() -> Self {
        Self {
            entries: Arc::default(),
        }
    }
}

impl<S> SharedEntries<S> {
    /// Locks the entries. A poisoned lock is usable: the endpoint whose fold panicked is removed.
    pub fn lock(&self) -> MutexGuard<'_, Entries<S>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
