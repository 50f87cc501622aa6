//! Limits in time, with real servers that are slow.

use serde_json::{Value, json};

use crate::support::{DataFolder, Penstock, deployment_document, endpoint_document, eventually};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/e2e/model.py");
const PATH: &str = "/v1/endpoints/iris/deployments/blue";

/// A deployment of the slow server with these arguments.
pub fn document(arguments: &[&str]) -> Value {
    let mut document = deployment_document("iris", "blue", 1);
    let command = ["python3", MODEL, "{port}"].iter().chain(arguments);
    document["spec"]["command"] = command.copied().collect();
    document["spec"]["readinessProbe"] = json!({"path": "/health", "period": "100ms"});
    document
}

async fn create(penstock: &Penstock, document: &Value) {
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    penstock.put(PATH, document).await;
}

/// Applies the document and waits until an instance is ready; returns the endpoint's key.
pub async fn deploy(penstock: &Penstock, document: &Value) -> String {
    create(penstock, document).await;
    let traffic = json!({"traffic": {"blue": 100}});
    penstock.put("/v1/endpoints/iris/traffic", &traffic).await;
    penstock.until_ready_instances("iris", "blue", 1).await;
    penstock.key("iris").await
}

/// Sends a request to `/score` followed by this path; returns the status.
async fn status(penstock: &Penstock, key: &str, path: &str) -> u16 {
    let url = format!("{}/endpoints/iris/score{path}", penstock.gateway);
    let sent = penstock.http.post(url).bearer_auth(key).send().await;
    sent.unwrap().status().as_u16()
}

/// Returns the text of a stream of this many events, which the model leaves open.
pub async fn stream(penstock: &Penstock, key: &str, events: usize) -> String {
    let url = format!(
        "{}/endpoints/iris/score/stream?events={events}",
        penstock.gateway
    );
    let sent = penstock.http.post(url).bearer_auth(key).send().await;
    sent.unwrap().text().await.unwrap()
}

async fn until_in_flight(penstock: &Penstock) {
    let line =
        "penstock_inflight_requests{endpoint=\"iris\",deployment=\"blue\",role=\"live\"} 1\n";
    eventually("a request in flight", || async {
        let metrics = penstock.http.get(format!("{}/metrics", penstock.control));
        let text = metrics.send().await.unwrap().text().await.unwrap();
        text.contains(line).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_waits_for_a_request_that_the_present_limit_allows() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let mut document = document(&[]);
    document["spec"]["requestSettings"]["timeout"] = json!("1s");
    let key = deploy(&penstock, &document).await;
    document["spec"]["requestSettings"]["timeout"] = json!("60s");
    penstock.put(PATH, &document).await;
    eventually("the longer limit", || async {
        (status(&penstock, &key, "/wait?seconds=1.5").await == 200).then_some(())
    })
    .await;
    // Longer than a drain would take by the limit that the instance was started with.
    let slow = status(&penstock, &key, "/wait?seconds=14");
    let change = async {
        until_in_flight(&penstock).await;
        document["spec"]["env"] = json!({"LEVEL": "2"});
        penstock.put(PATH, &document).await;
        eventually("the instance to drain", || async {
            let draining = penstock.instances("iris", "blue", "draining").await;
            (!draining.is_empty()).then_some(())
        })
        .await;
    };
    let (status, ()) = tokio::join!(slow, change);
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_the_model_leaves_open_ends_with_an_error_event() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let mut document = document(&[]);
    document["spec"]["requestSettings"] =
        json!({"timeout": "5s", "streamIdleTimeout": "500ms", "maxDuration": "1m"});
    let key = deploy(&penstock, &document).await;
    let text = stream(&penstock, &key, 2).await;
    assert!(
        text.starts_with("data: 0\n\ndata: 1\n\nevent: error\n"),
        "{text}"
    );
    assert!(text.contains("stream-idle"), "{text}");
}

/// Waits until an instance that is starting says what it waits for.
async fn until_starting(penstock: &Penstock) -> String {
    eventually("what the start waits for", || async {
        let starting = penstock.instances("iris", "blue", "starting").await;
        let detail = starting.first()?["detail"].as_str()?;
        Some(detail.to_owned())
    })
    .await
}

#[tokio::test]
async fn a_server_that_imports_for_long_is_starting_and_becomes_ready() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let mut document = document(&["--import", "6"]);
    document["spec"]["readinessProbe"]["failureThreshold"] = json!(3);
    create(&penstock, &document).await;
    let detail = until_starting(&penstock).await;
    assert!(
        detail.starts_with("port ") && detail.ends_with(" is closed"),
        "{detail}"
    );
    penstock.until_ready_instances("iris", "blue", 1).await;
    let instances = penstock.get("/v1/instances?endpoint=iris").await;
    assert_eq!(
        instances["items"].as_array().unwrap().len(),
        1,
        "the first start succeeded"
    );
    penstock.verify().await;
}

#[tokio::test]
async fn a_probe_of_a_path_that_does_not_exist_says_what_to_set() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let mut document = document(&[]);
    document["spec"]["readinessProbe"]["path"] = json!("/");
    create(&penstock, &document).await;
    let expected = "probe `/` answers 404: set `readinessProbe.path`";
    assert_eq!(until_starting(&penstock).await, expected);
    let available = penstock.get(PATH).await["status"]["available"].clone();
    assert_eq!(available["reason"], "Starting");
    let message = available["message"].as_str().unwrap();
    assert!(message.ends_with(expected), "{message}");
    let shown = penstock.cli(&["get", "instances", "iris/blue"]).await;
    let table = String::from_utf8(shown.stdout).unwrap();
    assert!(
        table.contains("starting ") && table.contains(expected),
        "{table}"
    );
}
