//! How many instances of each deployment are ready, and nothing else about them.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::{InstanceId, Name};
use contract::log::Record;
use serde::{Deserialize, Serialize};

/// Changed together with whatever changes what [`ReadyCounts`] makes of recorded events, or how it is
/// written: consumers that keep it in snapshots build their versions on it.
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
    /// It is drained or removed.
    leaves: bool,
}

impl ReadyCounts {
    /// Applies a record; the deployments whose count it changes (or gives for the first time), and how many
    /// are ready now.
    pub fn apply(&mut self, record: &Record) -> Vec<(Name, u32)> {
        if let Event::InstanceRequested(requested) = &record.event {
            let known = Readiness {
                deployment: requested.deployment.deployment.clone(),
                answers: false,
                leaves: false,
            };
            self.instances.insert(requested.id.clone(), known);
        } else if let Some(id) = super::instance_of(&record.event) {
            if matches!(record.event, Event::InstanceStopped(_)) {
                self.instances.remove(id);
            } else if let Some(known) = self.instances.get_mut(id) {
                match &record.event {
                    Event::InstanceReady(_) => known.answers = true,
                    Event::InstanceUnready(_) | Event::InstanceFailed(_) => known.answers = false,
                    // Adopted instances prove themselves again.
                    Event::InstanceStarted(started) if started.adopted => known.answers = false,
                    Event::InstanceDraining(_) | Event::InstanceRemovalRequested(_) => {
                        known.leaves = true;
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
        let known = self.counts.keys().map(|deployment| (deployment.clone(), 0));
        let mut now: BTreeMap<Name, u32> = known.collect();
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
