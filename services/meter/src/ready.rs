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
    /// Changes up to here were saved before this start.
    saved: Position,
    reached: Position,
}

impl Ready {
    pub(crate) fn new(saved: Position) -> Self {
        Self {
            saved,
            reached: saved,
            ..Self::default()
        }
    }

    pub(crate) fn apply(&mut self, record: &Record) {
        self.reached = self.reached.max(record.position);
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
            if record.position > self.saved {
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
    }

    /// What is to be saved, and the position that it goes up to.
    pub(crate) fn take(&mut self) -> (Vec<ReadyChange>, Position) {
        (std::mem::take(&mut self.changes), self.reached)
    }
    /// Puts back what could not be saved.
    pub(crate) fn put_back(&mut self, changes: Vec<ReadyChange>) {
        self.changes.splice(0..0, changes);
    }
}
