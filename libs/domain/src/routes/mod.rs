//! The route of an endpoint, as gateways need it.
//!
//! Invariant: except for its slots, a route depends on the endpoint and its instances alone. Its
//! revision is the position of the last event that either has applied, so a gateway that has
//! reached the position of a drain has applied the drain. Slots depend on the gateways too;
//! `RouteUpdate.members` says as of which gateways they were allocated.

pub mod slots;

use std::collections::{BTreeMap, BTreeSet};

use contract::ids::{EndpointKey, InstanceId, Position};
use contract::resources::ProvisioningState;
use contract::route::{DeploymentRoute, InstanceRoute, Route, RouteUpdate};

use crate::endpoint::{Deployment, Endpoint};
use crate::instances::{Instance, InstanceState, Instances, Phase};
use crate::members::Members;
use slots::Slots;

/// The inputs of slot allocation.
#[derive(Clone, Copy, Debug)]
pub struct AllocationInputs<'a> {
    /// The current and past gateways.
    pub members: &'a Members,
    /// The endpoint's latest published route, whoever published it.
    pub published: Option<&'a RouteUpdate>,
    /// Whether all gateways have yielded slots since the set of gateways last changed.
    pub yielded: bool,
}

impl AllocationInputs<'_> {
    fn position(&self) -> Position {
        self.members.gateway_set_position()
    }

    /// The gateways that slots are currently allocated to; empty if unknown.
    fn allocated_gateways(&self) -> BTreeSet<String> {
        match self.published {
            Some(update) => {
                let then = self.members.gateways_at(update.members);
                then.unwrap_or_default()
            }
            // A predecessor may not have finished its allocation.
            None => self.members.previous_gateways(),
        }
    }
}

/// An allocation, computed as far as it is the same for all instances of an endpoint.
struct SlotAllocator<'a> {
    gateways: BTreeSet<String>,
    yielded: bool,
    /// The published slots by instance; `None` if somebody else published them.
    published: Option<BTreeMap<&'a InstanceId, &'a Slots>>,
    previous: BTreeSet<String>,
    newcomers: BTreeSet<String>,
}

impl<'a> SlotAllocator<'a> {
    fn new(inputs: &AllocationInputs<'a>) -> Self {
        let gateways = inputs.members.gateway_ids();
        let previous = inputs.allocated_gateways();
        // If no gateways were known, each had the whole limit: then none of them is new.
        let newcomers = match previous.is_empty() {
            true => BTreeSet::new(),
            false => gateways.difference(&previous).cloned().collect(),
        };
        let published = inputs.published.map(|update| {
            let deployments = update.route.iter().flat_map(|r| r.deployments.values());
            let instances = deployments.flat_map(|deployment| &deployment.instances);
            instances.map(|i| (&i.id, &i.slots)).collect()
        });
        Self {
            gateways,
            yielded: inputs.yielded,
            published,
            previous,
            newcomers,
        }
    }

    fn slots(&self, limit: u32, instance: &InstanceId) -> Slots {
        let next = slots::allocate(limit, instance, &self.gateways);
        if self.yielded {
            return next;
        }
        let yield_slots = |current: &Slots| {
            slots::yield_slots(limit, current, &next, &self.gateways, &self.newcomers)
        };
        match &self.published {
            // Nobody holds slots of an instance that was not published.
            Some(published) => published
                .get(instance)
                .map(|current| yield_slots(current))
                .unwrap_or(next),
            None => yield_slots(&slots::allocate(limit, instance, &self.previous)),
        }
    }
}

/// Returns the complete route at a position. While an endpoint is being deleted, its instances stay
/// in the route, draining and without a share, so that gateways still report what is in flight on
/// them.
pub fn route(
    endpoint: &Endpoint,
    instances: &Instances,
    revision: Position,
    inputs: &AllocationInputs<'_>,
) -> RouteUpdate {
    let allocator = SlotAllocator::new(inputs);
    let keys = [&endpoint.keys.primary, &endpoint.keys.secondary];
    let leaving = endpoint.state == ProvisioningState::Deleting;
    let deployments = endpoint.deployments.iter().map(|(name, deployment)| {
        let percent = endpoint.traffic.get(name).copied().unwrap_or(0);
        let percent = if leaving { 0 } else { percent };
        let route = deployment_route(deployment, instances, percent, &allocator);
        (name.clone(), Box::new(route))
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
        members: inputs.position(),
        route: Some(route),
    }
}

/// Returns the update for an endpoint that has been deleted.
pub fn tombstone(endpoint: &EndpointKey, revision: Position, members: &Members) -> RouteUpdate {
    RouteUpdate {
        endpoint: endpoint.clone(),
        revision,
        members: members.gateway_set_position(),
        route: None,
    }
}

fn deployment_route(
    deployment: &Deployment,
    instances: &Instances,
    percent: u8,
    allocator: &SlotAllocator<'_>,
) -> DeploymentRoute {
    let settings = &deployment.spec.request_settings;
    let limit = settings.max_concurrent_requests_per_instance;
    let leaving = deployment.state == ProvisioningState::Deleting;
    let routed = instances
        .of(deployment.uid)
        .filter_map(|instance| instance_route(instance, leaving, limit, allocator));
    DeploymentRoute {
        uid: deployment.uid,
        percent,
        request_settings: settings.clone(),
        routes: deployment.spec.routes.clone(),
        error_mapping: deployment.spec.error_mapping(),
        protocol: deployment.spec.protocol.unwrap_or_default(),
        authorization: deployment.spec.authorization,
        latency_thresholds_us: Vec::new(),
        instances: routed.collect(),
    }
}

fn instance_route(
    instance: &Instance,
    leaving: bool,
    limit: u32,
    allocator: &SlotAllocator<'_>,
) -> Option<InstanceRoute> {
    let draining = match instance.state() {
        InstanceState::Ready => leaving,
        // It was ready before, so requests may still be in flight on it.
        InstanceState::Draining if instance.ready_at.is_some() => true,
        _ if instance.phase == Phase::Unready && instance.ready_at.is_some() => true,
        _ => return None,
    };
    Some(InstanceRoute {
        id: instance.id.clone(),
        address: instance.address.clone()?,
        draining,
        slots: allocator.slots(limit, &instance.id),
    })
}
