//! A test database of either kind, and helpers that fill a store.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![allow(dead_code)]

use std::sync::Arc;

use contract::events::{Empty, Event};
use contract::ids::EndpointKey;
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::Timestamp;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};
use store::{Append, Commit, Committed, Store};
use uuid::Uuid;

use super::postgres::{self, PostgresDatabase};

/// An empty database for one store.
pub enum TestDatabase {
    Sqlite(tempfile::TempDir),
    Postgres(PostgresDatabase),
}

impl TestDatabase {
    pub async fn sqlite() -> Option<Self> {
        Some(Self::Sqlite(tempfile::tempdir().unwrap()))
    }

    pub async fn postgres() -> Option<Self> {
        if postgres::skipped() {
            return None;
        }
        Some(Self::Postgres(PostgresDatabase::new().await))
    }

    pub fn url(&self) -> String {
        match self {
            Self::Sqlite(folder) => format!("sqlite:{}", folder.path().join("log.db").display()),
            Self::Postgres(database) => database.url(),
        }
    }

    pub async fn open(&self) -> Store {
        Store::open(&self.url()).await.unwrap()
    }

    /// Runs statements on the database, creating it if it does not exist.
    pub async fn run(&self, sql: &str) {
        let sql = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned()));
        match self {
            Self::Sqlite(folder) => {
                let options = SqliteConnectOptions::new().filename(folder.path().join("log.db"));
                let options = options.create_if_missing(true);
                let mut connection = options.connect().await.unwrap();
                sql.execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
            Self::Postgres(database) => {
                let mut connection = database.connect().await;
                sql.execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
        }
    }

    /// Queries a number from the database, bypassing the store.
    pub async fn number(&self, sql: &'static str) -> i64 {
        match self {
            Self::Sqlite(folder) => {
                let options = SqliteConnectOptions::new().filename(folder.path().join("log.db"));
                let mut connection = options.connect().await.unwrap();
                let number = sqlx::query_scalar(sql).fetch_one(&mut connection).await;
                connection.close().await.unwrap();
                number.unwrap()
            }
            Self::Postgres(database) => {
                let mut connection = database.connect().await;
                let number = sqlx::query_scalar(sql).fetch_one(&mut connection).await;
                connection.close().await.unwrap();
                number.unwrap()
            }
        }
    }

    /// Runs a statement on the database, bypassing the store.
    pub async fn execute_directly(&self, sql: &'static str) {
        match self {
            Self::Sqlite(folder) => {
                let options = SqliteConnectOptions::new().filename(folder.path().join("log.db"));
                let mut connection = options.connect().await.unwrap();
                sqlx::query(sql).execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
            Self::Postgres(database) => {
                let mut connection = database.connect().await;
                sqlx::query(sql).execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
        }
    }
}

pub fn endpoint(name: &str) -> EndpointKey {
    EndpointKey::new(&name.parse().unwrap())
}

pub fn stream(name: &str) -> StreamName {
    StreamName::of(StreamKind::Endpoint, &endpoint(name))
}

pub fn event_at(seconds: i64) -> NewEvent {
    NewEvent {
        id: Uuid::now_v7(),
        time: Timestamp::from_secs(seconds),
        actor: Actor::service("test"),
        event: Event::EndpointDeletionRequested(Empty {}),
    }
}

pub fn event() -> NewEvent {
    event_at(1_000)
}

pub fn append(stream: StreamName, expected_version: u64, count: usize) -> Append {
    Append {
        stream,
        expected_version,
        events: (0..count).map(|_| event()).collect(),
    }
}

pub fn commit_to(stream: StreamName, expected_version: u64, count: usize) -> Commit {
    Commit {
        appends: vec![append(stream, expected_version, count)],
        ..Commit::default()
    }
}

pub async fn records(store: &Store, commit: Commit) -> Vec<Arc<Record>> {
    match store.commit(commit).await.unwrap() {
        Committed::Written { records } => records,
        before => panic!("committed before: {before:?}"),
    }
}

pub async fn fill(store: &Store, name: &str, count: u64) {
    for version in 0..count {
        records(store, commit_to(stream(name), version, 1)).await;
    }
}
