//! What the log says about one endpoint and its instances, folded into one value. The autoscaler and the
//! planner reconcile from it.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::Uid;
use contract::log::Record;
use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::instances::Instances;
use crate::instances::plan::Granted;

/// Changed together with whatever changes what is folded of recorded events, or how it is written; consumers
/// that keep it in snapshots build their versions on it.
pub const FOLD_VERSION: u32 = 1;

/// One endpoint's name, as those who act on it need to know it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointFold {
    /// Its present incarnation, if there is one.
    pub endpoint: Option<Endpoint>,
    /// Its instances that are not over, of incarnations that are gone too.
    pub instances: Instances,
    /// What the newest decision on each deployment granted, by its uid.
    pub granted: BTreeMap<Uid, Granted>,
}

impl EndpointFold {
    /// Takes in one record of the endpoint; those of other kinds change nothing.
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
            let living = |uid: &Uid| endpoint.is_some_and(|endpoint| endpoint.has(*uid));
            self.granted.retain(|uid, _| living(uid));
            self.instances.starts.retain(|uid, _| living(uid));
            // Of what was lost with its node nothing will be heard: it ends unseen, if it comes back.
            self.instances.instances.retain(|_, instance| {
                instance.removal.is_none() || living(&instance.deployment_uid)
            });
        }
    }

    /// Whether the deployment of this uid exists.
    pub fn has(&self, uid: Uid) -> bool {
        self.endpoint
            .as_ref()
            .is_some_and(|endpoint| endpoint.has(uid))
    }
}
