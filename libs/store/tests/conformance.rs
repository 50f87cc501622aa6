//! The behavior of every store, on either database. Each test uses only [`Store`]; the macro at the end
//! runs all of them on both databases.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use contract::events::{AccessGranted, AccessRevoked, AccessRole, Event};
use contract::ids::{Bucket, Position};
use contract::log::{EVENT_BYTES_MAX, NewEvent, Record, RowChange, StreamKind, StreamName};
use contract::time::Timestamp;
use store::{
    Append, Commit, CommitError, Committed, CursorMove, Fence, IdempotencyKey, Projector, RowQuery,
    Store, StoreError, rebuild, verify,
};
use support::database::*;
use uuid::Uuid;

fn revoked(name: String) -> NewEvent {
    NewEvent {
        event: Event::AccessRevoked(AccessRevoked { name }),
        ..event()
    }
}

fn row(model: &'static str, key: &str, position: u64, doc: Option<&str>) -> RowChange {
    RowChange {
        model,
        key: key.to_owned(),
        endpoint: "iris".to_owned(),
        deployment: "blue".to_owned(),
        position: Position(position),
        time: Timestamp::from_secs(position as i64),
        doc: doc.map(str::to_owned),
    }
}

fn rows(rows: Vec<RowChange>) -> Commit {
    Commit {
        rows,
        ..Commit::default()
    }
}

fn keys(rows: &[store::Row]) -> Vec<&str> {
    rows.iter().map(|row| row.key.as_str()).collect()
}

async fn an_append_is_read_back_as_it_was_written(db: TestDatabase) {
    let store = db.open().await;
    let granted = NewEvent {
        event: Event::AccessGranted(AccessGranted {
            name: "ci \u{1F680} \"quoted\"".to_owned(),
            role: AccessRole::Operator,
            hash: "00".repeat(32),
            expires: Some(Timestamp::from_millis(1_234_567)),
        }),
        ..event()
    };
    let appends = vec![Append {
        stream: StreamName::access(),
        expected_version: 0,
        events: vec![granted.clone()],
    }];
    let written = records(
        &store,
        Commit {
            appends,
            ..Commit::default()
        },
    )
    .await;
    let read = store
        .read_stream(&StreamName::access(), 0, 10)
        .await
        .unwrap();
    assert_eq!(read, vec![Record::clone(&written[0])]);
    assert_eq!(read[0].event, granted.event);
    assert_eq!(read[0].bucket, Bucket::GLOBAL);
    assert_eq!(
        store.read_event(granted.id).await.unwrap(),
        read.first().cloned()
    );
    assert_eq!(store.read_event(Uuid::now_v7()).await.unwrap(), None);
}

async fn each_bucket_is_a_chain_and_each_stream_counts_from_one(db: TestDatabase) {
    let store = db.open().await;
    for version in 0..5 {
        for name in ["iris", "tulip", "rose"] {
            records(&store, commit_to(stream(name), version, 1)).await;
        }
    }
    let all = store.read_all(Position::START, 100).await.unwrap();
    let positions: Vec<u64> = all.iter().map(|r| r.position.0).collect();
    assert_eq!(positions, (1..=15).collect::<Vec<_>>());
    assert_eq!(store.head().await.unwrap(), Position(15));
    let mut last: BTreeMap<Bucket, Position> = BTreeMap::new();
    for record in &all {
        let before = last.insert(record.bucket, record.position);
        assert_eq!(record.prev, before.unwrap_or(Position::START));
    }
    let iris = store.read_stream(&stream("iris"), 2, 2).await.unwrap();
    assert_eq!(iris.iter().map(|r| r.version).collect::<Vec<_>>(), [3, 4]);
    let bucket = endpoint("iris").bucket();
    let in_bucket = store
        .read_bucket(bucket, Position::START, 100)
        .await
        .unwrap();
    let expected: Vec<Record> = all.into_iter().filter(|r| r.bucket == bucket).collect();
    assert_eq!(in_bucket, expected);
}

