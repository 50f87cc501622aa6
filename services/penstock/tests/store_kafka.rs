//! Kafka from the store, the store from Kafka alone, and the proof that they are equal: the real binary
//! on a real Kafka and a real PostgreSQL.
#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![allow(clippy::unwrap_used, reason = "all of it is test code")]

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bus::Bus;
use bus::kafka::{KafkaBus, KafkaConfig};
use contract::events::{AccessRevoked, Empty, Event};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, NewEvent, RawRecord, Record, StreamKind, StreamName};
use contract::time::Timestamp;
use domain::views::{self, MODELS};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};
use runtime::parking::PARKED;
use runtime::relay::RELAY;
use serde_json::{Value, json};
use servers::{Kafka, Postgres};
use sqlx::Connection as _;
use store::{Append, Commit, CursorMove, POSITIONS_SKIPPED, RowQuery, Store};

const ENDPOINTS: u64 = 60;

/// Each endpoint is made, and gets a deployment; then somebody loses access.
const EVENTS: u64 = ENDPOINTS * 2 + 1;

fn golden(name: &str, endpoint: &str) -> Event {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../libs/contract/tests/golden/events"
    );
    let text = std::fs::read_to_string(format!("{folder}/{name}.v1.json")).unwrap();
    let text = text.replace("\"iris\"", &format!("\"{endpoint}\""));
    Event::decode(name, 1, &text).unwrap()
}

fn commit_of(stream: StreamName, expected_version: u64, event: Event) -> Commit {
    let event = NewEvent {
        id: uuid::Uuid::new_v4(),
        time: Timestamp::from_secs(1_700_000_000),
        actor: Actor::service("test"),
        event,
    };
    Commit {
        appends: vec![Append {
            stream,
            expected_version,
            events: vec![event],
        }],
        ..Commit::default()
    }
}

fn endpoint(name: &str) -> StreamName {
    StreamName::of(
        StreamKind::Endpoint,
        &EndpointKey::new(&name.parse().unwrap()),
    )
}

async fn write_log(store: &Store) {
    for (version, kind) in ["endpoint.created", "deployment.created"]
        .iter()
        .enumerate()
    {
        for number in 0..ENDPOINTS {
            let name = format!("e{number}");
            let event = golden(kind, &name);
            let commit = commit_of(endpoint(&name), version as u64, event);
            store.commit(commit).await.unwrap();
        }
    }
    let revoked = AccessRevoked {
        name: "visitor".parse().unwrap(),
    };
    let commit = commit_of(StreamName::access(), 0, Event::AccessRevoked(revoked));
    store.commit(commit).await.unwrap();
}

/// For what is sure to come, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A log in a file, and some of its records in another shape on a Kafka.
struct World {
    folder: tempfile::TempDir,
    kafka: String,
    records: Vec<Arc<Record>>,
}

impl World {
    async fn new(kafka: &Kafka) -> Self {
        Self::on(kafka.url(&kafka.prefix())).await
    }

    async fn on(kafka: String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = Store::open(&format!("sqlite:{}", path.display()))
            .await
            .unwrap();
        write_log(&store).await;
        let records = store.read_all(Position::START, 10_000).await.unwrap();
        store.close().await;
        assert_eq!(records.len() as u64, EVENTS);
        Self {
            folder,
            kafka,
            records: records.into_iter().map(Arc::new).collect(),
        }
    }

    fn store(&self, name: &str) -> String {
        format!("sqlite:{}", self.folder.path().join(name).display())
    }

    async fn publish(&self, records: &[Arc<Record>]) {
        let config = KafkaConfig::parse(&self.kafka).unwrap();
        let bus = KafkaBus::open(config).await.unwrap();
        for page in records.chunks(10) {
            // New topics may take longer to be led than one try takes. What came twice is read once.
            let deadline = Instant::now() + PATIENCE;
            while let Err(error) = bus.publish_records(page).await {
                assert!(Instant::now() < deadline, "{error}");
            }
        }
        bus.close().await;
    }

