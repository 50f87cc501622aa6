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

/// Maximum time to converge: the limit set by `make faults`, else `PATIENCE`.
fn convergence_max() -> Duration {
    let seconds = std::env::var("CONVERGENCE_SECONDS").ok();
    seconds.map_or(PATIENCE, |text| Duration::from_secs(text.parse().unwrap()))
}

/// If convergence takes longer than this, the last problems are printed.
const SLOW: Duration = Duration::from_secs(5);

/// Waits until the cluster has converged: every process is ready, the requested number of instances run,
/// each in the one process that the API names, no consumer has parked an endpoint, and writes through each
/// control are visible in all of them. Returns how long it took.
pub async fn wait_until_converged(cluster: &Cluster, since: Instant, instances: usize) -> Duration {
    let max = convergence_max();
    let mut last = Vec::new();
    loop {
        let problems = problems(cluster, instances).await;
        let elapsed = since.elapsed();
        assert!(
            elapsed < max,
            "not converged {max:?} after the last fault: {problems:?}, before that {last:?}\n{}",
            cluster.logs()
        );
        if problems.is_empty() {
            if elapsed > SLOW {
                println!("  last problems: {}", last.join("; "));
            }
            return elapsed;
        }
        last = problems;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The current problems, of the first category that has any.
async fn problems(cluster: &Cluster, instances: usize) -> Vec<String> {
    let not_ready = not_ready(cluster).await;
    if !not_ready.is_empty() {
        return not_ready;
    }
    let mut problems = Vec::new();
    for control in cluster.controls() {
        problems.extend(check_instances(cluster, control, instances).await.err());
        problems.extend(check_none_parked(cluster, control).await.err());
    }
    if !problems.is_empty() {
        return problems;
    }
    for writer in cluster.controls() {
        problems.extend(check_write_is_visible(cluster, writer).await.err());
    }
    problems
}

async fn not_ready(cluster: &Cluster) -> Vec<String> {
    let mut problems = Vec::new();
    for process in &cluster.processes {
        let admin = process.addresses().admin.unwrap();
        let ready = cluster.http.get(format!("{admin}/readyz")).send().await;
        match ready {
            Ok(response) if response.status().is_success() => {}
            Ok(response) => problems.push(format!(
                "{}: {}",
                process.name,
                response.text().await.unwrap_or_default()
            )),
            Err(error) => problems.push(format!("{}: {error}", process.name)),
        }
    }
    problems
}

/// Sends a request; returns the body and the position, or a description of the error.
async fn send(control: &Process, request: RequestBuilder) -> Result<(Value, u64), String> {
    let describe = |error: reqwest::Error| format!("{}: {error}", control.name);
    let response = request.send().await.map_err(describe)?;
    let position = response.headers().get("penstock-position");
    let position = position.and_then(|value| value.to_str().ok()?.parse().ok());
    let (status, url) = (response.status(), response.url().clone());
    let text = response.text().await.map_err(describe)?;
    match serde_json::from_str(&text) {
        Ok(value) if status.is_success() => Ok((value, position.unwrap_or_default())),
        _ => Err(format!("{}: {url} answered {status}: {text}", control.name)),
    }
}

async fn check_instances(
    cluster: &Cluster,
    control: &Process,
    instances: usize,
) -> Result<(), String> {
    let path = "/v1/instances?endpoint=iris&limit=500";
    let (list, _) = send(control, cluster.api(control, Method::GET, path)).await?;
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

async fn check_none_parked(cluster: &Cluster, control: &Process) -> Result<(), String> {
    let request = cluster.api(control, Method::GET, "/v1/events/parked");
    let (parked, _) = send(control, request).await?;
    if parked["items"] != json!([]) {
        return Err(format!("{} lists parked endpoints: {parked}", control.name));
    }
    Ok(())
}

/// Writes through one control, and reads at that position from each, including the writer.
async fn check_write_is_visible(cluster: &Cluster, writer: &Process) -> Result<(), String> {
    const PATH: &str = "/v1/endpoints/iris";
    let mut document = endpoint_document("iris");
    let mark = uuid::Uuid::new_v4().to_string();
    document["metadata"]["labels"] = json!({"mark": mark});
    let request = cluster.api(writer, Method::PUT, PATH).json(&document);
    let (_, position) = send(writer, request).await?;
    for reader in cluster.controls() {
        let request = cluster.api(reader, Method::GET, PATH);
        let request = request.header("penstock-position", position);
        let (shown, _) = send(reader, request).await?;
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

/// Asserts that a pin is decided and carried out: the autoscaler that owns the endpoint works, and so do
/// the planner and the nodes. `instances` must differ from the current count.
pub async fn assert_scaling_works(cluster: &Cluster, instances: usize) {
    let newest = || async {
        let path = "/v1/decisions?endpoint=iris&deployment=blue&limit=1";
        cluster.read(path).await["items"][0].clone()
    };
    let before = newest().await;
    assert_ne!(before["granted"], instances, "there is nothing to decide");
    pin(cluster, instances).await;
    wait_until_converged(cluster, Instant::now(), instances).await;
    let after = newest().await;
    assert_eq!(after["granted"], instances, "{after:#}");
    assert_ne!(after["id"], before["id"]);
}

pub async fn pin(cluster: &Cluster, instances: usize) {
    let body = json!({"instances": instances});
    cluster.put("/v1/autoscale/iris/blue/pin", &body).await;
}

/// Asserts that every acknowledged write exists, and no effect happened twice.
pub async fn assert_nothing_lost_or_duplicated(cluster: &Cluster, workload: &Workload) {
    // Taken before the log is read, so all of it must be there; `sent` is taken after, so it is an upper bound.
    let summary = workload.summary();
    let events = cluster.events().await;
    let sent = workload.record.lock().unwrap().sent;
    let keyed_since = workload.record.lock().unwrap().keyed.clone();
    assert_acknowledged_writes_exist(&events, &summary.acknowledged);
    assert_no_duplicate_effects(&events);
    assert_usage_counted_once(&events, sent);
    let key_rotations = key_rotations(&events);
    assert!(summary.keyed.is_subset(&key_rotations), "a write is lost");
    // Each writer has at most one request in flight.
    let waiting = key_rotations.difference(&keyed_since).count();
    assert!(
        waiting <= cluster.of(Role::ControlPlane).count(),
        "{waiting} writes happened without being acknowledged"
    );
    for control_plane in cluster.of(Role::ControlPlane) {
        let request = cluster.api(control_plane, Method::GET, "/v1/events/verify");
        // Reads the whole log.
        let response = request.timeout(Duration::from_secs(120)).send().await;
        let response = response.unwrap_or_else(|error| panic!("{error:?}\n{}", cluster.logs()));
        let report: Value = response.json().await.unwrap();
        assert_eq!(
            report["problems"],
            json!([]),
            "{}: {report:#}",
            control_plane.name
        );
    }
    let control_plane = cluster.get("control-1");
    let request = cluster.api(control_plane, Method::POST, "/v1/events/replay");
    let request = request.json(&json!({"checkDecisions": true}));
    let response = request.timeout(Duration::from_secs(120)).send().await;
    let replay: Value = response.unwrap().json().await.unwrap();
    assert_eq!(replay["differing"], json!([]), "{replay:#}");
}

fn assert_acknowledged_writes_exist(events: &[Value], acknowledged: &BTreeMap<u64, u64>) {
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

/// Asserts, once every write with an `Idempotency-Key` is acknowledged, that the log has each once.
pub async fn assert_keyed_writes_happened_once(cluster: &Cluster, keyed: &BTreeSet<u64>) {
    assert!(!keyed.is_empty());
    assert_eq!(key_rotations(&cluster.events().await), *keyed);
}

/// The positions of the writes with an `Idempotency-Key` in the log.
fn key_rotations(events: &[Value]) -> BTreeSet<u64> {
    let key_rotations = events.iter().filter(|event| {
        event["type"] == "endpoint.key-regenerated" && event["stream"] == "endpoint/default/notes"
    });
    key_rotations
        .map(|event| event["position"].as_u64().unwrap())
        .collect()
}

/// Asserts that each minute of a deployment is closed once, each frame is counted once per deployment, and
/// no more requests are reported than were sent. (Fewer may be: a killed gateway loses its last frame, and
/// the newest minutes are open.) Returns the start of the newest closed minute with requests.
fn assert_usage_counted_once(events: &[Value], sent: u64) -> Option<Timestamp> {
    let mut closed = BTreeSet::new();
    let mut counted: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    let mut reported = 0;
    let mut newest = None;
    for event in events {
        let (kind, data) = (event["type"].as_str().unwrap(), &event["data"]);
        if !matches!(kind, "usage.closed" | "usage.corrected") {
            continue;
        }
        let deployment = data["deploymentUid"].to_string();
        let first: Timestamp = data["minute"].as_str().unwrap().parse().unwrap();
        if kind == "usage.closed" {
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
        let slices = data["slices"].as_array().unwrap().iter();
        let arrivals = slices.filter_map(|slice| slice.pointer("/byRole/live/arrivals"));
        let arrivals: u64 = arrivals.map(|arrivals| arrivals.as_u64().unwrap()).sum();
        if arrivals > 0 {
            reported += arrivals;
            newest = newest.max(Some(first));
        }
    }
    assert!(
        reported <= sent,
        "{reported} requests are reported, but {sent} were sent"
    );
    newest
}

/// Waits until a minute with requests that began at this time or later is closed: what has been metered
/// before says nothing about the meters that run now.
pub async fn wait_for_usage(cluster: &Cluster, workload: &Workload, since: Timestamp) {
    // The minute has to begin and to end.
    let deadline = Instant::now() + 3 * PATIENCE;
    loop {
        // Read the log first: `sent` must include every reported request.
        let events = cluster.events().await;
        let sent = workload.record.lock().unwrap().sent;
        if assert_usage_counted_once(&events, sent) >= Some(since) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "no usage since {since}:\n{}",
            cluster.logs()
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Asserts that each instance is requested, started and removed at most once, and that a decision leads
/// to no more scale-outs than it granted.
fn assert_no_duplicate_effects(events: &[Value]) {
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