async fn a_wrong_expected_version_is_refused_and_writes_nothing(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 2).await;
    let mut commit = commit_to(stream("tulip"), 0, 1);
    commit.appends.push(append(stream("iris"), 1, 1));
    commit.rows.push(row("endpoints", "tulip", 3, Some("{}")));
    let refused = store.commit(commit).await.unwrap_err();
    assert!(
        matches!(&refused, CommitError::Conflict { stream: of, expected: 1, actual: 2 } if *of == stream("iris")),
        "{refused}"
    );
    assert_eq!(store.head().await.unwrap(), Position(2));
    assert_eq!(store.row("endpoints", "tulip").await.unwrap(), None);
    // The refused commit left no trace in the writer's cache either.
    records(&store, commit_to(stream("tulip"), 0, 1)).await;
}

async fn two_appends_of_one_commit_may_go_to_the_same_stream(db: TestDatabase) {
    let store = db.open().await;
    let commit = Commit {
        appends: vec![append(stream("iris"), 0, 2), append(stream("iris"), 2, 1)],
        ..Commit::default()
    };
    let written = records(&store, commit).await;
    let versions: Vec<u64> = written.iter().map(|r| r.version).collect();
    assert_eq!(versions, [1, 2, 3]);
}

async fn a_conflict_does_not_fail_the_other_commits_of_its_batch(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 1).await;
    // All are queued before the writer can reply to any, so they share transactions.
    let attempts = (0..200).map(|n| {
        let store = store.clone();
        let expected = if n % 2 == 0 { 0 } else { 7 };
        tokio::spawn(async move {
            let name = format!("e{n}");
            store.commit(commit_to(stream(&name), expected, 1)).await
        })
    });
    for (n, attempt) in attempts.collect::<Vec<_>>().into_iter().enumerate() {
        let outcome = attempt.await.unwrap();
        assert_eq!(outcome.is_ok(), n % 2 == 0, "{n}: {outcome:?}");
    }
    assert_eq!(store.head().await.unwrap(), Position(101));
}

async fn one_of_many_writers_with_the_same_expected_version_wins(db: TestDatabase) {
    let store = db.open().await;
    for version in 0..20 {
        let attempts: Vec<_> = (0..10)
            .map(|_| {
                let store = store.clone();
                tokio::spawn(
                    async move { store.commit(commit_to(stream("iris"), version, 1)).await },
                )
            })
            .collect();
        let mut won = 0;
        for attempt in attempts {
            match attempt.await.unwrap() {
                Ok(_) => won += 1,
                Err(CommitError::Conflict { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(won, 1);
    }
}

async fn a_duplicate_event_id_fails_only_its_own_commit(db: TestDatabase) {
    let store = db.open().await;
    let first = event();
    let with = |name: &str, event: NewEvent| Commit {
        appends: vec![Append {
            stream: stream(name),
            expected_version: 0,
            events: vec![event],
        }],
        ..Commit::default()
    };
    records(&store, with("iris", first.clone())).await;
    let attempts: Vec<_> = (0..20)
        .map(|n| {
            let store = store.clone();
            let event = if n == 7 { first.clone() } else { event() };
            let commit = with(&format!("e{n}"), event);
            tokio::spawn(async move { store.commit(commit).await })
        })
        .collect();
    for (n, attempt) in attempts.into_iter().enumerate() {
        assert_eq!(attempt.await.unwrap().is_ok(), n != 7, "{n}");
    }
    records(&store, commit_to(stream("e7"), 0, 1)).await;
}

async fn positions_become_visible_in_order(db: TestDatabase) {
    let store = db.open().await;
    let writers: Vec<_> = (0..8)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { fill(&store, &format!("e{n}"), 40).await })
        })
        .collect();
    let mut after = Position::START;
    while after < Position(320) {
        let page = store.read_all(after, 1000).await.unwrap();
        for record in &page {
            assert_eq!(record.position.0, after.0 + 1, "a gap was visible");
            after = record.position;
        }
        tokio::task::yield_now().await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
}

async fn subscribers_receive_every_commit_in_order_before_its_reply(db: TestDatabase) {
    let store = db.open().await;
    let mut committed = store.subscribe();
    let writers: Vec<_> = (0..4)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { fill(&store, &format!("e{n}"), 25).await })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let mut received = Vec::new();
    while let Ok(records) = committed.try_recv() {
        received.extend(records.iter().map(|r| r.position.0));
    }
    assert_eq!(received, (1..=100).collect::<Vec<_>>());
}

async fn a_repeated_idempotency_key_returns_the_first_result(db: TestDatabase) {
    let store = db.open().await;
    let commit = |expected_version: u64, body: &str| Commit {
        idempotency_key: Some(IdempotencyKey {
            key: "http:ci:PUT:/v1/endpoints/iris:key-1".to_owned(),
            body_hash: body.to_owned(),
            result: Some("201".to_owned()),
        }),
        ..commit_to(stream("iris"), expected_version, 2)
    };
    records(&store, commit(0, "a")).await;
    // The stream has a newer version by now; the repeat is still recognized.
    for _ in 0..2 {
        match store.commit(commit(0, "a")).await.unwrap() {
            Committed::Duplicate { positions, result } => {
                assert_eq!(positions, [Position(1), Position(2)]);
                assert_eq!(result.as_deref(), Some("201"));
            }
            now => panic!("{now:?}"),
        }
    }
    let reused = store.commit(commit(2, "b")).await.unwrap_err();
    assert!(
        matches!(reused, CommitError::IdempotencyKeyReused),
        "{reused}"
    );
    assert_eq!(store.head().await.unwrap(), Position(2));
    store.close().await;
    let store = db.open().await;
    let again = store.commit(commit(0, "a")).await.unwrap();
    assert!(matches!(again, Committed::Duplicate { .. }));
}

async fn one_of_concurrent_commits_with_the_same_idempotency_key_is_written(db: TestDatabase) {
    let store = db.open().await;
    let attempts: Vec<_> = (0..20)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let commit = Commit {
                    idempotency_key: Some(IdempotencyKey {
                        key: "views:1".to_owned(),
                        body_hash: String::new(),
                        result: None,
                    }),
                    ..commit_to(stream("iris"), 0, 1)
                };
                store.commit(commit).await.unwrap()
            })
        })
        .collect();
    let mut now = 0;
    for attempt in attempts {
        now += usize::from(matches!(attempt.await.unwrap(), Committed::Written { .. }));
    }
    assert_eq!(now, 1);
    assert_eq!(store.head().await.unwrap(), Position(1));
}

