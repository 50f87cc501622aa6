//! What the log records of the usage of deployments.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use serde_json::{Value, json};

use crate::support::{DataFolder, Penstock, endpoint_document, eventually};

const HOUR_MS: i64 = 3_600_000;

fn now_ms() -> i64 {
    let since_epoch = std::time::UNIX_EPOCH.elapsed().unwrap();
    i64::try_from(since_epoch.as_millis()).unwrap()
}

async fn usage_events(penstock: &Penstock) -> Vec<Value> {
    let events = penstock.get("/v1/events?after=0&limit=1000").await;
    let events = events["items"].as_array().unwrap().iter();
    let is_usage = |event: &&Value| event["type"].as_str().unwrap().starts_with("usage.");
    events.filter(is_usage).cloned().collect()
}

#[tokio::test]
async fn an_idle_instance_that_is_not_measured_has_closed_usage_without_gaps() {
    let folder = DataFolder::new();
    let offset = folder.path().join("clock-offset");
    let file = offset.to_str().unwrap();
    let penstock = Penstock::start_with(&folder, &["--clock-offset-file", file]).await;
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    let document = json!({
        "apiVersion": "penstock/v1", "kind": "Deployment",
        "metadata": {"name": "blue", "endpoint": "iris"},
        "spec": {"backend": "simulated", "instanceType": "cpu-small", "instances": 1},
    });
    penstock
        .put("/v1/endpoints/iris/deployments/blue", &document)
        .await;
    penstock.until_ready_instances("iris", "blue", 1).await;
    // Idle minutes are closed with their hour, of which eight seconds are left now.
    let now = now_ms();
    let hour_ends = (now / HOUR_MS + 2) * HOUR_MS;
    std::fs::write(&offset, (hour_ends - 8_000 - now).to_string()).unwrap();
    let last_minute = contract::Timestamp::from_millis(hour_ends - 60_000).to_string();
    let closed = eventually("the usage of the last minute", || async {
        let events = usage_events(&penstock).await;
        let is_last = |event: &Value| event["data"]["minute"] == *last_minute;
        events.into_iter().find(is_last)
    })
    .await;
    assert_eq!(closed["type"], "usage.closed");
    let slices = closed["data"]["slices"].as_array().unwrap().iter();
    let instances = slices.flat_map(|slice| slice["byInstance"].as_object().unwrap().values());
    let reported = instances.map(|usage| usage["measuredUs"].as_u64().unwrap());
    assert!(reported.sum::<u64>() >= 6_000_000, "{closed:#}");
    let events = usage_events(&penstock).await;
    assert!(
        events.iter().all(|event| event["type"] != "usage.gap"),
        "{events:#?}"
    );
}
