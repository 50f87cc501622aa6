//! Slots, the queue, and draining.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bus::Bus;
use contract::time::Span;
use http::{Response, StatusCode};
use support::*;
use tokio::sync::{Notify, Semaphore};

/// An instance that blocks every request until it gets a permit, and counts concurrent requests.
struct BlockingInstance {
    instance: TestInstance,
    gate: Arc<Semaphore>,
    current: Arc<AtomicUsize>,
    peak: Arc<AtomicUsize>,
    arrived: Arc<Notify>,
}

impl BlockingInstance {
    async fn start() -> Self {
        let gate = Arc::new(Semaphore::new(0));
        let (current, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let arrived = Arc::new(Notify::new());
        let (g, n, m, c) = (gate.clone(), current.clone(), peak.clone(), arrived.clone());
        let instance = TestInstance::start(move |_| {
            let (gate, current, peak, arrived) = (g.clone(), n.clone(), m.clone(), c.clone());
            async move {
                let count = current.fetch_add(1, Ordering::SeqCst) + 1;
                peak.fetch_max(count, Ordering::SeqCst);
                arrived.notify_one();
                gate.acquire().await.unwrap().forget();
                current.fetch_sub(1, Ordering::SeqCst);
                Response::new(full_body("done"))
            }
        })
        .await;
        Self {
            instance,
            gate,
            current,
            peak,
            arrived,
        }
    }

    async fn wait_for_requests(&self, count: usize) {
        within_timeout("requests on the instance", async {
            while self.current.load(Ordering::SeqCst) != count {
                self.arrived.notified().await;
            }
        })
        .await;
    }
}

fn limit(limit: u32) -> Settings {
    let mut settings = Settings::default();
    settings.request.max_concurrent_requests_per_instance = limit;
    settings
}

fn spawn_request(gateway: &TestGateway) -> tokio::task::JoinHandle<TestResponse> {
    let address = gateway.address;
    tokio::spawn(async move {
        send(
            address,
            request("/endpoints/iris/score")
                .body(full_body("x"))
                .unwrap(),
        )
        .await
    })
}

#[tokio::test]
async fn slots_are_never_exceeded_and_the_queue_is_served() {
    let blocking = BlockingInstance::start().await;
    let gateway = start(&[blue_route(1, &limit(3), &[blocking.instance.entry()])]).await;
    let requests: Vec<_> = (0..6).map(|_| spawn_request(&gateway)).collect();
    blocking.wait_for_requests(3).await;
    blocking.gate.add_permits(6);
    for response in requests {
        assert_eq!(response.await.unwrap().status, 200);
    }
    assert_eq!(blocking.peak.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn slots_of_this_gateway_take_precedence_over_the_wildcard() {
    let blocking = BlockingInstance::start().await;
    let entry = blocking.instance.entry().slots("*", 5).slots("gw-1", 2);
    let mut gateway = start(&[blue_route(1, &limit(3), &[entry])]).await;
    let requests: Vec<_> = (0..4).map(|_| spawn_request(&gateway)).collect();
    blocking.wait_for_requests(2).await;
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 2))
        .await;
    blocking.gate.add_permits(4);
    for response in requests {
        assert_eq!(response.await.unwrap().status, 200);
    }
    assert_eq!(blocking.peak.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn added_slots_serve_queued_requests() {
    let blocking = BlockingInstance::start().await;
    let entry = |slots| blocking.instance.entry().slots("*", 1).slots("gw-1", slots);
    let mut gateway = start(&[with_allocation(1, blue_route(1, &limit(8), &[entry(2)]))]).await;
    let requests: Vec<_> = (0..4).map(|_| spawn_request(&gateway)).collect();
    blocking.wait_for_requests(2).await;
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 2))
        .await;
    let grown = with_allocation(2, blue_route(1, &limit(8), &[entry(4)]));
    gateway.bus.publish_route(Arc::new(grown));
    blocking.wait_for_requests(4).await;
    blocking.gate.add_permits(4);
    for response in requests {
        assert_eq!(response.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn removed_slots_abort_no_request_and_are_released_one_by_one() {
    let blocking = BlockingInstance::start().await;
    let entry = |slots| blocking.instance.entry().slots("*", 1).slots("gw-1", slots);
    let mut gateway = start(&[with_allocation(1, blue_route(1, &limit(8), &[entry(3)]))]).await;
    let first: Vec<_> = (0..3).map(|_| spawn_request(&gateway)).collect();
    blocking.wait_for_requests(3).await;
    let iris = blue_route(1, &limit(8), &[]).endpoint;
    let shrunk = with_allocation(2, blue_route(1, &limit(8), &[entry(2)]));
    gateway.bus.publish_route(Arc::new(shrunk));
    gateway
        .frame(|frame| frame.bucket == iris.bucket() && frame.members.0 == 2)
        .await;
    let waiting = spawn_request(&gateway);
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 1))
        .await;
    blocking.gate.add_permits(1);
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.outcomes.success == 1))
        .await;
    assert!(!waiting.is_finished(), "two are still on it");
    blocking.gate.add_permits(3);
    for response in first.into_iter().chain([waiting]) {
        assert_eq!(response.await.unwrap().status, 200);
    }
    assert_eq!(
        blocking.peak.load(Ordering::SeqCst),
        3,
        "never more than at first"
    );
}

