//! Minutes of usage: when they close, what they contain, and that nothing is counted twice or lost
//! silently.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use contract::events::{EndpointCreated, EndpointKeys, Event, SealedKey};
use contract::frame::{
    DeploymentFrame, Frame, FrameHeader, InstanceFrame, Measure, Outcomes, Role, Source, SourceKind,
};
use contract::ids::{Bucket, EndpointKey, InstanceId, Position, Uid};
use contract::log::{Actor, EVENT_BYTES_MAX, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use contract::usage::{UsageGap, UsageMinute};
use domain::usage::{FrameOutcome, GRACE, LATE_FLUSH_DELAY, Usage};
use proptest::prelude::*;
use uuid::Uuid;

#[path = "usage/idle.rs"]
mod idle;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_secs(seconds)
}

fn endpoint(name: &str) -> EndpointKey {
    EndpointKey::new(&name.parse().unwrap())
}

fn uid(name: &str) -> Uid {
    Uid(Uuid::from_u128(
        name.bytes().fold(1, |n, b| n * 256 + u128::from(b)),
    ))
}

/// A node if its id begins with `n`, otherwise a gateway.
fn source(id: &str) -> Source {
    Source {
        kind: match id.starts_with('n') {
            true => SourceKind::NODE,
            false => SourceKind::GATEWAY,
        },
        id: id.to_owned(),
    }
}

fn boot(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn deployment(endpoint_name: &str, arrivals: u64) -> DeploymentFrame {
    let name = "blue".parse().unwrap();
    DeploymentFrame {
        outcomes: Outcomes {
            success: arrivals,
            ..Outcomes::default()
        },
        arrivals,
        ..DeploymentFrame::new(
            endpoint(endpoint_name),
            name,
            uid(endpoint_name),
            Role::LIVE,
        )
    }
}

fn instance(id: &str, requests: u64) -> InstanceFrame {
    InstanceFrame {
        busy_us: requests * 1000,
        requests,
        cpu_us: Some(500),
        memory_bytes: Some(1 << 20),
        ..InstanceFrame::new(InstanceId::from(id.to_owned()))
    }
}

/// The frame of one second; sequence and start both count from 0.
fn frame(source_id: &str, sequence: u64, deployments: Vec<DeploymentFrame>) -> Frame {
    Frame {
        source: source(source_id),
        boot: boot(1),
        sequence,
        bucket: Bucket(0),
        start: at(sequence as i64),
        length_us: 1_000_000,
        routes: Default::default(),
        members: Default::default(),
        hello: None,
        goodbye: false,
        deployments,
    }
}

/// A meter of one bucket and the log that it writes.
#[derive(Clone, Default)]
struct BucketMeter {
    usage: Usage,
    log: Vec<Record>,
}

impl BucketMeter {
    fn new() -> Self {
        let mut meter = Self::default();
        for name in ["iris", "rose"] {
            let key = EndpointKeys {
                primary: sealed(),
                secondary: sealed(),
            };
            let created = EndpointCreated {
                uid: uid(name),
                name: name.parse().unwrap(),
                labels: Default::default(),
                spec: serde_json::from_str("{}").unwrap(),
                keys: key,
            };
            let stream = StreamName::of(StreamKind::Endpoint, &endpoint(name));
            meter.append(stream, 0, Event::EndpointCreated(created));
        }
        meter
    }

    fn append(&mut self, stream: StreamName, expected_version: u64, event: Event) {
        let size = event.data_json().unwrap().len();
        assert!(size <= EVENT_BYTES_MAX, "an event of {size} bytes");
        let version = self.log.iter().filter(|r| r.stream == stream).count() as u64;
        assert_eq!(expected_version, version, "{stream}");
        let position = Position(self.log.len() as u64 + 1);
        let record = Record {
            position,
            prev: Position(position.0 - 1),
            bucket: Bucket(0),
            stream,
            version: version + 1,
            id: Uuid::from_u128(u128::from(position.0)),
            time: at(0),
            actor: Actor::service("meter"),
            event,
        };
        self.usage.apply(&record);
        self.log.push(record);
    }

    fn count(&mut self, frame: &Frame) -> FrameOutcome {
        self.usage.count(frame, frame.start + Span::from_secs(1))
    }

    /// Counts frames of one source for these seconds, each with this many arrivals.
    fn seconds(&mut self, source_id: &str, seconds: std::ops::Range<u64>, arrivals: u64) {
        for second in seconds {
            self.count(&frame(
                source_id,
                second,
                vec![deployment("iris", arrivals)],
            ));
        }
    }

    /// One iteration of the service; appends to the endpoints in `fails` fail.
    fn turn(&mut self, now: Timestamp, fails: &BTreeSet<EndpointKey>) -> Vec<Event> {
        let mut written = Vec::new();
        for due in self.usage.due(now) {
            if fails.contains(&due.endpoint) {
                continue;
            }
            let stream = StreamName::of(StreamKind::Usage, &due.endpoint);
            for (offset, event) in due.events.into_iter().enumerate() {
                let expected = due.expected_version + offset as u64;
                self.append(stream.clone(), expected, event.clone());
                written.push(event);
            }
        }
        self.usage.prune(now);
        written
    }

    fn tick(&mut self, now: Timestamp) -> Vec<Event> {
        self.turn(now, &BTreeSet::new())
    }

    /// A successor that has only the log.
    fn successor_by_log(&self) -> Self {
        let mut usage = Usage::default();
        self.log.iter().for_each(|record| usage.apply(record));
        Self {
            usage,
            log: self.log.clone(),
        }
    }

    /// A successor that has an older saved state and the log.
    fn successor_by_save(&self, saved: &str) -> Self {
        let saved: Usage = serde_json::from_str(saved).unwrap();
        let mut usage = saved.restored();
        self.log.iter().for_each(|record| usage.apply(record));
        Self {
            usage,
            log: self.log.clone(),
        }
    }

    fn save(&self) -> String {
        serde_json::to_string(&self.usage).unwrap()
    }
}

fn sealed() -> SealedKey {
    SealedKey {
        hash: String::new(),
        sealed: String::new(),
    }
}

fn closed(events: &[Event]) -> Vec<&UsageMinute> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::UsageClosed(minute) => Some(minute),
            _ => None,
        })
        .collect()
}

