//! Archives: the beginning of the log in files, on either database. Whatever was sealed, every reader gets
//! what it got before, or is told what is wrong.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use contract::ids::Position;
use contract::time::Timestamp;
use store::{
    Archive, RowQuery, SealLimits, Store, append_raw, backup, copy, rebuild, seal, verify,
};
use support::archives::*;
use support::place::*;

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

async fn readers_miss_nothing_while_files_are_sealed(place: Place) {
    let ground = Ground::of(place);
    let store = ground.open().await;
    fill_all(&store, 0, 40).await;
    // Another process, where there may be one.
    let reader = match ground.place {
        Place::Sqlite(_) => store.clone(),
        Place::Postgres(_) => ground.open().await,
    };
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
                let page = reader.read_raw(after, 4).await.unwrap();
                let next: Vec<u64> = page.iter().map(|event| event.position.0).collect();
                let expected: Vec<u64> = (after.0 + 1..=head.0).take(4).collect();
                assert_eq!(next, expected);
                after = page.last().unwrap().position;
            }
            let again = reader.read_bucket(bucket, Position::START, 10_000).await;
            assert_eq!(again.unwrap().len(), of_bucket);
            let stream = reader.read_stream(&stream("iris"), 0, 10_000).await;
            assert_eq!(stream.unwrap().len(), 40);
            rounds += 1;
        }
    };
    let sealing = async {
        sealing.await;
        done.store(true, Ordering::Relaxed);
    };
    tokio::join!(sealing, reading, async {
        let mut page = reader.replay(Position::START);
        let mut count = 0;
        while let Some(records) = page.next().await {
            count += records.unwrap().len() as u64;
        }
        assert_eq!(count, head.0);
    });
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

async fn who_writes_beside_the_process_that_seals_goes_on(place: Place) {
    let ground = Ground::of(place);
    let (one, other) = (ground.open().await, ground.open().await);
    fill_all(&one, 0, 4).await;
    fill_all(&other, 4, 8).await;
    fill_all(&one, 8, 12).await;
    sealed(&one, before(20, 6)).await;
    sealed(&one, SealLimits::default()).await;
    fill_all(&other, 12, 16).await;
    fill_all(&one, 16, 18).await;
    assert_eq!(seen(&one).await, seen(&other).await);
    let report = verify(&other, &mut Rows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}

support::suite! {
    nothing_changes_for_any_reader
    streams_and_chains_go_on_after_all_was_sealed
    a_file_that_is_not_as_it_was_sealed_is_named
    readers_miss_nothing_while_files_are_sealed
    a_backup_has_all_that_is_sealed
    a_copy_has_all_events_and_compares_those_in_files
    others_find_the_folder_that_was_named
    rows_are_read_beside_archives
    @sqlite
    @postgres
    who_writes_beside_the_process_that_seals_goes_on
}
