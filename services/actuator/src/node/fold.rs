//! The fold of the node agent: the node's own instances of each endpoint, which are all if there can be no
//! other node.

use contract::events::Event;
use contract::ids::{EndpointKey, InstanceId};
use contract::log::{Record, StreamKind, StreamName};
use domain::fold::FOLD_VERSION;
use domain::instances::Instances;
use runtime::consumer::Fold;

/// Folds the instances of one node.
pub struct NodeFold {
    node: String,
    /// Whether there can be no other node: it takes over what a former one ran.
    is_only: bool,
}

impl NodeFold {
    /// The fold of the node with this id; with `is_only` also of what other nodes ran.
    pub fn for_node(node: &str, is_only: bool) -> Self {
        Self {
            node: node.to_owned(),
            is_only,
        }
    }

    fn is_own(&self, node: &str) -> bool {
        self.is_only || node == self.node
    }
}

/// How a record changes the instances of this node.
#[derive(Debug, Default, PartialEq)]
pub struct PlacementChange {
    /// The instance requested for the first time.
    pub(super) added: Option<InstanceId>,
    /// Instances that are no longer wanted.
    pub(super) removed: Vec<InstanceId>,
}

impl Fold for NodeFold {
    type State = Instances;
    type Effect = PlacementChange;

    const VERSION: u32 = FOLD_VERSION;
    const READS: &'static [StreamKind] = &[
        StreamKind::Endpoint,
        StreamKind::Instances,
        StreamKind::Node,
    ];

    fn apply(&self, _key: &EndpointKey, state: &mut Instances, record: &Record) -> PlacementChange {
        let mut change = PlacementChange::default();
        match &record.event {
            Event::EndpointDeleted(_) => {
                change.removed = std::mem::take(state).instances.into_keys().collect();
            }
            Event::DeploymentDeleted(of) => {
                let instances = state
                    .instances
                    .values()
                    .filter(|i| i.deployment == of.deployment);
                change.removed = instances.map(|instance| instance.id.clone()).collect();
                for id in &change.removed {
                    if let Some(instance) = state.instances.remove(id) {
                        state.starts.remove(&instance.deployment_uid);
                        state.ready_specs.remove(&instance.deployment_uid);
                    }
                }
            }
            Event::InstanceRequested(requested) if !self.is_own(&requested.node) => {}
            Event::InstanceRequested(requested) => {
                state.apply(record);
                change.added = Some(requested.id.clone());
            }
            Event::InstanceStopped(ended) => {
                state.apply(record);
                change.removed = vec![ended.id.clone()];
            }
            _ => state.apply(record),
        }
        change
    }

    fn writes(&self, stream: &StreamName) -> bool {
        let own = stream
            .endpoint()
            .map(|endpoint| StreamName::of_node(&endpoint, &self.node));
        own.as_ref() == Some(stream)
    }
}

#[cfg(test)]
mod tests {
    use contract::events::{Empty, InstanceRequested, RequestReason};
    use contract::ids::{Position, Uid};
    use contract::log::Actor;
    use contract::time::Timestamp;
    use uuid::Uuid;

    use super::*;

    fn key() -> EndpointKey {
        EndpointKey::new(&"rose".parse().unwrap())
    }

    fn record(position: u64, event: Event) -> Record {
        Record {
            position: Position(position),
            prev: Position(position - 1),
            bucket: key().bucket(),
            stream: StreamName::of(StreamKind::Instances, &key()),
            version: position,
            id: Uuid::from_u128(position.into()),
            time: Timestamp::from_secs(1),
            actor: Actor::service("test"),
            event,
        }
    }

    fn requested(id: &str, node: &str) -> Event {
        Event::InstanceRequested(Box::new(InstanceRequested {
            id: InstanceId::from(id.to_owned()),
            generation: 1,
            deployment: "rose/blue".parse().unwrap(),
            deployment_uid: Uid(Uuid::from_u128(7)),
            revision: 1,
            node: node.into(),
            decision: None,
            reason: RequestReason::ScaleOut,
            spec: serde_json::from_str(r#"{"backend": "simulated", "instanceType": "t"}"#).unwrap(),
        }))
    }

    #[test]
    fn only_own_instances_are_kept_and_they_go_with_their_endpoint() {
        let (fold, mut state) = (NodeFold::for_node("a", false), Instances::default());
        let mut apply = |position, event| {
            let record = record(position, event);
            (
                fold.apply(&key(), &mut state, &record),
                state.instances.len(),
            )
        };
        let (own, foreign) = (requested("rose-blue-1", "a"), requested("rose-blue-2", "b"));
        let (change, kept) = apply(1, own);
        assert_eq!((change.added.is_some(), kept), (true, 1));
        let (change, kept) = apply(2, foreign);
        assert_eq!((change, kept), (PlacementChange::default(), 1));
        let (change, kept) = apply(3, Event::EndpointDeleted(Empty {}));
        assert_eq!((change.removed.len(), kept), (1, 0));
    }

    #[test]
    fn the_only_node_takes_over_the_instances_of_any_other() {
        let (fold, mut state) = (NodeFold::for_node("a", true), Instances::default());
        let foreign = record(1, requested("rose-blue-2", "b"));
        let change = fold.apply(&key(), &mut state, &foreign);
        assert!(change.added.is_some());
        assert_eq!(state.instances.len(), 1);
    }

    #[test]
    fn only_the_stream_of_this_node_is_its_own() {
        let fold = NodeFold::for_node("a", false);
        assert!(fold.writes(&StreamName::of_node(&key(), "a")));
        assert!(!fold.writes(&StreamName::of_node(&key(), "b")));
        assert!(!fold.writes(&StreamName::of(StreamKind::Endpoint, &key())));
    }
}
