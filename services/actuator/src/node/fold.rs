//! What a node keeps of the log: its own instances of each endpoint.

use contract::events::Event;
use contract::ids::{EndpointKey, InstanceId};
use contract::log::{Record, StreamKind, StreamName};
use domain::fold::FOLD_VERSION;
use domain::instances::Instances;
use runtime::consumer::Fold;

/// Folds the instances that are on one node.
pub(super) struct NodeFold {
    node: String,
}

impl NodeFold {
    pub(super) fn of(node: &str) -> Self {
        Self {
            node: node.to_owned(),
        }
    }
}

/// What a record says about the instances of this node.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Placed {
    /// Named for the first time.
    pub(super) new: Option<InstanceId>,
    /// Nothing in the log wants these any more.
    pub(super) gone: Vec<InstanceId>,
}

impl Fold for NodeFold {
    type State = Instances;
    type Effect = Placed;

    const VERSION: u32 = FOLD_VERSION;
    const READS: &'static [StreamKind] = &[
        StreamKind::Endpoint,
        StreamKind::Instances,
        StreamKind::Node,
    ];

    fn apply(&self, _key: &EndpointKey, state: &mut Instances, record: &Record) -> Placed {
        let mut placed = Placed::default();
        match &record.event {
            Event::EndpointDeleted(_) => {
                placed.gone = std::mem::take(state).instances.into_keys().collect();
            }
            Event::DeploymentDeleted(of) => {
                let of_it = state
                    .instances
                    .values()
                    .filter(|i| i.deployment == of.deployment);
                placed.gone = of_it.map(|instance| instance.id.clone()).collect();
                for id in &placed.gone {
                    if let Some(instance) = state.instances.remove(id) {
                        state.starts.remove(&instance.deployment_uid);
                    }
                }
            }
            Event::InstanceRequested(requested) if requested.node != self.node => {}
            Event::InstanceRequested(requested) => {
                state.apply(record);
                placed.new = Some(requested.id.clone());
            }
            Event::InstanceStopped(ended) => {
                state.apply(record);
                placed.gone = vec![ended.id.clone()];
            }
            _ => state.apply(record),
        }
        placed
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
    fn only_instances_of_this_node_are_kept_and_all_of_them_go_with_their_endpoint() {
        let (fold, mut state) = (NodeFold::of("a"), Instances::default());
        let mut apply = |position, event| {
            let record = record(position, event);
            (
                fold.apply(&key(), &mut state, &record),
                state.instances.len(),
            )
        };
        let (ours, theirs) = (requested("rose-blue-1", "a"), requested("rose-blue-2", "b"));
        let (placed, kept) = apply(1, ours);
        assert_eq!((placed.new.is_some(), kept), (true, 1));
        let (placed, kept) = apply(2, theirs);
        assert_eq!((placed, kept), (Placed::default(), 1));
        let (placed, kept) = apply(3, Event::EndpointDeleted(Empty {}));
        assert_eq!((placed.gone.len(), kept), (1, 0));
    }

    #[test]
    fn only_the_stream_of_this_node_is_its_own() {
        let fold = NodeFold::of("a");
        assert!(fold.writes(&StreamName::of_node(&key(), "a")));
        assert!(!fold.writes(&StreamName::of_node(&key(), "b")));
        assert!(!fold.writes(&StreamName::of(StreamKind::Endpoint, &key())));
    }
}