async fn request_keys_expire_after_a_day_and_consumer_keys_never(db: TestDatabase) {
    let store = db.open().await;
    let commit = |version: u64, seconds: i64, key: &str| Commit {
        appends: vec![Append {
            stream: stream("iris"),
            expected_version: version,
            events: vec![event_at(seconds)],
        }],
        idempotency_key: Some(IdempotencyKey {
            key: key.to_owned(),
            body_hash: String::new(),
            result: None,
        }),
        ..Commit::default()
    };
    let day = 24 * 3600;
    records(&store, commit(0, 0, "http:a")).await;
    records(&store, commit(1, 0, "views:a")).await;
    // Within a day both are known.
    records(&store, commit(2, day - 10, "http:b")).await;
    for known in ["http:a", "views:a"] {
        let repeat = store.commit(commit(9, day - 5, known)).await.unwrap();
        assert!(matches!(repeat, Committed::Duplicate { .. }), "{known}");
    }
    // The first commit after that prunes the old key.
    records(&store, commit(3, 2 * day, "http:c")).await;
    records(&store, commit(4, 2 * day, "http:a")).await;
    let repeat = store.commit(commit(9, 2 * day, "views:a")).await.unwrap();
    assert!(matches!(repeat, Committed::Duplicate { .. }));
}

