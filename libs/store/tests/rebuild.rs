//! Rebuilds of read models, whatever rows exist before, on either database.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use contract::ids::Position;
use contract::log::{Record, RowChange};
use store::{Commit, CursorMove, Projector, Store, StoreError, Unreadable, rebuild, verify};
use support::database::{TestDatabase, commit_to, fill, records, stream};
use tokio::runtime::Handle;

const MODELS: [&str; 2] = ["counts", "happened"];

/// Enough rows for more than one transaction of a rebuild.
const MANY: u64 = 20_000;

/// Projects two models: the number of events per endpoint, and a row per event that never changes.
#[derive(Default)]
struct CountsAndEvents {
    counts: BTreeMap<String, u64>,
    /// Called before each record with the number of records so far.
    before: Option<Box<dyn FnMut(u64) + Send>>,
    projected: u64,
    unreadable: Vec<Position>,
}

impl CountsAndEvents {
    fn with_hook(before: impl FnMut(u64) + Send + 'static) -> Self {
        Self {
            before: Some(Box::new(before)),
            ..Self::default()
        }
    }
}

impl Projector for CountsAndEvents {
    fn project(&mut self, record: &Record) -> Vec<RowChange> {
        if let Some(before) = &mut self.before {
            before(self.projected);
        }
        self.projected += 1;
        let endpoint = record.endpoint().unwrap().to_string();
        let count = self.counts.entry(endpoint.clone()).or_default();
        *count += 1;
        let row = |model, key: &str, doc: String| RowChange {
            model,
            key: key.to_owned(),
            endpoint: endpoint.clone(),
            deployment: String::new(),
            position: record.position,
            time: record.time,
            doc: Some(doc),
        };
        vec![
            row("counts", &endpoint, count.to_string()),
            row("happened", &record.id.to_string(), "{}".to_owned()),
        ]
    }

    fn skip_unreadable(&mut self, unreadable: &Unreadable) {
        self.unreadable.push(unreadable.position);
    }

    fn is_written_once(&self, model: &str) -> bool {
        model == "happened"
    }
}

async fn rebuild_all(store: &Store) -> usize {
    rebuild(store, &mut CountsAndEvents::default(), &MODELS)
        .await
        .unwrap()
}

async fn assert_sound(store: &Store) {
    let report = verify(store, &mut CountsAndEvents::default(), &MODELS)
        .await
        .unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}

fn reached(bucket_of: &Record) -> Commit {
    Commit {
        cursor: Some(CursorMove {
            consumer: "views",
            bucket: bucket_of.bucket,
            from: Position::START,
            to: bucket_of.position,
        }),
        ..Commit::default()
    }
}

async fn rows_are_created_from_scratch_only_once(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 2).await;
    assert_eq!(rebuild_all(&store).await, 7);
    assert_sound(&store).await;
    assert_eq!(rebuild_all(&store).await, 0);
}

async fn damaged_missing_and_stray_rows_are_repaired(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 2).await;
    rebuild_all(&store).await;
    for damage in [
        "UPDATE rows SET doc = '?' WHERE model = 'happened' AND position = 2",
        "UPDATE rows SET time = 5 WHERE model = 'counts' AND key = 'default/iris'",
        "DELETE FROM rows WHERE model = 'happened' AND position = 5",
        "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) \
         VALUES ('happened', 'stray', '', '', 1, 1, '{}')",
    ] {
        db.execute_directly(damage).await;
    }
    assert_eq!(rebuild_all(&store).await, 4);
    assert_sound(&store).await;
}

async fn a_stray_row_is_found_even_if_the_row_count_is_right(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    rebuild_all(&store).await;
    db.execute_directly("UPDATE rows SET key = 'stray' WHERE model = 'happened' AND position = 2")
        .await;
    assert_eq!(rebuild_all(&store).await, 2);
    assert_sound(&store).await;
}

