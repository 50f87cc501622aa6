//! Gateways and nodes become members by their frames, and slots follow the gateways.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, LocalBus, RouteMessage};
use contract::events::{
    Event, InstanceEvent, InstanceRemovalRequested, InstanceRequested, InstanceStarted,
    InstanceUnready, LeaveReason, RemovalReason, RequestReason,
};
use contract::frame::{Frame, Hello, Source, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Position, Uid};
use contract::log::{StreamKind, StreamName};
use contract::resources::{BackendKind, ErrorMapping};
use contract::time::Span;
use runtime::clock::Clock;
use serde_json::json;
use support::{Setup, TestWorld, deployment, endpoint};
use tokio::sync::mpsc;
use uuid::Uuid;

/// Far longer than anything takes; only reached when a test fails.
const TIMEOUT: Duration = Duration::from_secs(20);

async fn with_timeout<T>(what: &str, event: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(TIMEOUT, event).await;
    waited.unwrap_or_else(|_| panic!("timed out: {what}"))
}

fn iris() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

fn instance() -> InstanceId {
    InstanceId::from("iris-blue-1".to_owned())
}

/// A frame of a source that has reached a slot allocation.
fn frame(
    world: &TestWorld,
    kind: SourceKind,
    id: &str,
    bucket: Bucket,
    members: Position,
) -> Frame {
    let backends = match kind == SourceKind::NODE {
        true => vec![BackendKind::SIMULATED],
        false => Vec::new(),
    };
    Frame {
        source: Source {
            kind,
            id: id.into(),
        },
        boot: Uuid::from_u128(1),
        sequence: 0,
        bucket,
        start: world.clock.now(),
        length_us: 1_000_000,
        routes: BTreeMap::new(),
        members,
        hello: (bucket == Bucket(0)).then(|| Hello {
            address: Some(format!("http://{id}.example")),
            backends,
        }),
        goodbye: false,
        deployments: Vec::new(),
    }
}

/// The events about members in the log, in short form.
async fn members(world: &TestWorld) -> Vec<String> {
    let stream = StreamName::members();
    let records = world.store.read_stream(&stream, 0, 1000);
    let summary = |event: &Event| match event {
        Event::MemberJoined(joined) => format!("+{}", joined.source.id),
        Event::MemberLeft(left) => format!("-{} {:?}", left.source.id, left.reason),
        other => panic!("{other:?}"),
    };
    let records = records.await.unwrap();
    records
        .iter()
        .map(|record| summary(&record.event))
        .collect()
}

