//! An instance may be stopped only once every gateway has released it, or at its deadline.

#![allow(clippy::unwrap_used)]

use contract::events::{
    Event, InstanceDraining, InstanceRequested, LeaveReason, MemberJoined, MemberLeft,
    RemovalReason, RequestReason,
};
use contract::frame::{DeploymentFrame, Frame, InstanceFrame, Role, Source, SourceKind};
use contract::ids::{Bucket, InstanceId, Position, Uid};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use contract::{DeploymentRef, EndpointKey};
use domain::instances::drain::DrainWatch;
use domain::instances::{Draining, Instance, Instances};
use domain::members::Members;
use uuid::Uuid;

const DRAIN_POSITION: u64 = 40;
const TIMEOUT: Span = Span::from_secs(15);

fn at(second: i64) -> Timestamp {
    Timestamp::from_secs(1000 + second)
}

fn iris() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

fn draining_instance() -> Instance {
    let id = InstanceId::from("iris-blue-1".to_owned());
    let spec = serde_json::json!({"backend": "process", "instanceType": "s", "command": ["x"]});
    let requested = InstanceRequested {
        id: id.clone(),
        generation: 1,
        deployment: DeploymentRef {
            endpoint: "iris".parse().unwrap(),
            deployment: "blue".parse().unwrap(),
        },
        deployment_uid: Uid(Uuid::nil()),
        revision: 1,
        node: "n".into(),
        decision: None,
        reason: RequestReason::ScaleOut,
        spec: serde_json::from_value(spec).unwrap(),
    };
    let draining = InstanceDraining {
        id: id.clone(),
        reason: RemovalReason::ScaleIn,
        decision: None,
        timeout: TIMEOUT,
    };
    let mut instances = Instances::default();
    instances.apply(&record(1, Event::InstanceRequested(Box::new(requested))));
    instances.apply(&record(DRAIN_POSITION, Event::InstanceDraining(draining)));
    (*instances.instances[&id]).clone()
}

fn record(position: u64, event: Event) -> Record {
    let key = EndpointKey::new(&"iris".parse().unwrap());
    Record {
        position: Position(position),
        prev: Position(0),
        bucket: iris().bucket(),
        stream: StreamName::of(StreamKind::Instances, &key),
        version: position,
        id: Uuid::nil(),
        time: at(0),
        actor: Actor::service("test"),
        event,
    }
}

/// No gateway is a member.
fn no_members() -> Members {
    Members::default()
}

/// These gateways are members.
fn members(gateways: &[&str]) -> Members {
    let mut members = Members::default();
    for (index, gateway) in gateways.iter().enumerate() {
        let source = Source {
            kind: SourceKind::GATEWAY,
            id: (*gateway).into(),
        };
        let joined = MemberJoined {
            source,
            address: None,
            backends: Vec::new(),
        };
        let mut record = record(index as u64 + 1, Event::MemberJoined(joined));
        record.stream = StreamName::members();
        members.apply(&record);
    }
    members
}

fn frame(gateway: &str, revision: u64, in_flight: u32) -> Frame {
    let instance = InstanceFrame {
        in_flight,
        ..InstanceFrame::new(draining_instance().id)
    };
    let (name, uid) = ("blue".parse().unwrap(), Uid(Uuid::nil()));
    let deployment = DeploymentFrame {
        instances: vec![instance],
        ..DeploymentFrame::new(iris(), name, uid, Role::LIVE)
    };
    Frame {
        source: Source {
            kind: SourceKind::GATEWAY,
            id: gateway.into(),
        },
        boot: Uuid::nil(),
        sequence: 0,
        bucket: iris().bucket(),
        start: at(0),
        length_us: 1_000_000,
        routes: [(iris(), Position(revision))].into(),
        members: Default::default(),
        hello: None,
        goodbye: false,
        deployments: vec![deployment],
    }
}

#[test]
fn every_gateway_must_have_reached_the_drain_with_nothing_in_flight() {
    let instance = draining_instance();
    // (frames observed, drained)
    let cases: &[(&[Frame], bool)] = &[
        (&[], false),
        (&[frame("a", 40, 0)], true),
        (&[frame("a", 41, 0)], true),
        (&[frame("a", 39, 0)], false),
        (&[frame("a", 40, 1)], false),
        (&[frame("a", 40, 0), frame("b", 39, 0)], false),
        (&[frame("a", 40, 0), frame("b", 40, 2)], false),
        (&[frame("a", 40, 0), frame("b", 40, 0)], true),
        (&[frame("a", 40, 3), frame("a", 40, 0)], true),
    ];
    for (frames, drained) in cases {
        let mut watch = DrainWatch::default();
        frames.iter().for_each(|frame| watch.observe(frame, at(1)));
        assert_eq!(
            watch.is_drained(&iris(), &instance, &no_members(), at(1)),
            *drained,
            "{frames:#?}"
        );
    }
}

#[test]
fn a_route_of_another_endpoint_does_not_count() {
    let mut watch = DrainWatch::default();
    let other = EndpointKey::new(&"other".parse().unwrap());
    let routes = [(iris(), Position(39)), (other, Position(99))].into();
    watch.observe(
        &Frame {
            routes,
            ..frame("a", 0, 0)
        },
        at(1),
    );
    assert!(!watch.is_drained(&iris(), &draining_instance(), &no_members(), at(1)));
}

