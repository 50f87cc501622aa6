//! Archives: the beginning of the log in files, on either database. Whatever was sealed, every reader gets
//! what it got before.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record, RowChange, StreamKind};
use contract::time::Timestamp;
use store::{
    ARCHIVE_LEASE, Archive, Commit, CursorMove, Entry, Fence, Projector, RowQuery, SealLimits,
    SealedFile, SnapshotChange, SnapshotMeta, Store, append_raw, backup, copy, heads, inspect,
    log_hash, rebuild, seal, sealable, snapshot_hash, verify,
};
use support::place::*;

/// A place for a store and a folder for its archives.
struct Ground {
    place: Place,
    folder: tempfile::TempDir,
}

impl Ground {
    fn of(place: Place) -> Self {
        Self {
            place,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn archives(&self) -> PathBuf {
        self.folder.path().join("sealed")
    }

    async fn open(&self) -> Store {
        let folder = self.archives();
        Store::open_with(&self.place.url(), Some(&folder))
            .await
            .unwrap()
    }
}

const NAMES: [&str; 4] = ["iris", "roses", "tulips", "wine"];

/// Events of several streams, in turn.
async fn fill_all(store: &Store, from: u64, to: u64) {
    for version in from..to {
        for (index, name) in NAMES.iter().enumerate() {
            if version % (index as u64 + 1) == 0 {
                let at = version / (index as u64 + 1);
                records(store, commit_to(stream(name), at, 1)).await;
            }
        }
    }
}

async fn lease(store: &Store) -> Fence {
    let ttl = Duration::from_secs(60);
    let acquired = store.acquire_lease(ARCHIVE_LEASE, "test", ttl).await;
    acquired.unwrap().unwrap()
}

fn before(position: u64, events_max: u64) -> SealLimits {
    SealLimits {
        before: Some(Position(position)),
        events_max: Some(events_max),
        ..SealLimits::default()
    }
}

async fn sealed(store: &Store, limits: SealLimits) -> Vec<SealedFile> {
    let fence = lease(store).await;
    let now = Timestamp::from_secs(9_000);
    seal(store, &fence, &limits, now, |_| {}).await.unwrap()
}

/// What each way of reading gives.
#[derive(Debug, PartialEq)]
struct Seen {
    raw: Vec<RawRecord>,
    buckets: BTreeMap<Bucket, Vec<Record>>,
    streams: BTreeMap<String, Vec<Record>>,
    without: Vec<Entry>,
    replayed: Vec<Record>,
    hashes: Vec<Option<contract::chain::ChainHash>>,
    heads: Vec<store::ChainHead>,
    log: store::LogHash,
    head: Position,
    ids: Vec<Option<Record>>,
}

async fn seen(store: &Store) -> Seen {
    let head = store.head().await.unwrap();
    let mut raw = Vec::new();
    loop {
        let after = raw
            .last()
            .map_or(Position::START, |e: &RawRecord| e.position);
        let page = store.read_raw(after, 7).await.unwrap();
        if page.is_empty() {
            break;
        }
        raw.extend(page);
    }
    let (mut buckets, mut hashes) = (BTreeMap::new(), Vec::new());
    for name in NAMES {
        let bucket = endpoint(name).bucket();
        let records = store
            .read_bucket(bucket, Position(3), 10_000)
            .await
            .unwrap();
        buckets.insert(bucket, records);
        for at in (0..=head.0 + 1).step_by(3) {
            hashes.push(store.event_hash(bucket, Position(at)).await.unwrap());
        }
    }
    let mut streams = BTreeMap::new();
    for name in NAMES {
        let whole = store.read_stream(&stream(name), 0, 10_000).await.unwrap();
        let mut paged = Vec::new();
        while let Some(next) = {
            let page = store
                .read_stream(&stream(name), paged.len() as u64, 3)
                .await;
            Some(page.unwrap()).filter(|page| !page.is_empty())
        } {
            paged.extend(next);
        }
        assert_eq!(whole, paged);
        streams.insert(name.to_owned(), whole);
    }
    let between = (Position(2), Position(head.0 - 1));
    let kinds = [StreamKind::Usage];
    let without = store.read_without(None, between, &kinds, 10_000).await;
    let mut replay = store.replay(Position(1));
    let mut replayed = Vec::new();
    while let Some(page) = replay.next().await {
        replayed.extend(page.unwrap());
    }
    let mut ids = Vec::new();
    for event in &raw {
        ids.push(store.read_event(event.id.parse().unwrap()).await.unwrap());
    }
    Seen {
        buckets,
        streams,
        without: without.unwrap(),
        replayed,
        hashes,
        heads: heads(store).await.unwrap(),
        log: log_hash(store, head).await.unwrap(),
        head,
        ids,
        raw,
    }
}

/// A row for each event.
struct Rows;

const MODEL: &str = "events";

impl Projector for Rows {
    fn project(&mut self, record: &Record) -> Vec<RowChange> {
        vec![RowChange {
            model: MODEL,
            key: record.position.to_string(),
            endpoint: String::new(),
            deployment: String::new(),
            position: record.position,
            time: record.time,
            doc: Some("{}".to_owned()),
        }]
    }
}

async fn nothing_changes_for_any_reader(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 12).await;
    let before_sealing = seen(&store).await;
    for (limit, files) in [(4, 1), (11, 2), (1_000, 1)] {
        let file_max = if limit == 11 { 4 } else { 1_000 };
        let done = sealed(&store, before(limit, file_max)).await;
        assert_eq!(done.len(), files, "{limit}");
        assert_eq!(seen(&store).await, before_sealing);
    }
    store.close().await;
    let again = ground.open().await;
    assert_eq!(seen(&again).await, before_sealing);
    rebuild(&again, &mut Rows, &[MODEL]).await.unwrap();
    let report = verify(&again, &mut Rows, &[MODEL]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.events as usize, before_sealing.raw.len());
}

async fn streams_and_chains_go_on_after_all_was_sealed(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 8).await;
    sealed(&store, SealLimits::default()).await;
    assert!(store.commit(commit_to(stream("iris"), 0, 1)).await.is_err());
    fill_all(&store, 8, 16).await;
    let done = sealed(&store, before(30, 5)).await;
    assert!(!done.is_empty());
    store.close().await;
    let store = ground.open().await;
    fill_all(&store, 16, 20).await;
    let report = verify(&store, &mut Rows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.head, store.head().await.unwrap());
}

