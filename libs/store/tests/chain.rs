//! The chain of hashes, on either database: what it finds, and how a store of the format before it is
//! brought up to date.

#![allow(clippy::unwrap_used)]

mod support;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use contract::chain::{ChainHash, Fields};
use contract::ids::{Bucket, Position};
use sqlx::migrate::Migrator;
use store::{ChainHead, FORMAT, RawRecord, Store, heads, verify_against};
use support::place::*;

/// Made by the last release of format 1.
const FORMAT_1: &str = include_str!("fixtures/format-1.sql");
const EVENTS_OF_FORMAT_1: usize = 368;

struct NoRows;

impl store::Projector for NoRows {
    fn project(&mut self, _: &contract::log::Record) -> Vec<contract::log::RowChange> {
        Vec::new()
    }
}

async fn problems_against(store: &Store, kept: &[ChainHead]) -> Vec<String> {
    let report = verify_against(store, &mut NoRows, &[], kept).await.unwrap();
    report.problems
}

async fn problems(store: &Store) -> Vec<String> {
    problems_against(store, &[]).await
}

async fn raw(store: &Store) -> Vec<RawRecord> {
    store.read_raw(Position::START, 1_000).await.unwrap()
}

/// Events at 1, 3, 5, 7 in the bucket of iris, and at 2, 4, 6, 8 in that of rose.
async fn two_chains(place: &Place) -> Store {
    let store = place.open().await;
    for version in 0..4 {
        records(&store, commit_to(stream("iris"), version, 1)).await;
        records(&store, commit_to(stream("rose"), version, 1)).await;
    }
    store
}

/// As they must be, computed from the log alone.
fn chained(events: &[RawRecord]) -> Vec<ChainHead> {
    let mut heads: BTreeMap<Bucket, ChainHead> = BTreeMap::new();
    for event in events {
        let before = heads.get(&event.bucket).map(|head| head.hash);
        let before = before.unwrap_or(ChainHash::START);
        assert_eq!(event.prev_hash, Some(before), "position {}", event.position);
        let head = ChainHead {
            bucket: event.bucket,
            position: event.position,
            hash: Fields::of(event).chained(before),
        };
        heads.insert(event.bucket, head);
    }
    heads.into_values().collect()
}

async fn each_event_carries_the_hash_of_the_one_before_it_in_its_bucket(place: Place) {
    let store = two_chains(&place).await;
    // Several in one commit, and several buckets in one commit.
    records(&store, commit_to(stream("iris"), 4, 3)).await;
    let mut both = commit_to(stream("iris"), 7, 2);
    both.appends.push(append(stream("rose"), 4, 2));
    records(&store, both).await;
    store.close().await;
    // The end of a chain is read anew.
    let store = place.open().await;
    records(&store, commit_to(stream("rose"), 6, 1)).await;
    let events = raw(&store).await;
    assert_eq!(events.len(), 16);
    assert_eq!(heads(&store).await.unwrap(), chained(&events));
    assert_eq!(problems(&store).await, Vec::<String>::new());
}

async fn a_commit_that_was_refused_is_not_in_the_chain(place: Place) {
    let store = two_chains(&place).await;
    let late = store.commit(commit_to(stream("iris"), 1, 1)).await;
    late.unwrap_err();
    records(&store, commit_to(stream("iris"), 4, 1)).await;
    chained(&raw(&store).await);
}

async fn two_processes_that_take_turns_keep_one_chain(place: Place) {
    let (one, other) = (two_chains(&place).await, place.open().await);
    for version in [4, 6, 8] {
        records(&other, commit_to(stream("iris"), version, 1)).await;
        records(&one, commit_to(stream("iris"), version + 1, 1)).await;
        records(&one, commit_to(stream("tulip"), version - 4, 2)).await;
    }
    records(&other, commit_to(stream("tulip"), 6, 1)).await;
    chained(&raw(&one).await);
    assert_eq!(problems(&one).await, Vec::<String>::new());
}

