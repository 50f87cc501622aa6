//! The route of an endpoint, as gateways need it.
//!
//! Invariant: a route depends on the endpoint and its instances alone; its revision is the position
//! of the last event that either has taken in, so a gateway that has reached a drain's position has
//! the drain.

use std::collections::BTreeMap;

use contract::ids::{EndpointKey, Position};
use contract::resources::ProvisioningState;
use contract::route::{ANY_GATEWAY, DeploymentRoute, InstanceRoute, Route, RouteUpdate};

use crate::endpoint::{Deployment, Endpoint};
use crate::instances::{Instance, InstanceState, Instances, Phase};

/// The whole route at a position. While an endpoint goes away its instances stay in the route,
/// draining and without a share, so that gateways still report what is in flight on them.
pub fn route(endpoint: &Endpoint, instances: &Instances, revision: Position) -> RouteUpdate {
    let keys = [&endpoint.keys.primary, &endpoint.keys.secondary];
    let leaving = endpoint.state == ProvisioningState::Deleting;
    let deployments = endpoint.deployments.iter().map(|(name, deployment)| {
        let percent = endpoint.traffic.get(name).copied().unwrap_or(0);
        let percent = if leaving { 0 } else { percent };
        (
            name.clone(),
            deployment_route(deployment, instances, percent),
        )
    });
    let route = Route {
        endpoint_uid: endpoint.uid,
        auth: endpoint.spec.auth,
        key_hashes: keys.map(|key| key.hash.clone()).to_vec(),
        model_client_errors: endpoint.spec.model_client_errors,
        request_bytes_max: endpoint.spec.limits.request_bytes_max,
        deployments: deployments.collect(),
    };
    RouteUpdate {
        endpoint: EndpointKey::new(&endpoint.name),
        revision,
        members: Position::START,
        route: Some(route),
    }
}

/// The endpoint is gone.
pub fn gone(endpoint: &EndpointKey, revision: Position) -> RouteUpdate {
    RouteUpdate {
        endpoint: endpoint.clone(),
        revision,
        members: Position::START,
        route: None,
    }
}

fn deployment_route(
    deployment: &Deployment,
    instances: &Instances,
    percent: u8,
) -> DeploymentRoute {
    let settings = &deployment.spec.request_settings;
    let slots = BTreeMap::from([(
        ANY_GATEWAY.to_owned(),
        settings.max_concurrent_requests_per_instance,
    )]);
    let leaving = deployment.state == ProvisioningState::Deleting;
    let routed = instances
        .of(deployment.uid)
        .filter_map(|instance| instance_route(instance, leaving, &slots));
    DeploymentRoute {
        uid: deployment.uid,
        percent,
        request_settings: settings.clone(),
        latency_thresholds_us: Vec::new(),
        instances: routed.collect(),
    }
}

fn instance_route(
    instance: &Instance,
    leaving: bool,
    slots: &BTreeMap<String, u32>,
) -> Option<InstanceRoute> {
    let draining = match instance.state() {
        InstanceState::Ready => leaving,
        // It served once, so requests may still be in flight on it.
        InstanceState::Draining if instance.ready_at.is_some() => true,
        _ if instance.phase == Phase::Unready && instance.ready_at.is_some() => true,
        _ => return None,
    };
    Some(InstanceRoute {
        id: instance.id.clone(),
        address: instance.address.clone()?,
        draining,
        slots: slots.clone(),
    })
}
