//! Few file descriptors and many clients: excess clients are refused, and nothing else is affected.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::{
    DataFolder, PATIENCE, Penstock, deployment_document, endpoint_document, eventually, limited,
};

const CLIENTS: usize = 300;
/// Time to recover after the crowd has stopped.
const RECOVERY_MAX: Duration = Duration::from_secs(10);

/// Clients that keep their connections, send requests at intervals, and reconnect when refused.
struct ClientCrowd {
    clients: JoinSet<()>,
    counts: Arc<RequestCounts>,
}

#[derive(Default)]
struct RequestCounts {
    answered: AtomicUsize,
    refused: AtomicUsize,
}

impl ClientCrowd {
    fn start(penstock: &Penstock, key: &str) -> Self {
        let address = penstock.gateway.strip_prefix("http://").unwrap().to_owned();
        let body = r#"{"data":[[5.1,3.5,1.4,0.2]]}"#;
        let request = format!(
            "POST /endpoints/iris/score HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let counts = Arc::new(RequestCounts::default());
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let (address, request, counts) = (address.clone(), request.clone(), counts.clone());
            clients.spawn(async move {
                loop {
                    let _ = send_requests(&address, request.as_bytes(), &counts).await;
                    counts.refused.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            });
        }
        Self { clients, counts }
    }

    /// Waits for as many attempts, successful or not, as the clients make in a few seconds.
    async fn until_saturated(&self) {
        eventually("attempts by all clients", || async {
            let answered = self.counts.answered.load(Ordering::Relaxed);
            let refused = self.counts.refused.load(Ordering::Relaxed);
            (answered + refused > 16 * CLIENTS).then_some(())
        })
        .await;
    }

    async fn stop(mut self) {
        self.clients.shutdown().await;
    }
}

async fn send_requests(
    address: &str,
    request: &[u8],
    counts: &RequestCounts,
) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    let mut answer = [0; 4096];
    loop {
        stream.write_all(request).await?;
        let length = stream.read(&mut answer).await?;
        if !answer[..length].starts_with(b"HTTP/1.1 200") {
            return Ok(());
        }
        counts.answered.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Deploys with frequent probes and a low failure threshold.
async fn deploy(penstock: &Penstock, instances: u32) {
    let mut document = deployment_document("iris", "blue", instances);
    document["spec"]["livenessProbe"] =
        json!({"path": "/", "period": "200ms", "timeout": "5s", "failureThreshold": 2});
    document["spec"]["readinessProbe"] =
        json!({"path": "/", "period": "200ms", "timeout": "5s", "failureThreshold": 100});
    let endpoint = endpoint_document("iris");
    penstock.put("/v1/endpoints/iris", &endpoint).await;
    let path = "/v1/endpoints/iris/deployments/blue";
    penstock.put(path, &document).await;
    let traffic = json!({"traffic": {"blue": 100}});
    penstock.put("/v1/endpoints/iris/traffic", &traffic).await;
    penstock
        .until_ready_instances("iris", "blue", instances as usize)
        .await;
}

/// Asserts that a crowd of clients does not harm a Penstock with this descriptor limit.
async fn assert_survives_crowd(limit: u64, instances: u32) {
    let folder = DataFolder::new();
    let penstock = Penstock::start_limited(&folder, &format!("-n {limit}")).await;
    deploy(&penstock, instances).await;
    let key = penstock.key("iris").await;
    let processes: BTreeSet<u32> = folder.instance_processes().into_iter().collect();
    let crowd = ClientCrowd::start(&penstock, &key);
    crowd.until_saturated().await;
    // Control answers, and no instance failed.
    let ready = penstock.instances("iris", "blue", "ready").await;
    assert_eq!(ready.len(), instances as usize, "{}", penstock.log());
    let now: BTreeSet<u32> = folder.instance_processes().into_iter().collect();
    assert_eq!(now, processes, "{}", penstock.log());
    assert!(crowd.counts.answered.load(Ordering::Relaxed) > 0);
    crowd.stop().await;
    let answered = tokio::time::timeout(RECOVERY_MAX, until_answered(&penstock, &key)).await;
    answered.unwrap_or_else(|_| panic!("it has not recovered:\n{}", penstock.log()));
    let warnings = penstock.log().matches("LimitNOFILE").count();
    assert!(
        warnings <= 2,
        "warned {warnings} times:\n{}",
        penstock.log()
    );
    penstock.delete("/v1/endpoints/iris").await;
    eventually("the instances to be gone", || async {
        folder.instance_processes().is_empty().then_some(())
    })
    .await;
    assert!(penstock.stop().await.success());
}

/// Waits until ten requests in a row are answered by the model.
async fn until_answered(penstock: &Penstock, key: &str) {
    eventually("every request to be answered", || async {
        for _ in 0..10 {
            let sent = penstock.score("iris", key).send().await;
            if sent.is_err() || sent.is_ok_and(|answer| answer.status() != StatusCode::OK) {
                return None;
            }
        }
        Some(())
    })
    .await;
}

#[tokio::test]
async fn instances_beyond_the_limit_wait_without_affecting_others() {
    let folder = DataFolder::new();
    let penstock = Penstock::start_limited(&folder, "-n 128").await;
    deploy(&penstock, 5).await;
    let key = penstock.key("iris").await;
    let path = "/v1/endpoints/iris/deployments/blue";
    let mut document = penstock.get(path).await;
    document["spec"]["instances"] = json!(100);
    let document = json!({"apiVersion": "penstock/v1", "kind": "Deployment",
        "metadata": {"name": "blue", "endpoint": "iris"}, "spec": document["spec"]});
    penstock.put(path, &document).await;
    eventually("a start that waits", || async {
        let waits = penstock
            .log()
            .contains(r#""delayed":"the start of an instance""#);
        waits.then_some(())
    })
    .await;
    until_answered(&penstock, &key).await;
    assert!(folder.instance_processes().len() < 50, "{}", penstock.log());
    penstock.delete("/v1/endpoints/iris").await;
    eventually("the instances to be gone", || async {
        folder.instance_processes().is_empty().then_some(())
    })
    .await;
    assert!(penstock.stop().await.success());
}

#[tokio::test]
async fn a_crowd_on_128_descriptors_costs_no_instance() {
    assert_survives_crowd(128, 30).await;
}

#[tokio::test]
async fn a_crowd_on_256_descriptors_costs_no_instance() {
    assert_survives_crowd(256, 30).await;
}

#[tokio::test]
async fn a_crowd_on_1024_descriptors_costs_no_instance() {
    assert_survives_crowd(1024, 30).await;
}

#[tokio::test]
async fn a_scale_and_a_removal_in_the_middle_of_a_crowd_are_carried_out() {
    let folder = DataFolder::new();
    let penstock = Penstock::start_limited(&folder, "-n 128").await;
    deploy(&penstock, 5).await;
    let key = penstock.key("iris").await;
    let crowd = ClientCrowd::start(&penstock, &key);
    crowd.until_saturated().await;
    deploy(&penstock, 15).await;
    penstock.delete("/v1/endpoints/iris").await;
    eventually("the instances to be gone", || async {
        folder.instance_processes().is_empty().then_some(())
    })
    .await;
    crowd.stop().await;
}

#[tokio::test]
async fn sigterm_in_the_middle_of_a_crowd_leaves_no_process_behind() {
    let folder = DataFolder::new();
    let penstock = Penstock::start_limited(&folder, "-n 128").await;
    deploy(&penstock, 10).await;
    let key = penstock.key("iris").await;
    let crowd = ClientCrowd::start(&penstock, &key);
    crowd.until_saturated().await;
    assert!(penstock.stop().await.success());
    assert_eq!(folder.instance_processes(), Vec::<u32>::new());
    crowd.stop().await;
}

/// The soft and the hard limit of a process.
fn descriptors_of(process: u32) -> (String, String) {
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let mut words = line.unwrap().split_whitespace().skip(3);
    let mut next = || words.next().unwrap().to_owned();
    (next(), next())
}

#[tokio::test]
async fn instances_get_the_original_limit_and_penstock_raises_its_own() {
    let folder = DataFolder::new();
    let penstock = Penstock::start_limited(&folder, "-Sn 300").await;
    let (soft, hard) = descriptors_of(penstock.process_id());
    assert_eq!(soft, hard);
    penstock.deploy("iris", "blue", 1).await;
    let processes = folder.instance_processes();
    assert_eq!(processes.len(), 1);
    assert_eq!(descriptors_of(processes[0]), ("300".to_owned(), hard));
    let command = std::fs::read(format!("/proc/{}/cmdline", processes[0])).unwrap();
    assert!(command.starts_with(crate::support::scorer().as_bytes()));
}

#[tokio::test]
async fn too_few_descriptors_fail_the_start_with_a_message() {
    let folder = DataFolder::new();
    let ended = limited("-n 48")
        .args(["serve", "--data"])
        .arg(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let ended = tokio::time::timeout(PATIENCE, ended)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert!(
        errors.contains("48 file descriptors are too few"),
        "{errors}"
    );
    assert!(errors.contains("LimitNOFILE"), "{errors}");
}