async fn a_fenced_owner_can_no_longer_write(db: TestDatabase) {
    let store = db.open().await;
    let old = store.acquire_fence("autoscaler/17").await.unwrap();
    let with = |fence: &Fence, version: u64| Commit {
        fence: Some(fence.clone()),
        ..commit_to(stream("iris"), version, 1)
    };
    records(&store, with(&old, 0)).await;
    let new = store.acquire_fence("autoscaler/17").await.unwrap();
    assert!(new.generation > old.generation);
    let refused = store.commit(with(&old, 1)).await.unwrap_err();
    assert!(
        matches!(&refused, CommitError::Fenced { ours, actual, .. } if *ours == old.generation && *actual == new.generation),
        "{refused}"
    );
    records(&store, with(&new, 1)).await;
    // Other names are independent.
    let other = store.acquire_fence("autoscaler/18").await.unwrap();
    assert_eq!(other.generation, 1);
    store.close().await;
    let store = db.open().await;
    assert!(store.commit(with(&old, 2)).await.is_err());
    records(&store, with(&new, 2)).await;
    let never = Fence {
        name: "relay".to_owned(),
        generation: 1,
    };
    assert!(store.commit(with(&never, 3)).await.is_err());
}

async fn a_cursor_moves_only_from_its_current_position(db: TestDatabase) {
    let store = db.open().await;
    let bucket = Bucket(3);
    let moved = |from: u64, to: u64| Commit {
        cursor: Some(CursorMove {
            consumer: "views",
            bucket,
            from: Position(from),
            to: Position(to),
        }),
        ..rows(vec![row("endpoints", "iris", to, Some("{}"))])
    };
    assert_eq!(
        store.cursor("views", bucket).await.unwrap(),
        Position::START
    );
    store.commit(moved(0, 5)).await.unwrap();
    let refused = store.commit(moved(0, 6)).await.unwrap_err();
    assert!(
        matches!(
            &refused,
            CommitError::CursorMoved {
                expected: Position(0),
                actual: Position(5),
                ..
            }
        ),
        "{refused}"
    );
    let kept = store.row("endpoints", "iris").await.unwrap().unwrap();
    assert_eq!(
        kept.position,
        Position(5),
        "rows of a refused commit are not written"
    );
    store.commit(moved(5, 9)).await.unwrap();
    assert_eq!(store.cursor("views", bucket).await.unwrap(), Position(9));
    assert_eq!(
        store.cursor("views", Bucket(4)).await.unwrap(),
        Position::START
    );
    assert_eq!(
        store.cursor("other", bucket).await.unwrap(),
        Position::START
    );
}

async fn rows_are_listed_newest_first_and_by_filter(db: TestDatabase) {
    let store = db.open().await;
    let of = |endpoint: &str, deployment: &str, row: RowChange| RowChange {
        endpoint: endpoint.to_owned(),
        deployment: deployment.to_owned(),
        ..row
    };
    let changes = vec![
        of("iris", "blue", row("decisions", "d1", 1, Some("{}"))),
        of("iris", "green", row("decisions", "d2", 2, Some("{}"))),
        of("rose", "blue", row("decisions", "d3", 3, Some("{}"))),
        of("iris", "blue", row("decisions", "d4", 4, Some("{}"))),
        of("iris", "blue", row("other", "x", 5, Some("{}"))),
    ];
    store.commit(rows(changes)).await.unwrap();
    let all = RowQuery {
        model: "decisions".to_owned(),
        limit: 10,
        ..RowQuery::default()
    };
    let list = |query: RowQuery| async { store.rows(query).await.unwrap() };
    assert_eq!(keys(&list(all.clone()).await), ["d4", "d3", "d2", "d1"]);
    let iris = RowQuery {
        endpoint: Some("iris".to_owned()),
        ..all.clone()
    };
    assert_eq!(keys(&list(iris.clone()).await), ["d4", "d2", "d1"]);
    let blue = RowQuery {
        deployment: Some("blue".to_owned()),
        ..iris.clone()
    };
    assert_eq!(keys(&list(blue).await), ["d4", "d1"]);
    let since = RowQuery {
        since: Some(Timestamp::from_secs(2)),
        ..iris.clone()
    };
    assert_eq!(keys(&list(since).await), ["d4", "d2"]);
    let page = RowQuery {
        before: Some(Position(4)),
        limit: 1,
        ..iris
    };
    assert_eq!(keys(&list(page).await), ["d2"]);
    let missing = RowQuery {
        endpoint: Some("nobody".to_owned()),
        ..all
    };
    assert!(list(missing).await.is_empty());
}

