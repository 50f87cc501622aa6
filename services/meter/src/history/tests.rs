//! Competing owners of a bucket, and files created by an older release.

use contract::frame::Role;
use contract::ids::Position;
use domain::usage::Usage;
use sqlx::migrate::Migrator;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};
use store::Fence;

use super::*;
use crate::open::OpenUsage;
use crate::panes::{Pane, PaneKey};

const SECOND: i64 = 1_700_000_040;

fn endpoint() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

fn bucket() -> Bucket {
    endpoint().bucket()
}

/// One second with one request.
fn save(generation: u64, second: i64) -> SaveBatch {
    let fence = Fence {
        name: format!("meter/{}", bucket()),
        generation,
    };
    let at = Timestamp::from_secs(second);
    let bucket_save = BucketSave {
        generation,
        doc: OpenUsage::encode(&fence, at, &Usage::default()).unwrap(),
        ready_through: Position(9),
    };
    let key = PaneKey {
        endpoint: endpoint(),
        deployment: "blue".parse().unwrap(),
        role: Role::LIVE,
        second,
    };
    let pane = Pane {
        arrivals: 1,
        ..Pane::default()
    };
    SaveBatch {
        buckets: BTreeMap::from([(bucket(), bucket_save)]),
        panes: BTreeMap::from([(key, pane)]),
        covered: BTreeMap::from([(bucket(), vec![(second, second + 1)])]),
        ready: Vec::new(),
        now: second,
    }
}

async fn claim(history: &History, generation: u64) -> Option<SavedBucket> {
    let wanted = BTreeMap::from([(bucket(), generation)]);
    history.claim(&wanted).await.unwrap().remove(&bucket())
}

/// Requests and covered seconds of a minute.
async fn totals(history: &History) -> (u64, u64) {
    let query = Query {
        endpoint: None,
        deployment: None,
        from: Timestamp::from_secs(SECOND),
        to: Timestamp::from_secs(SECOND + 60),
        step: contract::time::Span::from_secs(60),
    };
    let points = history.points(&query).await.unwrap();
    let point = points.first();
    point.map_or((0, 0), |p| (p.requests, p.covered_seconds))
}

async fn in_file(folder: &tempfile::TempDir) -> History {
    let location = HistoryLocation::File(folder.path().join("history.db"));
    History::open(&location).await.unwrap()
}

async fn in_database() -> Option<History> {
    let location = HistoryLocation::Database(servers::Postgres::shared()?.database());
    Some(History::open(&location).await.unwrap())
}

async fn a_claim_returns_what_was_saved(history: History) {
    assert!(claim(&history, 1).await.unwrap().open.is_none());
    assert!(
        history
            .save(&save(1, SECOND), false)
            .await
            .unwrap()
            .is_empty()
    );
    let saved = claim(&history, 2).await.unwrap();
    assert_eq!(saved.ready_through, Position(9));
    assert_eq!(saved.panes_before, SECOND + 1);
    assert!(saved.open.is_some());
}

async fn a_former_owner_cannot_save_a_claimed_bucket(history: History) {
    claim(&history, 1).await.unwrap();
    history.save(&save(1, SECOND), false).await.unwrap();
    claim(&history, 2).await.unwrap();
    let refused = history.save(&save(1, SECOND + 1), false).await.unwrap();
    assert_eq!(refused, BTreeSet::from([bucket()]));
    assert_eq!(totals(&history).await, (1, 1));
    history.save(&save(2, SECOND + 1), false).await.unwrap();
    assert_eq!(totals(&history).await, (2, 2));
}

async fn a_save_whose_response_was_lost_is_not_written_twice(history: History) {
    claim(&history, 1).await.unwrap();
    history.save(&save(1, SECOND), false).await.unwrap();
    history.save(&save(1, SECOND), true).await.unwrap();
    assert_eq!(totals(&history).await, (1, 1));
    history.save(&save(1, SECOND + 1), true).await.unwrap();
    assert_eq!(totals(&history).await, (2, 2));
}

