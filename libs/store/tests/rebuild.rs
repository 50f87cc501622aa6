//! What a rebuild of read models does to their rows, whatever was there, on either database.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use contract::ids::Position;
use contract::log::{Record, RowChange};
use store::{Commit, CursorMove, Projector, Store, StoreError, Unreadable, rebuild, verify};
use support::place::{Place, commit_to, fill, records, stream};
use tokio::runtime::Handle;

const MODELS: [&str; 2] = ["counts", "happened"];

/// Enough rows for more than one transaction of a rebuild.
const MANY: u64 = 20_000;

/// Two models: how many events each endpoint has, and each event by itself, which never changes.
#[derive(Default)]
struct Both {
    counts: BTreeMap<String, u64>,
    /// Called with the number of records before each.
    before: Option<Box<dyn FnMut(u64) + Send>>,
    projected: u64,
    passed_over: Vec<Position>,
}

impl Both {
    fn watched(before: impl FnMut(u64) + Send + 'static) -> Self {
        Self {
            before: Some(Box::new(before)),
            ..Self::default()
        }
    }
}

impl Projector for Both {
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

    fn pass_over(&mut self, unreadable: &Unreadable) {
        self.passed_over.push(unreadable.position);
    }

    fn is_written_once(&self, model: &str) -> bool {
        model == "happened"
    }
}

async fn made_anew(store: &Store) -> usize {
    rebuild(store, &mut Both::default(), &MODELS).await.unwrap()
}

async fn assert_sound(store: &Store) {
    let report = verify(store, &mut Both::default(), &MODELS).await.unwrap();
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

async fn rows_are_made_from_nothing_and_only_once(place: Place) {
    let store = place.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 2).await;
    assert_eq!(made_anew(&store).await, 7);
    assert_sound(&store).await;
    assert_eq!(made_anew(&store).await, 0);
}

async fn what_was_damaged_lost_or_never_made_is_put_right(place: Place) {
    let store = place.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 2).await;
    made_anew(&store).await;
    for damage in [
        "UPDATE rows SET doc = '?' WHERE model = 'happened' AND position = 2",
        "UPDATE rows SET time = 5 WHERE model = 'counts' AND key = 'default/iris'",
        "DELETE FROM rows WHERE model = 'happened' AND position = 5",
        "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) \
         VALUES ('happened', 'stray', '', '', 1, 1, '{}')",
    ] {
        place.behind_its_back(damage).await;
    }
    assert_eq!(made_anew(&store).await, 4);
    assert_sound(&store).await;
}

async fn a_stray_that_stands_where_a_row_is_missing_is_found(place: Place) {
    let store = place.open().await;
    fill(&store, "iris", 3).await;
    made_anew(&store).await;
    place
        .behind_its_back("UPDATE rows SET key = 'stray' WHERE model = 'happened' AND position = 2")
        .await;
    assert_eq!(made_anew(&store).await, 2);
    assert_sound(&store).await;
}

async fn rows_of_other_models_are_left_alone(place: Place) {
    let store = place.open().await;
    fill(&store, "iris", 3).await;
    rebuild(&store, &mut Both::default(), &["counts"])
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
    place
        .behind_its_back(
            "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) \
             VALUES ('others', 'k', '', '', 1, 1, '{}')",
        )
        .await;
    assert_eq!(made_anew(&store).await, 3);
    assert!(store.row("others", "k").await.unwrap().is_some());
}

async fn a_consumer_that_had_read_nothing_stands_at_the_end(place: Place) {
    let store = place.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 2).await;
    made_anew(&store).await;
    let cursors = store.cursors("views").await.unwrap();
    let ends: Vec<Position> = cursors.into_values().collect();
    assert_eq!(ends.len(), 2);
    assert!(
        ends.contains(&Position(3)) && ends.contains(&Position(5)),
        "{ends:?}"
    );
}

