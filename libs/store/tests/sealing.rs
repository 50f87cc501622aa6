//! Sealing the beginning of the log into files, on either database: what may be sealed, what remains in the
//! table, and interruptions.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use contract::ids::{Bucket, Position};
use contract::log::RawRecord;
use contract::time::Timestamp;
use store::{
    Commit, CursorMove, SavedHeads, SealLimits, SnapshotChange, SnapshotMeta, Store, append_raw,
    inspect, seal, sealable, snapshot_hash,
};
use support::archives::*;
use support::database::*;

async fn a_store_has_the_newer_format_once_something_is_sealed(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 4).await;
    store.close().await;
    let url = fixture.db.url();
    assert_eq!(inspect(&url).await.unwrap().format, Some(store::FORMAT));
    let store = fixture.open().await;
    sealed(&store, before(3, 10)).await;
    store.close().await;
    let format = inspect(&url).await.unwrap().format;
    assert_eq!(format, Some(store::FORMAT_WITH_ARCHIVES));
}

fn cursor(consumer: &'static str, bucket: Bucket, to: u64) -> Commit {
    let cursor = CursorMove {
        consumer,
        bucket,
        from: Position::START,
        to: Position(to),
    };
    Commit {
        cursor: Some(cursor),
        ..Commit::default()
    }
}

fn snapshot(consumer: &str, bucket: Bucket, at: u64) -> Commit {
    let meta = SnapshotMeta {
        consumer: consumer.to_owned(),
        bucket,
        version: 1,
        position: Position(at),
        event_hash: None,
    };
    let change = SnapshotChange {
        hash: snapshot_hash(&meta, []),
        meta,
        base: None,
        parts: BTreeMap::new(),
    };
    Commit {
        snapshot: Some(change),
        ..Commit::default()
    }
}

async fn events_that_a_consumer_still_has_to_read_are_not_sealed(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill(&store, "iris", 10).await;
    fill(&store, "roses", 10).await;
    let all = SealLimits::default();
    assert_eq!(sealable(&store, &all).await.unwrap().through, Position(20));
    store
        .commit(cursor("relay", Bucket::GLOBAL, 17))
        .await
        .unwrap();
    let found = sealable(&store, &all).await.unwrap();
    assert_eq!((found.through, found.events), (Position(17), 17));
    assert_eq!(
        found.held_back.unwrap().to_string(),
        "`relay` is at position 17"
    );
    // A consumer at the last event of a bucket does not block that bucket.
    let (iris, roses) = (endpoint("iris").bucket(), endpoint("roses").bucket());
    store
        .commit(snapshot("autoscaler", iris, 10))
        .await
        .unwrap();
    store
        .commit(snapshot("autoscaler", roses, 14))
        .await
        .unwrap();
    let found = sealable(&store, &all).await.unwrap();
    assert_eq!(found.through, Position(14));
    assert_eq!(found.held_back.unwrap().bucket, Some(roses));
    let done = sealed(&store, all.clone()).await;
    assert_eq!(done[0].archive.last, Position(14));
    assert_eq!(sealed(&store, all).await, []);
}

async fn a_consumer_that_does_not_run_blocks_nothing(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill(&store, "iris", 10).await;
    let ttl = Duration::from_secs(60);
    let held = store
        .acquire_lease("node/a", "a", ttl)
        .await
        .unwrap()
        .unwrap();
    let of_node = snapshot("node/a", endpoint("iris").bucket(), 4);
    store.commit(of_node).await.unwrap();
    let all = SealLimits::default();
    assert_eq!(sealable(&store, &all).await.unwrap().through, Position(4));
    store.release_lease(&held).await.unwrap();
    assert_eq!(sealable(&store, &all).await.unwrap().through, Position(10));
}

async fn a_bucket_without_a_stored_position_of_a_consumer_is_not_sealed(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "roses", 3).await;
    let of_iris = snapshot("autoscaler", endpoint("iris").bucket(), 3);
    store.commit(of_iris).await.unwrap();
    let found = sealable(&store, &SealLimits::default()).await.unwrap();
    assert_eq!(found.through, Position(3));
}

async fn only_old_enough_events_are_sealed(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    for (version, seconds) in [100, 300, 200, 400].into_iter().enumerate() {
        let mut commit = commit_to(stream("iris"), version as u64, 0);
        commit.appends[0].events.push(event_at(seconds));
        records(&store, commit).await;
    }
    let older = |seconds| SealLimits {
        older_than: Some(Timestamp::from_secs(seconds)),
        ..SealLimits::default()
    };
    for (seconds, through) in [(100, 0), (250, 1), (301, 3), (1_000, 4)] {
        let found = sealable(&store, &older(seconds)).await.unwrap();
        assert_eq!(found.through, Position(through), "{seconds}");
    }
    let few = SealLimits {
        events_min: 4,
        ..older(301)
    };
    assert_eq!(sealed(&store, few).await, []);
}

async fn a_snapshot_is_validated_against_archived_events(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill(&store, "iris", 6).await;
    let bucket = endpoint("iris").bucket();
    let at = Position(4);
    let mut commit = snapshot("autoscaler", bucket, at.0);
    let event_hash = store.event_hash(bucket, at).await.unwrap();
    let change = commit.snapshot.as_mut().unwrap();
    change.meta.event_hash = event_hash;
    change.hash = snapshot_hash(&change.meta, []);
    let meta = change.meta.clone();
    store.commit(commit).await.unwrap();
    sealed(&store, SealLimits::default()).await;
    fill_from(&store, "iris", 6, 9).await;
    let returned = store.snapshot("autoscaler", bucket, 1).await.unwrap();
    assert_eq!(returned.unwrap().meta, meta);
}

