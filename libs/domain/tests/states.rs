//! Golden files of the states that consumers fold and keep in snapshots, one per state and version.
//! A change to what is folded from recorded events, or to its serialized form, needs a new version,
//! so that older snapshots are rebuilt; `UPDATE_GOLDEN=1` then writes the new file.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::PathBuf;

use contract::events::Event;
use contract::ids::{EndpointKey, Position};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use domain::autoscale::{RULE_METRICS_VERSION, RuleMetrics};
use domain::fold::{EndpointFold, FOLD_VERSION};
use domain::instances::Instances;
use domain::instances::ready::{READY_VERSION, ReadyCounts};
use domain::usage::{EndpointUsage, USAGE_VERSION};
use domain::views::{EndpointModel, MODEL_VERSION, MODELS, Projection, ReadModel};
use proptest::prelude::*;
use serde::Serialize;
use uuid::Uuid;

/// The events of one endpoint, in order, each from the golden file of its type.
const LOG: [(StreamKind, &str); 16] = [
    (StreamKind::Endpoint, "endpoint.created.v1"),
    (StreamKind::Endpoint, "deployment.created.v1"),
    (StreamKind::Endpoint, "endpoint.traffic-set.v1"),
    (StreamKind::Endpoint, "autoscale.set.v1"),
    (StreamKind::Endpoint, "autoscale.pause-set.v1"),
    (StreamKind::Scaling, "scaling.decided.v1"),
    (StreamKind::Instances, "instance.requested.v1"),
    (StreamKind::Node, "instance.started.v1"),
    (StreamKind::Node, "instance.ready.v1"),
    (StreamKind::Endpoint, "deployment.state-changed.v1"),
    (StreamKind::Usage, "usage.closed.v1"),
    (StreamKind::Usage, "usage.corrected.v1"),
    (StreamKind::Usage, "usage.gap.v1"),
    (StreamKind::Endpoint, "endpoint.key-regenerated.v1"),
    (StreamKind::Scaling, "clock.stepped.v1"),
    (StreamKind::Instances, "instance.draining.v1"),
];

fn iris() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

/// The example of an event.
fn golden(file: &str) -> Event {
    let uid = "019a0000-0000-7000-8000-000000000001";
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../contract/tests/golden/events");
    let (type_name, version) = file.rsplit_once(".v").unwrap();
    let text = std::fs::read_to_string(folder.join(format!("{file}.json"))).unwrap();
    // The example decision is about another incarnation.
    let text = text.replace("00000000-0000-0000-0000-000000000007", uid);
    Event::decode(type_name, version.parse().unwrap(), &text).unwrap()
}

fn log() -> Vec<Record> {
    let record = |((kind, file), position): ((StreamKind, &str), u64)| {
        let stream = match kind {
            StreamKind::Node => StreamName::of_node(&iris(), "node-1"),
            kind => StreamName::of(kind, &iris()),
        };
        Record {
            position: Position(position),
            prev: Position(position - 1),
            bucket: iris().bucket(),
            stream,
            version: position,
            id: Uuid::from_u128(position.into()),
            time: Timestamp::from_secs(1_800_000_000) + Span::from_secs(position),
            actor: Actor::service("test"),
            event: golden(file),
        }
    };
    LOG.into_iter().zip(1..).map(record).collect()
}

fn compare(name: &str, version: u32, state: &impl Serialize) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(format!("tests/golden/states/{name}.v{version}.json"));
    let mut text = serde_json::to_string_pretty(state).unwrap();
    text.push('\n');
    if std::env::var_os("UPDATE_GOLDEN").is_some() && !path.exists() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == text,
        "the state `{name}` differs from that of version {version}: raise its version and run this with UPDATE_GOLDEN=1\n{text}"
    );
}

#[test]
fn the_fold_of_an_endpoint_matches_its_golden_file() {
    let mut state = EndpointFold::default();
    log().iter().for_each(|record| state.apply(record));
    compare("fold", FOLD_VERSION, &state);
}

#[test]
fn the_metrics_that_rules_read_match_their_golden_file() {
    let mut state = RuleMetrics::default();
    log().iter().for_each(|record| state.apply(record));
    compare("rule-metrics", RULE_METRICS_VERSION, &state);
}

#[test]
fn the_model_of_an_endpoint_matches_its_golden_file() {
    let (mut state, mut silent) = (EndpointModel::default(), EndpointModel::default());
    for record in log() {
        state.apply(&iris(), &record);
        silent.apply_without_rows(&iris(), &record);
    }
    assert_eq!(state, silent, "rows that are not made change no model");
    compare("model", MODEL_VERSION, &state);
}

#[test]
fn every_read_model_gets_rows_from_the_log() {
    let mut projection = Projection::default();
    let access = Record {
        stream: StreamName::access(),
        event: golden("access.granted.v1"),
        ..log().remove(0)
    };
    let records = log().into_iter().chain([access]);
    let changes = records.flat_map(|record| projection.apply(&record));
    let written: BTreeSet<&str> = changes.map(|change| change.model).collect();
    for model in ReadModel::ALL {
        let name = model.name();
        assert!(written.contains(name), "nothing writes rows of `{name}`");
        assert_eq!(ReadModel::of_name(name), Some(*model));
    }
    assert_eq!(written.len(), MODELS.len());
}

#[test]
fn the_usage_of_an_endpoint_matches_its_golden_file() {
    let mut state = EndpointUsage::default();
    for record in log() {
        state.apply(&record);
    }
    compare("usage", USAGE_VERSION, &state);
}

#[test]
fn the_ready_counts_of_an_endpoint_match_their_golden_file() {
    let (mut state, mut changes) = (ReadyCounts::default(), Vec::new());
    for record in log() {
        changes.extend(state.apply(&record).into_iter().map(|(_, count)| count));
    }
    assert_eq!(changes, [0, 1, 0]);
    compare("ready", READY_VERSION, &state);
}

proptest! {
    /// Pairs of an event and the instance that it is about.
    #[test]
    fn ready_counts_agree_with_the_full_instance_state(
        events in prop::collection::vec((0usize..8, 0u64..3), 0..60),
    ) {
        let names = [
            "instance.requested.v1", "instance.started.v1", "instance.ready.v1", "instance.ready.v1",
            "instance.unready.v1", "instance.draining.v1", "instance.failed.v1", "instance.stopped.v1",
        ];
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../contract/tests/golden/events");
        let (mut whole, mut ready) = (Instances::default(), ReadyCounts::default());
        let mut count = 0;
        for ((event, id), position) in events.into_iter().zip(1..) {
            let (type_name, version) = names[event].rsplit_once(".v").unwrap();
            let text = std::fs::read_to_string(folder.join(format!("{}.json", names[event]))).unwrap();
            let mut data: serde_json::Value = serde_json::from_str(&text).unwrap();
            data["id"] = format!("iris-blue-{id}").into();
            let record = Record {
                event: Event::decode(type_name, version.parse().unwrap(), &data.to_string()).unwrap(),
                position: Position(position),
                ..log().remove(6)
            };
            whole.apply(&record);
            for (_, now) in ready.apply(&record) {
                count = now;
            }
            let expected = whole.instances.values().filter(|instance| instance.is_ready()).count();
            prop_assert_eq!(count as usize, expected, "after {} of {}", type_name, id);
        }
    }
}
