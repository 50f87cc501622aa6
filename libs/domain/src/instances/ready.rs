//! Counts the ready instances of each deployment.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::{InstanceId, Name};
use contract::log::Record;
use serde::{Deserialize, Serialize};

/// Version of [`ReadyCounts`]. Raise it with any change to what it makes of recorded events or to
/// its serialized form; consumers that snapshot it derive their versions from it.
pub const READY_VERSION: u32 = 1;

/// Ready instances of one endpoint, by deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReadyCounts {
    instances: BTreeMap<InstanceId, Readiness>,
    counts: BTreeMap<Name, u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Readiness {
    deployment: Name,
    /// Its readiness probe succeeds.
    answers: bool,
    /// It is draining or being removed.
    leaves: bool,
}

impl ReadyCounts {
    /// Applies a record. Returns the deployments whose count it changes (or sets for the first
    /// time), with their number of ready instances.
    pub fn apply(&mut self, record: &Record) -> Vec<(Name, u32)> {
        if let Event::InstanceRequested(requested) = &record.event {
            let readiness = Readiness {
                deployment: requested.deployment.deployment.clone(),
                answers: false,
                leaves: false,
            };
            self.instances.insert(requested.id.clone(), readiness);
        } else if let Some(id) = super::instance_of(&record.event) {
            if matches!(record.event, Event::InstanceStopped(_)) {
                self.instances.remove(id);
            } else if let Some(readiness) = self.instances.get_mut(id) {
                match &record.event {
                    Event::InstanceReady(_) => readiness.answers = true,
                    Event::InstanceUnready(_) | Event::InstanceFailed(_) => {
                        readiness.answers = false
                    }
                    // Adopted instances must become ready again.
                    Event::InstanceStarted(started) if started.adopted => readiness.answers = false,
                    Event::InstanceDraining(_) | Event::InstanceRemovalRequested(_) => {
                        readiness.leaves = true;
                    }
                    _ => {}
                }
            }
        } else {
            return Vec::new();
        }
        self.changes()
    }

    fn changes(&mut self) -> Vec<(Name, u32)> {
        let zeros = self.counts.keys().map(|deployment| (deployment.clone(), 0));
        let mut now: BTreeMap<Name, u32> = zeros.collect();
        for instance in self.instances.values() {
            let count = now.entry(instance.deployment.clone()).or_default();
            *count += u32::from(instance.answers && !instance.leaves);
        }
        let changed = |(deployment, count): (&Name, &u32)| {
            let before = self.counts.get(deployment);
            (before != Some(count)).then(|| (deployment.clone(), *count))
        };
        let changes = now.iter().filter_map(changed).collect();
        self.counts = now;
        changes
    }
}
