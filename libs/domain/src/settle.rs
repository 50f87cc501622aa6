//! The reactor: the events that follow from the state of an endpoint and its instances.
//!
//! Level-triggered: the result depends on state alone, never on which event came last, so it can be
//! called at any time and any number of times. Once its events are applied, it returns none.

use std::collections::BTreeMap;

use contract::decision::Pause;
use contract::events::{
    DeploymentEvent, DeploymentStateChanged, Empty, EndpointStateChanged, Event,
};
use contract::ids::Name;
use contract::resources::{AutoscaleMode, ProvisioningState};
use contract::time::Timestamp;

use crate::endpoint::{Deployment, Endpoint};
use crate::instances::Instances;
use crate::members::Members;

/// Consecutive failures after which a deployment without a ready instance counts as failed: about
/// when Kubernetes users start to speak of a crash loop.
pub const FAILURES_IN_A_ROW: u32 = 5;

/// Returns the events that are due. `granted` holds the count that the last decision granted, by
/// deployment; a deployment without one waits for its first decision.
pub fn settle(
    endpoint: &Endpoint,
    instances: &Instances,
    granted: &BTreeMap<Name, u32>,
    members: &Members,
    now: Timestamp,
) -> Vec<Event> {
    let mut events = Vec::new();
    let mut gone = 0;
    for (name, deployment) in &endpoint.deployments {
        if deployment.state == ProvisioningState::Deleting {
            let mut left = instances.of(deployment.uid);
            if left.all(|instance| instance.is_written_off(members, now)) {
                gone += 1;
                events.push(Event::DeploymentDeleted(of(name)));
            }
            continue;
        }
        if deployment
            .pin
            .is_some_and(|pin| pin.until.is_some_and(|until| until <= now))
        {
            events.push(Event::AutoscaleReleased(of(name)));
        }
        let state = provisioning_state(deployment, instances, granted.get(name).copied());
        events.extend(state.map(|(state, reason)| {
            Event::DeploymentStateChanged(DeploymentStateChanged {
                deployment: name.clone(),
                state,
                reason,
            })
        }));
    }
    match endpoint.state {
        ProvisioningState::Deleting if gone == endpoint.deployments.len() => {
            events.push(Event::EndpointDeleted(Empty {}));
        }
        ProvisioningState::Creating | ProvisioningState::Updating => {
            events.push(Event::EndpointStateChanged(EndpointStateChanged {
                state: ProvisioningState::Succeeded,
                reason: String::new(),
            }));
        }
        _ => {}
    }
    events
}

fn of(name: &Name) -> DeploymentEvent {
    DeploymentEvent {
        deployment: name.clone(),
    }
}

/// Returns the state that a deployment should move to, with the reason, if it should move.
fn provisioning_state(
    deployment: &Deployment,
    instances: &Instances,
    granted: Option<u32>,
) -> Option<(ProvisioningState, String)> {
    use ProvisioningState::{Creating, Failed, Succeeded, Updating};
    if deployment.state == Succeeded {
        return None;
    }
    let ready = instances
        .of(deployment.uid)
        .filter(|i| i.is_ready() && deployment.is_made_of(i.revision, &i.spec))
        .count();
    let has_older = instances
        .of(deployment.uid)
        .any(|i| i.is_kept() && !deployment.is_made_of(i.revision, &i.spec));
    let is_reached = |granted| ready >= granted as usize && is_of_present_spec(deployment, granted);
    if granted.is_some_and(is_reached) && !has_older {
        return Some((Succeeded, String::new()));
    }
    let history = instances.failures(deployment.uid, deployment.instance_revision)?;
    let is_crash_looping = ready == 0 && history.failures >= FAILURES_IN_A_ROW;
    if !is_crash_looping || !matches!(deployment.state, Creating | Updating) {
        return None;
    }
    let reason = format!(
        "{} starts in a row failed, the last one with: {}",
        history.failures, history.last_reason
    );
    Some((Failed, reason))
}

/// Whether a granted count can be that of the present spec: where nothing but the deployment's own count
/// decides, another one was granted before it changed.
fn is_of_present_spec(deployment: &Deployment, granted: u32) -> bool {
    let autoscale = deployment.autoscale.as_ref();
    let decides_itself = autoscale.is_none_or(|of| of.spec.mode == AutoscaleMode::Shadow)
        && deployment.pin.is_none()
        && deployment.pause == Pause::default();
    !decides_itself || granted == deployment.spec.instances
}
