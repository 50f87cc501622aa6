//! Placement of new instances on nodes. Invariant: the choice depends on the log alone, so a
//! successor that plans the same instances places them on the same nodes.

use std::collections::BTreeMap;

use contract::ids::Uid;
use contract::time::Timestamp;

use super::{Instances, Phase};
use crate::endpoint::Deployment;
use crate::members::Members;

/// The load of each node, including instances placed by this plan.
pub(super) struct Placement<'a> {
    members: &'a Members,
    own_node: Option<&'a str>,
    only_node: Option<&'a str>,
    now: Timestamp,
    of_deployment: BTreeMap<(Uid, String), u32>,
    of_endpoint: BTreeMap<String, u32>,
}

impl<'a> Placement<'a> {
    /// `own_node` is the node in this process, which may not be a member yet; `only_node` is that node if
    /// there can be no other.
    pub(super) fn new(
        instances: &Instances,
        members: &'a Members,
        own_node: Option<&'a str>,
        only_node: Option<&'a str>,
        now: Timestamp,
    ) -> Self {
        let mut placement = Self {
            members,
            own_node,
            only_node,
            now,
            of_deployment: BTreeMap::new(),
            of_endpoint: BTreeMap::new(),
        };
        let running = instances
            .instances
            .values()
            .filter(|instance| instance.phase != Phase::Failed);
        for instance in running {
            placement.count(instance.deployment_uid, instance.node.clone());
        }
        placement
    }

    /// Picks, among the nodes that offer the backend, the one with the fewest instances of the
    /// deployment, then of the endpoint. Returns `None` if such a node may come back soon, or if
    /// there are no nodes. Where there can only be one node, it is that one: the log may still list
    /// another, which runs nothing any more.
    pub(super) fn place(&mut self, deployment: &Deployment) -> Option<String> {
        if let Some(only) = self.only_node {
            self.count(deployment.uid, only.to_owned());
            return Some(only.to_owned());
        }
        let backend = &deployment.spec.backend;
        let nodes = &self.members.nodes;
        let allowing = nodes
            .iter()
            .filter(|(_, node)| node.backends.contains(backend));
        let own = || {
            let own = self.own_node?;
            (!nodes.contains_key(own)).then(|| own.to_owned())
        };
        let node = self
            .least_loaded(deployment.uid, allowing.map(|(id, _)| id))
            .or_else(own)
            .or_else(|| {
                let is_awaited = self.members.may_return(backend, self.now);
                // No node will offer the backend: let one of them refuse, where the operator sees
                // it.
                let any_node = || self.least_loaded(deployment.uid, nodes.keys());
                if is_awaited { None } else { any_node() }
            })?;
        self.count(deployment.uid, node.clone());
        Some(node)
    }

    fn least_loaded<'n>(
        &self,
        deployment: Uid,
        nodes: impl Iterator<Item = &'n String>,
    ) -> Option<String> {
        let load = |node: &String| {
            let of_deployment = self.of_deployment.get(&(deployment, node.clone()));
            let of_endpoint = self.of_endpoint.get(node);
            let count = |count: Option<&u32>| count.copied().unwrap_or(0);
            (count(of_deployment), count(of_endpoint), node.clone())
        };
        nodes.map(load).min().map(|(_, _, node)| node)
    }

    fn count(&mut self, deployment: Uid, node: String) {
        *self
            .of_deployment
            .entry((deployment, node.clone()))
            .or_default() += 1;
        *self.of_endpoint.entry(node).or_default() += 1;
    }
}
