//! Merging of frames: what closes a second, and what a window over closed seconds reports.

mod refill;
mod rows;

use contract::decision::Unmeasured;
use contract::frame::{DeploymentFrame, InstanceFrame, Outcomes, Role};
use contract::histogram::Histogram;
use contract::ids::{Bucket, EndpointKey, InstanceId};
use uuid::Uuid;

use super::*;

const START: i64 = 1_790_000_000;

fn uid() -> Uid {
    Uid(Uuid::from_u128(7))
}

fn gateway(name: &str) -> Source {
    Source {
        kind: SourceKind::GATEWAY,
        id: name.into(),
    }
}

fn empty(source: Source, second: i64) -> Frame {
    Frame {
        boot: Uuid::from_u128(source.id.len() as u128),
        source,
        sequence: (second - START + 10_000) as u64,
        bucket: Bucket(3),
        start: Timestamp::from_secs(second),
        length_us: 1_000_000,
        routes: Default::default(),
        members: Default::default(),
        hello: None,
        goodbye: false,
        deployments: Vec::new(),
    }
}

fn deployment() -> DeploymentFrame {
    let endpoint = EndpointKey::new(&"iris".parse().unwrap());
    DeploymentFrame::new(endpoint, "blue".parse().unwrap(), uid(), Role::LIVE)
}

fn arrivals(source: Source, second: i64, arrivals: u64) -> Frame {
    Frame {
        deployments: vec![DeploymentFrame {
            arrivals,
            ..deployment()
        }],
        ..empty(source, second)
    }
}

/// When a frame of a second usually arrives: just after its end.
fn after(second: i64, millis: u64) -> Timestamp {
    Timestamp::from_secs(second + 1) + Span::from_millis(millis)
}

fn spec(metric: &str, seconds: u64, aggregation: &str) -> SignalSpec {
    SignalSpec {
        metric: Metric::parse(metric).unwrap(),
        window: Span::from_secs(seconds),
        aggregation: Aggregation::parse(aggregation).unwrap(),
    }
}

fn signal(measures: &Measures, spec: SignalSpec, now: Timestamp) -> Signal {
    measures.signals(uid(), &[spec], SignalOptions::default(), now)[0].unwrap()
}

fn measures() -> Measures {
    Measures::new(Timestamp::from_secs(START))
}

/// One gateway that sends the frames of the seconds from `START` on, each in time.
fn one_gateway(frames: impl IntoIterator<Item = DeploymentFrame>) -> (Measures, Timestamp) {
    let mut measures = measures();
    let mut now = after(START, 5);
    for (index, deployment) in frames.into_iter().enumerate() {
        let second = START + index as i64;
        now = after(second, 5);
        let frame = Frame {
            deployments: vec![deployment],
            ..empty(gateway("a"), second)
        };
        measures.frame(now, &frame);
    }
    (measures, now)
}

#[test]
fn a_second_of_the_only_gateway_closes_with_its_frame() {
    let mut measures = measures();
    let closed = measures.frame(after(START, 5), &arrivals(gateway("a"), START, 4));
    assert_eq!(closed.len(), 1);
    assert_eq!(closed[0].start, Timestamp::from_secs(START));
    assert!(closed[0].missing.is_empty() && !closed[0].empty);
}

#[test]
fn a_second_of_two_gateways_closes_with_the_second_frame() {
    let mut measures = measures();
    measures.frame(after(START, 5), &empty(gateway("a"), START));
    measures.frame(after(START, 6), &empty(gateway("bb"), START));
    let next = START + 1;
    let early = measures.frame(after(next, 5), &arrivals(gateway("a"), next, 4));
    assert_eq!(early, []);
    let closed = measures.frame(after(next, 30), &arrivals(gateway("bb"), next, 6));
    assert_eq!(closed.len(), 1);
    let rate = signal(
        &measures,
        spec("requests_per_second", 1, "average"),
        after(next, 30),
    );
    assert_eq!(rate.value, Some(10.0));
    assert!(!rate.partial);
}

