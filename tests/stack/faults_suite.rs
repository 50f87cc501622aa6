//! Random faults in rounds, overlapping or one at a time. After each round: the cluster has converged and
//! keeps working, nothing acknowledged is lost, no effect happened twice, read models equal a rebuild, and
//! every request succeeded except those to a gateway that was itself killed or paused.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::time::Timestamp;
use runtime::clock::{Clock, SystemClock};
use serde_json::json;

use crate::checks::{
    assert_keyed_writes_happened_once, assert_nothing_lost_or_duplicated, assert_scaling_works,
    pin, wait_for_usage, wait_until_converged,
};
use crate::cluster::{Cluster, TWO_OF_EACH};
use crate::faults::{Rng, draw_faults, inject};
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
    // Number of faults per round.
    let overlap = setting("OVERLAP", 4).max(1) as usize;
    let only = std::env::var("ONLY").unwrap_or_default();
    println!("SEED={seed} COUNT={count} BROKERS={brokers} OVERLAP={overlap} ONLY={only}");
    let Some(stack) = Stack::start(brokers, &TWO_OF_EACH).await else {
        return;
    };
    let stack = Arc::new(stack);
    let cluster = Arc::new(Cluster::start(|name| stack.urls_of(name)).await);
    let mut instances = 2;
    let key = deploy(&cluster, instances).await;
    wait_until_converged(&cluster, std::time::Instant::now(), instances).await;

    let workload = Workload::start(&cluster, &key);
    let mut rng = Rng(seed);
    let mut injected = 0;
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let mut convergences = Vec::new();
    let mut last_fault = Timestamp::MIN;
    while injected < count {
        let faults = draw_faults(&mut rng, &stack, overlap.min(count - injected), &only);
        assert!(
            !faults.is_empty(),
            "ONLY={only} names no kind of fault that can be injected here"
        );
        println!(
            "faults {} to {} of {count}",
            injected + 1,
            injected + faults.len()
        );
        // A change is in progress while the faults are injected.
        instances = different_count(instances, &mut rng);
        pin(&cluster, instances).await;
        let last = inject(&faults, &cluster, &stack, &workload.record).await;
        last_fault = SystemClock.now();
        let elapsed = wait_until_converged(&cluster, last, instances).await;
        println!("  converged after {elapsed:?}");
        instances = different_count(instances, &mut Rng(seed + injected as u64));
        assert_scaling_works(&cluster, instances).await;
        workload.until_progress().await;
        convergences.push(elapsed);
        for fault in &faults {
            *kinds.entry(fault.kind.name()).or_default() += 1;
        }
        injected += faults.len();
        let summary = workload.summary();
        assert_eq!(
            summary.unexplained,
            Vec::<String>::new(),
            "{}",
            cluster.logs()
        );
        assert_nothing_lost_or_duplicated(&cluster, &workload).await;
    }
    let summary = workload.summary();
    let record = workload.record.clone();
    // Each round waited for progress of each kind.
    let rounds = convergences.len();
    assert!(summary.acknowledged.len() >= rounds && summary.keyed.len() >= rounds);
    wait_for_usage(&cluster, &workload, last_fault).await;
    workload.stop().await;
    let keyed = record.lock().unwrap().keyed.clone();
    assert_keyed_writes_happened_once(&cluster, &keyed).await;
    for process in cluster.processes.iter().rev() {
        assert!(process.stop().await.success(), "{}", process.log());
    }
    stack.assert_kafka_equals_store().await;
    convergences.sort();
    println!(
        "SEED={seed}: {injected} faults, {} requests, {} acknowledged writes and {} with an idempotency key; nothing lost, nothing duplicated; convergence after the last fault of a round: median {:?}, slowest {:?}",
        summary.requests,
        summary.acknowledged.len(),
        keyed.len(),
        convergences[convergences.len() / 2],
        convergences[convergences.len() - 1],
    );
    for (kind, count) in kinds {
        println!("  {count:4} {kind}");
    }
}

/// A count from 1 to 4 other than the current one.
fn different_count(instances: usize, rng: &mut Rng) -> usize {
    (instances - 1 + rng.in_range(1, 4) as usize) % 4 + 1
}

/// Creates an endpoint that serves, and one that only gets writes. Returns the key of the first.
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
