//! Which metrics the rules of each deployment read, without compiling policies: what is worth recording.

use std::collections::{BTreeMap, BTreeSet};

use contract::events::Event;
use contract::ids::Name;
use contract::log::Record;
use serde::{Deserialize, Serialize};

use crate::measure::{Computation, Metric};

/// Version of [`RuleMetrics`]. Raise it with any change to what it makes of recorded events or to
/// its serialized form; consumers that snapshot it derive their versions from it.
pub const RULE_METRICS_VERSION: u32 = 1;

/// The metrics that rules of one endpoint's deployments name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleMetrics {
    /// By deployment; by name, so that what a metric is computed from may change.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    deployments: BTreeMap<Name, BTreeSet<String>>,
}

impl RuleMetrics {
    /// Applies a record.
    pub fn apply(&mut self, record: &Record) {
        match &record.event {
            Event::AutoscaleSet(set) => {
                let profiles = set.spec.profiles.iter();
                let rules = profiles.flat_map(|profile| profile.rules.iter().flatten());
                let metrics: BTreeSet<String> =
                    rules.map(|rule| rule.metric.name.clone()).collect();
                self.deployments.insert(set.deployment.clone(), metrics);
            }
            Event::AutoscaleRemoved(removed) | Event::DeploymentDeleted(removed) => {
                self.deployments.remove(&removed.deployment);
            }
            Event::EndpointDeleted(_) => self.deployments.clear(),
            _ => {}
        }
    }

    /// The deployments with a rule on a metric that is averaged over instances.
    pub fn reading_instances(&self) -> impl Iterator<Item = &Name> {
        let reads = |name: &String| {
            let row = Metric::parse(name).map(Metric::row);
            row.is_ok_and(|row| matches!(row.computation, Computation::Instances { .. }))
        };
        self.deployments
            .iter()
            .filter(move |(_, metrics)| metrics.iter().any(reads))
            .map(|(deployment, _)| deployment)
    }
}
