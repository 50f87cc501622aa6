//! What must hold after every round of faults.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use contract::time::{Span, Timestamp};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Process, Role};
use crate::support::{PATIENCE, endpoint_document};
use crate::workload::Workload;

/// How long it may take until everything is as it should be again: the bar of `make faults`, and
/// PATIENCE where no time is measured.
fn convergence_max() -> Duration {
    let seconds = std::env::var("CONVERGENCE_SECONDS").ok();
    seconds.map_or(PATIENCE, |text| Duration::from_secs(text.parse().unwrap()))
}

/// Whoever waited longer than this is told for what.
const WORTH_A_WORD: Duration = Duration::from_secs(5);

/// Waits until the cluster is whole again: every process is ready, as many instances run as were asked
/// for, each in the one process that the API names, no consumer has parked an endpoint, and what is
/// written through each control is shown by all of them. Returns how long it took.
pub async fn converged(cluster: &Cluster, since: Instant, instances: usize) -> Duration {
    let max = convergence_max();
    let mut last = Vec::new();
    loop {
        let missing = missing(cluster, instances).await;
        let took = since.elapsed();
        assert!(
            took < max,
            "not whole {max:?} after the last fault: {missing:?}, before that {last:?}\n{}",
            cluster.logs()
        );
        if missing.is_empty() {
            if took > WORTH_A_WORD {
                println!("  missing to the last: {}", last.join("; "));
            }
            return took;
        }
        last = missing;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What the cluster lacks, of the first kind of thing that it lacks.
async fn missing(cluster: &Cluster, instances: usize) -> Vec<String> {
    let not_ready = not_ready(cluster).await;
    if !not_ready.is_empty() {
        return not_ready;
    }
    let mut missing = Vec::new();
    for control in cluster.controls() {
        missing.extend(instances_are(cluster, control, instances).await.err());
        missing.extend(none_parked(cluster, control).await.err());
    }
    if !missing.is_empty() {
        return missing;
    }
    for writer in cluster.controls() {
        missing.extend(a_write_is_shown(cluster, writer).await.err());
    }
    missing
}

async fn not_ready(cluster: &Cluster) -> Vec<String> {
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
    missing
}

/// As one control answers; what is no answer is told.
async fn answer(control: &Process, request: RequestBuilder) -> Result<(Value, u64), String> {
    let told = |error: reqwest::Error| format!("{}: {error}", control.name);
    let response = request.send().await.map_err(told)?;
    let position = response.headers().get("penstock-position");
    let position = position.and_then(|value| value.to_str().ok()?.parse().ok());
    let (status, url) = (response.status(), response.url().clone());
    let text = response.text().await.map_err(told)?;
    match serde_json::from_str(&text) {
        Ok(value) if status.is_success() => Ok((value, position.unwrap_or_default())),
        _ => Err(format!("{}: {url} answered {status}: {text}", control.name)),
    }
}

async fn instances_are(
    cluster: &Cluster,
    control: &Process,
    instances: usize,
) -> Result<(), String> {
    let path = "/v1/instances?endpoint=iris&limit=500";
    let (list, _) = answer(control, cluster.api(control, Method::GET, path)).await?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let of = |state: &str| items.iter().filter(|item| item["state"] == state).count();
    let shown = (of("ready"), of("starting"), of("draining"));
    if shown != (instances, 0, 0) {
        let (ready, starting, draining) = shown;
        return Err(format!(
            "{} shows {ready} ready, {starting} starting, {draining} draining of {instances}",
            control.name
        ));
    }
    let ready = items.iter().filter(|item| item["state"] == "ready");
    let named: Vec<_> = ready.map(|item| item["pid"].as_u64()).collect();
    let running = cluster.instance_processes().into_values().flatten();
    let running: BTreeSet<_> = running.map(u64::from).collect();
    let known: BTreeSet<_> = named.iter().copied().flatten().collect();
    if named.len() != known.len() || known != running {
        return Err(format!(
            "{} names the processes {named:?}, and {running:?} run",
            control.name
        ));
    }
    Ok(())
}

async fn none_parked(cluster: &Cluster, control: &Process) -> Result<(), String> {
    let request = cluster.api(control, Method::GET, "/v1/events/parked");
    let (parked, _) = answer(control, request).await?;
    if parked["items"] != json!([]) {
        return Err(format!(
            "{} says that there is parked: {parked}",
            control.name
        ));
    }
    Ok(())
}

/// Through one control, and then read at its position from each, also the one that wrote.
async fn a_write_is_shown(cluster: &Cluster, writer: &Process) -> Result<(), String> {
    const PATH: &str = "/v1/endpoints/iris";
    let mut document = endpoint_document("iris");
    let mark = uuid::Uuid::new_v4().to_string();
    document["metadata"]["labels"] = json!({"mark": mark});
    let request = cluster.api(writer, Method::PUT, PATH).json(&document);
    let (_, position) = answer(writer, request).await?;
    for reader in cluster.controls() {
        let request = cluster.api(reader, Method::GET, PATH);
        let request = request.header("penstock-position", position);
        let (shown, _) = answer(reader, request).await?;
        let shown = &shown["metadata"]["labels"]["mark"];
        if *shown != mark {
            return Err(format!(
                "{} wrote {mark} at {position}, and {} shows {shown}",
                writer.name, reader.name
            ));
        }
    }
    Ok(())
}

/// A pin is decided about and carried out: the autoscaler that owns the endpoint goes on, and so do
/// the planner and the nodes. The count must not be the one that is.
pub async fn goes_on(cluster: &Cluster, instances: usize) {
    let newest = || async {
        let path = "/v1/decisions?endpoint=iris&deployment=blue&limit=1";
        cluster.read(path).await["items"][0].clone()
    };
    let before = newest().await;
    assert_ne!(before["granted"], instances, "nothing is to be decided");
    pin(cluster, instances).await;
    converged(cluster, Instant::now(), instances).await;
    let after = newest().await;
    assert_eq!(after["granted"], instances, "{after:#}");
    assert_ne!(after["id"], before["id"]);
}

pub async fn pin(cluster: &Cluster, instances: usize) {
    let body = json!({"instances": instances});
    cluster.put("/v1/autoscale/iris/blue/pin", &body).await;
}

/// All that was promised, and nothing twice.
pub async fn nothing_lost_or_doubled(cluster: &Cluster, workload: &Workload) {
    // What was promised before the log is read is in it; what happened by then was asked for by now.
    let promised = workload.promised();
    let events = cluster.events().await;
    let sent = workload.record.lock().unwrap().sent;
    let keyed_since = workload.record.lock().unwrap().keyed.clone();
    every_acknowledged_write_is_there(&events, &promised.acknowledged);
    no_effect_happened_twice(&events);
    nothing_was_metered_twice(&events, sent);
    let rotated = rotated(&events);
    assert!(promised.keyed.is_subset(&rotated), "a write is lost");
    // Each writer waits for the answer to one at most.
    let waiting = rotated.difference(&keyed_since).count();
    assert!(
        waiting <= cluster.of(Role::Brain).count(),
        "{waiting} writes happened that nobody was told of"
    );
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

/// When every write with an `Idempotency-Key` has been acknowledged: the log has each once.
pub async fn every_keyed_write_happened_once(cluster: &Cluster, keyed: &BTreeSet<u64>) {
    assert!(!keyed.is_empty());
    assert_eq!(rotated(&cluster.events().await), *keyed);
}

/// Where the writes with an `Idempotency-Key` stand in the log.
fn rotated(events: &[Value]) -> BTreeSet<u64> {
    let rotated = events.iter().filter(|event| {
        event["type"] == "endpoint.key-regenerated" && event["stream"] == "endpoint/default/notes"
    });
    rotated
        .map(|event| event["position"].as_u64().unwrap())
        .collect()
}

/// A minute of a deployment is closed once, a frame is counted once for a deployment, and no more
/// requests are told than were sent. (Fewer may be: a gateway that is killed takes its last frame with
/// it, and the newest minutes are open.)
/// Returns how many are told.
fn nothing_was_metered_twice(events: &[Value], sent: u64) -> u64 {
    let mut closed = BTreeSet::new();
    let mut counted: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    let mut told = 0;
    for event in events {
        let (kind, data) = (event["type"].as_str().unwrap(), &event["data"]);
        if !matches!(kind, "usage.closed" | "usage.corrected") {
            continue;
        }
        let deployment = data["deploymentUid"].to_string();
        if kind == "usage.closed" {
            let first: Timestamp = data["minute"].as_str().unwrap().parse().unwrap();
            for minute in 0..data["minutes"].as_u64().unwrap_or(1) {
                let minute = first + Span::from_secs(60 * minute);
                let new = closed.insert((deployment.clone(), minute));
                assert!(new, "closed twice: {event:#}");
            }
        }
        for range in data["counted"].as_array().unwrap() {
            let of = format!("{deployment} {} {}", range["source"], range["boot"]);
            let (first, last) = (range["first"].as_u64(), range["last"].as_u64());
            let counted = counted.entry(of).or_default();
            for sequence in first.unwrap()..=last.unwrap() {
                assert!(
                    counted.insert(sequence),
                    "frame {sequence} was counted before: {event:#}"
                );
            }
        }
        for slice in data["slices"].as_array().unwrap() {
            let arrivals = slice.pointer("/byRole/live/arrivals");
            told += arrivals.map_or(0, |arrivals| arrivals.as_u64().unwrap());
        }
    }
    assert!(
        told <= sent,
        "{told} requests are told, and {sent} were sent"
    );
    told
}

/// Requests are told in closed minutes: the checks of usage have something to look at. Waits for the
/// first minute to close.
pub async fn something_was_metered(cluster: &Cluster, workload: &Workload) {
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        // What is told was sent before.
        let events = cluster.events().await;
        let sent = workload.record.lock().unwrap().sent;
        if nothing_was_metered_twice(&events, sent) > 0 {
            return;
        }
        assert!(Instant::now() < deadline, "no usage:\n{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(200)).await;
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
