//! Events that this version cannot read: one endpoint's poison keeps nothing else from working, and
//! what becomes readable again is shown again.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use control::ViewsProjector;
use domain::views::MODELS;
use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::Connection as _;
use store::Store;
use support::{Setup, World, endpoint};
use tempfile::TempDir;

/// Changes a stored event behind the store's back, as another version or a damaged disk would.
async fn execute(dir: &TempDir, sql: &'static str) {
    let url = format!("sqlite:{}", dir.path().join("penstock.db").display());
    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::query(sql).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

async fn restart(dir: Arc<TempDir>, seed: u64) -> World {
    let setup = Setup {
        dir,
        seed,
        ..Setup::default()
    };
    World::start_with(setup).await
}

async fn keep_rows(dir: &TempDir) {
    execute(dir, "CREATE TABLE old_rows AS SELECT * FROM rows").await;
    execute(dir, "CREATE TABLE old_cursors AS SELECT * FROM cursors").await;
}

/// As if control had ended before it wrote what came after [`keep_rows`].
async fn take_rows_back(dir: &TempDir) {
    execute(dir, "DELETE FROM rows").await;
    execute(dir, "INSERT INTO rows SELECT * FROM old_rows").await;
    execute(dir, "DELETE FROM cursors").await;
    execute(dir, "INSERT INTO cursors SELECT * FROM old_cursors").await;
}

const POISON_ROSE: &str = "UPDATE events SET type = 'endpoint.not-invented-yet' \
     WHERE stream = 'endpoint/default/rose' AND version = 1";

/// With `iris` and `rose`, whose first event cannot be read; says where that is.
async fn with_poisoned_rose() -> (World, u64) {
    let world = World::with_iris().await;
    let position = world.with_endpoint("rose").await.position();
    world.settled().await;
    let dir = world.stop().await;
    execute(&dir, POISON_ROSE).await;
    (restart(dir, 2).await, position)
}

#[tokio::test(flavor = "multi_thread")]
async fn control_starts_although_its_newest_endpoint_cannot_be_read() {
    let (world, _) = with_poisoned_rose().await;
    world.get("/v1/endpoints/iris").await.expect(200);
    let made = world.put("/v1/endpoints/lily", &endpoint("lily")).await;
    made.expect(201);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seal_key_is_held_against_the_newest_endpoint_that_can_be_read() {
    let (world, _) = with_poisoned_rose().await;
    assert!(!world.health.remarks().iter().any(|r| r.contains("seal")));
    let dir = world.stop().await;
    std::fs::remove_file(dir.path().join("seal.key")).unwrap();
    let world = restart(dir, 3).await;
    let remarks = world.health.remarks();
    assert!(remarks.iter().any(|r| r.contains("seal")), "{remarks:?}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_cannot_be_read_stands_in_its_place_in_pages_and_streams() {
    let (world, poison) = with_poisoned_rose().await;
    let head = world.head().await;
    let page = world.get("/v1/events?limit=1000").await.expect(200).body();
    let items = page["items"].as_array().unwrap();
    assert_eq!(items.last().unwrap()["position"], head);
    let shown = items.iter().find(|item| item["position"] == poison);
    let shown = shown.unwrap();
    assert_eq!(shown["type"], "endpoint.not-invented-yet");
    let detail = shown["unreadable"].as_str().unwrap();
    assert!(detail.contains("endpoint.not-invented-yet"), "{detail}");

    let request = world
        .request(Method::GET, "/v1/events/stream")
        .header("last-event-id", poison - 1);
    let mut chunks = request.send().await.unwrap().bytes_stream();
    let mut text = String::new();
    world.with_endpoint("lily").await;
    while !text.contains("event: endpoint.created") {
        text.push_str(std::str::from_utf8(&chunks.next().await.unwrap().unwrap()).unwrap());
    }
    let first = format!("id: {poison}\nevent: unreadable\n");
    assert!(text.starts_with(&first), "{text}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_names_what_it_could_not_read() {
    let (world, poison) = with_poisoned_rose().await;
    let body = json!({"checkDecisions": true});
    let replayed = world.post("/v1/events/replay", &body).await;
    let replayed = replayed.expect(200).body();
    assert_eq!(
        (&replayed["ok"], &replayed["unreadable"]),
        (&json!(false), &json!(1))
    );
    let problem = replayed["problems"][0].as_str().unwrap();
    assert!(
        problem.contains(&format!("position {poison} ")),
        "{problem}"
    );
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_may_name_the_position_of_an_event_that_cannot_be_read() {
    let (world, poison) = with_poisoned_rose().await;
    world.get_at("/v1/endpoints/iris", poison).await.expect(200);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_parking_left_out_are_written_when_the_event_can_be_read_again() {
    let (world, _) = with_rose_parked_on_her_way().await;
    let dir = world.stop().await;
    execute(
        &dir,
        "UPDATE events SET type = substr(type, 3) WHERE type LIKE 'x-%'",
    )
    .await;

    let world = restart(dir, 4).await;
    let shown = world.get("/v1/endpoints/rose").await.expect(200).body();
    assert_eq!(shown["metadata"]["labels"]["colour"], "blue", "{shown}");
    let verified = world.get("/v1/events/verify").await.expect(200).body();
    assert_eq!(verified["problems"], json!([]));
    assert_eq!(parked(&world).await, json!([]));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_behind_go_on_from_what_the_log_holds_before_them() {
    let world = World::with_blue().await;
    world.settled().await;
    let dir = world.stop().await;
    keep_rows(&dir).await;
    let world = restart(dir, 2).await;
    let traffic = json!({"traffic": {"blue": 100}});
    let put = world.put("/v1/endpoints/iris/traffic", &traffic).await;
    put.expect(200);
    world.settled().await;
    let dir = world.stop().await;
    take_rows_back(&dir).await;
    execute(&dir, "DELETE FROM snapshots").await;

    let world = restart(dir, 3).await;
    // What is not written yet is not compared.
    world.settled().await;
    let verified = world.get("/v1/events/verify").await.expect(200).body();
    assert_eq!(verified["problems"], json!([]));
    world.stop().await;
}

/// With `rose`, whose label `red` cannot be read, and was never in her rows. Others come after it. Says
/// where it is.
async fn with_rose_parked_on_her_way() -> (World, u64) {
    let labelled = |colour: &str| {
        let mut labelled = endpoint("rose");
        labelled["metadata"]["labels"] = json!({"colour": colour});
        labelled
    };
    let world = World::start().await;
    world.with_endpoint("rose").await;
    world.settled().await;
    let dir = world.stop().await;
    keep_rows(&dir).await;
    let world = restart(dir, 2).await;
    let put = world.put("/v1/endpoints/rose", &labelled("red")).await;
    let poison = put.expect(200).position();
    let put = world.put("/v1/endpoints/rose", &labelled("blue")).await;
    put.expect(200);
    world.settled().await;
    let dir = world.stop().await;
    take_rows_back(&dir).await;
    execute(
        &dir,
        "UPDATE events SET type = 'x-' || type WHERE stream = 'endpoint/default/rose' AND data LIKE '%red%'",
    )
    .await;
    // As for a release that folds otherwise: the next life begins with the log.
    execute(&dir, "DELETE FROM snapshots").await;
    let world = restart(dir, 3).await;
    while parked(&world).await == json!([]) {
        tokio::task::yield_now().await;
    }
    let head = world.head().await;
    world.get_at("/v1/endpoints", head).await.expect(200);
    (world, poison)
}

async fn parked(world: &World) -> Value {
    let parked = world.get("/v1/events/parked").await.expect(200).body();
    parked["items"].clone()
}

/// A rebuild changes nothing of what the running consumer has left, and makes the same from nothing.
/// Gives the endpoints that are parked.
async fn a_rebuild_makes_the_same(dir: &TempDir, poison: u64) -> Vec<(String, u64)> {
    let url = format!("sqlite:{}", dir.path().join("penstock.db").display());
    let rebuilt = async || {
        let store = Store::open(&url).await.unwrap();
        let mut projector = ViewsProjector::for_rebuild();
        let changed = store::rebuild(&store, &mut projector, MODELS)
            .await
            .unwrap();
        let mut fresh = ViewsProjector::default();
        let report = store::verify(&store, &mut fresh, MODELS).await.unwrap();
        store.close().await;
        // It was changed after it was written, which the next event tells too.
        let [problem, broken] = &report.problems[..] else {
            panic!("{report:?}");
        };
        let sentence = format!("the event at {poison} was changed");
        assert!(broken.contains(&sentence), "{broken}");
        assert!(
            problem.contains(&format!("(position {poison})")),
            "{problem}"
        );
        assert_eq!(fresh.parked(), projector.parked());
        let parked = projector.parked().iter();
        let parked = parked.map(|(key, view)| (key.to_string(), view.position.0));
        (changed, parked.collect::<Vec<_>>())
    };
    let (changed, parked) = rebuilt().await;
    assert_eq!(changed, 0, "of what the consumer has written");
    execute(dir, "DELETE FROM rows WHERE model <> 'parked'").await;
    let (changed, again) = rebuilt().await;
    assert!(changed > 0);
    assert_eq!(parked, again);
    parked
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_leaves_a_parked_endpoint_as_it_was_before_the_event() {
    let (world, poison) = with_rose_parked_on_her_way().await;
    let dir = world.stop().await;
    let parked = a_rebuild_makes_the_same(&dir, poison).await;
    assert_eq!(parked, [("default/rose".to_owned(), poison)]);
}

async fn skip(world: &World, poison: u64) {
    let skip = format!("/v1/events/{poison}/skip");
    let body = json!({"consumer": "views", "reason": "the test says so"});
    world.post(&skip, &body).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_passes_over_what_was_skipped_once_the_endpoint_is_taken_back() {
    let (world, poison) = with_rose_parked_on_her_way().await;
    skip(&world, poison).await;
    let body = json!({"consumer": "views"});
    let unpark = world.post("/v1/endpoints/rose/unpark", &body).await;
    unpark.expect(200);
    let head = world.head().await;
    let shown = world.get_at("/v1/endpoints/rose", head).await.expect(200);
    assert_eq!(shown.body()["metadata"]["labels"]["colour"], "blue");
    let dir = world.stop().await;
    let parked = a_rebuild_makes_the_same(&dir, poison).await;
    assert_eq!(parked, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_skipped_stays_parked_until_the_endpoint_is_taken_back() {
    let (world, poison) = with_rose_parked_on_her_way().await;
    skip(&world, poison).await;
    let head = world.head().await;
    world.get_at("/v1/endpoints", head).await.expect(200);
    let dir = world.stop().await;
    let parked = a_rebuild_makes_the_same(&dir, poison).await;
    assert_eq!(parked, [("default/rose".to_owned(), poison)]);
}
