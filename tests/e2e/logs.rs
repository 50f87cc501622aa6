//! Reading instance logs through the real API.

use serde_json::json;

use crate::support::{DataFolder, PATIENCE, Penstock, endpoint_document};

#[tokio::test]
async fn sigterm_in_the_middle_of_a_long_read_of_logs_ends_the_server() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    let deployment = json!({
        "apiVersion": "penstock/v1", "kind": "Deployment",
        "metadata": {"name": "blue", "endpoint": "iris"},
        "spec": {"backend": "simulated", "instanceType": "cpu-small"},
    });
    let path = "/v1/endpoints/iris/deployments/blue";
    penstock.put(path, &deployment).await;
    let logs = folder.path().join("logs/iris/blue");
    std::fs::create_dir_all(&logs).unwrap();
    // The log of an instance whose first parts were rotated away.
    let line = format!("{}\n", "x".repeat(1000));
    std::fs::write(logs.join("chatty.log.000006"), line.repeat(20_000)).unwrap();
    std::fs::write(logs.join("chatty.log"), &line).unwrap();

    let request = penstock.api(reqwest::Method::GET, "/v1/logs/iris/blue");
    let reading = async {
        let mut response = request.send().await.unwrap();
        response.chunk().await.unwrap().unwrap();
        response
    };
    let response = tokio::time::timeout(PATIENCE, reading).await;
    let response = response.expect("no line comes");
    // Most of the response is still unread.
    assert!(penstock.stop().await.success());
    drop(response);
}
