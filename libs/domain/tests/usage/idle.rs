//! Minutes without a request: reported in at most one event an hour, with sums as exact as if each
//! were reported by itself.

use std::collections::{BTreeMap, BTreeSet};

use contract::usage::UsageSlice;

use super::*;

const MINUTE: u64 = 60;

/// A node's frame of one second for an idle instance.
fn resting(name: &str, cpu_us: u64, memory_bytes: u64) -> DeploymentFrame {
    let idle = InstanceFrame {
        cpu_us: Some(cpu_us),
        memory_bytes: Some(memory_bytes),
        ..InstanceFrame::new(format!("{name}-1").into())
    };
    DeploymentFrame {
        instances: vec![idle],
        ..deployment(name, 0)
    }
}

/// Another deployment of the same endpoint.
fn green(mut frame: DeploymentFrame) -> DeploymentFrame {
    frame.deployment = "green".parse().unwrap();
    frame.deployment_uid = uid("green");
    frame
}

impl BucketMeter {
    fn rest(&mut self, seconds: std::ops::Range<u64>) {
        for second in seconds {
            let part = resting("iris", 100, 1000 + second);
            self.count(&frame("n1", second, vec![part]));
        }
    }

    /// A minute with one request, and the iterations until it is reported.
    fn serve(&mut self, minute: u64) -> Vec<Event> {
        for second in minute * MINUTE..(minute + 1) * MINUTE {
            let mut part = resting("iris", 100, 1000 + second);
            part.arrivals = u64::from(second % MINUTE == 30);
            self.count(&frame("n1", second, vec![part]));
        }
        self.tick(at(((minute + 1) * MINUTE) as i64))
    }
}

fn seconds(minutes: std::ops::Range<u64>) -> std::ops::Range<u64> {
    minutes.start * MINUTE..minutes.end * MINUTE
}

/// First minute, number of minutes, and the counted frames.
fn bounds(recorded: &UsageMinute) -> (i64, u32, Vec<(u64, u64)>) {
    let counted = recorded.counted.iter().map(|r| (r.first, r.last)).collect();
    (recorded.minute.secs() / 60, recorded.minutes, counted)
}

fn total<'a>(recorded: impl IntoIterator<Item = &'a UsageMinute>) -> UsageSlice {
    let mut total = UsageSlice::default();
    for slice in recorded.into_iter().flat_map(|recorded| &recorded.slices) {
        total.add(slice);
    }
    total
}

#[test]
fn an_hour_without_a_request_is_reported_in_one_event_when_it_is_over() {
    let mut meter = BucketMeter::new();
    for minute in 0..60 {
        meter.rest(seconds(minute..minute + 1));
        if minute < 59 {
            assert_eq!(meter.tick(at((minute as i64 + 1) * 60)), []);
        }
    }
    let events = meter.tick(at(3600));
    let recorded = closed(&events);
    assert_eq!((events.len(), recorded.len()), (1, 1));
    assert_eq!(bounds(recorded[0]), (0, 60, vec![(0, 3599)]));
    assert_eq!(recorded[0].slices.len(), 1);
    let usage = recorded[0].slices[0].by_instance.values().next().unwrap();
    assert_eq!(usage.cpu_us, 3600 * 100);
    assert_eq!(usage.measured_us, 3600 * 1_000_000);
    assert_eq!(usage.memory_bytes_max, 1000 + 3599);
    assert!(recorded[0].slices[0].by_role.is_empty());
    assert_eq!(meter.tick(at(3601)), []);
    assert_eq!(
        (meter.usage.open_minutes(), meter.usage.idle_deployments()),
        (0, 0)
    );
}

#[test]
fn an_instance_that_its_node_cannot_measure_is_reported_all_the_same() {
    let mut meter = BucketMeter::new();
    for second in seconds(0..60) {
        let mut part = deployment("iris", 0);
        part.instances
            .push(InstanceFrame::new("iris-1".to_owned().into()));
        meter.count(&frame("n1", second, vec![part]));
    }
    let events = meter.tick(at(3600));
    let recorded = closed(&events);
    assert_eq!(events.len(), 1, "no gap: {events:?}");
    assert_eq!(bounds(recorded[0]), (0, 60, vec![(0, 3599)]));
    let usage = recorded[0].slices[0].by_instance.values().next().unwrap();
    assert_eq!(usage.measured_us, 3600 * 1_000_000);
    assert_eq!((usage.cpu_us, usage.memory_bytes_max), (0, 0));
    assert_eq!(meter.usage.idle_deployments(), 0);
}