#[test]
fn a_second_that_lacks_a_gateway_closes_partial_50_ms_after_the_usual_arrival() {
    let mut measures = measures();
    for second in START..START + 20 {
        measures.frame(after(second, 10), &empty(gateway("a"), second));
        measures.frame(after(second, 10), &empty(gateway("bb"), second));
    }
    let second = START + 20;
    assert_eq!(
        measures.frame(after(second, 10), &empty(gateway("a"), second)),
        []
    );
    let deadline = measures.next_deadline().unwrap();
    assert_eq!(deadline, after(second, 60));
    assert_eq!(measures.tick(after(second, 59)), []);
    let closed = measures.tick(deadline);
    assert_eq!(closed.len(), 1);
    assert_eq!(closed[0].missing, [gateway("bb")]);
    assert!(signal(&measures, spec("concurrency", 10, "average"), deadline).partial);
}

#[test]
fn a_goodbye_ends_the_waiting_and_leaves_nothing_partial() {
    let mut measures = measures();
    for second in START..START + 3 {
        measures.frame(after(second, 10), &empty(gateway("a"), second));
        let goodbye = Frame {
            members: Default::default(),
            hello: None,
            goodbye: second == START + 2,
            ..empty(gateway("bb"), second)
        };
        measures.frame(after(second, 10), &goodbye);
    }
    let second = START + 3;
    let closed = measures.frame(after(second, 10), &empty(gateway("a"), second));
    assert_eq!(closed.len(), 1);
    assert!(closed[0].missing.is_empty());
    assert_eq!(measures.members().count(), 1);
}

#[test]
fn a_gateway_lost_without_goodbye_blocks_for_the_window_and_a_minute() {
    let mut measures = measures();
    let window = 10;
    let wanted = spec("requests_per_second", window, "average");
    let mut last_partial = 0;
    for second in START..START + 200 {
        measures.frame(after(second, 10), &empty(gateway("a"), second));
        if second < START + 50 {
            measures.frame(after(second, 10), &empty(gateway("bb"), second));
        }
        let now = after(second, 200);
        measures.tick(now);
        if signal(&measures, wanted, now).partial {
            last_partial = second;
        }
    }
    // Its last second is START + 49: a minute more, then the window has to pass.
    assert_eq!(last_partial, START + 49 + 60 + window as i64 - 1);
    assert_eq!(measures.counters().lost, 1);
}

#[test]
fn late_and_skewed_and_repeated_frames_are_counted_and_ignored() {
    let mut measures = measures();
    measures.frame(after(START, 5), &arrivals(gateway("a"), START, 4));
    let late = arrivals(gateway("bb"), START, 100);
    measures.frame(after(START, 20), &late);
    let repeated = arrivals(gateway("a"), START, 4);
    measures.frame(after(START, 30), &repeated);
    let ahead = arrivals(gateway("a"), START + 4, 100);
    measures.frame(Timestamp::from_secs(START + 1), &ahead);
    let behind = arrivals(gateway("a"), START - 60, 100);
    measures.frame(Timestamp::from_secs(START + 1), &behind);
    let counters = measures.counters();
    assert_eq!(
        (counters.late, counters.skewed, counters.duplicate),
        (1, 2, 1)
    );
    let rate = signal(
        &measures,
        spec("requests_per_second", 1, "average"),
        after(START, 40),
    );
    assert_eq!(rate.value, Some(4.0));
}

#[test]
fn a_live_gateway_without_traffic_reports_zero_and_no_gateway_reports_nothing() {
    let mut measures = measures();
    let now = Timestamp::from_secs(START + 100);
    let nothing = signal(&measures, spec("latency_p95", 5, "average"), now);
    assert_eq!((nothing.value, nothing.seconds_covered), (None, 0));
    for second in START + 100..START + 110 {
        measures.frame(after(second, 5), &empty(gateway("a"), second));
    }
    let now = after(START + 109, 5);
    for metric in [
        "requests_per_second",
        "concurrency",
        "latency_p95",
        "error_ratio",
    ] {
        let zero = signal(&measures, spec(metric, 5, "average"), now);
        assert_eq!(
            (zero.value, zero.seconds_covered),
            (Some(0.0), 5),
            "{metric}"
        );
    }
}

#[test]
fn a_window_reports_its_coverage_until_it_is_covered() {
    let mut measures = measures();
    for second in START..START + 60 {
        measures.frame(after(second, 5), &arrivals(gateway("a"), second, 2));
        let now = after(second, 5);
        let rate = signal(&measures, spec("requests_per_second", 30, "average"), now);
        let seen = (second - START + 1) as u32;
        assert_eq!(rate.seconds_covered, seen.min(30));
        assert_eq!(rate.warming, seen < 30, "{seen}");
        assert_eq!(rate.value, Some(2.0));
    }
}

