//! What an autoscaler that has just started decides on measurements from before its start.

use std::path::PathBuf;
use std::sync::Mutex;

use contract::decision::Decision;
use contract::frame::{DeploymentFrame, InstanceFrame, Role, Source};
use contract::ids::Position;
use contract::log::Actor;
use domain::measure::{Load, MeasuredSpan, Past, PastOfKind};
use runtime::consumer::Fold;
use runtime::ids::{Ids, SeededIds};
use serde_json::json;

use super::*;

const START: i64 = 1_790_000_000;

fn second(second: i64) -> Timestamp {
    Timestamp::from_secs(START + second)
}

fn key() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

/// The example of an event, which is about `iris` and its deployment `blue`.
fn golden(type_name: &str) -> Event {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let file = format!("../../libs/contract/tests/golden/events/{type_name}.v1.json");
    let text = std::fs::read_to_string(folder.join(file)).unwrap();
    Event::decode(type_name, 1, &text).unwrap()
}

/// A policy that scales out by one instance above four concurrent requests over so many seconds.
fn policy(revision: u64, window_seconds: u64) -> Event {
    let Event::AutoscaleSet(mut set) = golden("autoscale.set") else {
        panic!("another event");
    };
    set.revision = revision;
    let rules = json!([{
        "name": "busy", "when": "> 4", "scale": {"direction": "out", "by": 1, "cooldown": "0s"},
        "metric": {"name": "concurrency", "window": format!("{window_seconds}s")},
    }, {
        "name": "idle", "when": "< 1", "scale": {"direction": "in", "by": 1, "cooldown": "0s"},
        "metric": {"name": "concurrency", "window": format!("{window_seconds}s")},
    }]);
    set.spec.profiles[0].rules = serde_json::from_value(rules).unwrap();
    set.spec.stabilization = serde_json::from_value(json!({"out": "0s", "in": "0s"})).unwrap();
    Event::AutoscaleSet(set)
}

/// A policy that scales out by one instance above half a core over 3 seconds.
fn cpu_policy(revision: u64, initialization_period: &str) -> Event {
    let Event::AutoscaleSet(mut set) = policy(revision, 3) else {
        panic!("another event");
    };
    let rules = json!([{
        "name": "busy", "when": "> 50", "scale": {"direction": "out", "by": 1, "cooldown": "0s"},
        "metric": {"name": "cpu_utilization", "window": "3s"},
    }]);
    set.spec.profiles[0].rules = serde_json::from_value(rules).unwrap();
    set.spec.initialization_period = initialization_period.parse().unwrap();
    Event::AutoscaleSet(set)
}

/// A history in which this many requests were in flight in every second; `None` if it cannot be read.
struct Recorded {
    concurrency: Mutex<Option<u64>>,
    requests: Mutex<Vec<PastRequest>>,
}

#[async_trait::async_trait]
impl PastSource for Recorded {
    async fn past(&self, request: &PastRequest) -> Result<Past, PastError> {
        self.requests.lock().unwrap().push(request.clone());
        let concurrency = self.concurrency.lock().unwrap().ok_or("the disk is gone")?;
        let (from, end) = (request.from.secs(), START + 100);
        let load = Load {
            in_flight_us: concurrency * 1_000_000,
            ..Load::default()
        };
        let gateways = PastOfKind {
            from,
            measured: vec![MeasuredSpan {
                start: from,
                end,
                is_partial: false,
                length_us: 1_000_000,
            }],
            known: [(from, end)].into_iter().collect(),
            loads: (from..end).map(|second| (second, load.clone())).collect(),
            ..PastOfKind::default()
        };
        Ok(Past {
            kinds: BTreeMap::from([(SourceKind::GATEWAY, gateways)]),
        })
    }
}

struct Harness {
    autoscaler: Autoscaler,
    source: Arc<Recorded>,
    state: EndpointState,
    position: u64,
    ids: SeededIds,
}

impl Harness {
    /// An endpoint with a count of 2, and an autoscaler that starts 102 seconds later.
    fn new(concurrency: Option<u64>) -> Self {
        let source = Arc::new(Recorded {
            concurrency: Mutex::new(concurrency),
            requests: Mutex::default(),
        });
        let mut harness = Self::of(source.clone(), policy(1, 60));
        harness.autoscaler = Autoscaler {
            refills: Some(Refills::start(source)),
            ..Autoscaler::default()
        };
        harness
    }