async fn the_table_keeps_the_last_event_of_each_stream_only(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 12).await;
    sealed(&store, before(14, 100)).await;
    sealed(&store, SealLimits::default()).await;
    let rows = "SELECT COUNT(*) FROM events";
    assert_eq!(ground.place.number(rows).await, NAMES.len() as i64);
    // One more of a stream, and the one before it may go with the next file.
    fill_from(&store, "iris", 12, 13).await;
    sealed(&store, SealLimits::default()).await;
    assert_eq!(ground.place.number(rows).await, NAMES.len() as i64);
}

async fn a_store_has_the_newer_format_once_something_is_sealed(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 4).await;
    store.close().await;
    let url = ground.place.url();
    assert_eq!(inspect(&url).await.unwrap().format, Some(store::FORMAT));
    let store = ground.open().await;
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

async fn nothing_is_sealed_that_somebody_would_read_on_from(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
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
        "`relay` stands at position 17"
    );
    // One that stands at a bucket's last event holds nothing back of it.
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

async fn who_does_not_run_holds_nothing_back(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
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

async fn a_bucket_that_a_consumer_has_stored_nothing_of_is_held_back(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "roses", 3).await;
    let of_iris = snapshot("autoscaler", endpoint("iris").bucket(), 3);
    store.commit(of_iris).await.unwrap();
    let found = sealable(&store, &SealLimits::default()).await.unwrap();
    assert_eq!(found.through, Position(3));
}

