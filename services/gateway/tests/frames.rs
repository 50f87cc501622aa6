//! Frames count exactly what was sent.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bus::Bus;
use contract::frame::{Frame, Hello, Measure, Role, SourceKind, StatusClasses};
use contract::resources::ModelClientErrors;
use contract::route::RouteUpdate;
use contract::{EndpointKey, Position, Span};
use http::Response;
use http_body_util::BodyExt;
use support::*;
use tokio::task::JoinHandle;

fn spawn_request(gateway: &TestGateway) -> JoinHandle<TestResponse> {
    let address = gateway.address;
    let request = request("/endpoints/iris/score")
        .body(full_body("x"))
        .unwrap();
    tokio::spawn(async move { send(address, request).await })
}

#[tokio::test]
async fn every_bucket_gets_a_frame_each_second_even_an_empty_one() {
    let mut gateway = start(&[]).await;
    let mut seen: BTreeMap<u16, Vec<Arc<Frame>>> = BTreeMap::new();
    while seen.len() < 64 || seen.values().any(|frames| frames.len() < 3) {
        let frame = gateway.frame(|_| true).await;
        seen.entry(frame.bucket.0).or_default().push(frame);
    }
    for frames in seen.values() {
        assert!(
            frames
                .iter()
                .all(|f| f.source.kind == SourceKind::GATEWAY && f.source.id == "gw-1")
        );
        assert!(
            frames
                .iter()
                .all(|f| f.boot == frames[0].boot && f.deployments.is_empty() && !f.goodbye)
        );
        assert!(frames.iter().all(|f| f.start.millis() % 1000 == 0));
        let sequences: Vec<u64> = frames.iter().map(|f| f.sequence).collect();
        assert_eq!(sequences, (0..frames.len() as u64).collect::<Vec<_>>());
        for pair in frames.windows(2) {
            assert_eq!(pair[1].start.secs(), pair[0].start.secs() + 1);
        }
    }
}

#[tokio::test]
async fn the_hello_is_in_the_frames_of_the_first_bucket() {
    let admin = Some("http://gateway.example:7072".to_owned());
    let config = gateway::Config {
        admin: admin.clone(),
        ..config()
    };
    let mut gateway = start_with(config, &[]).await;
    for _ in 0..128 {
        let frame = gateway.frame(|_| true).await;
        let hello = (frame.bucket.0 == 0).then(|| Hello {
            address: admin.clone(),
            backends: Vec::new(),
        });
        assert_eq!(frame.hello, hello);
    }
    let last = gateway.stop().await;
    assert!(
        last.iter()
            .any(|frame| frame.goodbye && frame.bucket.0 == 0),
        "the goodbye is in the same bucket as the hello"
    );
}

#[tokio::test]
async fn a_bucket_reports_the_oldest_slot_allocation_of_its_routes() {
    let first: EndpointKey = EndpointKey::new(&"iris".parse().unwrap());
    // Another endpoint in the same bucket.
    let name = (0..).map(|n| format!("e{n}")).find(|name| {
        let key = EndpointKey::new(&name.parse().unwrap());
        key.bucket() == first.bucket()
    });
    let other = Settings {
        endpoint: Box::leak(name.unwrap().into_boxed_str()),
        ..Settings::default()
    };
    let instance = TestInstance::echo().await;
    let iris = |members| {
        let entries = [instance.entry()];
        with_allocation(members, blue_route(1, &Settings::default(), &entries))
    };
    let same = |members| with_allocation(members, blue_route(1, &other, &[]));
    let mut gateway = start(&[iris(4), same(3)]).await;
    let reached = async |gateway: &mut TestGateway, members: u64| {
        let bucket = first.bucket();
        let reached = |frame: &Frame| frame.bucket == bucket && frame.members.0 == members;
        gateway.frame(reached).await.routes.len()
    };
    assert_eq!(reached(&mut gateway, 3).await, 2);
    gateway.bus.publish_route(Arc::new(same(9)));
    assert_eq!(reached(&mut gateway, 4).await, 2);
    let gone = RouteUpdate {
        route: None,
        revision: Position(2),
        ..iris(4)
    };
    gateway.bus.publish_route(Arc::new(gone));
    assert_eq!(
        reached(&mut gateway, 9).await,
        2,
        "a deleted endpoint has no slots"
    );
}