fn corrected(events: &[Event]) -> Vec<&UsageMinute> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::UsageCorrected(minute) => Some(minute),
            _ => None,
        })
        .collect()
}

fn gaps(events: &[Event]) -> Vec<&UsageGap> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::UsageGap(gap) => Some(gap),
            _ => None,
        })
        .collect()
}

fn arrivals(minute: &UsageMinute) -> Vec<u64> {
    let of_slice = |slice: &contract::usage::UsageSlice| {
        slice.by_role.get(&Role::LIVE).map_or(0, |c| c.arrivals)
    };
    minute.slices.iter().map(of_slice).collect()
}

#[test]
fn a_minute_closes_when_every_member_is_past_its_end() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..60, 2);
    meter.seconds("g2", 0..59, 1);
    assert_eq!(meter.tick(at(60)), []);
    meter.seconds("g2", 59..60, 1);
    let events = meter.tick(at(60));
    let minutes = closed(&events);
    assert_eq!((events.len(), minutes.len()), (1, 1));
    assert_eq!(minutes[0].minute, at(0));
    assert_eq!(arrivals(minutes[0]), [30; 6]);
    let counted: Vec<_> = minutes[0]
        .counted
        .iter()
        .map(|r| (r.source.id.as_str(), r.first, r.last))
        .collect();
    assert_eq!(counted, [("g1", 0, 59), ("g2", 0, 59)]);
    assert_eq!(meter.tick(at(61)), []);
}

#[test]
fn a_silent_member_is_waited_for_by_the_grace_and_one_that_said_goodbye_is_not() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..60, 1);
    meter.seconds("silent", 0..30, 1);
    assert_eq!(meter.tick(at(60) + GRACE - Span::from_millis(1)), []);
    assert_eq!(closed(&meter.tick(at(60) + GRACE)).len(), 1);

    meter.seconds("g1", 60..120, 1);
    let mut goodbye = frame("silent", 30, Vec::new());
    goodbye.goodbye = true;
    meter.count(&goodbye);
    assert_eq!(closed(&meter.tick(at(120))).len(), 1);
}

