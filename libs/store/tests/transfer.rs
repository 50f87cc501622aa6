//! Operations on entire logs, on either database: hashes, copies, backups, and unreadable events.

#![allow(clippy::unwrap_used)]

mod support;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use store::{
    Commit, CursorMove, IdempotencyKey, LogEntry, POSITIONS_SKIPPED, RawRecord, Store, StoreError,
    append_raw, backup, copy, log_hash, rebuild, skip_positions_above, verify,
};
use support::database::*;

struct NoRows;

impl store::Projector for NoRows {
    fn project(&mut self, _: &contract::log::Record) -> Vec<contract::log::RowChange> {
        Vec::new()
    }
}

/// Projects one row per event.
struct EventRows;

impl store::Projector for EventRows {
    fn project(&mut self, record: &contract::log::Record) -> Vec<contract::log::RowChange> {
        vec![contract::log::RowChange {
            model: "happened",
            key: record.id.to_string(),
            endpoint: String::new(),
            deployment: String::new(),
            position: record.position,
            time: record.time,
            doc: Some("{}".to_owned()),
        }]
    }
}

async fn assert_sound(store: &Store) {
    let report = verify(store, &mut NoRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}

/// Creates a log of several streams and buckets, with a cursor, a fence and an idempotency key.
async fn sample_log(db: &TestDatabase) -> Store {
    let store = db.open().await;
    for version in 0..4 {
        for name in ["iris", "rose", "tulip"] {
            records(&store, commit_to(stream(name), version, 1)).await;
        }
    }
    let fence = store.acquire_fence("relay").await.unwrap();
    let commit = Commit {
        cursor: Some(CursorMove {
            consumer: "relay",
            bucket: Bucket::GLOBAL,
            from: Position::START,
            to: Position(7),
        }),
        idempotency_key: Some(idempotency_key()),
        fence: Some(fence),
        ..commit_to(stream("iris"), 4, 1)
    };
    records(&store, commit).await;
    store
}

fn idempotency_key() -> IdempotencyKey {
    IdempotencyKey {
        key: "views:1".to_owned(),
        body_hash: "b".to_owned(),
        result: Some("r".to_owned()),
    }
}

async fn raw(store: &Store) -> Vec<RawRecord> {
    store.read_raw(Position::START, 1_000).await.unwrap()
}

async fn hash(store: &Store) -> store::LogHash {
    let head = store.head().await.unwrap();
    log_hash(store, head).await.unwrap()
}

/// Creates an empty SQLite store in addition to the one under test.
async fn sqlite_store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("other.db").display());
    let store = Store::open(&url).await.unwrap();
    (folder, store)
}

async fn the_hash_covers_events_and_their_positions(db: TestDatabase) {
    let store = sample_log(&db).await;
    let first = hash(&store).await;
    assert_eq!((first.events, first.head), (13, Position(13)));
    assert_eq!(first.sha256.len(), 64);
    assert_eq!(log_hash(&store, Position(99)).await.unwrap(), first);
    let shorter = log_hash(&store, Position(12)).await.unwrap();
    assert_eq!(shorter.events, 12);
    assert_ne!(shorter.sha256, first.sha256);
    db.execute_directly("UPDATE events SET actor = 'service:tess' WHERE position = 5")
        .await;
    assert_ne!(hash(&store).await.sha256, first.sha256);
}

async fn raw_events_restore_the_same_log_in_another_store(db: TestDatabase) {
    let (_folder, from) = sqlite_store().await;
    for version in 0..5 {
        records(&from, commit_to(stream("iris"), version, 1)).await;
        records(&from, commit_to(stream("rose"), version, 1)).await;
    }
    let store = db.open().await;
    let events = raw(&from).await;
    assert_eq!(append_raw(&store, events[..4].to_vec()).await.unwrap(), 4);
    // Existing events are compared, the rest is written.
    assert_eq!(append_raw(&store, events.clone()).await.unwrap(), 6);
    assert_eq!(append_raw(&store, events[2..5].to_vec()).await.unwrap(), 0);
    assert_eq!(raw(&store).await, events);
    assert_eq!(hash(&store).await, hash(&from).await);
    assert_eq!(*store.head_watch().borrow(), Position(10));
    assert_sound(&store).await;
}

