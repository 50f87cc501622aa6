//! Client load during faults: writes, with a record of the acknowledged ones, and requests that gateways
//! must answer throughout.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::cluster::{Cluster, Role};
use crate::support;

/// Between two requests of a client.
const REQUEST_INTERVAL: Duration = Duration::from_millis(25);
/// Between two writes through one control.
const WRITE_INTERVAL: Duration = Duration::from_millis(200);

/// One client request that was not answered 200.
#[derive(Clone, Debug)]
pub struct RequestFailure {
    pub gateway: &'static str,
    pub began: Instant,
    pub ended: Instant,
    pub reason: String,
}

#[derive(Default)]
pub struct WorkloadRecord {
    /// Position to the label written there.
    pub acknowledged: BTreeMap<u64, u64>,
    tried: u64,
    /// Positions of acknowledged writes with an `Idempotency-Key`; each was retried until acknowledged.
    pub keyed: BTreeSet<u64>,
    /// Requests that may have reached a gateway.
    pub sent: u64,
    pub requests: u64,
    /// Successful requests, by gateway.
    pub answered: BTreeMap<&'static str, u64>,
    pub failures: Vec<RequestFailure>,
    /// Intervals in which a gateway was down because of a fault.
    pub outages: Vec<(&'static str, Instant, Instant)>,
}

pub struct Workload {
    pub record: Arc<Mutex<WorkloadRecord>>,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Workload {
    /// Starts one writer per control plane and one client per gateway; until [`stop`](Self::stop).
    pub fn start(cluster: &Arc<Cluster>, key: &str) -> Self {
        let mut workload = Self::requests(cluster, key, 1);
        for control_plane in cluster.of(Role::ControlPlane) {
            let (record, stop) = (workload.record.clone(), workload.stop.clone());
            let client = write(cluster.clone(), control_plane.name, record, stop);
            workload.clients.push(tokio::spawn(client));
        }
        workload
    }

