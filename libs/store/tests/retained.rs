//! The events that the table retains of the archived part of the log: whatever is changed there, `verify` finds
//! it, and the check at a start what new events and access depend on.

#![allow(clippy::unwrap_used)]

mod support;

use contract::events::{AccessRevoked, Event};
use contract::log::{NewEvent, StreamName};
use store::{Append, Commit, SealLimits, Store, check_retained, verify};
use support::archives::*;
use support::database::*;

async fn revoke(store: &Store, expected_version: u64) {
    let name = "ci".to_owned();
    let revoked = NewEvent {
        event: Event::AccessRevoked(AccessRevoked { name }),
        ..event()
    };
    let append = Append {
        stream: StreamName::access(),
        expected_version,
        events: vec![revoked],
    };
    let commit = Commit {
        appends: vec![append],
        ..Commit::default()
    };
    records(store, commit).await;
}

const COLUMNS: &str =
    "prev, bucket, stream, version, id, type, type_version, time, actor, data, prev_hash";

/// Writes access events at 1 and 2, those of iris at 3 to 5 and of wine at 6 and 7, and archives them. The table
/// retains 2, 5 and 7. The tables `original` and `kept` have copies of both states.
async fn seal_all(fixture: &ArchiveFixture) {
    let store = fixture.open().await;
    revoke(&store, 0).await;
    revoke(&store, 1).await;
    fill_from(&store, "iris", 0, 3).await;
    fill_from(&store, "wine", 0, 2).await;
    let copy =
        |name: &str| format!("CREATE TABLE {name} AS SELECT position, {COLUMNS} FROM events");
    store.close().await;
    fixture.db.run(&copy("original")).await;
    let store = fixture.open().await;
    sealed(&store, SealLimits::default()).await;
    store.close().await;
    fixture.db.run(&copy("kept")).await;
}

/// Changes the table, and returns the problems that `verify` reports, and the one that a start does.
async fn problems(fixture: &ArchiveFixture, change: &str) -> (Vec<String>, Option<String>) {
    fixture.db.run(change).await;
    let store = fixture.open().await;
    let report = verify(&store, &mut EventRows, &[]).await.unwrap();
    let refused = check_retained(&store).await.err();
    store.close().await;
    let restored = format!(
        "DELETE FROM events; \
         INSERT INTO events (position, {COLUMNS}) SELECT position, {COLUMNS} FROM kept"
    );
    fixture.db.run(&restored).await;
    (report.problems, refused.map(|refused| refused.to_string()))
}

fn differs(position: i64) -> String {
    format!("position {position}: the store's copy differs from the archive")
}

fn missing(position: i64) -> String {
    format!("position {position}: the archive has this event, but the store's copy is missing")
}

fn unarchived(position: i64) -> String {
    format!("position {position}: the store has an event there that is not in the archive")
}

async fn any_change_of_a_retained_event_is_found(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    seal_all(&fixture).await;
    let unchanged = problems(&fixture, "UPDATE events SET version = version").await;
    assert_eq!(unchanged, (Vec::new(), None));
    for value in [
        "prev = 6",
        "bucket = 1",
        "stream = 'access/other'",
        "version = 9",
        "id = 'other'",
        "type = 'other'",
        "type_version = 9",
        "time = 9",
        "actor = 'other'",
        "data = '{\"name\":\"other\"}'",
        "prev_hash = (SELECT prev_hash FROM kept WHERE position = 7)",
    ] {
        let change = format!("UPDATE events SET {value} WHERE position = 2");
        let (found, at_start) = problems(&fixture, &change).await;
        assert_eq!(found, [differs(2)], "{value}");
        let at_start = at_start.unwrap();
        assert!(at_start.contains("position 2: "), "{value}: {at_start}");
        assert!(at_start.contains("store rebuild --from"), "{at_start}");
    }
}

async fn a_retained_event_that_was_removed_or_inserted_is_found(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    seal_all(&fixture).await;
    let forged = |position: i64| {
        format!(
            "INSERT INTO events (position, {COLUMNS}) SELECT {position}, prev, bucket, stream, 3, 'forged', type, \
             type_version, time, actor, data, prev_hash FROM kept WHERE position = 2"
        )
    };
    let archived = format!(
        "INSERT INTO events (position, {COLUMNS}) SELECT position, {COLUMNS} FROM original WHERE position = 3"
    );
    for (change, found, at_start) in [
        (
            "DELETE FROM events WHERE position = 2",
            missing(2),
            Some(missing(2)),
        ),
        (
            "DELETE FROM events WHERE position = 5",
            missing(5),
            Some(missing(5)),
        ),
        // The end of the log.
        (
            "DELETE FROM events WHERE position = 7",
            missing(7),
            Some(missing(7)),
        ),
        // The next version of a stream, at a position that the table does not have.
        (&forged(1), differs(1), Some(unarchived(1))),
        (&forged(-4), unarchived(-4), Some(unarchived(-4))),
        // An unchanged event, after which a reader of the stream would miss one.
        (&archived, missing(4), None),
    ] {
        let (problems, refused) = problems(&fixture, change).await;
        assert_eq!(problems, [found], "{change}");
        let Some(at_start) = at_start else {
            assert_eq!(refused, None, "{change}");
            continue;
        };
        let refused = refused.unwrap();
        assert!(refused.contains(&at_start), "{change}: {refused}");
    }
}

async fn what_is_still_to_be_cleared_or_was_followed_by_others_is_no_problem(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    seal_all(&fixture).await;
    // As if sealing had been interrupted before it cleared the table.
    let uncleared = format!(
        "DELETE FROM events; \
         INSERT INTO events (position, {COLUMNS}) SELECT position, {COLUMNS} FROM original"
    );
    assert_eq!(problems(&fixture, &uncleared).await, (Vec::new(), None));
    let store = fixture.open().await;
    revoke(&store, 2).await;
    fill_from(&store, "iris", 3, 4).await;
    sealed(&store, before(9, 100)).await;
    let report = verify(&store, &mut EventRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    check_retained(&store).await.unwrap();
}

support::suite! {
    any_change_of_a_retained_event_is_found
    a_retained_event_that_was_removed_or_inserted_is_found
    what_is_still_to_be_cleared_or_was_followed_by_others_is_no_problem
    @sqlite
    @postgres
}