async fn raw_events_that_do_not_continue_the_log_are_refused(db: TestDatabase) {
    let (_folder, from) = sqlite_store().await;
    for version in 0..4 {
        records(&from, commit_to(stream("iris"), version, 1)).await;
    }
    let events = raw(&from).await;
    let store = db.open().await;
    append_raw(&store, events[..2].to_vec()).await.unwrap();
    let changed = |change: fn(&mut RawRecord)| {
        let mut event = events[2].clone();
        change(&mut event);
        vec![event]
    };
    for (bad, sentence) in [
        (
            changed(|event| event.prev = Position(1)),
            "prev is 1, but bucket",
        ),
        (
            changed(|event| event.version = 4),
            "does not follow version 2",
        ),
        (
            changed(|event| event.bucket = Bucket(64)),
            "does not belong in bucket 64",
        ),
        (
            changed(|event| event.position = Position(2)),
            "differs between the two logs",
        ),
        (
            changed(|event| event.prev_hash = Some(ChainHash([7; 32]))),
            "position 3: its previous-event hash does not match the event at 2",
        ),
        (vec![events[3].clone()], "prev is 3, but bucket"),
        (
            vec![events[2].clone(), events[2].clone()],
            "does not come after 3",
        ),
    ] {
        let refused = append_raw(&store, bad).await.unwrap_err().to_string();
        assert!(refused.contains(sentence), "{sentence}: {refused}");
    }
    assert_eq!(raw(&store).await, events[..2]);
    append_raw(&store, events.clone()).await.unwrap();
}

async fn events_published_before_the_chain_are_chained_when_restored(db: TestDatabase) {
    let (_folder, from) = sqlite_store().await;
    for version in 0..4 {
        records(&from, commit_to(stream("iris"), version, 1)).await;
        records(&from, commit_to(stream("rose"), version, 1)).await;
    }
    let events = raw(&from).await;
    let mut older = events.clone();
    older[..5]
        .iter_mut()
        .for_each(|event| event.prev_hash = None);
    let store = db.open().await;
    append_raw(&store, older[..3].to_vec()).await.unwrap();
    append_raw(&store, older).await.unwrap();
    assert_eq!(raw(&store).await, events);
    assert_sound(&store).await;
}

async fn new_positions_start_well_above_restored_events(db: TestDatabase) {
    let (_folder, from) = sqlite_store().await;
    fill(&from, "iris", 3).await;
    let store = db.open().await;
    append_raw(&store, raw(&from).await).await.unwrap();
    let next = records(&store, commit_to(stream("iris"), 3, 2)).await;
    let first = 3 + POSITIONS_SKIPPED;
    assert_eq!(next[0].position, Position(first));
    assert_eq!(next[0].prev, Position(3));
    assert_eq!(next[1].position, Position(first + 1));
    store.close().await;
    let store = db.open().await;
    let after = records(&store, commit_to(stream("iris"), 5, 1)).await;
    assert_eq!(after[0].position, Position(first + 2));
    assert_sound(&store).await;
    // A higher position raises the floor; a lower one does not reduce it.
    skip_positions_above(&store, Position(9_000_000))
        .await
        .unwrap();
    skip_positions_above(&store, Position(1)).await.unwrap();
    let high = records(&store, commit_to(stream("iris"), 6, 1)).await;
    assert_eq!(high[0].position, Position(9_000_000 + POSITIONS_SKIPPED));
}

