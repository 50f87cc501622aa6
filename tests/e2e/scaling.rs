//! Instances follow load and schedules; every change is explained by a decision.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use serde_json::{Value, json};

use crate::lifecycle::Load;
use crate::support::{DataFolder, Penstock, eventually};

fn autoscale(profiles: Value) -> Value {
    json!({
        "apiVersion": "penstock/v1", "kind": "Autoscale",
        "spec": {
            "target": {"endpoint": "iris", "deployment": "blue"},
            "cooldown": {"out": "1s", "in": "1s"}, "stabilization": {"out": "0s", "in": "2s"},
            "profiles": profiles
        }
    })
}

async fn newest_decision(penstock: &Penstock) -> Value {
    penstock
        .get("/v1/decisions?endpoint=iris&deployment=blue&limit=1")
        .await["items"][0]
        .clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_follow_the_load_out_and_in_and_every_decision_replays_to_the_same_bytes() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let document = autoscale(json!([{
        "name": "default", "capacity": {"min": 1, "max": 3, "default": 1},
        "rules": [{
            "name": "follow", "metric": {"name": "concurrency", "window": "3s"}, "track": {"target": 1}
        }]
    }]));
    penstock.put("/v1/autoscale/iris/blue", &document).await;
    let load = Load::start(&penstock, "iris", 6).await;
    penstock.until_ready_instances("iris", "blue", 3).await;
    let decision = newest_decision(&penstock).await;
    assert_eq!(decision["rules"][0]["name"], "follow", "{decision:#}");
    load.stop_without_failures().await;
    penstock.until_ready_instances("iris", "blue", 1).await;

    let id = newest_decision(&penstock).await["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let explained = penstock.cli(&["explain", &id]).await;
    let text = String::from_utf8(explained.stdout).unwrap();
    assert!(
        explained.status.success() && text.contains("follow"),
        "{text}"
    );
    let replayed = penstock
        .cli(&["events", "replay", "--check-decisions"])
        .await;
    assert!(
        replayed.status.success(),
        "{}",
        String::from_utf8_lossy(&replayed.stderr)
    );
    penstock.verify().await;
}

#[tokio::test]
async fn a_dated_profile_is_active_only_during_its_period() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let now = penstock.get("/v1/endpoints/iris").await;
    assert!(now["status"]["provisioningState"].is_string());
    let second = |ahead: u64| {
        let since_epoch = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let at = contract::Timestamp::from_secs((since_epoch.as_secs() + ahead) as i64);
        at.to_string()
    };
    let document = autoscale(json!([
        {"name": "default", "capacity": {"min": 1, "max": 1, "default": 1}},
        {"name": "event", "capacity": {"min": 2, "max": 2, "default": 2},
         "schedule": {"dated": {"from": second(3), "to": second(9)}}}
    ]));
    penstock.put("/v1/autoscale/iris/blue", &document).await;
    penstock.until_ready_instances("iris", "blue", 2).await;
    assert_eq!(newest_decision(&penstock).await["profile"], "event");
    penstock.until_ready_instances("iris", "blue", 1).await;
    assert_eq!(newest_decision(&penstock).await["profile"], "default");
}

#[tokio::test]
async fn a_pin_decides_until_it_expires() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let scaled = penstock
        .cli(&["scale", "iris/blue", "--instances", "2", "--for", "5s"])
        .await;
    assert!(
        scaled.status.success(),
        "{}",
        String::from_utf8_lossy(&scaled.stderr)
    );
    penstock.until_ready_instances("iris", "blue", 2).await;
    assert_eq!(newest_decision(&penstock).await["outcome"], "pinned");
    penstock.until_ready_instances("iris", "blue", 1).await;
    assert_eq!(newest_decision(&penstock).await["outcome"], "fixed");
}

/// Five endpoints scale in twenty times each, concurrently, each with more clients than one instance has
/// slots.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_scale_ins_under_full_load_cut_no_request() {
    const ENDPOINTS: usize = 5;
    const ROUNDS: usize = 20;
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let names: Vec<String> = (0..ENDPOINTS)
        .map(|index| format!("iris-{index}"))
        .collect();
    let mut loads = Vec::new();
    for name in &names {
        penstock.deploy(name, "blue", 1).await;
        loads.push(Load::start(&penstock, name, 6).await);
    }
    for _ in 0..ROUNDS {
        for count in [2, 1] {
            for name in &names {
                let pin = json!({"instances": count});
                penstock
                    .put(&format!("/v1/autoscale/{name}/blue/pin"), &pin)
                    .await;
            }
            for name in &names {
                penstock.until_ready_instances(name, "blue", count).await;
            }
        }
    }
    let mut sent = 0;
    for load in loads {
        sent += load.stop_without_failures().await;
    }
    let mut scale_ins = 0;
    for name in &names {
        let list = penstock
            .get(&format!("/v1/decisions?endpoint={name}&limit=500"))
            .await;
        let went_in = |d: &&Value| d["granted"].as_u64() < d["from"].as_u64();
        scale_ins += list["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(went_in)
            .count();
    }
    println!("{scale_ins} scale-ins, {sent} requests, 0 failed");
    assert_eq!(scale_ins, ENDPOINTS * ROUNDS);
    eventually("every drained process to end", || async {
        (folder.instance_processes().len() == ENDPOINTS).then_some(())
    })
    .await;
}
