//! A metric and a source that this release does not know: a metric takes only a row, and a source
//! only frames.
#![allow(clippy::unwrap_used)]

use contract::decision::{CarriedState, InstanceCounts, Pause, Signal};
use contract::frame::{DeploymentFrame, Frame, Role, Source};
use contract::ids::{Bucket, EndpointKey, Uid};
use contract::resources::AutoscaleSpec;
use contract::time::{Span, Timestamp};
use domain::autoscale::{Policy, TickInputs, evaluate};
use domain::measure::{
    Computation, METRICS, Measures, MetricRow, SOURCE_KINDS_MAX, SignalOptions, SituationValue,
    Situations, Unit,
};
use domain::zones::ZoneData;
use serde_json::{Value, json};
use uuid::Uuid;

const START: i64 = 1_790_000_000;

/// The metrics of this release and one more: the depth of a queue, reported by its own kind of
/// source.
fn metrics() -> &'static [MetricRow] {
    let toy = MetricRow {
        name: "toy_depth",
        aliases: &["ToyDepth"],
        unit: Unit::Number,
        source: "toy".parse().unwrap(),
        is_total: true,
        is_per_instance: true,
        description: "Messages in a toy queue.",
        situations: Situations {
            no_traffic: SituationValue::Measured,
            all_in_flight: SituationValue::Measured,
            all_refused: SituationValue::Measured,
            no_instance: SituationValue::Measured,
            no_report: SituationValue::Unknown,
        },
        definitions: 0,
        computation: Computation::Counts(|coverage, load, _| {
            let micros = coverage.length_us;
            (micros > 0).then(|| load.queued_us as f64 / micros as f64)
        }),
    };
    METRICS
        .iter()
        .cloned()
        .chain([toy])
        .collect::<Vec<_>>()
        .leak()
}

fn uid() -> Uid {
    Uid(Uuid::from_u128(7))
}

/// A frame of one second from a source of this kind.
fn frame(kind: &str, second: i64, sent: DeploymentFrame) -> Frame {
    Frame {
        source: Source {
            kind: kind.parse().unwrap(),
            id: "one".into(),
        },
        boot: Uuid::from_u128(1),
        sequence: (second - START) as u64,
        bucket: Bucket(3),
        start: Timestamp::from_secs(second),
        length_us: 1_000_000,
        routes: Default::default(),
        members: Default::default(),
        hello: None,
        goodbye: false,
        deployments: vec![sent],
    }
}

fn deployment() -> DeploymentFrame {
    let endpoint = EndpointKey::new(&"iris".parse().unwrap());
    DeploymentFrame::new(endpoint, "blue".parse().unwrap(), uid(), Role::LIVE)
}

fn after(second: i64) -> Timestamp {
    Timestamp::from_secs(second + 1) + Span::from_millis(5)
}

fn policy(metric: Value, when: &str) -> AutoscaleSpec {
    let rule = json!({
        "name": "deep", "metric": metric, "when": when, "scale": {"direction": "out", "by": 2},
    });
    serde_json::from_value(json!({
        "target": {"endpoint": "iris", "deployment": "blue"},
        "profiles": [{
            "name": "default", "capacity": {"min": 1, "max": 9, "default": 1}, "rules": [rule],
        }],
    }))
    .unwrap()
}

/// Ten seconds in which the gateway sees 3 requests waiting, and the toy source 40 messages.
fn measured(policy: &Policy) -> Vec<Option<Signal>> {
    let mut measures = Measures::new(Timestamp::from_secs(START));
    measures.watch(uid(), policy.signals(), Timestamp::from_secs(START));
    for second in START..START + 10 {
        for (kind, waiting) in [("gateway", 3), ("toy", 40)] {
            let sent = DeploymentFrame {
                queued_us: waiting * 1_000_000,
                ..deployment()
            };
            measures.frame(after(second), &frame(kind, second, sent));
        }
    }
    let options = SignalOptions::default();
    measures.signals(uid(), policy.signals(), options, after(START + 9))
}

#[test]
fn a_metric_with_a_source_of_its_own_is_measured_and_scales() {
    let metric = json!({"name": "ToyDepth", "window": "10s", "perInstance": true});
    let spec = policy(metric, "> 15");
    let zones = ZoneData::bundled();
    let policy = Policy::compile_among(metrics(), &spec, &zones).unwrap();
    let signals = measured(&policy);
    assert_eq!(signals[0].unwrap().value, Some(40.0));
    assert_eq!(policy.signals()[0].key(), "toy_depth/10s/average");
    let tick = TickInputs {
        pinned_by: None,
        failed_starts: None,
        starts_at_default: false,
        policy_revision: 1,
        fixed_instances: 1,
        pin: None,
        pause: Pause::default(),
        instances: InstanceCounts {
            ready: 2,
            pending: 0,
        },
        signals: &signals,
        carried: &CarriedState {
            granted: Some(2),
            ..CarriedState::default()
        },
        selection: None,
    };
    let evaluation = evaluate(Some(&policy), &tick, after(START + 9));
    assert_eq!(evaluation.granted, 4);
    assert_eq!(evaluation.decided_by(&policy), Some("deep"));
}

#[test]
fn a_metric_without_a_row_is_refused_with_the_available_names() {
    let spec = policy(json!({"name": "toy_depth"}), "> 15");
    let findings = Policy::compile(&spec, &ZoneData::bundled()).unwrap_err();
    let detail = &findings[0].detail;
    assert!(
        detail.contains("`toy_depth`") && detail.contains("queue_length"),
        "{detail}"
    );
}

#[test]
fn what_an_unknown_source_measures_is_not_added_to_what_gateways_measure() {
    let spec = policy(json!({"name": "queue_length", "window": "10s"}), "> 15");
    let policy = Policy::compile(&spec, &ZoneData::bundled()).unwrap();
    assert_eq!(measured(&policy)[0].unwrap().value, Some(3.0));
}

#[test]
fn source_kinds_beyond_the_limit_are_not_kept() {
    let mut measures = Measures::new(Timestamp::from_secs(START));
    for kind in 0..2 * SOURCE_KINDS_MAX {
        measures.frame(
            after(START),
            &frame(&format!("toy-{kind}"), START, deployment()),
        );
    }
    let toys = measures.members().count();
    assert!(toys < SOURCE_KINDS_MAX, "{toys} kinds are kept");
}
