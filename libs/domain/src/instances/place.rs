//! Which node gets a new instance. Invariant: the choice depends on what stands in the log alone, so
//! a successor that plans the same gives it to the same node.

use std::collections::BTreeMap;

use contract::ids::Uid;

use super::plan::Context;
use super::{Instances, Phase};
use crate::endpoint::Deployment;

/// How full the nodes are, with what has been placed on them since.
pub(super) struct Placement<'a> {
    context: &'a Context<'a>,
    of_deployment: BTreeMap<(Uid, String), u32>,
    of_endpoint: BTreeMap<String, u32>,
}

impl<'a> Placement<'a> {
    pub(super) fn new(instances: &Instances, context: &'a Context<'a>) -> Self {
        let mut placement = Self {
            context,
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

    /// The node with the fewest instances of the deployment, then of the endpoint, of those that
    /// allow its backend. None: such a node is away for a moment, or there is no node at all.
    pub(super) fn place(&mut self, deployment: &Deployment) -> Option<String> {
        let backend = &deployment.spec.backend;
        let nodes = &self.context.members.nodes;
        let allowing = nodes
            .iter()
            .filter(|(_, node)| node.backends.contains(backend));
        let own = || {
            let own = self.context.own_node?;
            (!nodes.contains_key(own)).then(|| own.to_owned())
        };
        let node = self
            .emptiest(deployment.uid, allowing.map(|(id, _)| id))
            .or_else(own)
            .or_else(|| {
                let waits = self.context.members.comes_back(backend, self.context.now);
                // Nobody will ever allow it: one of them says so, where the operator sees it.
                let refusing = || self.emptiest(deployment.uid, nodes.keys());
                if waits { None } else { refusing() }
            })?;
        self.count(deployment.uid, node.clone());
        Some(node)
    }

    fn emptiest<'n>(
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