/// Sends frames until the log has these member events.
async fn send_until(world: &TestWorld, frames: &[Frame], expected: &[&str]) {
    with_timeout("the members", async {
        while members(world).await != expected {
            for frame in frames {
                world.bus.publish_frame(Arc::new(frame.clone()));
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

fn gateway(world: &TestWorld, id: &str) -> Frame {
    frame(world, SourceKind::GATEWAY, id, Bucket(0), Position::START)
}

/// Creates a deployment with one instance that takes ten concurrent requests.
async fn create_serving_deployment(world: &TestWorld) {
    let deploy = async |path: &str, body| world.put(path, &body).await.expect(201);
    deploy("/v1/endpoints/iris", endpoint("iris")).await;
    let mut document = deployment("iris", "blue");
    document["spec"]["requestSettings"] = json!({"maxConcurrentRequestsPerInstance": 10});
    let put = deploy("/v1/endpoints/iris/deployments/blue", document.clone()).await;
    let shown = world.get_at("/v1/endpoints/iris/deployments/blue", put.position());
    let uid = shown.await.body()["metadata"]["uid"]
        .as_str()
        .unwrap()
        .parse::<Uuid>();
    let requested = InstanceRequested {
        id: instance(),
        generation: 1,
        deployment: "iris/blue".parse().unwrap(),
        deployment_uid: Uid(uid.unwrap()),
        revision: 1,
        node: "far".into(),
        decision: None,
        reason: RequestReason::ScaleOut,
        spec: serde_json::from_value(document["spec"].clone()).unwrap(),
    };
    let stream = StreamName::of(StreamKind::Instances, &iris());
    let requested = Event::InstanceRequested(Box::new(requested));
    world.write(stream, vec![requested]).await;
    let started = InstanceStarted {
        id: instance(),
        generation: 1,
        address: "127.0.0.1:1".into(),
        pid: None,
        adopted: false,
    };
    let ready = Event::InstanceReady(InstanceEvent { id: instance() });
    let events = vec![Event::InstanceStarted(started), ready];
    world
        .write(StreamName::of_node(&iris(), "far"), events)
        .await;
}

type Routes = mpsc::Receiver<RouteMessage>;

/// Waits for a route with these slots, and returns the position of its allocation.
async fn until_slots(routes: &mut Routes, expected: &[(&str, u32)]) -> Position {
    let expected: BTreeMap<String, u32> = expected
        .iter()
        .map(|(g, n)| ((*g).to_owned(), *n))
        .collect();
    let mut seen = Vec::new();
    let found = async {
        loop {
            let RouteMessage::Update(update) = routes.recv().await.unwrap() else {
                continue;
            };
            let deployments = update.route.iter().flat_map(|r| r.deployments.values());
            let mut slots = deployments
                .flat_map(|d| &d.instances)
                .map(|i| i.slots.clone());
            let slots = slots.next().unwrap_or_default();
            if slots == expected {
                return update.members;
            }
            seen.push(slots);
        }
    };
    let found = tokio::time::timeout(TIMEOUT, found).await;
    found.unwrap_or_else(|_| panic!("no {expected:?} among {seen:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_are_allocated_in_two_phases_when_a_second_gateway_joins() {
    let world = TestWorld::start().await;
    let mut routes = world.bus.subscribe_routes();
    create_serving_deployment(&world).await;
    until_slots(&mut routes, &[("*", 10)]).await;
    send_until(&world, &[gateway(&world, "a")], &["+a"]).await;
    let both = [gateway(&world, "a"), gateway(&world, "b")];
    send_until(&world, &both, &["+a", "+b"]).await;
    let allocation = until_slots(&mut routes, &[("*", 1), ("a", 5), ("b", 1)]).await;
    let report = |id: &str, members| {
        let bucket = iris().bucket();
        let frame = frame(&world, SourceKind::GATEWAY, id, bucket, members);
        world.bus.publish_frame(Arc::new(frame));
    };
    report("b", allocation);
    report("a", Position(allocation.0 - 1));
    // Waiting is not observable, so allow some time for an update that would be wrong.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(routes.try_recv().is_err(), "`a` has not yielded");
    report("a", allocation);
    until_slots(&mut routes, &[("*", 1), ("a", 5), ("b", 5)]).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_learns_of_changed_paths_and_errors_while_the_instance_stays() {
    let world = TestWorld::start().await;
    let mut routes = world.bus.subscribe_routes();
    create_serving_deployment(&world).await;
    until_slots(&mut routes, &[("*", 10)]).await;
    let path = "/v1/endpoints/iris/deployments/blue";
    let mut document = deployment("iris", "blue");
    document["spec"]["requestSettings"] = json!({"maxConcurrentRequestsPerInstance": 10});
    document["spec"]["routes"] = json!({"scoring": "/invocations"});
    document["spec"]["errorMapping"] = json!("pass");
    world.put(path, &document).await.expect(200);
    let opened = with_timeout("a route with the paths", async {
        loop {
            let RouteMessage::Update(update) = routes.recv().await.unwrap() else {
                continue;
            };
            let deployments = update.route.iter().flat_map(|r| r.deployments.values());
            if let Some(opened) = deployments.into_iter().find(|d| d.routes.is_some()) {
                return opened.clone();
            }
        }
    })
    .await;
    let scoring = opened.routes.and_then(|routes| routes.scoring);
    assert_eq!(scoring.as_deref(), Some("/invocations"));
    assert_eq!(opened.error_mapping, ErrorMapping::Pass);
    let instances: Vec<_> = opened
        .instances
        .iter()
        .map(|i| (&i.id, i.draining))
        .collect();
    assert_eq!(instances, [(&instance(), false)]);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_of_a_gateway_that_left_go_to_the_other() {
    let world = TestWorld::start().await;
    let mut routes = world.bus.subscribe_routes();
    create_serving_deployment(&world).await;
    let both = [gateway(&world, "a"), gateway(&world, "b")];
    send_until(&world, &both, &["+a", "+b"]).await;
    let goodbye = Frame {
        goodbye: true,
        ..gateway(&world, "b")
    };
    send_until(&world, &[goodbye], &["+a", "+b", "-b Goodbye"]).await;
    // Silent gateways are waited for until the clock has advanced.
    world.clock.advance(Span::from_secs(10));
    until_slots(&mut routes, &[("*", 10)]).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_have_caught_up_once_every_route_of_the_log_is_published() {
    let world = TestWorld::start().await;
    create_serving_deployment(&world).await;
    world.wait_until_settled().await;
    // As if it had been killed before it wrote the rows of an event.
    world.stop_control();
    let unready = InstanceUnready {
        id: instance(),
        reason: "it is busy".into(),
    };
    let stream = StreamName::of_node(&iris(), "far");
    let newest = world.write(stream, vec![Event::InstanceUnready(unready)]);
    let newest = Position(newest.await);
    let bus = LocalBus::new();
    let mut routes = bus.subscribe_routes();
    let world = TestWorld::start_with(Setup {
        dir: world.stop().await,
        seed: 2,
        bus,
        ..Setup::default()
    })
    .await;
    let mut published = Position::START;
    while let Some(RouteMessage::Update(update)) =
        with_timeout("the end of the routes", routes.recv()).await
    {
        published = update.revision;
    }
    assert!(published >= newest, "{published} instead of {newest}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_control_records_no_member_twice() {
    let world = TestWorld::start().await;
    let both = [gateway(&world, "a"), gateway(&world, "b")];
    send_until(&world, &both, &["+a", "+b"]).await;
    let world = TestWorld::start_with(Setup {
        dir: world.stop().await,
        seed: 2,
        ..Setup::default()
    })
    .await;
    let three = [both[0].clone(), both[1].clone(), gateway(&world, "c")];
    send_until(&world, &three, &["+a", "+b", "+c"]).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_is_deleted_even_if_a_node_that_left_never_responds() {
    let world = TestWorld::start().await;
    let far = frame(&world, SourceKind::NODE, "far", Bucket(0), Position::START);
    send_until(&world, std::slice::from_ref(&far), &["+far"]).await;
    create_serving_deployment(&world).await;
    world.delete("/v1/endpoints/iris").await.expect(202);
    let removal = Event::InstanceRemovalRequested(InstanceRemovalRequested {
        id: instance(),
        generation: 2,
        node: "far".into(),
        grace: Span::from_secs(1),
        reason: RemovalReason::Deleted,
    });
    world
        .write(
            StreamName::of(StreamKind::Instances, &iris()),
            vec![removal],
        )
        .await;
    let goodbye = Frame {
        goodbye: true,
        ..far
    };
    let left = format!("-far {:?}", LeaveReason::Goodbye);
    send_until(&world, &[goodbye], &["+far", &left]).await;
    let head = world.head().await;
    let shown = world.get_at("/v1/endpoints/iris", head).await;
    shown.expect(200);
    world.clock.advance(domain::members::NODE_GRACE);
    with_timeout("the end of the endpoint", async {
        while world.states().await.contains_key("iris") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_only_a_node_offers_is_accepted_while_the_node_is_a_member() {
    let world = TestWorld::start().await;
    world
        .put("/v1/endpoints/iris", &endpoint("iris"))
        .await
        .expect(201);
    let path = "/v1/endpoints/iris/deployments/blue";
    let of = |backend: &str| {
        let mut document = deployment("iris", "blue");
        document["spec"]["backend"] = json!(backend);
        document
    };
    let rejected = world.put(path, &of("toy")).await.expect(400).body();
    let detail = "`toy` is not a known backend; use one of: process, simulated";
    assert_eq!(rejected["errors"][0]["detail"], detail);
    let mut node = frame(&world, SourceKind::NODE, "far", Bucket(0), Position::START);
    let hello = node.hello.as_mut().unwrap();
    hello.backends = vec!["toy".parse().unwrap(), BackendKind::SIMULATED];
    send_until(&world, &[node], &["+far"]).await;
    let head = world.head().await;
    world.get_at("/v1/endpoints", head).await.expect(200);
    let rejected = world.put(path, &of("cloud")).await.expect(400).body();
    let detail = "no node here offers the backend `cloud`; use one that is offered: simulated, toy";
    assert_eq!(rejected["errors"][0]["detail"], detail);
    world.put(path, &of("toy")).await.expect(201);
}
