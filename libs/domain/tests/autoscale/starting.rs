//! Instances that start: what they use before they serve is no load.

use contract::frame::{DeploymentFrame, InstanceFrame, SourceKind};
use serde_json::{Value, json};

use crate::harness::{Scaler, deployment_frame, document};

/// A policy that tracks 50 % CPU over three seconds.
fn tracking(more: Value) -> Value {
    let rules = json!([{
        "name": "follow", "metric": {"name": "cpu_utilization", "window": "3s"},
        "track": {"target": 50, "tolerance": "10%"},
    }]);
    document(rules, more)
}

/// An instance that used this share of a core, and for how long it has been ready.
type Usage = (u64, Option<u64>);

/// Runs a second for each list of instances, and returns the counts granted.
fn counts(document: &Value, instances: u32, seconds: &[Vec<Usage>]) -> Vec<u32> {
    let mut scaler = Scaler::new(document, instances);
    let grant = |usages: &Vec<Usage>| {
        let of = |(index, (percent, ready_for)): (usize, &Usage)| InstanceFrame {
            cpu_us: Some(percent * 10_000),
            ready_for_us: ready_for.map(|seconds| seconds * 1_000_000),
            ..InstanceFrame::new(format!("iris-blue-{index}").into())
        };
        let sent = DeploymentFrame {
            instances: usages.iter().enumerate().map(of).collect(),
            ..deployment_frame()
        };
        let ready = usages.iter().filter(|(_, ready)| ready.is_some()).count();
        scaler.receive(SourceKind::NODE, vec![sent]);
        scaler.decide(ready as u32).granted
    };
    seconds.iter().map(grant).collect()
}

#[test]
fn the_cpu_of_a_start_does_not_scale_out() {
    let starting = vec![vec![(100, None)]; 20];
    let idle = (1..10).map(|age| vec![(1, Some(age))]);
    let seconds: Vec<_> = starting.into_iter().chain(idle).collect();
    let granted = counts(&tracking(json!({})), 1, &seconds);
    assert_eq!(granted, vec![1; seconds.len()]);
}

#[test]
fn an_instance_that_starts_idly_does_not_take_its_own_scale_out_back() {
    let alone = vec![vec![(80, Some(60))]; 4];
    let starting = vec![vec![(80, Some(60)), (0, None)]; 20];
    let shared = (0..10).map(|age| vec![(40, Some(80)), (40, Some(age))]);
    let seconds: Vec<_> = alone.into_iter().chain(starting).chain(shared).collect();
    let granted = counts(&tracking(json!({})), 1, &seconds);
    let first = granted.iter().position(|count| *count == 2).unwrap();
    assert!(
        granted[first..].iter().all(|count| *count == 2),
        "{granted:?}"
    );
}

#[test]
fn an_instance_that_warms_up_is_neither_load_nor_idle() {
    let document = tracking(json!({"initializationPeriod": "10s"}));
    // While it warms up it burns a whole core; then both share the load.
    let warming = (0..=10).map(|age| vec![(90, Some(60)), (100, Some(age))]);
    let shared = (11..20).map(|age| vec![(45, Some(80)), (45, Some(age))]);
    let seconds: Vec<_> = warming.chain(shared).collect();
    assert_eq!(counts(&document, 2, &seconds), vec![2; seconds.len()]);
}

#[test]
fn the_total_is_of_the_instances_that_were_measured() {
    // 2 of 4 ready ones are measured, at 45 %: a load of 1.8 for scaling out, of 3.6 for scaling in.
    let document = tracking(json!({"initializationPeriod": "1m"}));
    let seconds = vec![vec![(45, Some(70)), (45, Some(70)), (99, Some(2)), (99, Some(2))]; 6];
    assert_eq!(counts(&document, 4, &seconds), vec![4; 6]);
}
