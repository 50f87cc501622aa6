//! The condition Available in the view of a deployment: it follows the instances, with the newest
//! failure and since when.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use contract::events::{
    DeploymentCreated, DeploymentEvent, DeploymentStateChanged, DeploymentUpdated, EndpointCreated,
    EndpointKeys, Event, InstanceEnded, InstanceEvent, InstanceRequested, InstanceStarting,
    InstanceUnready, RequestReason, SealedKey,
};
use contract::ids::{EndpointKey, InstanceId, Name, Position, Uid};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::resources::{DeploymentSpec, ProvisioningState};
use contract::time::{Span, Timestamp};
use contract::views::{AvailableCondition, AvailableReason, ConditionStatus, DeploymentView};
use domain::available;
use domain::fold::EndpointFold;
use domain::views::EndpointModel;
use serde_json::json;
use uuid::Uuid;

const BLUE: Uid = Uid(Uuid::from_u128(2));

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn key() -> EndpointKey {
    EndpointKey::new(&name("iris"))
}

fn spec() -> DeploymentSpec {
    serde_json::from_value(json!({"backend": "simulated", "instanceType": "small"})).unwrap()
}

/// The model of an endpoint `iris` with a deployment `blue`.
struct World {
    model: EndpointModel,
    fold: EndpointFold,
    spec: DeploymentSpec,
    position: u64,
    revision: u64,
    now: Timestamp,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            model: EndpointModel::default(),
            fold: EndpointFold::default(),
            spec: spec(),
            position: 0,
            revision: 1,
            now: Timestamp::from_secs(1_000_000),
        };
        let key = SealedKey {
            hash: String::new(),
            sealed: String::new(),
        };
        world.append(
            StreamKind::Endpoint,
            Event::EndpointCreated(EndpointCreated {
                uid: Uid(Uuid::from_u128(1)),
                name: name("iris"),
                labels: Default::default(),
                spec: Default::default(),
                keys: EndpointKeys {
                    primary: key.clone(),
                    secondary: key,
                },
            }),
        );
        world.append(
            StreamKind::Endpoint,
            Event::DeploymentCreated(DeploymentCreated {
                uid: BLUE,
                deployment: name("blue"),
                labels: Default::default(),
                spec: spec(),
            }),
        );
        world
    }

    /// One second passes before each event.
    fn append(&mut self, kind: StreamKind, event: Event) {
        self.position += 1;
        self.now = self.now + Span::from_secs(1);
        let record = Record {
            position: Position(self.position),
            prev: Position(self.position - 1),
            bucket: key().bucket(),
            stream: match kind {
                StreamKind::Node => StreamName::of_node(&key(), "n"),
                kind => StreamName::of(kind, &key()),
            },
            version: self.position,
            id: Uuid::from_u128(u128::from(self.position)),
            time: self.now,
            actor: Actor::service("test"),
            event,
        };
        self.model.apply(&key(), &record);
        self.fold.apply(&record);
    }

    fn grant(&mut self, instances: u32) {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("../contract/tests/golden/events/scaling.decided.v1.json");
        let text = std::fs::read_to_string(file).unwrap();
        let mut decision: serde_json::Value = serde_json::from_str(&text).unwrap();
        decision["deploymentUid"] = json!(BLUE);
        decision["granted"] = json!(instances);
        let event = Event::decode("scaling.decided", 1, &decision.to_string()).unwrap();
        self.append(StreamKind::Scaling, event);
    }

    fn request(&mut self, id: &str) {
        let requested = InstanceRequested {
            id: InstanceId::from(id.to_owned()),
            generation: 1,
            deployment: "iris/blue".parse().unwrap(),
            deployment_uid: BLUE,
            revision: self.revision,
            node: "n".into(),
            decision: None,
            reason: RequestReason::ScaleOut,
            spec: self.spec.clone(),
        };
        let event = Event::InstanceRequested(Box::new(requested));
        self.append(StreamKind::Instances, event);
    }

    fn ready(&mut self, id: &str) {
        let id = InstanceId::from(id.to_owned());
        self.append(StreamKind::Node, Event::InstanceReady(InstanceEvent { id }));
    }

    fn unready(&mut self, id: &str, reason: &str) {
        let unready = InstanceUnready {
            id: InstanceId::from(id.to_owned()),
            reason: reason.into(),
        };
        self.append(StreamKind::Node, Event::InstanceUnready(unready));
    }

    fn fail(&mut self, id: &str, reason: &str) {
        let ended = InstanceEnded {
            id: InstanceId::from(id.to_owned()),
            reason: reason.into(),
            exit_code: Some(1),
        };
        self.append(StreamKind::Node, Event::InstanceFailed(ended));
    }

    fn succeed(&mut self) {
        let changed = DeploymentStateChanged {
            deployment: name("blue"),
            state: ProvisioningState::Succeeded,
            reason: String::new(),
        };
        self.append(StreamKind::Endpoint, Event::DeploymentStateChanged(changed));
    }

    fn change(&mut self, instance_type: &str) {
        self.revision += 1;
        self.spec.instance_type = instance_type.into();
        let updated = DeploymentUpdated {
            deployment: name("blue"),
            revision: self.revision,
            labels: Default::default(),
            spec: self.spec.clone(),
        };
        self.append(StreamKind::Endpoint, Event::DeploymentUpdated(updated));
    }

    /// Whether rules hold because the present spec was never ready.
    fn never_ready(&self) -> bool {
        let endpoint = self.fold.endpoint.as_ref().unwrap();
        let deployment = &endpoint.deployments[&name("blue")];
        let failed = available::failed_starts(deployment, &self.fold.instances);
        failed.unwrap().never_ready
    }

    fn view(&self) -> DeploymentView {
        let endpoint = self.model.endpoint.as_ref().unwrap();
        let deployment = &endpoint.deployments[&name("blue")];
        self.model
            .deployment_view(endpoint, &name("blue"), deployment)
    }

    fn available(&self) -> AvailableCondition {
        self.view().status.available.unwrap()
    }

    /// The reason, and the message.
    fn told(&self) -> (AvailableReason, String) {
        let available = self.available();
        (available.reason, available.message)
    }
}