async fn pages_of_rows_lose_none_that_share_a_position(db: TestDatabase) {
    let store = db.open().await;
    let changes = (0..10)
        .map(|n| row("instances", &format!("i{n}"), n / 4 + 1, Some("{}")))
        .collect();
    store.commit(rows(changes)).await.unwrap();
    let mut seen = BTreeSet::new();
    let mut before = None;
    loop {
        let query = RowQuery {
            model: "instances".to_owned(),
            before,
            limit: 3,
            ..RowQuery::default()
        };
        let page = store.rows(query).await.unwrap();
        let Some(last) = page.last() else { break };
        before = Some(last.position);
        for row in page {
            assert!(seen.insert(row.key.clone()), "{} came twice", row.key);
        }
    }
    assert_eq!(seen.len(), 10);
}

async fn rows_are_replaced_and_deleted_and_the_last_change_wins(db: TestDatabase) {
    let store = db.open().await;
    let changes = vec![
        row("endpoints", "iris", 1, Some("1")),
        row("endpoints", "iris", 2, Some("2")),
        row("endpoints", "rose", 3, Some("3")),
        row("endpoints", "rose", 4, None),
    ];
    store.commit(rows(changes)).await.unwrap();
    let iris = store.row("endpoints", "iris").await.unwrap().unwrap();
    assert_eq!((iris.doc.as_str(), iris.position), ("2", Position(2)));
    assert_eq!(store.row("endpoints", "rose").await.unwrap(), None);
    store
        .commit(rows(vec![row("endpoints", "iris", 5, None)]))
        .await
        .unwrap();
    assert_eq!(store.row("endpoints", "iris").await.unwrap(), None);
}

async fn everything_is_kept_across_a_restart(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    store
        .commit(rows(vec![row("endpoints", "iris", 3, Some("{}"))]))
        .await
        .unwrap();
    let before = store.read_all(Position::START, 10).await.unwrap();
    store.close().await;
    assert!(matches!(
        store.commit(Commit::default()).await.unwrap_err(),
        CommitError::Store(StoreError::Closed)
    ));
    assert!(matches!(
        store.head().await.unwrap_err(),
        StoreError::Closed
    ));
    let store = db.open().await;
    assert_eq!(store.read_all(Position::START, 10).await.unwrap(), before);
    assert!(store.row("endpoints", "iris").await.unwrap().is_some());
    let next = records(&store, commit_to(stream("iris"), 3, 1)).await;
    assert_eq!(next[0].position, Position(4));
    assert_eq!(next[0].prev, Position(3));
}

