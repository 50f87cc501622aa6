//! Addition and cancellation of usage.

#![allow(clippy::unwrap_used)]

use contract::events::{DecodeError, Event};
use contract::frame::Outcomes;
use contract::time::Timestamp;
use contract::usage::{UsageMinute, UsageSlice};
use serde_json::{Map, Value, json};

/// Builds a value that matches a schema, with every number set and one entry in each map.
fn full(schema: &Value, root: &Value) -> Value {
    if let Some(name) = schema["$ref"].as_str() {
        return full(&root["$defs"][name.trim_start_matches("#/$defs/")], root);
    }
    if schema["type"] == "integer" {
        return json!(7);
    }
    let entry = |pattern: &str| match pattern {
        "^[a-z0-9-]{1,32}$" => "live",
        "^[a-z0-9_]{1,32}$" => "latency",
        "^\\d+$" => "300000",
        other => panic!("no example for pattern {other}"),
    };
    let mut object = Map::new();
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        object.insert(name.clone(), full(schema, root));
    }
    for (pattern, schema) in schema["patternProperties"]
        .as_object()
        .into_iter()
        .flatten()
    {
        object.insert(entry(pattern).to_owned(), full(schema, root));
    }
    if schema["additionalProperties"].is_object() {
        let schema = &schema["additionalProperties"];
        object.insert("iris-1".to_owned(), full(schema, root));
    }
    assert!(!object.is_empty(), "{schema}");
    Value::Object(object)
}

/// Doubles each sum in a value, and keeps each maximum.
fn doubled(name: &str, value: &Value) -> Value {
    match value {
        Value::Number(number) if !name.ends_with("Max") => json!(2 * number.as_u64().unwrap()),
        Value::Object(object) => {
            let each = object
                .iter()
                .map(|(name, value)| (name.clone(), doubled(name, value)));
            each.collect()
        }
        other => other.clone(),
    }
}

#[test]
fn every_field_of_a_slice_is_added_and_cancelled() {
    let schema = schemars::schema_for!(UsageSlice).to_value();
    let json = full(&schema, &schema);
    let one: UsageSlice = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(
        serde_json::to_value(&one).unwrap(),
        json,
        "every field is serialized"
    );

    let mut two = one.clone();
    two.add(&one);
    assert_eq!(serde_json::to_value(&two).unwrap(), doubled("", &json));

    let mut reported = one.clone();
    two.cancel(&mut reported);
    let mut sums = one.clone();
    // A reported maximum is not reported again.
    for usage in sums.by_instance.values_mut() {
        (usage.memory_bytes_max, usage.gpu_memory_bytes_max) = (0, 0);
    }
    for counts in sums.by_role.values_mut() {
        counts.oldest_in_flight_us_max = 0;
    }
    assert_eq!(two, sums);
    two.cancel(&mut one.clone());
    assert!(two.is_empty(), "{two:?}");
}

#[test]
fn usage_reported_in_excess_is_carried_over() {
    let schema = schemars::schema_for!(UsageSlice).to_value();
    let one: UsageSlice = serde_json::from_value(full(&schema, &schema)).unwrap();
    let mut reported = one.clone();
    reported.add(&one);
    let mut ours = one.clone();
    ours.cancel(&mut reported);
    assert!(ours.is_empty());
    let mut second = one.clone();
    second.cancel(&mut reported);
    assert!(
        second.is_empty(),
        "the rest is cancelled against the second"
    );
}

#[test]
fn refusals_for_lack_of_capacity_are_separate_from_those_because_of_the_client() {
    let outcomes = Outcomes {
        success: 10,
        model_server_error: 1,
        unavailable: 2,
        too_many_pending: 3,
        hold_full: 4,
        hold_expired: 5,
        refused: 100,
        client_left: 1000,
        ..Outcomes::default()
    };
    // `refused_ratio` is the first divided by the second.
    assert_eq!(
        (outcomes.refused_for_capacity(), outcomes.counted()),
        (14, 25)
    );
    assert_eq!((outcomes.bad(), outcomes.total()), (15, 1125));
}

fn golden(type_name: &str, version: u32) -> String {
    let folder = env!("CARGO_MANIFEST_DIR");
    let path = format!("{folder}/tests/golden/events/{type_name}.v{version}.json");
    std::fs::read_to_string(path).unwrap()
}

fn usage_of(event: Event) -> UsageMinute {
    match event {
        Event::UsageClosed(usage) | Event::UsageCorrected(usage) => usage,
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_usage_that_ended_by_then_is_decoded_without_its_slices() {
    for (name, version) in [
        ("usage.closed", 1),
        ("usage.closed", 2),
        ("usage.corrected", 1),
        ("usage.corrected", 2),
    ] {
        let data = golden(name, version);
        let complete = Event::decode(name, version, &data).unwrap();
        let end = usage_of(complete.clone()).end();
        let since = |from| Event::decode_since(name, version, &data, from).unwrap();
        let just_before = Timestamp::from_millis(end.millis() - 1);
        for from in [Timestamp::MIN, just_before] {
            assert_eq!(since(from), complete, "{name} {version} {from}");
        }
        for from in [end, Timestamp::MAX] {
            let outline = since(from);
            assert_eq!(outline.type_name(), name);
            let outline = usage_of(outline);
            assert!(outline.slices.is_empty());
            let rest = UsageMinute {
                slices: usage_of(complete.clone()).slices,
                ..outline
            };
            assert_eq!(rest, usage_of(complete.clone()), "{name} {version} {from}");
        }
    }
}

#[test]
fn other_events_are_complete_whatever_the_time() {
    let data = golden("usage.gap", 1);
    let gap = Event::decode("usage.gap", 1, &data).unwrap();
    let since = Event::decode_since("usage.gap", 1, &data, Timestamp::MAX);
    assert_eq!(since.unwrap(), gap);
}

#[test]
fn usage_that_cannot_be_read_is_refused_without_its_slices_too() {
    let data = golden("usage.closed", 2);
    let newer = Event::decode_since("usage.closed", 3, &data, Timestamp::MAX);
    assert!(matches!(
        newer,
        Err(DecodeError::Unknown { version: 3, .. })
    ));
    for damaged in [data.replace("counted", "counts"), data.replace('[', "")] {
        let refused = Event::decode_since("usage.closed", 2, &damaged, Timestamp::MAX);
        assert!(
            matches!(refused, Err(DecodeError::Data { .. })),
            "{damaged}"
        );
    }
}