    async fn run(&self, words: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        for name in ["PENSTOCK_STORE", "PENSTOCK_BUS", "PENSTOCK_DATA"] {
            command.env_remove(name);
        }
        command
            .arg("store")
            .args(words)
            .args(["-o", "json"])
            .env("HOME", self.folder.path())
            .env("XDG_DATA_HOME", self.folder.path());
        let run = tokio::task::spawn_blocking(move || command.output().unwrap());
        let output = run.await.unwrap();
        Ran {
            code: output.status.code().unwrap(),
            json: serde_json::from_slice(&output.stdout).unwrap_or_default(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    async fn compare(&self, more: &[&str]) -> Ran {
        let store = self.store("store.db");
        let words = [&["compare", &*store, &*self.kafka], more].concat();
        self.run(&words).await
    }

    async fn rebuild(&self, store: &str) -> Ran {
        let words = ["rebuild", "--from", &self.kafka, "--store", store];
        self.run(&words).await
    }
}

#[derive(Debug)]
struct Ran {
    code: i32,
    json: Value,
    err: String,
}

impl Ran {
    #[track_caller]
    fn ended_with(self, code: i32) -> Value {
        assert_eq!(self.code, code, "{self:?}");
        self.json
    }
}

async fn read_models_are_those_of_the_log(url: &str) {
    let store = Store::open(url).await.unwrap();
    let mut projector = control::ViewsProjector::default();
    let report = store::verify(&store, &mut projector, MODELS).await.unwrap();
    store.close().await;
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.events, EVENTS);
    assert!(report.rows >= ENDPOINTS * 2, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_fills_kafka_and_kafka_alone_makes_either_database_again() {
    let (Some(kafka), Some(postgres)) = (Kafka::shared(), Postgres::shared()) else {
        return;
    };
    let world = World::new(kafka).await;
    let store = world.store("store.db");
    let words = ["republish", "--to", &world.kafka, "--store", &store];
    let published = world.run(&words).await.ended_with(0);
    assert_eq!(published["published"], EVENTS);

    let compared = world.compare(&["--exact"]).await.ended_with(0);
    assert_eq!(compared["equal"], true);
    assert_eq!(compared["a"]["events"], EVENTS);
    assert_eq!(compared["a"]["sha256"], compared["b"]["sha256"]);

    for url in [world.store("again.db"), postgres.database()] {
        let rebuilt = world.rebuild(&url).await.ended_with(0);
        assert_eq!(rebuilt["copied"]["sha256"], compared["a"]["sha256"]);
        assert_eq!(rebuilt["kafka"]["whole"], EVENTS);
        let equal = world.run(&["compare", &store, &url]).await.ended_with(0);
        assert_eq!(equal["b"]["events"], EVENTS);
        read_models_are_those_of_the_log(&url).await;
        new_events_go_on_above_and_the_relay_from_there(&url).await;
    }
}

async fn new_events_go_on_above_and_the_relay_from_there(url: &str) {
    let store = Store::open(url).await.unwrap();
    let carried = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    assert_eq!(carried, Position(EVENTS));
    let event = Event::EndpointDeletionRequested(Empty {});
    let commit = commit_of(endpoint("e1"), 2, event);
    store.commit(commit).await.unwrap();
    let head = store.head().await.unwrap();
    assert_eq!(head, Position(EVENTS + POSITIONS_SKIPPED));
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hole_is_named_and_the_copy_ends_below_it() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    // The first event of an endpoint, which its second one follows.
    let missing = 31;
    let (before, after) = (&world.records[..missing - 1], &world.records[missing..]);
    world.publish(&[before, after].concat()).await;

    let url = world.store("again.db");
    let rebuilt = world.rebuild(&url).await.ended_with(1);
    assert_eq!(rebuilt["kafka"]["whole"], missing - 1);
    assert_eq!(rebuilt["kafka"]["holes"][0]["missing"], missing);
    assert_eq!(rebuilt["copied"]["head"], missing - 1);
    assert_eq!(rebuilt["leftOut"], EVENTS - missing as u64);
    let store = Store::open(&url).await.unwrap();
    assert_eq!(store.head().await.unwrap(), Position(missing as u64 - 1));
    let carried = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    assert_eq!(carried, Position::START, "others stand above it there");
    store.close().await;

    let compared = world.compare(&[]).await.ended_with(1);
    assert_eq!(compared["differsAt"], missing);
    let below = (missing - 1).to_string();
    world.compare(&["--up-to", &below]).await.ended_with(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_event_of_a_bucket_that_one_kafka_lacks_is_a_difference() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    world.publish(&world.records).await;
    // Nothing follows it in its bucket, so nothing there tells of it.
    let missing = EVENTS as usize - 1;
    let whole = world.kafka.clone();
    let other = World {
        kafka: format!("{whole}x"),
        ..world
    };
    let (before, after) = (&other.records[..missing - 1], &other.records[missing..]);
    other.publish(&[before, after].concat()).await;
    let compared = other.run(&["compare", &whole, &other.kafka]).await;
    assert_eq!(compared.ended_with(1)["differsAt"], missing);
}

/// None follows it, so it is missed by none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_last_message_that_cannot_be_read_is_told_and_is_no_success() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    let below = EVENTS - 1;
    world.publish(&world.records[..below as usize]).await;
    let (brokers, prefix) = world.kafka["kafka://".len()..].rsplit_once('/').unwrap();
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    let producer: FutureProducer = config.create().unwrap();
    let topic = format!("{prefix}.global");
    let last = FutureRecord::<str, str>::to(&topic).payload("?");
    producer.send(last, PATIENCE).await.unwrap();

    let url = world.store("again.db");
    let rebuilt = world.rebuild(&url).await.ended_with(1);
    assert_eq!(rebuilt["copied"]["head"], below);
    assert_eq!(rebuilt["leftOut"], 0);
    assert_eq!(rebuilt["kafka"]["unreadable"].as_array().unwrap().len(), 1);
    assert_eq!(relayed(&url).await, Position::START);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_record_is_found_with_its_position() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    let mut records = world.records.clone();
    records[76] = changed(&records[76]);
    world.publish(&records).await;
    let compared = world.compare(&[]).await.ended_with(1);
    assert_eq!(compared["equal"], false);
    assert_eq!(compared["differsAt"], 77);
    assert_ne!(compared["a"]["sha256"], compared["b"]["sha256"]);
}

async fn relayed(url: &str) -> Position {
    let store = Store::open(url).await.unwrap();
    let carried = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    store.close().await;
    carried
}

async fn relay_has_published(url: &str, to: u64) {
    let store = Store::open(url).await.unwrap();
    let commit = Commit {
        cursor: Some(CursorMove {
            consumer: RELAY,
            bucket: Bucket::GLOBAL,
            from: Position::START,
            to: Position(to),
        }),
        ..Commit::default()
    };
    store.commit(commit).await.unwrap();
    store.close().await;
}

fn changed(record: &Record) -> Arc<Record> {
    Arc::new(Record {
        actor: Actor::service("somebody-else"),
        ..record.clone()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_records_of_one_position_that_differ_are_an_error() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    world.publish(&world.records).await;
    world.publish(&[changed(&world.records[40])]).await;
    let compared = world.compare(&[]).await;
    assert_eq!(compared.code, 1);
    assert!(compared.err.contains("position 41"), "{}", compared.err);
    let rebuilt = world.rebuild(&world.store("again.db")).await;
    assert_eq!(rebuilt.code, 1);
    assert!(rebuilt.err.contains("position 41"), "{}", rebuilt.err);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn duplicates_and_reordering_do_no_harm() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    let mut records = world.records.clone();
    records.reverse();
    records.extend_from_within(10..50);
    world.publish(&records).await;
    let compared = world.compare(&["--exact"]).await.ended_with(0);
    assert_eq!(compared["b"]["kafka"]["repeated"], 40);
    let url = world.store("again.db");
    world.rebuild(&url).await.ended_with(0);
    read_models_are_those_of_the_log(&url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_relay_has_not_carried_yet_is_counted_and_what_it_has_must_be_there() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    // Of topics without an event there is nothing to say, good or bad; that is no equality.
    world.publish(&[]).await;
    let compared = world.compare(&[]).await.ended_with(1);
    assert_eq!(compared["sameUpTo"], 0);
    assert_eq!(compared["differsAt"], 1);
    world.publish(&world.records[..100]).await;
    let compared = world.compare(&[]).await.ended_with(0);
    assert_eq!(compared["b"]["head"], 100);
    assert_eq!(compared["sameUpTo"], 100);
    assert_eq!(compared["a"]["more"], EVENTS - 100);
    assert_eq!(compared["a"]["only"]["events"], EVENTS - 100);
    assert_eq!(compared["a"]["only"]["last"], EVENTS);
    assert_eq!(compared["b"]["only"], Value::Null);
    let exact = world.compare(&["--exact"]).await.ended_with(1);
    assert_eq!(exact["differsAt"], 101);
    assert_eq!(exact["sameUpTo"], 100);

    // A part of it can be published by itself.
    let store = world.store("store.db");
    let to = ["republish", "--to", &world.kafka, "--store", &store];
    let words = [&to[..], &["--after", "100"]].concat();
    let refused = world.run(&words).await;
    assert_eq!(refused.code, 2, "{refused:?}");
    let sentence = "published up to position 0";
    assert!(refused.err.contains(sentence), "{}", refused.err);
    assert_eq!(relayed(&store).await, Position::START);
    relay_has_published(&store, 100).await;
    let published = world.run(&words).await.ended_with(0);
    assert_eq!(published["published"], EVENTS - 100);
    assert_eq!(relayed(&store).await, Position(EVENTS));
    world.compare(&["--exact"]).await.ended_with(0);

    // To other topics, of which the cursor says nothing true.
    let other = format!("{}x", world.kafka);
    let other = World {
        kafka: other,
        ..world
    };
    other.publish(&other.records[..100]).await;
    let compared = other.compare(&[]).await.ended_with(1);
    assert_eq!(compared["differsAt"], 101);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_publishes_beside_the_relay_that_holds_the_lease() {
    let (Some(kafka), Some(postgres)) = (Kafka::shared(), Postgres::shared()) else {
        return;
    };
    let world = World::new(kafka).await;
    let url = postgres.database();
    let store = Store::open(&url).await.unwrap();
    write_log(&store).await;
    let long = Duration::from_secs(3600);
    let fence = store
        .acquire_lease(RELAY, "a", long)
        .await
        .unwrap()
        .unwrap();
    let words = ["republish", "--to", &world.kafka, "--store", &url];
    let refused = world.run(&words).await;
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("lease `relay`"), "{}", refused.err);

    // One that has died meanwhile is waited for.
    let short = Duration::from_secs(2);
    assert!(store.renew_lease(&fence, "a", short).await.unwrap());
    world.run(&words).await.ended_with(0);
    let carried = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    assert_eq!(carried, Position(EVENTS));
    let late = Commit {
        cursor: Some(CursorMove {
            consumer: RELAY,
            bucket: Bucket::GLOBAL,
            from: carried,
            to: Position(EVENTS + 1),
        }),
        fence: Some(fence),
        ..Commit::default()
    };
    store.commit(late).await.unwrap_err();
    store.close().await;
}

/// As another release would have written the event at a position, and chained what follows it.
async fn rewrite(url: &str, position: u64, columns: &str) {
    let mut connection = sqlx::SqliteConnection::connect(url).await.unwrap();
    let text = format!("UPDATE events SET {columns} WHERE position = {position}");
    let query = sqlx::query(sqlx::AssertSqlSafe(text));
    let done = query.execute(&mut connection).await.unwrap();
    assert_eq!(done.rows_affected(), 1, "position {position}");
    let unchained = "UPDATE events SET prev_hash = NULL; \
         UPDATE meta SET value = '1' WHERE key = 'format'";
    sqlx::raw_sql(unchained)
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
    store::migrate(url).await.unwrap();
}

async fn stored(url: &str) -> Vec<RawRecord> {
    let store = Store::open(url).await.unwrap();
    let events = store.read_raw(Position::START, 10_000).await.unwrap();
    store.close().await;
    events
}

/// From the store to Kafka, and from there into both kinds of store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_release_wrote_survives_byte_for_byte() {
    let (Some(kafka), Some(postgres)) = (Kafka::shared(), Postgres::shared()) else {
        return;
    };
    let world = World::new(kafka).await;
    let store = world.store("store.db");
    // The second events of e3, e5 and e7: one with a field more and in another order of writing, one of
    // another type, one in a stream of another kind. And the one on access.
    let second = |endpoint: u64| ENDPOINTS + endpoint + 1;
    let field = "data = '{ \"notInventedYet\": [1.0, 1e3, \"\\u00fc\"],' || substr(data, 2), \
                 actor = 'robot:\"ü\"'";
    rewrite(&store, second(3), field).await;
    let of_type =
        "type = 'deployment.forecast', type_version = 7, data = '{\"far\" : 1}', id = 'no UUID'";
    rewrite(&store, second(5), of_type).await;
    let of_stream =
        "stream = 'forecast/default/e7', version = 1, type = 'forecast.made', data = ' 1'";
    rewrite(&store, second(7), of_stream).await;
    rewrite(&store, EVENTS, "type_version = 2").await;
    let expected = stored(&store).await;
    let of_e3 = &expected[second(3) as usize - 1].data;
    assert!(of_e3.contains("1e3"), "{of_e3}");

    let words = ["republish", "--to", &world.kafka, "--store", &store];
    world.run(&words).await.ended_with(0);
    let compared = world.compare(&["--exact"]).await.ended_with(0);
    assert_eq!(compared["a"]["events"], EVENTS);
    assert_eq!(compared["a"]["sha256"], compared["b"]["sha256"]);

    for url in [world.store("again.db"), postgres.database()] {
        let rebuilt = world.rebuild(&url).await.ended_with(0);
        assert_eq!(rebuilt["copied"]["sha256"], compared["a"]["sha256"]);
        assert_eq!(rebuilt["notKnown"]["events"], 3, "{rebuilt}");
        assert_eq!(rebuilt["notKnown"]["first"], second(5));
        let parked = rebuilt["parked"].as_array().unwrap();
        let parked: Vec<&Value> = parked.iter().map(|parked| &parked["endpoint"]).collect();
        assert_eq!(parked, ["e5", "e7"]);
        assert_eq!(stored(&url).await, expected);
        let words = ["compare", &url, &world.kafka, "--exact"];
        world.run(&words).await.ended_with(0);
        assert_eq!(relayed(&url).await, Position(EVENTS));
    }
}

/// It is a difference that decoding would not show.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_field_that_only_one_of_both_has_is_found_with_its_position() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    world.publish(&world.records).await;
    let more = "data = '{\"notInventedYet\":1,' || substr(data, 2)";
    rewrite(&world.store("store.db"), 70, more).await;
    let compared = world.compare(&[]).await.ended_with(1);
    assert_eq!(compared["differsAt"], 70);
    assert_eq!(compared["difference"]["fields"], json!(["data"]));
    assert_ne!(compared["a"]["sha256"], compared["b"]["sha256"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_away_is_named_while_it_is_waited_for_and_in_the_end() {
    // A port at which nobody listens.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    drop(port);
    let world = World::on(format!("kafka://{address}/away")).await;
    let other = world.folder.path().join("other.db");
    std::fs::copy(world.folder.path().join("store.db"), &other).unwrap();
    let other = world.store("other.db");
    let again = world.store("again.db");
    let words = ["republish", "--to", &world.kafka, "--store", &other];
    let (compared, rebuilt, republished) =
        tokio::join!(world.compare(&[]), world.rebuild(&again), world.run(&words));
    let waiting = format!("waiting for kafka://{address}/away, which has not answered yet");
    let away = format!("penstock: Kafka at {address}: no broker answers");
    for ran in [compared, rebuilt, republished] {
        assert_eq!(ran.code, 3, "{ran:?}");
        assert!(ran.err.starts_with(&waiting), "{}", ran.err);
        assert!(
            ran.err.lines().last().unwrap().starts_with(&away),
            "{}",
            ran.err
        );
    }
    assert!(!world.folder.path().join("again.db").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_names_and_lists_what_it_parks() {
    let Some(kafka) = Kafka::shared() else { return };
    let world = World::new(kafka).await;
    let url = world.store("store.db");
    let poison = ENDPOINTS + 1;
    rewrite(&url, poison, "type = 'not-invented-yet'").await;

    let words = ["rebuild", "--store", &url];
    let rebuilt = world.run(&words).await.ended_with(0);
    let named = rebuilt["parked"].as_array().unwrap();
    assert_eq!(named.len(), 1, "{rebuilt}");
    assert_eq!(named[0]["endpoint"], "e0");
    assert_eq!(named[0]["position"], poison);

    let store = Store::open(&url).await.unwrap();
    let listed = store.row(PARKED, "views/default/e0").await.unwrap();
    assert!(listed.is_some());
    let made = async |model: &str| {
        let query = RowQuery {
            model: model.to_owned(),
            limit: 500,
            ..RowQuery::default()
        };
        let rows = store.rows(query).await.unwrap();
        rows.into_iter().map(|row| row.key).collect::<Vec<_>>()
    };
    assert_eq!(
        made(views::ReadModel::Endpoints.name()).await.len() as u64,
        ENDPOINTS
    );
    let deployments = made(views::ReadModel::Deployments.name()).await;
    assert_eq!(deployments.len() as u64, ENDPOINTS - 1);
    let of_parked = |key: &&String| key.starts_with("default/e0/");
    assert_eq!(deployments.iter().find(of_parked), None);
    let mut projector = control::ViewsProjector::default();
    let verified = store::verify(&store, &mut projector, MODELS).await;
    let problems = verified.unwrap().problems;
    store.close().await;
    assert_eq!(problems.len(), 1, "{problems:?}");
}