#[test]
fn an_hour_ends_even_if_no_more_frames_arrive() {
    let mut meter = BucketMeter::new();
    meter.rest(seconds(0..3));
    assert_eq!(meter.tick(at(3600)), []);
    let events = meter.tick(at(3600) + GRACE);
    assert_eq!(bounds(closed(&events)[0]), (0, 3, vec![(0, 179)]));
}

#[test]
fn a_request_ends_the_idle_span_at_its_minute() {
    let mut meter = BucketMeter::new();
    meter.rest(seconds(0..10));
    assert_eq!(meter.tick(at(600)), []);
    let events = meter.serve(10);
    let recorded: Vec<_> = closed(&events).into_iter().map(bounds).collect();
    assert_eq!(
        recorded,
        [(0, 10, vec![(0, 599)]), (10, 1, vec![(600, 659)])]
    );
    assert_eq!(arrivals(closed(&events)[1]).iter().sum::<u64>(), 1);
    // What follows is a span of its own.
    meter.rest(seconds(11..60));
    let events = meter.tick(at(3600));
    assert_eq!(bounds(closed(&events)[0]), (11, 49, vec![(660, 3599)]));
}

#[test]
fn minutes_that_end_at_once_are_reported_in_order() {
    let mut meter = BucketMeter::new();
    let busy = |minute| [1, 4, 5].contains(&minute);
    for second in seconds(0..8) {
        let mut part = resting("iris", 100, 1000);
        part.arrivals = u64::from(busy(second / MINUTE));
        meter.count(&frame("n1", second, vec![part]));
    }
    let mut recorded = Vec::new();
    for _ in 0..5 {
        let events = meter.tick(at(480));
        recorded.extend(closed(&events).into_iter().map(|recorded| {
            let (minute, minutes, _) = bounds(recorded);
            (minute, minutes)
        }));
    }
    assert_eq!(recorded, [(0, 1), (1, 1), (2, 2), (4, 1), (5, 1)]);
}

#[test]
fn a_single_minute_without_a_request_keeps_its_slices() {
    let mut meter = BucketMeter::new();
    meter.serve(0);
    meter.rest(seconds(1..2));
    meter.tick(at(120));
    let events = meter.serve(2);
    let recorded = closed(&events);
    assert_eq!(bounds(recorded[0]), (1, 1, vec![(60, 119)]));
    let cpu: Vec<u64> = recorded[0]
        .slices
        .iter()
        .map(|slice| slice.by_instance.values().map(|usage| usage.cpu_us).sum())
        .collect();
    assert_eq!(cpu, [1000; 6]);
}

#[test]
fn a_span_ends_with_its_hour() {
    let mut meter = BucketMeter::new();
    meter.serve(49);
    meter.rest(seconds(50..70));
    let events = meter.tick(at(70 * 60));
    assert_eq!(bounds(closed(&events)[0]), (50, 10, vec![(3000, 3599)]));
    let events = meter.serve(70);
    assert_eq!(bounds(closed(&events)[0]), (60, 10, vec![(3600, 4199)]));
}

#[test]
fn a_failed_append_of_a_busy_minute_holds_back_the_later_ones() {
    let mut meter = BucketMeter::new();
    meter.rest(seconds(0..2));
    meter.tick(at(120));
    for second in seconds(2..5) {
        let mut part = resting("iris", 100, 1000);
        part.arrivals = u64::from(second == 150);
        meter.count(&frame("n1", second, vec![part]));
    }
    for now in [180, 240, 300] {
        assert_eq!(meter.turn(at(now), &BTreeSet::from([endpoint("iris")])), []);
    }
    let events = meter.tick(at(301));
    let recorded: Vec<_> = closed(&events).into_iter().map(bounds).collect();
    assert_eq!(recorded, [(0, 2, vec![(0, 119)]), (2, 1, vec![(120, 179)])]);
    meter.rest(seconds(5..60));
    let events = meter.tick(at(3600));
    assert_eq!(bounds(closed(&events)[0]), (3, 57, vec![(180, 3599)]));
}

