//! Archives: the beginning of the log in files, on either database. Whatever was sealed, every read returns
//! what it did before, or an error that names the problem.

#![allow(clippy::unwrap_used)]

mod support;

use std::error::Error;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, io};

use contract::ids::Position;
use contract::time::Timestamp;
use store::{
    Archive, RowQuery, SealLimits, Store, StoreError, append_raw, backup, copy, rebuild, seal,
    verify,
};
use support::archives::*;
use support::database::*;

async fn archiving_changes_nothing_for_any_reader(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    let before_sealing = read_everything(&store).await;
    for (limit, files) in [(4, 1), (11, 2), (1_000, 1)] {
        let file_max = if limit == 11 { 4 } else { 1_000 };
        let done = sealed(&store, before(limit, file_max)).await;
        assert_eq!(done.len(), files, "{limit}");
        assert_eq!(read_everything(&store).await, before_sealing);
    }
    store.close().await;
    let again = fixture.open().await;
    assert_eq!(read_everything(&again).await, before_sealing);
    rebuild(&again, &mut EventRows, &[MODEL]).await.unwrap();
    let report = verify(&again, &mut EventRows, &[MODEL]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.events as usize, before_sealing.raw.len());
}

async fn streams_and_chains_continue_after_everything_was_sealed(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 8).await;
    sealed(&store, SealLimits::default()).await;
    assert!(store.commit(commit_to(stream("iris"), 0, 1)).await.is_err());
    fill_all(&store, 8, 16).await;
    let done = sealed(&store, before(30, 5)).await;
    assert!(!done.is_empty());
    store.close().await;
    let store = fixture.open().await;
    fill_all(&store, 16, 20).await;
    let report = verify(&store, &mut EventRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.head, store.head().await.unwrap());
}

/// Returns the errors of a read and of `verify`.
async fn read_errors(store: &Store) -> [String; 2] {
    let read = store.read_raw(Position::START, 100).await;
    let verified = verify(store, &mut EventRows, &[]).await;
    [read.unwrap_err(), verified.unwrap_err()].map(|error| {
        assert!(
            matches!(error, StoreError::ArchiveUnavailable(_)),
            "{error:?}"
        );
        error.to_string()
    })
}

async fn a_modified_file_is_an_error_that_names_it(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    let head = store.head().await.unwrap();
    let done = sealed(&store, before(head.0, 10)).await;
    let Archive {
        file, first, last, ..
    } = &done[1].archive;
    let path = fixture.archives().join(file);
    let original = fs::read(&path).unwrap();
    let changed = |at: usize| {
        let mut bytes = original.clone();
        bytes[at] ^= 1;
        Some(bytes)
    };
    // A byte that decompression ignores, in the gzip header of an event block.
    let heads = original.windows(3).enumerate();
    let mut heads = heads.filter(|(_, bytes)| *bytes == [0x1f, 0x8b, 8]);
    let in_head = heads.nth(1).unwrap().0 + 9;
    let cases = [
        None,
        changed(in_head),
        Some(original[..original.len() - 9].to_vec()),
        changed(original.len() / 4),
        changed(original.len() - 20),
        changed(original.len() - 60),
    ];
    for (index, bytes) in cases.into_iter().enumerate() {
        fs::remove_file(&path).unwrap_or_default();
        if let Some(bytes) = bytes {
            fs::write(&path, bytes).unwrap();
        }
        store.close().await;
        let store = fixture.open().await;
        for message in read_errors(&store).await {
            assert!(
                message.contains(&path.display().to_string()),
                "{index}: {message}"
            );
            let range = format!("from position {first} to {last}");
            assert!(
                message.contains(&range) && message.contains("Restore it"),
                "{message}"
            );
        }
        // Events in other files and in the table can be read.
        let above = store.read_raw(*last, 100).await.unwrap();
        assert_eq!(above.last().map(|event| event.position), Some(head));
        store.close().await;
    }
    fs::write(&path, &original).unwrap();
    let report = verify(&fixture.open().await, &mut EventRows, &[])
        .await
        .unwrap();
    assert!(report.is_sound());
}

async fn the_error_of_a_missing_file_keeps_its_source(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 2).await;
    sealed(&store, SealLimits::default()).await;
    fs::remove_dir_all(fixture.archives()).unwrap();
    store.close().await;
    let store = fixture.open().await;
    let error = store.read_raw(Position::START, 100).await.unwrap_err();
    let mut sources = std::iter::successors(error.source(), |&error| error.source());
    let io = sources.find_map(|source| source.downcast_ref::<io::Error>());
    assert_eq!(io.unwrap().kind(), io::ErrorKind::NotFound);
}

