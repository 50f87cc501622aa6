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

/// An instance that holds every request until it gets a permit, and knows how many it has.
struct Held {
    instance: Instance,
    gate: Arc<Semaphore>,
    now: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    came: Arc<Notify>,
}

impl Held {
    async fn start() -> Self {
        let gate = Arc::new(Semaphore::new(0));
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let came = Arc::new(Notify::new());
        let (g, n, m, c) = (gate.clone(), now.clone(), most.clone(), came.clone());
        let instance = Instance::start(move |_| {
            let (gate, now, most, came) = (g.clone(), n.clone(), m.clone(), c.clone());
            async move {
                let count = now.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(count, Ordering::SeqCst);
                came.notify_one();
                gate.acquire().await.unwrap().forget();
                now.fetch_sub(1, Ordering::SeqCst);
                Response::new(whole("done"))
            }
        })
        .await;
        Self {
            instance,
            gate,
            now,
            most,
            came,
        }
    }

    async fn until(&self, count: usize) {
        soon("requests on the instance", async {
            while self.now.load(Ordering::SeqCst) != count {
                self.came.notified().await;
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

fn ask(gateway: &Running) -> tokio::task::JoinHandle<Answer> {
    let address = gateway.address;
    tokio::spawn(async move {
        send(
            address,
            request("/endpoints/iris/score").body(whole("x")).unwrap(),
        )
        .await
    })
}

#[tokio::test]
async fn slots_are_never_exceeded_and_the_queue_is_served() {
    let held = Held::start().await;
    let gateway = start(&[blue(1, &limit(3), &[held.instance.place()])]).await;
    let asked: Vec<_> = (0..6).map(|_| ask(&gateway)).collect();
    held.until(3).await;
    held.gate.add_permits(6);
    for answer in asked {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    assert_eq!(held.most.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn slots_of_this_gateway_go_before_those_of_any() {
    let held = Held::start().await;
    let place = held.instance.place().slots("*", 5).slots("gw-1", 2);
    let mut gateway = start(&[blue(1, &limit(3), &[place])]).await;
    let asked: Vec<_> = (0..4).map(|_| ask(&gateway)).collect();
    held.until(2).await;
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 2))
        .await;
    held.gate.add_permits(4);
    for answer in asked {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    assert_eq!(held.most.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn slots_that_grow_serve_those_who_wait() {
    let held = Held::start().await;
    let place = |slots| held.instance.place().slots("*", 1).slots("gw-1", slots);
    let mut gateway = start(&[dealt(1, blue(1, &limit(8), &[place(2)]))]).await;
    let asked: Vec<_> = (0..4).map(|_| ask(&gateway)).collect();
    held.until(2).await;
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 2))
        .await;
    let grown = dealt(2, blue(1, &limit(8), &[place(4)]));
    gateway.bus.publish_route(Arc::new(grown));
    held.until(4).await;
    held.gate.add_permits(4);
    for answer in asked {
        assert_eq!(answer.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn slots_that_shrink_cut_no_request_and_are_given_back_one_by_one() {
    let held = Held::start().await;
    let place = |slots| held.instance.place().slots("*", 1).slots("gw-1", slots);
    let mut gateway = start(&[dealt(1, blue(1, &limit(8), &[place(3)]))]).await;
    let first: Vec<_> = (0..3).map(|_| ask(&gateway)).collect();
    held.until(3).await;
    let iris = blue(1, &limit(8), &[]).endpoint;
    let shrunk = dealt(2, blue(1, &limit(8), &[place(2)]));
    gateway.bus.publish_route(Arc::new(shrunk));
    gateway
        .frame(|frame| frame.bucket == iris.bucket() && frame.members.0 == 2)
        .await;
    let waiting = ask(&gateway);
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 1))
        .await;
    held.gate.add_permits(1);
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.outcomes.success == 1))
        .await;
    assert!(!waiting.is_finished(), "two are still on it");
    held.gate.add_permits(3);
    for answer in first.into_iter().chain([waiting]) {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    assert_eq!(
        held.most.load(Ordering::SeqCst),
        3,
        "never more than at first"
    );
}

#[tokio::test]
async fn more_than_twice_the_limit_is_429_with_retry_after() {
    let held = Held::start().await;
    let mut gateway = start(&[blue(1, &limit(2), &[held.instance.place()])]).await;
    let asked: Vec<_> = (0..4).map(|_| ask(&gateway)).collect();
    held.until(2).await;
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 2))
        .await;
    let answer = gateway.post("x").await;
    assert_eq!(
        (answer.status, answer.code()),
        (StatusCode::TOO_MANY_REQUESTS, "too-many-pending")
    );
    assert_eq!(answer.header("retry-after"), "5");
    held.gate.add_permits(4);
    for answer in asked {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    let mut total = gateway.total(5).await;
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
async fn who_is_queued_longer_than_the_wait_is_429_and_leaves_the_queue() {
    let held = Held::start().await;
    let mut settings = limit(1);
    settings.request.max_queue_wait = Span::from_millis(200);
    let mut gateway = start(&[blue(1, &settings, &[held.instance.place()])]).await;
    let first = ask(&gateway);
    held.until(1).await;
    let second = gateway.post("x").await;
    assert_eq!(
        (second.status, second.code()),
        (StatusCode::TOO_MANY_REQUESTS, "too-many-pending")
    );
    assert_eq!(second.header("retry-after"), "1");
    held.gate.add_permits(2);
    assert_eq!(first.await.unwrap().status, 200);
    assert_eq!(
        gateway.post("x").await.status,
        200,
        "nobody is left in the queue"
    );
    let total = gateway.total(3).await;
    assert!(total.queued_us >= 200_000, "{total:?}");
}

#[tokio::test]
async fn an_instance_that_comes_serves_those_who_wait() {
    let instance = Instance::echo().await;
    let mut gateway = start(&[blue(1, &limit(1), &[])]).await;
    let asked: Vec<_> = (0..2).map(|_| ask(&gateway)).collect();
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 2))
        .await;
    gateway.apply(blue(2, &limit(1), &[instance.place()])).await;
    for answer in asked {
        assert_eq!(answer.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn the_less_loaded_instance_is_chosen() {
    let (one, two) = (Held::start().await, Held::start().await);
    let gateway = start(&[blue(
        1,
        &limit(10),
        &[one.instance.place(), two.instance.place()],
    )])
    .await;
    // One at a time: two that are chosen at the same moment see the same loads.
    let mut asked = Vec::new();
    for count in 1..=10 {
        asked.push(ask(&gateway));
        let on = || {
            (
                one.now.load(Ordering::SeqCst),
                two.now.load(Ordering::SeqCst),
            )
        };
        soon("the next request on an instance", async {
            while on().0 + on().1 != count {
                tokio::select! {
                    () = one.came.notified() => {}
                    () = two.came.notified() => {}
                }
            }
        })
        .await;
        assert!(on().0.abs_diff(on().1) <= 1, "{:?}", on());
    }
    one.gate.add_permits(10);
    two.gate.add_permits(10);
    for answer in asked {
        assert_eq!(answer.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn after_a_frame_reports_the_drain_the_instance_gets_nothing_and_what_it_has_is_reported() {
    let (old, new) = (Held::start().await, Instance::saying("new").await);
    let settings = limit(100);
    let mut gateway = start(&[blue(1, &settings, &[old.instance.place()])]).await;
    let asked = ask(&gateway);
    old.until(1).await;
    let places = [old.instance.place().draining(), new.place()];
    let frame = gateway.apply(blue(2, &settings, &places)).await;
    let on_old = |frame: &contract::frame::Frame| {
        let instances = frame.deployments.iter().flat_map(|d| d.instances.clone());
        let id = old.instance.place().id;
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
        asked.await.unwrap().text(),
        "done",
        "the drain cuts nothing"
    );
    let bucket = frame.bucket;
    gateway
        .frame(|frame| frame.bucket == bucket && on_old(frame) == 0)
        .await;
    // Nothing changes when the instance goes from the route altogether.
    gateway.apply(blue(3, &settings, &[new.place()])).await;
    assert_eq!(gateway.post("x").await.text(), "new");
    assert_eq!(old.most.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_instance_that_leaves_the_route_is_reported_until_it_is_empty() {
    let old = Held::start().await;
    let mut gateway = start(&[blue(1, &limit(1), &[old.instance.place()])]).await;
    let asked = ask(&gateway);
    old.until(1).await;
    let frame = gateway.apply(blue(2, &limit(1), &[])).await;
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
    assert_eq!(asked.await.unwrap().status, 200);
    let bucket = frame.bucket;
    gateway
        .frame(|frame| frame.bucket == bucket && in_flight(frame) == 0)
        .await;
}

#[tokio::test]
async fn scaling_in_under_load_cuts_no_request() {
    let instances = [
        Instance::echo().await,
        Instance::echo().await,
        Instance::echo().await,
    ];
    let settings = limit(50);
    let all: Vec<Place> = instances.iter().map(Instance::place).collect();
    let gateway = start(&[blue(1, &settings, &all)]).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (address, stop) = (gateway.address, stop.clone());
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                let mut good = 0;
                while !stop.is_cancelled() {
                    let request = request("/endpoints/iris/score").body(whole("x"));
                    assert_eq!(client.send(request.unwrap()).await.status, 200);
                    good += 1;
                }
                good
            })
        })
        .collect();
    for round in 0..100 {
        let mut places = all.clone();
        places[round % 3].draining = true;
        gateway
            .bus
            .publish_route(Arc::new(blue(2 + 2 * round as u64, &settings, &places)));
        tokio::task::yield_now().await;
        places.remove(round % 3);
        gateway
            .bus
            .publish_route(Arc::new(blue(3 + 2 * round as u64, &settings, &places)));
        tokio::time::sleep(std::time::Duration::from_millis(3)).await;
    }
    stop.cancel();
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
}