#[test]
fn late_frames_of_a_span_are_a_correction_and_count_once() {
    let mut meter = BucketMeter::new();
    meter.rest(seconds(0..2));
    meter.rest(140..180);
    meter.tick(at(185));
    for second in 120..140 {
        let late = frame("n1", second, vec![resting("iris", 100, 1000)]);
        assert_eq!(meter.usage.count(&late, at(186)), FrameOutcome::Late);
    }
    let corrections = meter.tick(at(186) + LATE_FLUSH_DELAY);
    assert_eq!(bounds(corrected(&corrections)[0]), (2, 1, vec![(120, 139)]));
    let events = meter.tick(at(3600) + GRACE);
    assert_eq!(
        bounds(closed(&events)[0]),
        (0, 3, vec![(0, 119), (140, 179)])
    );
    let all = [closed(&events), corrected(&corrections)].concat();
    let usage = total(all).by_instance.into_values().next().unwrap();
    assert_eq!((usage.cpu_us, usage.memory_bytes_max), (180 * 100, 1179));
}

#[test]
fn a_span_survives_a_restart_and_is_reported_once() {
    let mut meter = BucketMeter::new();
    meter.rest(seconds(0..9));
    meter.tick(at(540));
    let saved = meter.save();
    // The state survives, the process does not.
    let mut successor = meter.successor_by_save(&saved);
    successor.rest(seconds(9..10));
    let events = successor.serve(10);
    assert_eq!(bounds(closed(&events)[0]), (0, 10, vec![(0, 599)]));
    // State saved before the span was reported does not report it again.
    let mut again = successor.successor_by_save(&saved);
    again.rest(seconds(9..10));
    assert_eq!(again.tick(at(7200)), []);
}

#[test]
fn state_saved_before_there_were_spans_is_continued() {
    let mut meter = BucketMeter::new();
    meter.seconds("g1", 0..110, 1);
    // As that release wrote it, with the last ten seconds late.
    assert_eq!(
        (meter.tick(at(65)).len(), meter.tick(at(125)).len()),
        (1, 1)
    );
    let mut meter = meter.successor_by_save(include_str!("saved-before-spans.json"));
    meter.seconds("g1", 0..180, 1);
    let events = meter.tick(at(180));
    let corrections = corrected(&events);
    assert_eq!(bounds(corrections[0]), (1, 1, vec![(110, 119)]));
    assert_eq!(arrivals(corrections[0]), [0, 0, 0, 0, 0, 10]);
    let closed = closed(&events);
    assert_eq!(bounds(closed[0]), (2, 1, vec![(120, 179)]));
    assert_eq!(arrivals(closed[0]), [10; 6]);
    assert_eq!(events.len(), 2);
    assert_eq!(meter.tick(at(7200)), []);
}

#[test]
fn a_successor_with_only_the_log_recounts_what_was_not_reported() {
    let mut meter = BucketMeter::new();
    let parts = |second: u64| {
        let mut busy = resting("iris", 100, 1000);
        busy.arrivals = 1;
        let resting = resting("rose", 10, 1000 + second);
        vec![busy, green(super::idle::resting("iris", 1, 1)), resting]
    };
    for second in seconds(0..20) {
        meter.count(&frame("n1", second, parts(second)));
        if second % 60 == 59 {
            meter.tick(at(second as i64 + 1));
        }
    }
    let mut successor = meter.successor_by_log();
    let since = successor.usage.taken_over(at(1230));
    assert_eq!(since, at(0), "the hour is not reported");
    for second in seconds(0..60) {
        successor.count(&frame("n1", second, parts(second)));
    }
    for _ in 0..2 {
        successor.tick(at(3600));
    }
    let recorded = recorded(&successor.log);
    let cpu = |uid: Uid| {
        let usage = total(
            recorded
                .iter()
                .filter(|recorded| recorded.deployment_uid == uid),
        );
        usage.by_instance.values().map(|u| u.cpu_us).sum::<u64>()
    };
    assert_eq!(cpu(uid("iris")), 3600 * 100);
    assert_eq!(cpu(uid("green")), 3600);
    assert_eq!(cpu(uid("rose")), 3600 * 10);
    assert!(
        gaps(
            &successor
                .log
                .iter()
                .map(|r| r.event.clone())
                .collect::<Vec<_>>()
        )
        .is_empty()
    );
}

