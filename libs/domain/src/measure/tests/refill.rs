//! Windows that begin before this process measured, or before a policy needed them.

use proptest::prelude::*;

use super::*;

const SECONDS_MAX: usize = 900;
const WINDOWS: [u64; 4] = [10, 60, 150, 600];
/// How far the history is behind.
const LAG: i64 = 13;

fn specs() -> Vec<SignalSpec> {
    let metrics = [
        ("requests_per_second", "average"),
        ("requests_per_second", "max"),
        ("latency_p90", "average"),
        ("error_ratio", "average"),
        ("cpu_utilization", "average"),
        ("memory_utilization", "p90"),
    ];
    let of = |window| metrics.map(|(metric, aggregation)| spec(metric, window, aggregation));
    WINDOWS.into_iter().flat_map(of).collect()
}

fn node() -> Source {
    Source {
        kind: SourceKind::NODE,
        id: "node".into(),
    }
}

/// What was measured in a second, if anything was.
fn gateway_frame(second: i64, load: u8) -> Option<Frame> {
    if load % 11 == 3 {
        return None;
    }
    let mut of = DeploymentFrame {
        arrivals: u64::from(load),
        ..deployment()
    };
    of.outcomes.success = u64::from(load / 3);
    of.outcomes.model_server_error = u64::from(load % 3);
    of.latency.record(u64::from(load) * 1000);
    let deployments = match load {
        0..40 => Vec::new(),
        _ => vec![of],
    };
    Some(Frame {
        deployments,
        ..empty(gateway("a"), second)
    })
}

fn node_frame(second: i64, load: u8) -> Option<Frame> {
    if load % 13 == 5 {
        return None;
    }
    let young = InstanceFrame {
        ready_for_us: Some(u64::from(load) * 1_000_000),
        ..instance("young", 100, 900)
    };
    let mut of = deployment();
    of.instances = vec![instance("old", u64::from(load), 300), young];
    let deployments = match load {
        0..10 => Vec::new(),
        _ => vec![of],
    };
    Some(Frame {
        deployments,
        ..empty(node(), second)
    })
}

fn frames(second: i64, load: u8) -> impl Iterator<Item = Frame> {
    let frames = [gateway_frame(second, load), node_frame(second, load)];
    frames.into_iter().flatten()
}

/// Measures of a process that starts before this second, with a policy that reads these signals.
fn started(second: i64, signals: &[SignalSpec]) -> Measures {
    let now = Timestamp::from_secs(second);
    let mut measures = Measures::new(now);
    measures.watch(uid(), signals, now);
    measures.set_initialization_period(uid(), Span::from_secs(30), now);
    measures
}

fn measure(measures: &mut Measures, second: i64, load: u8) -> Timestamp {
    let now = after(second, 5);
    for frame in frames(second, load) {
        measures.frame(now, &frame);
    }
    now
}

/// What a history has of the seconds up to but without `until`.
fn history(loads: &[u8], until: i64) -> Past {
    let mut past = Past::default();
    for kind in [SourceKind::GATEWAY, SourceKind::NODE] {
        let of_kind = PastOfKind {
            from: START,
            ..PastOfKind::default()
        };
        past.kinds.insert(kind, of_kind);
    }
    for (second, load) in (START..until).zip(loads) {
        for frame in frames(second, *load) {
            let of_kind = past.kinds.get_mut(&frame.source.kind).unwrap();
            of_kind.measured.push(MeasuredSpan {
                start: second,
                end: second + 1,
                is_partial: false,
                length_us: frame.length_us,
            });
            of_kind.known.push_back(second, second + 1);
            for of in &frame.deployments {
                if frame.source.kind == SourceKind::NODE {
                    let report = InstanceReport::of(of, frame.length_us);
                    of_kind.instances.entry(second).or_default().push(report);
                } else {
                    let load = of_kind.loads.entry(second).or_default();
                    load.add(of, frame.length_us, 0);
                }
            }
        }
    }
    past
}

