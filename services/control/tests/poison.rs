//! Events that this version cannot read: one endpoint's poison keeps nothing else from working, and
//! what becomes readable again is shown again.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use futures::StreamExt;
use reqwest::Method;
use serde_json::json;
use sqlx::Connection as _;
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
    let world = World::start().await;
    world.with_endpoint("rose").await;
    world.settled().await;
    let dir = world.stop().await;
    execute(&dir, "CREATE TABLE old_rows AS SELECT * FROM rows").await;
    execute(&dir, "CREATE TABLE old_cursors AS SELECT * FROM cursors").await;
    let world = restart(dir, 2).await;
    let mut labelled = endpoint("rose");
    labelled["metadata"]["labels"] = json!({"colour": "red"});
    world.put("/v1/endpoints/rose", &labelled).await.expect(200);
    world.settled().await;
    // As if it had ended before it wrote the rows.
    let dir = world.stop().await;
    execute(&dir, "DELETE FROM rows").await;
    execute(&dir, "INSERT INTO rows SELECT * FROM old_rows").await;
    execute(&dir, "DELETE FROM cursors").await;
    execute(&dir, "INSERT INTO cursors SELECT * FROM old_cursors").await;
    execute(
        &dir,
        "UPDATE events SET type = 'x-' || type WHERE stream = 'endpoint/default/rose' AND version = 2",
    )
    .await;
    let world = restart(dir, 3).await;
    let parked = async || {
        let parked = world.get("/v1/events/parked").await.expect(200).body();
        parked["items"].as_array().unwrap().len()
    };
    while parked().await == 0 {
        tokio::task::yield_now().await;
    }
    let head = world.head().await;
    world.get_at("/v1/endpoints", head).await.expect(200);
    let dir = world.stop().await;
    execute(
        &dir,
        "UPDATE events SET type = substr(type, 3) WHERE type LIKE 'x-%'",
    )
    .await;

    let world = restart(dir, 4).await;
    let shown = world.get("/v1/endpoints/rose").await.expect(200).body();
    assert_eq!(shown["metadata"]["labels"]["colour"], "red", "{shown}");
    let verified = world.get("/v1/events/verify").await.expect(200).body();
    assert_eq!(verified["problems"], json!([]));
    let parked = world.get("/v1/events/parked").await.expect(200).body();
    assert_eq!(parked["items"], json!([]));
    world.stop().await;
}
