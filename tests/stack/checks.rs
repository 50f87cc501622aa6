//! What must hold after every round of faults.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Role};
use crate::support::PATIENCE;

/// How long it may take until everything is as it should be again: the bar of `make faults`, and
/// PATIENCE where no time is measured.
fn convergence_max() -> Duration {
    let seconds = std::env::var("CONVERGENCE_SECONDS").ok();
    seconds.map_or(PATIENCE, |text| Duration::from_secs(text.parse().unwrap()))
}

/// Waits until the cluster is whole again: every process ready, every brain accepts and shows a write,
/// and as many instances run as were asked for, each in one process. Returns how long it took.
pub async fn converged(cluster: &Cluster, since: Instant, instances: usize) -> Duration {
    let max = convergence_max();
    loop {
        let missing = missing(cluster, instances).await;
        if missing.is_empty() {
            return since.elapsed();
        }
        assert!(
            since.elapsed() < max,
            "not whole {max:?} after the last fault: {missing:?}\n{}",
            cluster.logs()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn missing(cluster: &Cluster, instances: usize) -> Vec<String> {
    let mut missing = Vec::new();
    for process in &cluster.processes {
        let admin = process.addresses().admin.unwrap();
        let ready = cluster.http.get(format!("{admin}/readyz")).send().await;
        match ready {
            Ok(response) if response.status().is_success() => {}
            Ok(response) => missing.push(format!(
                "{}: {}",
                process.name,
                response.text().await.unwrap_or_default()
            )),
            Err(error) => missing.push(format!("{}: {error}", process.name)),
        }
    }
    if !missing.is_empty() {
        return missing;
    }
    for brain in cluster.of(Role::Brain) {
        let path = "/v1/instances?endpoint=iris&limit=500";
        let answer = cluster.api(brain, Method::GET, path).send().await;
        let Ok(answer) = answer else {
            missing.push(format!("{} does not answer", brain.name));
            continue;
        };
        let list: Value = answer.json().await.unwrap_or_default();
        let states = |state: &str| {
            let items = list["items"].as_array();
            items.map_or(0, |items| {
                items.iter().filter(|i| i["state"] == state).count()
            })
        };
        if (states("ready"), states("starting"), states("draining")) != (instances, 0, 0) {
            missing.push(format!(
                "{} shows {} ready, {} starting, {} draining of {instances}",
                brain.name,
                states("ready"),
                states("starting"),
                states("draining")
            ));
        }
    }
    let processes: usize = cluster.instance_processes().values().map(Vec::len).sum();
    if processes != instances {
        missing.push(format!("{processes} processes for {instances} instances"));
    }
    missing
}

/// All that was promised, and nothing twice.
pub async fn nothing_lost_or_doubled(cluster: &Cluster, acknowledged: &BTreeMap<u64, u64>) {
    let events = cluster.events().await;
    every_acknowledged_write_is_there(&events, acknowledged);
    no_effect_happened_twice(&events);
    for brain in cluster.of(Role::Brain) {
        let request = cluster.api(brain, Method::GET, "/v1/events/verify");
        // It reads the whole log.
        let answer = request.timeout(Duration::from_secs(120)).send().await;
        let answer = answer.unwrap_or_else(|error| panic!("{error:?}\n{}", cluster.logs()));
        let report: Value = answer.json().await.unwrap();
        assert_eq!(report["problems"], json!([]), "{}: {report:#}", brain.name);
    }
    let brain = cluster.get("brain-1");
    let request = cluster.api(brain, Method::POST, "/v1/events/replay");
    let request = request.json(&json!({"checkDecisions": true}));
    let answer = request.timeout(Duration::from_secs(120)).send().await;
    let replay: Value = answer.unwrap().json().await.unwrap();
    assert_eq!(replay["differing"], json!([]), "{replay:#}");
}

fn every_acknowledged_write_is_there(events: &[Value], acknowledged: &BTreeMap<u64, u64>) {
    let written: BTreeMap<u64, u64> = events
        .iter()
        .filter(|event| event["type"] == "endpoint.updated" || event["type"] == "endpoint.created")
        .filter_map(|event| {
            let label = event["data"]["labels"]["write"].as_str()?;
            Some((event["position"].as_u64()?, label.parse().ok()?))
        })
        .collect();
    for (position, label) in acknowledged {
        assert_eq!(
            written.get(position),
            Some(label),
            "acknowledged at {position}"
        );
    }
}

/// An instance is started once, an order is given once, and a decision for so many more instances
/// leads to no more scale-outs than that.
fn no_effect_happened_twice(events: &[Value]) {
    let mut started = BTreeSet::new();
    let mut requested = BTreeSet::new();
    let mut removed = BTreeSet::new();
    let mut asked: BTreeMap<&str, u64> = BTreeMap::new();
    let mut added: BTreeMap<&str, u64> = BTreeMap::new();
    for event in events {
        let data = &event["data"];
        let id = || data["id"].as_str().unwrap();
        match event["type"].as_str().unwrap() {
            "instance.started" if data["adopted"] == false => {
                assert!(started.insert(id()), "started twice: {event:#}");
            }
            "instance.requested" => {
                assert!(requested.insert(id()), "requested twice: {event:#}");
                if data["reason"] == "scale-out" {
                    *asked.entry(data["decision"].as_str().unwrap()).or_default() += 1;
                }
            }
            "instance.removal-requested" => {
                assert!(removed.insert(id()), "removed twice: {event:#}");
            }
            "scaling.decided" => {
                let count = |field: &str| data[field].as_u64().unwrap();
                let more = count("granted").saturating_sub(count("from"));
                added.insert(event["id"].as_str().unwrap(), more);
            }
            _ => {}
        }
    }
    for (decision, count) in asked {
        assert!(count <= added[decision], "{decision} was carried out twice");
    }
}