/// The signals without the mark that a member was missing, which a gap in the history does not have.
fn all_signals(measures: &Measures, now: Timestamp) -> Vec<Signal> {
    let signals = measures.signals(uid(), &specs(), SignalOptions::default(), now);
    let unmarked = |signal: Option<Signal>| Signal {
        partial: false,
        ..signal.unwrap()
    };
    signals.into_iter().map(unmarked).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn refilled_windows_are_those_of_a_process_that_measured_throughout(
        loads in prop::collection::vec(any::<u8>(), 20..SECONDS_MAX),
        restart in 0.0..1.0f64,
        refill_after in 0..15i64,
    ) {
        let end = START + loads.len() as i64;
        let restarted = START + (loads.len() as f64 * restart) as i64;
        let mut throughout = started(START, &specs());
        let mut refilled = started(restarted, &specs());
        let past = history(&loads, restarted);
        let refill_at = (restarted + refill_after).min(end - 1);
        for (second, load) in (START..end).zip(&loads) {
            let now = measure(&mut throughout, second, *load);
            if second >= restarted {
                measure(&mut refilled, second, *load);
            }
            if second == refill_at {
                refilled.refill(uid(), &past, now);
            }
            if second >= refill_at && second % 7 == 0 {
                prop_assert_eq!(all_signals(&throughout, now), all_signals(&refilled, now));
            }
        }
    }

    #[test]
    fn a_window_that_becomes_longer_is_that_of_a_policy_that_always_had_it(
        loads in prop::collection::vec(any::<u8>(), 200..SECONDS_MAX),
        change in 0.2..1.0f64,
    ) {
        let end = START + loads.len() as i64;
        let changed = START + (loads.len() as f64 * change) as i64;
        let mut always = started(START, &specs());
        let mut later = started(START, &specs()[..6]);
        for (second, load) in (START..end).zip(&loads) {
            let now = measure(&mut always, second, *load);
            measure(&mut later, second, *load);
            if second == changed {
                later.watch(uid(), &specs(), now);
                later.refill(uid(), &history(&loads, second - LAG), now);
            }
            if second >= changed && second % 7 == 0 {
                prop_assert_eq!(all_signals(&always, now), all_signals(&later, now));
            }
        }
    }
}

#[test]
fn a_change_from_60_to_150_seconds_needs_only_what_is_gone() {
    let loads = [100; 400];
    let mut measures = started(START, &[spec("requests_per_second", 60, "average")]);
    let mut now = after(START, 5);
    for (second, load) in (START..).zip(loads) {
        now = measure(&mut measures, second, load);
    }
    let long = spec("requests_per_second", 150, "average");
    measures.watch(uid(), &[long], now);
    let before = signal(&measures, long, now);
    assert_eq!((before.value, before.warming), (Some(100.0), true));
    assert_eq!(before.seconds_covered, 120);
    let lacks = measures.lacks_since(uid(), &[long], now).unwrap();
    assert!(lacks <= Timestamp::from_secs(START + 250));
    measures.refill(uid(), &history(&loads, START + 385), now);
    let refilled = signal(&measures, long, now);
    assert_eq!((refilled.value, refilled.warming), (Some(100.0), false));
    assert_eq!(measures.lacks_since(uid(), &[long], now), None);
}

#[test]
fn a_second_that_was_measured_and_whose_load_is_unknown_is_not_taken_for_zero() {
    let loads = [100; 300];
    let mut measures = started(START, &[]);
    let mut now = after(START, 5);
    for (second, load) in (START..).zip(loads) {
        now = measure(&mut measures, second, load);
    }
    let mut past = history(&loads, START + 290);
    let instances = past.kinds.get_mut(&SourceKind::NODE).unwrap();
    // They were recorded in the last minutes only.
    let recorded = START + 100;
    instances.known = Spans::from_iter([(recorded, START + 290)]);
    instances.instances = instances.instances.split_off(&recorded);
    let long = spec("cpu_utilization", 250, "average");
    measures.watch(uid(), &[long], now);
    measures.refill(uid(), &past, now);
    assert!(signal(&measures, long, now).warming);
    let covered = spec("cpu_utilization", 190, "average");
    let covered = signal(&measures, covered, now);
    assert_eq!((covered.value, covered.warming), (Some(100.0), false));
}

#[test]
fn a_gap_between_history_and_start_stays_a_gap_until_it_leaves_the_window() {
    let loads = [100; 100];
    let minute = spec("requests_per_second", 60, "average");
    let restarted = START + 80;
    let mut measures = started(restarted, &[minute]);
    measures.refill(
        uid(),
        &history(&loads, START + 70),
        Timestamp::from_secs(restarted),
    );
    let mut now = after(restarted, 5);
    for (second, load) in (restarted..START + 100).zip(loads) {
        now = measure(&mut measures, second, load);
    }
    let mut signals = [Some(signal(&measures, minute, now))];
    measures.add_evidence(uid(), &[minute], now, &mut signals);
    let signal = signals[0].unwrap();
    assert_eq!((signal.value, signal.seconds_covered), (Some(100.0), 50));
    assert!(!signal.warming);
    // The last second that is lacking is the one before the restart.
    assert_eq!(
        signal.complete_at,
        Some(Timestamp::from_secs(restarted + 60))
    );
}
