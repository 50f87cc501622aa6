//! Competing owners of a bucket, and files created by an older release.

use contract::frame::{Role, SourceKind};
use contract::ids::Position;
use domain::measure::{InstanceReading, InstanceReport, MeasuredSpan, Spans};
use domain::usage::Usage;
use sqlx::migrate::Migrator;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};
use store::Fence;

use super::*;
use crate::coverage::Measured;
use crate::open::OpenUsage;
use crate::panes::{InstanceChunk, Pane, PaneKey};
use crate::ready::ReadyChange;

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
        now: second,
        ..SaveBatch::default()
    }
}

async fn claim(history: &HistoryStore, generation: u64) -> Option<SavedBucket> {
    let wanted = BTreeMap::from([(bucket(), generation)]);
    history.claim(&wanted).await.unwrap().remove(&bucket())
}

/// Requests and covered seconds of a minute.
async fn totals(history: &HistoryStore) -> (u64, u64) {
    let query = PointsQuery {
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

async fn in_file(folder: &tempfile::TempDir) -> HistoryStore {
    let location = HistoryLocation::File(folder.path().join("history.db"));
    HistoryStore::open(&location).await.unwrap()
}

async fn in_database() -> Option<HistoryStore> {
    let location = HistoryLocation::Database(servers::Postgres::shared()?.database());
    Some(HistoryStore::open(&location).await.unwrap())
}

#[tokio::test]
async fn a_backup_of_a_history_in_a_database_is_a_history_in_a_file() {
    let Some(server) = servers::Postgres::shared() else {
        return;
    };
    let location = HistoryLocation::Database(server.database());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("backup.history.db");
    assert!(!backup_history(&location, &file).await.unwrap());
    assert!(!file.exists());

    let history = HistoryStore::open(&location).await.unwrap();
    claim(&history, 1).await.unwrap();
    // More than a page.
    for second in SECOND..SECOND + 30 {
        let mut batch = save(1, second);
        let (key, pane) = batch.panes.pop_first().unwrap();
        batch.panes.extend((0..20).map(|role| {
            let role = format!("role-{role}").parse().unwrap();
            (
                PaneKey {
                    role,
                    ..key.clone()
                },
                pane.clone(),
            )
        }));
        batch.panes.insert(key, pane);
        history.save(&batch, false).await.unwrap();
    }
    let ready = ReadyChange {
        endpoint: endpoint(),
        deployment: "blue".parse().unwrap(),
        second: SECOND,
        instances: 1,
    };
    let batch = SaveBatch {
        ready: vec![ready],
        ..windows(1, SECOND)
    };
    history.save(&batch, false).await.unwrap();
    assert!(backup_history(&location, &file).await.unwrap());
    let copy = HistoryStore::open(&HistoryLocation::File(file.clone())).await;
    let copy = copy.unwrap();
    assert_eq!(totals(&copy).await, totals(&history).await);
    assert!(totals(&copy).await.0 >= 30);
    assert_all_tables_copied(&location, &file).await;
    let measured = past(&history, SECOND, 0).await;
    assert!(!measured.kinds[&SourceKind::NODE].instances.is_empty());
    let copied = past(&copy, SECOND, 0).await;
    assert_eq!(format!("{copied:?}"), format!("{measured:?}"));
    let (saved, original) = (claim(&copy, 2).await, claim(&history, 2).await);
    let (saved, original) = (saved.unwrap(), original.unwrap());
    assert_eq!(saved.ready_through, original.ready_through);
    assert_eq!(saved.panes_before, original.panes_before);
    assert!(saved.open.is_some());
    // A file is not overwritten.
    assert!(backup_history(&location, &file).await.is_err());
}

/// Asserts that each table of the history in the database has rows, and the file has as many.
async fn assert_all_tables_copied(from: &HistoryLocation, to: &std::path::Path) {
    let HistoryLocation::Database(url) = from else {
        panic!("it is in a file: {from:?}");
    };
    let mut database = sqlx::PgConnection::connect(url).await.unwrap();
    let options = SqliteConnectOptions::new().filename(to);
    let mut file = options.connect().await.unwrap();
    let tables = "SELECT tablename::text FROM pg_tables \
        WHERE schemaname = current_schema() AND tablename LIKE 'history\\_%'";
    let tables: Vec<String> = sqlx::query_scalar(tables)
        .fetch_all(&mut database)
        .await
        .unwrap();
    assert!(!tables.is_empty());
    // A file lists its migrations under another name.
    let listed_in = super::postgres::MIGRATIONS_LISTED_IN;
    for table in tables.into_iter().filter(|table| table != listed_in) {
        let count = || sqlx::AssertSqlSafe(format!("SELECT COUNT(*) FROM {table}"));
        let original: i64 = sqlx::query_scalar(count())
            .fetch_one(&mut database)
            .await
            .unwrap();
        let copied: i64 = sqlx::query_scalar(count())
            .fetch_one(&mut file)
            .await
            .unwrap();
        assert!(original > 0, "{table} is not part of this test");
        assert_eq!(copied, original, "{table} is not part of a backup");
    }
}

async fn a_claim_returns_what_was_saved(history: HistoryStore) {
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

async fn a_former_owner_cannot_save_a_claimed_bucket(history: HistoryStore) {
    claim(&history, 1).await.unwrap();
    history.save(&save(1, SECOND), false).await.unwrap();
    claim(&history, 2).await.unwrap();
    let refused = history.save(&save(1, SECOND + 1), false).await.unwrap();
    assert_eq!(refused, BTreeSet::from([bucket()]));
    assert_eq!(totals(&history).await, (1, 1));
    history.save(&save(2, SECOND + 1), false).await.unwrap();
    assert_eq!(totals(&history).await, (2, 2));
}

async fn a_save_whose_response_was_lost_is_not_written_twice(history: HistoryStore) {
    claim(&history, 1).await.unwrap();
    history.save(&save(1, SECOND), false).await.unwrap();
    history.save(&save(1, SECOND), true).await.unwrap();
    assert_eq!(totals(&history).await, (1, 1));
    history.save(&save(1, SECOND + 1), true).await.unwrap();
    assert_eq!(totals(&history).await, (2, 2));
}

async fn old_rows_are_deleted(history: HistoryStore) {
    claim(&history, 1).await.unwrap();
    history.save(&save(1, SECOND), false).await.unwrap();
    history.save(&save(1, SECOND + 1), false).await.unwrap();
    history.prune(SECOND + 1, SECOND + 1).await.unwrap();
    assert_eq!(totals(&history).await.0, 1);
}

/// Ten seconds with one request and one instance each, of which the last two lack a gateway.
fn windows(generation: u64, first: i64) -> SaveBatch {
    let panes = (first..first + 10).flat_map(|second| save(generation, second).panes);
    let panes = panes.map(|(key, _)| {
        let pane = Pane {
            arrivals: 1,
            oldest_in_flight_us: 2500,
            definitions: Some(1),
            ..Pane::default()
        };
        (key, pane)
    });
    let measured = |start, end, is_partial| Measured {
        start: first + start,
        end: first + end,
        is_partial,
        length_us: (end - start) as u64 * 1_000_100,
    };
    let report = InstanceReport {
        definitions: 1,
        length_us: 1_000_000,
        instances: vec![InstanceReading {
            cpu_us: Some(700_000),
            ready_for_us: Some(9_000_000),
            ..InstanceReading::default()
        }],
    };
    SaveBatch {
        panes: panes.collect(),
        measured: BTreeMap::from([
            (
                (bucket(), SourceKind::GATEWAY),
                vec![measured(0, 8, false), measured(8, 10, true)],
            ),
            ((bucket(), SourceKind::NODE), vec![measured(0, 10, false)]),
        ]),
        instances: vec![InstanceChunk {
            endpoint: endpoint(),
            deployment: "blue".parse().unwrap(),
            start: first,
            end: first + 10,
            seconds: (first..first + 10)
                .map(|second| (second, vec![report.clone()]))
                .collect(),
        }],
        covered: BTreeMap::new(),
        ..save(generation, first)
    }
}

async fn past(history: &HistoryStore, from: i64, created_at: i64) -> Past {
    let query = PastQuery {
        endpoint: endpoint(),
        deployment: "blue".parse().unwrap(),
        created_at: Timestamp::from_secs(created_at),
        from: Timestamp::from_secs(from),
    };
    history.past(&query).await.unwrap()
}

fn span(start: i64, end: i64, is_partial: bool) -> MeasuredSpan {
    MeasuredSpan {
        start: SECOND + start,
        end: SECOND + end,
        is_partial,
        length_us: 1_000_100,
    }
}

async fn windows_are_read_back_as_they_were_measured(history: HistoryStore) {
    claim(&history, 1).await.unwrap();
    history.save(&windows(1, SECOND), false).await.unwrap();
    history.save(&windows(1, SECOND + 10), false).await.unwrap();
    let past = past(&history, SECOND + 5, 0).await;
    let gateways = &past.kinds[&SourceKind::GATEWAY];
    let spans = [
        span(5, 8, false),
        span(8, 10, true),
        span(10, 18, false),
        span(18, 20, true),
    ];
    assert_eq!(gateways.measured, spans);
    let known = Spans::from_iter([(SECOND + 5, SECOND + 20)]);
    assert_eq!(gateways.known, known);
    let load = &gateways.loads[&(SECOND + 5)];
    assert_eq!((gateways.loads.len(), load.arrivals), (15, 1));
    assert_eq!(
        (load.oldest_in_flight_us, load.definitions),
        (2500, Some(1))
    );
    let nodes = &past.kinds[&SourceKind::NODE];
    assert_eq!(nodes.measured, [span(5, 20, false)]);
    assert_eq!((&nodes.known, nodes.instances.len()), (&known, 15));
    let instance = &nodes.instances[&(SECOND + 19)][0].instances[0];
    assert_eq!(instance.cpu_us, Some(700_000));
}

async fn what_two_owners_saved_of_a_second_counts_once(history: HistoryStore) {
    claim(&history, 1).await.unwrap();
    history.save(&windows(1, SECOND), false).await.unwrap();
    let again = SaveBatch {
        panes: BTreeMap::new(),
        ..windows(1, SECOND + 4)
    };
    history.save(&again, false).await.unwrap();
    let past = past(&history, SECOND, 0).await;
    let nodes = &past.kinds[&SourceKind::NODE];
    let seconds: u64 = nodes
        .measured
        .iter()
        .map(|of| (of.end - of.start) as u64)
        .sum();
    assert_eq!((seconds, nodes.instances.len()), (14, 14));
    assert!(nodes.instances.values().all(|reports| reports.len() == 1));
}

async fn an_earlier_incarnation_of_a_name_is_no_load(history: HistoryStore) {
    claim(&history, 1).await.unwrap();
    history.save(&windows(1, SECOND), false).await.unwrap();
    let past = past(&history, SECOND, SECOND + 6).await;
    let gateways = &past.kinds[&SourceKind::GATEWAY];
    assert_eq!(gateways.loads.keys().next(), Some(&(SECOND + 7)));
    let nodes = &past.kinds[&SourceKind::NODE];
    assert_eq!(nodes.instances.keys().next(), Some(&(SECOND + 7)));
    assert!(nodes.known.has(SECOND) && gateways.known.has(SECOND));
}

async fn a_history_of_an_older_release_is_read_with_what_it_has(history: HistoryStore) {
    claim(&history, 1).await.unwrap();
    history.save(&save(1, SECOND), false).await.unwrap();
    let past = past(&history, SECOND, 0).await;
    let gateways = &past.kinds[&SourceKind::GATEWAY];
    assert_eq!(
        (gateways.measured[0].end, gateways.measured.len()),
        (SECOND + 1, 1)
    );
    assert_eq!(gateways.loads[&SECOND].definitions, Some(0));
    let nodes = &past.kinds[&SourceKind::NODE];
    assert!(nodes.measured.is_empty() && !nodes.known.has(SECOND));
}

async fn what_no_window_can_need_is_deleted_early(history: HistoryStore) {
    claim(&history, 1).await.unwrap();
    history.save(&windows(1, SECOND), false).await.unwrap();
    history.save(&windows(1, SECOND + 20), false).await.unwrap();
    history.prune(SECOND, SECOND + 15).await.unwrap();
    let past = past(&history, SECOND, 0).await;
    let nodes = &past.kinds[&SourceKind::NODE];
    assert_eq!(nodes.measured, [span(20, 30, false)]);
    assert_eq!(nodes.instances.len(), 10);
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
    windows_are_read_back_as_they_were_measured,
    what_two_owners_saved_of_a_second_counts_once,
    an_earlier_incarnation_of_a_name_is_no_load,
    a_history_of_an_older_release_is_read_with_what_it_has,
    what_no_window_can_need_is_deleted_early,
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
    let reader = HistoryStore::open_read_only(&location).await.unwrap();
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
    assert_eq!(names(&sqlite::MIGRATIONS).len(), 3);
}

#[test]
fn a_location_is_printed_without_its_password() {
    let location = HistoryLocation::Database("postgres://me:secret@h/d".to_owned());
    assert!(!format!("{location:?}").contains("secret"));
}
