//! The endpoint aggregate: commands, the reactor, routes and views, driven by events as the log
//! would deliver them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use contract::decision::{Pause, Pin};
use contract::events::{
    EndpointKeys, Event, InstanceDraining, InstanceEnded, InstanceEvent, InstanceRequested,
    InstanceStarted, RemovalReason, RequestReason, SealedKey,
};
use contract::ids::{DeploymentRef, EndpointKey, InstanceId, Name, Position, Uid};
use contract::log::{Actor, Record, RowChange, StreamKind, StreamName};
use contract::resources::{
    Authorization, BackendKind, DeploymentSpec, EndpointSpec, EnvValue, ErrorMapping, Percentages,
    Protocol, ProvisioningState, Routes, Server, Update,
};
use contract::time::{Span, Timestamp};
use domain::endpoint::Endpoint;
use domain::endpoint::commands::{
    Command, CommandRefusal, Context, ENDPOINTS_MAX, Precondition, decide,
};
use domain::instances::Instances;
use domain::members::Members;
use domain::routes::{AllocationInputs, route};
use domain::settle::settle;
use domain::views::{ENDED_INSTANCES_MAX, Projection, ReadModel};
use domain::zones::ZoneData;
use proptest::prelude::*;
use uuid::Uuid;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn spec() -> DeploymentSpec {
    serde_json::from_value(serde_json::json!({"backend": "simulated", "instanceType": "small"}))
        .unwrap()
}

/// A spec that requires other instances.
fn large() -> DeploymentSpec {
    DeploymentSpec {
        instance_type: "large".into(),
        ..spec()
    }
}

fn spec_with(instances: u32) -> DeploymentSpec {
    DeploymentSpec {
        instances,
        ..spec()
    }
}

fn shares(shares: &[(&str, u8)]) -> Percentages {
    shares
        .iter()
        .map(|(deployment, share)| (name(deployment), *share))
        .collect()
}

/// One endpoint, its instances and the log that produced them.
#[derive(Clone, Default)]
struct World {
    endpoint: Option<Endpoint>,
    instances: Instances,
    granted: BTreeMap<Name, u32>,
    log: Vec<Record>,
    versions: BTreeMap<StreamName, u64>,
    uids: u128,
    now: Timestamp,
}

impl World {
    /// Creates an endpoint `iris` with these deployments.
    fn with(deployments: &[&str]) -> Self {
        let mut world = Self::default();
        world.put_endpoint(EndpointSpec::default()).unwrap();
        for deployment in deployments {
            world.put(deployment, spec()).unwrap();
        }
        world
    }

    /// Creates an endpoint `iris` with a deployment `blue` of so many instances.
    fn with_blue(instances: u32) -> Self {
        let mut world = Self::with(&[]);
        world.put("blue", spec_with(instances)).unwrap();
        world
    }

    fn key(&self) -> EndpointKey {
        EndpointKey::new(&name("iris"))
    }

    fn uid(&mut self) -> Uid {
        self.uids += 1;
        Uid(Uuid::from_u128(self.uids))
    }

    fn record(&mut self, kind: StreamKind, event: Event) {
        let stream = match kind {
            StreamKind::Node => StreamName::of_node(&self.key(), "n1"),
            kind => StreamName::of(kind, &self.key()),
        };
        let version = self.versions.entry(stream.clone()).or_default();
        *version += 1;
        let position = Position(self.log.len() as u64 + 1);
        let record = Record {
            position,
            prev: Position(position.0 - 1),
            bucket: stream.bucket_key().bucket(),
            stream,
            version: *version,
            id: Uuid::from_u128(u128::from(position.0)),
            time: self.now,
            actor: Actor::service("test"),
            event,
        };
        self.endpoint = Endpoint::apply(self.endpoint.take(), &record);
        self.instances.apply(&record);
        self.log.push(record);
    }