#[tokio::test]
async fn more_than_twice_the_limit_is_429_with_retry_after() {
    let blocking = BlockingInstance::start().await;
    let mut gateway = start(&[blue_route(1, &limit(2), &[blocking.instance.entry()])]).await;
    let requests: Vec<_> = (0..4).map(|_| spawn_request(&gateway)).collect();
    blocking.wait_for_requests(2).await;
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 2))
        .await;
    let response = gateway.post("x").await;
    assert_eq!(
        (response.status, response.code()),
        (StatusCode::TOO_MANY_REQUESTS, "too-many-pending")
    );
    assert_eq!(response.header("retry-after"), "5");
    blocking.gate.add_permits(4);
    for response in requests {
        assert_eq!(response.await.unwrap().status, 200);
    }
    let mut total = gateway.totals(5).await;
    total.add(&*gateway.frame(|_| true).await);
    assert_eq!(
        (
            total.outcomes.success,
            total.outcomes.too_many_pending,
            total.arrivals
        ),
        (4, 1, total.arrivals)
    );
}

#[tokio::test]
async fn a_request_queued_for_too_long_is_429_and_leaves_the_queue() {
    let blocking = BlockingInstance::start().await;
    let mut settings = limit(1);
    settings.request.max_queue_wait = Span::from_millis(200);
    let mut gateway = start(&[blue_route(1, &settings, &[blocking.instance.entry()])]).await;
    let first = spawn_request(&gateway);
    blocking.wait_for_requests(1).await;
    let second = gateway.post("x").await;
    assert_eq!(
        (second.status, second.code()),
        (StatusCode::TOO_MANY_REQUESTS, "too-many-pending")
    );
    assert_eq!(second.header("retry-after"), "1");
    blocking.gate.add_permits(2);
    assert_eq!(first.await.unwrap().status, 200);
    assert_eq!(gateway.post("x").await.status, 200, "the queue is empty");
    let total = gateway.totals(3).await;
    assert!(total.queued_us >= 200_000, "{total:?}");
}

