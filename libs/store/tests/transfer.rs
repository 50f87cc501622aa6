//! Logs as a whole, on either database: hashes, copies, backups, and events that cannot be read.

#![allow(clippy::unwrap_used)]

mod support;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use store::{
    Cause, Commit, CursorMove, Entry, POSITIONS_SKIPPED, RawRecord, Store, StoreError, append_raw,
    backup, copy, go_on_above, log_hash, rebuild, verify,
};
use support::place::*;

struct NoRows;

impl store::Projector for NoRows {
    fn project(&mut self, _: &contract::log::Record) -> Vec<contract::log::RowChange> {
        Vec::new()
    }
}

/// One row for each event.
struct Happened;

impl store::Projector for Happened {
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

async fn is_sound(store: &Store) {
    let report = verify(store, &mut NoRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}

/// A log of several streams and buckets, with a cursor, a fence and a cause.
async fn a_log(place: &Place) -> Store {
    let store = place.open().await;
    for version in 0..4 {
        for name in ["iris", "rose", "tulip"] {
            records(&store, commit_to(stream(name), version, 1)).await;
        }
    }
    let fence = store.take("relay").await.unwrap();
    let commit = Commit {
        cursor: Some(CursorMove {
            consumer: "relay",
            bucket: Bucket::GLOBAL,
            from: Position::START,
            to: Position(7),
        }),
        cause: Some(cause()),
        fence: Some(fence),
        ..commit_to(stream("iris"), 4, 1)
    };
    records(&store, commit).await;
    store
}

fn cause() -> Cause {
    Cause {
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

/// An empty store of SQLite beside the one under test.
async fn other() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("other.db").display());
    let store = Store::open(&url).await.unwrap();
    (folder, store)
}

async fn the_hash_is_of_what_stands_in_the_log_and_where(place: Place) {
    let store = a_log(&place).await;
    let first = hash(&store).await;
    assert_eq!((first.events, first.head), (13, Position(13)));
    assert_eq!(first.sha256.len(), 64);
    assert_eq!(log_hash(&store, Position(99)).await.unwrap(), first);
    let shorter = log_hash(&store, Position(12)).await.unwrap();
    assert_eq!(shorter.events, 12);
    assert_ne!(shorter.sha256, first.sha256);
    place
        .behind_its_back("UPDATE events SET actor = 'service:tess' WHERE position = 5")
        .await;
    assert_ne!(hash(&store).await.sha256, first.sha256);
}

async fn raw_events_of_one_store_make_the_same_log_in_another(place: Place) {
    let (_folder, from) = other().await;
    for version in 0..5 {
        records(&from, commit_to(stream("iris"), version, 1)).await;
        records(&from, commit_to(stream("rose"), version, 1)).await;
    }
    let store = place.open().await;
    let events = raw(&from).await;
    assert_eq!(append_raw(&store, events[..4].to_vec()).await.unwrap(), 4);
    // What is there already is compared, the rest is written.
    assert_eq!(append_raw(&store, events.clone()).await.unwrap(), 6);
    assert_eq!(append_raw(&store, events[2..5].to_vec()).await.unwrap(), 0);
    assert_eq!(raw(&store).await, events);
    assert_eq!(hash(&store).await, hash(&from).await);
    assert_eq!(*store.head_watch().borrow(), Position(10));
    is_sound(&store).await;
}

async fn raw_events_that_do_not_continue_the_log_are_refused(place: Place) {
    let (_folder, from) = other().await;
    for version in 0..4 {
        records(&from, commit_to(stream("iris"), version, 1)).await;
    }
    let events = raw(&from).await;
    let store = place.open().await;
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
            "is not of bucket 64",
        ),
        (
            changed(|event| event.position = Position(2)),
            "not the same in both logs",
        ),
        (
            changed(|event| event.prev_hash = Some(ChainHash([7; 32]))),
            "position 3: the hash that it carries is not that of the event at 2",
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

async fn what_was_published_before_there_was_a_chain_is_chained_when_it_is_taken_in(place: Place) {
    let (_folder, from) = other().await;
    for version in 0..4 {
        records(&from, commit_to(stream("iris"), version, 1)).await;
        records(&from, commit_to(stream("rose"), version, 1)).await;
    }
    let events = raw(&from).await;
    let mut older = events.clone();
    older[..5]
        .iter_mut()
        .for_each(|event| event.prev_hash = None);
    let store = place.open().await;
    append_raw(&store, older[..3].to_vec()).await.unwrap();
    append_raw(&store, older).await.unwrap();
    assert_eq!(raw(&store).await, events);
    is_sound(&store).await;
}

async fn a_store_that_took_in_events_goes_on_well_above_them(place: Place) {
    let (_folder, from) = other().await;
    fill(&from, "iris", 3).await;
    let store = place.open().await;
    append_raw(&store, raw(&from).await).await.unwrap();
    let next = records(&store, commit_to(stream("iris"), 3, 2)).await;
    let first = 3 + POSITIONS_SKIPPED;
    assert_eq!(next[0].position, Position(first));
    assert_eq!(next[0].prev, Position(3));
    assert_eq!(next[1].position, Position(first + 1));
    store.close().await;
    let store = place.open().await;
    let after = records(&store, commit_to(stream("iris"), 5, 1)).await;
    assert_eq!(after[0].position, Position(first + 2));
    is_sound(&store).await;
    // Something higher was seen elsewhere; something lower does not take that back.
    go_on_above(&store, Position(9_000_000)).await.unwrap();
    go_on_above(&store, Position(1)).await.unwrap();
    let high = records(&store, commit_to(stream("iris"), 6, 1)).await;
    assert_eq!(high[0].position, Position(9_000_000 + POSITIONS_SKIPPED));
}

async fn a_copy_has_the_log_the_cursors_the_fences_and_the_causes(place: Place) {
    let from = a_log(&place).await;
    let (_folder, to) = other().await;
    let mut heard = Vec::new();
    let copied = copy(&from, &to, |done, of| heard.push((done, of)))
        .await
        .unwrap();
    assert_eq!(copied, hash(&from).await);
    assert_eq!(copied, hash(&to).await);
    assert_eq!(heard, [(13, 13)]);
    let relayed = |store: Store| async move { store.cursors("relay").await.unwrap() };
    assert_eq!(relayed(to.clone()).await, relayed(from.clone()).await);
    assert_eq!(relayed(to.clone()).await[&Bucket::GLOBAL], Position(7));
    assert!(to.repeated(&cause()).await.unwrap().is_some());
    assert_eq!(to.take("relay").await.unwrap().generation, 2);
    // Once more over the same does no harm.
    assert_eq!(copy(&from, &to, |_, _| {}).await.unwrap(), copied);
    is_sound(&to).await;
}

/// Rows that stand at their cursors, or neither: whoever keeps them goes on from the cursors.
async fn no_cursor_of_the_views_is_copied_without_their_rows(place: Place) {
    let from = a_log(&place).await;
    let rows = rebuild(&from, &mut Happened, &["happened"]).await.unwrap();
    assert_eq!((rows, from.cursors("views").await.unwrap().len()), (13, 3));
    let (_folder, to) = other().await;
    copy(&from, &to, |_, _| {}).await.unwrap();
    assert!(to.cursors("views").await.unwrap().is_empty());

    // What a rebuild makes that is cut off after the copy, and begun once more.
    let made = rebuild(&to, &mut Happened, &["happened"]).await.unwrap();
    assert_eq!(made, rows);
    assert_eq!(
        to.cursors("views").await.unwrap(),
        from.cursors("views").await.unwrap()
    );
    // The copy once more over the same changes nothing of it.
    copy(&from, &to, |_, _| {}).await.unwrap();
    let report = verify(&to, &mut Happened, &["happened"]).await.unwrap();
    assert_eq!((report.rows, report.problems), (13, Vec::new()));
}

async fn a_backup_has_rows_for_every_cursor_of_the_views(place: Place) {
    let from = a_log(&place).await;
    rebuild(&from, &mut Happened, &["happened"]).await.unwrap();
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

async fn a_backup_is_a_store_and_a_store_can_be_made_from_it(place: Place) {
    let from = a_log(&place).await;
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
    let Some(empty) = (match &place {
        Place::Sqlite(_) => Place::sqlite().await,
        Place::Postgres(_) => Place::postgres().await,
    }) else {
        return;
    };
    let restored = empty.open().await;
    copy(&copy_of, &restored, |_, _| {}).await.unwrap();
    assert_eq!(hash(&restored).await, hash(&copy_of).await);
}

async fn an_event_that_cannot_be_read_does_not_hide_the_others(place: Place) {
    let store = place.open().await;
    fill(&store, "iris", 3).await;
    place
        .behind_its_back("UPDATE events SET data = '{' WHERE position = 2")
        .await;
    let whole = store.read_all(Position::START, 10).await.unwrap_err();
    assert!(
        matches!(
            whole,
            StoreError::Unreadable {
                position: Position(2),
                ..
            }
        ),
        "{whole}"
    );
    let bucket = store.read_all(Position(2), 1).await.unwrap()[0].bucket;
    let all = store.read_all_entries(Position::START, 10).await.unwrap();
    let of_bucket = store
        .read_bucket_entries(bucket, Position::START, 10)
        .await
        .unwrap();
    assert_eq!(all, of_bucket);
    let [
        Entry::Record(first),
        Entry::Unreadable(bad),
        Entry::Record(third),
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

async fn a_store_of_a_newer_format_is_refused_and_left_as_it_is(place: Place) {
    place.open().await.close().await;
    place
        .behind_its_back("UPDATE meta SET value = '4' WHERE key = 'format'")
        .await;
    for refused in [
        Store::open(&place.url()).await.err().unwrap().to_string(),
        store::migrate(&place.url())
            .await
            .err()
            .unwrap()
            .to_string(),
        store::inspect(&place.url())
            .await
            .err()
            .unwrap()
            .to_string(),
    ] {
        assert!(
            refused.contains("format 4") && refused.contains("newer"),
            "{refused}"
        );
    }
    place
        .behind_its_back("UPDATE meta SET value = '2' WHERE key = 'format'")
        .await;
    place.open().await;
}

async fn a_store_with_other_buckets_is_refused(place: Place) {
    place.open().await.close().await;
    place
        .behind_its_back("UPDATE meta SET value = '8' WHERE key = 'buckets'")
        .await;
    let refused = Store::open(&place.url()).await.err().unwrap().to_string();
    assert!(refused.contains("8 buckets"), "{refused}");
}

async fn migrating_says_what_it_did_and_does_it_once(place: Place) {
    let before = store::inspect(&place.url()).await.unwrap();
    assert_eq!(before.format, None);
    assert_eq!(before.applied, Vec::<String>::new());
    assert_eq!(before.pending[0], "0001_log");
    let done = store::migrate(&place.url()).await.unwrap();
    assert_eq!((done.from, done.to), (None, store::FORMAT));
    assert_eq!(done.applied, before.pending);
    let again = store::migrate(&place.url()).await.unwrap();
    assert_eq!((again.from, again.applied.len()), (Some(store::FORMAT), 0));
    let after = store::inspect(&place.url()).await.unwrap();
    assert_eq!(after.applied, before.pending);
    assert_eq!(after.pending, Vec::<String>::new());
}

support::suite! {
    the_hash_is_of_what_stands_in_the_log_and_where
    raw_events_of_one_store_make_the_same_log_in_another
    raw_events_that_do_not_continue_the_log_are_refused
    what_was_published_before_there_was_a_chain_is_chained_when_it_is_taken_in
    a_store_that_took_in_events_goes_on_well_above_them
    a_copy_has_the_log_the_cursors_the_fences_and_the_causes
    no_cursor_of_the_views_is_copied_without_their_rows
    a_backup_has_rows_for_every_cursor_of_the_views
    a_backup_is_a_store_and_a_store_can_be_made_from_it
    an_event_that_cannot_be_read_does_not_hide_the_others
    a_store_of_a_newer_format_is_refused_and_left_as_it_is
    a_store_with_other_buckets_is_refused
    migrating_says_what_it_did_and_does_it_once
    @sqlite
    @postgres
}
