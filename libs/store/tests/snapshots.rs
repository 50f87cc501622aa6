//! Snapshots of consumers' folds, on either database: what is written, what is refused, and when a stored
//! snapshot is not returned.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use contract::ids::{Bucket, Position};
use contract::log::{Record, RowChange};
use store::{
    Commit, CommitError, Committed, Fence, IdempotencyKey, PartHash, Projector, Snapshot,
    SnapshotChange, SnapshotMeta, Store, backup, copy, heads, log_hash, part_hash, rebuild,
    snapshot_hash, verify,
};
use support::database::*;
use tracing_subscriber::fmt::MakeWriter;

const CONSUMER: &str = "autoscaler";
const VERSION: u32 = 3;

/// Changes of parts by key; None deletes the part.
type Changes<'a> = &'a [(&'a str, Option<&'a str>)];

fn bucket() -> Bucket {
    endpoint("iris").bucket()
}

/// A consumer's snapshot, which makes commits of its changes.
#[derive(Clone)]
struct Fold {
    at: Snapshot,
    stored: Option<Position>,
}

impl Fold {
    /// Creates an empty fold at the current head of the bucket.
    async fn of(store: &Store) -> Self {
        let heads = heads(store).await.unwrap();
        let head = heads.iter().find(|head| head.bucket == bucket()).unwrap();
        Self {
            at: Snapshot {
                meta: SnapshotMeta {
                    consumer: CONSUMER.to_owned(),
                    bucket: bucket(),
                    version: VERSION,
                    position: head.position,
                    event_hash: Some(head.hash),
                },
                parts: BTreeMap::new(),
            },
            stored: None,
        }
    }

    async fn advanced(self, store: &Store) -> Self {
        let at = Snapshot {
            parts: self.at.parts,
            ..Self::of(store).await.at
        };
        Self { at, ..self }
    }

    fn change(&mut self, changes: Changes<'_>) -> Commit {
        let mut parts = BTreeMap::new();
        for (key, doc) in changes {
            let doc = doc.map(str::to_owned);
            parts.insert((*key).to_owned(), doc.clone());
            match doc {
                Some(doc) => self.at.parts.insert((*key).to_owned(), doc),
                None => self.at.parts.remove(*key),
            };
        }
        let base = self.stored.replace(self.at.meta.position);
        self.commit(base, parts)
    }

    fn replacement(&mut self, parts: Changes<'_>) -> Commit {
        self.at.parts.clear();
        self.stored = None;
        self.change(parts)
    }

    fn commit(&self, base: Option<Position>, parts: BTreeMap<String, Option<String>>) -> Commit {
        let hashes = self.at.parts.iter();
        let hashes = hashes.map(|(key, doc)| (key.as_str(), part_hash(key, doc)));
        let hashes: Vec<(&str, PartHash)> = hashes.collect();
        let hashes = hashes.iter().map(|(key, hash)| (*key, hash));
        let change = SnapshotChange {
            meta: self.at.meta.clone(),
            base,
            parts,
            hash: snapshot_hash(&self.at.meta, hashes),
        };
        Commit {
            snapshot: Some(change),
            ..Commit::default()
        }
    }
}

async fn stored(store: &Store) -> Option<Snapshot> {
    store.snapshot(CONSUMER, bucket(), VERSION).await.unwrap()
}

/// Returns the stored snapshot and what is logged about it.
async fn stored_and_logged(store: &Store) -> (Option<Snapshot>, String) {
    let lines = LogCapture::default();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(lines.clone())
        .finish();
    let guard = tracing::subscriber::set_default(subscriber);
    let returned = stored(store).await;
    drop(guard);
    let logged = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    (returned, logged)
}

async fn assert_warns(store: &Store, sentence: &str) {
    let (returned, logged) = stored_and_logged(store).await;
    assert_eq!(returned, None, "{sentence}");
    assert!(
        logged.contains("WARN") && logged.contains(sentence),
        "{logged}"
    );
}

#[derive(Clone, Default)]
struct LogCapture(Arc<Mutex<Vec<u8>>>);

