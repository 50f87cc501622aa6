//! Behavior specific to SQLite: damage to the file, and a disk that refuses to write.

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
use store::{
    Append, Commit, CommitError, POSITIONS_SKIPPED, Projector, SavedHeads, Store, StoreError,
    heads, verify, verify_against,
};
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

/// Runs a statement on the database, bypassing the store.
async fn execute_directly(folder: &TempDir, sql: &'static str) {
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
    let writer_gone = store.subscribe();
    drop(store);
    // The writer ends when all handles are dropped; its subscribers see that.
    let mut writer_gone = writer_gone;
    assert_eq!(writer_gone.recv().await, None);
    let store = loop {
        // It still has to checkpoint the write-ahead log.
        match Store::open(&url(&folder)).await {
            Ok(store) => break store,
            Err(StoreError::InUse(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(store.head().await.unwrap(), Position(3));
}

#[tokio::test]
async fn an_unsupported_url_is_refused_with_a_correct_form() {
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
async fn a_failed_transaction_returns_an_error_and_the_writer_continues() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_three_events(&folder).await;
    execute_directly(
        &folder,
        "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'disk full'); END",
    )
    .await;
    let failed = store.commit(commit("iris", 3)).await.unwrap_err();
    assert!(
        matches!(&failed, CommitError::Store(StoreError::Database(text)) if text.as_str().contains("disk full")),
        "{failed}"
    );
    assert_eq!(store.head().await.unwrap(), Position(3));
    execute_directly(&folder, "DROP TRIGGER full").await;
    // The failed commit left no trace: the same version is still free.
    store.commit(commit("iris", 3)).await.unwrap();
    let report = verify(&store, &mut NoRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.head, Position(4));
}

#[tokio::test]
async fn verify_detects_direct_changes_to_the_database() {
    for (damage, sentence) in [
        (
            "UPDATE events SET prev = 0 WHERE position = 3",
            "prev is 0, but the previous event of bucket",
        ),
        (
            "UPDATE events SET version = 9 WHERE position = 3",
            "version 9 of stream",
        ),
        (
            "DELETE FROM events WHERE position = 2",
            "prev is 2, but the previous event of bucket",
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
        execute_directly(&folder, damage).await;
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

/// Fills the log until its table has many pages, and returns the file.
async fn file_with_many_pages(folder: &TempDir) -> std::path::PathBuf {
    let store = Store::open(&url(folder)).await.unwrap();
    for version in 0..300 {
        store.commit(commit("iris", version)).await.unwrap();
    }
    store.close().await;
    folder.path().join("log.db")
}

/// Overwrites the page that holds the event of this id.
fn damage_page_of(file: &std::path::Path, id: &str) {
    const PAGE: usize = 4096;
    let mut bytes = std::fs::read(file).unwrap();
    // In the table the id is followed by the event's type; in the index it is not.
    let tail = format!("{id}endpoint.deletion-requested");
    let at = bytes
        .windows(tail.len())
        .position(|text| text == tail.as_bytes());
    let page = at.unwrap() / PAGE * PAGE;
    bytes[page..page + PAGE].fill(0);
    std::fs::write(file, bytes).unwrap();
}

#[tokio::test]
async fn a_damaged_page_is_located_by_what_can_be_read_around_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = file_with_many_pages(&folder).await;
    let store = Store::open(&url(&folder)).await.unwrap();
    let event = store.read_raw(Position(149), 1).await.unwrap().remove(0);
    store.close().await;
    damage_page_of(&file, &event.id);
    let store = Store::open(&url(&folder)).await.unwrap();
    let report = verify(&store, &mut NoRows, &[]).await.unwrap();
    let [problem] = &report.problems[..] else {
        panic!("{report:?}");
    };
    let words: Vec<&str> = problem.split(' ').collect();
    let after = |word: &str| -> u64 {
        let at = words.iter().position(|w| *w == word).unwrap();
        words[at + 1].trim_end_matches(',').parse().unwrap()
    };
    let (intact, resumes) = (after("position"), after("from"));
    assert!(
        intact < 150 && 150 < resumes && resumes - intact < 60,
        "{problem}"
    );
    let parts = [
        "log.db is damaged (",
        "malformed",
        &format!(
            "those between {intact} and {resumes} cannot, and those from {resumes} to 300 can"
        ),
        "store rebuild --from BACKUP",
        "--from kafka://",
    ];
    for part in parts {
        assert!(problem.contains(part), "{part}: {problem}");
    }
    // The report is correct.
    assert!(store.read_raw(Position(intact - 1), 1).await.is_ok());
    assert!(store.read_raw(Position(resumes), 300).await.is_ok());
    let refused = store.read_raw(Position(intact), 1).await.unwrap_err();
    assert!(
        refused.to_string().contains("penstock store verify"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_store_with_a_damaged_end_does_not_open_and_reports_what_is_intact() {
    let folder = tempfile::tempdir().unwrap();
    let file = file_with_many_pages(&folder).await;
    let store = Store::open(&url(&folder)).await.unwrap();
    let event = store.read_raw(Position(299), 1).await.unwrap().remove(0);
    store.close().await;
    damage_page_of(&file, &event.id);
    let refused = Store::open(&url(&folder)).await.err().unwrap().to_string();
    for part in [
        "log.db is damaged",
        "events up to position 2",
        "none after that can",
    ] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
}

#[tokio::test]
async fn a_file_that_is_not_a_database_is_reported_and_left_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let file = file_with_many_pages(&folder).await;
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[..4096].fill(b'?');
    std::fs::write(&file, &bytes).unwrap();
    for _ in 0..2 {
        let refused = Store::open(&url(&folder)).await.err().unwrap().to_string();
        let parts = [
            "log.db is damaged (",
            "not a database",
            "nothing of it can be read",
            "BACKUP",
        ];
        for part in parts {
            assert!(refused.contains(part), "{part}: {refused}");
        }
    }
    assert_eq!(std::fs::read(&file).unwrap(), bytes);
}

#[tokio::test]
async fn a_truncated_write_ahead_log_is_detected_by_recorded_heads() {
    let (folder, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = Store::open(&url(&folder)).await.unwrap();
    for version in 0..30 {
        store.commit(commit("iris", version)).await.unwrap();
    }
    let recorded = heads(&store).await.unwrap();
    assert!(SavedHeads::of(&store).unwrap().save().await.unwrap());
    for file in ["log.db", "log.db-wal"] {
        std::fs::copy(folder.path().join(file), copy.path().join(file)).unwrap();
    }
    let wal = copy.path().join("log.db-wal");
    let bytes = std::fs::read(&wal).unwrap();
    std::fs::write(&wal, &bytes[..bytes.len() / 2]).unwrap();
    let store = Store::open(&url(&copy)).await.unwrap();
    // The remaining log is sound.
    let report = verify(&store, &mut NoRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert!((1..30).contains(&report.events), "{report:?}");
    let report = verify_against(&store, &mut NoRows, &[], &recorded).await;
    let found = report.unwrap().problems;
    let is_found = found.len() == 1 && found[0].starts_with("position 30, recorded as the head");
    assert!(is_found, "{found:?}");
    // The heads next to the store are recorded heads, too.
    let saved = copy.path().join("log.db.heads.json");
    std::fs::copy(folder.path().join("log.db.heads.json"), &saved).unwrap();
    let again = verify(&store, &mut NoRows, &[]).await.unwrap().problems;
    assert_eq!(again, found);
}

/// A store that has lost everything after its 10th event, and its file of saved heads.
async fn store_without_its_end(folder: &TempDir) -> (Store, std::path::PathBuf) {
    let store = Store::open(&url(folder)).await.unwrap();
    for version in 0..30 {
        store.commit(commit("iris", version)).await.unwrap();
    }
    assert!(SavedHeads::of(&store).unwrap().save().await.unwrap());
    store.close().await;
    execute_directly(folder, "DELETE FROM events WHERE position > 10").await;
    let store = Store::open(&url(folder)).await.unwrap();
    (store, folder.path().join("log.db.heads.json"))
}

#[tokio::test]
async fn lost_events_are_named_until_the_saved_heads_are_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let (store, file) = store_without_its_end(&folder).await;
    let mut heads = SavedHeads::of(&store).unwrap();
    let warning = heads.check().await.unwrap().unwrap();
    let bucket = EndpointKey::new(&"iris".parse().unwrap()).bucket();
    for part in [
        "log.db has lost events",
        &format!("Bucket {bucket} lost everything after 10, up to 30"),
        "store rebuild --from",
        &format!("deleting {}", file.display()),
    ] {
        assert!(warning.contains(part), "{part}: {warning}");
    }
    store.commit(commit("iris", 10)).await.unwrap();
    assert!(!heads.save().await.unwrap());
    assert!(
        SavedHeads::of(&store)
            .unwrap()
            .check()
            .await
            .unwrap()
            .is_some()
    );
    std::fs::remove_file(file).unwrap();
    assert!(heads.save().await.unwrap());
    assert_eq!(SavedHeads::of(&store).unwrap().check().await.unwrap(), None);
    let report = verify(&store, &mut NoRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}

#[tokio::test]
async fn positions_of_lost_events_are_not_assigned_again() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = store_without_its_end(&folder).await;
    SavedHeads::of(&store).unwrap().check().await.unwrap();
    store.commit(commit("iris", 10)).await.unwrap();
    assert_eq!(
        store.head().await.unwrap(),
        Position(30 + POSITIONS_SKIPPED)
    );
}

#[tokio::test]
async fn saved_heads_that_cannot_be_read_are_reported_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_three_events(&folder).await;
    let file = folder.path().join("log.db.heads.json");
    std::fs::write(&file, "").unwrap();
    let mut heads = SavedHeads::of(&store).unwrap();
    let warning = heads.check().await.unwrap().unwrap();
    for part in [
        format!(
            "the saved heads in {} cannot be read: it is empty",
            file.display()
        ),
        format!("delete {}", file.display()),
    ] {
        assert!(warning.contains(&part), "{part}: {warning}");
    }
    assert!(!heads.save().await.unwrap());
    let report = verify(&store, &mut NoRows, &[]).await.unwrap();
    assert_eq!(report.problems, [warning]);
}

#[tokio::test]
async fn a_failure_keeps_the_error_that_caused_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "").unwrap();
    let url = format!("sqlite:{}", folder.path().join("file/log.db").display());
    let Err(refused) = Store::open(&url).await else {
        panic!("a file is no folder");
    };
    let mut cause = std::error::Error::source(&refused);
    while let Some(error) = cause
        && !error.is::<std::io::Error>()
    {
        cause = error.source();
    }
    assert!(cause.is_some(), "{refused:?}");
}
