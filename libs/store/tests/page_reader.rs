//! Readers that share what they read.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::{Arc, Weak};

use contract::events::{AccessRevoked, Event};
use contract::ids::Position;
use contract::log::{NewEvent, Record, StreamKind, StreamName};
use contract::time::Timestamp;
use store::{Append, Commit, LogEntry, PageQuery, PageReader, Store};
use support::database::*;

/// Kinds that another reader does not want, either.
const MORE: &[StreamKind] = &[StreamKind::Usage, StreamKind::Access];

fn query(after: u64, limit: usize) -> PageQuery<'static> {
    PageQuery {
        bucket: None,
        after: Position(after),
        through: Position(u64::MAX),
        excluded_kinds: &[StreamKind::Usage],
        slices_from: Timestamp::MIN,
        limit,
    }
}

async fn entries(reader: &mut PageReader, query: PageQuery<'_>) -> Vec<LogEntry> {
    reader.read(&query).await.unwrap().decode().await.unwrap()
}

async fn records(reader: &mut PageReader, query: PageQuery<'_>) -> Vec<Arc<Record>> {
    let record = |entry| match entry {
        LogEntry::Record(record) => record,
        LogEntry::Unreadable(unreadable) => panic!("{unreadable:?}"),
    };
    let entries = entries(reader, query).await;
    entries.into_iter().map(record).collect()
}

fn positions(records: &[Arc<Record>]) -> Vec<u64> {
    records.iter().map(|record| record.position.0).collect()
}

fn are_same(one: &[Arc<Record>], other: &[Arc<Record>]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| Arc::ptr_eq(a, b))
}

async fn filled(db: &TestDatabase, count: u64) -> Store {
    let store = db.open().await;
    fill(&store, "iris", count).await;
    store
}

async fn a_page_is_read_and_decoded_once(db: TestDatabase) {
    let store = filled(&db, 20).await;
    let (mut one, mut other) = (store.page_reader(), store.page_reader());
    let (first, same) = tokio::join!(
        records(&mut one, query(0, 5)),
        records(&mut other, query(0, 5))
    );
    assert_eq!(positions(&first), [1, 2, 3, 4, 5]);
    assert!(are_same(&first, &same));
    let second = records(&mut one, query(5, 5)).await;
    db.execute_directly("UPDATE events SET type = 'not-invented-yet' WHERE position > 5")
        .await;
    assert!(are_same(&second, &records(&mut other, query(5, 5)).await));
}

async fn a_page_that_is_not_full_is_not_shared(db: TestDatabase) {
    let store = filled(&db, 8).await;
    let (mut one, mut other) = (store.page_reader(), store.page_reader());
    let first = records(&mut one, query(0, 10)).await;
    fill(&store, "tulip", 2).await;
    let more = records(&mut other, query(0, 10)).await;
    assert_eq!((first.len(), more.len()), (8, 10));
    // What is full by now is shared from here on.
    assert!(are_same(&more, &records(&mut one, query(0, 10)).await));
}

async fn a_reader_gets_nothing_past_its_end(db: TestDatabase) {
    let store = filled(&db, 20).await;
    let (mut one, mut other) = (store.page_reader(), store.page_reader());
    assert_eq!(records(&mut one, query(0, 5)).await.len(), 5);
    let until = PageQuery {
        through: Position(3),
        ..query(0, 5)
    };
    let page = other.read(&until).await.unwrap();
    assert_eq!((page.last(), page.is_full()), (Some(Position(3)), false));
}

async fn a_page_is_dropped_once_all_readers_have_passed_it(db: TestDatabase) {
    let store = filled(&db, 20).await;
    let (mut one, mut other) = (store.page_reader(), store.page_reader());
    let weak = |records: Vec<Arc<Record>>| -> Vec<Weak<Record>> {
        records.iter().map(Arc::downgrade).collect()
    };
    let is_kept = |page: &[Weak<Record>]| page.iter().any(|record| record.upgrade().is_some());
    let first = weak(records(&mut one, query(0, 5)).await);
    weak(records(&mut other, query(0, 5)).await);
    let second = weak(records(&mut one, query(5, 5)).await);
    assert!(is_kept(&first) && is_kept(&second));
    weak(records(&mut other, query(5, 5)).await);
    assert!(!is_kept(&first) && is_kept(&second));
    // One that reads by itself from here on, or ends, needs no page any more.
    drop(one);
    assert!(is_kept(&second));
    let all = PageQuery {
        excluded_kinds: &[],
        ..query(10, 5)
    };
    weak(records(&mut other, all).await);
    assert!(!is_kept(&second));
}

async fn a_reader_far_behind_reads_by_itself(db: TestDatabase) {
    let store = filled(&db, 100).await;
    let (mut one, mut other) = (store.page_reader(), store.page_reader());
    let first = records(&mut one, query(0, 2)).await;
    records(&mut other, query(0, 2)).await;
    for after in (2..100).step_by(2) {
        records(&mut one, query(after, 2)).await;
    }
    let again = records(&mut other, query(2, 2)).await;
    assert_eq!(positions(&again), [3, 4]);
    assert_eq!(positions(&first), [1, 2]);
    let rest = records(&mut other, query(4, 96)).await;
    assert_eq!(positions(&rest), (5..=100).collect::<Vec<_>>());
}

async fn each_reader_gets_the_kinds_that_it_wants(db: TestDatabase) {
    let store = filled(&db, 4).await;
    let revoked = || NewEvent {
        event: Event::AccessRevoked(AccessRevoked {
            name: "ci".to_owned(),
        }),
        ..event()
    };
    let append = Append {
        stream: StreamName::access(),
        expected_version: 0,
        events: vec![revoked(), revoked()],
    };
    let commit = Commit {
        appends: vec![append],
        ..Commit::default()
    };
    store.commit(commit).await.unwrap();
    fill(&store, "tulip", 4).await;
    // An event that nobody wants need not be readable.
    db.execute_directly("UPDATE events SET type = 'not-invented-yet' WHERE position = 6")
        .await;
    let (mut one, mut other) = (store.page_reader(), store.page_reader());
    let without = PageQuery {
        excluded_kinds: MORE,
        ..query(0, 10)
    };
    let without = records(&mut one, without).await;
    assert_eq!(positions(&without), [1, 2, 3, 4, 7, 8, 9, 10]);
    let with = entries(&mut other, query(0, 10)).await;
    let kept = with.iter().filter(|entry| {
        let shared = |record: &Arc<Record>| without.iter().any(|other| Arc::ptr_eq(record, other));
        matches!(entry, LogEntry::Record(record) if shared(record))
    });
    assert_eq!((with.len(), kept.count()), (10, 8));
    assert!(matches!(with[5], LogEntry::Unreadable(_)));
}

support::suite! {
    a_page_is_read_and_decoded_once
    a_page_that_is_not_full_is_not_shared
    a_reader_gets_nothing_past_its_end
    a_page_is_dropped_once_all_readers_have_passed_it
    a_reader_far_behind_reads_by_itself
    each_reader_gets_the_kinds_that_it_wants
    @sqlite
    @postgres
}