#[test]
fn a_deployment_without_traffic_and_instances_gets_no_minute_and_one_with_instances_does() {
    let mut meter = BucketMeter::new();
    for second in 0..60 {
        let mut with_instance = deployment("rose", 0);
        with_instance.instances.push(instance("rose-1", 0));
        meter.count(&frame(
            "n1",
            second,
            vec![deployment("iris", 0), with_instance],
        ));
    }
    let events = meter.tick(at(3600) + GRACE);
    let minutes = closed(&events);
    assert_eq!(minutes.len(), 1);
    assert_eq!(minutes[0].deployment_uid, uid("rose"));
    let usage = minutes[0].slices[3].by_instance.values().next().unwrap();
    assert_eq!((usage.cpu_us, usage.memory_bytes_max), (5000, 1 << 20));
    assert_eq!(usage.measured_us, 10_000_000);
}

#[test]
fn roles_are_kept_apart_with_all_that_is_counted_of_them() {
    let mut meter = BucketMeter::new();
    let threshold =
        |count| BTreeMap::from([(Measure::LATENCY, BTreeMap::from([(300_000, count)]))]);
    let part = |role, arrivals, oldest| DeploymentFrame {
        role,
        at_or_below: threshold(arrivals - 1),
        oldest_in_flight_us: oldest,
        ..deployment("iris", arrivals)
    };
    let canary: Role = "canary".parse().unwrap();
    let parts = |oldest| {
        vec![
            part(Role::LIVE, 3, oldest),
            part(Role::SHADOW, 5, 0),
            part(canary.clone(), 2, 0),
        ]
    };
    meter.count(&frame("g1", 0, parts(900)));
    meter.count(&frame("g1", 1, parts(700)));
    let events = meter.tick(at(65));
    let slice = &closed(&events)[0].slices[0];
    for (role, arrivals) in [(Role::LIVE, 6), (Role::SHADOW, 10), (canary, 4)] {
        let counts = &slice.by_role[&role];
        assert_eq!(counts.arrivals, arrivals);
        assert_eq!(counts.at_or_below, threshold(arrivals - 2));
    }
    assert_eq!(slice.by_role[&Role::LIVE].oldest_in_flight_us_max, 900);
}

#[test]
fn time_on_an_instance_is_kept_by_role() {
    let mut meter = BucketMeter::new();
    let mut both = deployment("iris", 2);
    let in_flight = [(Role::LIVE, 1500), (Role::SHADOW, 700)];
    both.instances.push(InstanceFrame {
        in_flight_us: in_flight.clone().into(),
        ..instance("iris-1", 2)
    });
    meter.count(&frame("g1", 0, vec![both]));
    let events = meter.tick(at(65));
    let usage = &closed(&events)[0].slices[0].by_instance.values().next();
    assert_eq!(usage.unwrap().in_flight_us, BTreeMap::from(in_flight));
}

#[test]
fn a_frame_that_comes_again_is_not_counted_again() {
    let mut meter = BucketMeter::new();
    let once = frame("g1", 0, vec![deployment("iris", 7)]);
    assert_eq!(meter.count(&once), FrameOutcome::InTime);
    assert_eq!(meter.count(&once), FrameOutcome::Duplicate);
    assert_eq!(arrivals(closed(&meter.tick(at(65)))[0]), [7, 0, 0, 0, 0, 0]);
    assert_eq!(meter.count(&once), FrameOutcome::Duplicate);
    assert_eq!(meter.tick(at(500)), []);
}

#[test]
fn late_frames_are_gathered_into_one_correction_that_adds_to_the_minute() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..60, 1);
    meter.seconds("slow", 0..50, 1);
    meter.tick(at(65));
    for second in 50..60 {
        let late = frame("slow", second, vec![deployment("iris", 1)]);
        assert_eq!(meter.usage.count(&late, at(70)), FrameOutcome::Late);
    }
    assert_eq!(meter.tick(at(71)), []);
    let events = meter.tick(at(70) + LATE_FLUSH_DELAY);
    let corrections = corrected(&events);
    assert_eq!((events.len(), corrections.len()), (1, 1));
    assert_eq!(arrivals(corrections[0]), [0, 0, 0, 0, 0, 10]);
    assert_eq!(
        (
            corrections[0].counted[0].first,
            corrections[0].counted[0].last
        ),
        (50, 59)
    );
}

#[test]
fn missing_frames_are_reported_once_in_every_endpoint_of_the_bucket() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..20, 1);
    meter.seconds("g1", 25..40, 1);
    meter.seconds("g1", 23..24, 1);
    meter.seconds("g1", 40..60, 1);
    let events = meter.tick(at(60));
    let ranges: Vec<_> = gaps(&events)
        .iter()
        .map(|g| (g.first, g.last, g.minute))
        .collect();
    // Twice, since there are two endpoints.
    let expected = [(20, 22, at(0)), (24, 24, at(0))];
    assert_eq!(ranges, [expected, expected].concat());
    meter.seconds("g1", 60..120, 1);
    assert!(gaps(&meter.tick(at(120))).is_empty());
}

