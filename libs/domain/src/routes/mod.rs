//! The route of an endpoint, as gateways need it.
//!
//! Invariant: but for the slots, a route depends on the endpoint and its instances alone; its
//! revision is the position of the last event that either has taken in, so a gateway that has
//! reached a drain's position has the drain. Slots depend on the gateways too; by which of them they
//! were dealt is vouched for apart (`RouteUpdate.members`).

pub mod slots;

use std::collections::{BTreeMap, BTreeSet};

use contract::ids::{EndpointKey, InstanceId, Position};
use contract::resources::ProvisioningState;
use contract::route::{DeploymentRoute, InstanceRoute, Route, RouteUpdate};

use crate::endpoint::{Deployment, Endpoint};
use crate::instances::{Instance, InstanceState, Instances, Phase};
use crate::members::Members;
use slots::Slots;

/// What slots are dealt by.
#[derive(Clone, Copy, Debug)]
pub struct Dealing<'a> {
    /// Gateways that there are, and were.
    pub members: &'a Members,
    /// The endpoint's route as it was published last, by whomever.
    pub given: Option<&'a RouteUpdate>,
    /// Whether all gateways have given way since they last became others.
    pub given_way: bool,
}

impl Dealing<'_> {
    fn position(&self) -> Position {
        self.members.dealt_as_of()
    }

    /// The gateways by which slots were dealt so far; empty if that is not known.
    fn gateways_so_far(&self) -> BTreeSet<String> {
        match self.given {
            Some(given) => {
                let then = self.members.gateways_at(given.members);
                then.unwrap_or_default()
            }
            // A predecessor may not have come to an end.
            None => self.members.gateways_before(),
        }
    }
}

/// A deal, worked out as far as it is the same for all instances of an endpoint.
struct Dealer<'a> {
    gateways: BTreeSet<String>,
    given_way: bool,
    /// What was given out before, by instance; none if that was not by us.
    given: Option<BTreeMap<&'a InstanceId, &'a Slots>>,
    so_far: BTreeSet<String>,
    newcomers: BTreeSet<String>,
}

impl<'a> Dealer<'a> {
    fn of(dealing: &Dealing<'a>) -> Self {
        let gateways = dealing.members.gateway_ids();
        let so_far = dealing.gateways_so_far();
        // Where nobody was known, everybody had the whole limit: then nobody is new.
        let newcomers = match so_far.is_empty() {
            true => BTreeSet::new(),
            false => gateways.difference(&so_far).cloned().collect(),
        };
        let given = dealing.given.map(|given| {
            let deployments = given.route.iter().flat_map(|r| r.deployments.values());
            let instances = deployments.flat_map(|deployment| &deployment.instances);
            instances.map(|i| (&i.id, &i.slots)).collect()
        });
        Self {
            gateways,
            given_way: dealing.given_way,
            given,
            so_far,
            newcomers,
        }
    }

    fn slots(&self, limit: u32, instance: &InstanceId) -> Slots {
        let next = slots::deal(limit, instance, &self.gateways);
        if self.given_way {
            return next;
        }
        let give_way =
            |given: &Slots| slots::give_way(limit, given, &next, &self.gateways, &self.newcomers);
        match &self.given {
            // What nobody has been given yet is free.
            Some(given) => given
                .get(instance)
                .map(|given| give_way(given))
                .unwrap_or(next),
            None => give_way(&slots::deal(limit, instance, &self.so_far)),
        }
    }
}

/// The whole route at a position. While an endpoint goes away its instances stay in the route,
/// draining and without a share, so that gateways still report what is in flight on them.
pub fn route(
    endpoint: &Endpoint,
    instances: &Instances,
    revision: Position,
    dealing: &Dealing<'_>,
) -> RouteUpdate {
    let dealer = Dealer::of(dealing);
    let keys = [&endpoint.keys.primary, &endpoint.keys.secondary];
    let leaving = endpoint.state == ProvisioningState::Deleting;
    let deployments = endpoint.deployments.iter().map(|(name, deployment)| {
        let percent = endpoint.traffic.get(name).copied().unwrap_or(0);
        let percent = if leaving { 0 } else { percent };
        (
            name.clone(),
            deployment_route(deployment, instances, percent, &dealer),
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
        members: dealing.position(),
        route: Some(route),
    }
}

/// The endpoint is gone.
pub fn gone(endpoint: &EndpointKey, revision: Position, members: &Members) -> RouteUpdate {
    RouteUpdate {
        endpoint: endpoint.clone(),
        revision,
        members: members.dealt_as_of(),
        route: None,
    }
}

fn deployment_route(
    deployment: &Deployment,
    instances: &Instances,
    percent: u8,
    dealer: &Dealer<'_>,
) -> DeploymentRoute {
    let settings = &deployment.spec.request_settings;
    let limit = settings.max_concurrent_requests_per_instance;
    let leaving = deployment.state == ProvisioningState::Deleting;
    let routed = instances
        .of(deployment.uid)
        .filter_map(|instance| instance_route(instance, leaving, limit, dealer));
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
    limit: u32,
    dealer: &Dealer<'_>,
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
        slots: dealer.slots(limit, &instance.id),
    })
}