#[test]
fn a_takeover_soon_after_the_hour_recounts_the_previous_hour() {
    let mut meter = BucketMeter::new();
    meter.serve(60);
    let mut successor = meter.successor_by_log();
    assert_eq!(successor.usage.taken_over(at(3700)), at(0));
    meter.serve(62);
    let mut successor = meter.successor_by_log();
    assert_eq!(successor.usage.taken_over(at(3800)), at(3600));
    // If nothing is reported, only the current hour may be unreported.
    let mut successor = BucketMeter::new();
    assert_eq!(successor.usage.taken_over(at(5000)), at(3600));
}

#[test]
fn lost_minutes_that_were_held_back_are_reported_for_their_deployment() {
    let mut meter = BucketMeter::new();
    let busy = |second| {
        let mut busy = resting("iris", 100, 1000);
        busy.arrivals = 1;
        frame("n1", second, vec![busy, resting("rose", 10, 1000)])
    };
    for second in seconds(0..20) {
        let mut both = busy(second);
        both.deployments[1].arrivals = u64::from(second < 300);
        meter.count(&both);
        if second % 60 == 59 {
            meter.tick(at(second as i64 + 1));
        }
    }
    // The bus no longer has anything from before.
    let mut successor = meter.successor_by_log();
    successor.usage.taken_over(at(1230));
    for second in 1230..1320 {
        successor.count(&busy(second));
    }
    successor.tick(at(1320));
    let named = |name: &str| {
        let of = successor.log.iter();
        let of = of.filter(|r| r.endpoint() == Some(endpoint(name)));
        let events: Vec<_> = of.map(|r| r.event.clone()).collect();
        let gaps = gaps(&events);
        gaps.iter().map(|g| (g.first, g.last)).collect::<Vec<_>>()
    };
    assert_eq!(named("iris"), [(1200, 1229)]);
    assert_eq!(named("rose"), [(300, 1229)]);
}

#[test]
fn what_another_owner_reported_meanwhile_is_subtracted() {
    let mut ours = BucketMeter::new();
    ours.rest(seconds(0..5));
    ours.tick(at(300));
    let mut theirs = ours.successor_by_save(&ours.save());
    theirs.rest(seconds(5..7));
    theirs.tick(at(420));
    let events = theirs.serve(7);
    assert_eq!(bounds(closed(&events)[0]), (0, 7, vec![(0, 419)]));
    // We have received the same frames, and own the bucket again.
    ours.rest(seconds(5..8));
    for record in &theirs.log {
        ours.usage.apply(record);
    }
    ours.log = theirs.log.clone();
    let events = ours.serve(8);
    assert_eq!(bounds(closed(&events)[0]), (8, 1, vec![(480, 539)]));
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(ours.tick(at(7200)), []);
}

fn recorded(log: &[Record]) -> Vec<UsageMinute> {
    let recorded = log.iter().filter_map(|record| match &record.event {
        Event::UsageClosed(recorded) | Event::UsageCorrected(recorded) => Some(recorded.clone()),
        _ => None,
    });
    recorded.collect()
}

/// Activity of a deployment in one minute.
#[derive(Clone, Copy, Debug)]
enum Activity {
    /// It has no instance.
    Nothing,
    Rests,
    /// A request in this second.
    Serves(u64),
}

/// A fault of the bucket's owner.
#[derive(Clone, Copy, Debug)]
enum OwnerFault {
    AppendFails,
    /// Its successor has the last saved state and receives again everything since.
    Restored,
    /// Its successor has only the log and receives again everything that may not have been
    /// reported.
    TakenOver,
}

const NAMES: [&str; 3] = ["iris", "green", "rose"];
/// The first second lies a quarter of an hour before the hour's end.
const BEGIN: u64 = 45 * MINUTE;

fn activity() -> impl Strategy<Value = Activity> {
    prop_oneof![
        2 => Just(Activity::Nothing),
        8 => Just(Activity::Rests),
        2 => (0..MINUTE).prop_map(Activity::Serves),
    ]
}

fn owner_fault() -> impl Strategy<Value = OwnerFault> {
    prop_oneof![
        Just(OwnerFault::AppendFails),
        Just(OwnerFault::Restored),
        Just(OwnerFault::TakenOver)
    ]
}

fn unreliable_delivery() -> impl Strategy<Value = Delivery> {
    prop_oneof![
        3 => (1usize..100).prop_map(Delivery::ComesLater),
        1 => Just(Delivery::Twice),
        3 => Just(Delivery::Never),
    ]
}