async fn a_consumer_that_is_behind_stays_where_it_is_with_its_rows(place: Place) {
    let store = place.open().await;
    let first = records(&store, commit_to(stream("iris"), 0, 2)).await;
    store.commit(reached(&first[1])).await.unwrap();
    records(&store, commit_to(stream("iris"), 2, 2)).await;
    assert_eq!(made_anew(&store).await, 3);
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

async fn a_rebuild_beside_its_running_consumer_is_refused(place: Place) {
    let store = place.open().await;
    let first = records(&store, commit_to(stream("iris"), 0, 2)).await;
    let (beside, commit) = (store.clone(), reached(&first[0]));
    let mut projector = Both::watched(move |projected| {
        if projected == 1 {
            let moving = beside.commit(commit.clone());
            tokio::task::block_in_place(|| Handle::current().block_on(moving)).unwrap();
        }
    });
    let refused = rebuild(&store, &mut projector, &MODELS).await.unwrap_err();
    assert!(
        matches!(&refused, StoreError::Refused(why) if why.contains("stop it")),
        "{refused}"
    );
    let cursors = store.cursors("views").await.unwrap();
    assert_eq!(cursors.into_values().collect::<Vec<_>>(), [Position(1)]);
}

async fn an_event_that_cannot_be_read_does_not_stop_it(place: Place) {
    let store = place.open().await;
    fill(&store, "iris", 3).await;
    fill(&store, "rose", 2).await;
    place
        .behind_its_back("UPDATE events SET data = '?' WHERE position = 5")
        .await;
    let mut projector = Both::default();
    let changed = rebuild(&store, &mut projector, &MODELS).await.unwrap();
    assert_eq!(changed, 6);
    assert_eq!(projector.passed_over, [Position(5)]);
    let count = store.row("counts", "default/rose").await.unwrap().unwrap();
    assert_eq!(count.doc, "1");
    let cursors = store.cursors("views").await.unwrap();
    assert!(cursors.into_values().any(|cursor| cursor == Position(5)));
    let mut projector = Both::default();
    let report = verify(&store, &mut projector, &MODELS).await.unwrap();
    assert_eq!(projector.passed_over, [Position(5)]);
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

async fn a_running_owner_that_takes_its_bucket_back_keeps_its_rows(place: Place) {
    let store = place.open().await;
    let first = records(&store, commit_to(stream("iris"), 0, 2)).await;
    let server = match &place {
        Place::Sqlite(_) => store.clone(),
        Place::Postgres(_) => place.open().await,
    };
    let name = format!("views/{}", first[0].bucket);
    let before = server.take(&name).await.unwrap();
    server.commit(reached(&first[0])).await.unwrap();
    let moved = CursorMove {
        consumer: "views",
        bucket: first[0].bucket,
        from: Position(1),
        to: Position(2),
    };
    let (beside, fence) = (server.clone(), before.clone());
    let mut projector = Both::watched(move |projected| {
        if projected > 0 {
            return;
        }
        let write = |fence| Commit {
            rows: vec![count_of_iris("of the owner")],
            cursor: Some(moved.clone()),
            fence: Some(fence),
            ..Commit::default()
        };
        let (fenced, taking_back) = (write(fence.clone()), beside.take(&name));
        tokio::task::block_in_place(|| {
            Handle::current().block_on(async {
                // It hears that it has lost the bucket, and writes when it has taken it again.
                let refused = beside.commit(fenced).await.unwrap_err();
                assert!(
                    matches!(refused, store::CommitError::Fenced { .. }),
                    "{refused}"
                );
                let again = write(taking_back.await.unwrap());
                beside.commit(again).await.unwrap();
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

async fn more_rows_than_fit_a_transaction_are_all_made(place: Place) {
    let store = place.open().await;
    records(&store, commit_to(stream("iris"), 0, MANY as usize)).await;
    assert_eq!(made_anew(&store).await, MANY as usize + 1);
    assert_sound(&store).await;
}

async fn a_rebuild_that_is_cut_off_has_done_no_harm_and_is_finished_by_the_next(place: Place) {
    let store = place.open().await;
    records(&store, commit_to(stream("iris"), 0, MANY as usize)).await;
    place
        .behind_its_back(
            "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) \
             VALUES ('counts', 'default/iris', 'default/iris', '', 1, 1, 'before')",
        )
        .await;
    let cut_off = store.clone();
    let running = tokio::spawn(async move {
        let mut projector = Both::watched(|projected| assert!(projected < MANY - 100, "cut off"));
        rebuild(&cut_off, &mut projector, &MODELS).await
    });
    assert!(running.await.unwrap_err().is_panic());
    store.close().await;

    let store = place.open().await;
    // What may change until the end was not touched, and the consumer has read nothing.
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
    assert!(made_anew(&store).await > 0);
    assert_sound(&store).await;
}

support::suite! {
    rows_are_made_from_nothing_and_only_once
    what_was_damaged_lost_or_never_made_is_put_right
    a_stray_that_stands_where_a_row_is_missing_is_found
    rows_of_other_models_are_left_alone
    a_consumer_that_had_read_nothing_stands_at_the_end
    a_consumer_that_is_behind_stays_where_it_is_with_its_rows
    a_rebuild_beside_its_running_consumer_is_refused
    a_running_owner_that_takes_its_bucket_back_keeps_its_rows
    an_event_that_cannot_be_read_does_not_stop_it
    more_rows_than_fit_a_transaction_are_all_made
    a_rebuild_that_is_cut_off_has_done_no_harm_and_is_finished_by_the_next
    @sqlite
    @postgres
}
