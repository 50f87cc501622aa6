//! Endpoints and deployments, from the first apply to the removal of the last instance.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::support::{DataFolder, Penstock, deployment_document, endpoint_document, eventually};

#[tokio::test]
async fn an_applied_endpoint_answers_with_what_the_model_says() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let key = penstock.key("iris").await;
    let response = penstock.score("iris", &key).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["penstock-deployment"], "blue");
    let answer: serde_json::Value = response.json().await.unwrap();
    assert_eq!(answer["scores"].as_array().unwrap().len(), 1, "{answer}");
    penstock.verify().await;
}

#[tokio::test]
async fn a_wrong_key_is_refused_and_a_regenerated_one_works() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let old = penstock.key("iris").await;
    assert_eq!(
        penstock
            .score("iris", "wrong")
            .send()
            .await
            .unwrap()
            .status(),
        401
    );
    penstock
        .post("/v1/endpoints/iris/keys/primary/regenerate", &json!({}))
        .await;
    let new = penstock.key("iris").await;
    assert_ne!(old, new);
    eventually(
        "the gateway to know the new key and refuse the old",
        || async {
            let new = penstock.score("iris", &new).send().await.unwrap().status();
            let old = penstock.score("iris", &old).send().await.unwrap().status();
            (new == 200 && old == 401).then_some(())
        },
    )
    .await;
}

#[tokio::test]
async fn deleting_an_endpoint_stops_its_instances_and_its_name_inherits_nothing() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 2).await;
    let uid = penstock.get("/v1/endpoints/iris").await["metadata"]["uid"].clone();
    penstock.delete("/v1/endpoints/iris").await;
    eventually("the endpoint to be gone", || async {
        let gone = penstock
            .api(Method::GET, "/v1/endpoints/iris")
            .send()
            .await
            .unwrap();
        (gone.status() == StatusCode::NOT_FOUND).then_some(())
    })
    .await;
    assert_eq!(folder.instance_processes(), Vec::<u32>::new());
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    let again = penstock.get("/v1/endpoints/iris").await;
    assert_ne!(again["metadata"]["uid"], uid);
    assert_eq!(
        again["spec"]["traffic"]
            .as_object()
            .map_or(0, |traffic| traffic.len()),
        0
    );
    let deployments = penstock.get("/v1/endpoints/iris/deployments").await;
    assert_eq!(deployments["items"], json!([]));
    penstock.verify().await;
}

#[tokio::test]
async fn a_deployment_with_traffic_cannot_be_deleted() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let path = "/v1/endpoints/iris/deployments/blue";
    let refused = penstock.api(Method::DELETE, path).send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::CONFLICT);
    penstock
        .put("/v1/endpoints/iris/traffic", &json!({"traffic": {}}))
        .await;
    penstock.delete(path).await;
    eventually("its processes to end", || async {
        folder.instance_processes().is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_deployment_is_replaced_rolling_and_no_request_is_cut() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 2).await;
    let load = Load::start(&penstock, "iris", 4).await;
    let before = penstock.instances("iris", "blue", "ready").await;

    let mut document = deployment_document("iris", "blue", 2);
    document["spec"]["env"] = json!({"LEVEL": "2"});
    penstock
        .put("/v1/endpoints/iris/deployments/blue", &document)
        .await;
    eventually("every old instance to be replaced", || async {
        let now = penstock.instances("iris", "blue", "ready").await;
        let replaced = now
            .iter()
            .all(|i| before.iter().all(|b| b["id"] != i["id"]));
        let state = penstock.get("/v1/endpoints/iris/deployments/blue").await;
        let settled = state["status"]["provisioningState"] == "Succeeded";
        (now.len() == 2 && replaced && settled).then_some(())
    })
    .await;
    load.stop_without_failures().await;
    penstock.verify().await;
}

#[tokio::test]
async fn an_instance_that_dies_is_replaced() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let dead = penstock.instances("iris", "blue", "ready").await.remove(0);
    let pid = dead["pid"].as_u64().unwrap().to_string();
    std::process::Command::new("kill")
        .args(["-9", &pid])
        .status()
        .unwrap();
    eventually("another instance in its place", || async {
        let ready = penstock.instances("iris", "blue", "ready").await;
        (ready.len() == 1 && ready[0]["id"] != dead["id"]).then_some(())
    })
    .await;
    penstock.verify().await;
}

#[tokio::test]
async fn a_deployment_that_cannot_start_fails_with_the_reason_and_recovers() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    let path = "/v1/endpoints/iris/deployments/blue";
    let mut document = deployment_document("iris", "blue", 1);
    document["spec"]["command"] = json!(["/nowhere/at-all", "{port}"]);
    penstock.put(path, &document).await;
    let failed = eventually("the deployment to fail", || async {
        let deployment = penstock.get(path).await;
        (deployment["status"]["provisioningState"] == "Failed").then_some(deployment)
    })
    .await;
    assert!(
        failed["status"].to_string().contains("/nowhere/at-all"),
        "{failed:#}"
    );
    penstock
        .put(path, &deployment_document("iris", "blue", 1))
        .await;
    eventually("the deployment to recover", || async {
        let deployment = penstock.get(path).await;
        (deployment["status"]["provisioningState"] == "Succeeded").then_some(())
    })
    .await;
}

#[tokio::test]
async fn sigterm_ends_every_instance_and_keep_instances_leaves_them_to_be_adopted() {
    let folder = DataFolder::new();
    let penstock = Penstock::start_with(&folder, &["--keep-instances"]).await;
    penstock.deploy("iris", "blue", 2).await;
    let before = folder.instance_processes();
    assert_eq!(before.len(), 2);
    assert!(penstock.stop().await.success());
    assert_eq!(folder.instance_processes(), before, "they keep running");

    let penstock = Penstock::start(&folder).await;
    penstock.until_ready_instances("iris", "blue", 2).await;
    assert_eq!(folder.instance_processes(), before, "they were adopted");
    assert!(penstock.stop().await.success());
    assert_eq!(folder.instance_processes(), Vec::<u32>::new());
}

/// Concurrent requests until stopped; all must succeed.
pub struct Load {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    pub async fn start(penstock: &Penstock, endpoint: &str, clients: usize) -> Self {
        let key = penstock.key(endpoint).await;
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let clients = (0..clients)
            .map(|_| {
                let request = penstock.score(endpoint, &key);
                let (stop, sent) = (stop.clone(), sent.clone());
                tokio::spawn(async move {
                    let mut failures = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        sent.fetch_add(1, Ordering::Relaxed);
                        match request.try_clone().unwrap().send().await {
                            Ok(response) if response.status() == StatusCode::OK => {
                                if let Err(error) = response.bytes().await {
                                    failures.push(error.to_string());
                                }
                            }
                            Ok(response) => failures.push(format!(
                                "{} {:?}",
                                response.status(),
                                response.headers().get("penstock-error-code")
                            )),
                            Err(error) => failures.push(error.to_string()),
                        }
                    }
                    failures
                })
            })
            .collect();
        Self {
            stop,
            sent,
            clients,
        }
    }

    /// Stops the clients; returns the number of requests sent.
    pub async fn stop_without_failures(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            assert_eq!(client.await.unwrap(), Vec::<String>::new());
        }
        self.sent.load(Ordering::Relaxed)
    }
}