/// One gateway that has reported every second since `from`, of a deployment that was created at `created` and gets
/// requests from then on.
fn since_creation(from: i64, created: i64, windows: &[SignalSpec]) -> Measures {
    let began = Timestamp::from_secs(from);
    let mut measures = Measures::new(began);
    measures.watch(uid(), windows, began);
    measures.set_created(uid(), Timestamp::from_secs(created));
    for second in from..created + 4 {
        let requests = if second < created { 0 } else { 30 };
        let frame = arrivals(gateway("a"), second, requests);
        measures.frame(after(second, 5), &frame);
    }
    measures
}

#[test]
fn a_process_that_began_with_a_deployment_measures_it_like_an_older_one() {
    let windows =
        [1, 10, 60, 150, 3600].map(|seconds| spec("requests_per_second", seconds, "average"));
    let (created, now) = (START + 7, after(START + 10, 5));
    let young = since_creation(START + 4, created, &windows);
    let old = since_creation(START - 4000, created, &windows);
    for window in windows {
        let expected = signal(&old, window, now);
        assert_eq!(signal(&young, window, now), expected);
        assert_eq!(expected.seconds_covered, expected.seconds_wanted);
    }
    assert_eq!(young.lacks_since(uid(), &windows, now), None);
}

#[test]
fn what_a_deployment_had_before_the_process_began_is_not_known() {
    let window = spec("requests_per_second", 60, "average");
    let mut measures = since_creation(START, START, &[window]);
    let created = Timestamp::from_secs(START - 10);
    measures.set_created(uid(), created);
    let now = after(START + 3, 5);
    let rate = signal(&measures, window, now);
    assert_eq!((rate.seconds_covered, rate.warming), (51, true));
    let lacks_since = measures.lacks_since(uid(), &[window], now);
    assert_eq!(lacks_since, Some(created + Span::from_secs(1)));
    let mut explained = [Some(rate)];
    measures.add_evidence(uid(), &[window], now, &mut explained);
    let complete_at = explained[0].unwrap().complete_at;
    assert_eq!(complete_at, Some(Timestamp::from_secs(START + 60)));
}

#[test]
fn seconds_before_creation_are_no_evidence_without_a_report() {
    let mut measures = measures();
    measures.set_created(uid(), Timestamp::from_secs(START));
    let rate = spec("requests_per_second", 60, "average");
    let silent = signal(&measures, rate, after(START, 5));
    assert_eq!((silent.value, silent.seconds_covered), (None, 0));
    measures.frame(after(START, 5), &empty(gateway("a"), START));
    assert_eq!(signal(&measures, rate, after(START, 5)).value, Some(0.0));
    // Nor is it evidence of the time since.
    let later = signal(&measures, rate, after(START + 30, 0));
    assert_eq!(later.seconds_covered, 33);
}

#[test]
fn a_window_empties_when_frames_stop() {
    let (mut measures, now) = one_gateway((0..30).map(|_| deployment()));
    let wanted = spec("requests_per_second", 10, "average");
    assert_eq!(signal(&measures, wanted, now).seconds_covered, 10);
    let later = now + Span::from_secs(20);
    measures.tick(later);
    let stopped = signal(&measures, wanted, later);
    assert_eq!((stopped.value, stopped.seconds_covered), (None, 0));
}

#[test]
fn aggregations_work_on_the_values_of_seconds() {
    let (measures, now) = one_gateway((1..=10).map(|second| DeploymentFrame {
        arrivals: second,
        ..deployment()
    }));
    for (aggregation, expected) in [
        ("average", 5.5),
        ("min", 1.0),
        ("max", 10.0),
        ("sum", 55.0),
        ("count", 10.0),
        ("last", 10.0),
        ("p50", 5.0),
        ("p90", 9.0),
        ("p99", 10.0),
    ] {
        let wanted = spec("requests_per_second", 10, aggregation);
        assert_eq!(
            signal(&measures, wanted, now).value,
            Some(expected),
            "{aggregation}"
        );
    }
    let per_minute = spec("requests_per_minute", 10, "average");
    assert_eq!(signal(&measures, per_minute, now).value, Some(330.0));
}