/// What is done to the log, and the sentences that tell of it.
const DAMAGE: [(&[&str], &[&str]); 7] = [
    (
        &["UPDATE events SET actor = 'service:tess' WHERE position = 3"],
        &[
            "position 5: the hash that it carries is not that of position 3, before it in bucket {iris}: \
             the event at 3 was changed, or one between them is missing",
        ],
    ),
    (
        &["DELETE FROM events WHERE position = 3"],
        &[
            "position 5: prev is 3, but bucket {iris} has 1 before it: the event at 3 is missing",
            "position 5: version 3 of stream `endpoint/default/iris` does not follow 1",
        ],
    ),
    // Missing, and what follows says that nothing is.
    (
        &[
            "DELETE FROM events WHERE position = 3",
            "UPDATE events SET version = version - 1, prev = prev - 2 WHERE position = 5",
            "UPDATE events SET version = version - 1 WHERE position = 7",
        ],
        &[
            "position 5: the hash that it carries is not that of position 1, before it in bucket {iris}: \
             the event at 1 was changed, or one between them is missing",
            "position 7: the hash that it carries is not that of position 5, before it in bucket {iris}: \
             the event at 5 was changed, or one between them is missing",
        ],
    ),
    // Inserted where positions were left out, with right numbers all around it.
    (
        &[
            "UPDATE events SET position = 90 WHERE position = 8",
            "UPDATE events SET position = 80, version = 5 WHERE position = 7",
            "INSERT INTO events SELECT 70, 5, bucket, stream, 4, 'x', type, type_version, time, actor, \
             data, prev_hash FROM events WHERE position = 80",
            "UPDATE events SET prev = 70 WHERE position = 80",
        ],
        &[
            "position 80: the hash that it carries is not that of position 70, before it in bucket \
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
            "position 1: the hash that it carries is not that of position 0, before it in bucket {iris}: \
             events before it are missing, or it was inserted",
            "position 3: the hash that it carries",
        ],
    ),
    (
        &["DELETE FROM events WHERE position = 1"],
        &[
            "position 3: prev is 1, but bucket {iris} has 0 before it: the event at 1 is missing",
            "position 3: version 2 of stream `endpoint/default/iris` does not follow 0",
        ],
    ),
    // No hash at all, as an older release would write it.
    (
        &["UPDATE events SET prev_hash = '' WHERE position = 7"],
        &["position 7: it carries no hash of what is before it in bucket {iris}"],
    ),
];

async fn verify_finds_a_changed_a_missing_and_an_inserted_event(place: Place) {
    for (damage, sentences) in DAMAGE {
        let another = match &place {
            Place::Sqlite(_) => Place::sqlite().await,
            Place::Postgres(_) => Place::postgres().await,
        };
        is_found(&another.unwrap(), damage, sentences).await;
    }
}

