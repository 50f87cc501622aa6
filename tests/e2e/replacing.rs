//! Replacing the instances of servers that listen on several ports.

use std::net::TcpListener;

use serde_json::{Value, json};

use crate::support::{DataFolder, Penstock, eventually};
use crate::time_limits;

const SERVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/e2e/own_paths.py");
const PATH: &str = "/v1/endpoints/iris/deployments/blue";

/// A deployment of a server that listens on these ports too.
fn document(further: &[&str]) -> Value {
    let mut document = time_limits::document(&[]);
    let command = ["python3", SERVER, "{port}"].iter().chain(further);
    document["spec"]["command"] = command.copied().collect();
    document["spec"]["readinessProbe"]["path"] = json!("/ping");
    document["spec"]["routes"] = json!({"scoring": "/invocations"});
    document
}

async fn ready_ids(penstock: &Penstock) -> Vec<Value> {
    let ready = penstock.instances("iris", "blue", "ready").await;
    ready.iter().map(|one| one["id"].clone()).collect()
}

/// Waits until none of these instances is left, and this many others are ready.
async fn until_replaced(penstock: &Penstock, before: &[Value]) {
    eventually("new instances", || async {
        let ready = ready_ids(penstock).await;
        let are_new = ready.iter().all(|id| !before.contains(id));
        (are_new && ready.len() == before.len()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_binds_three_ports_runs_twice_and_is_updated_under_way() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let mut document = document(&["{port:grpc}", "{port:metrics}"]);
    let key = time_limits::deploy(&penstock, &document).await;
    document["spec"]["instances"] = json!(2);
    penstock.put(PATH, &document).await;
    penstock.until_ready_instances("iris", "blue", 2).await;
    let before = ready_ids(&penstock).await;
    document["spec"]["env"] = json!({"LEVEL": "2"});
    penstock.put(PATH, &document).await;
    let requests = async {
        loop {
            let answer = penstock.score("iris", &key).send().await.unwrap();
            assert_eq!(answer.status(), 200);
        }
    };
    tokio::select! {
        () = requests => {}
        () = until_replaced(&penstock, &before) => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_on_a_fixed_port_is_replaced_if_it_stops_first() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let fixed = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = fixed.local_addr().unwrap().port().to_string();
    drop(fixed);
    let mut document = document(&[&port]);
    document["spec"]["update"] = json!("stop-first");
    time_limits::deploy(&penstock, &document).await;
    let before = ready_ids(&penstock).await;
    document["spec"]["env"] = json!({"LEVEL": "2"});
    penstock.put(PATH, &document).await;
    until_replaced(&penstock, &before).await;
    let all = penstock.get("/v1/instances?endpoint=iris").await;
    let all = all["items"].as_array().unwrap();
    assert_eq!(all.len(), 2, "none failed: {all:?}");
}