#[test]
fn rates_use_the_true_length_of_a_second() {
    let mut measures = measures();
    let frame = Frame {
        length_us: 2_000_000,
        ..arrivals(gateway("a"), START, 10)
    };
    measures.frame(after(START, 5), &frame);
    let rate = signal(
        &measures,
        spec("requests_per_second", 1, "average"),
        after(START, 5),
    );
    assert_eq!(rate.value, Some(5.0));
}

#[test]
fn concurrency_counts_those_served_and_those_waiting() {
    let (measures, now) = one_gateway([DeploymentFrame {
        in_flight_us: 2_500_000,
        queued_us: 500_000,
        ..deployment()
    }]);
    let value = |metric| signal(&measures, spec(metric, 1, "average"), now).value;
    assert_eq!(value("concurrency"), Some(3.0));
    assert_eq!(value("queue_length"), Some(0.5));
}

#[test]
fn latency_quantiles_are_taken_over_the_whole_window() {
    let slow_second = |slow: bool| {
        let mut latency = Histogram::default();
        for _ in 0..100 {
            latency.record(if slow { 400_000 } else { 10_000 });
        }
        DeploymentFrame {
            latency,
            ..deployment()
        }
    };
    let (measures, now) = one_gateway((0..10).map(|second| slow_second(second == 4)));
    let value = |metric, aggregation| {
        signal(&measures, spec(metric, 10, aggregation), now)
            .value
            .unwrap()
    };
    assert!((10.0..10.3).contains(&value("latency_p90", "average")));
    assert!((400.0..409.0).contains(&value("latency_p95", "average")));
    assert!((400.0..409.0).contains(&value("latency_p50", "max")));
    assert_eq!(value("latency_average", "average"), 49.0);
}

#[test]
fn error_ratios_count_as_the_contract_says() {
    let outcomes = Outcomes {
        success: 80,
        model_client_error: 10,
        model_server_error: 6,
        too_many_pending: 4,
        refused: 50,
        client_left: 50,
        ..Outcomes::default()
    };
    let (measures, now) = one_gateway([DeploymentFrame {
        outcomes,
        ..deployment()
    }]);
    let wanted = spec("error_ratio", 1, "average");
    assert_eq!(signal(&measures, wanted, now).value, Some(0.1));
    let strict = SignalOptions {
        model_client_errors: ModelClientErrors::Bad,
    };
    let strict = measures.signals(uid(), &[wanted], strict, now)[0].unwrap();
    assert_eq!(strict.value, Some(0.2));
}

/// The signals over three seconds of requests that hang, behind two gateways.
fn hanging() -> impl Fn(&str, &str) -> Signal {
    let mut measures = measures();
    let frame = |source, second: i64, oldest_ms: u64| Frame {
        deployments: vec![DeploymentFrame {
            oldest_in_flight_us: oldest_ms * 1000,
            in_flight_us: 1_000_000,
            ..deployment()
        }],
        ..empty(source, second)
    };
    for second in 0..3 {
        let at = START + second;
        let age = 1000 * (second as u64 + 1);
        measures.frame(after(at, 5), &frame(gateway("a"), at, age));
        measures.frame(after(at, 6), &frame(gateway("bb"), at, age + 250));
    }
    move |metric, aggregation| {
        let now = after(START + 2, 6);
        signal(&measures, spec(metric, 2, aggregation), now)
    }
}

#[test]
fn while_no_request_is_answered_the_latency_is_the_age_of_the_oldest() {
    let hanging = hanging();
    for metric in ["latency_p50", "latency_p99", "latency_average"] {
        for aggregation in ["average", "min", "max", "last", "p90"] {
            let latency = hanging(metric, aggregation);
            assert_eq!(latency.value, Some(3250.0), "{metric} {aggregation}");
            assert_eq!(latency.unmeasured, Some(Unmeasured::Unanswered));
        }
    }
}

