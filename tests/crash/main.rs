//! SIGKILL at random times under load. After each: nothing acknowledged is lost, no decision was carried
//! out twice, the log verifies, and instances converge.
//!
//! `SEED` selects the times and `COUNT` the number of crashes; both are printed.

#![allow(clippy::unwrap_used)] // tests fail by panicking

#[path = "../support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use support::{DataFolder, Penstock, eventually};
use tokio::task::JoinHandle;

/// Acknowledged writes, which must exist after every crash.
#[derive(Default)]
struct Acknowledged {
    /// Position to the label written there.
    writes: BTreeMap<u64, u64>,
    /// Label of the newest attempted write, acknowledged or not.
    tried: u64,
}

struct Rng(u64);

impl Rng {
    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn in_range(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from)
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_done_twice_when_penstock_is_killed_at_any_time() {
    let (seed, count) = (setting("SEED", 1), setting("COUNT", 50));
    println!("SEED={seed} COUNT={count}");
    let mut rng = Rng(seed);
    let folder = DataFolder::new();
    let acknowledged = Arc::new(Mutex::new(Acknowledged::default()));

    let mut penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    for crash in 1..=count {
        let key = penstock.key("iris").await;
        let pin = rng.in_range(1, 5);
        let path = "/v1/autoscale/iris/blue/pin";
        penstock.put(path, &json!({"instances": pin})).await;
        let clients = [
            keep_scoring(&penstock, key),
            keep_writing(&penstock, acknowledged.clone()),
        ];

        // The time of the crash is the experiment, not a wait for an event.
        tokio::time::sleep(Duration::from_millis(rng.in_range(10, 1500))).await;
        penstock.kill().await;
        for client in clients {
            client.abort();
            let _ = client.await;
        }

        penstock = Penstock::start(&folder).await;
        nothing_acknowledged_is_lost(&penstock, &acknowledged).await;
        instances_converge(&penstock, &folder, pin as usize).await;
        no_decision_was_carried_out_twice(&penstock).await;
        penstock.verify().await;
        println!("crash {crash} of {count}: {pin} instances again");
    }
    let replay = penstock
        .post("/v1/events/replay", &json!({"checkDecisions": true}))
        .await;
    assert_eq!(replay["differing"], json!([]), "{replay:#}");
    assert!(penstock.stop().await.success());
    assert_eq!(
        folder.instance_processes(),
        Vec::<u32>::new(),
        "a graceful stop ends every instance"
    );
}

/// Requests through the gateway, one after the other, until the server is gone.
fn keep_scoring(penstock: &Penstock, key: String) -> JoinHandle<()> {
    let request = penstock.score("iris", &key);
    tokio::spawn(async move {
        while let Some(attempt) = request.try_clone() {
            if attempt.send().await.is_err() {
                return;
            }
        }
    })
}

/// Changes a label repeatedly, and records the acknowledged writes.
fn keep_writing(penstock: &Penstock, acknowledged: Arc<Mutex<Acknowledged>>) -> JoinHandle<()> {
    let request = penstock.api(Method::PUT, "/v1/endpoints/iris");
    tokio::spawn(async move {
        loop {
            let label = {
                let mut acknowledged = acknowledged.lock().unwrap();
                acknowledged.tried += 1;
                acknowledged.tried
            };
            let mut document = support::endpoint_document("iris");
            document["metadata"]["labels"] = json!({"write": label.to_string()});
            let attempt = request.try_clone().unwrap().json(&document);
            let Ok(response) = attempt.send().await else {
                return;
            };
            assert!(response.status().is_success(), "{}", response.status());
            let position = response.headers()["penstock-position"]
                .to_str()
                .unwrap()
                .parse()
                .unwrap();
            acknowledged.lock().unwrap().writes.insert(position, label);
        }
    })
}

async fn all_events(penstock: &Penstock) -> Vec<Value> {
    let mut events: Vec<Value> = Vec::new();
    loop {
        let after = events
            .last()
            .map_or(0, |event| event["position"].as_u64().unwrap());
        let page = penstock
            .get(&format!("/v1/events?after={after}&limit=1000"))
            .await;
        let items = page["items"].as_array().unwrap();
        if items.is_empty() {
            return events;
        }
        events.extend(items.iter().cloned());
    }
}

async fn nothing_acknowledged_is_lost(penstock: &Penstock, acknowledged: &Mutex<Acknowledged>) {
    let written: BTreeMap<u64, u64> = all_events(penstock)
        .await
        .iter()
        .filter(|event| event["type"] == "endpoint.updated")
        .map(|event| {
            let label = event["data"]["labels"]["write"].as_str().unwrap();
            (event["position"].as_u64().unwrap(), label.parse().unwrap())
        })
        .collect();
    let acknowledged = acknowledged.lock().unwrap();
    for (position, label) in &acknowledged.writes {
        assert_eq!(
            written.get(position),
            Some(label),
            "acknowledged at {position}"
        );
    }
}

async fn instances_converge(penstock: &Penstock, folder: &DataFolder, count: usize) {
    penstock.until_ready_instances("iris", "blue", count).await;
    let what = format!("{count} processes, one for each instance");
    eventually(&what, || async {
        (folder.instance_processes().len() == count).then_some(())
    })
    .await;
}

/// Asserts that each instance is started once, and that a decision leads to no more scale-outs than it
/// granted.
async fn no_decision_was_carried_out_twice(penstock: &Penstock) {
    let events = all_events(penstock).await;
    let mut started = BTreeSet::new();
    let mut asked: BTreeMap<&str, u64> = BTreeMap::new();
    let mut added: BTreeMap<&str, u64> = BTreeMap::new();
    for event in &events {
        let data = &event["data"];
        match event["type"].as_str().unwrap() {
            "instance.started" if data["adopted"] == false => {
                assert!(
                    started.insert(data["id"].as_str().unwrap()),
                    "started twice: {event:#}"
                );
            }
            "instance.requested" if data["reason"] == "scale-out" => {
                *asked.entry(data["decision"].as_str().unwrap()).or_default() += 1;
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