async fn only_what_is_old_enough_is_sealed(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
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

async fn a_snapshot_stays_bound_to_events_that_are_in_files(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
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
    let given = store.snapshot("autoscaler", bucket, 1).await.unwrap();
    assert_eq!(given.unwrap().meta, meta);
}

async fn fill_from(store: &Store, name: &str, from: u64, to: u64) {
    for version in from..to {
        records(store, commit_to(stream(name), version, 1)).await;
    }
}

/// What a reader is told, and what `verify` is.
async fn told(store: &Store) -> [String; 2] {
    let read = store.read_raw(Position::START, 100).await;
    let verified = verify(store, &mut Rows, &[]).await;
    [
        read.unwrap_err().to_string(),
        verified.unwrap_err().to_string(),
    ]
}

async fn a_file_that_is_not_as_it_was_sealed_is_named(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 12).await;
    let head = store.head().await.unwrap();
    let done = sealed(&store, before(head.0, 10)).await;
    let Archive {
        file, first, last, ..
    } = &done[1].archive;
    let path = ground.archives().join(file);
    let whole = fs::read(&path).unwrap();
    let changed = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        Some(bytes)
    };
    // A byte that unpacking passes over: in the head of the block of events.
    let heads = whole.windows(3).enumerate();
    let mut heads = heads.filter(|(_, bytes)| *bytes == [0x1f, 0x8b, 8]);
    let in_head = heads.nth(1).unwrap().0 + 9;
    let cases = [
        None,
        changed(in_head),
        Some(whole[..whole.len() - 9].to_vec()),
        changed(whole.len() / 4),
        changed(whole.len() - 20),
        changed(whole.len() - 60),
    ];
    for (index, bytes) in cases.into_iter().enumerate() {
        fs::remove_file(&path).unwrap_or_default();
        if let Some(bytes) = bytes {
            fs::write(&path, bytes).unwrap();
        }
        store.close().await;
        let store = ground.open().await;
        for said in told(&store).await {
            assert!(
                said.contains(&path.display().to_string()),
                "{index}: {said}"
            );
            let range = format!("from position {first} to {last}");
            assert!(
                said.contains(&range) && said.contains("Put it back"),
                "{said}"
            );
        }
        // What stands elsewhere is read.
        let above = store.read_raw(*last, 100).await.unwrap();
        assert_eq!(above.last().map(|event| event.position), Some(head));
        store.close().await;
    }
    fs::write(&path, &whole).unwrap();
    let report = verify(&ground.open().await, &mut Rows, &[]).await.unwrap();
    assert!(report.is_sound());
}

async fn what_was_broken_off_is_taken_up_again(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 12).await;
    let whole = seen(&store).await;
    let folder = ground.archives();
    fs::create_dir_all(&folder).unwrap();
    // Written and not listed, under another name and under the one that it gets.
    fs::write(folder.join("1-10.penstock-events.gz.partial"), "half").unwrap();
    fs::write(folder.join("1-10.penstock-events.gz"), "whole").unwrap();
    assert_eq!(seen(&store).await, whole);
    let done = sealed(&store, before(11, 10)).await;
    assert_eq!(done[0].archive.file, "1-10.penstock-events.gz");
    assert_eq!(names(&folder), ["1-10.penstock-events.gz"]);
    assert_eq!(seen(&store).await, whole);
    let events: Vec<RawRecord> = whole.raw.iter().take(12).cloned().collect();
    assert_eq!(append_raw(&store, events).await.unwrap(), 0);
    store.close().await;
}

async fn a_table_that_was_cleared_in_part_is_read_right_and_cleared_later(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 12).await;
    let whole = seen(&store).await;
    store.close().await;
    let place = &ground.place;
    place.run("CREATE TABLE kept AS SELECT * FROM events").await;
    let store = ground.open().await;
    sealed(&store, before(21, 100)).await;
    let left = place.number("SELECT COUNT(*) FROM events").await;
    store.close().await;
    for from in [9, 1] {
        let again = format!(
            "INSERT INTO events SELECT * FROM kept WHERE position >= {from} \
             AND NOT EXISTS (SELECT 1 FROM events WHERE events.position = kept.position)"
        );
        place.run(&again).await;
        let store = ground.open().await;
        assert_eq!(seen(&store).await, whole, "{from}");
        store.close().await;
    }
    let store = ground.open().await;
    assert_eq!(sealed(&store, before(21, 100)).await, []);
    assert_eq!(place.number("SELECT COUNT(*) FROM events").await, left);
    assert_eq!(seen(&store).await, whole);
}

async fn readers_miss_nothing_while_files_are_sealed(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 40).await;
    let head = store.head().await.unwrap();
    let bucket = endpoint("iris").bucket();
    let of_bucket = store.read_bucket(bucket, Position::START, 10_000).await;
    let of_bucket = of_bucket.unwrap().len();
    let sealing = async {
        let fence = lease(&store).await;
        for end in (5..head.0).step_by(7) {
            let now = Timestamp::from_secs(1);
            let limits = before(end, 3);
            seal(&store, &fence, &limits, now, |_| {}).await.unwrap();
        }
    };
    let done = AtomicBool::new(false);
    let reading = async {
        let mut rounds = 0;
        while !done.load(Ordering::Relaxed) || rounds == 0 {
            let mut after = Position::START;
            while after < head {
                let page = store.read_raw(after, 4).await.unwrap();
                let next: Vec<u64> = page.iter().map(|event| event.position.0).collect();
                let expected: Vec<u64> = (after.0 + 1..=head.0).take(4).collect();
                assert_eq!(next, expected);
                after = page.last().unwrap().position;
            }
            let again = store.read_bucket(bucket, Position::START, 10_000).await;
            assert_eq!(again.unwrap().len(), of_bucket);
            let stream = store.read_stream(&stream("iris"), 0, 10_000).await;
            assert_eq!(stream.unwrap().len(), 40);
            rounds += 1;
        }
    };
    let sealing = async {
        sealing.await;
        done.store(true, Ordering::Relaxed);
    };
    tokio::join!(sealing, reading, async {
        let mut page = store.replay(Position::START);
        let mut count = 0;
        while let Some(records) = page.next().await {
            count += records.unwrap().len() as u64;
        }
        assert_eq!(count, head.0);
    });
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

