//! The world that the planner's tests act in.

use std::collections::{BTreeMap, BTreeSet};

use contract::EndpointKey;
use contract::events::{
    DeploymentCreated, DeploymentUpdated, EndpointCreated, EndpointKeys, Event, InstanceEnded,
    InstanceEvent, InstanceUnhealthy, LeaveReason, MemberJoined, MemberLeft, SealedKey,
};
use contract::frame::{Source, SourceKind};
use contract::ids::{Bucket, InstanceId, Name, Position, Uid};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::resources::{BackendKind, DeploymentSpec};
use contract::time::{Span, Timestamp};
use domain::endpoint::Endpoint;
use domain::instances::plan::{Granted, PlanContext, plan};
use domain::instances::{Instance, InstanceState, Instances};
use domain::members::Members;
use uuid::Uuid;

/// One endpoint `iris` with one deployment `blue`, and a node that carries out the requests.
pub struct World {
    pub endpoint: Option<Endpoint>,
    pub instances: Instances,
    pub granted: BTreeMap<Uid, Granted>,
    /// Instances that gateways still use.
    pub busy: BTreeSet<InstanceId>,
    pub members: Members,
    /// What the next change of the command starts from.
    pub spec: DeploymentSpec,
    pub own_node: Option<&'static str>,
    pub is_only_node: bool,
    pub now: Timestamp,
    pub position: u64,
    pub ids: u128,
}

impl World {
    pub fn new() -> Self {
        let mut world = Self {
            endpoint: None,
            instances: Instances::default(),
            granted: BTreeMap::new(),
            busy: BTreeSet::new(),
            members: Members::default(),
            spec: spec(),
            own_node: Some("node-1"),
            is_only_node: false,
            now: Timestamp::from_secs(1_000_000),
            position: 0,
            ids: 0,
        };
        let key = SealedKey {
            hash: String::new(),
            sealed: String::new(),
        };
        world.append(Event::EndpointCreated(EndpointCreated {
            uid: Uid(Uuid::from_u128(1)),
            name: name("iris"),
            labels: BTreeMap::new(),
            spec: Default::default(),
            keys: EndpointKeys {
                primary: key.clone(),
                secondary: key,
            },
        }));
        world.append(Event::DeploymentCreated(DeploymentCreated {
            uid: blue(),
            deployment: name("blue"),
            labels: BTreeMap::new(),
            spec: spec(),
        }));
        world
    }

    pub fn append(&mut self, event: Event) {
        self.position += 1;
        let key = EndpointKey::new(&name("iris"));
        let record = Record {
            position: Position(self.position),
            prev: Position(self.position - 1),
            bucket: Bucket(0),
            stream: StreamName::of(StreamKind::Endpoint, &key),
            version: self.position,
            id: Uuid::from_u128(u128::from(self.position)),
            time: self.now,
            actor: Actor::service("test"),
            event,
        };
        let record = match record.event {
            Event::MemberJoined(_) | Event::MemberLeft(_) => Record {
                stream: StreamName::members(),
                ..record
            },
            _ => record,
        };
        self.members.apply(&record);
        self.endpoint = Endpoint::apply(self.endpoint.take(), &record);
        self.instances.apply(&record);
    }

    pub fn join(&mut self, node: &str, backends: &[BackendKind]) {
        self.append(Event::MemberJoined(MemberJoined {
            source: node_source(node),
            address: None,
            backends: backends.to_vec(),
        }));
    }

    pub fn leave(&mut self, node: &str, reason: LeaveReason) {
        self.append(Event::MemberLeft(MemberLeft {
            source: node_source(node),
            reason,
        }));
    }

    /// Kept instances, by node.
    pub fn by_node(&self) -> BTreeMap<String, usize> {
        let mut by_node = BTreeMap::new();
        for instance in self.instances.instances.values().filter(|i| i.is_kept()) {
            *by_node.entry(instance.node.clone()).or_default() += 1;
        }
        by_node
    }

    pub fn grant(&mut self, instances: u32) {
        self.granted.insert(
            blue(),
            Granted {
                instances,
                decision: Uuid::from_u128(99),
            },
        );
    }