#[test]
fn a_missing_frame_that_arrives_in_time_is_no_gap() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..20, 1);
    meter.seconds("g1", 21..60, 1);
    meter.seconds("g1", 20..21, 1);
    let events = meter.tick(at(60));
    assert!(gaps(&events).is_empty());
    assert_eq!(arrivals(closed(&events)[0]), [10; 6]);
}

#[test]
fn a_minute_whose_append_failed_is_due_again_and_no_other_is_reported_twice() {
    let mut meter = BucketMeter::new();
    for second in 0..60 {
        let both = vec![deployment("iris", 1), deployment("rose", 1)];
        meter.count(&frame("g1", second, both));
    }
    let first = meter.turn(at(60), &BTreeSet::from([endpoint("rose")]));
    assert_eq!(closed(&first)[0].deployment_uid, uid("iris"));
    let second = meter.tick(at(61));
    assert_eq!(second.len(), 1);
    assert_eq!(closed(&second)[0].deployment_uid, uid("rose"));
}

#[test]
fn a_successor_with_only_the_log_counts_nothing_twice() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..70, 1);
    meter.tick(at(70));
    let mut successor = meter.successor_by_log();
    // The bus delivers everything again.
    successor.seconds("g1", 0..120, 1);
    let events = successor.tick(at(120));
    assert!(gaps(&events).is_empty(), "{events:?}");
    assert!(corrected(&events).is_empty(), "{events:?}");
    assert_eq!(closed(&events).len(), 1);
    assert_eq!(closed(&events)[0].minute, at(60));
    assert_eq!(arrivals(closed(&events)[0]), [10; 6]);
}

#[test]
fn saved_state_that_is_older_than_the_log_counts_nothing_twice() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..55, 1);
    let saved = meter.save();
    meter.seconds("g1", 55..60, 1);
    meter.tick(at(60));
    let mut successor = meter.successor_by_save(&saved);
    assert_eq!(successor.tick(at(200)), []);
}

#[test]
fn frames_lost_in_a_crash_are_reported_missing() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..40, 1);
    let saved = meter.save();
    meter.seconds("g1", 40..47, 1);
    let mut successor = meter.successor_by_save(&saved);
    let mut restarted = frame("g1", 0, vec![deployment("iris", 1)]);
    restarted.boot = boot(2);
    restarted.start = at(48);
    successor.usage.count(&restarted, at(49));
    let events = successor.tick(at(65));
    let ranges: Vec<_> = gaps(&events)
        .iter()
        .map(|g| (g.boot, g.first, g.last))
        .collect();
    // The crashed start had reported 40 s; in the 8 s until the next one it may have sent as many
    // frames.
    assert_eq!(ranges, [(boot(1), 40, 47); 2]);
    assert_eq!(arrivals(closed(&events)[0]), [10, 10, 10, 10, 1, 0]);
}

#[test]
fn a_restart_after_a_goodbye_leaves_no_gap() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..40, 1);
    let mut goodbye = frame("g1", 40, Vec::new());
    goodbye.goodbye = true;
    meter.count(&goodbye);
    let mut successor = meter.successor_by_save(&meter.save());
    let mut restarted = frame("g1", 0, vec![deployment("iris", 1)]);
    restarted.boot = boot(2);
    restarted.start = at(48);
    successor.usage.count(&restarted, at(49));
    assert!(gaps(&successor.tick(at(65))).is_empty());
}

#[test]
fn a_source_whose_clock_is_far_ahead_is_counted_in_the_present_minute() {
    let mut meter = BucketMeter::new();
    let mut ahead = frame("g1", 0, vec![deployment("iris", 4)]);
    ahead.start = at(1_000_000);
    meter.usage.count(&ahead, at(30));
    let events = meter.tick(at(60));
    assert_eq!(arrivals(closed(&events)[0]), [0, 0, 0, 4, 0, 0]);
    assert_eq!(closed(&events)[0].minute, at(0));
}