#[test]
fn a_gateway_that_said_goodbye_is_not_waited_for() {
    let mut watch = DrainWatch::default();
    watch.observe(&frame("a", 40, 0), at(1));
    watch.observe(&frame("b", 1, 5), at(1));
    watch.observe(
        &Frame {
            goodbye: true,
            ..frame("b", 1, 5)
        },
        at(2),
    );
    assert!(watch.is_drained(&iris(), &draining_instance(), &no_members(), at(2)));
}

#[test]
fn reports_about_another_bucket_do_not_count() {
    let mut watch = DrainWatch::default();
    watch.observe(
        &Frame {
            bucket: Bucket(8),
            ..frame("a", 40, 0)
        },
        at(1),
    );
    assert!(!watch.is_drained(&iris(), &draining_instance(), &no_members(), at(1)));
}

#[test]
fn the_deadline_ends_the_wait_while_frames_arrive() {
    let mut watch = DrainWatch::default();
    for second in 0..15 {
        assert!(
            !watch.is_drained(&iris(), &draining_instance(), &no_members(), at(second)),
            "{second}"
        );
        watch.observe(&frame("a", 40, 1), at(second));
    }
    assert!(watch.is_drained(&iris(), &draining_instance(), &no_members(), at(15)));
}

#[test]
fn the_deadline_does_not_run_while_no_frames_arrive() {
    let mut watch = DrainWatch::default();
    watch.observe(&frame("a", 40, 1), at(0));
    assert!(!watch.is_drained(&iris(), &draining_instance(), &no_members(), at(60)));
    watch.observe(&frame("a", 40, 1), at(60));
    assert!(
        !watch.is_drained(&iris(), &draining_instance(), &no_members(), at(61)),
        "it starts again"
    );
}

#[test]
fn a_member_that_has_not_reported_yet_is_waited_for() {
    let instance = draining_instance();
    let members = members(&["a", "b"]);
    let mut watch = DrainWatch::default();
    watch.observe(&frame("a", 40, 0), at(1));
    assert!(
        !watch.is_drained(&iris(), &instance, &members, at(1)),
        "the first to report is not all"
    );
    watch.observe(&frame("b", 40, 1), at(2));
    assert!(!watch.is_drained(&iris(), &instance, &members, at(2)));
    watch.observe(&frame("b", 40, 0), at(3));
    assert!(watch.is_drained(&iris(), &instance, &members, at(3)));
}

#[test]
fn a_gateway_that_the_log_does_not_know_yet_is_waited_for() {
    let instance = draining_instance();
    let members = members(&["a"]);
    let mut watch = DrainWatch::default();
    watch.observe(&frame("a", 40, 0), at(1));
    watch.observe(&frame("newcomer", 40, 1), at(1));
    assert!(!watch.is_drained(&iris(), &instance, &members, at(1)));
    watch.observe(&frame("newcomer", 40, 0), at(2));
    assert!(watch.is_drained(&iris(), &instance, &members, at(2)));
}

#[test]
fn a_goodbye_releases_an_instance_before_the_log_records_it() {
    let members = members(&["a", "b"]);
    let mut watch = DrainWatch::default();
    watch.observe(&frame("a", 40, 0), at(1));
    let goodbye = Frame {
        goodbye: true,
        ..frame("b", 1, 5)
    };
    watch.observe(&goodbye, at(2));
    assert!(watch.is_drained(&iris(), &draining_instance(), &members, at(2)));
}

#[test]
fn a_gateway_that_left_in_silence_is_not_waited_for() {
    let instance = Instance {
        draining: Some(Draining {
            timeout: Span::from_secs(3600),
            ..draining_instance().draining.unwrap()
        }),
        ..draining_instance()
    };
    let mut watch = DrainWatch::default();
    watch.observe(&frame("b", 39, 2), at(0));
    for second in 0..=60 {
        watch.observe(&frame("a", 40, 0), at(second));
    }
    assert!(!watch.is_drained(&iris(), &instance, &members(&["a", "b"]), at(60)));
    assert!(watch.is_drained(&iris(), &instance, &members(&["a"]), at(60)));
}

#[test]
fn nobody_is_waited_for_after_the_last_gateway_has_left() {
    let mut members = members(&["a"]);
    let watch = DrainWatch::default();
    let instance = draining_instance();
    assert!(!watch.is_drained(&iris(), &instance, &members, at(5)));
    let left = MemberLeft {
        source: frame("a", 0, 0).source,
        reason: LeaveReason::Goodbye,
    };
    let mut record = record(2, Event::MemberLeft(left));
    record.stream = StreamName::members();
    members.apply(&record);
    assert!(watch.is_drained(&iris(), &instance, &members, at(5)));

    let mut watch = DrainWatch::default();
    watch.observe(&frame("newcomer", 39, 1), at(5));
    assert!(!watch.is_drained(&iris(), &instance, &members, at(5)));
}