    fn run(&mut self, command: Command) -> Result<usize, CommandRefusal> {
        self.run_if(command, Precondition::None)
    }

    fn run_if(
        &mut self,
        command: Command,
        precondition: Precondition,
    ) -> Result<usize, CommandRefusal> {
        let context = Context {
            endpoint: name("iris"),
            other_endpoints: 0,
            precondition,
            zones: ZoneData::bundled(),
            now: self.now,
        };
        let events = decide(self.endpoint.as_ref(), &command, &context)?;
        let count = events.len();
        events
            .into_iter()
            .for_each(|event| self.record(StreamKind::Endpoint, event));
        Ok(count)
    }

    fn put_endpoint(&mut self, spec: EndpointSpec) -> Result<usize, CommandRefusal> {
        let key = |text: &str| SealedKey {
            hash: text.into(),
            sealed: text.into(),
        };
        let keys = EndpointKeys {
            primary: key("one"),
            secondary: key("two"),
        };
        let uid = self.uid();
        self.run(Command::PutEndpoint {
            labels: BTreeMap::new(),
            spec,
            uid,
            keys,
        })
    }

    fn put(&mut self, deployment: &str, spec: DeploymentSpec) -> Result<usize, CommandRefusal> {
        let uid = self.uid();
        self.run(Command::PutDeployment {
            deployment: name(deployment),
            labels: BTreeMap::new(),
            spec: Box::new(spec),
            uid,
        })
    }

    fn split(&mut self, traffic: &[(&str, u8)]) -> Result<usize, CommandRefusal> {
        self.run(Command::SetTraffic {
            traffic: Some(shares(traffic)),
            mirror: None,
        })
    }

    fn delete(&mut self, deployment: &str) -> Result<usize, CommandRefusal> {
        self.run(Command::DeleteDeployment {
            deployment: name(deployment),
        })
    }

    fn request(&mut self, id: &str, deployment: &str) {
        let found = &self.endpoint.as_ref().unwrap().deployments[&name(deployment)];
        let requested = InstanceRequested {
            id: InstanceId::from(id.to_owned()),
            generation: 1,
            deployment: DeploymentRef {
                endpoint: name("iris"),
                deployment: name(deployment),
            },
            deployment_uid: found.uid,
            revision: found.instance_revision,
            node: "n1".into(),
            decision: None,
            reason: RequestReason::ScaleOut,
            spec: found.spec.clone(),
        };
        self.record(
            StreamKind::Instances,
            Event::InstanceRequested(Box::new(requested)),
        );
    }

    fn ready(&mut self, id: &str, deployment: &str) {
        self.request(id, deployment);
        let id = InstanceId::from(id.to_owned());
        let address = format!("127.0.0.1:{}", 9000 + self.log.len());
        let started = InstanceStarted {
            id: id.clone(),
            generation: 1,
            address,
            pid: None,
            adopted: false,
        };
        self.record(StreamKind::Node, Event::InstanceStarted(started));
        self.record(StreamKind::Node, Event::InstanceReady(InstanceEvent { id }));
    }

    fn ended(id: &str, reason: &str) -> InstanceEnded {
        InstanceEnded {
            id: InstanceId::from(id.to_owned()),
            reason: reason.into(),
            exit_code: Some(1),
        }
    }

    fn fail(&mut self, id: &str) {
        self.record(
            StreamKind::Node,
            Event::InstanceFailed(Self::ended(id, "exited with 1")),
        );
    }

    fn stop(&mut self, id: &str) {
        self.record(
            StreamKind::Node,
            Event::InstanceStopped(Self::ended(id, "stopped")),
        );
    }

    fn drain(&mut self, id: &str) {
        let draining = InstanceDraining {
            id: InstanceId::from(id.to_owned()),
            reason: RemovalReason::ScaleIn,
            decision: None,
            timeout: Span::from_secs(30),
        };
        self.record(StreamKind::Instances, Event::InstanceDraining(draining));
    }