async fn old_rows_are_deleted(history: History) {
    claim(&history, 1).await.unwrap();
    history.save(&save(1, SECOND), false).await.unwrap();
    history.save(&save(1, SECOND + 1), false).await.unwrap();
    history.prune(SECOND + 1).await.unwrap();
    assert_eq!(totals(&history).await.0, 1);
}

macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite_file {
            $(#[tokio::test]
            async fn $name() {
                let folder = tempfile::tempdir().unwrap();
                super::$name(super::in_file(&folder).await).await;
            })*
        }
        mod postgres_tables {
            $(#[tokio::test]
            async fn $name() {
                let Some(history) = super::in_database().await else {
                    return;
                };
                super::$name(history).await;
            })*
        }
    };
}

on_both!(
    a_claim_returns_what_was_saved,
    a_former_owner_cannot_save_a_claimed_bucket,
    a_save_whose_response_was_lost_is_not_written_twice,
    old_rows_are_deleted,
);

#[tokio::test]
async fn a_claim_with_an_older_generation_returns_nothing() {
    let Some(history) = in_database().await else {
        return;
    };
    claim(&history, 2).await.unwrap();
    assert!(claim(&history, 1).await.is_none());
}

#[tokio::test]
async fn a_reader_cannot_write() {
    let folder = tempfile::tempdir().unwrap();
    let location = HistoryLocation::File(folder.path().join("history.db"));
    let reader = History::open_read_only(&location).await.unwrap();
    let refused = reader.save(&save(1, SECOND), false).await.unwrap_err();
    assert!(refused.to_string().contains("reading only"), "{refused}");
}

#[tokio::test]
async fn a_file_of_an_older_release_is_migrated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("history.db");
    let options = SqliteConnectOptions::new().filename(&path);
    let mut old = options.create_if_missing(true).connect().await.unwrap();
    let first = sqlite::MIGRATIONS
        .iter()
        .filter(|m| m.version == 1)
        .cloned();
    let first = Migrator {
        migrations: first.collect::<Vec<_>>().into(),
        ..Migrator::DEFAULT
    };
    first.run_direct(None, &mut old, false).await.unwrap();
    let fence = Fence {
        name: String::new(),
        generation: 3,
    };
    let doc = OpenUsage::encode(&fence, Timestamp::from_secs(SECOND), &Usage::default()).unwrap();
    let pane = serde_json::to_string(&Pane::default()).unwrap();
    sqlx::query("INSERT INTO open (bucket, doc) VALUES ($1, $2)")
        .bind(i64::from(bucket().0))
        .bind(doc)
        .execute(&mut old)
        .await
        .unwrap();
    sqlx::query("INSERT INTO meta (key, value) VALUES ('position', '41')")
        .execute(&mut old)
        .await
        .unwrap();
    sqlx::query("INSERT INTO panes (endpoint, deployment, second, role, doc) VALUES ($1, 'blue', $2, 'live', $3)")
        .bind(endpoint().as_str().to_owned())
        .bind(SECOND)
        .bind(pane)
        .execute(&mut old)
        .await
        .unwrap();
    old.close().await.unwrap();
    let history = in_file(&folder).await;
    let saved = claim(&history, 4).await.unwrap();
    assert_eq!(
        (saved.ready_through, saved.panes_before),
        (Position(41), SECOND + 1)
    );
    let next = Fence {
        generation: 4,
        ..fence
    };
    assert!(saved.open.unwrap().for_owner(&next).is_some());
}

#[test]
fn both_databases_have_migrations_of_the_same_names() {
    let names = |migrator: &Migrator| {
        let names = migrator
            .iter()
            .map(|m| (m.version, m.description.to_string()));
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(&sqlite::MIGRATIONS), names(&postgres::MIGRATIONS));
    assert_eq!(names(&sqlite::MIGRATIONS).len(), 2);
}

#[test]
fn a_location_is_printed_without_its_password() {
    let location = HistoryLocation::Database("postgres://me:secret@h/d".to_owned());
    assert!(!format!("{location:?}").contains("secret"));
}
