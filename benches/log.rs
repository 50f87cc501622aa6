//! The log beside the limit of its databases, at the same durability, and how quickly it is replayed:
//!
//! * appends by many committers at once, beside plain inserts in batches into the same indexed table
//!   (bar: at least half as many), on SQLite and on PostgreSQL;
//! * replay of a long log from the embedded store into memory (bar: 150,000 events/s) and into all
//!   persisted read models (bar: 50,000 events/s).
//!
//! `cargo bench -p penstock-control --bench log`. `EVENTS` per round, `ROUNDS`, `REPLAY` events (0
//! leaves that out); `FOLDER` where files are made (a disk, not memory, for numbers that mean
//! something); `PENSTOCK_TEST_POSTGRES` and `PENSTOCK_SKIP=postgres` as in the tests.

#![allow(clippy::unwrap_used)]

#[path = "../libs/store/tests/support/postgres.rs"]
mod postgres;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use contract::events::Event;
use contract::ids::{EndpointKey, Position};
use contract::log::{Actor, NewEvent, StreamKind, StreamName};
use contract::time::Timestamp;
use domain::views::{MODELS, Projection};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, PgConnection, QueryBuilder, Sqlite, SqliteConnection};
use store::{Append, Commit, RawRecord, Store, append_raw, rebuild};
use uuid::Uuid;

/// Callers that append at the same time, each to streams of its own.
const COMMITTERS: usize = 1_024;
/// Rows per transaction of the plain inserts: as many as the store puts into one.
const BATCH: usize = 512;
const ENDPOINTS: usize = 200;

fn number(name: &str, default: usize) -> usize {
    let given = std::env::var(name).ok();
    given.map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number"))
    })
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (events, rounds) = (number("EVENTS", 20_000), number("ROUNDS", 5));
        let folder = std::env::var_os("FOLDER").map_or_else(std::env::temp_dir, PathBuf::from);
        let folder = tempfile::tempdir_in(folder).unwrap();
        let mut table = vec![sqlite_appends(&folder, events, rounds).await];
        if !postgres::skipped() {
            table.push(postgres_appends(events, rounds).await);
        }
        table.extend(replay(&folder, number("REPLAY", 1_000_000), rounds).await);
        print(&table);
    });
}

/// One line of what is printed: events per second, and what they are held against.
struct Line {
    what: String,
    ours: f64,
    plain: Option<f64>,
    /// Of ours to the plain, or to nothing.
    bar: f64,
    reached: f64,
}

fn print(table: &[Line]) {
    println!();
    println!(
        "{:<48} {:>10} {:>10} {:>8} {:>8}  ",
        "events/s (medians)", "store", "plain", "ratio", "bar"
    );
    for line in table {
        let plain = line
            .plain
            .map_or_else(|| "-".to_owned(), |plain| format!("{plain:.0}"));
        let (ratio, bar) = match line.plain {
            Some(_) => (format!("{:.2}", line.reached), format!("{:.2}", line.bar)),
            None => ("-".to_owned(), format!("{:.0}", line.bar)),
        };
        let verdict = if line.reached >= line.bar {
            "holds"
        } else {
            "MISSED"
        };
        println!(
            "{:<48} {:>10.0} {plain:>10} {ratio:>8} {bar:>8}  {verdict}",
            line.what, line.ours
        );
    }
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn beside(what: &str, through_store: Vec<f64>, plain: Vec<f64>) -> Line {
    let pairs = through_store.iter().zip(&plain);
    let ratios = pairs.map(|(ours, plain)| ours / plain).collect();
    Line {
        what: what.to_owned(),
        ours: median(through_store),
        plain: Some(median(plain)),
        bar: 0.5,
        reached: median(ratios),
    }
}

fn alone(what: String, rates: Vec<f64>, bar: f64) -> Line {
    let ours = median(rates);
    Line {
        what,
        ours,
        plain: None,
        bar,
        reached: ours,
    }
}

/// One event per commit, by many at once. Returns events per second.
async fn appends(store: &Store, round: usize, events: usize) -> f64 {
    let each = events / COMMITTERS + 1;
    let started = Instant::now();
    let committers: Vec<_> = (0..COMMITTERS)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                let endpoint = EndpointKey::new(&format!("e{n}-{round}").parse().unwrap());
                for version in 0..each {
                    let append = Append {
                        stream: StreamName::of_node(&endpoint, "node-1"),
                        expected_version: version as u64,
                        events: vec![ready()],
                    };
                    let commit = Commit {
                        appends: vec![append],
                        ..Commit::default()
                    };
                    store.commit(commit).await.unwrap();
                }
            })
        })
        .collect();
    for committer in committers {
        committer.await.unwrap();
    }
    (each * COMMITTERS) as f64 / started.elapsed().as_secs_f64()
}