async fn is_found(place: &Place, damage: &[&'static str], sentences: &[&str]) {
    let store = two_chains(place).await;
    let iris = endpoint("iris").bucket().to_string();
    for statement in damage {
        place.behind_its_back(statement).await;
    }
    let found = problems(&store).await;
    assert_eq!(found.len(), sentences.len(), "{damage:?}: {found:#?}");
    for sentence in sentences {
        let sentence = sentence.replace("{iris}", &iris);
        // An event that cannot be read is named in words of its own.
        let words: Vec<&str> = sentence.split(": event id").collect();
        let is_found = found.iter().any(|problem| {
            problem.starts_with(&sentence)
                || words.len() == 2 && problem.contains(words[0]) && problem.contains("event id")
        });
        assert!(is_found, "{sentence}: {found:#?}");
    }
    store.close().await;
}

async fn what_is_changed_at_the_end_is_found_by_ends_that_were_kept(place: Place) {
    let store = two_chains(&place).await;
    let kept = heads(&store).await.unwrap();
    assert_eq!(problems_against(&store, &kept).await, Vec::<String>::new());
    // What has come since does no harm.
    records(&store, commit_to(stream("rose"), 4, 2)).await;
    assert_eq!(problems_against(&store, &kept).await, Vec::<String>::new());
    place
        .behind_its_back("UPDATE events SET actor = 'service:tess' WHERE position = 7")
        .await;
    assert_eq!(problems(&store).await, Vec::<String>::new());
    let found = problems_against(&store, &kept).await;
    let sentence = "position 7: its hash is not the one that was kept of bucket";
    assert!(
        found.len() == 1 && found[0].starts_with(sentence),
        "{found:?}"
    );
}

async fn an_end_that_is_cut_off_is_found_by_ends_that_were_kept(place: Place) {
    let store = two_chains(&place).await;
    let kept = heads(&store).await.unwrap();
    place
        .behind_its_back("DELETE FROM events WHERE position IN (5, 7)")
        .await;
    assert_eq!(problems(&store).await, Vec::<String>::new());
    let found = problems_against(&store, &kept).await;
    let iris = endpoint("iris").bucket();
    let sentence = format!(
        "position 7 is missing, which was kept as the end of bucket {iris}; the bucket ends at 3"
    );
    assert_eq!(found, [sentence]);
}

/// A store as the last release of format 1 has left it.
async fn format_1(place: &Place) {
    match place {
        Place::Sqlite(_) => {
            let statements = FORMAT_1.lines().filter(|line| !line.starts_with("--"));
            let all: String = statements.map(|line| format!("{line}\n")).collect();
            place.run(&all).await;
        }
        Place::Postgres(database) => {
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
            // The tables are the same, in the same order of columns.
            let rows = FORMAT_1.lines().filter(|line| {
                line.starts_with("INSERT INTO") && !line.contains("\"_sqlx_migrations\"")
            });
            let all: String = rows.map(|line| format!("{line}\n")).collect();
            place.run(&all).await;
        }
    }
}

async fn a_store_of_the_format_before_is_chained_once_and_goes_on(place: Place) {
    format_1(&place).await;
    let before = store::inspect(&place.url()).await.unwrap();
    assert_eq!(before.format, Some(1));
    assert_eq!(
        before.pending,
        ["0004_chain", "0005_snapshots", "0006_archives"]
    );
    let mut said = Vec::new();
    let done = store::migrate_with(&place.url(), |up_to, of| said.push((up_to, of))).await;
    let done = done.unwrap();
    assert_eq!((done.from, done.to), (Some(1), FORMAT));
    let head = Position(EVENTS_OF_FORMAT_1 as u64);
    assert_eq!(said.last(), Some(&(head, head)));
    let store = place.open().await;
    let events = raw(&store).await;
    assert_eq!(events.len(), EVENTS_OF_FORMAT_1);
    assert_eq!(heads(&store).await.unwrap(), chained(&events));
    assert_eq!(problems(&store).await, Vec::<String>::new());
    // Everything else is as it was.
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

async fn chaining_that_was_broken_off_is_taken_up_again(place: Place) {
    format_1(&place).await;
    place.open().await.close().await;
    let store = place.open().await;
    let whole = heads(&store).await.unwrap();
    store.close().await;
    // As after a kill: the column is there, half of it is filled, and the format is the old one.
    if let Place::Postgres(_) = &place {
        let sql = "ALTER TABLE events DROP CONSTRAINT events_chained";
        place.behind_its_back(sql).await;
    }
    for sql in [
        "UPDATE events SET prev_hash = NULL WHERE position > 150",
        "UPDATE meta SET value = '1' WHERE key = 'format'",
    ] {
        place.behind_its_back(sql).await;
    }
    let found = store::inspect(&place.url()).await.unwrap();
    assert_eq!((found.format, found.pending.len()), (Some(1), 1));
    let store = place.open().await;
    assert_eq!(heads(&store).await.unwrap(), whole);
    assert_eq!(problems(&store).await, Vec::<String>::new());
    store.close().await;
    let found = store::inspect(&place.url()).await.unwrap();
    assert_eq!((found.format, found.pending.len()), (Some(FORMAT), 0));
}

async fn processes_that_start_at_once_chain_a_store_together(place: Place) {
    format_1(&place).await;
    let opening = (0..4).map(|_| {
        let url = place.url();
        tokio::spawn(async move { Store::open(&url).await.unwrap() })
    });
    let opening: Vec<_> = opening.collect();
    for opened in opening {
        let store = opened.await.unwrap();
        assert_eq!(problems(&store).await, Vec::<String>::new());
    }
}

async fn a_release_from_before_the_chain_that_still_runs_can_append_nothing(place: Place) {
    format_1(&place).await;
    let store = place.open().await;
    let Place::Postgres(database) = &place else {
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
    verify_finds_a_changed_a_missing_and_an_inserted_event
    what_is_changed_at_the_end_is_found_by_ends_that_were_kept
    an_end_that_is_cut_off_is_found_by_ends_that_were_kept
    a_store_of_the_format_before_is_chained_once_and_goes_on
    chaining_that_was_broken_off_is_taken_up_again
    @sqlite
    @postgres
    two_processes_that_take_turns_keep_one_chain
    processes_that_start_at_once_chain_a_store_together
    a_release_from_before_the_chain_that_still_runs_can_append_nothing
}