#[test]
fn a_deployment_is_starting_until_its_first_instance_is_ready() {
    let mut world = World::new();
    let undecided = (
        AvailableReason::Starting,
        "the count has not been decided yet".to_owned(),
    );
    assert_eq!(world.told(), undecided);
    world.grant(1);
    world.request("a");
    let starting = (
        AvailableReason::Starting,
        "0 of 1 instance is ready".to_owned(),
    );
    assert_eq!(world.told(), starting);
    world.ready("a");
    let ready = (
        AvailableReason::Ready,
        "1 of 1 instance is ready".to_owned(),
    );
    assert_eq!(world.told(), ready);
}

#[test]
fn a_deployment_whose_program_is_gone_is_failing_although_it_has_succeeded_once() {
    let mut world = World::new();
    world.grant(1);
    world.request("a");
    world.ready("a");
    world.succeed();
    world.fail("a", "exited with 1");
    let status = world.view().status;
    assert_eq!(status.provisioning_state, ProvisioningState::Succeeded);
    let failing = (
        AvailableReason::Failing,
        "0 of 1 instance is ready; the last one failed: exited with 1".to_owned(),
    );
    assert_eq!(world.told(), failing);
    world.request("b");
    world.fail("b", "exited with 2");
    let message = world.available().message;
    assert_eq!(
        message,
        "0 of 1 instance is ready; 2 failed in a row, the last with: exited with 2"
    );
}

