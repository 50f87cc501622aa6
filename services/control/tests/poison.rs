//! Events that this version cannot read: they do not affect other endpoints, and an endpoint recovers when
//! its events become readable again.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use contract::ids::Position;
use contract::time::Timestamp;
use control::ViewsProjector;
use domain::views::MODELS;
use futures::StreamExt;
use reqwest::Method;
use runtime::parking::{ParkedView, record_parked};
use serde_json::{Value, json};
use sqlx::Connection as _;
use store::Store;
use support::{Setup, TestWorld, endpoint};
use tempfile::TempDir;

/// Changes a stored event behind the store's back, as another version or a damaged disk would.
async fn execute(dir: &TempDir, sql: &'static str) {
    let url = format!("sqlite:{}", dir.path().join("penstock.db").display());
    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::query(sql).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

async fn restart(dir: Arc<TempDir>, seed: u64) -> TestWorld {
    let setup = Setup {
        dir,
        seed,
        ..Setup::default()
    };
    TestWorld::start_with(setup).await
}

async fn save_rows(dir: &TempDir) {
    execute(dir, "CREATE TABLE old_rows AS SELECT * FROM rows").await;
    execute(dir, "CREATE TABLE old_cursors AS SELECT * FROM cursors").await;
}

/// As if control had stopped before it wrote anything after [`save_rows`].
async fn restore_rows(dir: &TempDir) {
    execute(dir, "DELETE FROM rows").await;
    execute(dir, "INSERT INTO rows SELECT * FROM old_rows").await;
    execute(dir, "DELETE FROM cursors").await;
    execute(dir, "INSERT INTO cursors SELECT * FROM old_cursors").await;
}

const POISON_ROSE: &str = "UPDATE events SET type = 'endpoint.not-invented-yet' \
     WHERE stream = 'endpoint/default/rose' AND version = 1";

/// Starts with `iris` and `rose`, whose first event cannot be read; returns its position.
async fn with_poisoned_rose() -> (TestWorld, u64) {
    let world = TestWorld::with_iris().await;
    let position = world.create_endpoint("rose").await.position();
    world.wait_until_settled().await;
    let dir = world.stop().await;
    execute(&dir, POISON_ROSE).await;
    (restart(dir, 2).await, position)
}

#[tokio::test(flavor = "multi_thread")]
async fn control_starts_even_if_its_newest_endpoint_cannot_be_read() {
    let (world, _) = with_poisoned_rose().await;
    world.get("/v1/endpoints/iris").await.expect(200);
    let created = world.put("/v1/endpoints/lily", &endpoint("lily")).await;
    created.expect(201);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seal_key_is_checked_against_the_newest_readable_endpoint() {
    let (world, _) = with_poisoned_rose().await;
    assert!(!world.health.warnings().iter().any(|r| r.contains("seal")));
    let dir = world.stop().await;
    std::fs::remove_file(dir.path().join("seal.key")).unwrap();
    let world = restart(dir, 3).await;
    let warnings = world.health.warnings();
    assert!(warnings.iter().any(|r| r.contains("seal")), "{warnings:?}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_event_appears_in_pages_and_streams() {
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
    world.create_endpoint("lily").await;
    while !text.contains("event: endpoint.created") {
        text.push_str(std::str::from_utf8(&chunks.next().await.unwrap().unwrap()).unwrap());
    }
    let first = format!("id: {poison}\nevent: unreadable\n");
    assert!(text.starts_with(&first), "{text}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_reports_unreadable_events() {
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
async fn a_read_can_require_the_position_of_an_unreadable_event() {
    let (world, poison) = with_poisoned_rose().await;
    world.get_at("/v1/endpoints/iris", poison).await.expect(200);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_missed_while_parked_are_written_once_the_event_is_readable_again() {
    let (world, _) = with_parked_rose().await;
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
async fn rows_missed_of_no_endpoint_are_written_once_the_event_is_readable_again() {
    let world = TestWorld::start().await;
    let body = json!({"name": "bob", "role": "viewer"});
    let granted = world.post("/v1/access", &body).await.expect(201);
    world.wait_until_settled().await;
    let dir = world.stop().await;
    // As an older replica leaves it that could not read the event.
    execute(
        &dir,
        "DELETE FROM rows WHERE model = 'access' AND key = 'bob'",
    )
    .await;
    let url = format!("sqlite:{}", dir.path().join("penstock.db").display());
    let store = Store::open(&url).await.unwrap();
    let skipped = ParkedView {
        consumer: "views".into(),
        endpoint: None,
        position: Position(granted.position()),
        event_type: "access.granted".into(),
        detail: "of a newer release".into(),
        since: Timestamp::from_secs(1),
    };
    record_parked(&store, None, skipped).await.unwrap();
    store.close().await;

    let world = restart(dir, 2).await;
    while parked(&world).await != json!([]) {
        tokio::task::yield_now().await;
    }
    let listed = world.get("/v1/access").await.expect(200).body();
    assert!(listed.to_string().contains("bob"), "{listed}");
    let verified = world.get("/v1/events/verify").await.expect(200).body();
    assert_eq!(verified["problems"], json!([]));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_behind_resume_from_the_state_before_them() {
    let world = TestWorld::with_blue().await;
    world.wait_until_settled().await;
    let dir = world.stop().await;
    save_rows(&dir).await;
    let world = restart(dir, 2).await;
    let traffic = json!({"traffic": {"blue": 100}});
    let put = world.put("/v1/endpoints/iris/traffic", &traffic).await;
    put.expect(200);
    world.wait_until_settled().await;
    let dir = world.stop().await;
    restore_rows(&dir).await;
    execute(&dir, "DELETE FROM snapshots").await;

    let world = restart(dir, 3).await;
    // Rows that are not written yet are not compared.
    world.wait_until_settled().await;
    let verified = world.get("/v1/events/verify").await.expect(200).body();
    assert_eq!(verified["problems"], json!([]));
    world.stop().await;
}

/// Starts with `rose`, whose event with the label `red` cannot be read and never reached its rows. More
/// events follow. Returns the position of that event.
async fn with_parked_rose() -> (TestWorld, u64) {
    let labelled = |colour: &str| {
        let mut labelled = endpoint("rose");
        labelled["metadata"]["labels"] = json!({"colour": colour});
        labelled
    };
    let world = TestWorld::start().await;
    world.create_endpoint("rose").await;
    world.wait_until_settled().await;
    let dir = world.stop().await;
    save_rows(&dir).await;
    let world = restart(dir, 2).await;
    let put = world.put("/v1/endpoints/rose", &labelled("red")).await;
    let poison = put.expect(200).position();
    let put = world.put("/v1/endpoints/rose", &labelled("blue")).await;
    put.expect(200);
    world.wait_until_settled().await;
    let dir = world.stop().await;
    restore_rows(&dir).await;
    execute(
        &dir,
        "UPDATE events SET type = 'x-' || type WHERE stream = 'endpoint/default/rose' AND data LIKE '%red%'",
    )
    .await;
    // As for a release with another fold version: the next start reads the log.
    execute(&dir, "DELETE FROM snapshots").await;
    let world = restart(dir, 3).await;
    while parked(&world).await == json!([]) {
        tokio::task::yield_now().await;
    }
    let head = world.head().await;
    world.get_at("/v1/endpoints", head).await.expect(200);
    (world, poison)
}

async fn parked(world: &TestWorld) -> Value {
    let parked = world.get("/v1/events/parked").await.expect(200).body();
    parked["items"].clone()
}

/// Asserts that a rebuild changes none of the rows of the running consumer, and makes the same rows from
/// scratch. Returns the parked endpoints.
async fn assert_rebuild_is_equal(dir: &TempDir, poison: u64) -> Vec<(String, u64)> {
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
        // The event was changed after it was written, which also breaks the chain to the next one.
        let [problem, broken_chain] = &report.problems[..] else {
            panic!("{report:?}");
        };
        let sentence = format!("the event at {poison} was changed");
        assert!(broken_chain.contains(&sentence), "{broken_chain}");
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
    assert_eq!(changed, 0, "rows of the consumer changed");
    execute(dir, "DELETE FROM rows WHERE model <> 'parked'").await;
    let (changed, parked_from_scratch) = rebuilt().await;
    assert!(changed > 0);
    assert_eq!(parked, parked_from_scratch);
    parked
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_leaves_a_parked_endpoint_as_it_was_before_the_event() {
    let (world, poison) = with_parked_rose().await;
    let dir = world.stop().await;
    let parked = assert_rebuild_is_equal(&dir, poison).await;
    assert_eq!(parked, [("default/rose".to_owned(), poison)]);
}

async fn skip(world: &TestWorld, poison: u64) {
    let skip = format!("/v1/events/{poison}/skip");
    let body = json!({"consumer": "views", "reason": "test"});
    world.post(&skip, &body).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_skips_events_once_the_endpoint_is_unparked() {
    let (world, poison) = with_parked_rose().await;
    skip(&world, poison).await;
    let body = json!({"consumer": "views"});
    let unpark = world.post("/v1/endpoints/rose/unpark", &body).await;
    unpark.expect(200);
    let head = world.head().await;
    let shown = world.get_at("/v1/endpoints/rose", head).await.expect(200);
    assert_eq!(shown.body()["metadata"]["labels"]["colour"], "blue");
    let dir = world.stop().await;
    let parked = assert_rebuild_is_equal(&dir, poison).await;
    assert_eq!(parked, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_with_a_skipped_event_stays_parked_until_it_is_unparked() {
    let (world, poison) = with_parked_rose().await;
    skip(&world, poison).await;
    let head = world.head().await;
    world.get_at("/v1/endpoints", head).await.expect(200);
    let dir = world.stop().await;
    let parked = assert_rebuild_is_equal(&dir, poison).await;
    assert_eq!(parked, [("default/rose".to_owned(), poison)]);
}
