//! Behavior specific to PostgreSQL: many processes that write concurrently, connections that break or hang,
//! and a server that is killed.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use contract::ids::{Bucket, Position};
use contract::log::{Record, RowChange, StreamKind};
use contract::time::Timestamp;
use servers::Postgres;
use sqlx::Connection;
use store::{
    Append, Commit, CommitError, Committed, IdempotencyKey, PageQuery, Projector, RowQuery, Store,
    StoreError, verify,
};
use support::database::*;
use support::postgres::{PostgresDatabase, skipped};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Longer than anything here takes, so that a test that hangs reports where.
const HANGS: Duration = Duration::from_secs(120);

struct NoRows;

impl Projector for NoRows {
    fn project(&mut self, _: &Record) -> Vec<RowChange> {
        Vec::new()
    }
}

async fn assert_sound(store: &Store) {
    let report = verify(store, &mut NoRows, &[]).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_of_concurrent_writers_become_visible_in_order() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let mut writers = Vec::new();
    for process in 0..3 {
        let store = Store::open(&database.url()).await.unwrap();
        for writer in 0..4 {
            let store = store.clone();
            // The processes write to the same buckets.
            let name = format!("e{writer}-{process}");
            writers.push(tokio::spawn(async move { fill(&store, &name, 25).await }));
        }
    }
    let reader = Store::open(&database.url()).await.unwrap();
    let mut after = Position::START;
    let mut chains: BTreeMap<Bucket, Position> = BTreeMap::new();
    while after < Position(300) {
        for record in reader.read_all(after, 1000).await.unwrap() {
            assert_eq!(record.position.0, after.0 + 1, "a gap was visible");
            after = record.position;
            let before = chains.insert(record.bucket, after);
            assert_eq!(record.prev, before.unwrap_or(Position::START));
        }
        tokio::task::yield_now().await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_sound(&reader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_processes_with_the_same_expected_version_wins() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let mut stores = Vec::new();
    for _ in 0..4 {
        stores.push(Store::open(&database.url()).await.unwrap());
    }
    for version in 0..10 {
        let attempts: Vec<_> = stores
            .iter()
            .cloned()
            .map(|store| {
                tokio::spawn(
                    async move { store.commit(commit_to(stream("iris"), version, 1)).await },
                )
            })
            .collect();
        let mut won = 0;
        for attempt in attempts {
            match attempt.await.unwrap() {
                Ok(_) => won += 1,
                Err(CommitError::Conflict { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(won, 1);
    }
    assert_sound(&stores[0]).await;
}

/// A process must not rely on stale state of its last batch.
#[tokio::test]
async fn a_process_reads_what_another_has_appended_since_its_last_batch() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let one = Store::open(&database.url()).await.unwrap();
    let other = Store::open(&database.url()).await.unwrap();
    let mut version = 0;
    // A few new events are read individually; of many, only what is needed.
    for count in [1, 7, 300, 1] {
        fill(&one, &format!("rose-{version}"), 1).await;
        records(&one, commit_to(stream("iris"), version, 1)).await;
        records(&other, commit_to(stream("iris"), version + 1, count)).await;
        let stale = one.commit(commit_to(stream("iris"), version + 1, 1)).await;
        let actual = version + 1 + count as u64;
        assert!(
            matches!(&stale, Err(CommitError::Conflict { actual: found, .. }) if *found == actual),
            "{stale:?}"
        );
        version = actual;
    }
    records(&one, commit_to(stream("iris"), version, 1)).await;
    assert_sound(&one).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idempotency_key_is_committed_by_one_of_many_processes() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let mut attempts = Vec::new();
    for _ in 0..4 {
        let store = Store::open(&database.url()).await.unwrap();
        attempts.push(tokio::spawn(async move {
            let commit = Commit {
                idempotency_key: Some(idempotency_key("views:1")),
                ..commit_to(stream("iris"), 0, 1)
            };
            store.commit(commit).await.unwrap()
        }));
    }
    let mut now = 0;
    for attempt in attempts {
        now += usize::from(matches!(attempt.await.unwrap(), Committed::Written { .. }));
    }
    assert_eq!(now, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_the_old_owner_is_written_after_a_takeover() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let old = Store::open(&database.url()).await.unwrap();
    let new = Store::open(&database.url()).await.unwrap();
    let fence = old.acquire_fence("autoscaler/7").await.unwrap();
    let writing: Vec<_> = (0..40)
        .map(|n| {
            let (store, fence) = (old.clone(), fence.clone());
            tokio::spawn(async move {
                let name = format!("e{n}");
                for version in 0.. {
                    let commit = Commit {
                        fence: Some(fence.clone()),
                        ..commit_to(stream(&name), version, 1)
                    };
                    match store.commit(commit).await {
                        Ok(_) => {}
                        Err(CommitError::Fenced { actual, .. }) => return actual,
                        Err(error) => panic!("{error}"),
                    }
                }
                unreachable!()
            })
        })
        .collect();
    let mut head = new.head_watch();
    head.wait_for(|head| head.0 > 50).await.unwrap();
    let taken = new.acquire_fence("autoscaler/7").await.unwrap();
    let at = new.head().await.unwrap();
    let mine = Commit {
        fence: Some(taken.clone()),
        ..commit_to(stream("rose"), 0, 1)
    };
    let mine = records(&new, mine).await;
    for writer in writing {
        assert_eq!(writer.await.unwrap(), taken.generation);
    }
    let after = new.read_all(at, 1000).await.unwrap();
    assert_eq!(after, vec![Record::clone(&mine[0])]);
}

#[tokio::test]
async fn a_text_that_the_database_cannot_store_fails_only_its_own_commit() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let store = Store::open(&database.url()).await.unwrap();
    let row = |key: &str| RowChange {
        model: "m",
        key: key.to_owned(),
        endpoint: String::new(),
        deployment: String::new(),
        position: Position(1),
        time: Timestamp::from_secs(1),
        doc: Some("{}".to_owned()),
    };
    let attempts: Vec<_> = (0..10)
        .map(|n| {
            let store = store.clone();
            let key = if n == 4 {
                "a\0b".to_owned()
            } else {
                format!("k{n}")
            };
            let rows = vec![row(&key)];
            tokio::spawn(async move {
                let commit = Commit {
                    rows,
                    ..Commit::default()
                };
                store.commit(commit).await
            })
        })
        .collect();
    for (n, attempt) in attempts.into_iter().enumerate() {
        assert_eq!(attempt.await.unwrap().is_ok(), n != 4, "{n}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_written_without_the_lock_is_a_conflict_of_one_commit() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let store = Store::open(&database.url()).await.unwrap();
    fill(&store, "iris", 1).await;
    // A writer that ignores the lock has written but not committed yet.
    let mut meddler = database.connect().await;
    let mut meddling = meddler.begin().await.unwrap();
    let sql = "INSERT INTO events SELECT 50, prev, bucket, stream, 2, 'x', type, type_version, time, \
         actor, data, prev_hash FROM events";
    sqlx::query(sql).execute(&mut *meddling).await.unwrap();
    let committing = |name: &str, version| {
        let (store, commit) = (store.clone(), commit_to(stream(name), version, 1));
        tokio::spawn(async move { store.commit(commit).await })
    };
    let (clashing, mate) = (committing("iris", 1), committing("rose", 0));
    let mut looking = database.connect().await;
    loop {
        let waiting = "SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
             AND datname = current_database()";
        let waiting: i64 = sqlx::query_scalar(waiting)
            .fetch_one(&mut looking)
            .await
            .unwrap();
        if waiting > 0 {
            break;
        }
        tokio::task::yield_now().await;
    }
    meddling.commit().await.unwrap();
    let refused = clashing.await.unwrap().unwrap_err();
    assert!(
        matches!(
            refused,
            CommitError::Conflict {
                expected: 1,
                actual: 2,
                ..
            }
        ),
        "{refused}"
    );
    mate.await.unwrap().unwrap();
}

#[tokio::test]
async fn texts_are_ordered_by_their_bytes_in_any_database_locale() {
    if skipped() {
        return;
    }
    let properties =
        "ENCODING 'UTF8' TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de' LOCALE 'C'";
    let database = PostgresDatabase::with(properties).await;
    let store = Store::open(&database.url()).await.unwrap();
    let keys = ["a", "B", "ä", "Z", "z", "_", "A"];
    let rows = keys
        .iter()
        .map(|key| RowChange {
            model: "m",
            key: (*key).to_owned(),
            endpoint: String::new(),
            deployment: String::new(),
            position: Position(1),
            time: Timestamp::from_secs(1),
            doc: Some("{}".to_owned()),
        })
        .collect();
    let commit = Commit {
        rows,
        ..Commit::default()
    };
    store.commit(commit).await.unwrap();
    let query = RowQuery {
        model: "m".to_owned(),
        limit: 100,
        ..RowQuery::default()
    };
    let listed = store.rows(query).await.unwrap();
    let listed: Vec<&str> = listed.iter().map(|row| row.key.as_str()).collect();
    assert_eq!(listed, ["ä", "z", "a", "_", "Z", "B", "A"]);
}

#[tokio::test]
async fn a_database_that_cannot_store_every_text_is_refused() {
    if skipped() {
        return;
    }
    let database =
        PostgresDatabase::with("ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'").await;
    let refused = Store::open(&database.url())
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("UTF8"), "{refused}");
}

#[tokio::test]
async fn a_commit_is_durable_even_if_the_database_disables_it() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let mut connection = database.connect().await;
    let sql = format!(
        "ALTER DATABASE {} SET synchronous_commit = off",
        database.name()
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .execute(&mut connection)
        .await
        .unwrap();
    let store = Store::open(&database.url()).await.unwrap();
    for sql in [
        "CREATE TABLE seen (setting TEXT, application TEXT)",
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen VALUES \
         (current_setting('synchronous_commit'), current_setting('application_name')); RETURN NEW; END $$",
        "CREATE TRIGGER note BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION note()",
    ] {
        sqlx::query(sql).execute(&mut connection).await.unwrap();
    }
    fill(&store, "iris", 1).await;
    let seen: (String, String) = sqlx::query_as("SELECT * FROM seen")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(seen, ("on".to_owned(), "penstock".to_owned()));
    connection.close().await.unwrap();
}

/// A proxy between a store and its server that can stop forwarding without closing connections.
struct Proxy {
    address: String,
    silent: watch::Sender<bool>,
}

impl Proxy {
    /// Starts a proxy that goes silent once it has forwarded a message that contains `at`.
    async fn start(server: String, at: Option<&'static [u8]>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let silent = watch::Sender::new(false);
        let gate = silent.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&server).await.unwrap();
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                tokio::spawn(forward(from_client, to_server, gate.clone(), at));
                tokio::spawn(forward(from_server, to_client, gate.clone(), None));
            }
        });
        Self { address, silent }
    }

    fn url(&self, database: &PostgresDatabase) -> String {
        let (_, name) = database
            .url()
            .rsplit_once('/')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .unwrap();
        format!("postgres://postgres@{}/{name}?timeout=1", self.address)
    }
}

async fn forward(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    silent: watch::Sender<bool>,
    at: Option<&'static [u8]>,
) {
    let mut buffer = vec![0; 1 << 16];
    let mut gate = silent.subscribe();
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        let _ = gate.wait_for(|silent| !silent).await;
        if at.is_some_and(|at| buffer[..bytes].windows(at.len()).any(|part| part == at)) {
            silent.send_replace(true);
        }
        if to.write_all(&buffer[..bytes]).await.is_err() {
            return;
        }
    }
}

/// Starts a server for one test: a user-provided shared server may be anywhere.
async fn dedicated_server() -> (Postgres, String) {
    let server = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
    let server = server.unwrap();
    let url = server.url("postgres");
    (server, url)
}

fn address(url: &str) -> String {
    url.split('@')
        .nth(1)
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_waits_forever_for_an_unreachable_server() {
    if skipped() {
        return;
    }
    let (_server, url) = dedicated_server().await;
    let database = PostgresDatabase::on(&url, "").await;
    let proxy = Proxy::start(address(&url), None).await;
    let store = Store::open(&proxy.url(&database)).await.unwrap();
    fill(&store, "iris", 1).await;
    proxy.silent.send_replace(true);
    let attempts = async {
        let commit = Commit {
            idempotency_key: Some(idempotency_key("views:1")),
            ..commit_to(stream("iris"), 1, 1)
        };
        let failed = store.commit(commit).await.unwrap_err();
        assert!(
            matches!(failed, CommitError::Store(StoreError::Database(_))),
            "{failed}"
        );
        assert!(matches!(
            store.head().await.unwrap_err(),
            StoreError::Database(_)
        ));
        assert!(store.acquire_fence("relay").await.is_err());
        assert!(Store::open(&proxy.url(&database)).await.is_err());
    };
    tokio::time::timeout(HANGS, attempts)
        .await
        .expect("something waits for ever");
    proxy.silent.send_replace(false);
    let again = async {
        loop {
            let commit = Commit {
                idempotency_key: Some(idempotency_key("views:1")),
                ..commit_to(stream("iris"), 1, 1)
            };
            match store.commit(commit).await {
                Ok(_) => return,
                Err(CommitError::Store(StoreError::Database(_))) => {}
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(HANGS, again)
        .await
        .expect("it never comes back");
    assert_eq!(store.head().await.unwrap(), Position(2));
    tokio::time::timeout(HANGS, store.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_isolated_within_a_transaction_does_not_block_the_others() {
    if skipped() {
        return;
    }
    let (_server, url) = dedicated_server().await;
    let database = PostgresDatabase::on(&url, "").await;
    let other = Store::open(&database.url()).await.unwrap();
    let proxy = Proxy::start(address(&url), Some(b"INSERT INTO events")).await;
    let isolated = Store::open(&proxy.url(&database)).await.unwrap();
    let fence = isolated.acquire_fence("relay").await.unwrap();
    let commit = Commit {
        fence: Some(fence),
        ..commit_to(stream("iris"), 0, 1)
    };
    // By now the server has the insert, and the commit lock is held by the isolated process.
    let failed = isolated.commit(commit).await.unwrap_err();
    assert!(matches!(failed, CommitError::Store(_)), "{failed}");
    let going_on = async {
        other.acquire_fence("relay").await.unwrap();
        fill(&other, "rose", 1).await;
    };
    tokio::time::timeout(HANGS, going_on)
        .await
        .expect("the others are held up");
    assert_eq!(
        other.head().await.unwrap(),
        Position(1),
        "what was cut off is undone"
    );
}

fn idempotency_key(key: &str) -> IdempotencyKey {
    IdempotencyKey {
        key: key.to_owned(),
        body_hash: String::new(),
        result: None,
    }
}

/// Appends to a stream of its own until stopped, retrying failed commits unchanged. Returns how many were
/// acknowledged.
async fn append_until(store: Store, name: String, stop: Arc<AtomicBool>) -> u64 {
    let mut version = 0;
    while !stop.load(Ordering::Relaxed) {
        let commit = Commit {
            appends: vec![Append {
                stream: stream(&name),
                expected_version: version,
                events: vec![event()],
            }],
            idempotency_key: Some(idempotency_key(&format!("test:{name}:{version}"))),
            ..Commit::default()
        };
        loop {
            match store.commit(commit.clone()).await {
                Ok(_) => break,
                Err(CommitError::Store(StoreError::Database(_))) => {}
                Err(error) => panic!("{name} at {version}: {error}"),
            }
        }
        version += 1;
    }
    version
}

/// Checks that everything that was acknowledged is in the log exactly once.
async fn assert_all_present(store: &Store, acknowledged: &BTreeMap<String, u64>) {
    for (name, count) in acknowledged {
        let read = store.read_stream(&stream(name), 0, 10_000).await.unwrap();
        assert_eq!(read.len() as u64, *count, "{name}");
    }
    let total: u64 = acknowledged.values().sum();
    assert_eq!(
        store.head().await.unwrap(),
        Position(total),
        "no gaps, nothing else"
    );
    assert_sound(store).await;
}

async fn run_under_faults<F>(url: &str, faults: impl FnOnce(watch::Receiver<Position>) -> F)
where
    F: Future<Output = ()>,
{
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    let mut stores = Vec::new();
    for process in 0..2 {
        let store = Store::open(url).await.unwrap();
        stores.push(store.clone());
        for writer in 0..4 {
            let name = format!("e{writer}-{process}");
            let writing = append_until(store.clone(), name.clone(), stop.clone());
            writers.push((name, tokio::spawn(writing)));
        }
    }
    let run = async {
        faults(stores[0].head_watch()).await;
        stop.store(true, Ordering::Relaxed);
        let mut acknowledged = BTreeMap::new();
        for (name, writer) in writers {
            acknowledged.insert(name, writer.await.unwrap());
        }
        assert_all_present(&stores[1], &acknowledged).await;
    };
    tokio::time::timeout(HANGS, run)
        .await
        .expect("it never converged");
}

async fn wait_for_growth(head: &mut watch::Receiver<Position>) {
    let from = head.borrow().0;
    head.wait_for(|head| head.0 > from + 100).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_commit_is_lost_or_duplicated_when_connections_are_killed() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let mut killer = database.connect().await;
    run_under_faults(&database.url(), |mut head| async move {
        for _ in 0..8 {
            wait_for_growth(&mut head).await;
            let killing = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE application_name = 'penstock' AND datname = current_database()";
            sqlx::query(killing).execute(&mut killer).await.unwrap();
        }
        wait_for_growth(&mut head).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_commit_is_lost_or_duplicated_when_the_server_is_killed() {
    if skipped() {
        return;
    }
    // It must outlive the checks.
    let (server, url) = dedicated_server().await;
    let server = Arc::new(server);
    let killed = server.clone();
    let database = PostgresDatabase::on(&url, "").await;
    run_under_faults(&database.url(), |mut head| async move {
        for _ in 0..3 {
            wait_for_growth(&mut head).await;
            let server = killed.clone();
            let restarting = tokio::task::spawn_blocking(move || {
                server.kill();
                server.restart();
            });
            restarting.await.unwrap();
        }
        wait_for_growth(&mut head).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_database_is_refused_and_an_unreachable_server_is_transient() {
    if skipped() {
        return;
    }
    let (_server, url) = dedicated_server().await;
    let nowhere = url.replace("/postgres", "/nobody_made_this");
    assert_ne!(nowhere, url);
    let refused = Store::open(&nowhere).await.err().unwrap();
    assert!(matches!(refused, StoreError::Refused(_)), "{refused}");
    assert!(
        refused.to_string().contains("nobody_made_this"),
        "{refused}"
    );
    // Nothing listens on port 1.
    let away = Store::open("postgres://penstock@127.0.0.1:1/penstock").await;
    let away = away.err().unwrap();
    assert!(matches!(away, StoreError::Database(_)), "{away}");
}

#[tokio::test]
async fn damage_is_reported_in_the_words_of_postgresql_with_advice_for_it() {
    if skipped() {
        return;
    }
    let db = TestDatabase::Postgres(PostgresDatabase::new().await);
    let store = db.open().await;
    fill(&store, "iris", 3).await;
    let words = "invalid page in block 7 of relation base/16384/16402";
    let damage = format!(
        "ALTER TABLE rows RENAME TO undamaged_rows; \
         CREATE FUNCTION damaged() RETURNS BIGINT LANGUAGE plpgsql AS \
         $$ BEGIN RAISE '{words}' USING ERRCODE = 'data_corrupted'; END $$; \
         CREATE VIEW rows AS SELECT 'things' AS model, 'a' AS key, '' AS endpoint, '' AS deployment, \
         damaged() AS position, 0::BIGINT AS time, '' AS doc"
    );
    db.run(&damage).await;
    let problems = verify(&store, &mut NoRows, &["things"])
        .await
        .unwrap()
        .problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    for part in [
        words,
        "all events, up to position 3, can be read",
        "PostgreSQL's log",
        "--store postgres://HOST/NEW",
    ] {
        assert!(problems[0].contains(part), "{part}: {problems:?}");
    }
    assert!(!problems[0].contains("sqlite:"), "{problems:?}");
}

#[tokio::test]
async fn a_page_reads_only_its_events_even_without_statistics() {
    if skipped() {
        return;
    }
    let database = PostgresDatabase::new().await;
    let store = Store::open(&database.url()).await.unwrap();
    fill(&store, "iris", 1).await;
    let mut connection = database.connect().await;
    let many = "ALTER TABLE events SET (autovacuum_enabled = false); \
                INSERT INTO events SELECT n, n - 1, bucket, stream, n, 'e' || n, type, type_version, time, actor, data, \
                prev_hash FROM events, generate_series(2, 50000) AS n";
    sqlx::raw_sql(many).execute(&mut connection).await.unwrap();
    let query = PageQuery {
        bucket: None,
        after: Position::START,
        through: Position(50_000),
        excluded_kinds: &[StreamKind::Usage],
        slices_from: Timestamp::MIN,
        limit: 100,
    };
    let page = store.page_reader().read(&query).await.unwrap();
    assert_eq!(page.decode().await.unwrap().len(), 100);
    store.close().await;
    // Connections report what they read at their end.
    let open = "SELECT COUNT(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
                AND datname = current_database() AND pid <> pg_backend_pid()";
    let closed = async {
        let count = async |connection: &mut sqlx::PgConnection| {
            let count = sqlx::query_scalar::<_, i64>(open).fetch_one(connection);
            count.await.unwrap()
        };
        while count(&mut connection).await > 0 {}
    };
    tokio::time::timeout(HANGS, closed).await.unwrap();
    let read = sqlx::query_scalar::<_, i64>(
        "SELECT (seq_tup_read + idx_tup_fetch)::BIGINT FROM pg_stat_user_tables WHERE relname = 'events'",
    );
    let read = read.fetch_one(&mut connection).await.unwrap();
    assert!((100..1000).contains(&read), "{read} rows read");
}