#[test]
fn while_no_request_ends_the_shares_of_requests_have_no_value() {
    let hanging = hanging();
    for metric in ["error_ratio", "refused_ratio"] {
        for aggregation in ["average", "min", "max", "last", "p90"] {
            let share = hanging(metric, aggregation);
            assert_eq!(share.value, None, "{metric} {aggregation}");
            assert_eq!(share.unmeasured, Some(Unmeasured::Unanswered));
        }
    }
    assert_eq!(hanging("concurrency", "average").unmeasured, None);
}

#[test]
fn one_answer_in_the_window_is_the_latency_and_seconds_without_one_do_not_count() {
    let hangs = || DeploymentFrame {
        in_flight_us: 1_000_000,
        oldest_in_flight_us: 900_000,
        ..deployment()
    };
    let mut answers = hangs();
    answers.latency.record(40_000);
    answers.outcomes.success = 1;
    let (measures, now) = one_gateway([hangs(), answers, hangs()]);
    for aggregation in ["average", "min", "max", "last"] {
        let latency = signal(&measures, spec("latency_average", 3, aggregation), now);
        assert_eq!((latency.value, latency.unmeasured), (Some(40.0), None));
        let errors = signal(&measures, spec("error_ratio", 3, aggregation), now);
        assert_eq!((errors.value, errors.unmeasured), (Some(0.0), None));
    }
}

#[test]
fn requests_without_an_answer_are_not_a_latency_of_zero() {
    let ended = |outcomes| {
        let (measures, now) = one_gateway([DeploymentFrame {
            outcomes,
            ..deployment()
        }]);
        signal(&measures, spec("latency_p90", 1, "average"), now).value
    };
    let none = Outcomes::default();
    for outcomes in [
        Outcomes {
            too_many_pending: 3,
            ..none
        },
        Outcomes {
            unreachable: 3,
            ..none
        },
        Outcomes {
            client_left: 3,
            ..none
        },
    ] {
        assert_eq!(ended(outcomes), None, "{outcomes:?}");
    }
    // A request that is refused because of the client is none for the model.
    assert_eq!(ended(Outcomes { refused: 3, ..none }), Some(0.0));
}

#[test]
fn refusals_for_lack_of_capacity_are_a_ratio_of_their_own() {
    let outcomes = Outcomes {
        success: 5,
        too_many_pending: 2,
        unavailable: 1,
        hold_full: 1,
        hold_expired: 1,
        refused: 50,
        ..Outcomes::default()
    };
    let (measures, now) = one_gateway([DeploymentFrame {
        outcomes,
        ..deployment()
    }]);
    let of = |metric| signal(&measures, spec(metric, 1, "average"), now);
    assert_eq!(of("refused_ratio").value, Some(0.5));
    assert_eq!(of("error_ratio").value, Some(0.5));
    assert_eq!(of("concurrency").refused, 5);
    assert_eq!(of("cpu_utilization").refused, 5);
}

#[test]
fn refusals_are_counted_over_the_window_of_the_signal() {
    let refused = |second: u64| DeploymentFrame {
        outcomes: Outcomes {
            too_many_pending: u64::from(second == 0),
            ..Outcomes::default()
        },
        ..deployment()
    };
    let (measures, now) = one_gateway((0..130).map(refused));
    let (recent, _) = one_gateway((0..30).map(refused));
    let counted = |measures: &Measures, seconds, now| {
        signal(measures, spec("concurrency", seconds, "average"), now).refused
    };
    assert_eq!(counted(&recent, 10, after(START + 29, 5)), 0);
    assert_eq!(counted(&recent, 60, after(START + 29, 5)), 1);
    // An hour of refusals long past says nothing about the capacity now.
    assert_eq!(counted(&measures, 3600, now), 0);
}

#[test]
fn a_window_with_a_frame_of_older_definitions_says_so_where_the_meaning_has_changed() {
    let of = |second: u64| DeploymentFrame {
        definitions: u32::from(second > 0),
        ..deployment()
    };
    let (measures, now) = one_gateway((0..10).map(of));
    let outdated = |metric, seconds| {
        let spec = spec(metric, seconds, "average");
        signal(&measures, spec, now).outdated
    };
    assert!(outdated("latency_p90", 10));
    assert!(!outdated("latency_p90", 9));
    assert!(!outdated("requests_per_second", 10));
}

