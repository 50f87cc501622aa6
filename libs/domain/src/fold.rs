//! The state of one endpoint and its instances, folded from the log. The autoscaler and the planner
//! reconcile from it.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::Uid;
use contract::log::Record;
use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::instances::Instances;
use crate::instances::plan::Granted;

/// Version of this state. Raise it with any change to what is folded from recorded events or to its
/// serialized form; consumers that snapshot the state derive their versions from it.
pub const FOLD_VERSION: u32 = 3;

/// The state behind one endpoint name, as needed by the services that act on it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointFold {
    /// The current incarnation, if there is one.
    pub endpoint: Option<Endpoint>,
    /// Instances that have not ended, including those of deleted incarnations.
    pub instances: Instances,
    /// What the latest decision granted each deployment, by deployment uid.
    pub granted: BTreeMap<Uid, Granted>,
}

impl EndpointFold {
    /// Applies one record of the endpoint; events of other kinds change nothing.
    pub fn apply(&mut self, record: &Record) {
        self.endpoint = Endpoint::apply(self.endpoint.take(), record);
        self.instances.apply(record);
        if let Event::ScalingDecided(decision) = &record.event {
            let granted = Granted {
                instances: decision.granted,
                decision: record.id,
            };
            self.granted.insert(decision.deployment_uid, granted);
        }
        if matches!(
            record.event,
            Event::DeploymentDeleted(_) | Event::EndpointDeleted(_)
        ) {
            let endpoint = self.endpoint.as_ref();
            let exists = |uid: &Uid| endpoint.is_some_and(|endpoint| endpoint.has(*uid));
            self.granted.retain(|uid, _| exists(uid));
            self.instances.starts.retain(|uid, _| exists(uid));
            self.instances.ready_specs.retain(|uid, _| exists(uid));
            // Nothing more will be reported of instances that were lost with their node: drop them
            // here. If the node comes back, they end unrecorded.
            self.instances.instances.retain(|_, instance| {
                instance.removal.is_none() || exists(&instance.deployment_uid)
            });
        }
    }

    /// Whether a deployment with this uid exists.
    pub fn has(&self, uid: Uid) -> bool {
        self.endpoint
            .as_ref()
            .is_some_and(|endpoint| endpoint.has(uid))
    }
}