#[test]
fn very_many_instances_are_reported_in_several_events_that_fit() {
    let mut meter = BucketMeter::new();
    for second in 0..60 {
        let mut many = deployment("iris", 1);
        let id = |n| format!("{}-{}-{n:012}", "e".repeat(32), "d".repeat(32));
        many.instances = (0..1000).map(|n| instance(&id(n), 1)).collect();
        meter.count(&frame("g1", second, vec![many]));
    }
    let events = meter.tick(at(60));
    let parts: Vec<_> = closed(&events)
        .into_iter()
        .chain(corrected(&events))
        .collect();
    assert_eq!((closed(&events).len(), parts.len()), (1, 5));
    let requests: u64 = parts
        .iter()
        .flat_map(|part| &part.slices)
        .flat_map(|slice| slice.by_instance.values())
        .map(|usage| usage.requests)
        .sum();
    assert_eq!(requests, 60_000);
    assert_eq!(
        parts
            .iter()
            .map(|part| arrivals(part).iter().sum::<u64>())
            .sum::<u64>(),
        60
    );
    assert_eq!(meter.tick(at(61)), []);
}

#[test]
fn an_unreadable_frame_is_reported_missing() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..20, 1);
    let unreadable = |second| FrameHeader::from(&frame("g1", second, Vec::new()));
    for second in [20, 22, 20] {
        meter.usage.count_unreadable(&unreadable(second));
    }
    // It was reported missing when the next one arrived.
    meter.usage.count_unreadable(&unreadable(21));
    meter.seconds("g1", 23..60, 1);
    // A source whose frames cannot be read at all.
    let head = FrameHeader {
        boot: boot(9),
        ..unreadable(0)
    };
    meter.usage.count_unreadable(&head);
    let events = meter.tick(at(65));
    let mut named: Vec<_> = gaps(&events)
        .iter()
        .map(|g| (g.boot, g.first, g.last, g.minute))
        .collect();
    named.dedup();
    let (old, new) = (boot(1), boot(9));
    let expected = [(old, 20, 20), (old, 21, 21), (old, 22, 22), (new, 0, 0)];
    let expected = expected.map(|(boot, first, last)| (boot, first, last, at(0)));
    // For each of two endpoints.
    assert_eq!(named, [expected, expected].concat());
    assert_eq!(arrivals(closed(&events)[0]), [10, 10, 7, 10, 10, 10]);
    assert_eq!(meter.tick(at(66)), []);
}

/// What happens to the frame of one second of one source.
#[derive(Clone, Copy, Debug)]
enum Delivery {
    Comes,
    ComesLater(usize),
    Twice,
    Never,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    /// Appends to one of the endpoints fail in this iteration.
    AppendFails,
    /// The owner crashes; its successor has the last saved state, and the bus delivers again
    /// everything since.
    Dies,
}