/// A ready instance that used so much of a core, in percent, and of its 1,000 bytes of memory.
fn instance(name: &str, cpu_percent: u64, memory_bytes: u64) -> InstanceFrame {
    InstanceFrame {
        cpu_us: Some(cpu_percent * 10_000),
        ready_for_us: Some(60_000_000),
        memory_bytes: Some(memory_bytes),
        memory_limit_bytes: Some(1000),
        ..InstanceFrame::new(InstanceId::from(name.to_owned()))
    }
}

/// A node that sends these instances, one list a second.
fn one_node(
    measures: &mut Measures,
    seconds: impl IntoIterator<Item = Vec<InstanceFrame>>,
) -> Timestamp {
    let node = Source {
        kind: SourceKind::NODE,
        id: "node".into(),
    };
    let mut now = after(START, 5);
    for (index, instances) in seconds.into_iter().enumerate() {
        let second = START + index as i64;
        now = after(second, 5);
        let frame = Frame {
            deployments: vec![DeploymentFrame {
                instances,
                ..deployment()
            }],
            ..empty(node.clone(), second)
        };
        measures.frame(now, &frame);
    }
    now
}

/// The CPU utilisation over so many seconds.
fn cpu(seconds: Vec<Vec<InstanceFrame>>) -> Signal {
    let mut measures = measures();
    let window = seconds.len() as u64;
    let now = one_node(&mut measures, seconds);
    signal(&measures, spec("cpu_utilization", window, "average"), now)
}

#[test]
fn utilisation_is_averaged_over_instances_and_comes_from_nodes() {
    let mut measures = measures();
    let seconds = [vec![instance("a", 90, 300), instance("b", 50, 500)]];
    let now = one_node(&mut measures, seconds);
    let value = |metric| signal(&measures, spec(metric, 1, "average"), now).value;
    assert_eq!(value("cpu_utilization"), Some(70.0));
    assert_eq!(value("memory_utilization"), Some(40.0));
}

#[test]
fn instances_that_were_not_ready_for_the_whole_second_are_not_measured() {
    let starting = InstanceFrame {
        ready_for_us: None,
        ..instance("b", 100, 900)
    };
    let just_ready = InstanceFrame {
        ready_for_us: Some(999_999),
        ..instance("c", 0, 0)
    };
    let measured = cpu(vec![vec![instance("a", 60, 300), starting, just_ready]]);
    assert_eq!(
        (measured.value, measured.instances),
        (Some(60.0), Some(1.0))
    );
}

#[test]
fn the_number_of_measured_instances_is_averaged_over_time() {
    let one = || vec![instance("a", 60, 300)];
    let two = vec![instance("a", 40, 300), instance("b", 20, 300)];
    let measured = cpu(vec![one(), one(), one(), two]);
    assert_eq!(
        (measured.value, measured.instances),
        (Some(48.0), Some(1.25))
    );
}

#[test]
fn without_a_ready_instance_or_a_report_of_it_utilisation_has_no_value() {
    let starting = InstanceFrame {
        ready_for_us: None,
        ..instance("a", 100, 900)
    };
    let silent = InstanceFrame {
        cpu_us: None,
        ..instance("a", 100, 900)
    };
    for instances in [vec![], vec![starting], vec![silent]] {
        let none = cpu(vec![instances.clone()]);
        assert_eq!((none.value, none.instances), (None, None), "{instances:?}");
        assert_eq!(none.unmeasured, Some(Unmeasured::NoInstance));
    }
}

#[test]
fn memory_is_a_share_of_what_each_instance_may_use() {
    let limited = |name, bytes, limit| InstanceFrame {
        memory_limit_bytes: limit,
        ..instance(name, 0, bytes)
    };
    let mut measures = measures();
    let instances = vec![
        limited("a", 900, Some(1000)),
        limited("b", 900, Some(3000)),
        limited("c", 900, None),
    ];
    let now = one_node(&mut measures, [instances]);
    let memory = signal(&measures, spec("memory_utilization", 1, "average"), now);
    assert_eq!((memory.value, memory.instances), (Some(60.0), Some(2.0)));
}