#[tokio::test]
async fn an_added_instance_serves_queued_requests() {
    let instance = TestInstance::echo().await;
    let mut gateway = start(&[blue_route(1, &limit(1), &[])]).await;
    let requests: Vec<_> = (0..2).map(|_| spawn_request(&gateway)).collect();
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 2))
        .await;
    gateway
        .apply(blue_route(2, &limit(1), &[instance.entry()]))
        .await;
    for response in requests {
        assert_eq!(response.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn the_less_loaded_instance_is_chosen() {
    let (one, two) = (
        BlockingInstance::start().await,
        BlockingInstance::start().await,
    );
    let gateway = start(&[blue_route(
        1,
        &limit(10),
        &[one.instance.entry(), two.instance.entry()],
    )])
    .await;
    // One at a time: two concurrent choices would see the same loads.
    let mut requests = Vec::new();
    for count in 1..=10 {
        requests.push(spawn_request(&gateway));
        let loads = || {
            (
                one.current.load(Ordering::SeqCst),
                two.current.load(Ordering::SeqCst),
            )
        };
        within_timeout("the next request on an instance", async {
            while loads().0 + loads().1 != count {
                tokio::select! {
                    () = one.arrived.notified() => {}
                    () = two.arrived.notified() => {}
                }
            }
        })
        .await;
        assert!(loads().0.abs_diff(loads().1) <= 1, "{:?}", loads());
    }
    one.gate.add_permits(10);
    two.gate.add_permits(10);
    for response in requests {
        assert_eq!(response.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn after_a_frame_reports_the_drain_the_instance_gets_no_requests_and_its_own_are_reported() {
    let (old, new) = (
        BlockingInstance::start().await,
        TestInstance::responding_with("new").await,
    );
    let settings = limit(100);
    let mut gateway = start(&[blue_route(1, &settings, &[old.instance.entry()])]).await;
    let pending = spawn_request(&gateway);
    old.wait_for_requests(1).await;
    let entries = [old.instance.entry().draining(), new.entry()];
    let frame = gateway.apply(blue_route(2, &settings, &entries)).await;
    let on_old = |frame: &contract::frame::Frame| {
        let instances = frame.deployments.iter().flat_map(|d| d.instances.clone());
        let id = old.instance.entry().id;
        instances
            .filter(|i| i.id.as_str() == id)
            .map(|i| i.in_flight)
            .sum::<u32>()
    };
    assert_eq!(on_old(&frame), 1);
    for _ in 0..50 {
        assert_eq!(gateway.post("x").await.text(), "new");
    }
    old.gate.add_permits(1);
    assert_eq!(
        pending.await.unwrap().text(),
        "done",
        "draining aborts nothing"
    );
    let bucket = frame.bucket;
    gateway
        .frame(|frame| frame.bucket == bucket && on_old(frame) == 0)
        .await;
    // Removing the instance from the route changes nothing.
    gateway
        .apply(blue_route(3, &settings, &[new.entry()]))
        .await;
    assert_eq!(gateway.post("x").await.text(), "new");
    assert_eq!(old.peak.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_instance_removed_from_the_route_is_reported_until_it_is_empty() {
    let old = BlockingInstance::start().await;
    let mut gateway = start(&[blue_route(1, &limit(1), &[old.instance.entry()])]).await;
    let pending = spawn_request(&gateway);
    old.wait_for_requests(1).await;
    let frame = gateway.apply(blue_route(2, &limit(1), &[])).await;
    let in_flight = |frame: &contract::frame::Frame| -> u32 {
        frame
            .deployments
            .iter()
            .flat_map(|d| &d.instances)
            .map(|i| i.in_flight)
            .sum()
    };
    assert_eq!(in_flight(&frame), 1);
    old.gate.add_permits(1);
    assert_eq!(pending.await.unwrap().status, 200);
    let bucket = frame.bucket;
    gateway
        .frame(|frame| frame.bucket == bucket && in_flight(frame) == 0)
        .await;
}

#[tokio::test]
async fn scaling_in_under_load_aborts_no_request() {
    let instances = [
        TestInstance::echo().await,
        TestInstance::echo().await,
        TestInstance::echo().await,
    ];
    let settings = limit(50);
    let all: Vec<InstanceEntry> = instances.iter().map(TestInstance::entry).collect();
    let gateway = start(&[blue_route(1, &settings, &all)]).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (address, stop) = (gateway.address, stop.clone());
            tokio::spawn(async move {
                let mut client = TestClient::connect(address).await;
                let mut good = 0;
                while !stop.is_cancelled() {
                    let request = request("/endpoints/iris/score").body(full_body("x"));
                    assert_eq!(client.send(request.unwrap()).await.status, 200);
                    good += 1;
                }
                good
            })
        })
        .collect();
    for round in 0..100 {
        let mut entries = all.clone();
        entries[round % 3].draining = true;
        gateway.bus.publish_route(Arc::new(blue_route(
            2 + 2 * round as u64,
            &settings,
            &entries,
        )));
        tokio::task::yield_now().await;
        entries.remove(round % 3);
        gateway.bus.publish_route(Arc::new(blue_route(
            3 + 2 * round as u64,
            &settings,
            &entries,
        )));
        tokio::time::sleep(std::time::Duration::from_millis(3)).await;
    }
    stop.cancel();
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
}