async fn a_copy_has_the_log_cursors_fences_and_idempotency_keys(db: TestDatabase) {
    let from = sample_log(&db).await;
    let (_folder, to) = sqlite_store().await;
    let mut progress = Vec::new();
    let copied = copy(&from, &to, |done, of| progress.push((done, of)))
        .await
        .unwrap();
    assert_eq!(copied, hash(&from).await);
    assert_eq!(copied, hash(&to).await);
    assert_eq!(progress, [(13, 13)]);
    let relayed = |store: Store| async move { store.cursors("relay").await.unwrap() };
    assert_eq!(relayed(to.clone()).await, relayed(from.clone()).await);
    assert_eq!(relayed(to.clone()).await[&Bucket::GLOBAL], Position(7));
    assert!(
        to.find_committed(&idempotency_key())
            .await
            .unwrap()
            .is_some()
    );
    assert_eq!(to.acquire_fence("relay").await.unwrap().generation, 2);
    // Copying again does no harm.
    assert_eq!(copy(&from, &to, |_, _| {}).await.unwrap(), copied);
    assert_sound(&to).await;
}

/// The views resume from their cursors, so a copy must have both the rows and the cursors, or neither.
async fn cursors_of_the_views_are_not_copied_without_their_rows(db: TestDatabase) {
    let from = sample_log(&db).await;
    let rows = rebuild(&from, &mut EventRows, &["happened"]).await.unwrap();
    assert_eq!((rows, from.cursors("views").await.unwrap().len()), (13, 3));
    let (_folder, to) = sqlite_store().await;
    copy(&from, &to, |_, _| {}).await.unwrap();
    assert!(to.cursors("views").await.unwrap().is_empty());

    // As if a rebuild were interrupted after the copy and restarted.
    let made = rebuild(&to, &mut EventRows, &["happened"]).await.unwrap();
    assert_eq!(made, rows);
    assert_eq!(
        to.cursors("views").await.unwrap(),
        from.cursors("views").await.unwrap()
    );
    // Copying again changes nothing.
    copy(&from, &to, |_, _| {}).await.unwrap();
    let report = verify(&to, &mut EventRows, &["happened"]).await.unwrap();
    assert_eq!((report.rows, report.problems), (13, Vec::new()));
}

async fn a_backup_has_rows_for_every_cursor_of_the_views(db: TestDatabase) {
    let from = sample_log(&db).await;
    rebuild(&from, &mut EventRows, &["happened"]).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("backup.db");
    backup(&from, &file, |_, _| {}).await.unwrap();
    let opened = Store::open(&format!("sqlite:{}", file.display()))
        .await
        .unwrap();
    let cursors = opened.cursors("views").await.unwrap();
    let reached = |record: &RawRecord| {
        let cursor = cursors.get(&record.bucket);
        cursor.is_some_and(|cursor| record.position <= *cursor)
    };
    for record in raw(&opened).await.iter().filter(|record| reached(record)) {
        let row = opened.row("happened", &record.id).await.unwrap();
        assert!(row.is_some(), "position {} is passed over", record.position);
    }
}

async fn a_backup_is_a_store_and_can_be_restored(db: TestDatabase) {
    let from = sample_log(&db).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("backup.db");
    let kept = backup(&from, &file, |_, _| {}).await.unwrap();
    assert_eq!(kept, hash(&from).await);
    let again = backup(&from, &file, |_, _| {}).await.unwrap_err();
    assert!(again.to_string().contains("exists already"), "{again}");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");

    let copy_of = Store::open(&format!("sqlite:{}", file.display()))
        .await
        .unwrap();
    assert_eq!(hash(&copy_of).await, kept);
    let next = records(&copy_of, commit_to(stream("rose"), 4, 1)).await;
    assert_eq!(next[0].position, Position(13 + POSITIONS_SKIPPED));
    let Some(empty) = (match &db {
        TestDatabase::Sqlite(_) => TestDatabase::sqlite().await,
        TestDatabase::Postgres(_) => TestDatabase::postgres().await,
    }) else {
        return;
    };
    let restored = empty.open().await;
    copy(&copy_of, &restored, |_, _| {}).await.unwrap();
    assert_eq!(hash(&restored).await, hash(&copy_of).await);
}