    /// An endpoint with a count of 2 by this policy.
    fn of(source: Arc<Recorded>, policy: Event) -> Self {
        let mut harness = Self {
            autoscaler: Autoscaler::default(),
            source,
            state: EndpointState::default(),
            position: 0,
            ids: SeededIds::new(1),
        };
        for event in ["endpoint.created", "deployment.created"] {
            harness.apply(golden(event), second(0));
        }
        harness.apply(policy, second(1));
        let first = harness.evaluate(second(1)).remove(0);
        assert_eq!(first.granted, 2);
        harness.apply(Event::ScalingDecided(Box::new(first)), second(1));
        harness
    }

    /// An autoscaler that has taken over a deployment whose rule reads CPU, and reads no history.
    fn with_cpu_policy(initialization_period: &str) -> Self {
        let source = Arc::new(Recorded {
            concurrency: Mutex::new(None),
            requests: Mutex::default(),
        });
        let mut harness = Self::of(source, cpu_policy(1, initialization_period));
        harness.autoscaler = Autoscaler::default();
        harness
    }

    fn apply(&mut self, event: Event, time: Timestamp) {
        self.position += 1;
        let kind = match event {
            Event::ScalingDecided(_) => StreamKind::Scaling,
            _ => StreamKind::Endpoint,
        };
        let record = Record {
            position: Position(self.position),
            prev: Position(self.position - 1),
            bucket: key().bucket(),
            stream: StreamName::of(kind, &key()),
            version: self.position,
            id: self.ids.event_id(time),
            time,
            actor: Actor::service("test"),
            event,
        };
        AutoscalerFold.apply(&key(), &mut self.state, &record);
        self.autoscaler.applied(&key(), &record, ());
    }

    fn evaluate(&mut self, now: Timestamp) -> Vec<Decision> {
        let outputs = self.autoscaler.evaluate(&key(), &self.state, &(), now);
        let events = outputs.events.into_iter();
        let decision = |(_, event)| match event {
            Event::ScalingDecided(decision) => *decision,
            other => panic!("{other:?}"),
        };
        events.map(decision).collect()
    }

    /// Prepares the bucket, as when it has been caught up with.
    fn caught_up(&mut self, now: Timestamp) {
        self.autoscaler.prepare(&key(), &self.state, now);
        self.autoscaler.prepared(key().bucket(), now);
    }

    /// A node reports an instance that uses a whole core and became ready 95 seconds after the start.
    fn report_cpu(&mut self, seconds: std::ops::Range<i64>) {
        let Event::DeploymentCreated(created) = golden("deployment.created") else {
            panic!("another event");
        };
        for (sequence, start) in (0..).zip(seconds) {
            let instance = InstanceFrame {
                cpu_us: Some(1_000_000),
                ready_for_us: Some((start - 94) as u64 * 1_000_000),
                ..InstanceFrame::new("i-1".to_owned().into())
            };
            let frame = Frame {
                source: Source {
                    kind: SourceKind::NODE,
                    id: "n".into(),
                },
                boot: Default::default(),
                sequence,
                bucket: key().bucket(),
                start: second(start),
                length_us: 1_000_000,
                routes: Default::default(),
                members: Default::default(),
                hello: None,
                goodbye: false,
                deployments: vec![DeploymentFrame {
                    instances: vec![instance],
                    ..DeploymentFrame::new(
                        key(),
                        created.deployment.clone(),
                        created.uid,
                        Role::LIVE,
                    )
                }],
            };
            self.autoscaler.observe(&frame, second(start + 1));
        }
    }

    /// Waits for what was asked for.
    async fn until_refilled(&mut self, now: Timestamp) {
        let refilled = async {
            while self.autoscaler.refill(now).is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), refilled)
            .await
            .expect("nothing was asked for");
    }
}

#[tokio::test]
async fn the_first_decision_after_a_start_rests_on_what_was_measured_before() {
    let mut harness = Harness::new(Some(20));
    assert_eq!(harness.evaluate(second(102)), []);
    harness.until_refilled(second(102)).await;
    let decision = harness.evaluate(second(102)).remove(0);
    assert_eq!((decision.from, decision.granted), (2, 3));
    assert_eq!(decision.decided_by.as_deref(), Some("busy"));
    let signal = decision.inputs.signals["concurrency/60s/average"];
    assert_eq!((signal.value, signal.warming), (Some(20.0), false));
}

#[tokio::test]
async fn a_window_with_a_gap_scales_out_and_not_in_and_the_words_say_until_when() {
    let mut harness = Harness::new(Some(0));
    harness.evaluate(second(110));
    harness.until_refilled(second(110)).await;
    let decision = harness.evaluate(second(110)).remove(0);
    assert_eq!((decision.from, decision.granted), (2, 2));
    let complete_at = decision.inputs.signals["concurrency/60s/average"].complete_at;
    let because = &decision.rules[1].because;
    let words = format!(
        "only 53 of 60 s are measured, so it does not scale in before {}",
        complete_at.unwrap()
    );
    assert!(because.contains(&words), "{because}");
    let explained = domain::autoscale::explain::text(&decision);
    assert!(
        explained.contains("nothing scales in before"),
        "{explained}"
    );
}

