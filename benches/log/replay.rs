//! Replay of a long log from the embedded store.

use std::path::Path;
use std::time::Instant;

use contract::ids::Position;
use control::ViewsProjector;
use domain::views::MODELS;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};
use store::{Store, rebuild, verify};

use crate::table::{Bar, Measurement};
use crate::{Options, history};

/// Rebuilds take long, so there are fewer rounds.
const REBUILDS_MAX: usize = 3;

pub async fn both(options: &Options) -> [Measurement; 2] {
    let path = options.path("replay.db");
    let url = format!("sqlite:{}", path.display());
    let store = Store::open(&url).await.unwrap();
    let events = history::write(&store, options.replay).await;
    let mut memory = Vec::new();
    for _ in 0..options.rounds {
        memory.push(into_memory(&store, events).await);
    }
    store.close().await;
    let (mut models, mut rows) = (Vec::new(), 0);
    for _ in 0..options.rounds.min(REBUILDS_MAX) {
        drop_rows(&path).await;
        let store = Store::open(&url).await.unwrap();
        let started = Instant::now();
        rows = rebuild(&store, &mut ViewsProjector::for_rebuild(), MODELS)
            .await
            .unwrap();
        models.push(events as f64 / started.elapsed().as_secs_f64());
        store.close().await;
    }
    check(&url).await;
    [
        line("replay into memory".to_owned(), memory, 150_000.0),
        line(
            format!("replay into {rows} rows of read models"),
            models,
            50_000.0,
        ),
    ]
}

fn line(what: String, ours: Vec<f64>, bar: f64) -> Measurement {
    Measurement {
        what,
        ours,
        against: Bar::Absolute(bar),
    }
}

async fn into_memory(store: &Store, events: u64) -> f64 {
    let started = Instant::now();
    let mut read = 0_u64;
    let mut replay = store.replay(Position::START);
    while let Some(page) = replay.next().await {
        read += page.unwrap().len() as u64;
    }
    assert_eq!(read, events);
    events as f64 / started.elapsed().as_secs_f64()
}

/// Drops all rows and cursors before a rebuild.
async fn drop_rows(path: &Path) {
    let options = SqliteConnectOptions::new().filename(path);
    let mut connection = options.connect().await.unwrap();
    for text in [
        "DELETE FROM rows",
        "DELETE FROM cursors",
        "PRAGMA wal_checkpoint(TRUNCATE)",
    ] {
        sqlx::query(text).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
}

/// Asserts that the rebuilt rows are correct.
async fn check(url: &str) {
    let store = Store::open(url).await.unwrap();
    let mut projector = ViewsProjector::default();
    let report = verify(&store, &mut projector, MODELS).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    store.close().await;
}