async fn an_unreadable_event_does_not_hide_the_others(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    db.execute_directly("UPDATE events SET data = '{' WHERE position = 2")
        .await;
    let failed = store.read_all(Position::START, 10).await.unwrap_err();
    assert!(
        matches!(
            failed,
            StoreError::Unreadable {
                position: Position(2),
                ..
            }
        ),
        "{failed}"
    );
    let bucket = store.read_all(Position(2), 1).await.unwrap()[0].bucket;
    let all = store.read_all_entries(Position::START, 10).await.unwrap();
    let of_bucket = store
        .read_bucket_entries(bucket, Position::START, 10)
        .await
        .unwrap();
    assert_eq!(all, of_bucket);
    let [
        LogEntry::Record(first),
        LogEntry::Unreadable(bad),
        LogEntry::Record(third),
    ] = &all[..]
    else {
        panic!("{all:?}");
    };
    assert_eq!((first.position, third.position), (Position(1), Position(3)));
    assert_eq!(
        (bad.position, bad.prev, bad.version),
        (Position(2), Position(1), 2)
    );
    assert_eq!(bad.type_name, "endpoint.deletion-requested");
    assert!(!bad.detail.is_empty());
}

async fn a_store_of_a_newer_format_is_refused_and_left_unchanged(db: TestDatabase) {
    db.open().await.close().await;
    db.execute_directly("UPDATE meta SET value = '4' WHERE key = 'format'")
        .await;
    for refused in [
        Store::open(&db.url()).await.err().unwrap().to_string(),
        store::migrate(&db.url()).await.err().unwrap().to_string(),
        store::inspect(&db.url()).await.err().unwrap().to_string(),
    ] {
        assert!(
            refused.contains("format 4") && refused.contains("newer"),
            "{refused}"
        );
    }
    db.execute_directly("UPDATE meta SET value = '2' WHERE key = 'format'")
        .await;
    db.open().await;
}

async fn a_store_with_another_bucket_count_is_refused(db: TestDatabase) {
    db.open().await.close().await;
    db.execute_directly("UPDATE meta SET value = '8' WHERE key = 'buckets'")
        .await;
    let refused = Store::open(&db.url()).await.err().unwrap().to_string();
    assert!(refused.contains("8 buckets"), "{refused}");
}

async fn a_migration_reports_what_it_did_and_runs_once(db: TestDatabase) {
    let before = store::inspect(&db.url()).await.unwrap();
    assert_eq!(before.format, None);
    assert_eq!(before.applied, Vec::<String>::new());
    assert_eq!(before.pending[0], "0001_log");
    let done = store::migrate(&db.url()).await.unwrap();
    assert_eq!((done.from, done.to), (None, store::FORMAT));
    assert_eq!(done.applied, before.pending);
    let again = store::migrate(&db.url()).await.unwrap();
    assert_eq!((again.from, again.applied.len()), (Some(store::FORMAT), 0));
    let after = store::inspect(&db.url()).await.unwrap();
    assert_eq!(after.applied, before.pending);
    assert_eq!(after.pending, Vec::<String>::new());
}

support::suite! {
    the_hash_covers_events_and_their_positions
    raw_events_restore_the_same_log_in_another_store
    raw_events_that_do_not_continue_the_log_are_refused
    events_published_before_the_chain_are_chained_when_restored
    new_positions_start_well_above_restored_events
    a_copy_has_the_log_cursors_fences_and_idempotency_keys
    cursors_of_the_views_are_not_copied_without_their_rows
    a_backup_has_rows_for_every_cursor_of_the_views
    a_backup_is_a_store_and_can_be_restored
    an_unreadable_event_does_not_hide_the_others
    a_store_of_a_newer_format_is_refused_and_left_unchanged
    a_store_with_another_bucket_count_is_refused
    a_migration_reports_what_it_did_and_runs_once
    @sqlite
    @postgres
}