async fn a_lease_that_was_taken_over_seals_nothing(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 12).await;
    let old = lease(&store).await;
    lease(&store).await;
    let limits = SealLimits::default();
    let refused = seal(&store, &old, &limits, Timestamp::from_secs(1), |_| {}).await;
    let said = refused.unwrap_err().to_string();
    assert!(said.contains("another process archives"), "{said}");
    assert_eq!(store.archives().await.unwrap(), []);
}

async fn a_backup_has_all_that_is_sealed(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 12).await;
    sealed(&store, before(20, 6)).await;
    let whole = seen(&store).await;
    let target = tempfile::tempdir().unwrap();
    for name in ["monday.db", "tuesday.db"] {
        let path = target.path().join(name);
        let hash = backup(&store, &path, |_, _| {}).await.unwrap();
        assert_eq!(hash, whole.log);
    }
    fs::remove_dir_all(ground.archives()).unwrap();
    for name in ["monday.db", "tuesday.db"] {
        let url = format!("sqlite:{}", target.path().join(name).display());
        let copied = Store::open(&url).await.unwrap();
        assert_eq!(seen(&copied).await, whole);
        copied.close().await;
    }
}

async fn a_copy_has_all_events_and_compares_those_in_files(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 12).await;
    sealed(&store, before(20, 6)).await;
    let whole = seen(&store).await;
    let target = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", target.path().join("copy.db").display());
    let into = Store::open(&url).await.unwrap();
    let mut last = (0, 0);
    let hash = copy(&store, &into, |done, of| last = (done, of)).await;
    assert_eq!(hash.unwrap(), whole.log);
    assert_eq!(last, (whole.log.events, whole.log.events));
    assert_eq!(seen(&into).await, whole);
    // Once more, onto events that stand in files there.
    copy(&into, &store, |_, _| {}).await.unwrap();
    assert_eq!(seen(&store).await.raw, whole.raw);
    let mut changed = whole.raw[3].clone();
    changed.data.push(' ');
    let refused = append_raw(&store, vec![changed]).await.unwrap_err();
    assert!(
        refused.to_string().contains("position 4 is not the same"),
        "{refused}"
    );
}

async fn others_find_the_folder_that_was_named(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 6).await;
    let whole = seen(&store).await;
    sealed(&store, SealLimits::default()).await;
    store.close().await;
    let store = Store::open(&ground.place.url()).await.unwrap();
    assert_eq!(seen(&store).await, whole);
}

async fn rows_are_read_beside_archives(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 6).await;
    rebuild(&store, &mut Rows, &[MODEL]).await.unwrap();
    sealed(&store, SealLimits::default()).await;
    let query = RowQuery {
        model: MODEL.to_owned(),
        limit: 100,
        ..RowQuery::default()
    };
    let rows = store.rows(query.clone()).await.unwrap();
    assert_eq!(rebuild(&store, &mut Rows, &[MODEL]).await.unwrap(), 0);
    assert_eq!(store.rows(query).await.unwrap(), rows);
}

support::suite! {
    nothing_changes_for_any_reader
    streams_and_chains_go_on_after_all_was_sealed
    the_table_keeps_the_last_event_of_each_stream_only
    a_store_has_the_newer_format_once_something_is_sealed
    nothing_is_sealed_that_somebody_would_read_on_from
    who_does_not_run_holds_nothing_back
    a_bucket_that_a_consumer_has_stored_nothing_of_is_held_back
    only_what_is_old_enough_is_sealed
    a_snapshot_stays_bound_to_events_that_are_in_files
    a_file_that_is_not_as_it_was_sealed_is_named
    what_was_broken_off_is_taken_up_again
    a_table_that_was_cleared_in_part_is_read_right_and_cleared_later
    readers_miss_nothing_while_files_are_sealed
    a_lease_that_was_taken_over_seals_nothing
    a_backup_has_all_that_is_sealed
    a_copy_has_all_events_and_compares_those_in_files
    others_find_the_folder_that_was_named
    rows_are_read_beside_archives
    @sqlite
    @postgres
}