#[tokio::test]
async fn sums_over_frames_equal_what_was_sent() {
    let instance = TestInstance::start(|request| async move {
        let status = request.uri().query().unwrap().parse::<u16>().unwrap();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::builder()
            .status(status)
            .body(full_body(body))
            .unwrap()
    })
    .await;
    let settings = Settings {
        thresholds_us: vec![1, 60_000_000],
        ..Settings::default()
    };
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let clients: Vec<_> = (0..4u64)
        .map(|client| {
            let address = gateway.address;
            tokio::spawn(async move {
                let mut connection = TestClient::connect(address).await;
                for n in 0..100u64 {
                    let status = match (n + client) % 10 {
                        0 => 404,
                        1 => 500,
                        _ => 200,
                    };
                    let uri = format!("/endpoints/iris/score?{status}");
                    let request = request(&uri).body(full_body(vec![b'x'; n as usize]));
                    connection.send(request.unwrap()).await;
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    let total = gateway.totals(400).await;
    assert_eq!(total.arrivals, 400);
    assert_eq!(
        (
            total.outcomes.success,
            total.outcomes.model_client_error,
            total.outcomes.model_server_error
        ),
        (320, 40, 40)
    );
    assert_eq!(total.outcomes.counted(), 400);
    assert_eq!(total.latency_count, 400);
    let bytes: u64 = 4 * (0..100).sum::<u64>();
    assert_eq!((total.request_bytes, total.response_bytes), (bytes, bytes));
    // The model's 4xx count as good here, its 5xx do not.
    let good = BTreeMap::from([(60_000_000, 360)]);
    assert_eq!(
        total.at_or_below,
        BTreeMap::from([(Measure::LATENCY, good)])
    );
    let classes = StatusClasses {
        successful: 320,
        client_error: 80,
        ..StatusClasses::default()
    };
    assert_eq!(total.status_classes, classes);
    assert_eq!(
        total
            .instance_requests
            .values()
            .copied()
            .collect::<Vec<_>>(),
        [400]
    );
    assert!((1..=4).contains(&total.in_flight_max), "{total:?}");
    let busy: u64 = total.instance_busy_us.values().sum();
    assert!(busy > 0, "{total:?}");
    let rest = gateway.stop().await;
    assert!(
        rest.iter().all(|frame| frame.deployments.is_empty()),
        "nothing is counted twice"
    );
}

#[tokio::test]
async fn an_endpoint_may_count_the_models_4xx_as_bad() {
    let instance = TestInstance::start(|_| async {
        Response::builder().status(422).body(full_body("")).unwrap()
    })
    .await;
    let settings = Settings {
        thresholds_us: vec![60_000_000],
        model_client_errors: ModelClientErrors::Bad,
        ..Settings::default()
    };
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    gateway.post("x").await;
    let total = gateway.totals(1).await;
    assert_eq!(total.outcomes.model_client_error, 1);
    assert!(total.at_or_below.is_empty());
}

#[tokio::test]
async fn a_request_over_several_seconds_is_in_flight_in_each_of_them() {
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let released = std::sync::Mutex::new(Some(released));
    let instance = TestInstance::start(move |_| {
        let released = released.lock().unwrap().take().unwrap();
        async move {
            let _ = released.await;
            Response::new(full_body("done"))
        }
    })
    .await;
    let mut gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let address = gateway.address;
    let pending = tokio::spawn(async move {
        send(
            address,
            request("/endpoints/iris/score")
                .body(full_body("x"))
                .unwrap(),
        )
        .await
    });
    let mut total = FrameTotals::default();
    let mut whole_seconds = 0u64;
    while whole_seconds < 2 {
        let frame = gateway.frame(|frame| !frame.deployments.is_empty()).await;
        let part = &frame.deployments[0];
        assert_eq!((part.in_flight_max, part.instances[0].in_flight), (1, 1));
        // A full second in flight: all of it counts, to the microsecond.
        if part.arrivals == 0 {
            assert_eq!(part.in_flight_us, frame.length_us);
            assert_eq!(part.instances[0].busy_us, frame.length_us);
            let expected = BTreeMap::from([(Role::LIVE, frame.length_us)]);
            assert_eq!(part.instances[0].in_flight_us, expected);
            whole_seconds += 1;
            assert!(part.oldest_in_flight_us > whole_seconds * frame.length_us / 2);
        }
        total.add(&frame);
    }
    release.send(()).unwrap();
    pending.await.unwrap();
    while total.outcomes.success == 0 {
        total.add(&*gateway.frame(|frame| !frame.deployments.is_empty()).await);
    }
    assert_eq!((total.arrivals, total.outcomes.total()), (1, 1));
    // Equal but for the steps between two readings of the clock.
    let busy: u64 = total.instance_busy_us.values().sum();
    assert!(total.in_flight_us.abs_diff(busy) < 10_000, "{total:?}");
    let on_instances: u64 = total.instance_in_flight_us.values().sum();
    assert_eq!(on_instances, total.in_flight_us);
    assert!(total.oldest_in_flight_us > 2_000_000, "{total:?}");
}

#[tokio::test]
async fn time_on_an_instance_counts_each_concurrent_request() {
    let (release, released) = tokio::sync::watch::channel(false);
    let instance = TestInstance::start(move |_| {
        let mut released = released.clone();
        async move {
            let _ = released.wait_for(|released| *released).await;
            Response::new(full_body("done"))
        }
    })
    .await;
    let mut gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let pending: Vec<_> = (0..3).map(|_| spawn_request(&gateway)).collect();
    // A full second in which all three are running.
    loop {
        let frame = gateway.frame(|frame| !frame.deployments.is_empty()).await;
        let part = &frame.deployments[0];
        if part.arrivals == 0 && part.instances[0].in_flight == 3 {
            let expected = BTreeMap::from([(Role::LIVE, 3 * frame.length_us)]);
            assert_eq!(part.instances[0].in_flight_us, expected);
            assert_eq!(part.instances[0].busy_us, frame.length_us);
            break;
        }
    }
    release.send(true).unwrap();
    for response in pending {
        response.await.unwrap();
    }
}

#[tokio::test]
async fn time_in_flight_follows_a_request_that_moves_to_another_instance() {
    let (release, released) = tokio::sync::watch::channel(false);
    let reachable = TestInstance::start(move |_| {
        let mut released = released.clone();
        async move {
            let _ = released.wait_for(|released| *released).await;
            Response::new(full_body("done"))
        }
    })
    .await;
    let unused_address = RawInstance::start().await.address;
    let entries = [entry_at(unused_address), reachable.entry()];
    let mut gateway = start(&[blue_route(1, &Settings::default(), &entries)]).await;
    // The less loaded instance is tried first: at least one of two starts on the unreachable one.
    let pending: Vec<_> = (0..2).map(|_| spawn_request(&gateway)).collect();
    loop {
        let frame = gateway.frame(|frame| !frame.deployments.is_empty()).await;
        let part = &frame.deployments[0];
        let in_flight: u32 = part.instances.iter().map(|i| i.in_flight).sum();
        if part.arrivals == 0 && in_flight == 2 {
            let reported: Vec<_> = part.instances.iter().map(|i| i.id.to_string()).collect();
            assert_eq!(reported, [reachable.entry().id]);
            let expected = BTreeMap::from([(Role::LIVE, 2 * frame.length_us)]);
            assert_eq!(part.instances[0].in_flight_us, expected);
            break;
        }
    }
    release.send(true).unwrap();
    for response in pending {
        assert_eq!(response.await.unwrap().text(), "done");
    }
}

#[tokio::test]
async fn status_classes_count_refusals_but_not_clients_that_left() {
    let instance = TestInstance::start(|_| std::future::pending()).await;
    let mut settings = Settings::one_at_a_time();
    settings.request.max_queue_wait = Span::from_millis(1);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let leaving = spawn_request(&gateway);
    gateway
        .frame(|frame| frame.deployments.iter().any(|part| part.in_flight_max == 1))
        .await;
    assert_eq!(gateway.post("x").await.status, 429);
    leaving.abort();
    let _ = leaving.await;
    let total = gateway.totals(2).await;
    let refused = StatusClasses {
        client_error: 1,
        ..StatusClasses::default()
    };
    assert_eq!(total.status_classes, refused);
    assert_eq!(
        (
            total.outcomes.client_left,
            total.outcomes.refused_for_capacity()
        ),
        (1, 1)
    );
}

#[tokio::test]
async fn the_last_frames_say_goodbye_and_contain_what_was_not_yet_reported() {
    let instance = TestInstance::echo().await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    for _ in 0..10 {
        gateway.post("x").await;
    }
    let frames = gateway.stop().await;
    let goodbyes: BTreeSet<u16> = frames
        .iter()
        .filter(|f| f.goodbye)
        .map(|f| f.bucket.0)
        .collect();
    assert_eq!(goodbyes.len(), 64);
    let mut total = FrameTotals::default();
    frames.iter().for_each(|frame| total.add(frame));
    assert_eq!((total.arrivals, total.outcomes.success), (10, 10));
    let last: BTreeMap<u16, &Arc<Frame>> = frames.iter().map(|f| (f.bucket.0, f)).collect();
    assert!(
        last.values().all(|frame| frame.goodbye),
        "nothing comes after the goodbye"
    );
}

#[tokio::test]
async fn shutdown_finishes_requests_in_flight_and_closes_idle_connections() {
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let released = std::sync::Mutex::new(Some(released));
    let instance = TestInstance::start(move |_| {
        let released = released.lock().unwrap().take();
        async move {
            if let Some(released) = released {
                let _ = released.await;
            }
            Response::new(full_body("done"))
        }
    })
    .await;
    let mut gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let address = gateway.address;
    let pending = tokio::spawn(async move {
        send(
            address,
            request("/endpoints/iris/score")
                .body(full_body("x"))
                .unwrap(),
        )
        .await
    });
    gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.in_flight_max == 1))
        .await;
    gateway.start_shutdown();
    within_timeout("the listener to close", async {
        while tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    release.send(()).unwrap();
    assert_eq!(pending.await.unwrap().text(), "done");
    let frames = gateway.stop().await;
    assert!(frames.iter().any(|frame| frame.goodbye));
}
