//! Services in processes of their own, several of each, as a user runs them.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use reqwest::Method;
use serde_json::{Value, json};

use crate::checks::{converged, something_was_metered};
use crate::cluster::{Cluster, PAIRS, Process, Role, SHIPPED};
use crate::stack::Stack;
use crate::support::{deployment_document, endpoint_document, eventually};
use crate::workload::Workload;

struct House {
    cluster: Arc<Cluster>,
    stack: Arc<Stack>,
    key: String,
}

/// `iris/blue` with so many instances, on two of everything.
async fn house(instances: usize) -> Option<House> {
    let stack = Arc::new(Stack::start(1, &PAIRS).await?);
    let cluster = Cluster::start(|name| stack.servers_of(name)).await;
    Some(furnished(stack, cluster, instances).await)
}

async fn furnished(stack: Arc<Stack>, cluster: Cluster, instances: usize) -> House {
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
    converged(&cluster, Instant::now(), instances).await;
    let keys = cluster.read("/v1/endpoints/iris/keys").await;
    let key = keys["primary"].as_str().unwrap().to_owned();
    House {
        cluster,
        stack,
        key,
    }
}

impl House {
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

    /// Routes are saved at the end of each second.
    async fn until_saved_by(&self, gateway: &str, instances: usize) {
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
    let Some(house) = house(4).await else { return };
    for gateway in ["gate-1", "gate-2"] {
        house.until_served_by(gateway).await;
    }

    let on_nodes = house.cluster.instance_processes();
    let counts: Vec<usize> = on_nodes.values().map(Vec::len).collect();
    assert_eq!(counts, [2, 2], "instances are spread over the nodes");

    // The second node is reached under another address, and so are its instances.
    let path = "/v1/instances?endpoint=iris&limit=100";
    let listed = house.cluster.read(path).await;
    let hosts: BTreeSet<&str> = listed["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|instance| instance["state"] == "ready")
        .map(|instance| instance["address"].as_str().unwrap())
        .map(|address| address.split(':').next().unwrap())
        .collect();
    assert_eq!(hosts, BTreeSet::from(["127.0.0.1", "127.0.0.2"]));

    // Each brain shows what the other one was told.
    for (writer, reader) in [("brain-1", "brain-2"), ("brain-2", "brain-1")] {
        let mut document = endpoint_document("iris");
        document["metadata"]["labels"] = json!({"by": writer});
        let (writer, reader) = (house.cluster.get(writer), house.cluster.get(reader));
        let written = house
            .cluster
            .api(writer, Method::PUT, "/v1/endpoints/iris")
            .json(&document);
        let written = written.send().await.unwrap();
        assert!(written.status().is_success());
        let position = written.headers()["penstock-position"].clone();
        let shown = house
            .cluster
            .api(reader, Method::GET, "/v1/endpoints/iris")
            .header("penstock-position", position);
        let shown: Value = shown.send().await.unwrap().json().await.unwrap();
        assert_eq!(shown["metadata"]["labels"], document["metadata"]["labels"]);
    }

    house.stack.both_sides_are_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn slots_are_dealt_over_the_gateways_that_there_are() {
    let Some(house) = house(1).await else { return };
    // The documents of these tests allow 4 requests at once on an instance.
    let dealt = |gateway: &'static str| {
        let house = &house;
        async move {
            let saved = house.cluster.get(gateway).folder.path();
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
        let saved = dealt("gate-1").await?;
        (slots(&saved) == BTreeSet::from([2])).then_some(())
    })
    .await;

    assert!(house.cluster.get("gate-2").stop().await.success());
    eventually("all four slots for the gateway that is left", || async {
        let saved = dealt("gate-1").await?;
        let whole = saved.contains("\"*\":4") || slots(&saved) == BTreeSet::from([4]);
        whole.then_some(())
    })
    .await;
}

/// Of one gateway at once, while store and bus go, are away, and come back.
const CLIENTS: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn gateways_serve_while_store_and_bus_are_both_away() {
    let Some(house) = house(2).await else { return };
    for gateway in ["gate-1", "gate-2"] {
        house.until_served_by(gateway).await;
    }
    let away =
        Duration::from_secs(std::env::var("AWAY_SECONDS").map_or(5, |text| text.parse().unwrap()));
    house.until_saved_by("gate-2", 2).await;
    let workload = Workload::requests(&house.cluster, &house.key, CLIENTS);
    workload.until_answered_by(&["gate-1", "gate-2"]).await;
    house.stack.kafka.kill(0);
    house.stack.postgres.kill();
    // One of the gateways is started anew meanwhile: its routes are on its disk. One of the brains
    // too: it waits for the store.
    let began = Instant::now();
    for name in ["gate-2", "brain-2"] {
        house.cluster.get(name).kill();
        house.cluster.get(name).launch();
    }
    house.until_served_by("gate-2").await;
    let outage = ("gate-2", began, Instant::now());
    workload.record.lock().unwrap().outages.push(outage);
    workload.until_answered_by(&["gate-1", "gate-2"]).await;
    // How long it is to last, not something to wait for.
    tokio::time::sleep(away).await;
    workload.until_answered_by(&["gate-1", "gate-2"]).await;

    house.stack.restart_postgres().await;
    tokio::task::block_in_place(|| house.stack.kafka.restart(0));
    converged(&house.cluster, Instant::now(), 2).await;
    workload.until_answered_by(&["gate-1", "gate-2"]).await;
    let promised = workload.promised();
    workload.end().await;
    assert_eq!(promised.unexplained, Vec::<String>::new());
    println!(
        "{} requests before, during and after {away:?} without store and bus, 0 failed but of a gateway that was down itself",
        promised.requests
    );
}

/// The leases of a process at work, each with its holder: those whose newest generation it logged.
async fn leases_of(brain: &Process, stack: &Stack) -> Vec<(&'static str, String)> {
    let log = brain.whole_log();
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

/// Groups, in which buckets are dealt out, of what runs in a brain.
const GROUPS: [&str; 3] = ["views", "autoscaler", "meter"];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_orderly_stop_hands_over_and_leaves_instances_of_a_separate_actuator() {
    let Some(house) = house(2).await else { return };
    let (cluster, stack) = (&house.cluster, &house.stack);
    house.until_served_by("gate-1").await;
    let left = |stopped: &str| match stopped {
        "brain-1" => "brain-2",
        _ => "brain-1",
    };
    let mut leases = leases_of(cluster.get("brain-1"), stack).await;
    let stopped = if leases.is_empty() {
        "brain-2"
    } else {
        "brain-1"
    };
    if leases.is_empty() {
        leases = leases_of(cluster.get(stopped), stack).await;
    }
    assert!(!leases.is_empty(), "no brain holds a lease");
    for group in GROUPS {
        assert_eq!(stack.members_of(group), 2, "{group}");
    }
    assert_eq!(stack.members_of("actuator"), 2);
    let before = cluster.instance_processes();
    assert_eq!(before["node-1"].len(), 1);

    // What falls silent keeps its leases for 5 s and its buckets for 6 s. What has said goodbye has
    // neither when it has ended.
    assert!(cluster.get(stopped).stop().await.success());
    for (lease, holder) in &leases {
        let (_, now) = stack.lease(lease).await;
        assert_ne!(now.as_ref(), Some(holder), "{lease} was not given back");
    }
    for group in GROUPS {
        assert_eq!(stack.members_of(group), 1, "{group} was not left");
    }
    assert!(cluster.get("node-1").stop().await.success());
    assert_eq!(stack.members_of("actuator"), 1);
    assert_eq!(cluster.instance_processes(), before);
    house.until_served_by("gate-1").await;

    // The brain that is left plans, and the node that is left starts.
    let brain = cluster.get(left(stopped));
    let pin = cluster
        .api(brain, Method::PUT, "/v1/autoscale/iris/blue/pin")
        .json(&json!({"instances": 3}));
    assert!(pin.send().await.unwrap().status().is_success());
    eventually("three ready instances", || async {
        let path = "/v1/instances?endpoint=iris&limit=500";
        let list = cluster.api(brain, Method::GET, path).send().await.ok()?;
        let list: Value = list.json().await.ok()?;
        let ready = list["items"].as_array()?.iter();
        (ready.filter(|item| item["state"] == "ready").count() == 3).then_some(())
    })
    .await;
    let now = cluster.instance_processes();
    assert_eq!(now["node-1"], before["node-1"]);
    assert_eq!(now["node-2"].len(), 2);

    // Its next start finds its instance as it was, and has it in hand: it can end it.
    for name in [stopped, "node-1"] {
        cluster.get(name).launch();
        cluster.get(name).until_ready().await;
    }
    converged(cluster, Instant::now(), 3).await;
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
async fn each_control_shows_the_output_of_instances_beside_the_other() {
    const HOSTS: [(&str, Role); 2] = [("host-1", Role::Host), ("host-2", Role::Host)];
    let Some(stack) = Stack::start(1, &HOSTS).await else {
        return;
    };
    let cluster = Cluster::start_of(&HOSTS, 0, |name| stack.servers_of(name)).await;
    let house = furnished(Arc::new(stack), cluster, 2).await;
    let cluster = &house.cluster;
    let list = cluster.read("/v1/instances?endpoint=iris").await;
    let items = list["items"].as_array().unwrap();
    let nodes: BTreeSet<_> = items.iter().map(|item| item["node"].to_string()).collect();
    assert_eq!(nodes.len(), 2, "{list:#}");
    for control in cluster.controls() {
        let path = "/v1/logs/iris/blue";
        let logs = cluster.api(control, Method::GET, path).send().await;
        let logs = logs.unwrap().text().await.unwrap();
        assert!(!logs.contains("cannot be asked"), "{logs}");
        for item in items {
            let id = item["id"].as_str().unwrap();
            assert!(logs.contains(id), "nothing of {id}:\n{logs}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_service_alone_in_its_process_serves_scales_and_meters() {
    let Some(stack) = Stack::start(1, &SHIPPED).await else {
        return;
    };
    let stack = Arc::new(stack);
    // A minute of usage ends soon.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let into_minute = now.unwrap().as_millis() as i64 % 60_000;
    let offset = 30_000 - into_minute;
    let cluster = Cluster::start_of(&SHIPPED, offset, |name| stack.servers_of(name)).await;
    let house = furnished(stack, cluster, 1).await;
    let cluster = &house.cluster;
    let workload = Workload::requests(cluster, &house.key, 1);
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
    converged(cluster, Instant::now(), 2).await;
    let events = cluster.events().await;
    let by_load = |event: &&Value| {
        event["type"] == "scaling.decided"
            && event["data"]["decidedBy"] == "busy"
            && event["data"]["granted"] == 2
    };
    assert!(events.iter().any(|event| by_load(&event)), "not by load");

    something_was_metered(cluster, &workload).await;
    let promised = workload.promised();
    workload.end().await;
    assert_eq!(promised.unexplained, Vec::<String>::new());
    house.stack.both_sides_are_equal().await;
}