    /// Applies the reactor's events until there are no more; it must come to an end.
    fn settle(&mut self) {
        for _ in 0..10 {
            let Some(endpoint) = &self.endpoint else {
                return;
            };
            let events = settle(
                endpoint,
                &self.instances,
                &self.granted,
                &Members::default(),
                self.now,
            );
            if events.is_empty() {
                return;
            }
            events
                .into_iter()
                .for_each(|event| self.record(StreamKind::Endpoint, event));
        }
        panic!("the reactor does not come to rest");
    }

    fn state(&self, deployment: &str) -> ProvisioningState {
        self.endpoint.as_ref().unwrap().deployments[&name(deployment)].state
    }

    fn revision(&self, deployment: &str) -> u64 {
        self.endpoint.as_ref().unwrap().deployments[&name(deployment)].instance_revision
    }
}

#[test]
fn a_deployment_succeeds_once_as_many_instances_are_ready_as_were_granted() {
    let mut world = World::with_blue(2);
    world.settle();
    assert_eq!(
        world.endpoint.as_ref().unwrap().state,
        ProvisioningState::Succeeded
    );
    assert_eq!(world.state("blue"), ProvisioningState::Creating);
    world.granted.insert(name("blue"), 2);
    world.ready("a", "blue");
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Creating);
    world.ready("b", "blue");
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Succeeded);
}

#[test]
fn a_granted_count_of_zero_is_reached_at_once() {
    let mut world = World::with_blue(0);
    world.granted.insert(name("blue"), 0);
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Succeeded);
}

#[test]
fn a_changed_count_is_reached_only_once_it_was_granted() {
    let mut world = World::with(&["blue"]);
    world.granted.insert(name("blue"), 1);
    world.ready("a", "blue");
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Succeeded);
    world.put("blue", spec_with(2)).unwrap();
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Updating);
    world.granted.insert(name("blue"), 2);
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Updating);
    world.ready("b", "blue");
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Succeeded);
}

#[test]
fn what_overrides_the_count_of_a_deployment_may_grant_another_one() {
    let autoscale = |mode: &str| {
        let document = serde_json::json!({
            "target": {"endpoint": "iris", "deployment": "blue"}, "mode": mode,
            "profiles": [{"name": "default", "capacity": {"min": 1, "max": 4, "default": 1}}],
        });
        Command::PutAutoscale {
            deployment: name("blue"),
            labels: BTreeMap::new(),
            spec: serde_json::from_value(document).unwrap(),
        }
    };
    let pin = Command::Pin {
        deployment: name("blue"),
        pin: serde_json::from_value(serde_json::json!({"instances": 1})).unwrap(),
    };
    let pause = Command::SetPause {
        deployment: name("blue"),
        pause: Pause {
            scale_in: false,
            scale_out: true,
        },
    };
    let table = [
        (pin, ProvisioningState::Succeeded),
        (pause, ProvisioningState::Succeeded),
        (autoscale("live"), ProvisioningState::Succeeded),
        (autoscale("shadow"), ProvisioningState::Updating),
    ];
    for (overrides, expected) in table {
        let mut world = World::with(&["blue"]);
        world.granted.insert(name("blue"), 1);
        world.ready("a", "blue");
        let case = format!("{overrides:?}");
        world.run(overrides).unwrap();
        world.put("blue", spec_with(2)).unwrap();
        world.settle();
        assert_eq!(world.state("blue"), expected, "{case}");
    }
}

#[test]
fn a_changed_deployment_succeeds_when_no_instance_of_the_old_one_is_left() {
    let mut world = World::with(&["blue"]);
    world.granted.insert(name("blue"), 1);
    world.ready("old", "blue");
    world.settle();
    world.put("blue", large()).unwrap();
    assert_eq!(world.state("blue"), ProvisioningState::Updating);
    world.ready("new", "blue");
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Updating);
    world.drain("old");
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Succeeded);
}

