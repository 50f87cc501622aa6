//! Changes of how many instances of each deployment are ready, until they are saved.

use std::collections::BTreeMap;

use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::log::Record;

/// From this second on, so many were ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReadyChange {
    pub endpoint: EndpointKey,
    pub deployment: Name,
    pub second: i64,
    pub instances: u32,
}

#[derive(Default)]
pub(crate) struct Ready {
    /// Not saved yet.
    changes: Vec<ReadyChange>,
    /// By bucket: changes up to here were saved before we had it.
    saved: BTreeMap<Bucket, Position>,
    reached: BTreeMap<Bucket, Position>,
}

impl Ready {
    /// A bucket is ours; its changes up to a position were saved before.
    pub(crate) fn begin(&mut self, bucket: Bucket, saved: Position) {
        self.forget(bucket);
        self.saved.insert(bucket, saved);
        self.reached.insert(bucket, saved);
    }

    /// A record was applied, which changes what is ready of these deployments.
    pub(crate) fn changed(&mut self, record: &Record, changes: Vec<(Name, u32)>) {
        let reached = self.reached.entry(record.bucket).or_default();
        *reached = (*reached).max(record.position);
        let saved = self.saved.get(&record.bucket).copied().unwrap_or_default();
        let Some(endpoint) = record.endpoint().filter(|_| record.position > saved) else {
            return;
        };
        let change = |(deployment, instances)| ReadyChange {
            endpoint: endpoint.clone(),
            deployment,
            second: record.time.secs(),
            instances,
        };
        self.changes.extend(changes.into_iter().map(change));
    }

    /// The bucket is somebody else's now.
    pub(crate) fn forget(&mut self, bucket: Bucket) {
        self.changes.retain(|c| c.endpoint.bucket() != bucket);
        self.saved.remove(&bucket);
        self.reached.remove(&bucket);
    }

    /// The position that the changes of a bucket go up to.
    pub(crate) fn reached(&self, bucket: Bucket) -> Position {
        self.reached.get(&bucket).copied().unwrap_or_default()
    }

    /// What is to be saved of some buckets.
    pub(crate) fn take(&mut self, of: impl Fn(Bucket) -> bool) -> Vec<ReadyChange> {
        let all = std::mem::take(&mut self.changes);
        let (taken, kept) = all.into_iter().partition(|c| of(c.endpoint.bucket()));
        self.changes = kept;
        taken
    }
}