async fn commits_queued_before_closing_are_written(db: TestDatabase) {
    let store = db.open().await;
    let attempts: Vec<_> = (0..50)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                store
                    .commit(commit_to(stream(&format!("e{n}")), 0, 1))
                    .await
            })
        })
        .collect();
    tokio::task::yield_now().await;
    store.close().await;
    let mut written = 0;
    for attempt in attempts {
        match attempt.await.unwrap() {
            Ok(_) => written += 1,
            Err(CommitError::Store(StoreError::Closed)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let store = db.open().await;
    assert_eq!(store.head().await.unwrap(), Position(written));
}

async fn an_event_above_the_limit_is_refused(db: TestDatabase) {
    let store = db.open().await;
    let commit = |length: usize| Commit {
        appends: vec![Append {
            stream: StreamName::access(),
            expected_version: 0,
            events: vec![revoked("x".repeat(length))],
        }],
        ..Commit::default()
    };
    let refused = store.commit(commit(EVENT_BYTES_MAX)).await.unwrap_err();
    assert!(
        matches!(
            refused,
            CommitError::TooLarge {
                limit: EVENT_BYTES_MAX,
                ..
            }
        ),
        "{refused}"
    );
    let braces = r#"{"name":""}"#.len();
    records(&store, commit(EVENT_BYTES_MAX - braces)).await;
}

async fn an_event_in_a_stream_of_another_service_is_refused(db: TestDatabase) {
    let store = db.open().await;
    let scaling = StreamName::of(StreamKind::Scaling, &endpoint("iris"));
    let refused = store.commit(commit_to(scaling, 0, 1)).await.unwrap_err();
    let sentence = refused.to_string();
    assert!(
        sentence.contains("endpoint.deletion-requested"),
        "{sentence}"
    );
    assert_eq!(store.head().await.unwrap(), Position::START);
}

async fn a_second_opener_is_refused_until_the_first_has_closed(db: TestDatabase) {
    let store = db.open().await;
    let refused = Store::open(&db.url()).await.err().unwrap().to_string();
    assert!(
        refused.contains("log.db") && refused.contains("in use"),
        "{refused}"
    );
    store.close().await;
    db.open().await;
}

async fn many_processes_may_open_and_write_the_same_store(db: TestDatabase) {
    let (first, second) = (db.open().await, db.open().await);
    fill(&first, "iris", 3).await;
    fill(&second, "rose", 3).await;
    let stale = second
        .commit(commit_to(stream("iris"), 2, 1))
        .await
        .unwrap_err();
    assert!(
        matches!(stale, CommitError::Conflict { actual: 3, .. }),
        "{stale}"
    );
    let next = records(&second, commit_to(stream("iris"), 3, 1)).await;
    assert_eq!((next[0].position, next[0].prev), (Position(7), Position(3)));
}

async fn commits_larger_than_a_batch_are_written_completely(db: TestDatabase) {
    let store = db.open().await;
    let events = (0..30).map(|_| revoked("x".repeat(100_000))).collect();
    let commit = Commit {
        appends: vec![Append {
            stream: StreamName::access(),
            expected_version: 0,
            events,
        }],
        ..Commit::default()
    };
    assert_eq!(records(&store, commit).await.len(), 30);
    records(&store, commit_to(stream("iris"), 0, 1500)).await;
    assert_eq!(store.head().await.unwrap(), Position(1530));
}

/// Counts the events of each endpoint.
#[derive(Default)]
struct Counts {
    counts: BTreeMap<String, u64>,
}

impl Projector for Counts {
    fn project(&mut self, record: &Record) -> Vec<RowChange> {
        let Some(endpoint) = record.endpoint() else {
            return Vec::new();
        };
        let count = self.counts.entry(endpoint.to_string()).or_default();
        *count += 1;
        let doc = count.to_string();
        let change = |model, doc| RowChange {
            endpoint: endpoint.to_string(),
            time: record.time,
            ..row(model, endpoint.as_str(), record.position.0, doc)
        };
        // The second model is not requested and must be ignored.
        vec![change("counts", Some(&doc)), change("unasked", Some("{}"))]
    }
}

/// Folds as a live consumer does: bucket by bucket, cursor and rows in one commit.
async fn consume(store: &Store, upto: Position) {
    let mut counts = Counts::default();
    for record in store.read_all(Position::START, 1000).await.unwrap() {
        if record.position > upto {
            break;
        }
        let commit = Commit {
            rows: counts.project(&record),
            cursor: Some(CursorMove {
                consumer: "views",
                bucket: record.bucket,
                from: record.prev,
                to: record.position,
            }),
            ..Commit::default()
        };
        store.commit(commit).await.unwrap();
    }
}

async fn problems(store: &Store) -> Vec<String> {
    let report = verify(store, &mut Counts::default(), &["counts"])
        .await
        .unwrap();
    report.problems
}

async fn a_sound_store_verifies_while_its_consumer_is_behind(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 600).await;
    fill(&store, "rose", 20).await;
    consume(&store, Position(610)).await;
    let report = verify(&store, &mut Counts::default(), &["counts"])
        .await
        .unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!((report.events, report.streams, report.buckets), (620, 2, 2));
    assert_eq!((report.rows, report.head), (2, Position(620)));
}

async fn verify_reports_rows_that_the_log_does_not_produce(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 3).await;
    consume(&store, Position(6)).await;
    let mut wrong = row("counts", "default/iris", 3, Some("4"));
    wrong.endpoint = "default/iris".to_owned();
    wrong.time = Timestamp::from_secs(1_000);
    wrong.deployment = "blue".to_owned();
    let stray = row("counts", "default/ghost", 3, Some("1"));
    let lost = row("counts", "default/rose", 6, None);
    store.commit(rows(vec![wrong, stray, lost])).await.unwrap();
    let problems = problems(&store).await;
    assert_eq!(problems.len(), 3, "{problems:#?}");
    for (problem, (key, what)) in problems.iter().zip([
        ("default/iris", "document 4, but the log produces 3"),
        ("default/rose", "missing"),
        ("default/ghost", "the log does not produce it"),
    ]) {
        assert!(problem.contains(key) && problem.contains(what), "{problem}");
    }
}