    /// Starts this many clients per gateway, and no writers; until [`stop`](Self::stop).
    pub fn requests(cluster: &Arc<Cluster>, key: &str, clients_per_gateway: usize) -> Self {
        let record = Arc::new(Mutex::new(WorkloadRecord::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = Vec::new();
        for gateway in cluster.of(Role::Gateway) {
            record.lock().unwrap().answered.insert(gateway.name, 0);
            for _ in 0..clients_per_gateway {
                let (key, record, stop) = (key.to_owned(), record.clone(), stop.clone());
                let client = score(cluster.clone(), gateway.name, key, record, stop);
                clients.push(tokio::spawn(client));
            }
        }
        Self {
            record,
            stop,
            clients,
        }
    }

    /// Waits until a write of either kind is acknowledged and each gateway answers a request.
    pub async fn until_progress(&self) {
        let counts = || {
            let record = self.record.lock().unwrap();
            let mut counts = vec![record.acknowledged.len() as u64, record.keyed.len() as u64];
            counts.extend(record.answered.values());
            counts
        };
        let before = counts();
        support::eventually(
            "a write of either kind and requests to each gateway",
            || async {
                let now = counts();
                let further = before.iter().zip(&now).all(|(before, now)| now > before);
                further.then_some(())
            },
        )
        .await;
    }

    /// Waits until each of these gateways answers one more request.
    pub async fn until_answered_by(&self, gateways: &[&str]) {
        let counts = || {
            let record = self.record.lock().unwrap();
            let counts = gateways.iter().map(|gateway| record.answered[gateway]);
            counts.collect::<Vec<_>>()
        };
        let before = counts();
        support::eventually("a request to each gateway", || async {
            let further = before
                .iter()
                .zip(counts())
                .all(|(before, now)| now > *before);
            further.then_some(())
        })
        .await;
    }

    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

/// Changes a label repeatedly, and records the acknowledged writes.
async fn write(
    cluster: Arc<Cluster>,
    control_plane: &'static str,
    record: Arc<Mutex<WorkloadRecord>>,
    stop: Arc<AtomicBool>,
) {
    while !stop.load(Ordering::Relaxed) {
        let label = {
            let mut record = record.lock().unwrap();
            record.tried += 1;
            record.tried
        };
        let mut document = support::endpoint_document("notes");
        document["metadata"]["labels"] = json!({"write": label.to_string()});
        let request = cluster.api(
            cluster.get(control_plane),
            Method::PUT,
            "/v1/endpoints/notes",
        );
        if let Ok(response) = request.json(&document).send().await
            && response.status().is_success()
            && let Some(position) = response.headers().get("penstock-position")
        {
            let position = position.to_str().unwrap().parse().unwrap();
            record.lock().unwrap().acknowledged.insert(position, label);
        }
        write_with_key(&cluster, control_plane, &record).await;
        tokio::time::sleep(WRITE_INTERVAL).await;
    }
}

/// Sends a write with an `Idempotency-Key` through one control plane after the other until it is
/// acknowledged. A write without a response may have happened; a retry must not repeat it.
async fn write_with_key(cluster: &Cluster, first: &str, record: &Mutex<WorkloadRecord>) {
    let key = uuid::Uuid::new_v4().to_string();
    let began = Instant::now();
    let (mut control_planes, mut others): (Vec<_>, Vec<_>) = cluster
        .of(Role::ControlPlane)
        .partition(|control_plane| control_plane.name == first);
    control_planes.append(&mut others);
    for control_plane in control_planes.iter().cycle() {
        let path = "/v1/endpoints/notes/keys/secondary/regenerate";
        let request = cluster.api(control_plane, Method::POST, path);
        let answer = request.header("idempotency-key", &key).send().await;
        let why = match answer {
            Ok(response) if response.status().is_success() => {
                let position = response.headers().get("penstock-position").unwrap();
                let position = position.to_str().unwrap().parse().unwrap();
                record.lock().unwrap().keyed.insert(position);
                return;
            }
            Ok(response) => response.status().to_string(),
            Err(error) => error.to_string(),
        };
        assert!(
            began.elapsed() < support::PATIENCE * 3,
            "a write was not accepted: {why}\n{}",
            cluster.logs()
        );
        tokio::time::sleep(REQUEST_INTERVAL).await;
    }
}

/// Sends scoring requests repeatedly. Whether a failure was expected is decided later.
async fn score(
    cluster: Arc<Cluster>,
    gateway: &'static str,
    key: String,
    record: Arc<Mutex<WorkloadRecord>>,
    stop: Arc<AtomicBool>,
) {
    let body = json!({"data": [[5.1, 3.5, 1.4, 0.2]]});
    while !stop.load(Ordering::Relaxed) {
        let url = cluster.get(gateway).addresses().gateway.unwrap();
        let began = Instant::now();
        record.lock().unwrap().sent += 1;
        let request = cluster
            .http
            .post(format!("{url}/endpoints/iris/score"))
            .bearer_auth(&key)
            .json(&body);
        let reason = match request.send().await {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => {
                let code = response.headers().get("penstock-error-code").cloned();
                Some(format!("{} {code:?}", response.status()))
            }
            Err(error) => Some(format!("{error:?}")),
        };
        {
            let mut record = record.lock().unwrap();
            record.requests += 1;
            match reason {
                None => *record.answered.entry(gateway).or_default() += 1,
                Some(reason) => {
                    let ended = Instant::now();
                    record.failures.push(RequestFailure {
                        gateway,
                        began,
                        ended,
                        reason,
                    });
                }
            }
        }
        tokio::time::sleep(REQUEST_INTERVAL).await;
    }
}

/// The results so far: acknowledged writes, and requests.
pub struct WorkloadSummary {
    /// Position to the label written there.
    pub acknowledged: BTreeMap<u64, u64>,
    pub keyed: BTreeSet<u64>,
    pub requests: u64,
    /// Failed requests that no outage of their own gateway explains.
    pub unexplained: Vec<String>,
}

impl Workload {
    pub fn summary(&self) -> WorkloadSummary {
        let record = self.record.lock().unwrap();
        let explained = |failure: &&RequestFailure| {
            !record.outages.iter().any(|(gateway, from, to)| {
                *gateway == failure.gateway && failure.began <= *to && failure.ended >= *from
            })
        };
        let unexplained = record.failures.iter().filter(explained);
        WorkloadSummary {
            acknowledged: record.acknowledged.clone(),
            keyed: record.keyed.clone(),
            requests: record.requests,
            unexplained: unexplained
                .map(|failure| format!("{}: {}", failure.gateway, failure.reason))
                .collect(),
        }
    }
}
