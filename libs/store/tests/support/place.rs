//! A place for a store on either database, and what the suites put into it.

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

use super::postgres::{self, Database};

/// An empty place for one store.
pub enum Place {
    Sqlite(tempfile::TempDir),
    Postgres(Database),
}

impl Place {
    pub async fn sqlite() -> Option<Self> {
        Some(Self::Sqlite(tempfile::tempdir().unwrap()))
    }

    pub async fn postgres() -> Option<Self> {
        if postgres::skipped() {
            return None;
        }
        Some(Self::Postgres(Database::new().await))
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

    /// Runs statements on the database, where no store need be yet.
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

    /// Asks the database for a number, past the store.
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

    /// Runs a statement on the database, past the store.
    pub async fn behind_its_back(&self, sql: &'static str) {
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
        Committed::Now { records } => records,
        before => panic!("committed before: {before:?}"),
    }
}

pub async fn fill(store: &Store, name: &str, count: u64) {
    for version in 0..count {
        records(store, commit_to(stream(name), version, 1)).await;
    }
}
