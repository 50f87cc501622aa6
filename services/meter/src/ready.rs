//! Changes in the number of ready instances of each deployment, until they are saved.

use std::collections::BTreeMap;

use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::log::Record;

/// The number of ready instances from this second on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReadyChange {
    pub endpoint: EndpointKey,
    pub deployment: Name,
    pub second: i64,
    pub instances: u32,
}

#[derive(Default)]
pub(crate) struct ReadyChanges {
    /// Changes that are not saved yet.
    changes: Vec<ReadyChange>,
    /// By bucket: changes up to here had been saved when it was acquired.
    saved_through: BTreeMap<Bucket, Position>,
    applied_through: BTreeMap<Bucket, Position>,
}

impl ReadyChanges {
    /// Starts an acquired bucket, whose changes up to a position have been saved.
    pub(crate) fn start_from(&mut self, bucket: Bucket, saved_through: Position) {
        self.forget(bucket);
        self.saved_through.insert(bucket, saved_through);
        self.applied_through.insert(bucket, saved_through);
    }

    /// Adds the changes made by an applied record.
    pub(crate) fn record_changes(&mut self, record: &Record, changes: Vec<(Name, u32)>) {
        let applied_through = self.applied_through.entry(record.bucket).or_default();
        *applied_through = (*applied_through).max(record.position);
        if changes.is_empty() {
            return;
        }
        let saved_through = self
            .saved_through
            .get(&record.bucket)
            .copied()
            .unwrap_or_default();
        let Some(endpoint) = record
            .endpoint()
            .filter(|_| record.position > saved_through)
        else {
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

    /// Drops a released bucket.
    pub(crate) fn forget(&mut self, bucket: Bucket) {
        self.changes.retain(|c| c.endpoint.bucket() != bucket);
        self.saved_through.remove(&bucket);
        self.applied_through.remove(&bucket);
    }

    /// Returns the position up to which changes of a bucket are included.
    pub(crate) fn applied_through(&self, bucket: Bucket) -> Position {
        self.applied_through
            .get(&bucket)
            .copied()
            .unwrap_or_default()
    }

    /// Takes the changes of some buckets for saving.
    pub(crate) fn take(&mut self, of: impl Fn(Bucket) -> bool) -> Vec<ReadyChange> {
        let all = std::mem::take(&mut self.changes);
        let (taken, kept) = all.into_iter().partition(|c| of(c.endpoint.bucket()));
        self.changes = kept;
        taken
    }
}
