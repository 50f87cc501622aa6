//! Snapshots: swapped atomically, never backwards, kept across restarts.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use bus::Bus;
use contract::Position;
use contract::frame::Frame;
use contract::ids::EndpointKey;
use contract::route::RouteUpdate;
use support::*;

async fn until_saved(data: &std::path::Path, text: &str) {
    within_timeout("the saved routes", async {
        while !saved_routes(data).is_some_and(|saved| saved.contains(text)) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_last_routes_survive_a_restart_and_only_the_owner_may_read_them() {
    let data = temp_dir();
    let instance = TestInstance::echo().await;
    let settings = Settings {
        keys: vec!["secret"],
        ..Settings::default()
    };
    let config = || gateway::Config {
        data: Some(data.path().to_owned()),
        ..config()
    };
    let gateway = start_with(config(), &[blue_route(7, &settings, &[instance.entry()])]).await;
    gateway.stop().await;
    let mode = std::fs::metadata(data.path().join("gateway-routes.json"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(!saved_routes(data.path()).unwrap().contains("secret"));
    // No control, and a bus without routes.
    let mut again = start_with(config(), &[]).await;
    let request = request("/endpoints/iris/score")
        .header("authorization", "Bearer secret")
        .body(full_body("x"));
    assert_eq!(send(again.address, request.unwrap()).await.text(), "x");
    let bucket = EndpointKey::new(&"iris".parse().unwrap()).bucket();
    let frame = again.frame(|frame| frame.bucket == bucket).await;
    assert_eq!(
        frame.routes.values().copied().collect::<Vec<_>>(),
        [Position(7)]
    );
}

#[tokio::test]
async fn changed_routes_are_saved_while_serving() {
    let data = temp_dir();
    let instance = TestInstance::echo().await;
    let config = gateway::Config {
        data: Some(data.path().to_owned()),
        ..config()
    };
    let gateway = start_with(
        config,
        &[blue_route(1, &Settings::default(), &[instance.entry()])],
    )
    .await;
    until_saved(data.path(), "\"revision\":1").await;
    gateway
        .bus
        .publish_route(Arc::new(blue_route(2, &Settings::default(), &[])));
    until_saved(data.path(), "\"revision\":2").await;
}

#[tokio::test]
async fn corrupt_saved_routes_do_not_prevent_the_start() {
    for text in [
        "",
        "{",
        "{\"format\":99,\"routes\":[]}",
        "{\"format\":1,\"routes\":[{}]}",
    ] {
        let data = temp_dir();
        std::fs::write(data.path().join("gateway-routes.json"), text).unwrap();
        let instance = TestInstance::echo().await;
        let config = gateway::Config {
            data: Some(data.path().to_owned()),
            ..config()
        };
        let gateway = start_with(
            config,
            &[blue_route(1, &Settings::default(), &[instance.entry()])],
        )
        .await;
        assert_eq!(gateway.post("x").await.status, 200, "{text:?}");
    }
}

#[tokio::test]
async fn a_lower_revision_changes_nothing() {
    let data = temp_dir();
    let (new, old) = (
        TestInstance::responding_with("new").await,
        TestInstance::responding_with("old").await,
    );
    let config = || gateway::Config {
        data: Some(data.path().to_owned()),
        ..config()
    };
    start_with(
        config(),
        &[blue_route(9, &Settings::default(), &[new.entry()])],
    )
    .await
    .stop()
    .await;
    // This bus has nothing newer than revision 5, and another endpoint at 6.
    let other = Settings {
        endpoint: "other",
        ..Settings::default()
    };
    let gateway = start_with(
        config(),
        &[
            blue_route(5, &Settings::default(), &[old.entry()]),
            blue_route(6, &other, &[old.entry()]),
        ],
    )
    .await;
    assert_eq!(gateway.post("x").await.text(), "new");
}

#[tokio::test]
async fn within_a_revision_an_older_slot_allocation_is_ignored_and_the_last_of_equal_ones_wins() {
    let instances = [
        TestInstance::responding_with("old").await,
        TestInstance::responding_with("first").await,
        TestInstance::responding_with("second").await,
    ];
    let update = |revision, members, which: usize| {
        let entries = [instances[which].entry()];
        with_allocation(
            members,
            blue_route(revision, &Settings::default(), &entries),
        )
    };
    let mut gateway = start(&[update(5, 7, 1)]).await;
    assert_eq!(gateway.post("x").await.text(), "first");
    gateway.bus.publish_route(Arc::new(update(5, 7, 2)));
    within_timeout("the second step of the allocation", async {
        while gateway.post("x").await.text() != "second" {}
    })
    .await;
    gateway.bus.publish_route(Arc::new(update(5, 6, 0)));
    // Published afterwards, in order: once it is applied, the other has been skipped.
    let other = Settings {
        endpoint: "other",
        ..Settings::default()
    };
    gateway.apply(blue_route(1, &other, &[])).await;
    assert_eq!(gateway.post("x").await.text(), "second");
}

#[tokio::test]
async fn a_deleted_endpoint_is_not_restored_by_an_old_update() {
    let instance = TestInstance::echo().await;
    let update = blue_route(1, &Settings::default(), &[instance.entry()]);
    let mut gateway = start(std::slice::from_ref(&update)).await;
    assert_eq!(gateway.post("x").await.status, 200);
    let gone = RouteUpdate {
        revision: Position(2),
        members: Position::START,
        route: None,
        ..update.clone()
    };
    gateway.apply(gone).await;
    assert_eq!(gateway.post("x").await.code(), "unknown-endpoint");
    gateway.bus.publish_route(Arc::new(update));
    assert_eq!(gateway.post("x").await.code(), "unknown-endpoint");
}

#[tokio::test]
async fn a_deleted_endpoint_eventually_leaves_the_saved_routes_and_frames() {
    let data = temp_dir();
    let config = gateway::Config {
        data: Some(data.path().to_owned()),
        deleted_retention: std::time::Duration::ZERO,
        ..config()
    };
    let kept = Settings {
        endpoint: "lives",
        ..Settings::default()
    };
    let deleted = blue_route(1, &Settings::default(), &[]);
    let mut gateway = start_with(config, &[blue_route(1, &kept, &[]), deleted.clone()]).await;
    until_saved(data.path(), "iris").await;
    let bucket = deleted.endpoint.bucket();
    let of_iris = |frame: &Frame| frame.bucket == bucket;
    let has_route = |frame: &Frame| of_iris(frame) && frame.routes.contains_key(&deleted.endpoint);
    gateway.frame(has_route).await;
    gateway.bus.publish_route(Arc::new(RouteUpdate {
        revision: Position(2),
        route: None,
        ..deleted.clone()
    }));
    gateway
        .frame(|frame| of_iris(frame) && !has_route(frame))
        .await;
    within_timeout("the saved routes without it", async {
        while saved_routes(data.path()).is_none_or(|saved| saved.contains("iris")) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(saved_routes(data.path()).unwrap().contains("lives"));
    // Its name can be used again.
    let mut again = blue_route(3, &Settings::default(), &[]);
    again.members = Position(1);
    gateway.apply(again).await;
}

#[tokio::test]
async fn a_thousand_updates_under_load_fail_no_request_and_each_sees_a_consistent_snapshot() {
    let (blue_instance, green_instance) = (
        TestInstance::responding_with("blue").await,
        TestInstance::responding_with("green").await,
    );
    let settings = Settings::default();
    let update = |revision: u64| {
        let share = (revision % 101) as u8;
        route(
            revision,
            &settings,
            &[
                ("blue", share, &[blue_instance.entry()]),
                ("green", 100 - share, &[green_instance.entry()]),
            ],
        )
    };
    let mut gateway = start(&[update(1)]).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (address, stop) = (gateway.address, stop.clone());
            tokio::spawn(async move {
                let mut client = TestClient::connect(address).await;
                let mut count = 0u64;
                while !stop.is_cancelled() {
                    let response = client
                        .send(
                            request("/endpoints/iris/score")
                                .body(full_body("x"))
                                .unwrap(),
                        )
                        .await;
                    assert_eq!(response.status, 200);
                    assert_eq!(response.text(), response.header("penstock-deployment"));
                    count += 1;
                }
                count
            })
        })
        .collect();
    for revision in 2..=1000 {
        gateway.bus.publish_route(Arc::new(update(revision)));
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    gateway.apply(update(1001)).await;
    stop.cancel();
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
}

#[tokio::test]
async fn new_keys_apply_from_the_next_request() {
    let instance = TestInstance::echo().await;
    let with = |key| Settings {
        keys: vec![key],
        ..Settings::default()
    };
    let mut gateway = start(&[blue_route(1, &with("old"), &[instance.entry()])]).await;
    let request_with = |key: &str| {
        request("/endpoints/iris/score")
            .header("authorization", format!("Bearer {key}"))
            .body(full_body("x"))
            .unwrap()
    };
    assert_eq!(send(gateway.address, request_with("old")).await.status, 200);
    gateway
        .apply(blue_route(2, &with("new"), &[instance.entry()]))
        .await;
    assert_eq!(send(gateway.address, request_with("old")).await.status, 401);
    assert_eq!(send(gateway.address, request_with("new")).await.status, 200);
}
