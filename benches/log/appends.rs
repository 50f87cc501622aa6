//! Appends through the store compared with plain inserts, with the same table layout and durability.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use std::time::Instant;

use contract::chain::ChainHash;
use contract::events::Event;
use contract::ids::{EndpointKey, Position};
use contract::log::{Actor, NewEvent, StreamName};
use contract::time::Timestamp;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, PgConnection, QueryBuilder, Sqlite, SqliteConnection};
use store::{Append, Commit, RawRecord, Store};
use uuid::Uuid;

use crate::Options;
use crate::table::{Bar, Measurement};

/// Number of concurrent committers, each with its own streams.
const COMMITTERS: usize = 1_024;

/// Rows per transaction of the plain inserts, as in the store.
const BATCH: usize = 512;

/// Required ratio to the plain inserts.
const BAR: f64 = 0.5;

pub async fn on_sqlite(options: &Options) -> Measurement {
    let url = |name| format!("sqlite:{}", options.path(name).display());
    let store = Store::open(&url("appends.db")).await.unwrap();
    // Creates the tables.
    Store::open(&url("plain.db")).await.unwrap().close().await;
    let connection = SqliteConnectOptions::new()
        .filename(options.path("plain.db"))
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .disable_statement_logging();
    let plain = PlainConnection::Sqlite(connection.connect().await.unwrap());
    compare_with_plain_inserts("appends, SQLite, synchronous=FULL", options, &store, plain).await
}

/// Two empty databases of one server.
pub async fn on_postgres(options: &Options, ours: &str, plain: &str) -> Measurement {
    let store = Store::open(ours).await.unwrap();
    Store::open(plain).await.unwrap().close().await;
    let plain = PlainConnection::Postgres(PgConnection::connect(plain).await.unwrap());
    compare_with_plain_inserts("appends, PostgreSQL, fsync=on", options, &store, plain).await
}

async fn compare_with_plain_inserts(
    what: &str,
    options: &Options,
    store: &Store,
    mut connection: PlainConnection,
) -> Measurement {
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    for round in 0..options.rounds {
        ours.push(through_store(store, round, options.events).await);
        let rows = rows(round, options.events);
        let started = Instant::now();
        for batch in rows.chunks(BATCH) {
            connection.insert(batch).await;
        }
        plain.push(rows.len() as f64 / started.elapsed().as_secs_f64());
    }
    store.close().await;
    Measurement {
        what: what.to_owned(),
        ours,
        against: Bar::Relative { plain, bar: BAR },
    }
}

/// Concurrent commits of one event each. Returns events per second.
async fn through_store(store: &Store, round: usize, events: usize) -> f64 {
    let each = events / COMMITTERS + 1;
    let started = Instant::now();
    let committer = |n| commit_all(store.clone(), endpoint(n, round), each);
    let committers: Vec<_> = (0..COMMITTERS)
        .map(|n| tokio::spawn(committer(n)))
        .collect();
    for committer in committers {
        committer.await.unwrap();
    }
    (each * COMMITTERS) as f64 / started.elapsed().as_secs_f64()
}

async fn commit_all(store: Store, endpoint: EndpointKey, events: usize) {
    for version in 0..events {
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
}

fn endpoint(n: usize, round: usize) -> EndpointKey {
    EndpointKey::new(&format!("e{n}-{round}").parse().unwrap())
}

fn ready() -> NewEvent {
    NewEvent {
        id: Uuid::now_v7(),
        time: Timestamp::from_secs(1_000),
        actor: Actor::service("bench"),
        event: Event::decode("instance.ready", 1, r#"{"id":"iris-blue-000000000001"}"#).unwrap(),
    }
}

/// Rows as the store would write them.
fn rows(round: usize, events: usize) -> Vec<RawRecord> {
    let each = events / COMMITTERS + 1;
    let first = round * each * COMMITTERS;
    let row = |n: usize| {
        let endpoint = endpoint(n % COMMITTERS, round);
        let event = ready();
        RawRecord {
            position: Position((first + n + 1) as u64),
            prev: Position((first + n) as u64),
            prev_hash: Some(ChainHash([n as u8; 32])),
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

/// A connection for plain inserts.
enum PlainConnection {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl PlainConnection {
    /// Inserts a batch in one transaction.
    async fn insert(&mut self, batch: &[RawRecord]) {
        match self {
            Self::Sqlite(connection) => insert_into_sqlite(connection, batch).await,
            Self::Postgres(connection) => insert_into_postgres(connection, batch).await,
        }
    }
}

async fn insert_into_sqlite(connection: &mut SqliteConnection, batch: &[RawRecord]) {
    let mut transaction = connection.begin().await.unwrap();
    for chunk in batch.chunks(64) {
        QueryBuilder::<Sqlite>::new(
            "INSERT INTO events (position, prev, bucket, stream, version, id, type, type_version, time, actor, data, prev_hash) ",
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
                .push_bind(event.data.clone())
                .push_bind(event.prev_hash.map(|hash| hash.0.to_vec()));
        })
        .build()
        .execute(&mut *transaction)
        .await
        .unwrap();
    }
    transaction.commit().await.unwrap();
}

async fn insert_into_postgres(connection: &mut PgConnection, batch: &[RawRecord]) {
    let numbers = |of: fn(&RawRecord) -> i64| batch.iter().map(of).collect::<Vec<i64>>();
    let texts = |of: fn(&RawRecord) -> String| batch.iter().map(of).collect::<Vec<String>>();
    let mut transaction = connection.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO events \
         (position, prev, bucket, stream, version, id, type, type_version, time, actor, data, prev_hash) \
         SELECT * FROM UNNEST($1::BIGINT[], $2::BIGINT[], $3::BIGINT[], $4::TEXT[], $5::BIGINT[], \
         $6::TEXT[], $7::TEXT[], $8::BIGINT[], $9::BIGINT[], $10::TEXT[], $11::TEXT[], $12::BYTEA[])",
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
    .bind(
        batch
            .iter()
            .map(|event| event.prev_hash.map(|hash| hash.0.to_vec()))
            .collect::<Vec<Option<Vec<u8>>>>(),
    )
    .execute(&mut *transaction)
    .await
    .unwrap();
    transaction.commit().await.unwrap();
}
