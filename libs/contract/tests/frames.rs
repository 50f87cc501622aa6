//! Frames of one release read by another: each is read according to its version, or not at all.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use contract::frame::{
    DEFINITIONS, DeploymentFrame, FRAME_VERSION, Frame, FrameError, InstanceFrame, Measure, Role,
};
use contract::ids::{EndpointKey, Name, Uid};
use serde::Deserialize;
use serde_json::{Value, json};

/// A frame written by version 1.
const VERSION_1: &str = include_str!("golden/frames/frame.v1.json");
/// The same second written by version 2, before frames named their definitions.
const VERSION_2: &str = include_str!("golden/frames/frame.v2.json");
/// The same second of a node, by the first definitions.
const DEFINITIONS_1: &str = include_str!("golden/frames/frame.v2.definitions-1.json");

fn decode(text: &str) -> Result<Frame, FrameError> {
    Frame::decode(text.as_bytes())
}

fn value(frame: &Frame) -> Value {
    serde_json::from_str(&frame.encode().unwrap()).unwrap()
}

fn modified(text: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut value: Value = serde_json::from_str(text).unwrap();
    change(&mut value);
    value.to_string()
}

#[test]
fn a_frame_is_written_as_in_its_golden_file() {
    for text in [VERSION_2, DEFINITIONS_1] {
        let frame = decode(text).unwrap();
        let golden: Value = serde_json::from_str(text).unwrap();
        assert_eq!(value(&frame), golden);
        assert_eq!(golden["version"], FRAME_VERSION);
    }
}

#[test]
fn a_frame_names_the_definitions_that_it_was_measured_by() {
    let definitions = |text| decode(text).unwrap().deployments[0].definitions;
    assert_eq!((definitions(VERSION_2), definitions(DEFINITIONS_1)), (0, 1));
    assert_eq!(definitions(DEFINITIONS_1), DEFINITIONS);
}

#[test]
fn a_frame_of_version_1_is_read_with_all_its_counts() {
    let old = decode(VERSION_1).unwrap();
    let part = &old.deployments[0];
    let latency = BTreeMap::from([(300_000, 5)]);
    assert_eq!(
        part.at_or_below,
        BTreeMap::from([(Measure::LATENCY, latency)])
    );
    // The fields that version 2 adds are empty; all others are the same.
    let mut new = decode(VERSION_2).unwrap();
    let added = &mut new.deployments[0];
    added.status_classes = Default::default();
    added.oldest_in_flight_us = 0;
    added.tokens = None;
    for instance in &mut added.instances {
        instance.in_flight_us.clear();
        (instance.gpu_us, instance.gpu_memory_bytes) = (None, None);
    }
    assert_eq!(old, new);
}

#[test]
fn a_version_1_deployment_without_thresholds_has_none() {
    let text = modified(VERSION_1, |frame| {
        frame["deployments"][0]["atOrBelow"] = json!({});
    });
    assert!(decode(&text).unwrap().deployments[0].at_or_below.is_empty());
}

#[test]
fn a_frame_of_a_newer_version_is_identified_but_not_read() {
    let text = modified(VERSION_2, |frame| {
        frame["version"] = json!(FRAME_VERSION + 1);
        frame["deployments"] = json!({"of": "another shape"});
    });
    let Err(FrameError::Unreadable { head, source }) = decode(&text) else {
        panic!("the frame was read")
    };
    assert_eq!((head.sequence, head.version), (17, FRAME_VERSION + 1));
    assert_eq!(head.source.id, "gateway-1");
    assert!(source.to_string().contains("newer release"), "{source}");
}

#[test]
fn a_malformed_frame_is_identified_too() {
    let text = modified(VERSION_2, |frame| {
        frame["deployments"][0]["role"] = json!("No Role");
    });
    let error = decode(&text).unwrap_err();
    assert!(matches!(error, FrameError::Unreadable { .. }));
    let sentence = error.to_string();
    assert!(sentence.contains("frame 17 of gateway-1"), "{sentence}");
    assert!(sentence.contains("`No Role` is not a role"), "{sentence}");
}

#[test]
fn other_data_is_not_a_frame() {
    assert!(matches!(decode("{}"), Err(FrameError::NotAFrame(_))));
}

/// The fields that readers of version 1 require.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FrameV1 {
    deployments: Vec<DeploymentV1>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DeploymentV1 {
    #[expect(dead_code, reason = "only its presence matters")]
    at_or_below: BTreeMap<u64, u64>,
}

#[test]
fn a_reader_of_version_1_rejects_deployments_and_accepts_a_frame_without_any() {
    let read = |frame: &Frame| serde_json::from_str::<FrameV1>(&frame.encode().unwrap());
    let mut frame = decode(VERSION_2).unwrap();
    assert!(read(&frame).is_err());
    let endpoint = EndpointKey::new(&"iris".parse().unwrap());
    let name: Name = "blue".parse().unwrap();
    let mut node = DeploymentFrame::new(endpoint, name, Uid(Default::default()), Role::LIVE);
    let instance = InstanceFrame {
        cpu_us: Some(1),
        ..InstanceFrame::new("iris-1".to_owned().into())
    };
    node.instances.push(instance);
    frame.deployments = vec![node];
    assert!(read(&frame).is_err());
    frame.deployments.clear();
    assert!(read(&frame).unwrap().deployments.is_empty());
    // A frame of version 1 is accepted.
    assert_eq!(
        serde_json::from_str::<FrameV1>(VERSION_1)
            .unwrap()
            .deployments
            .len(),
        1
    );
}