async fn rows_of_other_models_are_left_alone(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    rebuild(&store, &mut CountsAndEvents::default(), &["counts"])
        .await
        .unwrap();
    assert_eq!(
        store
            .row("counts", "default/iris")
            .await
            .unwrap()
            .unwrap()
            .doc,
        "3"
    );
    db.execute_directly(
        "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) \
             VALUES ('others', 'k', '', '', 1, 1, '{}')",
    )
    .await;
    assert_eq!(rebuild_all(&store).await, 3);
    assert!(store.row("others", "k").await.unwrap().is_some());
}

async fn a_consumer_that_had_read_nothing_is_set_to_the_end(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 2).await;
    rebuild_all(&store).await;
    let cursors = store.cursors("views").await.unwrap();
    let ends: Vec<Position> = cursors.into_values().collect();
    assert_eq!(ends.len(), 2);
    assert!(
        ends.contains(&Position(3)) && ends.contains(&Position(5)),
        "{ends:?}"
    );
}

async fn a_consumer_that_is_behind_keeps_its_cursors_and_rows(db: TestDatabase) {
    let store = db.open().await;
    let first = records(&store, commit_to(stream("iris"), 0, 2)).await;
    store.commit(reached(&first[1])).await.unwrap();
    records(&store, commit_to(stream("iris"), 2, 2)).await;
    assert_eq!(rebuild_all(&store).await, 3);
    let cursors = store.cursors("views").await.unwrap();
    assert_eq!(cursors.into_values().collect::<Vec<_>>(), [Position(2)]);
    assert_eq!(
        store
            .row("counts", "default/iris")
            .await
            .unwrap()
            .unwrap()
            .doc,
        "2"
    );
}

async fn a_rebuild_while_its_consumer_runs_is_refused(db: TestDatabase) {
    let store = db.open().await;
    let first = records(&store, commit_to(stream("iris"), 0, 2)).await;
    let (other, commit) = (store.clone(), reached(&first[0]));
    let mut projector = CountsAndEvents::with_hook(move |projected| {
        if projected == 1 {
            let moving = other.commit(commit.clone());
            tokio::task::block_in_place(|| Handle::current().block_on(moving)).unwrap();
        }
    });
    let refused = rebuild(&store, &mut projector, &MODELS).await.unwrap_err();
    assert!(
        matches!(&refused, StoreError::Refused(why) if why.as_str().contains("stop it")),
        "{refused}"
    );
    let cursors = store.cursors("views").await.unwrap();
    assert_eq!(cursors.into_values().collect::<Vec<_>>(), [Position(1)]);
}

async fn an_unreadable_event_does_not_stop_a_rebuild(db: TestDatabase) {
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 2).await;
    db.execute_directly("UPDATE events SET data = '?' WHERE position = 5")
        .await;
    let mut projector = CountsAndEvents::default();
    let changed = rebuild(&store, &mut projector, &MODELS).await.unwrap();
    assert_eq!(changed, 6);
    assert_eq!(projector.unreadable, [Position(5)]);
    let count = store.row("counts", "default/rose").await.unwrap().unwrap();
    assert_eq!(count.doc, "1");
    let cursors = store.cursors("views").await.unwrap();
    assert!(cursors.into_values().any(|cursor| cursor == Position(5)));
    let mut projector = CountsAndEvents::default();
    let report = verify(&store, &mut projector, &MODELS).await.unwrap();
    assert_eq!(projector.unreadable, [Position(5)]);
    assert_eq!(report.problems.len(), 1, "{report:?}");
    assert!(report.problems[0].contains("position 5"), "{report:?}");
}

fn count_of_iris(doc: &str) -> RowChange {
    RowChange {
        model: "counts",
        key: "default/iris".to_owned(),
        endpoint: "default/iris".to_owned(),
        deployment: String::new(),
        position: Position(2),
        time: contract::time::Timestamp::default(),
        doc: Some(doc.to_owned()),
    }
}