async fn an_interrupted_run_is_resumed(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    let original = read_everything(&store).await;
    let folder = fixture.archives();
    fs::create_dir_all(&folder).unwrap();
    // Partially written when the process ended.
    fs::write(folder.join("1-10.penstock-events.gz.partial"), "half").unwrap();
    assert_eq!(read_everything(&store).await, original);
    let done = sealed(&store, before(11, 10)).await;
    assert_eq!(done[0].archive.file, "1-10.penstock-events.gz");
    assert_eq!(names(&folder), ["1-10.penstock-events.gz"]);
    assert_eq!(read_everything(&store).await, original);
    let events: Vec<RawRecord> = original.raw.iter().take(12).cloned().collect();
    assert_eq!(append_raw(&store, events).await.unwrap(), 0);
    store.close().await;
}

async fn an_unlisted_file_is_reused_only_if_it_is_identical(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    let original = read_everything(&store).await;
    sealed(&store, before(11, 10)).await;
    store.close().await;
    let path = fixture.archives().join("1-10.penstock-events.gz");
    let written = fs::read(&path).unwrap();
    // The same log in a store that lists no archives.
    let fresh = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", fresh.path().join("log.db").display());
    let store = Store::open_with(&url, Some(&fixture.archives()))
        .await
        .unwrap();
    append_raw(&store, original.raw.clone()).await.unwrap();
    fs::write(&path, "of another").unwrap();
    let fence = lease(&store).await;
    let limits = before(11, 10);
    let now = Timestamp::from_secs(1);
    let refused = seal(&store, &fence, &limits, now, |_| {}).await;
    let message = refused.unwrap_err().to_string();
    assert!(
        message.contains("exists already") && message.contains("--archive"),
        "{message}"
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "of another");
    assert_eq!(names(&fixture.archives()), ["1-10.penstock-events.gz"]);
    fs::write(&path, written).unwrap();
    assert_eq!(sealed(&store, limits).await.len(), 1);
    assert_eq!(read_everything(&store).await.raw, original.raw);
}

async fn a_partially_cleared_table_is_read_correctly_and_cleared_later(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    let original = read_everything(&store).await;
    store.close().await;
    let db = &fixture.db;
    db.run("CREATE TABLE kept AS SELECT * FROM events").await;
    let store = fixture.open().await;
    sealed(&store, before(21, 100)).await;
    let left = db.number("SELECT COUNT(*) FROM events").await;
    store.close().await;
    for from in [9, 1] {
        let again = format!(
            "INSERT INTO events SELECT * FROM kept WHERE position >= {from} \
             AND NOT EXISTS (SELECT 1 FROM events WHERE events.position = kept.position)"
        );
        db.run(&again).await;
        let store = fixture.open().await;
        assert_eq!(read_everything(&store).await, original, "{from}");
        store.close().await;
    }
    let store = fixture.open().await;
    assert_eq!(sealed(&store, before(21, 100)).await, []);
    assert_eq!(db.number("SELECT COUNT(*) FROM events").await, left);
    assert_eq!(read_everything(&store).await, original);
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> = entries
        .map(|entry| name(entry).to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

async fn a_lost_lease_seals_nothing(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    let old = lease(&store).await;
    lease(&store).await;
    let limits = SealLimits::default();
    let refused = seal(&store, &old, &limits, Timestamp::from_secs(1), |_| {}).await;
    let message = refused.unwrap_err().to_string();
    assert!(
        message.contains("another process is archiving"),
        "{message}"
    );
    assert_eq!(store.archives().await.unwrap(), []);
}

async fn saved_heads_are_found_in_archives(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill(&store, "iris", 5).await;
    let mut heads = SavedHeads::of(&store).unwrap();
    assert!(heads.save().await.unwrap());
    fill_from(&store, "iris", 5, 10).await;
    sealed(&store, before(8, 10)).await;
    assert_eq!(store.archives().await.unwrap().len(), 1);
    assert_eq!(heads.check().await.unwrap(), None);
}

async fn the_table_keeps_only_the_last_event_of_each_stream(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    sealed(&store, before(14, 100)).await;
    sealed(&store, SealLimits::default()).await;
    let rows = "SELECT COUNT(*) FROM events";
    assert_eq!(fixture.db.number(rows).await, NAMES.len() as i64);
    // After another event of a stream, the previous one may be deleted with the next file.
    fill_from(&store, "iris", 12, 13).await;
    sealed(&store, SealLimits::default()).await;
    assert_eq!(fixture.db.number(rows).await, NAMES.len() as i64);
}

support::suite! {
    a_store_has_the_newer_format_once_something_is_sealed
    events_that_a_consumer_still_has_to_read_are_not_sealed
    a_consumer_that_does_not_run_blocks_nothing
    a_bucket_without_a_stored_position_of_a_consumer_is_not_sealed
    only_old_enough_events_are_sealed
    a_snapshot_is_validated_against_archived_events
    an_interrupted_run_is_resumed
    an_unlisted_file_is_reused_only_if_it_is_identical
    a_partially_cleared_table_is_read_correctly_and_cleared_later
    a_lost_lease_seals_nothing
    the_table_keeps_only_the_last_event_of_each_stream
    @sqlite
    saved_heads_are_found_in_archives
    @postgres
}