#[test]
fn a_deployment_that_was_changed_back_succeeds_with_the_instances_that_it_had() {
    let mut world = World::with(&["blue"]);
    world.granted.insert(name("blue"), 1);
    world.ready("first", "blue");
    world.settle();
    world.put("blue", large()).unwrap();
    world.put("blue", spec()).unwrap();
    assert_eq!(world.state("blue"), ProvisioningState::Updating);
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Succeeded);
}

#[test]
fn five_failures_in_a_row_fail_a_deployment_until_it_recovers() {
    let mut world = World::with(&["blue"]);
    world.granted.insert(name("blue"), 1);
    for round in 0..5 {
        world.settle();
        assert_eq!(world.state("blue"), ProvisioningState::Creating, "{round}");
        let id = format!("i{round}");
        world.request(&id, "blue");
        world.fail(&id);
    }
    world.settle();
    let blue = &world.endpoint.as_ref().unwrap().deployments[&name("blue")];
    assert_eq!(blue.state, ProvisioningState::Failed);
    assert!(
        blue.state_reason.contains("exited with 1"),
        "{}",
        blue.state_reason
    );
    world.ready("good", "blue");
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Succeeded);
}

#[test]
fn failures_of_an_old_spec_do_not_fail_a_new_one() {
    let mut world = World::with(&["blue"]);
    world.granted.insert(name("blue"), 1);
    for round in 0..5 {
        let id = format!("i{round}");
        world.request(&id, "blue");
        world.fail(&id);
    }
    world.settle();
    world.now = world.now + Span::from_secs(10);
    world.put("blue", large()).unwrap();
    world.settle();
    assert_eq!(world.state("blue"), ProvisioningState::Updating);
}

#[test]
fn a_deployment_is_gone_when_its_last_instance_is_and_an_endpoint_after_its_last_deployment() {
    let mut world = World::with(&["blue", "green"]);
    world.ready("a", "blue");
    world.run(Command::DeleteEndpoint).unwrap();
    world.settle();
    let left: Vec<&Name> = world
        .endpoint
        .as_ref()
        .unwrap()
        .deployments
        .keys()
        .collect();
    assert_eq!(left, [&name("blue")]);
    assert!(matches!(
        world.put("red", spec()),
        Err(CommandRefusal::Conflict {
            code: "being-deleted",
            ..
        })
    ));
    assert_eq!(world.run(Command::DeleteEndpoint).unwrap(), 0);
    world.stop("a");
    world.settle();
    assert!(world.endpoint.is_none());
}

#[test]
fn only_changes_that_need_new_instances_raise_the_instance_revision() {
    type Change = fn(&mut DeploymentSpec);
    const TIME: Span = Span::from_secs(9);
    let table: [(&str, Change, u64); 17] = [
        ("instances", |s| s.instances = 5, 1),
        ("timeout", |s| s.request_settings.timeout = TIME, 1),
        ("header", |s| s.authorization = Authorization::Pass, 1),
        ("drain timeout", |s| s.drain_timeout = Some(TIME), 1),
        ("startup timeout", |s| s.startup_timeout = Some(TIME), 1),
        ("grace", |s| s.termination_grace = Some(TIME), 1),
        ("update", |s| s.update = Update::StopFirst, 1),
        ("routes", |s| s.routes = Some(Routes::default()), 1),
        (
            "error mapping",
            |s| s.error_mapping = Some(ErrorMapping::Pass),
            1,
        ),
        ("protocol", |s| s.protocol = Some(Protocol::Openai), 1),
        ("server", |s| s.server = Some(Server::Openai), 1),
        ("command", |s| s.command = vec!["x".into()], 2),
        (
            "environment",
            |s| {
                s.env.insert("A".into(), EnvValue::Plain("b".into()));
            },
            2,
        ),
        ("backend", |s| s.backend = BackendKind::PROCESS, 2),
        ("instance type", |s| s.instance_type = "large".into(), 2),
        ("simulated", |s| s.simulated = Some(Default::default()), 2),
        ("probe", |s| s.readiness_probe.path = "/ready".into(), 2),
    ];
    for (what, change, revision) in table {
        let mut world = World::with(&["blue"]);
        let mut changed = spec();
        change(&mut changed);
        assert_eq!(world.put("blue", changed).unwrap(), 1, "{what}");
        assert_eq!(world.revision("blue"), revision, "{what}");
    }
}

