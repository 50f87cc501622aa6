//! Instances follow load and schedules; every change is explained by a decision.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use contract::time::{Span, Timestamp};
use serde_json::{Value, json};

use crate::lifecycle::Load;
use crate::support::{DataFolder, Penstock, deployment_document, endpoint_document, eventually};

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
    let pinned = newest_decision(&penstock).await;
    assert_eq!(pinned["outcome"], "pinned");
    let by = pinned["cause"]["detail"].as_str().unwrap();
    assert!(by.contains(", by token:"), "{by}");
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

/// The decisions on iris/blue, oldest first.
async fn decisions(penstock: &Penstock) -> Vec<Value> {
    let path = "/v1/decisions?endpoint=iris&deployment=blue&limit=200";
    let mut items = penstock.get(path).await["items"]
        .as_array()
        .unwrap()
        .clone();
    items.reverse();
    items
}

#[tokio::test]
async fn documents_of_one_apply_begin_with_the_default_count_in_any_order() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let policy = autoscale(json!([{
        "name": "default", "capacity": {"min": 1, "max": 3, "default": 2},
        "rules": [{
            "name": "busy", "metric": {"name": "concurrency", "window": "3s"}, "when": "> 100",
            "scale": {"direction": "out", "by": 1}
        }]
    }]));
    let file = folder.path().join("all.yaml");
    let documents = [
        policy,
        deployment_document("iris", "blue", 1),
        endpoint_document("iris"),
    ];
    let text: Vec<String> = documents.iter().map(Value::to_string).collect();
    std::fs::write(&file, text.join("\n---\n")).unwrap();
    let applied = penstock
        .cli(&["apply", "-f", file.to_str().unwrap(), "--wait"])
        .await;
    let errors = String::from_utf8_lossy(&applied.stderr);
    assert!(applied.status.success(), "{errors}");
    assert!(errors.contains("no rule scales in"), "a warning: {errors}");
    let ready = penstock.instances("iris", "blue", "ready").await;
    assert_eq!(ready.len(), 2, "{errors}");
    let newest = newest_decision(&penstock).await;
    assert_eq!(newest["granted"], 2, "{newest:#}");

    let first = decisions(&penstock).await;
    let first = first
        .iter()
        .find(|one| one["profile"] == "default")
        .unwrap();
    let sentence = first["cause"]["detail"].as_str().unwrap();
    assert_eq!(
        sentence,
        "the first count of profile `default` is its default"
    );
    let id = first["id"].as_str().unwrap();
    for words in [
        &["decisions", "iris/blue"][..],
        &["top", "--once"],
        &["explain", id],
    ] {
        let output = penstock.cli(words).await;
        let text = String::from_utf8(output.stdout).unwrap();
        // The sentence begins with a capital letter in an explanation, and `top` is narrow.
        assert!(text.contains(&sentence[1..30]), "{words:?}: {text}");
    }
}

#[tokio::test]
async fn a_deployment_that_never_starts_keeps_its_count_and_explain_says_why() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    let mut deployment = deployment_document("iris", "blue", 1);
    deployment["spec"]["command"] = json!([
        "sh",
        "-c",
        "echo the weights are gone >&2; exit 7",
        "{port}"
    ]);
    penstock
        .put("/v1/endpoints/iris/deployments/blue", &deployment)
        .await;
    let policy = autoscale(json!([{
        "name": "default", "capacity": {"min": 1, "max": 5, "default": 1},
        "rules": [{
            "name": "always", "metric": {"name": "concurrency", "window": "1s"}, "when": ">= 0",
            "scale": {"direction": "out", "by": 1}
        }]
    }]));
    penstock.put("/v1/autoscale/iris/blue", &policy).await;
    let newest = eventually("a decision that is held", || async {
        let newest = newest_decision(&penstock).await;
        (newest["outcome"] == "held-by-failed-starts").then_some(newest)
    })
    .await;
    assert_eq!(newest["cause"]["kind"], "failed-starts", "{newest:#}");
    let explained = penstock
        .cli(&["explain", newest["id"].as_str().unwrap()])
        .await;
    let text = String::from_utf8(explained.stdout).unwrap();
    assert!(
        text.contains("no instance of the present revision was ever ready"),
        "{text}"
    );
    assert!(text.contains("Now Failing: 0 of "), "{text}");
    assert!(
        text.contains("exit code 7") || text.contains("code 7"),
        "{text}"
    );
    penstock.verify().await;
}

/// The seconds with requests that are in the history.
async fn recorded_seconds(penstock: &Penstock) -> u64 {
    let history = penstock.get("/v1/history?endpoint=iris&step=1s").await;
    let points = history["items"].as_array().unwrap().iter();
    let is_recorded = |point: &&Value| {
        point["requests"].as_u64() > Some(0) && point["coveredSeconds"].as_u64() == Some(1)
    };
    points.filter(is_recorded).count() as u64
}