fn delivery() -> impl Strategy<Value = Delivery> {
    prop_oneof![
        8 => Just(Delivery::Comes),
        2 => (1usize..100).prop_map(Delivery::ComesLater),
        1 => Just(Delivery::Twice),
        1 => Just(Delivery::Never),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        12 => Just(Fault::None),
        1 => Just(Fault::AppendFails),
        1 => Just(Fault::Dies),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_frame_is_counted_once_or_reported_missing(
        seconds in prop::collection::vec(((delivery(), delivery()), fault(), any::<bool>()), 1..200),
    ) {
        let mut meter = BucketMeter::new();
        let mut saved = meter.save();
        let mut since_saved: Vec<Frame> = Vec::new();
        let mut later: BTreeMap<usize, Vec<Frame>> = BTreeMap::new();
        let mut came: BTreeSet<(String, u64)> = BTreeSet::new();
        let mut last: BTreeMap<&str, u64> = BTreeMap::new();
        for (second, ((a, b), fault, rose_too)) in seconds.iter().enumerate() {
            let now = at(second as i64 + 1);
            let mut arriving = later.remove(&second).unwrap_or_default();
            for (id, delivery) in [("g1", a), ("g2", b)] {
                let mut deployments = vec![deployment("iris", 1)];
                deployments.extend(rose_too.then(|| deployment("rose", 1)));
                let frame = frame(id, second as u64, deployments);
                match delivery {
                    Delivery::Comes => arriving.push(frame),
                    Delivery::Twice => arriving.extend([frame.clone(), frame]),
                    Delivery::ComesLater(by) => later.entry(second + by).or_default().push(frame),
                    Delivery::Never => {}
                }
            }
            for frame in arriving {
                came.insert((frame.source.id.clone(), frame.sequence));
                let id = if frame.source.id == "g1" { "g1" } else { "g2" };
                let newest = last.entry(id).or_default();
                *newest = (*newest).max(frame.sequence);
                meter.usage.count(&frame, now);
                since_saved.push(frame);
            }
            match fault {
                Fault::None => {
                    meter.tick(now);
                }
                Fault::AppendFails => {
                    meter.turn(now, &BTreeSet::from([endpoint("iris")]));
                }
                Fault::Dies => {
                    meter = meter.successor_by_save(&saved);
                    for frame in &since_saved {
                        meter.usage.count(frame, now);
                    }
                }
            }
            if second % 10 == 9 {
                saved = meter.save();
                since_saved.clear();
            }
        }
        let end = at(seconds.len() as i64);
        for after in [6, 66, 80, 200] {
            meter.tick(end + Span::from_secs(after));
        }
        prop_assert_eq!(meter.usage.open_minutes(), 0);

        let events: Vec<(EndpointKey, Event)> = meter
            .log
            .iter()
            .map(|record| (record.endpoint().unwrap(), record.event.clone()))
            .collect();
        for name in ["iris", "rose"] {
            let of_endpoint: Vec<Event> = events
                .iter()
                .filter(|(key, _)| *key == endpoint(name))
                .map(|(_, event)| event.clone())
                .collect();
            let recorded = closed(&of_endpoint).into_iter().chain(corrected(&of_endpoint));
            let sum: u64 = recorded.map(|minute| arrivals(minute).iter().sum::<u64>()).sum();
            let expected = came
                .iter()
                .filter(|(_, sequence)| name == "iris" || seconds[*sequence as usize].2)
                .count() as u64;
            prop_assert_eq!(sum, expected, "{}", name);
            // No event names a frame that an earlier one has named.
            let mut named = BTreeSet::new();
            for recorded in closed(&of_endpoint).into_iter().chain(corrected(&of_endpoint)) {
                for range in &recorded.counted {
                    for sequence in range.first..=range.last {
                        let frame = (range.source.id.clone(), sequence);
                        prop_assert!(named.insert(frame), "{} of {:?} again", sequence, range);
                    }
                }
            }
            // A minute is closed once; everything after is a correction.
            let minutes: Vec<Timestamp> = closed(&of_endpoint).iter().map(|m| m.minute).collect();
            prop_assert_eq!(minutes.iter().collect::<BTreeSet<_>>().len(), minutes.len());
            // Every frame that never arrived, before one that did, is reported.
            let named: BTreeSet<(String, u64)> = gaps(&of_endpoint)
                .iter()
                .flat_map(|gap| (gap.first..=gap.last).map(|n| (gap.source.id.clone(), n)))
                .collect();
            for (id, newest) in &last {
                for sequence in 0..*newest {
                    let frame = ((*id).to_owned(), sequence);
                    prop_assert!(came.contains(&frame) || named.contains(&frame), "{:?}", frame);
                }
            }
        }
    }
}

#[test]
fn a_successor_reports_only_gaps_that_its_predecessor_cannot_have_reported() {
    let mut first = BucketMeter::new();
    first.seconds("g", 0..60, 1);
    first.tick(at(61));
    // Seconds 60 to 69 were counted by an owner that did not report them; frames from 70 on arrive
    // again.
    let mut second = first.successor_by_log();
    second.usage.taken_over(at(75));
    second.seconds("g", 70..120, 1);
    let events = second.tick(at(130));
    let named: Vec<(u64, u64)> = gaps(&events).iter().map(|g| (g.first, g.last)).collect();
    assert!(!named.is_empty());
    assert!(named.iter().all(|gap| *gap == (60, 69)), "{named:?}");
    assert_eq!(closed(&events).len(), 1);
}

#[test]
fn frames_of_an_unknown_source_are_no_usage() {
    let mut meter = BucketMeter::new();
    for second in 0..60 {
        let recorded = frame("g1", second, vec![deployment("iris", 2)]);
        let source = Source {
            kind: "toy".parse().unwrap(),
            id: "toy".to_owned(),
        };
        meter.count(&Frame {
            source,
            ..recorded.clone()
        });
        meter.count(&recorded);
    }
    let events = meter.tick(at(60));
    assert_eq!(arrivals(closed(&events)[0]), [20; 6]);
}