#[test]
fn traffic_names_deployments_that_stay_and_never_a_mirrored_one() {
    let mut world = World::with(&["blue", "green"]);
    type Case = (
        &'static [(&'static str, u8)],
        &'static [(&'static str, u8)],
        Option<&'static str>,
    );
    let table: [Case; 8] = [
        (&[("blue", 100)], &[("green", 10)], None),
        (
            &[("blue", 90), ("green", 10)],
            &[("green", 10)],
            Some("/mirror/green"),
        ),
        (&[("blue", 90)], &[], Some("/traffic")),
        (&[("red", 100)], &[], Some("/traffic/red")),
        (&[("blue", 100), ("red", 0)], &[], None),
        (&[("blue", 101)], &[], Some("/traffic/blue")),
        (&[("blue", 100)], &[("red", 5)], Some("/mirror/red")),
        (&[], &[], None),
    ];
    for (traffic, mirror, refused) in table {
        let command = Command::SetTraffic {
            traffic: Some(shares(traffic)),
            mirror: Some(shares(mirror)),
        };
        match (world.run(command), refused) {
            (Ok(_), None) => {}
            (Err(CommandRefusal::Invalid(findings)), Some(pointer)) => {
                assert_eq!(findings[0].pointer, pointer)
            }
            (result, refused) => panic!("{traffic:?} {mirror:?}: {result:?}, {refused:?}"),
        }
    }
    world.delete("green").unwrap();
    assert!(world.split(&[("green", 100)]).is_err());
}

#[test]
fn limits_preconditions_and_pins_are_checked() {
    let mut world = World::with(&[]);
    for index in 0..20 {
        world.put(&format!("d{index}"), spec()).unwrap();
    }
    assert!(matches!(
        world.put("one-more", spec()),
        Err(CommandRefusal::Conflict {
            code: "limit-reached",
            ..
        })
    ));
    let put = Command::DeleteDeployment {
        deployment: name("d1"),
    };
    let refused = world.run_if(put.clone(), Precondition::Revision(2));
    assert!(matches!(
        refused,
        Err(CommandRefusal::PreconditionFailed(_))
    ));
    let pin = |instances, until| Command::Pin {
        deployment: name("d1"),
        pin: Pin { instances, until },
    };
    assert!(matches!(
        world.run(pin(1001, None)),
        Err(CommandRefusal::Invalid(_))
    ));
    assert!(matches!(
        world.run(pin(1, Some(world.now))),
        Err(CommandRefusal::Invalid(_))
    ));
    assert_eq!(world.run(pin(1, None)).unwrap(), 1);
    assert_eq!(world.run(pin(1, None)).unwrap(), 0);
    assert_eq!(world.run_if(put, Precondition::Revision(1)).unwrap(), 1);
    let context = Context {
        endpoint: name("b"),
        other_endpoints: ENDPOINTS_MAX,
        precondition: Precondition::None,
        zones: ZoneData::bundled(),
        now: world.now,
    };
    let key = SealedKey {
        hash: "h".into(),
        sealed: "s".into(),
    };
    let command = Command::PutEndpoint {
        labels: BTreeMap::new(),
        spec: EndpointSpec::default(),
        uid: Uid(Uuid::nil()),
        keys: EndpointKeys {
            primary: key.clone(),
            secondary: key,
        },
    };
    assert!(matches!(
        decide(None, &command, &context),
        Err(CommandRefusal::Conflict {
            code: "limit-reached",
            ..
        })
    ));
}