/// Resumes scale-out, and returns the first decision that changes the count.
async fn first_scale_out(penstock: &Penstock) -> Value {
    let direction = json!({"scaleOut": true});
    penstock
        .post("/v1/autoscale/iris/blue/resume", &direction)
        .await;
    eventually("a scale-out", || async {
        let decision = newest_decision(penstock).await;
        (decision["granted"].as_u64() > decision["from"].as_u64()).then_some(decision)
    })
    .await
}

fn time(recorded: &Value) -> Timestamp {
    recorded["time"].as_str().unwrap().parse().unwrap()
}

/// When scaling was last paused or resumed.
async fn resumed_at(penstock: &Penstock) -> Timestamp {
    let events = penstock.get("/v1/events?after=0&limit=500").await;
    let events = events["items"].as_array().unwrap();
    let resumed = events
        .iter()
        .filter(|event| event["type"] == "autoscale.pause-set");
    resumed.map(time).max().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_crash_the_first_decision_rests_on_what_was_measured_before() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let rule = |window: &str| {
        autoscale(json!([{
            "name": "default", "capacity": {"min": 1, "max": 3, "default": 1},
            "rules": [{
                "name": "busy", "metric": {"name": "requests_per_second", "window": window}, "when": "> 0.1",
                "scale": {"direction": "out", "by": 1}
            }, {
                "name": "burning", "metric": {"name": "cpu_utilization", "window": window}, "when": "> 1000",
                "scale": {"direction": "out", "by": 1}
            }]
        }]))
    };
    let direction = json!({"scaleOut": true});
    penstock.put("/v1/autoscale/iris/blue", &rule("60s")).await;
    penstock
        .post("/v1/autoscale/iris/blue/pause", &direction)
        .await;
    let load = Load::start(&penstock, "iris", 1).await;
    let recorded = eventually("some seconds in the history", || async {
        Some(recorded_seconds(&penstock).await).filter(|seconds| *seconds >= 10)
    })
    .await;
    drop(load);
    penstock.kill().await;
    let penstock = Penstock::start(&folder).await;
    let decision = first_scale_out(&penstock).await;
    for metric in ["requests_per_second", "cpu_utilization"] {
        let signal = &decision["inputs"]["signals"][format!("{metric}/60s/average")];
        let covered = signal["secondsCovered"].as_u64();
        assert!(covered >= Some(recorded), "{recorded} {decision:#}");
    }
    assert_eq!(decision["decidedBy"], "busy", "{decision:#}");
    let took = time(&decision).since(resumed_at(&penstock).await);
    assert!(took <= Span::from_secs(3), "{took} {decision:#}");
    let cpu = &decision["inputs"]["signals"]["cpu_utilization/60s/average"];
    assert!(cpu["instances"].as_f64() > Some(0.0), "{decision:#}");
    penstock.verify().await;
}

/// Applies these documents, and waits as `apply --wait` does.
async fn apply_and_wait(penstock: &Penstock, folder: &DataFolder, documents: &[&Value]) {
    let file = folder.path().join("applied.yaml");
    let text: Vec<String> = documents.iter().map(ToString::to_string).collect();
    std::fs::write(&file, text.join("\n---\n")).unwrap();
    let applied = penstock
        .cli(&["apply", "-f", file.to_str().unwrap(), "--wait"])
        .await;
    let errors = String::from_utf8_lossy(&applied.stderr);
    assert!(applied.status.success(), "{errors}");
}

#[tokio::test]
async fn an_apply_that_waits_ends_with_as_many_instances_as_the_documents_ask_for() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let blue = deployment_document("iris", "blue", 2);
    apply_and_wait(&penstock, &folder, &[&blue]).await;
    assert_eq!(penstock.instances("iris", "blue", "ready").await.len(), 2);

    let policy = |min: u32, when: &str| {
        autoscale(json!([{
            "name": "default", "capacity": {"min": min, "max": 4, "default": min},
            "rules": [{
                "name": "busy", "metric": {"name": "concurrency", "window": "3s"}, "when": when,
                "scale": {"direction": "out", "by": 1}
            }]
        }]))
    };
    apply_and_wait(&penstock, &folder, &[&policy(3, "> 100"), &blue]).await;
    assert_eq!(penstock.instances("iris", "blue", "ready").await.len(), 3);
    apply_and_wait(&penstock, &folder, &[&policy(4, "> 100")]).await;
    assert_eq!(penstock.instances("iris", "blue", "ready").await.len(), 4);
    // It changes nothing, and is waited for all the same.
    apply_and_wait(&penstock, &folder, &[&policy(4, "> 101")]).await;
    let newest = newest_decision(&penstock).await;
    assert_eq!(newest["inputs"]["policyRevision"], 3, "{newest:#}");
}
