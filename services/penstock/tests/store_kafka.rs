//! `store republish`, `rebuild` and `compare` with the real binary on a real Kafka and a real PostgreSQL.
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

/// Each endpoint is created and gets a deployment; then one access token is revoked.
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

/// Timeout for publishing on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A log in a store file, and its counterpart on Kafka.
struct TestLogs {
    folder: tempfile::TempDir,
    kafka: String,
    records: Vec<Arc<Record>>,
}

impl TestLogs {
    async fn new(kafka: &Kafka) -> Self {
        Self::with_kafka(kafka.url(&kafka.prefix())).await
    }

    async fn with_kafka(kafka: String) -> Self {
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
            // New topics may need longer than one attempt to get a leader. Duplicates are read once.
            let deadline = Instant::now() + PATIENCE;
            while let Err(error) = bus.publish_records(page).await {
                assert!(Instant::now() < deadline, "{error}");
            }
        }
        bus.close().await;
    }

    async fn run(&self, words: &[&str]) -> CommandResult {
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
        CommandResult {
            code: output.status.code().unwrap(),
            json: serde_json::from_slice(&output.stdout).unwrap_or_default(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    async fn compare(&self, more: &[&str]) -> CommandResult {
        let store = self.store("store.db");
        let words = [&["compare", &*store, &*self.kafka], more].concat();
        self.run(&words).await
    }

    async fn rebuild(&self, store: &str) -> CommandResult {
        let words = ["rebuild", "--from", &self.kafka, "--store", store];
        self.run(&words).await
    }
}

#[derive(Debug)]
struct CommandResult {
    code: i32,
    json: Value,
    err: String,
}

impl CommandResult {
    #[track_caller]
    fn json_with_code(self, code: i32) -> Value {
        assert_eq!(self.code, code, "{self:?}");
        self.json
    }
}

async fn assert_read_models_match_log(url: &str) {
    let store = Store::open(url).await.unwrap();
    let mut projector = control::ViewsProjector::default();
    let report = store::verify(&store, &mut projector, MODELS).await.unwrap();
    store.close().await;
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.events, EVENTS);
    assert!(report.rows >= ENDPOINTS * 2, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_is_republished_to_kafka_and_rebuilt_from_it_in_either_database() {
    let (Some(kafka), Some(postgres)) = (Kafka::shared(), Postgres::shared()) else {
        return;
    };
    let logs = TestLogs::new(kafka).await;
    let store = logs.store("store.db");
    let words = ["republish", "--to", &logs.kafka, "--store", &store];
    let published = logs.run(&words).await.json_with_code(0);
    assert_eq!(published["published"], EVENTS);

    let compared = logs.compare(&["--exact"]).await.json_with_code(0);
    assert_eq!(compared["equal"], true);
    assert_eq!(compared["a"]["events"], EVENTS);
    assert_eq!(compared["a"]["sha256"], compared["b"]["sha256"]);

    for url in [logs.store("again.db"), postgres.database()] {
        let rebuilt = logs.rebuild(&url).await.json_with_code(0);
        assert_eq!(rebuilt["copied"]["sha256"], compared["a"]["sha256"]);
        assert_eq!(rebuilt["kafka"]["whole"], EVENTS);
        let equal = logs.run(&["compare", &store, &url]).await.json_with_code(0);
        assert_eq!(equal["b"]["events"], EVENTS);
        assert_read_models_match_log(&url).await;
        assert_new_events_and_relay_continue_above(&url).await;
    }
}

async fn assert_new_events_and_relay_continue_above(url: &str) {
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
async fn a_gap_is_reported_and_the_import_ends_below_it() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    // The first event of an endpoint that has a second one.
    let missing = 31;
    let (before, after) = (&logs.records[..missing - 1], &logs.records[missing..]);
    logs.publish(&[before, after].concat()).await;

    let url = logs.store("again.db");
    let rebuilt = logs.rebuild(&url).await.json_with_code(1);
    assert_eq!(rebuilt["kafka"]["whole"], missing - 1);
    assert_eq!(rebuilt["kafka"]["holes"][0]["missing"], missing);
    assert_eq!(rebuilt["copied"]["head"], missing - 1);
    assert_eq!(rebuilt["leftOut"], EVENTS - missing as u64);
    let store = Store::open(&url).await.unwrap();
    assert_eq!(store.head().await.unwrap(), Position(missing as u64 - 1));
    let carried = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    assert_eq!(
        carried,
        Position::START,
        "the relay must not continue beyond a gap"
    );
    store.close().await;

    let compared = logs.compare(&[]).await.json_with_code(1);
    assert_eq!(compared["differsAt"], missing);
    let below = (missing - 1).to_string();
    logs.compare(&["--up-to", &below]).await.json_with_code(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_last_event_of_a_bucket_is_a_difference() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    logs.publish(&logs.records).await;
    // Nothing follows it in its bucket, so Kafka alone does not show the gap.
    let missing = EVENTS as usize - 1;
    let whole = logs.kafka.clone();
    let other = TestLogs {
        kafka: format!("{whole}x"),
        ..logs
    };
    let (before, after) = (&other.records[..missing - 1], &other.records[missing..]);
    other.publish(&[before, after].concat()).await;
    let compared = other.run(&["compare", &whole, &other.kafka]).await;
    assert_eq!(compared.json_with_code(1)["differsAt"], missing);
}

/// Nothing follows it, so there is no gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_last_message_is_reported_as_a_failure() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    let below = EVENTS - 1;
    logs.publish(&logs.records[..below as usize]).await;
    let (brokers, prefix) = logs.kafka["kafka://".len()..].rsplit_once('/').unwrap();
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    let producer: FutureProducer = config.create().unwrap();
    let topic = format!("{prefix}.global");
    let last = FutureRecord::<str, str>::to(&topic).payload("?");
    producer.send(last, PATIENCE).await.unwrap();

    let url = logs.store("again.db");
    let rebuilt = logs.rebuild(&url).await.json_with_code(1);
    assert_eq!(rebuilt["copied"]["head"], below);
    assert_eq!(rebuilt["leftOut"], 0);
    assert_eq!(rebuilt["kafka"]["unreadable"].as_array().unwrap().len(), 1);
    assert_eq!(relay_cursor(&url).await, Position::START);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_record_is_reported_with_its_position() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    let mut records = logs.records.clone();
    records[76] = changed(&records[76]);
    logs.publish(&records).await;
    let compared = logs.compare(&[]).await.json_with_code(1);
    assert_eq!(compared["equal"], false);
    assert_eq!(compared["differsAt"], 77);
    assert_ne!(compared["a"]["sha256"], compared["b"]["sha256"]);
}

async fn relay_cursor(url: &str) -> Position {
    let store = Store::open(url).await.unwrap();
    let carried = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    store.close().await;
    carried
}

async fn set_relay_cursor(url: &str, to: u64) {
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
async fn different_records_at_one_position_are_an_error() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    logs.publish(&logs.records).await;
    logs.publish(&[changed(&logs.records[40])]).await;
    let compared = logs.compare(&[]).await;
    assert_eq!(compared.code, 1);
    assert!(compared.err.contains("position 41"), "{}", compared.err);
    let rebuilt = logs.rebuild(&logs.store("again.db")).await;
    assert_eq!(rebuilt.code, 1);
    assert!(rebuilt.err.contains("position 41"), "{}", rebuilt.err);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn duplicates_and_reordering_are_harmless() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    let mut records = logs.records.clone();
    records.reverse();
    records.extend_from_within(10..50);
    logs.publish(&records).await;
    let compared = logs.compare(&["--exact"]).await.json_with_code(0);
    assert_eq!(compared["b"]["kafka"]["repeated"], 40);
    let url = logs.store("again.db");
    logs.rebuild(&url).await.json_with_code(0);
    assert_read_models_match_log(&url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unrelayed_events_are_counted_and_relayed_ones_must_exist() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    // Empty topics prove nothing, so they do not count as equal.
    logs.publish(&[]).await;
    let compared = logs.compare(&[]).await.json_with_code(1);
    assert_eq!(compared["sameUpTo"], 0);
    assert_eq!(compared["differsAt"], 1);
    logs.publish(&logs.records[..100]).await;
    let compared = logs.compare(&[]).await.json_with_code(0);
    assert_eq!(compared["b"]["head"], 100);
    assert_eq!(compared["sameUpTo"], 100);
    assert_eq!(compared["a"]["more"], EVENTS - 100);
    assert_eq!(compared["a"]["only"]["events"], EVENTS - 100);
    assert_eq!(compared["a"]["only"]["last"], EVENTS);
    assert_eq!(compared["b"]["only"], Value::Null);
    let exact = logs.compare(&["--exact"]).await.json_with_code(1);
    assert_eq!(exact["differsAt"], 101);
    assert_eq!(exact["sameUpTo"], 100);

    // A part of the log can be published.
    let store = logs.store("store.db");
    let to = ["republish", "--to", &logs.kafka, "--store", &store];
    let words = [&to[..], &["--after", "100"]].concat();
    let refused = logs.run(&words).await;
    assert_eq!(refused.code, 2, "{refused:?}");
    let sentence = "published up to position 0";
    assert!(refused.err.contains(sentence), "{}", refused.err);
    assert_eq!(relay_cursor(&store).await, Position::START);
    set_relay_cursor(&store, 100).await;
    let published = logs.run(&words).await.json_with_code(0);
    assert_eq!(published["published"], EVENTS - 100);
    assert_eq!(relay_cursor(&store).await, Position(EVENTS));
    logs.compare(&["--exact"]).await.json_with_code(0);

    // Other topics, which the cursor does not describe.
    let other = format!("{}x", logs.kafka);
    let other = TestLogs {
        kafka: other,
        ..logs
    };
    other.publish(&other.records[..100]).await;
    let compared = other.compare(&[]).await.json_with_code(1);
    assert_eq!(compared["differsAt"], 101);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn republish_is_refused_while_a_relay_holds_the_lease() {
    let (Some(kafka), Some(postgres)) = (Kafka::shared(), Postgres::shared()) else {
        return;
    };
    let logs = TestLogs::new(kafka).await;
    let url = postgres.database();
    let store = Store::open(&url).await.unwrap();
    write_log(&store).await;
    let long = Duration::from_secs(3600);
    let fence = store
        .acquire_lease(RELAY, "a", long)
        .await
        .unwrap()
        .unwrap();
    let words = ["republish", "--to", &logs.kafka, "--store", &url];
    let refused = logs.run(&words).await;
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("lease `relay`"), "{}", refused.err);

    // The lease of a crashed holder is waited for.
    let short = Duration::from_secs(2);
    assert!(store.renew_lease(&fence, "a", short).await.unwrap());
    logs.run(&words).await.json_with_code(0);
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

/// Rewrites the event at a position as another release would have written it, and rechains what follows.
async fn rewrite_event(url: &str, position: u64, columns: &str) {
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

/// From the store to Kafka, and from there into both databases.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_another_release_are_copied_byte_for_byte() {
    let (Some(kafka), Some(postgres)) = (Kafka::shared(), Postgres::shared()) else {
        return;
    };
    let logs = TestLogs::new(kafka).await;
    let store = logs.store("store.db");
    // The second events of e3, e5 and e7: one with an extra field and other formatting, one of an unknown
    // type, one in an unknown kind of stream. And the access event.
    let second = |endpoint: u64| ENDPOINTS + endpoint + 1;
    let field = "data = '{ \"notInventedYet\": [1.0, 1e3, \"\\u00fc\"],' || substr(data, 2), \
                 actor = 'robot:\"ü\"'";
    rewrite_event(&store, second(3), field).await;
    let of_type =
        "type = 'deployment.forecast', type_version = 7, data = '{\"far\" : 1}', id = 'no UUID'";
    rewrite_event(&store, second(5), of_type).await;
    let of_stream =
        "stream = 'forecast/default/e7', version = 1, type = 'forecast.made', data = ' 1'";
    rewrite_event(&store, second(7), of_stream).await;
    rewrite_event(&store, EVENTS, "type_version = 2").await;
    let expected = stored(&store).await;
    let of_e3 = &expected[second(3) as usize - 1].data;
    assert!(of_e3.contains("1e3"), "{of_e3}");

    let words = ["republish", "--to", &logs.kafka, "--store", &store];
    logs.run(&words).await.json_with_code(0);
    let compared = logs.compare(&["--exact"]).await.json_with_code(0);
    assert_eq!(compared["a"]["events"], EVENTS);
    assert_eq!(compared["a"]["sha256"], compared["b"]["sha256"]);

    for url in [logs.store("again.db"), postgres.database()] {
        let rebuilt = logs.rebuild(&url).await.json_with_code(0);
        assert_eq!(rebuilt["copied"]["sha256"], compared["a"]["sha256"]);
        assert_eq!(rebuilt["notKnown"]["events"], 3, "{rebuilt}");
        assert_eq!(rebuilt["notKnown"]["first"], second(5));
        let parked = rebuilt["parked"].as_array().unwrap();
        let parked: Vec<&Value> = parked.iter().map(|parked| &parked["endpoint"]).collect();
        // The last event belongs to no endpoint.
        assert_eq!(parked, [&json!("e5"), &json!("e7"), &Value::Null]);
        assert_eq!(stored(&url).await, expected);
        let words = ["compare", &url, &logs.kafka, "--exact"];
        logs.run(&words).await.json_with_code(0);
        assert_eq!(relay_cursor(&url).await, Position(EVENTS));
    }
}

/// A difference that decoding would hide.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extra_field_is_reported_with_its_position() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    logs.publish(&logs.records).await;
    let more = "data = '{\"notInventedYet\":1,' || substr(data, 2)";
    rewrite_event(&logs.store("store.db"), 70, more).await;
    let compared = logs.compare(&[]).await.json_with_code(1);
    assert_eq!(compared["differsAt"], 70);
    assert_eq!(compared["difference"]["fields"], json!(["data"]));
    assert_ne!(compared["a"]["sha256"], compared["b"]["sha256"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_broker_is_named_while_waiting_and_in_the_error() {
    // A port without a listener.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    drop(port);
    let logs = TestLogs::with_kafka(format!("kafka://{address}/away")).await;
    let other = logs.folder.path().join("other.db");
    std::fs::copy(logs.folder.path().join("store.db"), &other).unwrap();
    let other = logs.store("other.db");
    let again = logs.store("again.db");
    let words = ["republish", "--to", &logs.kafka, "--store", &other];
    let (compared, rebuilt, republished) =
        tokio::join!(logs.compare(&[]), logs.rebuild(&again), logs.run(&words));
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
    assert!(!logs.folder.path().join("again.db").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_reports_and_lists_parked_endpoints() {
    let Some(kafka) = Kafka::shared() else { return };
    let logs = TestLogs::new(kafka).await;
    let url = logs.store("store.db");
    let poison = ENDPOINTS + 1;
    rewrite_event(&url, poison, "type = 'not-invented-yet'").await;

    let words = ["rebuild", "--store", &url];
    let rebuilt = logs.run(&words).await.json_with_code(0);
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