#[test]
fn an_expired_pin_is_released_by_the_reactor() {
    let mut world = World::with(&["blue"]);
    let until = world.now + Span::from_secs(60);
    let pin = Pin {
        instances: 3,
        until: Some(until),
    };
    world
        .run(Command::Pin {
            deployment: name("blue"),
            pin,
        })
        .unwrap();
    world.settle();
    let pinned = |world: &World| {
        let deployment = &world.endpoint.as_ref().unwrap().deployments[&name("blue")];
        (deployment.pin.is_some(), deployment.pinned_by.is_some())
    };
    assert_eq!(pinned(&world), (true, true));
    world.now = until;
    world.settle();
    assert_eq!(pinned(&world), (false, false));
}

#[test]
fn a_route_holds_ready_instances_and_those_that_may_still_be_serving() {
    let mut world = World::with(&["blue"]);
    world.split(&[("blue", 100)]).unwrap();
    world.request("starting", "blue");
    world.ready("ready", "blue");
    world.ready("draining", "blue");
    world.drain("draining");
    world.ready("failed", "blue");
    world.fail("failed");
    let routed = |world: &World| {
        let update = route(
            world.endpoint.as_ref().unwrap(),
            &world.instances,
            Position(7),
            &AllocationInputs {
                members: &Members::default(),
                published: None,
                yielded: true,
            },
        );
        let blue = update.route.unwrap().deployments[&name("blue")].clone();
        let instances: Vec<(String, bool)> = blue
            .instances
            .iter()
            .map(|i| (i.id.to_string(), i.draining))
            .collect();
        (blue.percent, instances)
    };
    let (percent, instances) = routed(&world);
    assert_eq!(percent, 100);
    assert_eq!(
        instances,
        [("draining".into(), true), ("ready".into(), false)]
    );
    world.run(Command::DeleteEndpoint).unwrap();
    let (percent, instances) = routed(&world);
    assert_eq!(percent, 0);
    assert!(instances.iter().all(|(_, draining)| *draining));
}

#[test]
fn rows_show_instances_after_their_end_up_to_a_limit() {
    let mut world = World::with(&["blue"]);
    for index in 0..ENDED_INSTANCES_MAX + 5 {
        let id = format!("i{index:02}");
        world.ready(&id, "blue");
        world.stop(&id);
    }
    let rows = rows_of(&world.log);
    let instances: Vec<&String> = rows
        .keys()
        .filter(|(model, _)| *model == ReadModel::Instances.name())
        .map(|(_, key)| key)
        .collect();
    assert_eq!(instances.len(), ENDED_INSTANCES_MAX);
    assert_eq!(instances[0], "i05");
    world.run(Command::DeleteEndpoint).unwrap();
    world.settle();
    assert!(rows_of(&world.log).is_empty());
}

fn rows_of(log: &[Record]) -> BTreeMap<(&'static str, String), String> {
    let mut projection = Projection::default();
    let changes = log.iter().flat_map(|record| projection.apply(record));
    let rows = rows_after(changes).into_iter();
    rows.filter_map(|(key, row)| Some((key, row.doc?)))
        .collect()
}

/// The rows that result from these changes.
fn rows_after(
    changes: impl IntoIterator<Item = RowChange>,
) -> BTreeMap<(&'static str, String), RowChange> {
    let mut rows = BTreeMap::new();
    for change in changes {
        let key = (change.model, change.key.clone());
        match change.doc.is_some() {
            true => rows.insert(key, change),
            false => rows.remove(&key),
        };
    }
    rows
}

