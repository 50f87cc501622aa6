//! Membership by hello, goodbye and silence, and never by our own loss of contact.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use contract::events::{Event, LeaveReason};
use contract::frame::{Frame, Hello, Source, SourceKind};
use contract::ids::{Bucket, Position};
use contract::log::{Actor, Record, StreamName};
use contract::resources::BackendKind;
use contract::time::{Span, Timestamp};
use domain::members::{MemberWatch, Members, NODE_GRACE};
use uuid::Uuid;

const SILENCE: i64 = 60;

fn at(second: i64) -> Timestamp {
    Timestamp::from_secs(1_000_000 + second)
}

fn source(kind: SourceKind, id: &str) -> Source {
    Source {
        kind,
        id: id.into(),
    }
}

fn gateway(id: &str) -> Frame {
    Frame {
        source: source(SourceKind::GATEWAY, id),
        boot: Uuid::from_u128(1),
        sequence: 0,
        bucket: Bucket(0),
        start: at(0),
        length_us: 1_000_000,
        routes: BTreeMap::new(),
        members: Position::START,
        hello: Some(Hello::default()),
        goodbye: false,
        deployments: Vec::new(),
    }
}

fn node(id: &str, backends: &[BackendKind]) -> Frame {
    Frame {
        source: source(SourceKind::NODE, id),
        hello: Some(Hello {
            address: Some(format!("http://{id}:7072")),
            backends: backends.to_vec(),
        }),
        ..gateway(id)
    }
}

fn goodbye(frame: Frame) -> Frame {
    Frame {
        goodbye: true,
        ..frame
    }
}

/// A watch and the stream that it writes.
#[derive(Default)]
struct World {
    watch: MemberWatch,
    members: Members,
    position: u64,
}

impl World {
    fn receive(&mut self, frame: &Frame, second: i64) {
        self.watch.observe(frame, at(second));
    }

    /// Appends what is due: `+id` and `-id (reason)`.
    fn poll(&mut self, second: i64) -> Vec<String> {
        let events = self.watch.due(&self.members, at(second));
        for event in &events {
            self.position += 1;
            self.members.apply(&Record {
                position: Position(self.position),
                prev: Position(self.position - 1),
                bucket: Bucket::GLOBAL,
                stream: StreamName::members(),
                version: self.position,
                id: Uuid::nil(),
                time: at(second),
                actor: Actor::service("test"),
                event: event.clone(),
            });
        }
        let word = |event: Event| match event {
            Event::MemberJoined(joined) => format!("+{}", joined.source.id),
            Event::MemberLeft(left) => format!("-{} {:?}", left.source.id, left.reason),
            other => panic!("{other:?}"),
        };
        events.into_iter().map(word).collect()
    }

    /// Sends these frames every second; returns everything that was written.
    fn run(&mut self, seconds: std::ops::Range<i64>, frames: &[Frame]) -> Vec<String> {
        let mut written = Vec::new();
        for second in seconds {
            frames.iter().for_each(|frame| self.receive(frame, second));
            written.extend(self.poll(second));
        }
        written
    }
}

#[test]
fn a_source_joins_once_by_its_hello() {
    let mut world = World::default();
    let written = world.run(0..10, &[gateway("a"), node("n", &[BackendKind::PROCESS])]);
    assert_eq!(written, ["+a", "+n"]);
    assert_eq!(
        world.members.nodes["n"].address.as_deref(),
        Some("http://n:7072")
    );
    assert_eq!(world.members.nodes["n"].backends, [BackendKind::PROCESS]);
}

#[test]
fn a_source_without_a_hello_is_no_member() {
    let mut world = World::default();
    let silent = Frame {
        hello: None,
        ..gateway("a")
    };
    let elsewhere = Frame {
        bucket: Bucket(5),
        ..gateway("b")
    };
    assert!(world.run(0..3, &[silent, elsewhere]).is_empty());
}

#[test]
fn a_hello_that_changed_is_written_again() {
    let mut world = World::default();
    world.run(0..3, &[node("n", &[BackendKind::PROCESS])]);
    let more = [BackendKind::PROCESS, BackendKind::SIMULATED];
    assert_eq!(world.run(3..6, &[node("n", &more)]), ["+n"]);
    assert_eq!(world.members.nodes["n"].backends, more);
}

#[test]
fn a_source_leaves_by_its_goodbye_and_may_come_back() {
    let mut world = World::default();
    world.run(0..3, &[gateway("a"), gateway("b")]);
    world.receive(&goodbye(gateway("b")), 3);
    assert_eq!(world.poll(3), ["-b Goodbye"]);
    assert!(world.run(4..10, &[gateway("a")]).is_empty());
    let again = Frame {
        boot: Uuid::from_u128(2),
        ..gateway("b")
    };
    assert_eq!(world.run(10..12, &[gateway("a"), again]), ["+b"]);
}

#[test]
fn a_late_goodbye_of_an_earlier_start_does_not_remove_the_new_one() {
    let mut world = World::default();
    let again = Frame {
        boot: Uuid::from_u128(2),
        ..gateway("a")
    };
    world.run(0..3, &[again]);
    world.receive(&goodbye(gateway("a")), 3);
    assert!(world.poll(3).is_empty());
}