#[test]
fn a_start_that_takes_long_says_what_it_waits_for() {
    let mut world = World::new();
    world.grant(1);
    world.request("a");
    let starting = InstanceStarting {
        id: InstanceId::from("a".to_owned()),
        detail: "port 4123 is closed".into(),
    };
    world.append(StreamKind::Node, Event::InstanceStarting(starting));
    let expected = "0 of 1 instance is ready; a is starting: port 4123 is closed";
    assert_eq!(
        world.told(),
        (AvailableReason::Starting, expected.to_owned())
    );
    world.ready("a");
    assert_eq!(world.available().message, "1 of 1 instance is ready");
}

#[test]
fn some_ready_instances_of_those_wanted_are_degraded_and_serve() {
    let mut world = World::new();
    world.grant(3);
    for id in ["a", "b"] {
        world.request(id);
        world.ready(id);
    }
    let available = world.available();
    assert_eq!(available.reason, AvailableReason::Degraded);
    assert_eq!(available.status, ConditionStatus::True);
    assert_eq!(available.message, "2 of 3 instances are ready");
}

#[test]
fn failing_readiness_probes_are_failing_with_what_the_probe_saw() {
    let mut world = World::new();
    world.grant(1);
    world.request("a");
    world.ready("a");
    world.unready("a", "it answered 503");
    let failing = (
        AvailableReason::Failing,
        "0 of 1 instance is ready; a fails its readiness probe: it answered 503".to_owned(),
    );
    assert_eq!(world.told(), failing);
    assert_eq!(world.available().status, ConditionStatus::False);
}

#[test]
fn no_wanted_instance_is_scaled_to_zero_and_not_a_failure() {
    let mut world = World::new();
    world.grant(1);
    world.request("a");
    world.fail("a", "exited with 1");
    world.grant(0);
    let zero = (
        AvailableReason::ScaledToZero,
        "no instance is wanted".to_owned(),
    );
    assert_eq!(world.told(), zero);
    assert_eq!(world.available().status, ConditionStatus::False);
}

#[test]
fn since_is_when_the_reason_changed_and_not_when_the_message_did() {
    let mut world = World::new();
    world.grant(1);
    world.request("a");
    world.fail("a", "exited with 1");
    let failed = world.now;
    assert_eq!(world.available().since, failed);
    world.request("b");
    world.fail("b", "exited with 2");
    assert_eq!(world.available().since, failed);
    world.request("c");
    world.ready("c");
    assert_eq!(world.available().since, world.now);
}

#[test]
fn failures_of_an_older_revision_say_nothing_about_the_present_one() {
    let mut world = World::new();
    world.grant(1);
    world.request("a");
    world.fail("a", "exited with 1");
    world.change("large");
    assert_eq!(world.available().reason, AvailableReason::Starting);
}

#[test]
fn a_deployment_that_is_being_deleted_has_no_condition() {
    let mut world = World::new();
    world.grant(1);
    let deleted = DeploymentEvent {
        deployment: name("blue"),
    };
    let event = Event::DeploymentDeletionRequested(deleted);
    world.append(StreamKind::Endpoint, event);
    assert_eq!(world.view().status.available, None);
}

#[test]
fn a_spec_that_was_ready_before_others_replaced_it_was_ready_when_its_next_start_fails() {
    let mut world = World::new();
    world.grant(1);
    world.request("a");
    world.ready("a");
    world.change("large");
    world.request("b");
    world.fail("b", "exited with 1");
    assert!(world.never_ready(), "of the new spec");
    world.request("c");
    world.ready("c");
    world.change("small");
    world.request("d");
    world.fail("d", "exited with 1");
    assert!(!world.never_ready());
}

#[test]
fn a_change_that_replaces_no_instance_keeps_what_was_ready() {
    let mut world = World::new();
    world.grant(1);
    world.request("a");
    world.ready("a");
    world.spec.startup_timeout = Some(Span::from_secs(5));
    world.change("small");
    world.request("b");
    world.fail("b", "exited with 1");
    assert!(!world.never_ready());
}
