//! Services in separate processes, several of each, as in production.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use contract::time::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};

use crate::checks::{wait_for_usage, wait_until_converged};
use crate::cluster::{Cluster, ONE_PER_SERVICE, Process, Role, TWO_OF_EACH};
use crate::stack::Stack;
use crate::support::{deployment_document, endpoint_document, eventually};
use crate::workload::Workload;

struct Scenario {
    cluster: Arc<Cluster>,
    stack: Arc<Stack>,
    key: String,
}

/// Starts two of each process, and `iris/blue` with this many instances.
async fn scenario(instances: usize) -> Option<Scenario> {
    let stack = Arc::new(Stack::start(1, &TWO_OF_EACH).await?);
    let cluster = Cluster::start(|name| stack.urls_of(name)).await;
    Some(deploy_iris(stack, cluster, instances).await)
}

async fn deploy_iris(stack: Arc<Stack>, cluster: Cluster, instances: usize) -> Scenario {
    let cluster = Arc::new(cluster);
    cluster
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    let document = deployment_document("iris", "blue", instances as u32);
    cluster
        .put("/v1/endpoints/iris/deployments/blue", &document)
        .await;
    cluster
        .put(
            "/v1/endpoints/iris/traffic",
            &json!({"traffic": {"blue": 100}}),
        )
        .await;
    wait_until_converged(&cluster, Instant::now(), instances).await;
    let keys = cluster.read("/v1/endpoints/iris/keys").await;
    let key = keys["primary"].as_str().unwrap().to_owned();
    Scenario {
        cluster,
        stack,
        key,
    }
}

impl Scenario {
    async fn score(&self, gateway: &str) -> reqwest::Result<reqwest::Response> {
        let url = self.cluster.get(gateway).addresses().gateway.unwrap();
        self.cluster
            .http
            .post(format!("{url}/endpoints/iris/score"))
            .bearer_auth(&self.key)
            .json(&json!({"data": [[5.1, 3.5, 1.4, 0.2]]}))
            .send()
            .await
    }

    /// Waits until the gateway has saved its routes, which it does once a second.
    async fn until_routes_saved_by(&self, gateway: &str, instances: usize) {
        let routes = self.cluster.get(gateway).folder.path();
        let routes = routes.join("gateway-routes.json");
        eventually(&format!("{gateway} has saved its routes"), || async {
            let saved = std::fs::read_to_string(&routes).ok()?;
            (saved.matches("\"address\"").count() == instances).then_some(())
        })
        .await;
    }

