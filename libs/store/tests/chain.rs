//! The hash chain, on either database: which changes it detects, and how a store of the previous format is
//! migrated.

#![allow(clippy::unwrap_used)]

mod support;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use contract::chain::{ChainHash, HashedFields};
use contract::ids::{Bucket, Position};
use sqlx::migrate::Migrator;
use store::{BucketHead, FORMAT, POSITIONS_SKIPPED, RawRecord, Store, heads, verify_against};
use support::database::*;

/// Created by the last release of format 1.
const FORMAT_1: &str = include_str!("fixtures/format-1.sql");
const EVENTS_OF_FORMAT_1: usize = 368;

struct NoRows;

impl store::Projector for NoRows {
    fn project(&mut self, _: &contract::log::Record) -> Vec<contract::log::RowChange> {
        Vec::new()
    }
}

async fn problems_against(store: &Store, recorded: &[BucketHead]) -> Vec<String> {
    let report = verify_against(store, &mut NoRows, &[], recorded)
        .await
        .unwrap();
    report.problems
}

async fn problems(store: &Store) -> Vec<String> {
    problems_against(store, &[]).await
}

async fn raw(store: &Store) -> Vec<RawRecord> {
    store.read_raw(Position::START, 1_000).await.unwrap()
}

/// Writes events at 1, 3, 5, 7 in the bucket of iris, and at 2, 4, 6, 8 in that of rose.
async fn two_chains(db: &TestDatabase) -> Store {
    let store = db.open().await;
    for version in 0..4 {
        records(&store, commit_to(stream("iris"), version, 1)).await;
        records(&store, commit_to(stream("rose"), version, 1)).await;
    }
    store
}

/// Returns the heads computed from the log, and checks every hash.
fn chained(events: &[RawRecord]) -> Vec<BucketHead> {
    let mut heads: BTreeMap<Bucket, BucketHead> = BTreeMap::new();
    for event in events {
        let before = heads.get(&event.bucket).map(|head| head.hash);
        let before = before.unwrap_or(ChainHash::START);
        assert_eq!(event.prev_hash, Some(before), "position {}", event.position);
        let head = BucketHead {
            bucket: event.bucket,
            position: event.position,
            hash: HashedFields::of(event).hash_after(before),
        };
        heads.insert(event.bucket, head);
    }
    heads.into_values().collect()
}

async fn each_event_carries_the_hash_of_the_one_before_it_in_its_bucket(db: TestDatabase) {
    let store = two_chains(&db).await;
    // Several events and several buckets in one commit.
    records(&store, commit_to(stream("iris"), 4, 3)).await;
    let mut both = commit_to(stream("iris"), 7, 2);
    both.appends.push(append(stream("rose"), 4, 2));
    records(&store, both).await;
    store.close().await;
    // The heads of the chains are loaded again.
    let store = db.open().await;
    records(&store, commit_to(stream("rose"), 6, 1)).await;
    let events = raw(&store).await;
    assert_eq!(events.len(), 16);
    assert_eq!(heads(&store).await.unwrap(), chained(&events));
    assert_eq!(problems(&store).await, Vec::<String>::new());
}

async fn a_commit_that_was_refused_is_not_in_the_chain(db: TestDatabase) {
    let store = two_chains(&db).await;
    let late = store.commit(commit_to(stream("iris"), 1, 1)).await;
    late.unwrap_err();
    records(&store, commit_to(stream("iris"), 4, 1)).await;
    chained(&raw(&store).await);
}

async fn two_processes_that_alternate_keep_one_chain(db: TestDatabase) {
    let (one, other) = (two_chains(&db).await, db.open().await);
    for version in [4, 6, 8] {
        records(&other, commit_to(stream("iris"), version, 1)).await;
        records(&one, commit_to(stream("iris"), version + 1, 1)).await;
        records(&one, commit_to(stream("tulip"), version - 4, 2)).await;
    }
    records(&other, commit_to(stream("tulip"), 6, 1)).await;
    chained(&raw(&one).await);
    assert_eq!(problems(&one).await, Vec::<String>::new());
}