    /// Plans once and appends the requests.
    pub fn plan(&mut self) -> Vec<Event> {
        let busy = self.busy.clone();
        let mut ids = self.ids;
        let context = PlanContext {
            granted: &self.granted,
            drained: &|instance: &Instance| {
                instance.draining.is_some() && !busy.contains(&instance.id)
            },
            members: &self.members,
            own_node: self.own_node,
            is_only_node: self.is_only_node,
            now: self.now,
        };
        let mut new_id = || {
            ids += 1;
            Uuid::from_u128(ids)
        };
        let planned = plan(
            &name("iris"),
            self.endpoint.as_ref(),
            &self.instances,
            &context,
            &mut new_id,
        );
        self.ids = ids;
        planned.iter().cloned().for_each(|event| self.append(event));
        planned
    }

    pub fn ids_in(&self, state: InstanceState) -> Vec<InstanceId> {
        let all = self.instances.instances.values();
        all.filter(|i| i.state() == state && i.removal.is_none())
            .map(|i| i.id.clone())
            .collect()
    }

    pub fn count(&self, state: InstanceState) -> usize {
        self.ids_in(state).len()
    }

    pub fn make_ready(&mut self) {
        for id in self.ids_in(InstanceState::Starting) {
            self.append(Event::InstanceReady(InstanceEvent { id }));
        }
    }

    pub fn carry_out_removals(&mut self) {
        let removing = self
            .instances
            .instances
            .values()
            .filter(|i| i.removal.is_some());
        let ids: Vec<_> = removing.map(|i| i.id.clone()).collect();
        for id in ids {
            let ended = InstanceEnded {
                id,
                reason: String::new(),
                exit_code: Some(0),
            };
            self.append(Event::InstanceStopped(ended));
        }
    }

    pub fn fail(&mut self, id: InstanceId) {
        let ended = InstanceEnded {
            id,
            reason: "exited".into(),
            exit_code: Some(1),
        };
        self.append(Event::InstanceFailed(ended));
    }

    pub fn sicken(&mut self, id: InstanceId) {
        let reason = "its liveness probe fails".into();
        let unhealthy = InstanceUnhealthy { id, reason };
        self.append(Event::InstanceUnhealthy(unhealthy));
    }

    pub fn change_command(&mut self) {
        let revision = self.endpoint.as_ref().unwrap().deployments[&name("blue")].instance_revision;
        let mut spec = self.spec.clone();
        spec.command.push(format!("--revision={}", revision + 1));
        self.append(Event::DeploymentUpdated(DeploymentUpdated {
            deployment: name("blue"),
            revision: revision + 1,
            labels: BTreeMap::new(),
            spec,
        }));
    }

    /// Plans, starts, drains and removes until nothing is left to do; returns the number of ready
    /// instances after each step.
    pub fn settle(&mut self) -> Vec<usize> {
        let mut ready = Vec::new();
        for _ in 0..200 {
            let planned = self.plan();
            ready.push(self.count(InstanceState::Ready));
            let removing = self
                .instances
                .instances
                .values()
                .any(|i| i.removal.is_some());
            if planned.is_empty() && !removing && self.count(InstanceState::Starting) == 0 {
                return ready;
            }
            self.make_ready();
            ready.push(self.count(InstanceState::Ready));
            self.carry_out_removals();
            self.now = self.now + Span::from_secs(1);
        }
        panic!("the plan does not settle");
    }
}

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub fn node_source(node: &str) -> Source {
    Source {
        kind: SourceKind::NODE,
        id: node.into(),
    }
}

pub fn two_nodes() -> World {
    let mut world = World::new();
    world.own_node = None;
    world.join("north", &[BackendKind::PROCESS]);
    world.join("south", &[BackendKind::PROCESS]);
    world
}

pub fn on(pairs: &[(&str, usize)]) -> BTreeMap<String, usize> {
    pairs.iter().map(|(n, c)| ((*n).to_owned(), *c)).collect()
}

pub fn blue() -> Uid {
    Uid(Uuid::from_u128(2))
}

pub fn spec() -> DeploymentSpec {
    let document = serde_json::json!({"backend": "process", "instanceType": "cpu-small", "command": ["x", "{port}"]});
    serde_json::from_value(document).unwrap()
}

pub fn requests(planned: &[Event]) -> usize {
    planned
        .iter()
        .filter(|event| matches!(event, Event::InstanceRequested(_)))
        .count()
}