    async fn until_served_by(&self, gateway: &str) {
        eventually(&format!("{gateway} serves"), || async {
            let response = self.score(gateway).await.ok()?;
            response.status().is_success().then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_of_everything_serve_one_endpoint() {
    let Some(scenario) = scenario(4).await else {
        return;
    };
    for gateway in ["gate-1", "gate-2"] {
        scenario.until_served_by(gateway).await;
    }

    let on_nodes = scenario.cluster.instance_processes();
    let counts: Vec<usize> = on_nodes.values().map(Vec::len).collect();
    assert_eq!(counts, [2, 2], "instances are spread over the nodes");

    // The second node advertises another address, and so do its instances.
    let path = "/v1/instances?endpoint=iris&limit=100";
    let listed = scenario.cluster.read(path).await;
    let hosts: BTreeSet<&str> = listed["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|instance| instance["state"] == "ready")
        .map(|instance| instance["address"].as_str().unwrap())
        .map(|address| address.split(':').next().unwrap())
        .collect();
    assert_eq!(hosts, BTreeSet::from(["127.0.0.1", "127.0.0.2"]));

    // Each control plane shows writes through the other one.
    for (writer, reader) in [("control-1", "control-2"), ("control-2", "control-1")] {
        let mut document = endpoint_document("iris");
        document["metadata"]["labels"] = json!({"by": writer});
        let (writer, reader) = (scenario.cluster.get(writer), scenario.cluster.get(reader));
        let written = scenario
            .cluster
            .api(writer, Method::PUT, "/v1/endpoints/iris")
            .json(&document);
        let written = written.send().await.unwrap();
        assert!(written.status().is_success());
        let position = written.headers()["penstock-position"].clone();
        let shown = scenario
            .cluster
            .api(reader, Method::GET, "/v1/endpoints/iris")
            .header("penstock-position", position);
        let shown: Value = shown.send().await.unwrap().json().await.unwrap();
        assert_eq!(shown["metadata"]["labels"], document["metadata"]["labels"]);
    }

    scenario.stack.assert_kafka_equals_store().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn slots_are_divided_among_the_live_gateways() {
    let Some(scenario) = scenario(1).await else {
        return;
    };
    // The test documents allow 4 concurrent requests per instance.
    let saved_routes = |gateway: &'static str| {
        let scenario = &scenario;
        async move {
            let saved = scenario.cluster.get(gateway).folder.path();
            let saved = std::fs::read_to_string(saved.join("gateway-routes.json")).ok()?;
            let all = saved.match_indices("\"slots\"").count();
            (all > 0).then_some(saved)
        }
    };
    let slots = |saved: &str| -> BTreeSet<u64> {
        let start = saved.find("\"slots\":{").unwrap() + "\"slots\":".len();
        let end = start + saved[start..].find('}').unwrap() + 1;
        let slots: Value = serde_json::from_str(&saved[start..end]).unwrap();
        let slots = slots.as_object().unwrap().clone();
        slots
            .iter()
            .filter(|(gateway, _)| *gateway != "*")
            .map(|(_, slots)| slots.as_u64().unwrap())
            .collect()
    };
    eventually("two slots for each of two gateways", || async {
        let saved = saved_routes("gate-1").await?;
        (slots(&saved) == BTreeSet::from([2])).then_some(())
    })
    .await;

    assert!(scenario.cluster.get("gate-2").stop().await.success());
    eventually("all four slots for the remaining gateway", || async {
        let saved = saved_routes("gate-1").await?;
        let whole = saved.contains("\"*\":4") || slots(&saved) == BTreeSet::from([4]);
        whole.then_some(())
    })
    .await;
}

/// Clients per gateway during the outage.
const CLIENTS: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn gateways_serve_while_store_and_bus_are_both_down() {
    let Some(scenario) = scenario(2).await else {
        return;
    };
    for gateway in ["gate-1", "gate-2"] {
        scenario.until_served_by(gateway).await;
    }
    let away =
        Duration::from_secs(std::env::var("AWAY_SECONDS").map_or(5, |text| text.parse().unwrap()));
    scenario.until_routes_saved_by("gate-2", 2).await;
    let workload = Workload::requests(&scenario.cluster, &scenario.key, CLIENTS);
    workload.until_answered_by(&["gate-1", "gate-2"]).await;
    scenario.stack.kafka.kill(0);
    scenario.stack.postgres.kill();
    // Meanwhile one gateway is restarted, which has its routes on disk, and one control plane, which waits
    // for the store.
    let began = Instant::now();
    for name in ["gate-2", "control-2"] {
        scenario.cluster.get(name).kill();
        scenario.cluster.get(name).launch();
    }
    scenario.until_served_by("gate-2").await;
    let outage = ("gate-2", began, Instant::now());
    workload.record.lock().unwrap().outages.push(outage);
    workload.until_answered_by(&["gate-1", "gate-2"]).await;
    // The duration of the outage, not a wait for an event.
    tokio::time::sleep(away).await;
    workload.until_answered_by(&["gate-1", "gate-2"]).await;

    scenario.stack.restart_postgres().await;
    tokio::task::block_in_place(|| scenario.stack.kafka.restart(0));
    wait_until_converged(&scenario.cluster, Instant::now(), 2).await;
    workload.until_answered_by(&["gate-1", "gate-2"]).await;
    let summary = workload.summary();
    workload.stop().await;
    assert_eq!(summary.unexplained, Vec::<String>::new());
    println!(
        "{} requests before, during and after {away:?} without store and bus, 0 failed but of a gateway that was down itself",
        summary.requests
    );
}

/// The leases held by a process, with their holders: those whose newest generation it logged.
async fn leases_of(control_plane: &Process, stack: &Stack) -> Vec<(&'static str, String)> {
    let log = control_plane.full_log();
    let mut leases = Vec::new();
    for lease in ["relay", "members"] {
        let (generation, holder) = stack.lease(lease).await;
        let acquired = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            let fields = &line["fields"];
            fields["lease"] == lease && fields["generation"] == generation
        };
        if log.lines().any(acquired) {
            leases.extend(holder.map(|holder| (lease, holder)));
        }
    }
    leases
}

/// The consumer groups of a control plane.
const GROUPS: [&str; 3] = ["views", "autoscaler", "meter"];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_graceful_stop_hands_over_and_keeps_the_instances_of_a_separate_actuator() {
    let Some(scenario) = scenario(2).await else {
        return;
    };
    let (cluster, stack) = (&scenario.cluster, &scenario.stack);
    scenario.until_served_by("gate-1").await;
    let left = |stopped: &str| match stopped {
        "control-1" => "control-2",
        _ => "control-1",
    };
    let mut leases = leases_of(cluster.get("control-1"), stack).await;
    let stopped = if leases.is_empty() {
        "control-2"
    } else {
        "control-1"
    };
    if leases.is_empty() {
        leases = leases_of(cluster.get(stopped), stack).await;
    }
    assert!(!leases.is_empty(), "no control plane holds a lease");
    for group in GROUPS {
        assert_eq!(stack.members_of(group), 2, "{group}");
    }
    assert_eq!(stack.members_of("actuator"), 2);
    let before = cluster.instance_processes();
    assert_eq!(before["node-1"].len(), 1);

    // A process that falls silent keeps its leases for 5 s and its buckets for 6 s. One that stops
    // gracefully has released both when it exits.
    assert!(cluster.get(stopped).stop().await.success());
    for (lease, holder) in &leases {
        let (_, now) = stack.lease(lease).await;
        assert_ne!(now.as_ref(), Some(holder), "{lease} was not released");
    }
    for group in GROUPS {
        assert_eq!(stack.members_of(group), 1, "{group} was not left");
    }
    assert!(cluster.get("node-1").stop().await.success());
    assert_eq!(stack.members_of("actuator"), 1);
    assert_eq!(cluster.instance_processes(), before);
    scenario.until_served_by("gate-1").await;

    // The remaining control plane plans, and the remaining node starts instances.
    let control_plane = cluster.get(left(stopped));
    let pin = cluster
        .api(control_plane, Method::PUT, "/v1/autoscale/iris/blue/pin")
        .json(&json!({"instances": 3}));
    assert!(pin.send().await.unwrap().status().is_success());
    eventually("three ready instances", || async {
        let path = "/v1/instances?endpoint=iris&limit=500";
        let list = cluster
            .api(control_plane, Method::GET, path)
            .send()
            .await
            .ok()?;
        let list: Value = list.json().await.ok()?;
        let ready = list["items"].as_array()?.iter();
        (ready.filter(|item| item["state"] == "ready").count() == 3).then_some(())
    })
    .await;
    let now = cluster.instance_processes();
    assert_eq!(now["node-1"], before["node-1"]);
    assert_eq!(now["node-2"].len(), 2);

    // After a restart the node finds its instance unchanged, and can stop it.
    for name in [stopped, "node-1"] {
        cluster.get(name).launch();
        cluster.get(name).until_ready().await;
    }
    wait_until_converged(cluster, Instant::now(), 3).await;
    assert_eq!(cluster.instance_processes(), now);
    cluster
        .call(Method::DELETE, "/v1/endpoints/iris", None)
        .await;
    eventually("no process of an instance", || async {
        let mut running = cluster.instance_processes().into_values();
        running.all(|ids| ids.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_control_shows_the_logs_of_instances_on_both_nodes() {
    const HOSTS: [(&str, Role); 2] = [("host-1", Role::Combined), ("host-2", Role::Combined)];
    let Some(stack) = Stack::start(1, &HOSTS).await else {
        return;
    };
    let cluster = Cluster::start_of(&HOSTS, 0, |name| stack.urls_of(name)).await;
    let scenario = deploy_iris(Arc::new(stack), cluster, 2).await;
    let cluster = &scenario.cluster;
    let list = cluster.read("/v1/instances?endpoint=iris").await;
    let items = list["items"].as_array().unwrap();
    let nodes: BTreeSet<_> = items.iter().map(|item| item["node"].to_string()).collect();
    assert_eq!(nodes.len(), 2, "{list:#}");
    for control in cluster.controls() {
        let path = "/v1/logs/iris/blue";
        let logs = cluster.api(control, Method::GET, path).send().await;
        let logs = logs.unwrap().text().await.unwrap();
        assert!(!logs.contains("are unavailable"), "{logs}");
        for item in items {
            let id = item["id"].as_str().unwrap();
            assert!(logs.contains(id), "nothing of {id}:\n{logs}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_process_per_service_serves_scales_and_meters() {
    let Some(stack) = Stack::start(1, &ONE_PER_SERVICE).await else {
        return;
    };
    let stack = Arc::new(stack);
    // Start in the middle of a minute, so that it closes soon.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let into_minute = now.unwrap().as_millis() as i64 % 60_000;
    let offset = 30_000 - into_minute;
    let cluster = Cluster::start_of(&ONE_PER_SERVICE, offset, |name| stack.urls_of(name)).await;
    let scenario = deploy_iris(stack, cluster, 1).await;
    let cluster = &scenario.cluster;
    let workload = Workload::requests(cluster, &scenario.key, 1);
    workload
        .until_answered_by(&["gateway-1", "gateway-2"])
        .await;

    let policy = json!({
        "apiVersion": "penstock/v1", "kind": "Autoscale",
        "spec": {
            "target": {"endpoint": "iris", "deployment": "blue"},
            "cooldown": {"out": "1s"}, "stabilization": {"out": "0s"},
            "profiles": [{
                "name": "default", "capacity": {"min": 1, "max": 2, "default": 1},
                "rules": [{
                    "name": "busy", "metric": {"name": "requests_per_second", "window": "3s"},
                    "when": "> 1", "scale": {"direction": "out", "by": 1}
                }]
            }]
        }
    });
    cluster.put("/v1/autoscale/iris/blue", &policy).await;
    wait_until_converged(cluster, Instant::now(), 2).await;
    let events = cluster.events().await;
    let by_load = |event: &&Value| {
        event["type"] == "scaling.decided"
            && event["data"]["decidedBy"] == "busy"
            && event["data"]["granted"] == 2
    };
    assert!(events.iter().any(|event| by_load(&event)), "not by load");

    wait_for_usage(cluster, &workload, Timestamp::MIN).await;
    let summary = workload.summary();
    workload.stop().await;
    assert_eq!(summary.unexplained, Vec::<String>::new());
    scenario.stack.assert_kafka_equals_store().await;
}
