//! Snapshots: swapped whole, never backwards, kept over restarts.

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
    soon("the saved routes", async {
        while !saved_routes(data).is_some_and(|saved| saved.contains(text)) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_last_routes_survive_a_restart_and_only_the_owner_may_read_them() {
    let data = scratch();
    let instance = Instance::echo().await;
    let settings = Settings {
        keys: vec!["secret"],
        ..Settings::default()
    };
    let config = || gateway::Config {
        data: Some(data.path().to_owned()),
        ..config()
    };
    let gateway = start_with(config(), &[blue(7, &settings, &[instance.place()])]).await;
    gateway.stop().await;
    let mode = std::fs::metadata(data.path().join("gateway-routes.json"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(!saved_routes(data.path()).unwrap().contains("secret"));
    // No control, no bus that knows anything.
    let mut again = start_with(config(), &[]).await;
    let ask = request("/endpoints/iris/score")
        .header("authorization", "Bearer secret")
        .body(whole("x"));
    assert_eq!(send(again.address, ask.unwrap()).await.text(), "x");
    let bucket = EndpointKey::new(&"iris".parse().unwrap()).bucket();
    let frame = again.frame(|frame| frame.bucket == bucket).await;
    assert_eq!(
        frame.routes.values().copied().collect::<Vec<_>>(),
        [Position(7)]
    );
}

#[tokio::test]
async fn changed_routes_are_saved_while_serving() {
    let data = scratch();
    let instance = Instance::echo().await;
    let config = gateway::Config {
        data: Some(data.path().to_owned()),
        ..config()
    };
    let gateway = start_with(
        config,
        &[blue(1, &Settings::default(), &[instance.place()])],
    )
    .await;
    until_saved(data.path(), "\"revision\":1").await;
    gateway
        .bus
        .publish_route(Arc::new(blue(2, &Settings::default(), &[])));
    until_saved(data.path(), "\"revision\":2").await;
}

#[tokio::test]
async fn damaged_saved_routes_do_not_keep_it_from_starting() {
    for text in [
        "",
        "{",
        "{\"format\":99,\"routes\":[]}",
        "{\"format\":1,\"routes\":[{}]}",
    ] {
        let data = scratch();
        std::fs::write(data.path().join("gateway-routes.json"), text).unwrap();
        let instance = Instance::echo().await;
        let config = gateway::Config {
            data: Some(data.path().to_owned()),
            ..config()
        };
        let gateway = start_with(
            config,
            &[blue(1, &Settings::default(), &[instance.place()])],
        )
        .await;
        assert_eq!(gateway.post("x").await.status, 200, "{text:?}");
    }
}

#[tokio::test]
async fn a_lower_revision_changes_nothing() {
    let data = scratch();
    let (new, old) = (Instance::saying("new").await, Instance::saying("old").await);
    let config = || gateway::Config {
        data: Some(data.path().to_owned()),
        ..config()
    };
    start_with(config(), &[blue(9, &Settings::default(), &[new.place()])])
        .await
        .stop()
        .await;
    // This bus knows of nothing newer than revision 5, and of another endpoint at 6.
    let other = Settings {
        endpoint: "other",
        ..Settings::default()
    };
    let gateway = start_with(
        config(),
        &[
            blue(5, &Settings::default(), &[old.place()]),
            blue(6, &other, &[old.place()]),
        ],
    )
    .await;
    assert_eq!(gateway.post("x").await.text(), "new");
}

#[tokio::test]
async fn of_one_revision_an_older_deal_changes_nothing_and_the_later_of_one_deal_counts() {
    let said = [
        Instance::saying("old").await,
        Instance::saying("first").await,
        Instance::saying("second").await,
    ];
    let update = |revision, members, which: usize| {
        let places = [said[which].place()];
        dealt(members, blue(revision, &Settings::default(), &places))
    };
    let mut gateway = start(&[update(5, 7, 1)]).await;
    assert_eq!(gateway.post("x").await.text(), "first");
    gateway.bus.publish_route(Arc::new(update(5, 7, 2)));
    soon("the second step of the deal", async {
        while gateway.post("x").await.text() != "second" {}
    })
    .await;
    gateway.bus.publish_route(Arc::new(update(5, 6, 0)));
    // Told after it, and in order: once it is known, the other was passed over.
    let other = Settings {
        endpoint: "other",
        ..Settings::default()
    };
    gateway.apply(blue(1, &other, &[])).await;
    assert_eq!(gateway.post("x").await.text(), "second");
}

#[tokio::test]
async fn a_deleted_endpoint_is_gone_and_does_not_come_back_by_an_old_update() {
    let instance = Instance::echo().await;
    let update = blue(1, &Settings::default(), &[instance.place()]);
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
async fn a_deleted_endpoint_is_forgotten_in_time_in_the_saved_routes_and_in_frames() {
    let data = scratch();
    let config = gateway::Config {
        data: Some(data.path().to_owned()),
        deleted_kept: std::time::Duration::ZERO,
        ..config()
    };
    let lives = Settings {
        endpoint: "lives",
        ..Settings::default()
    };
    let dies = blue(1, &Settings::default(), &[]);
    let mut gateway = start_with(config, &[blue(1, &lives, &[]), dies.clone()]).await;
    until_saved(data.path(), "iris").await;
    let bucket = dies.endpoint.bucket();
    let of_iris = |frame: &Frame| frame.bucket == bucket;
    let tells = |frame: &Frame| of_iris(frame) && frame.routes.contains_key(&dies.endpoint);
    gateway.frame(tells).await;
    gateway.bus.publish_route(Arc::new(RouteUpdate {
        revision: Position(2),
        route: None,
        ..dies.clone()
    }));
    gateway.frame(|frame| of_iris(frame) && !tells(frame)).await;
    soon("the routes without it", async {
        while saved_routes(data.path()).is_none_or(|saved| saved.contains("iris")) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(saved_routes(data.path()).unwrap().contains("lives"));
    // Its name is free for a new one.
    let mut again = blue(3, &Settings::default(), &[]);
    again.members = Position(1);
    gateway.apply(again).await;
}

#[tokio::test]
async fn a_thousand_updates_under_load_fail_no_request_and_each_sees_one_whole_snapshot() {
    let (blue, green) = (
        Instance::saying("blue").await,
        Instance::saying("green").await,
    );
    let settings = Settings::default();
    let update = |revision: u64| {
        let share = (revision % 101) as u8;
        route(
            revision,
            &settings,
            &[
                ("blue", share, &[blue.place()]),
                ("green", 100 - share, &[green.place()]),
            ],
        )
    };
    let mut gateway = start(&[update(1)]).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (address, stop) = (gateway.address, stop.clone());
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                let mut count = 0u64;
                while !stop.is_cancelled() {
                    let answer = client
                        .send(request("/endpoints/iris/score").body(whole("x")).unwrap())
                        .await;
                    assert_eq!(answer.status, 200);
                    assert_eq!(answer.text(), answer.header("penstock-deployment"));
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
async fn new_keys_count_from_the_next_request_on() {
    let instance = Instance::echo().await;
    let with = |key| Settings {
        keys: vec![key],
        ..Settings::default()
    };
    let mut gateway = start(&[blue(1, &with("old"), &[instance.place()])]).await;
    let ask = |key: &str| {
        request("/endpoints/iris/score")
            .header("authorization", format!("Bearer {key}"))
            .body(whole("x"))
            .unwrap()
    };
    assert_eq!(send(gateway.address, ask("old")).await.status, 200);
    gateway
        .apply(blue(2, &with("new"), &[instance.place()]))
        .await;
    assert_eq!(send(gateway.address, ask("old")).await.status, 401);
    assert_eq!(send(gateway.address, ask("new")).await.status, 200);
}