/// The gateway's or the node's frame of one second.
fn frame_of(of_gateway: bool, second: u64, minute: &[Activity; 3]) -> Frame {
    let mut parts = Vec::new();
    for (n, (name, activity)) in NAMES.into_iter().zip(minute).enumerate() {
        let mut part = match (of_gateway, activity) {
            (_, Activity::Nothing) => continue,
            (false, _) => resting(
                name,
                1 + (second * 7 + n as u64) % 5,
                1000 + second * 13 % 97,
            ),
            (true, Activity::Serves(at)) if second % MINUTE == *at => {
                let mut part = deployment(name, 1);
                part.instances.push(InstanceFrame {
                    requests: 1,
                    busy_us: 900,
                    in_flight_us: [(Role::LIVE, 1500)].into(),
                    ..InstanceFrame::new(format!("{name}-1").into())
                });
                part
            }
            (true, _) => continue,
        };
        if name == "green" {
            part.endpoint = endpoint("iris");
            part = green(part);
        }
        parts.push(part);
    }
    let mut frame = frame(if of_gateway { "g1" } else { "n1" }, second - BEGIN, parts);
    frame.start = at(second as i64);
    frame
}

/// A bucket over some minutes: the frames that arrived and what was reported of them.
#[derive(Default)]
struct Harness {
    meter: BucketMeter,
    saved: Option<String>,
    /// In order of arrival.
    came: Vec<Frame>,
    came_since_saved: usize,
}

impl Harness {
    fn receive(&mut self, frame: &Frame, now: Timestamp) {
        self.meter.usage.count(frame, now);
        self.came.push(frame.clone());
    }

    fn inject(&mut self, owner_fault: Option<OwnerFault>, now: Timestamp) {
        match (owner_fault, self.saved.take()) {
            (Some(OwnerFault::AppendFails), saved) => {
                self.saved = saved;
                self.meter.turn(now, &BTreeSet::from([endpoint("iris")]));
            }
            (Some(OwnerFault::Restored), Some(saved)) => {
                self.meter = self.meter.successor_by_save(&saved);
                for frame in &self.came[self.came_since_saved..] {
                    self.meter.usage.count(frame, now);
                }
                self.saved = Some(saved);
            }
            (Some(OwnerFault::Restored | OwnerFault::TakenOver), _) => {
                self.meter = self.meter.successor_by_log();
                let since = self.meter.usage.taken_over(now) - Span::from_secs(60);
                for frame in self.came.iter().filter(|frame| frame.start >= since) {
                    self.meter.usage.count(frame, now);
                }
            }
            (None, saved) => {
                self.saved = saved;
                self.meter.tick(now);
            }
        }
    }

    fn save(&mut self) {
        self.saved = Some(self.meter.save());
        self.came_since_saved = self.came.len();
    }

