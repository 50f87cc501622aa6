//! All that the log says about one endpoint, folded into one value. The autoscaler, the actuator and
//! control's reactor reconcile from it.

use std::collections::BTreeMap;

use contract::decision::Decision;
use contract::events::Event;
use contract::ids::{Position, Uid};
use contract::log::Record;
use uuid::Uuid;

use crate::endpoint::Endpoint;
use crate::instances::Instances;
use crate::instances::plan::Granted;

#[derive(Clone, Debug, Default)]
pub struct EndpointFold {
    pub endpoint: Option<Endpoint>,
    pub instances: Instances,
    /// The newest decision on each deployment, by its uid.
    pub decisions: BTreeMap<Uid, (Uuid, Decision)>,
    /// Position of the last event of any of the endpoint's streams.
    pub position: Position,
}

impl EndpointFold {
    pub fn apply(&mut self, record: &Record) {
        self.endpoint = Endpoint::apply(self.endpoint.take(), record);
        self.instances.apply(record);
        if let Event::ScalingDecided(decision) = &record.event {
            self.decisions
                .insert(decision.deployment_uid, (record.id, (**decision).clone()));
        }
        if matches!(
            record.event,
            Event::DeploymentDeleted(_) | Event::EndpointDeleted(_)
        ) {
            let living = |uid: &Uid| {
                self.endpoint
                    .iter()
                    .flat_map(|e| e.deployments.values())
                    .any(|d| d.uid == *uid)
            };
            self.decisions.retain(|uid, _| living(uid));
            // Of what was lost with its node nothing will be heard: it ends unseen, if it comes back.
            self.instances.instances.retain(|_, instance| {
                instance.removal.is_none() || living(&instance.deployment_uid)
            });
        }
        self.position = record.position;
    }

    /// What each deployment was granted last.
    pub fn granted(&self) -> BTreeMap<Uid, Granted> {
        let granted = |(id, decision): &(Uuid, Decision)| Granted {
            instances: decision.granted,
            decision: *id,
        };
        self.decisions
            .iter()
            .map(|(uid, newest)| (*uid, granted(newest)))
            .collect()
    }
}