#[test]
fn instances_are_not_measured_before_their_initialization_period_is_over() {
    let ready_for = |name, seconds: u64, percent| InstanceFrame {
        ready_for_us: Some(seconds * 1_000_000),
        ..instance(name, percent, 300)
    };
    let mut measures = measures();
    let period = Span::from_secs(30);
    measures.set_initialization_period(uid(), period, Timestamp::from_secs(START));
    let seconds = [30, 31].map(|age| vec![ready_for("a", 90, 40), ready_for("b", age, 100)]);
    let now = one_node(&mut measures, seconds);
    let of = |window| signal(&measures, spec("cpu_utilization", window, "average"), now);
    assert_eq!((of(1).value, of(1).instances), (Some(70.0), Some(2.0)));
    assert_eq!((of(2).value, of(2).instances), (Some(60.0), Some(1.5)));
    assert!(!of(2).outdated);
}

#[test]
fn a_window_from_before_the_initialization_period_changed_is_outdated() {
    let mut measures = measures();
    let second = || vec![instance("a", 40, 300)];
    one_node(&mut measures, [second(), second()]);
    let changed = Timestamp::from_secs(START + 2);
    measures.set_initialization_period(uid(), Span::from_secs(5), changed);
    let now = one_node(&mut measures, (0..5).map(|_| second()));
    let outdated = |window| {
        let spec = spec("cpu_utilization", window, "average");
        signal(&measures, spec, now).outdated
    };
    assert!(outdated(4) && !outdated(3));
}

#[test]
fn a_node_of_an_older_release_scales_out_and_never_in() {
    let mut measures = measures();
    let older = Frame {
        deployments: vec![DeploymentFrame {
            definitions: 0,
            instances: vec![InstanceFrame {
                ready_for_us: None,
                ..instance("a", 90, 300)
            }],
            ..deployment()
        }],
        ..empty(
            Source {
                kind: SourceKind::NODE,
                id: "node".into(),
            },
            START,
        )
    };
    measures.frame(after(START, 5), &older);
    let spec = spec("cpu_utilization", 1, "average");
    let cpu = signal(&measures, spec, after(START, 5));
    assert_eq!((cpu.value, cpu.outdated), (Some(90.0), true));
}

#[test]
fn long_windows_rest_on_coarser_panes_from_when_they_are_watched() {
    let mut measures = measures();
    let long = spec("requests_per_second", 600, "average");
    measures.watch(uid(), &[long], Timestamp::from_secs(START));
    for second in START..START + 700 {
        measures.frame(after(second, 5), &arrivals(gateway("a"), second, 3));
    }
    let now = after(START + 699, 5);
    let watched = signal(&measures, long, now);
    assert_eq!((watched.value, watched.seconds_covered), (Some(3.0), 600));
    assert!(!watched.warming);
    // This window was not watched before, so its data was not kept.
    assert!(signal(&measures, spec("requests_per_second", 7200, "average"), now).warming);
}

#[test]
fn the_arrival_order_of_gateways_does_not_matter() {
    let run = |swap: bool| {
        let mut measures = measures();
        for second in START..START + 30 {
            let mut frames = [
                arrivals(gateway("a"), second, 3 + second as u64 % 7),
                arrivals(gateway("bb"), second, 1 + second as u64 % 3),
            ];
            if swap && second > START {
                frames.reverse();
            }
            for frame in &frames {
                measures.frame(after(second, 5), frame);
            }
        }
        let specs = ["average", "p90", "sum"].map(|name| spec("requests_per_second", 20, name));
        measures.signals(
            uid(),
            &specs,
            SignalOptions::default(),
            after(START + 29, 5),
        )
    };
    assert_eq!(run(false), run(true));
}

#[test]
fn metrics_that_cannot_be_measured_yet_are_refused_by_name() {
    for name in [
        "gpu_utilization",
        "GpuUtilizationPercentage",
        "prometheus",
        "burn_rate",
    ] {
        let error = Metric::parse(name).unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains("not available yet"),
            "{error}"
        );
    }
    let unknown = Metric::parse("cpu").unwrap_err().to_string();
    assert!(unknown.contains("no metric `cpu`") && unknown.contains("cpu_utilization"));
    assert_eq!(
        Metric::parse("RequestLatency_P95"),
        Metric::parse("latency_p95")
    );
}

#[test]
fn keys_name_metric_window_and_aggregation() {
    assert_eq!(
        spec("requests_per_second", 60, "average").key(),
        "requests_per_second/60s/average"
    );
    assert_eq!(
        spec("latency_p95", 300, "max").key(),
        "latency_p95/300s/max"
    );
}