/// A change to the world, by a command or by its machines.
#[derive(Clone, Debug)]
enum Operation {
    PutEndpoint(Option<Percentages>),
    Put(usize, u32, bool),
    Delete(usize),
    DeleteEndpoint,
    Split(Percentages, Percentages),
    Pause(usize, bool),
    Pin(usize, u32),
    Ready(usize),
    EndOldest,
    Settle,
}

const NAMES: [&str; 4] = ["blue", "green", "red", "grey"];

fn any_shares() -> impl Strategy<Value = Percentages> {
    let one = (0..NAMES.len()).prop_map(|index| shares(&[(NAMES[index], 100)]));
    let two = (0..NAMES.len(), 1..NAMES.len(), 0u8..=100).prop_map(|(first, step, share)| {
        shares(&[
            (NAMES[first], share),
            (NAMES[(first + step) % NAMES.len()], 100 - share),
        ])
    });
    let wrong =
        (0..NAMES.len(), 0u8..=120).prop_map(|(index, share)| shares(&[(NAMES[index], share)]));
    prop_oneof![Just(Percentages::new()), one, two, wrong]
}

fn any_operation() -> impl Strategy<Value = Operation> {
    let which = 0..NAMES.len();
    prop_oneof![
        2 => proptest::option::of(any_shares()).prop_map(Operation::PutEndpoint),
        6 => (which.clone(), 0u32..3, any::<bool>()).prop_map(|(d, n, large)| Operation::Put(d, n, large)),
        3 => which.clone().prop_map(Operation::Delete),
        1 => Just(Operation::DeleteEndpoint),
        6 => (any_shares(), any_shares()).prop_map(|(traffic, mirror)| Operation::Split(traffic, mirror)),
        1 => (which.clone(), any::<bool>()).prop_map(|(d, to)| Operation::Pause(d, to)),
        1 => (which.clone(), 0u32..5).prop_map(|(d, n)| Operation::Pin(d, n)),
        3 => which.prop_map(Operation::Ready),
        2 => Just(Operation::EndOldest),
        3 => Just(Operation::Settle),
    ]
}