fn ready() -> NewEvent {
    NewEvent {
        id: Uuid::now_v7(),
        time: Timestamp::from_secs(1_000),
        actor: Actor::service("bench"),
        event: Event::decode("instance.ready", 1, r#"{"id":"iris-blue-000000000001"}"#).unwrap(),
    }
}

/// Rows as the store would write them, beginning after a position.
fn rows(round: usize, events: usize) -> Vec<RawRecord> {
    let each = events / COMMITTERS + 1;
    let first = round * each * COMMITTERS;
    let row = |n: usize| {
        let endpoint = EndpointKey::new(&format!("e{}-{round}", n % COMMITTERS).parse().unwrap());
        let event = ready();
        RawRecord {
            position: Position((first + n + 1) as u64),
            prev: Position((first + n) as u64),
            bucket: endpoint.bucket(),
            stream: StreamName::of_node(&endpoint, "node-1").to_string(),
            version: (n / COMMITTERS + 1) as u64,
            id: event.id.to_string(),
            type_name: event.event.type_name().to_owned(),
            type_version: event.event.version(),
            time: event.time,
            actor: event.actor.0,
            data: event.event.data_json().unwrap(),
        }
    };
    (0..each * COMMITTERS).map(row).collect()
}

async fn sqlite_appends(folder: &tempfile::TempDir, events: usize, rounds: usize) -> Line {
    let path = folder.path().join("appends.db");
    let store = Store::open(&format!("sqlite:{}", path.display()))
        .await
        .unwrap();
    let path = folder.path().join("plain.db");
    let empty = Store::open(&format!("sqlite:{}", path.display()))
        .await
        .unwrap();
    empty.close().await;
    let mut connection = SqliteConnectOptions::new()
        .filename(&path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .disable_statement_logging()
        .connect()
        .await
        .unwrap();
    let (mut through_store, mut plain) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        through_store.push(appends(&store, round, events).await);
        let rows = rows(round, events);
        let started = Instant::now();
        for batch in rows.chunks(BATCH) {
            plain_sqlite(&mut connection, batch).await;
        }
        plain.push(rows.len() as f64 / started.elapsed().as_secs_f64());
    }
    store.close().await;
    beside("appends, SQLite, synchronous=FULL", through_store, plain)
}

async fn plain_sqlite(connection: &mut SqliteConnection, batch: &[RawRecord]) {
    let mut transaction = connection.begin().await.unwrap();
    for chunk in batch.chunks(64) {
        QueryBuilder::<Sqlite>::new(
            "INSERT INTO events (position, prev, bucket, stream, version, id, type, type_version, time, actor, data) ",
        )
        .push_values(chunk, |mut row, event| {
            row.push_bind(event.position.0 as i64)
                .push_bind(event.prev.0 as i64)
                .push_bind(i64::from(event.bucket.0))
                .push_bind(event.stream.clone())
                .push_bind(event.version as i64)
                .push_bind(event.id.clone())
                .push_bind(event.type_name.clone())
                .push_bind(i64::from(event.type_version))
                .push_bind(event.time.millis())
                .push_bind(event.actor.clone())
                .push_bind(event.data.clone());
        })
        .build()
        .execute(&mut *transaction)
        .await
        .unwrap();
    }
    transaction.commit().await.unwrap();
}

async fn postgres_appends(events: usize, rounds: usize) -> Line {
    let own = match std::env::var("PENSTOCK_TEST_POSTGRES") {
        Ok(url) => (format!("{}/postgres", url.trim_end_matches('/')), None),
        Err(_) => {
            let starting = tokio::task::spawn_blocking(servers::Postgres::start);
            let server = starting.await.unwrap().unwrap();
            (server.url("postgres"), Some(server))
        }
    };
    let properties = "ENCODING 'UTF8' TEMPLATE template0";
    let of_store = postgres::Database::on(&own.0, properties).await;
    let of_plain = postgres::Database::on(&own.0, properties).await;
    let store = Store::open(&of_store.url()).await.unwrap();
    Store::open(&of_plain.url()).await.unwrap().close().await;
    let mut connection = of_plain.connect().await;
    let (mut through_store, mut plain) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        through_store.push(appends(&store, round, events).await);
        let rows = rows(round, events);
        let started = Instant::now();
        for batch in rows.chunks(BATCH) {
            plain_postgres(&mut connection, batch).await;
        }
        plain.push(rows.len() as f64 / started.elapsed().as_secs_f64());
    }
    store.close().await;
    beside("appends, PostgreSQL, fsync=on", through_store, plain)
}