#[tokio::test]
async fn a_longer_window_is_refilled_when_the_policy_changes() {
    let mut harness = Harness::new(Some(20));
    harness.evaluate(second(102));
    harness.until_refilled(second(102)).await;
    harness.apply(policy(2, 90), second(103));
    assert_eq!(harness.evaluate(second(103)), []);
    harness.until_refilled(second(103)).await;
    let decision = harness.evaluate(second(103)).remove(0);
    let signal = decision.inputs.signals["concurrency/90s/average"];
    assert_eq!((decision.granted, signal.value), (3, Some(20.0)));
    assert!(!signal.warming);
    let requests = harness.source.requests.lock().unwrap();
    let from: Vec<Timestamp> = requests.iter().map(|request| request.from).collect();
    assert_eq!(from, [second(39), second(10)]);
}

#[tokio::test]
async fn a_source_that_fails_delays_decisions_briefly() {
    let mut harness = Harness::new(None);
    assert_eq!(harness.evaluate(second(102)), []);
    harness.until_refilled(second(102)).await;
    let decision = harness.evaluate(second(102)).remove(0);
    assert_eq!((decision.from, decision.granted), (2, 2));
}

#[tokio::test]
async fn a_source_that_fails_is_asked_again_less_and_less_often_while_windows_lack_something() {
    let mut harness = Harness::new(None);
    harness.apply(policy(2, 300), second(102));
    let mut asked_at = Vec::new();
    for now in 102..450 {
        harness.evaluate(second(now));
        // The source answers before its reader waits again.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        harness.autoscaler.refill(second(now));
        let requests = harness.source.requests.lock().unwrap().len();
        asked_at.extend((asked_at.len()..requests).map(|_| now));
    }
    assert_eq!(asked_at, [102, 107, 117, 137, 177, 237, 297, 357]);
}

#[tokio::test]
async fn a_source_that_failed_at_the_start_refills_once_it_can_be_read() {
    let mut harness = Harness::new(None);
    harness.evaluate(second(102));
    harness.until_refilled(second(102)).await;
    let held = harness.evaluate(second(102)).remove(0);
    harness.apply(Event::ScalingDecided(Box::new(held)), second(102));
    *harness.source.concurrency.lock().unwrap() = Some(20);
    assert_eq!(
        harness.evaluate(second(107)),
        [],
        "asked, and not waited for"
    );
    harness.until_refilled(second(107)).await;
    let decision = harness.evaluate(second(107)).remove(0);
    assert_eq!((decision.from, decision.granted), (2, 3));
}

#[tokio::test]
async fn a_source_that_does_not_answer_is_not_waited_for() {
    let mut harness = Harness::new(Some(20));
    assert_eq!(harness.evaluate(second(102)), []);
    assert_eq!(harness.evaluate(second(103)), []);
    assert_eq!(harness.evaluate(second(104)).len(), 1);
}

#[test]
fn frames_from_before_the_log_was_read_are_measured_by_the_policy() {
    let mut harness = Harness::with_cpu_policy("30s");
    harness.report_cpu(100..104);
    harness.caught_up(second(104));
    let signal = |decision: &Decision| decision.inputs.signals["cpu_utilization/3s/average"];
    let held = harness.evaluate(second(104)).remove(0);
    assert_eq!((held.granted, signal(&held).value), (2, None));

    let mut harness = Harness::with_cpu_policy("5s");
    harness.report_cpu(101..105);
    harness.caught_up(second(105));
    let decided = harness.evaluate(second(105)).remove(0);
    let measured = signal(&decided);
    assert_eq!((decided.granted, measured.value), (3, Some(100.0)));
    assert!(!measured.outdated);
}

#[test]
fn of_too_many_frames_that_wait_the_oldest_are_dropped() {
    let mut harness = Harness::with_cpu_policy("5s");
    harness.report_cpu(100..100 + EARLY_FRAMES_MAX as i64 + 1);
    let waiting = &harness.autoscaler.early[&key().bucket()];
    assert_eq!(waiting.len(), EARLY_FRAMES_MAX);
    assert_eq!(waiting[0].1.start, second(101));
    harness.autoscaler.forget(key().bucket());
    assert!(harness.autoscaler.early.is_empty());
}