impl World {
    fn apply(&mut self, operation: &Operation, serial: usize) {
        let _ = match operation {
            Operation::PutEndpoint(traffic) => self.put_endpoint(EndpointSpec {
                traffic: traffic.clone(),
                ..EndpointSpec::default()
            }),
            Operation::Put(index, instances, large) => {
                let instance_type = if *large { "large" } else { "small" }.into();
                self.put(
                    NAMES[*index],
                    DeploymentSpec {
                        instances: *instances,
                        instance_type,
                        ..spec()
                    },
                )
            }
            Operation::Delete(index) => self.delete(NAMES[*index]),
            Operation::DeleteEndpoint => self.run(Command::DeleteEndpoint),
            Operation::Split(traffic, mirror) => self.run(Command::SetTraffic {
                traffic: Some(traffic.clone()),
                mirror: Some(mirror.clone()),
            }),
            Operation::Pause(index, to) => {
                let pause = Pause {
                    scale_in: *to,
                    scale_out: false,
                };
                self.run(Command::SetPause {
                    deployment: name(NAMES[*index]),
                    pause,
                })
            }
            Operation::Pin(index, instances) => {
                let pin = Pin {
                    instances: *instances,
                    until: None,
                };
                self.run(Command::Pin {
                    deployment: name(NAMES[*index]),
                    pin,
                })
            }
            Operation::Ready(index) => {
                let deployment = name(NAMES[*index]);
                let exists = self
                    .endpoint
                    .as_ref()
                    .is_some_and(|e| e.deployments.contains_key(&deployment));
                if exists {
                    self.ready(&format!("i{serial:03}"), NAMES[*index]);
                }
                Ok(0)
            }
            Operation::EndOldest => {
                if let Some(id) = self.instances.instances.keys().next().cloned() {
                    self.stop(id.as_str());
                }
                Ok(0)
            }
            Operation::Settle => {
                self.settle();
                Ok(0)
            }
        };
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let Some(endpoint) = &self.endpoint else {
            return Ok(());
        };
        let sum: u32 = endpoint
            .traffic
            .values()
            .map(|share| u32::from(*share))
            .sum();
        prop_assert!(sum == 0 || sum == 100, "traffic sums to {sum}");
        let leaving = endpoint.state == ProvisioningState::Deleting;
        for named in endpoint.traffic.keys().chain(endpoint.mirror.keys()) {
            let state = endpoint.deployments.get(named).map(|d| d.state);
            prop_assert!(
                leaving || state.is_some_and(|s| s != ProvisioningState::Deleting),
                "{named} is {state:?}"
            );
        }
        for mirrored in endpoint.mirror.keys() {
            prop_assert!(
                !endpoint.traffic.contains_key(mirrored),
                "{mirrored} is live and mirrored"
            );
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_commands_breaks_the_split(operations in proptest::collection::vec(any_operation(), 1..60)) {
        let mut world = World::default();
        for (serial, operation) in operations.iter().enumerate() {
            world.apply(operation, serial);
            world.check()?;
        }
    }

    #[test]
    fn the_same_command_twice_writes_nothing_the_second_time(operations in proptest::collection::vec(any_operation(), 1..40)) {
        let mut world = World::default();
        for (serial, operation) in operations.iter().enumerate() {
            world.apply(operation, serial);
            // What machines do is not idempotent, and a deletion may have completed.
            if matches!(operation, Operation::Put(..) | Operation::Split(..) | Operation::Pause(..) | Operation::Pin(..) | Operation::DeleteEndpoint) {
                let written = world.log.len();
                world.apply(operation, serial);
                prop_assert_eq!(world.log.len(), written, "{:?}", operation);
            }
        }
    }

    #[test]
    fn rows_match_the_aggregate(operations in proptest::collection::vec(any_operation(), 1..60)) {
        let mut world = World::default();
        for (serial, operation) in operations.iter().enumerate() {
            world.apply(operation, serial);
        }
        let rows = rows_of(&world.log);
        let count = |wanted: &str| rows.keys().filter(|(model, _)| *model == wanted).count();
        prop_assert_eq!(count(ReadModel::Endpoints.name()), usize::from(world.endpoint.is_some()));
        let deployments = world.endpoint.as_ref().map_or(0, |endpoint| endpoint.deployments.len());
        prop_assert_eq!(count(ReadModel::Deployments.name()), deployments);
        if let Some(endpoint) = &world.endpoint {
            let row = &rows[&(ReadModel::Endpoints.name(), "default/iris".to_owned())];
            let view: contract::views::EndpointView = serde_json::from_str(row).unwrap();
            prop_assert_eq!(view.spec.traffic.as_ref(), Some(&endpoint.traffic));
            prop_assert_eq!(view.metadata.revision, endpoint.revision);
        }
    }

    #[test]
    fn deferred_rows_equal_those_written_at_every_step(operations in proptest::collection::vec(any_operation(), 1..60)) {
        let mut world = World::default();
        for (serial, operation) in operations.iter().enumerate() {
            world.apply(operation, serial);
        }
        let (mut live, mut late) = (Projection::default(), Projection::with_deferred_rows());
        let every_step = rows_after(world.log.iter().flat_map(|record| live.apply(record)));
        let mut changes: Vec<RowChange> = world.log.iter().flat_map(|record| late.apply(record)).collect();
        prop_assert!(changes.iter().all(|change| change.model != ReadModel::Deployments.name() || change.doc.is_none()));
        changes.extend(late.take_deferred_rows());
        prop_assert_eq!(rows_after(changes), every_step);
    }

    #[test]
    fn the_reactor_always_settles(operations in proptest::collection::vec(any_operation(), 1..40)) {
        let mut world = World::default();
        for (serial, operation) in operations.iter().enumerate() {
            world.apply(operation, serial);
            world.clone().settle();
        }
    }
}
