//! What a consumer makes of the log: one state for each endpoint, by a pure function of its events.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, StreamKind, StreamName};
use contract::time::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How a consumer folds the events of one endpoint.
///
/// Invariant: the state is a pure function of the events that were applied, and nothing else is in it: it
/// goes into snapshots, and whoever begins with a snapshot must get what the whole log gives.
pub trait Fold: Send + Sync + 'static {
    /// Of one endpoint.
    type State: Default + Serialize + DeserializeOwned + Send + 'static;
    /// What an event changes beside the state, for the service to act on.
    type Effect: Send + 'static;

    /// Raised by every change of what is made of recorded events, or of how the state is written: snapshots
    /// of another version are rebuilt.
    const VERSION: u32;

    /// The kinds of streams of which events are applied. Those of other kinds are not even read.
    const READS: &'static [StreamKind];

    /// The state after one more record. A function of state and record alone; it may panic on what
    /// it cannot digest, which parks the endpoint.
    fn apply(&self, key: &EndpointKey, state: &mut Self::State, record: &Record) -> Self::Effect;

    /// Whether events of a kind change no state: they have effects only, and may be left out.
    fn has_effects_only(&self, _kind: StreamKind) -> bool {
        false
    }

    /// Of events that have effects only, those up to here are of no use.
    fn effects_from(&self) -> Position {
        Position::START
    }

    /// Whether the consumer writes this stream, so that its version must be known.
    fn writes(&self, stream: &StreamName) -> bool;
}

/// One endpoint, with what every consumer needs to know of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry<S> {
    /// What the fold has made of its records.
    pub state: S,
    /// Versions of the streams that the consumer writes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub versions: BTreeMap<StreamName, u64>,
    /// Of the last record applied.
    pub position: Position,
    /// Greatest time recorded; what is written next never lies before it.
    pub recorded: Timestamp,
}

impl<S> Entry<S> {
    /// The version of a stream that the consumer writes; 0 for a new one.
    pub fn version(&self, stream: &StreamName) -> u64 {
        self.versions.get(stream).copied().unwrap_or(0)
    }
}

/// Entries by bucket, since that is how they come and go. Boxed, since a map moves its values about as it
/// grows, and these are large.
#[derive(Debug)]
pub struct Entries<S> {
    buckets: BTreeMap<Bucket, BTreeMap<EndpointKey, Box<Entry<S>>>>,
}

impl<S> Default for Entries<S> {
    fn default() -> Self {
        Self {
            buckets: BTreeMap::new(),
        }
    }
}

impl<S> Entries<S> {
    /// The entry of an endpoint, where anything of it was applied.
    pub fn get(&self, key: &EndpointKey) -> Option<&Entry<S>> {
        self.buckets.get(&key.bucket())?.get(key).map(AsRef::as_ref)
    }

    /// Those of one bucket, by key.
    pub fn of(&self, bucket: Bucket) -> impl Iterator<Item = (&EndpointKey, &Entry<S>)> {
        let of_bucket = self.buckets.get(&bucket).into_iter().flatten();
        of_bucket.map(|(key, entry)| (key, entry.as_ref()))
    }

    /// All of them, by bucket and key.
    pub fn iter(&self) -> impl Iterator<Item = (&EndpointKey, &Entry<S>)> {
        let all = self.buckets.values().flatten();
        all.map(|(key, entry)| (key, entry.as_ref()))
    }

    /// How many endpoints there are.
    pub fn len(&self) -> usize {
        self.buckets.values().map(BTreeMap::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn get_or_default(&mut self, key: &EndpointKey) -> &mut Entry<S>
    where
        S: Default,
    {
        let of_bucket = self.buckets.entry(key.bucket()).or_default();
        of_bucket.entry(key.clone()).or_default()
    }

    pub(super) fn insert(&mut self, key: EndpointKey, entry: Entry<S>) {
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

/// The entries of a consumer, for it to change and for others to read.
#[derive(Debug)]
pub struct Folds<S> {
    entries: Arc<Mutex<Entries<S>>>,
}

impl<S> Clone for Folds<S> {
    fn clone(&self) -> Self {
        Self {
            entries: self.entries.clone(),
        }
    }
}

impl<S> Default for Folds<S> {
    fn default() -> Self {
        Self {
            entries: Arc::default(),
        }
    }
}

impl<S> Folds<S> {
    /// A panic cannot leave an entry half done: the endpoint that it is about is removed.
    pub fn lock(&self) -> MutexGuard<'_, Entries<S>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