    /// The usage, summed from the frames that arrived.
    fn used(&self, uid: Uid) -> UsageSlice {
        let mut once = BTreeSet::new();
        let mut reference = BucketMeter::default();
        for frame in &self.came {
            if once.insert((frame.source.clone(), frame.sequence)) {
                let mut frame = frame.clone();
                frame.deployments.retain(|part| part.deployment_uid == uid);
                // All in one minute, and none of them late.
                frame.start = at(0);
                reference.usage.count(&frame, at(1));
            }
        }
        reference.turn(at(3700), &BTreeSet::new());
        total(&recorded(&reference.log))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sums_equal_those_of_the_received_frames_however_they_are_reported(
        minutes in prop::collection::vec([activity(), activity(), activity()], 1..30),
        deliveries in prop::collection::btree_map((0..1800u64, any::<bool>()), unreliable_delivery(), 0..60),
        faults in prop::collection::btree_map(0..1800u64, owner_fault(), 0..12),
    ) {
        let mut harness = Harness { meter: BucketMeter::new(), ..Harness::default() };
        let mut later: BTreeMap<u64, Vec<Frame>> = BTreeMap::new();
        let mut never = BTreeSet::new();
        let mut newest: BTreeMap<Source, u64> = BTreeMap::new();
        let seconds = BEGIN..BEGIN + minutes.len() as u64 * MINUTE;
        for second in seconds.clone() {
            let now = at(second as i64 + 1);
            let mut arriving = later.remove(&second).unwrap_or_default();
            for of_gateway in [true, false] {
                let sequence = second - BEGIN;
                let frame = frame_of(of_gateway, second, &minutes[(sequence / MINUTE) as usize]);
                match deliveries.get(&(sequence, of_gateway)) {
                    None => arriving.push(frame),
                    Some(Delivery::Twice) => arriving.extend([frame.clone(), frame]),
                    Some(Delivery::ComesLater(by)) => {
                        later.entry(second + *by as u64).or_default().push(frame);
                    }
                    Some(_) => drop(never.insert((frame.source, frame.sequence))),
                }
            }
            for frame in &arriving {
                let newest = newest.entry(frame.source.clone()).or_default();
                *newest = (*newest).max(frame.sequence);
                harness.receive(frame, now);
            }
            harness.inject(faults.get(&(second - BEGIN)).copied(), now);
            if second % 10 == 9 {
                harness.save();
            }
        }
        for after in [6, 66, 67, 200, 3700, 3701, 7400] {
            harness.meter.tick(at((seconds.end + after) as i64));
        }
        let usage = &harness.meter.usage;
        prop_assert_eq!((usage.open_minutes(), usage.idle_deployments()), (0, 0));

        let all = recorded(&harness.meter.log);
        for name in NAMES {
            let uid = uid(name);
            let of = |recorded: &&UsageMinute| recorded.deployment_uid == uid;
            prop_assert_eq!(total(all.iter().filter(of)), harness.used(uid), "{}", name);
            let mut counted = BTreeSet::new();
            for recorded in all.iter().filter(of) {
                for range in &recorded.counted {
                    for sequence in range.first..=range.last {
                        let new = counted.insert((range.source.clone(), sequence));
                        prop_assert!(new, "{} {} again", range.source.id, sequence);
                    }
                }
                let reference = total([recorded]);
                let mut instances = reference.by_instance.values();
                let idle = reference.by_role.is_empty() && instances.all(|usage| usage.is_idle());
                prop_assert!(recorded.minutes == 1 || idle, "{:?}", recorded);
                prop_assert!(recorded.minutes == 1 || recorded.slices.len() == 1);
                prop_assert!(recorded.minute.secs() / 3600 == (recorded.end().secs() - 1) / 3600);
            }
            let silent = |frame: &&Frame| frame.deployments.iter().all(|part| part.deployment_uid != uid);
            for frame in harness.came.iter().filter(|frame| !silent(frame)) {
                let is_counted = counted.contains(&(frame.source.clone(), frame.sequence));
                prop_assert!(is_counted, "{} of {} is in no event", frame.sequence, frame.source.id);
            }
            for lost in &never {
                prop_assert!(!counted.contains(lost));
            }
        }
        let mut ends: BTreeMap<Uid, Timestamp> = BTreeMap::new();
        let closed = harness.meter.log.iter().filter_map(|record| match &record.event {
            Event::UsageClosed(recorded) => Some(recorded),
            _ => None,
        });
        let mut closed: Vec<&UsageMinute> = closed.collect();
        closed.sort_by_key(|recorded| recorded.minute);
        for recorded in closed {
            let end = ends.insert(recorded.deployment_uid, recorded.end());
            prop_assert!(end.is_none_or(|end| end <= recorded.minute), "closed twice: {:?}", recorded);
        }
        for key in [endpoint("iris"), endpoint("rose")] {
            let of_key = harness.meter.log.iter().filter(|r| r.endpoint().as_ref() == Some(&key));
            let events: Vec<Event> = of_key.map(|record| record.event.clone()).collect();
            let mut named = BTreeSet::new();
            for gap in gaps(&events) {
                for sequence in gap.first..=gap.last {
                    let new = named.insert((gap.source.clone(), sequence));
                    prop_assert!(new, "{:?} again", gap);
                }
            }
            for (source, sequence) in &never {
                let followed = newest.get(source).is_some_and(|newest| sequence < newest);
                let is_named = named.contains(&(source.clone(), *sequence));
                prop_assert!(!followed || is_named, "{} of {} is not named", sequence, source.id);
            }
            let in_time = |frame: &&Frame| {
                let of_gateway = frame.source.id == "g1";
                !matches!(deliveries.get(&(frame.sequence, of_gateway)), Some(Delivery::ComesLater(_)))
            };
            for frame in harness.came.iter().filter(in_time) {
                let is_named = named.contains(&(frame.source.clone(), frame.sequence));
                prop_assert!(!is_named, "{} of {} came", frame.sequence, frame.source.id);
            }
        }
    }
}