async fn a_rebuild_produces_the_rows_that_verify_expects(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 3).await;
    let stray = row("counts", "default/ghost", 3, Some("1"));
    store.commit(rows(vec![stray])).await.unwrap();
    let changed = rebuild(&store, &mut Counts::default(), &["counts"])
        .await
        .unwrap();
    assert_eq!(changed, 3);
    assert_eq!(problems(&store).await, Vec::<String>::new());
    let again = rebuild(&store, &mut Counts::default(), &["counts"])
        .await
        .unwrap();
    assert_eq!(again, 0);
}

async fn a_replay_returns_the_same_events_as_reads(db: TestDatabase) {
    let store = db.open().await;
    let granted = NewEvent {
        event: Event::AccessGranted(AccessGranted {
            name: "1 2 \u{1F680} \"quoted\"\n".to_owned(),
            role: AccessRole::Operator,
            hash: String::new(),
            expires: None,
        }),
        ..event()
    };
    let granted = Append {
        stream: StreamName::access(),
        expected_version: 0,
        events: vec![granted],
    };
    let commit = Commit {
        appends: vec![append(stream("iris"), 0, 2_500), granted],
        ..Commit::default()
    };
    store.commit(commit).await.unwrap();
    fill(&store, "rose", 3).await;
    for after in [0, 2_498, 2_504] {
        let mut replayed = Vec::new();
        let mut replay = store.replay(Position(after));
        while let Some(page) = replay.next().await {
            replayed.extend(page.unwrap());
        }
        let read = store.read_all(Position(after), 10_000).await.unwrap();
        assert_eq!(replayed.len() as u64, 2_504 - after);
        assert!(replayed == read, "after {after}");
    }
}

async fn a_replay_ends_at_an_event_that_cannot_be_read(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    db.execute_directly("UPDATE events SET data = '?' WHERE position = 2")
        .await;
    let mut replay = store.replay(Position::START);
    let error = replay.next().await.unwrap().unwrap_err();
    assert!(
        matches!(error, StoreError::Unreadable { position, .. } if position == Position(2)),
        "{error}"
    );
    assert!(replay.next().await.is_none());
}

support::suite! {
    an_append_is_read_back_as_it_was_written
    each_bucket_is_a_chain_and_each_stream_counts_from_one
    a_wrong_expected_version_is_refused_and_writes_nothing
    two_appends_of_one_commit_may_go_to_the_same_stream
    a_conflict_does_not_fail_the_other_commits_of_its_batch
    one_of_many_writers_with_the_same_expected_version_wins
    a_duplicate_event_id_fails_only_its_own_commit
    positions_become_visible_in_order
    subscribers_receive_every_commit_in_order_before_its_reply
    a_repeated_idempotency_key_returns_the_first_result
    one_of_concurrent_commits_with_the_same_idempotency_key_is_written
    request_keys_expire_after_a_day_and_consumer_keys_never
    a_fenced_owner_can_no_longer_write
    a_cursor_moves_only_from_its_current_position
    rows_are_listed_newest_first_and_by_filter
    pages_of_rows_lose_none_that_share_a_position
    rows_are_replaced_and_deleted_and_the_last_change_wins
    everything_is_kept_across_a_restart
    commits_queued_before_closing_are_written
    an_event_above_the_limit_is_refused
    an_event_in_a_stream_of_another_service_is_refused
    commits_larger_than_a_batch_are_written_completely
    a_sound_store_verifies_while_its_consumer_is_behind
    verify_reports_rows_that_the_log_does_not_produce
    a_rebuild_produces_the_rows_that_verify_expects
    a_replay_returns_the_same_events_as_reads
    a_replay_ends_at_an_event_that_cannot_be_read
    @sqlite a_second_opener_is_refused_until_the_first_has_closed
    @postgres many_processes_may_open_and_write_the_same_store
}
