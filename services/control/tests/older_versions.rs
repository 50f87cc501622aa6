//! Events of an older version of their type: they produce the same results as with the release that wrote
//! them.
#![allow(clippy::unwrap_used)]

mod support;

use contract::events::Event;
use contract::frame::Role;
use contract::ids::{EndpointKey, Position};
use contract::log::{Actor, StreamKind, StreamName};
use contract::time::Timestamp;
use contract::usage::UsageSlice;
use control::ViewsProjector;
use domain::views::{MODELS, ReadModel};
use serde_json::{Value, json};
use store::{RawRecord, Row, RowQuery, Store};
use support::{Setup, TestWorld};
use uuid::Uuid;

/// The data of both event types, as version 1 wrote it.
const CLOSED: &str =
    include_str!("../../../libs/contract/tests/golden/events/usage.closed.v1.json");
const CORRECTED: &str =
    include_str!("../../../libs/contract/tests/golden/events/usage.corrected.v1.json");

fn iris() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

/// Appends events of version 1 to the store.
async fn append_version_1(store: &Store) {
    let log = store.read_raw(Position::START, 1000).await.unwrap();
    let of_bucket = log.iter().rfind(|event| event.bucket == iris().bucket());
    let (mut position, mut prev) = (log.last().unwrap().position, of_bucket.unwrap().position);
    let events = [("usage.closed", CLOSED), ("usage.corrected", CORRECTED)];
    let raw = events
        .into_iter()
        .zip(1..)
        .map(|((type_name, data), version)| {
            position = Position(position.0 + 1);
            RawRecord {
                position,
                prev: std::mem::replace(&mut prev, position),
                prev_hash: None,
                bucket: iris().bucket(),
                stream: StreamName::of(StreamKind::Usage, &iris()).to_string(),
                version,
                id: Uuid::from_u128(u128::from(position.0)).to_string(),
                type_name: type_name.to_owned(),
                type_version: 1,
                time: Timestamp::from_secs(1_800_000_000),
                actor: Actor::service("meter").0,
                data: serde_json::from_str::<Value>(data).unwrap().to_string(),
            }
        });
    assert_eq!(store::append_raw(store, raw.collect()).await.unwrap(), 2);
}

async fn usage_rows(store: &Store) -> Vec<Row> {
    let query = RowQuery {
        model: ReadModel::Usage.name().into(),
        endpoint: Some(iris().as_str().to_owned()),
        limit: 10,
        ..RowQuery::default()
    };
    store.rows(query).await.unwrap()
}

/// The row as the release of version 1 wrote it.
fn row_of_version_1(id: &str, type_name: &str, data: &str) -> Value {
    json!({
        "id": id,
        "time": Timestamp::from_secs(1_800_000_000),
        "type": type_name,
        "endpoint": "iris",
        "data": serde_json::from_str::<Value>(data).unwrap(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_of_version_1_yields_the_same_rows_and_sums() {
    let world = TestWorld::with_blue().await;
    world.wait_until_settled().await;
    let dir = world.stop().await;
    let url = format!("sqlite:{}", dir.path().join("penstock.db").display());
    let store = Store::open(&url).await.unwrap();
    append_version_1(&store).await;
    store.close().await;

    let setup = Setup {
        dir,
        seed: 2,
        ..Setup::default()
    };
    let world = TestWorld::start_with(setup).await;
    world.wait_until_settled().await;
    let verified = world.get("/v1/events/verify").await.expect(200).body();
    assert_eq!(verified["problems"], json!([]));
    let dir = world.stop().await;

    let store = Store::open(&url).await.unwrap();
    let rows = usage_rows(&store).await;
    let types = [("usage.closed", CLOSED), ("usage.corrected", CORRECTED)];
    for (type_name, data) in types {
        let row = rows.iter().find(|row| row.doc.contains(type_name)).unwrap();
        let expected = row_of_version_1(&row.key, type_name, data).to_string();
        assert_eq!(row.doc, expected, "byte for byte");
    }
    // So does a rebuild, both over existing rows and from scratch.
    let mut projector = ViewsProjector::for_rebuild();
    let changed = store::rebuild(&store, &mut projector, MODELS).await;
    assert_eq!(changed.unwrap(), 0);
    let url = format!("sqlite:{}", dir.path().join("again.db").display());
    let copied = Store::open(&url).await.unwrap();
    store::copy(&store, &copied, |_, _| {}).await.unwrap();
    let mut projector = ViewsProjector::for_rebuild();
    store::rebuild(&copied, &mut projector, MODELS)
        .await
        .unwrap();
    assert_eq!(usage_rows(&copied).await, rows);

    let stream = StreamName::of(StreamKind::Usage, &iris());
    let mut total = UsageSlice::default();
    for record in copied.read_stream(&stream, 0, 10).await.unwrap() {
        let (Event::UsageClosed(usage) | Event::UsageCorrected(usage)) = &record.event else {
            panic!("{record:?}")
        };
        usage.slices.iter().for_each(|slice| total.add(slice));
    }
    let live = &total.by_role[&Role::LIVE];
    assert_eq!(
        (live.arrivals, live.outcomes.success, live.in_flight_us),
        (4, 4, 5000)
    );
    let instance = total.by_instance.values().next().unwrap();
    assert_eq!((instance.requests, instance.cpu_us), (4, 3800));
    assert_eq!(instance.memory_bytes_max, 4_194_304);
    store.close().await;
    copied.close().await;
}