async fn readers_miss_no_event_while_files_are_sealed(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 40).await;
    // Another process, if the database allows one.
    let reader = match fixture.db {
        TestDatabase::Sqlite(_) => store.clone(),
        TestDatabase::Postgres(_) => fixture.open().await,
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

async fn a_backup_contains_all_archives(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    sealed(&store, before(20, 6)).await;
    let original = read_everything(&store).await;
    let target = tempfile::tempdir().unwrap();
    for name in ["monday.db", "tuesday.db"] {
        let path = target.path().join(name);
        let hash = backup(&store, &path, |_, _| {}).await.unwrap();
        assert_eq!(hash, original.log);
    }
    // With PostgreSQL the files of the backup have the entire log.
    let archives = match fixture.db {
        TestDatabase::Sqlite(_) => fs::read_dir(fixture.archives()).unwrap().collect(),
        TestDatabase::Postgres(_) => Vec::new(),
    };
    for entry in archives {
        let entry = entry.unwrap();
        let copied = target.path().join("archive").join(entry.file_name());
        let copied = fs::metadata(copied).unwrap();
        assert_ne!(copied.ino(), entry.metadata().unwrap().ino());
    }
    fs::remove_dir_all(fixture.archives()).unwrap();
    for name in ["monday.db", "tuesday.db"] {
        let url = format!("sqlite:{}", target.path().join(name).display());
        let copied = Store::open(&url).await.unwrap();
        assert_eq!(read_everything(&copied).await, original);
        copied.close().await;
    }
}

async fn a_copy_contains_all_events_and_compares_archived_ones(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 12).await;
    sealed(&store, before(20, 6)).await;
    let original = read_everything(&store).await;
    let target = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", target.path().join("copy.db").display());
    let into = Store::open(&url).await.unwrap();
    let mut last = (0, 0);
    let hash = copy(&store, &into, |done, of| last = (done, of)).await;
    assert_eq!(hash.unwrap(), original.log);
    assert_eq!(last, (original.log.events, original.log.events));
    assert_eq!(read_everything(&into).await, original);
    // Again, onto events that are archived in the target.
    copy(&into, &store, |_, _| {}).await.unwrap();
    assert_eq!(read_everything(&store).await.raw, original.raw);
    let mut changed = original.raw[3].clone();
    changed.data.push(' ');
    let refused = append_raw(&store, vec![changed]).await.unwrap_err();
    let message = refused.to_string();
    assert!(message.contains("position 4 differs"), "{message}");
}

async fn other_processes_find_the_configured_folder(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 6).await;
    let original = read_everything(&store).await;
    sealed(&store, SealLimits::default()).await;
    store.close().await;
    let store = Store::open(&fixture.db.url()).await.unwrap();
    assert_eq!(read_everything(&store).await, original);
}

async fn rows_are_rebuilt_from_archives(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let store = fixture.open().await;
    fill_all(&store, 0, 6).await;
    rebuild(&store, &mut EventRows, &[MODEL]).await.unwrap();
    sealed(&store, SealLimits::default()).await;
    let query = RowQuery {
        model: MODEL.to_owned(),
        limit: 100,
        ..RowQuery::default()
    };
    let rows = store.rows(query.clone()).await.unwrap();
    assert_eq!(rebuild(&store, &mut EventRows, &[MODEL]).await.unwrap(), 0);
    assert_eq!(store.rows(query).await.unwrap(), rows);
}

async fn other_processes_keep_writing_while_one_seals(db: TestDatabase) {
    let fixture = ArchiveFixture::new(db);
    let (one, other) = (fixture.open().await, fixture.open().await);
    fill_all(&one, 0, 4).await;
    fill_all(&other, 4, 8).await;
    fill_all(&one, 8, 12).await;
    sealed(&one, before(20, 6)).await;
    sealed(&one, SealLimits::default()).await;
    fill_all(&other, 12, 16).await;
    fill_all(&one, 16, 18).await;
    assert_eq!(read_everything(&one).await, read_everything(&other).await);
    let report = verify(&other, &mut EventRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}

support::suite! {
    archiving_changes_nothing_for_any_reader
    streams_and_chains_continue_after_everything_was_sealed
    a_modified_file_is_an_error_that_names_it
    the_error_of_a_missing_file_keeps_its_source
    readers_miss_no_event_while_files_are_sealed
    a_backup_contains_all_archives
    a_copy_contains_all_events_and_compares_archived_ones
    other_processes_find_the_configured_folder
    rows_are_rebuilt_from_archives
    @sqlite
    @postgres
    other_processes_keep_writing_while_one_seals
}