#[test]
fn a_member_that_falls_silent_leaves_after_a_minute_while_others_are_heard() {
    let mut world = World::default();
    world.run(0..1, &[gateway("a"), gateway("b")]);
    assert!(world.run(1..SILENCE, &[gateway("a")]).is_empty());
    assert_eq!(
        world.run(SILENCE..SILENCE + 10, &[gateway("a")]),
        ["-b Silent"]
    );
}

#[test]
fn a_member_never_seen_by_this_watch_still_gets_its_minute() {
    let mut world = World::default();
    world.run(0..1, &[gateway("a"), gateway("b")]);
    world.watch = MemberWatch::default();
    assert!(world.poll(1000).is_empty(), "no frame has arrived yet");
    assert!(world.run(1000..1000 + SILENCE, &[gateway("a")]).is_empty());
    assert_eq!(world.run(1060..1062, &[gateway("a")]), ["-b Silent"]);
}

#[test]
fn nobody_leaves_while_no_frames_arrive_and_the_timeout_restarts_afterwards() {
    let mut world = World::default();
    world.run(0..30, &[gateway("a"), gateway("b")]);
    for second in 30..600 {
        assert!(world.poll(second).is_empty(), "{second}");
    }
    assert!(world.run(600..600 + SILENCE, &[gateway("a")]).is_empty());
    assert_eq!(world.run(660..662, &[gateway("a")]), ["-b Silent"]);
}

#[test]
fn a_member_that_left_in_silence_rejoins_with_its_next_frame() {
    let mut world = World::default();
    world.run(0..1, &[gateway("a"), gateway("b")]);
    world.run(1..SILENCE + 1, &[gateway("a")]);
    assert!(world.run(61..90, &[gateway("a")]).is_empty());
    assert_eq!(world.run(90..92, &[gateway("a"), gateway("b")]), ["+b"]);
}

#[test]
fn a_silent_node_is_lost_at_once_and_one_that_said_goodbye_after_its_grace() {
    let mut world = World::default();
    let nodes = [node("n", &[]), node("m", &[])];
    world.run(0..1, &nodes);
    assert!(!world.members.is_lost("n", at(1)));
    world.run(1..SILENCE + 1, &nodes[..1]);
    assert!(world.members.is_lost("m", at(SILENCE)));
    world.receive(&goodbye(node("n", &[])), 100);
    assert_eq!(world.poll(100), ["-n Goodbye"]);
    let grace = at(100) + NODE_GRACE;
    assert!(!world.members.is_lost("n", grace - Span::from_millis(1)));
    assert!(world.members.is_lost("n", grace));
    world.run(200..201, &[node("n", &[])]);
    assert!(!world.members.is_lost("n", at(1000)));
    assert!(!world.members.is_lost("never-heard-of", at(1000)));
}

#[test]
fn where_there_can_only_be_one_node_any_other_has_left_at_once() {
    let mut world = World::default();
    world.run(0..3, &[gateway("a"), node("former", &[])]);
    world.watch = MemberWatch::new(Some("n".to_owned()));
    assert_eq!(world.poll(3), ["-former Silent"]);
    assert!(world.members.is_lost("former", at(3)));
    let written = world.run(4..100, &[gateway("a"), node("n", &[])]);
    assert_eq!(written, ["+n"]);
}

#[test]
fn the_allocation_position_moves_only_when_the_set_of_gateways_changes() {
    let mut world = World::default();
    world.run(0..1, &[gateway("a")]);
    let first = world.members.gateway_set_position();
    world.run(1..3, &[gateway("a"), node("n", &[])]);
    assert_eq!(world.members.gateway_set_position(), first);
    world.run(3..4, &[gateway("a"), gateway("b"), node("n", &[])]);
    let second = world.members.gateway_set_position();
    assert!(second > first);
    let then = world.members.gateways_at(first).unwrap();
    assert_eq!(then.into_iter().collect::<Vec<_>>(), ["a"]);
    assert_eq!(world.members.gateways_at(Position::START), Some([].into()));
    assert_eq!(world.members.previous_gateways().len(), 1);
}

#[test]
fn sets_of_gateways_that_are_too_old_are_unknown() {
    let mut world = World::default();
    for round in 0..100 {
        world.run(round * 10..round * 10 + 1, &[gateway("a"), gateway("b")]);
        world.receive(&goodbye(gateway("b")), round * 10 + 1);
        let left = world.poll(round * 10 + 1);
        assert_eq!(left, [format!("-b {:?}", LeaveReason::Goodbye)]);
    }
    assert_eq!(world.members.gateways_at(Position(1)), None);
    assert_eq!(
        world.members.gateways_at(Position(10_000)).unwrap().len(),
        1
    );
}

#[test]
fn a_source_of_an_unknown_kind_joins_and_leaves_and_is_neither_gateway_nor_node() {
    let mut world = World::default();
    let toy = Frame {
        source: source("toy".parse().unwrap(), "t"),
        ..gateway("t")
    };
    let written = world.run(0..10, &[gateway("a"), toy.clone()]);
    assert_eq!(written, ["+a", "+t"]);
    assert!(world.members.get(&toy.source).is_some());
    assert_eq!(world.members.gateways.len() + world.members.nodes.len(), 1);
    let written = world.run(10..12, &[gateway("a"), goodbye(toy.clone())]);
    assert_eq!(written, ["-t Goodbye"]);
    assert!(world.members.get(&toy.source).is_none());
}
