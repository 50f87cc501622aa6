//! How many instances of each deployment are ready, folded from the log.

use std::collections::BTreeMap;

use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::log::Record;
use domain::instances::Instances;

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
    endpoints: BTreeMap<EndpointKey, Instances>,
    counts: BTreeMap<EndpointKey, BTreeMap<Name, u32>>,
    /// Not saved yet.
    changes: Vec<ReadyChange>,
    /// By bucket: changes up to here were saved before we had it.
    saved: BTreeMap<Bucket, Position>,
    reached: BTreeMap<Bucket, Position>,
}

impl Ready {
    /// A bucket is ours, and will be folded from the start.
    pub(crate) fn begin(&mut self, bucket: Bucket, saved: Position) {
        self.forget(bucket);
        self.saved.insert(bucket, saved);
        self.reached.insert(bucket, saved);
    }

    pub(crate) fn apply(&mut self, record: &Record) {
        let reached = self.reached.entry(record.bucket).or_default();
        *reached = (*reached).max(record.position);
        let saved = self.saved.get(&record.bucket).copied().unwrap_or_default();
        let stream = record.stream.as_str();
        if !stream.starts_with("instances/") && !stream.starts_with("node/") {
            return;
        }
        let Some(endpoint) = record.endpoint() else {
            return;
        };
        let instances = self.endpoints.entry(endpoint.clone()).or_default();
        instances.apply(record);
        let mut now: BTreeMap<Name, u32> = BTreeMap::new();
        for instance in instances.instances.values() {
            let count = now.entry(instance.deployment.clone()).or_default();
            *count += u32::from(instance.is_ready());
        }
        let counts = self.counts.entry(endpoint.clone()).or_default();
        for deployment in counts.keys() {
            now.entry(deployment.clone()).or_default();
        }
        for (deployment, instances) in now {
            if counts.insert(deployment.clone(), instances) == Some(instances) {
                continue;
            }
            if record.position > saved {
                self.changes.push(ReadyChange {
                    endpoint: endpoint.clone(),
                    deployment,
                    second: record.time.secs(),
                    instances,
                });
            }
        }
    }

    /// The bucket is somebody else's now, or is folded anew. What is folded twice is saved twice, as
    /// the same.
    pub(crate) fn forget(&mut self, bucket: Bucket) {
        self.endpoints.retain(|key, _| key.bucket() != bucket);
        self.counts.retain(|key, _| key.bucket() != bucket);
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