async fn a_running_owner_that_takes_its_bucket_back_keeps_its_rows(db: TestDatabase) {
    let store = db.open().await;
    let first = records(&store, commit_to(stream("iris"), 0, 2)).await;
    let server = match &db {
        TestDatabase::Sqlite(_) => store.clone(),
        TestDatabase::Postgres(_) => db.open().await,
    };
    let name = format!("views/{}", first[0].bucket);
    let before = server.acquire_fence(&name).await.unwrap();
    server.commit(reached(&first[0])).await.unwrap();
    let moved = CursorMove {
        consumer: "views",
        bucket: first[0].bucket,
        from: Position(1),
        to: Position(2),
    };
    let (other, fence) = (server.clone(), before.clone());
    let mut projector = CountsAndEvents::with_hook(move |projected| {
        if projected > 0 {
            return;
        }
        let write = |fence| Commit {
            rows: vec![count_of_iris("of the owner")],
            cursor: Some(moved.clone()),
            fence: Some(fence),
            ..Commit::default()
        };
        let (fenced, taking_back) = (write(fence.clone()), other.acquire_fence(&name));
        tokio::task::block_in_place(|| {
            Handle::current().block_on(async {
                // The owner's commit is fenced; it takes its bucket back and writes.
                let refused = other.commit(fenced).await.unwrap_err();
                assert!(
                    matches!(refused, store::CommitError::Fenced { .. }),
                    "{refused}"
                );
                let again = write(taking_back.await.unwrap());
                other.commit(again).await.unwrap();
            });
        });
    });
    let refused = rebuild(&store, &mut projector, &MODELS).await.unwrap_err();
    assert!(refused.to_string().contains("stop it"), "{refused}");
    let row = server.row("counts", "default/iris").await.unwrap().unwrap();
    assert_eq!(row.doc, "of the owner");
    let first = first[0].id.to_string();
    assert!(server.row("happened", &first).await.unwrap().is_none());
}

async fn more_rows_than_fit_in_a_transaction_are_all_written(db: TestDatabase) {
    let store = db.open().await;
    records(&store, commit_to(stream("iris"), 0, MANY as usize)).await;
    assert_eq!(rebuild_all(&store).await, MANY as usize + 1);
    assert_sound(&store).await;
}

async fn an_interrupted_rebuild_does_no_harm_and_is_finished_by_the_next(db: TestDatabase) {
    let store = db.open().await;
    records(&store, commit_to(stream("iris"), 0, MANY as usize)).await;
    db.execute_directly(
        "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) \
             VALUES ('counts', 'default/iris', 'default/iris', '', 1, 1, 'before')",
    )
    .await;
    let interrupted = store.clone();
    let running = tokio::spawn(async move {
        let mut projector =
            CountsAndEvents::with_hook(|projected| assert!(projected < MANY - 100, "cut off"));
        rebuild(&interrupted, &mut projector, &MODELS).await
    });
    assert!(running.await.unwrap_err().is_panic());
    store.close().await;

    let store = db.open().await;
    // Rows that may change until the end were not written, and no cursor was set.
    assert_eq!(
        store
            .row("counts", "default/iris")
            .await
            .unwrap()
            .unwrap()
            .doc,
        "before"
    );
    assert!(store.cursors("views").await.unwrap().is_empty());
    assert!(rebuild_all(&store).await > 0);
    assert_sound(&store).await;
}

support::suite! {
    rows_are_created_from_scratch_only_once
    damaged_missing_and_stray_rows_are_repaired
    a_stray_row_is_found_even_if_the_row_count_is_right
    rows_of_other_models_are_left_alone
    a_consumer_that_had_read_nothing_is_set_to_the_end
    a_consumer_that_is_behind_keeps_its_cursors_and_rows
    a_rebuild_while_its_consumer_runs_is_refused
    a_running_owner_that_takes_its_bucket_back_keeps_its_rows
    an_unreadable_event_does_not_stop_a_rebuild
    more_rows_than_fit_in_a_transaction_are_all_written
    an_interrupted_rebuild_does_no_harm_and_is_finished_by_the_next
    @sqlite
    @postgres
}