impl io::Write for LogCapture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogCapture {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Creates a log with two buckets, and a snapshot of three parts at its end.
async fn store_with_snapshot(db: &TestDatabase) -> (Store, Fold) {
    let store = db.open().await;
    fill(&store, "rose", 2).await;
    fill(&store, "iris", 3).await;
    let mut fold = Fold::of(&store).await;
    let parts = [("", Some("[]")), ("a/x", Some("1")), ("a/y", Some("{}"))];
    store.commit(fold.replacement(&parts)).await.unwrap();
    (store, fold)
}

async fn a_snapshot_is_returned_with_its_changes_applied(db: TestDatabase) {
    let (store, fold) = store_with_snapshot(&db).await;
    assert_eq!(stored(&store).await.as_ref(), Some(&fold.at));
    // Later events do not invalidate it.
    fill(&store, "tulip", 1).await;
    records(&store, commit_to(stream("iris"), 3, 2)).await;
    assert_eq!(stored(&store).await.as_ref(), Some(&fold.at));
    let mut fold = fold.advanced(&store).await;
    let changes = [("a/x", None), ("a/y", Some("\"é\"")), ("a/z", Some("3"))];
    let change = fold.change(&changes);
    assert!(records(&store, change).await.is_empty());
    assert_eq!(fold.at.parts.len(), 3);
    assert_eq!(stored(&store).await.as_ref(), Some(&fold.at));
    // A change of the position only, by a process that has written no snapshot before.
    store.close().await;
    let store = db.open().await;
    records(&store, commit_to(stream("iris"), 5, 1)).await;
    let mut fold = fold.advanced(&store).await;
    store.commit(fold.change(&[])).await.unwrap();
    assert_eq!(stored(&store).await.as_ref(), Some(&fold.at));
    // A complete replacement at the same position.
    let replacement = fold.replacement(&[("a/x", Some("7"))]);
    store.commit(replacement).await.unwrap();
    assert_eq!(stored(&store).await, Some(fold.at));
    // Other buckets, consumers and versions have none.
    for (consumer, bucket) in [("node/1", bucket()), (CONSUMER, Bucket::GLOBAL)] {
        let others = store.snapshot(consumer, bucket, VERSION).await.unwrap();
        assert_eq!(others, None);
    }
}

async fn a_snapshot_of_many_parts_is_written_and_replaced_completely(db: TestDatabase) {
    let (store, mut fold) = store_with_snapshot(&db).await;
    let keys: Vec<String> = (0..2_345).map(|n| format!("many/{n}")).collect();
    let doc = "x".repeat(700);
    let parts = keys.iter().map(|key| (key.as_str(), Some(doc.as_str())));
    let replacement = fold.replacement(&parts.collect::<Vec<_>>());
    store.commit(replacement).await.unwrap();
    assert_eq!(fold.at.parts.len(), 2_345);
    assert_eq!(stored(&store).await.as_ref(), Some(&fold.at));
    let deletions = keys.iter().skip(100).map(|key| (key.as_str(), None));
    let change = fold.change(&deletions.collect::<Vec<_>>());
    store.commit(change).await.unwrap();
    assert_eq!(fold.at.parts.len(), 100);
    assert_eq!(stored(&store).await.as_ref(), Some(&fold.at));
}

async fn each_bucket_and_consumer_has_a_snapshot_of_its_own(db: TestDatabase) {
    let (store, fold) = store_with_snapshot(&db).await;
    let another = |consumer: &str, bucket: Bucket| {
        let mut fold = fold.clone();
        fold.at.meta.consumer = consumer.to_owned();
        fold.at.meta.bucket = bucket;
        fold.at.meta.event_hash = fold.at.meta.event_hash.filter(|_| bucket == self::bucket());
        let commit = fold.replacement(&[("a/x", Some("2"))]);
        (fold.at, commit)
    };
    let empty = Bucket::all().find(|b| ![bucket(), endpoint("rose").bucket()].contains(b));
    for (consumer, bucket) in [("node/1", bucket()), (CONSUMER, empty.unwrap())] {
        let (made, commit) = another(consumer, bucket);
        store.commit(commit).await.unwrap();
        let returned = store.snapshot(consumer, bucket, VERSION).await.unwrap();
        assert_eq!(returned, Some(made));
    }
    assert_eq!(stored(&store).await, Some(fold.at));
}

async fn a_snapshot_never_goes_back(db: TestDatabase) {
    let (store, fold) = store_with_snapshot(&db).await;
    let now = fold.at.meta.position;
    let mut late = fold.clone();
    late.at.meta.position = Position(now.0 - 1);
    let replacement = late.clone().replacement(&[("a/x", Some("0"))]);
    let change = late.change(&[("a/x", Some("0"))]);
    for commit in [replacement, change] {
        let mut commit = commit;
        commit.appends.push(append(stream("iris"), 3, 1));
        let refused = store.commit(commit).await.unwrap_err();
        assert!(
            matches!(
                &refused,
                CommitError::SnapshotBehind { consumer, bucket: of, stored, ours }
                    if consumer == CONSUMER && *of == bucket() && *stored == now && ours.0 == now.0 - 1
            ),
            "{refused}"
        );
        let sentence = refused.to_string();
        assert!(
            sentence.contains("is at 5, ahead of ours at 4"),
            "{sentence}"
        );
    }
    assert_eq!(store.head().await.unwrap(), now);
    assert_eq!(stored(&store).await, Some(fold.at));
}

async fn a_change_based_on_another_snapshot_than_the_stored_one_is_refused(db: TestDatabase) {
    let (store, fold) = store_with_snapshot(&db).await;
    let moved = |refused: CommitError| match refused {
        CommitError::SnapshotMoved {
            expected, actual, ..
        } => (expected.unwrap().0, actual.map(|at| at.0)),
        other => panic!("{other}"),
    };
    records(&store, commit_to(stream("iris"), 3, 1)).await;
    let mut other = fold.clone().advanced(&store).await;
    other.stored = Some(Position(4));
    let refused = store.commit(other.change(&[("a/x", Some("2"))])).await;
    let refused = refused.unwrap_err();
    let sentence = refused.to_string();
    assert!(sentence.contains("is at 5, not 4"), "{sentence}");
    assert_eq!(moved(refused), (4, Some(5)));
    // There is no snapshot of this consumer, nor of this version.
    let mut consumers = fold.clone();
    consumers.at.meta.consumer = "node/1".to_owned();
    let mut versions = fold.clone();
    versions.at.meta.version = VERSION + 1;
    for mut fold in [consumers, versions] {
        let refused = store.commit(fold.change(&[("a/x", Some("2"))])).await;
        assert_eq!(moved(refused.unwrap_err()), (5, None));
    }
    assert_eq!(stored(&store).await, Some(fold.at));
}

async fn a_snapshot_of_another_version_is_not_returned_and_may_be_replaced_at_any_position(
    db: TestDatabase,
) {
    let (store, fold) = store_with_snapshot(&db).await;
    let mut newer = fold;
    newer.at.meta.version = VERSION + 1;
    newer.at.meta.position = Position(1);
    newer.at.meta.event_hash = None;
    let replacement = newer.replacement(&[("a/new", Some("1"))]);
    store.commit(replacement).await.unwrap();
    let returned = store.snapshot(CONSUMER, bucket(), VERSION + 1).await;
    assert_eq!(returned.unwrap(), Some(newer.at));
    let (returned, logged) = stored_and_logged(&store).await;
    assert_eq!(returned, None);
    assert!(
        logged.contains("INFO") && logged.contains("another version"),
        "{logged}"
    );
}

async fn a_snapshot_that_was_modified_in_any_way_is_not_returned(db: TestDatabase) {
    let (store, mut fold) = store_with_snapshot(&db).await;
    for damage in [
        "UPDATE snapshot_parts SET doc = '2' WHERE key = 'a/x'",
        "UPDATE snapshot_parts SET key = 'a/w' WHERE key = 'a/x'",
        "DELETE FROM snapshot_parts WHERE key = ''",
        "INSERT INTO snapshot_parts SELECT consumer, bucket, 'a/z', doc FROM snapshot_parts \
         WHERE key = 'a/x'",
        "UPDATE snapshots SET position = position - 1",
        "UPDATE snapshots SET event_hash = NULL",
        "UPDATE snapshots SET hash = 'none'",
    ] {
        assert_eq!(
            stored_and_logged(&store).await,
            (Some(fold.at.clone()), String::new())
        );
        db.execute_directly(damage).await;
        assert_warns(&store, "its hash does not match its parts").await;
        // The damaged snapshot can be replaced.
        let parts = [("", Some("[]")), ("a/x", Some("1")), ("a/y", Some("{}"))];
        store.commit(fold.replacement(&parts)).await.unwrap();
    }
}

async fn a_part_that_is_not_valid_text_is_damage_and_not_a_failure(db: TestDatabase) {
    let (store, _) = store_with_snapshot(&db).await;
    db.execute_directly("UPDATE snapshot_parts SET doc = CAST(x'ff' AS TEXT) WHERE key = 'a/x'")
        .await;
    assert_warns(&store, "it is damaged").await;
}

async fn a_snapshot_of_another_log_is_not_returned(db: TestDatabase) {
    let (store, fold) = store_with_snapshot(&db).await;
    for change in ["service:tess", "service:test"] {
        let is_same = change == "service:test";
        let sql = match is_same {
            true => "UPDATE events SET actor = 'service:test' WHERE position = 5",
            false => "UPDATE events SET actor = 'service:tess' WHERE position = 5",
        };
        db.execute_directly(sql).await;
        match is_same {
            true => assert_eq!(stored(&store).await.as_ref(), Some(&fold.at)),
            false => assert_warns(&store, "a different last event of the bucket up to 5").await,
        }
    }
    // The bucket is empty, and the log is longer than the snapshot's position.
    fill(&store, "tulip", 1).await;
    db.execute_directly("DELETE FROM events WHERE position BETWEEN 3 AND 5")
        .await;
    assert_warns(&store, "a different last event of the bucket up to 5").await;
}

async fn a_snapshot_past_the_end_of_the_log_is_not_returned_and_may_be_replaced(db: TestDatabase) {
    let (store, mut fold) = store_with_snapshot(&db).await;
    let at_the_end = fold.clone();
    fill(&store, "tulip", 1).await;
    // The bucket has no more events.
    fold.at.meta.position = Position(6);
    store.commit(fold.change(&[])).await.unwrap();
    assert_eq!(stored(&store).await.as_ref(), Some(&fold.at));
    store.close().await;
    // The bucket is unchanged, but its next event would get the position that the snapshot claims to cover.
    db.execute_directly("DELETE FROM events WHERE position = 6")
        .await;
    let store = db.open().await;
    assert_warns(&store, "it is at 6, but this log ends at 5").await;
    let refused = store.commit(fold.change(&[])).await.unwrap_err();
    assert!(
        matches!(refused, CommitError::SnapshotMoved { actual: None, .. }),
        "{refused}"
    );
    let mut fold = at_the_end;
    let replacement = fold.replacement(&[("a/x", Some("1"))]);
    store.commit(replacement).await.unwrap();
    assert_eq!(stored(&store).await, Some(fold.at));
}

async fn changes_of_one_snapshot_in_one_batch_see_each_other(db: TestDatabase) {
    let (store, mut fold) = store_with_snapshot(&db).await;
    // While this is written, the others wait, and then share a transaction.
    let long = store.commit(commit_to(stream("rose"), 2, 3_000));
    let mut stale = fold.clone();
    stale.stored = Some(Position(4));
    let stale = stale.change(&[("a/x", Some("stale"))]);
    let one = fold.change(&[("a/x", None), ("a/y", Some("2"))]);
    let two = fold.change(&[("a/x", Some("3")), ("", None)]);
    let mut newer = fold.clone();
    newer.at.meta.version += 1;
    let (mut lost, mut won) = (newer.clone(), newer);
    let replaced = lost.replacement(&[("a/lost", Some("1"))]);
    let replacing = won.replacement(&[("a/x", Some("4")), ("a/y", Some("4"))]);
    let last = won.change(&[("a/x", None), ("a/z", Some("5"))]);
    let late = fold.change(&[("a/y", Some("late"))]);
    let commits = [stale, one, two, replaced, replacing, last, late];
    let [stale, one, two, replaced, replacing, last, late] = commits.map(|c| store.commit(c));
    let (long, stale, one, two, replaced, replacing, last, late) =
        tokio::join!(long, stale, one, two, replaced, replacing, last, late);
    for written in [long, one, two, replaced, replacing, last] {
        written.unwrap();
    }
    for (refused, at) in [(stale, Some(Position(5))), (late, None)] {
        let refused = refused.unwrap_err();
        assert!(
            matches!(refused, CommitError::SnapshotMoved { actual, .. } if actual == at),
            "{refused}"
        );
    }
    let returned = store.snapshot(CONSUMER, bucket(), VERSION + 1).await;
    assert_eq!(returned.unwrap(), Some(won.at));
}

async fn a_fenced_owner_writes_no_snapshot(db: TestDatabase) {
    let (store, mut fold) = store_with_snapshot(&db).await;
    let before = fold.at.clone();
    let old = store.acquire_fence("autoscaler/17").await.unwrap();
    let new = store.acquire_fence("autoscaler/17").await.unwrap();
    let with = |fence: &Fence, commit: Commit| Commit {
        fence: Some(fence.clone()),
        ..commit
    };
    let change = fold.change(&[("a/x", Some("2"))]);
    let refused = store.commit(with(&old, change.clone())).await.unwrap_err();
    assert!(matches!(refused, CommitError::Fenced { .. }), "{refused}");
    assert_eq!(stored(&store).await, Some(before));
    store.commit(with(&new, change)).await.unwrap();
    assert_eq!(stored(&store).await, Some(fold.at));
}

async fn the_snapshot_of_a_refused_or_repeated_commit_is_not_written(db: TestDatabase) {
    let (store, mut fold) = store_with_snapshot(&db).await;
    let before = fold.clone();
    let refused = Commit {
        appends: vec![append(stream("iris"), 9, 1)],
        ..before.clone().change(&[("a/x", Some("refused"))])
    };
    assert!(store.commit(refused).await.is_err());
    let with_idempotency_key = |commit: Commit| Commit {
        idempotency_key: Some(IdempotencyKey {
            key: "autoscaler:1".to_owned(),
            body_hash: String::new(),
            result: None,
        }),
        ..commit
    };
    let change = with_idempotency_key(fold.change(&[("a/x", Some("2"))]));
    store.commit(change).await.unwrap();
    let repeat = with_idempotency_key(before.clone().change(&[("a/x", Some("repeat"))]));
    let repeat = store.commit(repeat).await.unwrap();
    assert!(matches!(repeat, Committed::Duplicate { .. }), "{repeat:?}");
    assert_eq!(stored(&store).await, Some(fold.at));
}

async fn a_snapshot_that_is_being_replaced_is_never_read_partially(db: TestDatabase) {
    let (store, fold) = store_with_snapshot(&db).await;
    let keys: Vec<String> = (0..300).map(|n| format!("many/{n}")).collect();
    let enough = Arc::new(AtomicBool::new(false));
    let writing = {
        let (store, mut fold, enough) = (store.clone(), fold.clone(), enough.clone());
        tokio::spawn(async move {
            for round in (0..40).cycle() {
                if enough.load(Ordering::Relaxed) {
                    return;
                }
                let doc = round.to_string();
                let parts = keys.iter().skip(round * 5);
                let parts: Vec<_> = parts.map(|key| (key.as_str(), Some(&*doc))).collect();
                store.commit(fold.replacement(&parts)).await.unwrap();
            }
        })
    };
    let mut seen = BTreeSet::new();
    while seen.len() < 10 && !writing.is_finished() {
        let (returned, logged) = stored_and_logged(&store).await;
        let returned = returned.unwrap_or_else(|| panic!("{logged}"));
        seen.insert(returned.parts.len());
    }
    enough.store(true, Ordering::Relaxed);
    writing.await.unwrap();
}

/// Produces no rows.
struct NoRows;

impl Projector for NoRows {
    fn project(&mut self, _: &Record) -> Vec<RowChange> {
        Vec::new()
    }
}

async fn verify_hash_and_rebuild_ignore_snapshots(db: TestDatabase) {
    let (store, fold) = store_with_snapshot(&db).await;
    let hash = log_hash(&store, Position(5)).await.unwrap();
    rebuild(&store, &mut NoRows, &["counts"]).await.unwrap();
    assert_eq!(stored(&store).await, Some(fold.at));
    db.execute_directly("UPDATE snapshot_parts SET doc = '?'")
        .await;
    rebuild(&store, &mut NoRows, &["counts"]).await.unwrap();
    assert_warns(&store, "damaged").await;
    let report = verify(&store, &mut NoRows, &["counts"]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(log_hash(&store, Position(5)).await.unwrap(), hash);
}

async fn a_copy_has_no_snapshots_but_a_copied_file_does(db: TestDatabase) {
    let (store, fold) = store_with_snapshot(&db).await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let open = async |name: &str| {
        let url = format!("sqlite:{}", at(name).display());
        Store::open(&url).await.unwrap()
    };
    let target = open("copy.db").await;
    copy(&store, &target, |_, _| {}).await.unwrap();
    assert_eq!(stored(&target).await, None);
    backup(&store, &at("backup.db"), |_, _| {}).await.unwrap();
    let expected = match db {
        TestDatabase::Sqlite(_) => Some(fold.at),
        TestDatabase::Postgres(_) => None,
    };
    assert_eq!(stored(&open("backup.db").await).await, expected);
}

async fn a_store_from_before_snapshots_gets_their_tables(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    store.close().await;
    for sql in [
        "DROP TABLE snapshots",
        "DROP TABLE snapshot_parts",
        "DELETE FROM _sqlx_migrations WHERE version = 5",
    ] {
        db.execute_directly(sql).await;
    }
    let found = store::inspect(&db.url()).await.unwrap();
    assert_eq!(found.pending, ["0005_snapshots"]);
    let store = db.open().await;
    assert_eq!(store.head().await.unwrap(), Position(3));
    let mut fold = Fold::of(&store).await;
    store
        .commit(fold.replacement(&[("", Some("1"))]))
        .await
        .unwrap();
    assert_eq!(stored(&store).await, Some(fold.at));
}

async fn processes_see_each_others_snapshots(db: TestDatabase) {
    let (one, fold) = store_with_snapshot(&db).await;
    let other = db.open().await;
    records(&one, commit_to(stream("iris"), 3, 1)).await;
    let (mut ours, mut theirs) = (fold.clone(), fold.advanced(&other).await);
    other
        .commit(theirs.change(&[("a/x", Some("2"))]))
        .await
        .unwrap();
    let refused = one.commit(ours.change(&[("a/x", Some("3"))])).await;
    let refused = refused.unwrap_err();
    assert!(
        matches!(refused, CommitError::SnapshotMoved { actual: Some(at), .. } if at.0 == 6),
        "{refused}"
    );
    let replacement = ours.replacement(&[("a/x", Some("3"))]);
    let refused = one.commit(replacement).await.unwrap_err();
    assert!(
        matches!(refused, CommitError::SnapshotBehind { stored, .. } if stored.0 == 6),
        "{refused}"
    );
    assert_eq!(stored(&one).await, Some(theirs.at));
}

/// A store in which a page with parts of a snapshot is damaged, and the fold of the snapshot.
async fn store_with_damaged_parts(db: &TestDatabase) -> (Store, Fold) {
    let store = db.open().await;
    fill(&store, "iris", 1).await;
    let mut fold = Fold::of(&store).await;
    let doc = |n: usize| format!("\"{}{n}\"", "x".repeat(400));
    let parts: Vec<(String, String)> = (10..90).map(|n| (format!("part-{n}"), doc(n))).collect();
    let parts = parts
        .iter()
        .map(|(key, doc)| (key.as_str(), Some(doc.as_str())));
    let parts: Vec<_> = parts.collect();
    store.commit(fold.replacement(&parts)).await.unwrap();
    store.close().await;
    let TestDatabase::Sqlite(folder) = db else {
        panic!("only files have pages to damage");
    };
    const PAGE: usize = 4096;
    let file = folder.path().join("log.db");
    let mut bytes = std::fs::read(&file).unwrap();
    let text = doc(50).into_bytes();
    let at = bytes.windows(text.len()).position(|bytes| *bytes == *text);
    let page = at.unwrap() / PAGE * PAGE;
    bytes[page..page + PAGE].fill(0);
    std::fs::write(&file, bytes).unwrap();
    (db.open().await, fold)
}

async fn damaged_snapshots_fail_no_events_and_are_replaced(db: TestDatabase) {
    let (store, mut fold) = store_with_damaged_parts(&db).await;
    let problems = verify(&store, &mut NoRows, &[]).await.unwrap().problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    for part in ["`snapshot_parts`", "The log is intact", "store rebuild"] {
        assert!(problems[0].contains(part), "{part}: {problems:?}");
    }
    // In one batch.
    let (events, replaced) = tokio::join!(
        store.commit(commit_to(stream("rose"), 0, 1)),
        store.commit(fold.replacement(&[("a", Some("1"))])),
    );
    events.unwrap();
    replaced.unwrap();
    assert_eq!(stored(&store).await, Some(fold.at));
    let problems = verify(&store, &mut NoRows, &[]).await.unwrap().problems;
    assert_eq!(problems, Vec::<String>::new());
}

async fn a_change_of_a_damaged_snapshot_is_refused_alone(db: TestDatabase) {
    let (store, mut fold) = store_with_damaged_parts(&db).await;
    let (events, changed) = tokio::join!(
        store.commit(commit_to(stream("rose"), 0, 1)),
        store.commit(fold.change(&[("part-50", None)])),
    );
    events.unwrap();
    let refused = changed.unwrap_err();
    assert!(
        matches!(refused, CommitError::SnapshotMoved { actual: None, .. }),
        "{refused}"
    );
}

async fn a_store_with_damaged_snapshots_can_be_backed_up(db: TestDatabase) {
    let (store, _) = store_with_damaged_parts(&db).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("backup.db");
    let hash = backup(&store, &file, |_, _| {}).await.unwrap();
    assert_eq!(hash.head, Position(1));
}

support::suite! {
    a_snapshot_is_returned_with_its_changes_applied
    a_snapshot_of_many_parts_is_written_and_replaced_completely
    each_bucket_and_consumer_has_a_snapshot_of_its_own
    a_snapshot_never_goes_back
    a_change_based_on_another_snapshot_than_the_stored_one_is_refused
    a_snapshot_of_another_version_is_not_returned_and_may_be_replaced_at_any_position
    a_snapshot_that_was_modified_in_any_way_is_not_returned
    a_snapshot_of_another_log_is_not_returned
    a_snapshot_past_the_end_of_the_log_is_not_returned_and_may_be_replaced
    changes_of_one_snapshot_in_one_batch_see_each_other
    a_fenced_owner_writes_no_snapshot
    the_snapshot_of_a_refused_or_repeated_commit_is_not_written
    a_snapshot_that_is_being_replaced_is_never_read_partially
    verify_hash_and_rebuild_ignore_snapshots
    a_copy_has_no_snapshots_but_a_copied_file_does
    a_store_from_before_snapshots_gets_their_tables
    @sqlite
    a_part_that_is_not_valid_text_is_damage_and_not_a_failure
    damaged_snapshots_fail_no_events_and_are_replaced
    a_change_of_a_damaged_snapshot_is_refused_alone
    a_store_with_damaged_snapshots_can_be_backed_up
    @postgres processes_see_each_others_snapshots
}