/// Changes of the log, and the problems that `verify` reports for them.
const DAMAGE: [(&[&str], &[&str]); 7] = [
    (
        &["UPDATE events SET actor = 'service:tess' WHERE position = 3"],
        &[
            "position 5: its previous-event hash does not match position 3, the previous event of bucket {iris}: \
             the event at 3 was changed, or one between them is missing",
        ],
    ),
    (
        &["DELETE FROM events WHERE position = 3"],
        &[
            "position 4 follows 2: the event at 3 is missing",
            "position 5: prev is 3, but the previous event of bucket {iris} is at 1: the event at 3 is missing",
            "position 5: version 3 of stream `endpoint/default/iris` does not follow 1",
        ],
    ),
    // A missing event, hidden by renumbering the following ones.
    (
        &[
            "DELETE FROM events WHERE position = 3",
            "UPDATE events SET version = version - 1, prev = prev - 2 WHERE position = 5",
            "UPDATE events SET version = version - 1 WHERE position = 7",
        ],
        &[
            "position 4 follows 2: the event at 3 is missing",
            "position 5: its previous-event hash does not match position 1, the previous event of bucket {iris}: \
             the event at 1 was changed, or one between them is missing",
            "position 7: its previous-event hash does not match position 5, the previous event of bucket {iris}: \
             the event at 5 was changed, or one between them is missing",
        ],
    ),
    // An inserted event at unused positions, with consistent numbers around it.
    (
        &[
            "UPDATE events SET position = 90 WHERE position = 8",
            "UPDATE events SET position = 80, version = 5 WHERE position = 7",
            "INSERT INTO events SELECT 70, 5, bucket, stream, 4, 'x', type, type_version, time, actor, \
             data, prev_hash FROM events WHERE position = 80",
            "UPDATE events SET prev = 70 WHERE position = 80",
        ],
        &[
            "position 70 follows 6: 63 events are missing",
            "position 80 follows 70: 9 events are missing",
            "position 90 follows 80: 9 events are missing",
            "position 80: its previous-event hash does not match position 70, the previous event of bucket \
             {iris}: the event at 70 was inserted",
            "position 70: event id `x`",
        ],
    ),
    (
        &[
            "UPDATE events SET prev_hash = (SELECT prev_hash FROM events WHERE position = 7) \
           WHERE position = 1",
        ],
        &[
            "position 1: its previous-event hash does not match position 0, the previous event of bucket {iris}: \
             events before it are missing, or it was inserted",
            "position 3: its previous-event hash does not match",
        ],
    ),
    (
        &["DELETE FROM events WHERE position = 1"],
        &[
            "position 2 follows 0: the event at 1 is missing",
            "position 3: prev is 1, but the previous event of bucket {iris} is at 0: the event at 1 is missing",
            "position 3: version 2 of stream `endpoint/default/iris` does not follow 0",
        ],
    ),
    // No hash at all, as an older release would write.
    (
        &["UPDATE events SET prev_hash = '' WHERE position = 7"],
        &["position 7: the hash of the previous event of bucket {iris} is missing"],
    ),
];

async fn verify_detects_changed_missing_and_inserted_events(db: TestDatabase) {
    for (damage, sentences) in DAMAGE {
        let another = match &db {
            TestDatabase::Sqlite(_) => TestDatabase::sqlite().await,
            TestDatabase::Postgres(_) => TestDatabase::postgres().await,
        };
        assert_found(&another.unwrap(), damage, sentences).await;
    }
}

