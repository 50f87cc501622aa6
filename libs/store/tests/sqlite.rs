//! What is particular to a store on SQLite: damage done behind its back, and a disk that
//! refuses to write.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![allow(clippy::unwrap_used)]

use contract::events::{Empty, Event};
use contract::ids::{EndpointKey, Position};
use contract::log::{Actor, NewEvent, Record, RowChange, StreamKind, StreamName};
use contract::time::Timestamp;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};
use store::{Append, Commit, CommitError, Projector, Store, StoreError, verify};
use tempfile::TempDir;
use uuid::Uuid;

fn url(folder: &TempDir) -> String {
    format!("sqlite:{}", folder.path().join("log.db").display())
}

fn commit(name: &str, expected_version: u64) -> Commit {
    let endpoint = EndpointKey::new(&name.parse().unwrap());
    let event = NewEvent {
        id: Uuid::now_v7(),
        time: Timestamp::from_secs(1),
        actor: Actor::service("test"),
        event: Event::EndpointDeletionRequested(Empty {}),
    };
    Commit {
        appends: vec![Append {
            stream: StreamName::of(StreamKind::Endpoint, &endpoint),
            expected_version,
            events: vec![event],
        }],
        ..Commit::default()
    }
}

/// Runs a statement on the database, past the store.
async fn behind_its_back(folder: &TempDir, sql: &'static str) {
    let mut connection = SqliteConnectOptions::new()
        .filename(folder.path().join("log.db"))
        .connect()
        .await
        .unwrap();
    sqlx::query(sql).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

struct NoRows;

impl Projector for NoRows {
    fn project(&mut self, _record: &Record) -> Vec<RowChange> {
        Vec::new()
    }
}

async fn store_with_three_events(folder: &TempDir) -> Store {
    let store = Store::open(&url(folder)).await.unwrap();
    for version in 0..3 {
        store.commit(commit("iris", version)).await.unwrap();
    }
    store
}

#[tokio::test]
async fn a_store_that_is_dropped_without_closing_can_be_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_three_events(&folder).await;
    let writer_gone = store.committed();
    drop(store);
    // The writer ends when nobody can hand it work any more; its subscribers see that.
    let mut writer_gone = writer_gone;
    assert_eq!(writer_gone.recv().await, None);
    let store = loop {
        // It still has to fold the write-ahead log into the database.
        match Store::open(&url(&folder)).await {
            Ok(store) => break store,
            Err(StoreError::Refused(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(store.head().await.unwrap(), Position(3));
}

#[tokio::test]
async fn a_url_of_another_kind_is_refused_with_what_to_write_instead() {
    for (bad, instead) in [
        ("/tmp/log.db", "sqlite:/tmp/log.db"),
        ("mysql://host/db", "sqlite:PATH"),
        ("sqlite:", "sqlite:PATH"),
        ("sqlite::memory:", "sqlite:PATH"),
    ] {
        let refused = Store::open(bad).await.err().unwrap().to_string();
        assert!(refused.contains(instead), "{bad}: {refused}");
    }
}

#[tokio::test]
async fn a_transaction_that_fails_answers_with_an_error_and_the_writer_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_three_events(&folder).await;
    behind_its_back(
        &folder,
        "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'disk full'); END",
    )
    .await;
    let failed = store.commit(commit("iris", 3)).await.unwrap_err();
    assert!(
        matches!(&failed, CommitError::Store(StoreError::Database(text)) if text.contains("disk full")),
        "{failed}"
    );
    assert_eq!(store.head().await.unwrap(), Position(3));
    behind_its_back(&folder, "DROP TRIGGER full").await;
    // The failed commit has left nothing behind: the same version is still free.
    store.commit(commit("iris", 3)).await.unwrap();
    let report = verify(&store, &mut NoRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.head, Position(4));
}

#[tokio::test]
async fn verify_finds_what_was_changed_behind_the_stores_back() {
    for (damage, sentence) in [
        (
            "UPDATE events SET prev = 0 WHERE position = 3",
            "prev is 0, but bucket",
        ),
        (
            "UPDATE events SET version = 9 WHERE position = 3",
            "version 9 of stream",
        ),
        (
            "DELETE FROM events WHERE position = 2",
            "prev is 2, but bucket",
        ),
        (
            "UPDATE events SET type_version = 99 WHERE position = 2",
            "version 99 is not known",
        ),
        (
            "UPDATE events SET data = '{' WHERE position = 2",
            "cannot be read",
        ),
        (
            "UPDATE events SET type = 'access.revoked', data = '{\"name\":\"x\"}' WHERE position = 2",
            "does not belong in stream",
        ),
        (
            "UPDATE events SET bucket = 1 WHERE position = 3",
            "belongs in bucket",
        ),
        (
            "INSERT INTO cursors (consumer, bucket, position) VALUES ('views', 1, 77)",
            "past the head",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let store = store_with_three_events(&folder).await;
        behind_its_back(&folder, damage).await;
        let report = verify(&store, &mut NoRows, &[]).await.unwrap();
        assert!(
            report
                .problems
                .iter()
                .any(|problem| problem.contains(sentence)),
            "{damage}: {:#?}",
            report.problems
        );
    }
}