async fn plain_postgres(connection: &mut PgConnection, batch: &[RawRecord]) {
    let numbers = |of: fn(&RawRecord) -> i64| batch.iter().map(of).collect::<Vec<i64>>();
    let texts = |of: fn(&RawRecord) -> String| batch.iter().map(of).collect::<Vec<String>>();
    let mut transaction = connection.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO events \
         (position, prev, bucket, stream, version, id, type, type_version, time, actor, data) \
         SELECT * FROM UNNEST($1::BIGINT[], $2::BIGINT[], $3::BIGINT[], $4::TEXT[], $5::BIGINT[], \
         $6::TEXT[], $7::TEXT[], $8::BIGINT[], $9::BIGINT[], $10::TEXT[], $11::TEXT[])",
    )
    .bind(numbers(|event| event.position.0 as i64))
    .bind(numbers(|event| event.prev.0 as i64))
    .bind(numbers(|event| i64::from(event.bucket.0)))
    .bind(texts(|event| event.stream.clone()))
    .bind(numbers(|event| event.version as i64))
    .bind(texts(|event| event.id.clone()))
    .bind(texts(|event| event.type_name.clone()))
    .bind(numbers(|event| i64::from(event.type_version)))
    .bind(numbers(|event| event.time.millis()))
    .bind(texts(|event| event.actor.clone()))
    .bind(texts(|event| event.data.clone()))
    .execute(&mut *transaction)
    .await
    .unwrap();
    transaction.commit().await.unwrap();
}

/// What one endpoint goes through, over and over: (type, kind of its stream).
const CYCLE: [(&str, StreamKind); 20] = {
    use StreamKind::{Instances, Node, Scaling, Usage};
    [
        ("scaling.decided", Scaling),
        ("instance.requested", Instances),
        ("instance.started", Node),
        ("instance.ready", Node),
        ("usage.closed", Usage),
        ("usage.closed", Usage),
        ("usage.closed", Usage),
        ("instance.unready", Node),
        ("instance.ready", Node),
        ("usage.closed", Usage),
        ("usage.closed", Usage),
        ("instance.unready", Node),
        ("instance.ready", Node),
        ("usage.closed", Usage),
        ("usage.closed", Usage),
        ("scaling.decided", Scaling),
        ("instance.draining", Instances),
        ("usage.closed", Usage),
        ("instance.removal-requested", Instances),
        ("instance.stopped", Node),
    ]
};

/// Makes a long log of realistic events.
struct Writer {
    templates: BTreeMap<&'static str, String>,
    prev: BTreeMap<u16, u64>,
    versions: BTreeMap<String, u64>,
    position: u64,
    bytes: u64,
}