async fn assert_found(db: &TestDatabase, damage: &[&'static str], sentences: &[&str]) {
    let store = two_chains(db).await;
    let iris = endpoint("iris").bucket().to_string();
    for statement in damage {
        db.execute_directly(statement).await;
    }
    let found = problems(&store).await;
    assert_eq!(found.len(), sentences.len(), "{damage:?}: {found:#?}");
    for sentence in sentences {
        let sentence = sentence.replace("{iris}", &iris);
        // Unreadable events have a different message.
        let words: Vec<&str> = sentence.split(": event id").collect();
        let is_found = found.iter().any(|problem| {
            problem.starts_with(&sentence)
                || words.len() == 2 && problem.contains(words[0]) && problem.contains("event id")
        });
        assert!(is_found, "{sentence}: {found:#?}");
    }
    store.close().await;
}

async fn a_missing_newest_event_of_a_bucket_is_detected_by_its_position(db: TestDatabase) {
    let store = two_chains(&db).await;
    store.close().await;
    db.execute_directly("DELETE FROM events WHERE position = 7")
        .await;
    let store = db.open().await;
    // It continues the chain and the stream.
    records(&store, commit_to(stream("iris"), 3, 1)).await;
    let found = problems(&store).await;
    assert_eq!(found, ["position 8 follows 6: the event at 7 is missing"]);
}

async fn positions_that_a_restore_skips_are_not_missing(db: TestDatabase) {
    let store = two_chains(&db).await;
    for seen in [Position::START, Position(3 * POSITIONS_SKIPPED)] {
        store::skip_positions_above(&store, seen).await.unwrap();
        fill(&store, &format!("tulip-{seen}"), 1).await;
        let found = problems(&store).await;
        assert_eq!(found, Vec::<String>::new(), "{seen}");
    }
}

async fn a_changed_last_event_is_detected_by_recorded_heads(db: TestDatabase) {
    let store = two_chains(&db).await;
    let recorded = heads(&store).await.unwrap();
    assert_eq!(
        problems_against(&store, &recorded).await,
        Vec::<String>::new()
    );
    // Later events do not matter.
    records(&store, commit_to(stream("rose"), 4, 2)).await;
    assert_eq!(
        problems_against(&store, &recorded).await,
        Vec::<String>::new()
    );
    db.execute_directly("UPDATE events SET actor = 'service:tess' WHERE position = 7")
        .await;
    assert_eq!(problems(&store).await, Vec::<String>::new());
    let found = problems_against(&store, &recorded).await;
    let sentence = "position 7: its hash does not match the recorded head of bucket";
    assert!(
        found.len() == 1 && found[0].starts_with(sentence),
        "{found:?}"
    );
}

async fn a_truncated_log_is_detected_by_recorded_heads(db: TestDatabase) {
    let store = two_chains(&db).await;
    let recorded = heads(&store).await.unwrap();
    db.execute_directly("DELETE FROM events WHERE position > 4")
        .await;
    assert_eq!(problems(&store).await, Vec::<String>::new());
    let found = problems_against(&store, &recorded).await;
    let sentence = |name, at, end| {
        let bucket = endpoint(name).bucket();
        format!(
            "position {at}, recorded as the head of bucket {bucket}, is missing; the bucket ends at {end}"
        )
    };
    assert_eq!(found, [sentence("iris", 7, 3), sentence("rose", 8, 4)]);
}

/// Creates a store as the last release of format 1 left it.
async fn format_1(db: &TestDatabase) {
    match db {
        TestDatabase::Sqlite(_) => {
            let statements = FORMAT_1.lines().filter(|line| !line.starts_with("--"));
            let all: String = statements.map(|line| format!("{line}\n")).collect();
            db.run(&all).await;
        }
        TestDatabase::Postgres(database) => {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/postgres");
            let migrator = Migrator::new(Path::new(folder)).await.unwrap();
            let older: Vec<_> = migrator
                .iter()
                .filter(|m| m.version <= 3)
                .cloned()
                .collect();
            let older = Migrator {
                migrations: Cow::Owned(older),
                ..Migrator::DEFAULT
            };
            let mut connection = database.connect().await;
            older
                .run_direct(None, &mut connection, false)
                .await
                .unwrap();
            // The tables are the same, with the same column order.
            let rows = FORMAT_1.lines().filter(|line| {
                line.starts_with("INSERT INTO") && !line.contains("\"_sqlx_migrations\"")
            });
            let all: String = rows.map(|line| format!("{line}\n")).collect();
            db.run(&all).await;
        }
    }
}

async fn a_store_of_the_previous_format_is_chained_once_and_continues(db: TestDatabase) {
    format_1(&db).await;
    let before = store::inspect(&db.url()).await.unwrap();
    assert_eq!(before.format, Some(1));
    assert_eq!(
        before.pending,
        ["0004_chain", "0005_snapshots", "0006_archives"]
    );
    let mut progress = Vec::new();
    let done = store::migrate_with(&db.url(), |up_to, of| progress.push((up_to, of))).await;
    let done = done.unwrap();
    assert_eq!((done.from, done.to), (Some(1), FORMAT));
    let head = Position(EVENTS_OF_FORMAT_1 as u64);
    assert_eq!(progress.last(), Some(&(head, head)));
    let store = db.open().await;
    let events = raw(&store).await;
    assert_eq!(events.len(), EVENTS_OF_FORMAT_1);
    assert_eq!(heads(&store).await.unwrap(), chained(&events));
    assert_eq!(problems(&store).await, Vec::<String>::new());
    // Everything else is unchanged.
    assert_eq!(
        store.cursor("relay", Bucket::GLOBAL).await.unwrap(),
        Position(360)
    );
    let last = &events[EVENTS_OF_FORMAT_1 - 1];
    assert_eq!(last.actor, "service:control");
    let iris = events
        .iter()
        .filter(|e| e.stream == "endpoint/default/iris");
    let version = iris.count() as u64;
    records(&store, commit_to(stream("iris"), version, 3)).await;
    assert_eq!(problems(&store).await, Vec::<String>::new());
    chained(&raw(&store).await);
}

async fn interrupted_chaining_is_resumed(db: TestDatabase) {
    format_1(&db).await;
    db.open().await.close().await;
    let store = db.open().await;
    let original = heads(&store).await.unwrap();
    store.close().await;
    // As after a kill: the column exists, half of it is filled, and the format is still the old one.
    if let TestDatabase::Postgres(_) = &db {
        let sql = "ALTER TABLE events DROP CONSTRAINT events_chained";
        db.execute_directly(sql).await;
    }
    for sql in [
        "UPDATE events SET prev_hash = NULL WHERE position > 150",
        "UPDATE meta SET value = '1' WHERE key = 'format'",
    ] {
        db.execute_directly(sql).await;
    }
    let found = store::inspect(&db.url()).await.unwrap();
    assert_eq!((found.format, found.pending.len()), (Some(1), 1));
    let store = db.open().await;
    assert_eq!(heads(&store).await.unwrap(), original);
    assert_eq!(problems(&store).await, Vec::<String>::new());
    store.close().await;
    let found = store::inspect(&db.url()).await.unwrap();
    assert_eq!((found.format, found.pending.len()), (Some(FORMAT), 0));
}

async fn processes_that_start_concurrently_can_chain_a_store(db: TestDatabase) {
    format_1(&db).await;
    let opening = (0..4).map(|_| {
        let url = db.url();
        tokio::spawn(async move { Store::open(&url).await.unwrap() })
    });
    let opening: Vec<_> = opening.collect();
    for opened in opening {
        let store = opened.await.unwrap();
        assert_eq!(problems(&store).await, Vec::<String>::new());
    }
}

async fn a_running_release_without_the_chain_cannot_append(db: TestDatabase) {
    format_1(&db).await;
    let store = db.open().await;
    let TestDatabase::Postgres(database) = &db else {
        return;
    };
    let mut older = database.connect().await;
    let refused = sqlx::query(
        "INSERT INTO events (position, prev, bucket, stream, version, id, type, type_version, time, \
         actor, data) VALUES (999, 0, 64, 'x', 1, 'x', 'x', 1, 0, 'x', '{}')",
    );
    let refused = refused.execute(&mut older).await.unwrap_err().to_string();
    assert!(refused.contains("events_chained"), "{refused}");
    assert_eq!(problems(&store).await, Vec::<String>::new());
}

support::suite! {
    each_event_carries_the_hash_of_the_one_before_it_in_its_bucket
    a_commit_that_was_refused_is_not_in_the_chain
    verify_detects_changed_missing_and_inserted_events
    a_missing_newest_event_of_a_bucket_is_detected_by_its_position
    positions_that_a_restore_skips_are_not_missing
    a_changed_last_event_is_detected_by_recorded_heads
    a_truncated_log_is_detected_by_recorded_heads
    a_store_of_the_previous_format_is_chained_once_and_continues
    interrupted_chaining_is_resumed
    @sqlite
    @postgres
    two_processes_that_alternate_keep_one_chain
    processes_that_start_concurrently_can_chain_a_store
    a_running_release_without_the_chain_cannot_append
}
