//! Faults at random moments, round by round: some at a time, or each alone. After each round: the cluster is whole and goes on,
//! nothing acknowledged is lost, no effect happened twice, read models equal a fresh replay, and every
//! request was answered well, but for those to a gateway that was itself killed or paused.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;

use crate::checks::{
    converged, every_keyed_write_happened_once, goes_on, nothing_lost_or_doubled, pin,
    something_was_metered,
};
use crate::cluster::{Cluster, PAIRS};
use crate::faults::{Rng, draw, inject};
use crate::stack::Stack;
use crate::support::{deployment_document, endpoint_document};
use crate::workload::Workload;

fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_or_done_twice_whatever_fails() {
    let (seed, count) = (setting("SEED", 1), setting("COUNT", 8) as usize);
    let brokers = setting("BROKERS", 1) as usize;
    // How many overlap in one round.
    let overlap = setting("OVERLAP", 4).max(1) as usize;
    let only = std::env::var("ONLY").unwrap_or_default();
    println!("SEED={seed} COUNT={count} BROKERS={brokers} OVERLAP={overlap} ONLY={only}");
    let Some(stack) = Stack::start(brokers, &PAIRS).await else {
        return;
    };
    let stack = Arc::new(stack);
    let cluster = Arc::new(Cluster::start(|name| stack.servers_of(name)).await);
    let mut instances = 2;
    let key = deploy(&cluster, instances).await;
    converged(&cluster, std::time::Instant::now(), instances).await;

    let workload = Workload::start(&cluster, &key);
    let mut rng = Rng(seed);
    let mut injected = 0;
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let mut convergences = Vec::new();
    while injected < count {
        let faults = draw(&mut rng, &stack, overlap.min(count - injected), &only);
        assert!(
            !faults.is_empty(),
            "ONLY={only} names no kind of fault that can be injected here"
        );
        println!(
            "faults {} to {} of {count}",
            injected + 1,
            injected + faults.len()
        );
        // Something is under way while the faults strike.
        instances = another(instances, &mut rng);
        pin(&cluster, instances).await;
        let last = inject(&faults, &cluster, &stack, &workload.record).await;
        let took = converged(&cluster, last, instances).await;
        println!("  whole again after {took:?}");
        instances = another(instances, &mut Rng(seed + injected as u64));
        goes_on(&cluster, instances).await;
        workload.until_further().await;
        convergences.push(took);
        for fault in &faults {
            *kinds.entry(fault.kind.name()).or_default() += 1;
        }
        injected += faults.len();
        let promised = workload.promised();
        assert_eq!(
            promised.unexplained,
            Vec::<String>::new(),
            "{}",
            cluster.logs()
        );
        nothing_lost_or_doubled(&cluster, &workload).await;
    }
    let promised = workload.promised();
    let record = workload.record.clone();
    // Each round waited for more of each kind.
    let rounds = convergences.len();
    assert!(promised.acknowledged.len() >= rounds && promised.keyed.len() >= rounds);
    something_was_metered(&cluster, &workload).await;
    workload.end().await;
    let keyed = record.lock().unwrap().keyed.clone();
    every_keyed_write_happened_once(&cluster, &keyed).await;
    for process in cluster.processes.iter().rev() {
        assert!(process.stop().await.success(), "{}", process.log());
    }
    stack.both_sides_are_equal().await;
    convergences.sort();
    println!(
        "SEED={seed}: {injected} faults, {} requests, {} acknowledged writes and {} with a key of their own; nothing lost, nothing doubled; convergence after the last fault of a round: median {:?}, slowest {:?}",
        promised.requests,
        promised.acknowledged.len(),
        keyed.len(),
        convergences[convergences.len() / 2],
        convergences[convergences.len() - 1],
    );
    for (kind, count) in kinds {
        println!("  {count:4} {kind}");
    }
}

/// From 1 to 4, and not the count that is.
fn another(instances: usize, rng: &mut Rng) -> usize {
    (instances - 1 + rng.in_range(1, 4) as usize) % 4 + 1
}

/// An endpoint that serves, and one that is only written about. Returns the key of the first.
async fn deploy(cluster: &Cluster, instances: usize) -> String {
    for name in ["iris", "notes"] {
        let path = format!("/v1/endpoints/{name}");
        cluster.put(&path, &endpoint_document(name)).await;
    }
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
    let keys = cluster.read("/v1/endpoints/iris/keys").await;
    keys["primary"].as_str().unwrap().to_owned()
}
