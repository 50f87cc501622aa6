//! The log over HTTP, pages, waiting for a position, and routes without a token.
#![allow(clippy::unwrap_used)]

mod support;

use contract::decision::Decision;
use contract::events::Event;
use contract::log::StreamKind;
use domain::autoscale::ENGINE_VERSION;
use domain::zones::ZoneData;
use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use support::{TestWorld, deployment, endpoint};

#[tokio::test(flavor = "multi_thread")]
async fn a_read_with_a_position_reflects_the_write_that_returned_it() {
    let world = TestWorld::start().await;
    for round in 0..20 {
        let name = format!("e{round}");
        let path = format!("/v1/endpoints/{name}");
        let put = world.put(&path, &endpoint(&name)).await.expect(201);
        world.get_at(&path, put.position()).await.expect(200);
    }
    let request = world.request(Method::GET, "/v1/endpoints");
    world
        .send(request.header("penstock-position", "soon"))
        .await
        .expect(400);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_paged_newest_first_and_unknown_filters_match_nothing() {
    let world = TestWorld::start().await;
    let mut position = 0;
    for name in ["a", "b", "c", "d", "e"] {
        position = world
            .put(&format!("/v1/endpoints/{name}"), &endpoint(name))
            .await
            .expect(201)
            .position();
    }
    world.get_at("/v1/endpoints", position).await.expect(200);
    let mut names = Vec::new();
    let mut path = "/v1/endpoints?limit=2".to_owned();
    loop {
        let page = world.get(&path).await.expect(200).body();
        let items = page["items"].as_array().unwrap().clone();
        names.extend(
            items
                .iter()
                .map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()),
        );
        let Some(cursor) = page["nextCursor"].as_str() else {
            break;
        };
        path = format!("/v1/endpoints?limit=2&cursor={cursor}");
    }
    assert_eq!(names, ["e", "d", "c", "b", "a"]);
    for path in [
        "/v1/instances?endpoint=none",
        "/v1/decisions?endpoint=No_Name",
        "/v1/deployments?deployment=none",
    ] {
        assert_eq!(
            world.get(path).await.expect(200).body(),
            json!({"items": [], "nextCursor": null})
        );
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_event_stream_resumes_after_the_last_event_id() {
    let world = TestWorld::start().await;
    world.create_endpoint("a").await;
    let head = world.settled_head().await;
    let request = world
        .request(Method::GET, "/v1/events/stream")
        .header("last-event-id", head - 1);
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut chunks = response.bytes_stream();
    let mut text = String::new();
    world.create_endpoint("b").await;
    while text.matches("event: endpoint.created").count() < 1 {
        text.push_str(std::str::from_utf8(&chunks.next().await.unwrap().unwrap()).unwrap());
    }
    let ids: Vec<u64> = text
        .lines()
        .filter_map(|l| l.strip_prefix("id: ")?.parse().ok())
        .collect();
    assert_eq!(ids[0], head, "{text}");
    assert!(ids.is_sorted());
    let data = text.lines().find_map(|l| l.strip_prefix("data: ")).unwrap();
    let record: Value = serde_json::from_str(data).unwrap();
    assert_eq!(record["position"], head);
    // The server ends its streams when it shuts down.
    world.stop().await;
    while chunks.next().await.is_some_and(|chunk| chunk.is_ok()) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_paged_from_a_position() {
    let world = TestWorld::start().await;
    world.create_endpoint("a").await;
    world.create_deployment("a", "blue").await;
    let head = world.settled_head().await;
    let first = world.get("/v1/events?limit=2").await.expect(200).body();
    assert_eq!(
        (first["head"].as_u64(), first["nextCursor"].as_str()),
        (Some(head), Some("2"))
    );
    let rest = world.get("/v1/events?after=2").await.expect(200).body();
    assert_eq!(rest["items"].as_array().unwrap().len() as u64, head - 2);
    assert_eq!(rest["nextCursor"], Value::Null);
    let replayed = world
        .post("/v1/events/replay", &json!({"checkDecisions": true}))
        .await
        .expect(200)
        .body();
    assert_eq!(
        (replayed["ok"].as_bool(), replayed["decisions"].as_u64()),
        (Some(true), Some(0))
    );
    world.stop().await;
}

/// A decision of this version of the engine.
fn present_decision() -> Decision {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../libs/domain/tests/golden"
    );
    let path = format!("{folder}/decisions/rule.v{ENGINE_VERSION}.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_reports_a_decision_that_the_engine_would_not_make() {
    let world = TestWorld::start().await;
    let mut sound = present_decision();
    // It has a schedule, so it is only reproducible with the same time zones.
    sound.inputs.zone_data = Some(ZoneData::bundled().version().to_owned());
    let forged = Decision {
        granted: sound.granted - 1,
        ..sound.clone()
    };
    let stream = world.stream(StreamKind::Scaling, "iris");
    let decided = |decision| Event::ScalingDecided(Box::new(decision));
    world
        .write(stream, vec![decided(sound), decided(forged)])
        .await;
    let replayed = world
        .post("/v1/events/replay", &json!({"checkDecisions": true}))
        .await;
    let replayed = replayed.expect(200).body();
    assert_eq!(replayed["ok"], false, "{replayed}");
    assert_eq!(
        (replayed["equal"].as_u64(), replayed["different"].as_u64()),
        (Some(1), Some(1))
    );
    assert_eq!(replayed["differing"].as_array().unwrap().len(), 1);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_of_other_versions_are_counted_by_version_and_are_not_faults() {
    let world = TestWorld::start().await;
    let read = |text: &str| -> Decision { serde_json::from_str(text).unwrap() };
    let older = [
        include_str!("../../../libs/domain/tests/golden/older/other.json"),
        include_str!("../../../libs/domain/tests/golden/older/equal.json"),
        include_str!("../../../libs/domain/tests/golden/older/only-words.json"),
        include_str!("../../../libs/domain/tests/golden/older/equal.json"),
    ];
    let mut by_other_zones = present_decision();
    by_other_zones.inputs.zone_data = Some("1999z".to_owned());
    let mut newer = present_decision();
    newer.engine_version += 1;
    newer.granted += 1;
    let others = [newer, by_other_zones, present_decision()];
    let decisions = older.map(read).into_iter().chain(others);
    let decided = decisions.map(|decision| Event::ScalingDecided(Box::new(decision)));
    let stream = world.stream(StreamKind::Scaling, "iris");
    world.write(stream, decided.collect()).await;
    let replayed = world
        .post("/v1/events/replay", &json!({"checkDecisions": true}))
        .await;
    let replayed = replayed.expect(200).body();
    let counts = |version: u32, [equal, only_words, other]: [u64; 3]| {
        json!({"engine": "autoscale", "engineVersion": version,
            "equal": equal, "onlyWords": only_words, "other": other})
    };
    let mut by_zones = counts(ENGINE_VERSION, [1, 0, 0]);
    by_zones["zoneData"] = json!("1999z");
    // One decision of this version does not record its time zones.
    let unrecorded = counts(ENGINE_VERSION, [1, 0, 0]);
    let expected = json!([
        counts(0, [2, 1, 1]),
        unrecorded,
        by_zones,
        counts(ENGINE_VERSION + 1, [0, 0, 1])
    ]);
    assert_eq!(replayed["otherVersions"], expected);
    assert_eq!(replayed["ok"], true, "{replayed}");
    let count = |name: &str| replayed[name].as_u64().unwrap();
    assert_eq!(count("decisions"), 7);
    assert_eq!(
        (count("equal"), count("different"), count("differentOlder")),
        (4, 0, 3)
    );
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_readiness_and_metrics_need_no_token_on_loopback() {
    let world = TestWorld::start().await;
    let get = |path: &str| world.send(world.http.get(format!("http://{}{path}", world.addr)));
    assert_eq!(get("/healthz").await.expect(200).body()["status"], "ok");
    get("/readyz").await.expect(200);
    let other = world.health.component("gateway");
    other.waiting("no routes yet");
    let missing = get("/readyz").await.expect(503).body();
    assert_eq!(missing["missing"], json!(["gateway: no routes yet"]));
    other.ready();
    get("/readyz").await.expect(200);
    get("/metrics").await.expect(200);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_in_the_format_that_is_asked_for() {
    let world = TestWorld::start().await;
    world.get("/v1/endpoints").await.expect(200);
    let metrics = world.get("/metrics").await.expect(200);
    let kind = metrics.header("content-type").unwrap();
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let counter = "# TYPE penstock_control_requests_total counter\n";
    assert!(metrics.text.contains(counter), "{}", metrics.text);
    let request = world.request(http::Method::GET, "/metrics");
    let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3";
    let metrics = world
        .send(request.header("accept", accept))
        .await
        .expect(200);
    let kind = metrics.header("content-type").unwrap();
    assert!(
        kind.starts_with("application/openmetrics-text; version=1.0.0"),
        "{kind}"
    );
    let counter = "# TYPE penstock_control_requests counter\n";
    assert!(metrics.text.contains(counter), "{}", metrics.text);
    assert!(metrics.text.ends_with("# EOF\n"), "{}", metrics.text);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_sources_are_reported_as_unavailable() {
    let world = TestWorld::start().await;
    world.create_endpoint("a").await;
    let put = world
        .put("/v1/endpoints/a/deployments/blue", &deployment("a", "blue"))
        .await
        .expect(201);
    let logs = world
        .get_at("/v1/logs/a/blue", put.position())
        .await
        .expect(503);
    assert_eq!(logs.code(), "unavailable");
    world
        .get("/v1/history?endpoint=a&since=1m")
        .await
        .expect(503);
    world.stop().await;
}
