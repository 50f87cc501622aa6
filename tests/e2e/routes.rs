//! A server with paths of its own, served through `routes`.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{DataFolder, Penstock, eventually};
use crate::time_limits;

const SERVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/e2e/own_paths.py");
const PATH: &str = "/v1/endpoints/iris/deployments/blue";

fn document() -> Value {
    let mut document = time_limits::document(&[]);
    document["spec"]["command"] = json!(["python3", SERVER, "{port}"]);
    document["spec"]["readinessProbe"]["path"] = json!("/ping");
    document
}

fn with_routes(mut document: Value) -> Value {
    document["spec"]["routes"] = json!({"scoring": "/invocations", "prefix": "/"});
    document["spec"]["errorMapping"] = json!("pass");
    document
}

/// Asks for a path of the endpoint; returns the status, our error code and the body.
async fn ask(penstock: &Penstock, key: &str, method: Method, path: &str) -> (u16, String, Value) {
    let url = format!("{}/endpoints/iris{path}", penstock.gateway);
    let request = penstock.http.request(method, url).bearer_auth(key);
    let response = request.body("{}").send().await.unwrap();
    let code = response.headers().get("penstock-error-code");
    let code = code.map_or("", |code| code.to_str().unwrap()).to_owned();
    (
        response.status().as_u16(),
        code,
        response.json().await.unwrap(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_knows_nothing_of_score_is_served_as_it_is() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let key = time_limits::deploy(&penstock, &with_routes(document())).await;
    for (method, path, asked) in [
        (Method::POST, "/score?a=1", "POST /invocations?a=1"),
        (Method::POST, "/invocations", "POST /invocations"),
        (Method::POST, "/v1/completions", "POST /v1/completions"),
        (Method::GET, "/v1/models", "GET /v1/models"),
    ] {
        let answer = ask(&penstock, &key, method, path).await;
        assert_eq!(answer, (200, String::new(), json!({"asked": asked})));
    }
    let missing = ask(&penstock, &key, Method::GET, "/v1/missing").await;
    let asked = json!({"asked": "GET /v1/missing"});
    assert_eq!(missing, (404, "model-error".into(), asked));
    let (status, code, body) = ask(&penstock, "wrong", Method::GET, "/v1/models").await;
    assert_eq!((status, code.as_str()), (401, "wrong-key"));
    assert_eq!(body["error"]["code"], "wrong-key");
    let health = penstock.http.get(format!("{}/healthz", penstock.gateway));
    assert_eq!(health.send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_routes_replace_no_instance() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let key = time_limits::deploy(&penstock, &document()).await;
    let before = penstock.instances("iris", "blue", "ready").await;
    let (status, code, _) = ask(&penstock, &key, Method::GET, "/v1/models").await;
    assert_eq!((status, code.as_str()), (404, "unknown-endpoint"));
    penstock.put(PATH, &with_routes(document())).await;
    eventually("the opened path", || async {
        let (status, ..) = ask(&penstock, &key, Method::GET, "/v1/models").await;
        (status == 200).then_some(())
    })
    .await;
    // Deployments whose instances are replaced do not succeed before the new ones are ready.
    eventually("the end of the change", || async {
        let shown = penstock.get(PATH).await;
        (shown["status"]["provisioningState"] == "Succeeded").then_some(())
    })
    .await;
    let instances = penstock.get("/v1/instances?endpoint=iris").await;
    let ids = |items: &[Value]| -> Vec<Value> { items.iter().map(|i| i["id"].clone()).collect() };
    assert_eq!(ids(instances["items"].as_array().unwrap()), ids(&before));
}