impl Writer {
    fn new() -> Self {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../libs/contract/tests/golden/events"
        );
        let types = CYCLE.iter().map(|(name, _)| *name);
        let templates = types
            .chain(["endpoint.created", "deployment.created"])
            .map(|name| {
                let text = std::fs::read_to_string(format!("{folder}/{name}.v1.json")).unwrap();
                let data = Event::decode(name, 1, &text).unwrap().data_json().unwrap();
                // All of one incarnation.
                (
                    name,
                    data.replace(
                        "00000000-0000-0000-0000-000000000007",
                        "019a0000-0000-7000-8000-000000000001",
                    ),
                )
            });
        Self {
            templates: templates.collect(),
            prev: BTreeMap::new(),
            versions: BTreeMap::new(),
            position: 0,
            bytes: 0,
        }
    }

    fn event(&mut self, endpoint: usize, kind: StreamKind, name: &str, turn: usize) -> RawRecord {
        let key = EndpointKey::new(&format!("e{endpoint}").parse().unwrap());
        let stream = match kind {
            StreamKind::Node => StreamName::of_node(&key, "node-1"),
            kind => StreamName::of(kind, &key),
        };
        let minute = Timestamp::from_secs(1_700_000_000 / 60 * 60 + self.position as i64 * 60);
        let data = self.templates[name]
            .replace(
                "iris-blue-000000000001",
                &format!("e{endpoint}-blue-{turn:012}"),
            )
            .replace("\"iris\"", &format!("\"e{endpoint}\""))
            .replace(
                "\"2026-11-22T10:00:00.000Z\"",
                &serde_json::to_string(&minute).unwrap(),
            );
        self.position += 1;
        self.bytes += data.len() as u64;
        let version = self.versions.entry(stream.to_string()).or_default();
        *version += 1;
        let prev = self.prev.insert(key.bucket().0, self.position);
        RawRecord {
            position: Position(self.position),
            prev: Position(prev.unwrap_or(0)),
            bucket: key.bucket(),
            stream: stream.to_string(),
            version: *version,
            id: Uuid::now_v7().to_string(),
            type_name: name.to_owned(),
            type_version: 1,
            time: minute,
            actor: "service:bench".to_owned(),
            data,
        }
    }

    async fn write(&mut self, store: &Store, events: usize) {
        let mut batch = Vec::new();
        for endpoint in 0..ENDPOINTS {
            batch.push(self.event(endpoint, StreamKind::Endpoint, "endpoint.created", 0));
            batch.push(self.event(endpoint, StreamKind::Endpoint, "deployment.created", 0));
        }
        for turn in 0.. {
            for (name, kind) in CYCLE {
                for endpoint in 0..ENDPOINTS {
                    batch.push(self.event(endpoint, kind, name, turn));
                }
            }
            let done = self.position as usize >= events;
            if batch.len() >= 20_000 || done {
                append_raw(store, std::mem::take(&mut batch)).await.unwrap();
            }
            if done {
                return;
            }
        }
    }
}

/// What the read models are made by, as control does it.
#[derive(Default)]
struct Views(Projection);

impl store::Projector for Views {
    fn project(&mut self, record: &contract::log::Record) -> Vec<contract::log::RowChange> {
        self.0.apply(record)
    }
}

async fn replay(folder: &tempfile::TempDir, events: usize, rounds: usize) -> Vec<Line> {
    if events == 0 {
        return Vec::new();
    }
    let path = folder.path().join("replay.db");
    let store = Store::open(&format!("sqlite:{}", path.display()))
        .await
        .unwrap();
    let mut writer = Writer::new();
    writer.write(&store, events).await;
    let events = writer.position;
    println!(
        "replay: {events} events of {ENDPOINTS} endpoints, {} bytes of data each on average",
        writer.bytes / events
    );
    let (mut into_memory, mut into_rows, mut rows) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds {
        let started = Instant::now();
        let mut read = 0_u64;
        let mut replay = store.replay(Position::START);
        while let Some(page) = replay.next().await {
            read += page.unwrap().len() as u64;
        }
        assert_eq!(read, events);
        into_memory.push(events as f64 / started.elapsed().as_secs_f64());
    }
    for _ in 0..rounds.min(3) {
        drop_rows(&path).await;
        let started = Instant::now();
        rows = rebuild(&store, &mut Views::default(), &MODELS)
            .await
            .unwrap();
        into_rows.push(events as f64 / started.elapsed().as_secs_f64());
    }
    store.close().await;
    vec![
        alone("replay into memory".to_owned(), into_memory, 150_000.0),
        alone(
            format!("replay into {rows} rows of read models"),
            into_rows,
            50_000.0,
        ),
    ]
}

/// Every rebuild begins with none.
async fn drop_rows(path: &std::path::Path) {
    let options = SqliteConnectOptions::new().filename(path);
    let mut connection = options.connect().await.unwrap();
    sqlx::query("DELETE FROM rows")
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
}
