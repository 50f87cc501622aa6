//! A store with damaged pages: what a start and `penstock store` say about it, and how it recovers.

use std::path::Path;
use std::process::{Command, Output};

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

use crate::support::{DataFolder, Penstock, eventually};

const PAGE: usize = 4096;

/// Overwrites the first page of a table's content in a stopped store.
async fn damage(folder: &DataFolder, table: &str) {
    let file = folder.path().join("penstock.db");
    let options = SqliteConnectOptions::new().filename(&file);
    let mut connection = options.connect().await.unwrap();
    let root = sqlx::query_scalar("SELECT rootpage FROM sqlite_master WHERE name = $1");
    let root: i64 = root.bind(table).fetch_one(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let page = first_leaf(&bytes, root as usize);
    assert_ne!(page, root as usize, "`{table}` has only one page");
    bytes[(page - 1) * PAGE..page * PAGE].fill(0);
    std::fs::write(&file, bytes).unwrap();
}

/// The number of a table's first leaf; <https://sqlite.org/fileformat2.html#b_tree_pages>.
fn first_leaf(bytes: &[u8], page: usize) -> usize {
    const INTERIOR: u8 = 5;
    let page_bytes = &bytes[(page - 1) * PAGE..page * PAGE];
    if page_bytes[0] != INTERIOR {
        return page;
    }
    let cell = usize::from(u16::from_be_bytes([page_bytes[12], page_bytes[13]]));
    let child = page_bytes[cell..cell + 4].try_into().unwrap();
    first_leaf(bytes, u32::from_be_bytes(child) as usize)
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_penstock"))
        .args(arguments)
        .arg("--data")
        .arg(folder)
        .env_remove("PENSTOCK_STORE")
        .env_remove("PENSTOCK_ARCHIVE")
        .output()
        .unwrap()
}

/// Runs a command that must fail with these parts in its message.
fn assert_fails(folder: &DataFolder, arguments: &[&str], parts: &[&str]) {
    let output = run(folder.path(), arguments);
    let text = [output.stderr, output.stdout].concat();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
    for part in parts {
        assert!(text.contains(part), "{arguments:?}: {part}: {text}");
    }
    assert!(!text.contains("events verify"), "{arguments:?}: {text}");
}

const SERVE: &[&str] = &[
    "serve",
    "--control-addr",
    "127.0.0.1:0",
    "--gateway-addr",
    "127.0.0.1:0",
];

/// A stopped server with an endpoint.
async fn stopped() -> DataFolder {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    penstock.deploy("roses", "red", 1).await;
    penstock.stop().await;
    folder
}

#[tokio::test]
async fn a_damaged_log_is_located_by_every_command_that_needs_no_server() {
    let folder = stopped().await;
    damage(&folder, "events").await;
    let backup = folder.path().join("backup.db").display().to_string();
    let parts = [
        "penstock.db is damaged (",
        "no event before the damage can be read, those between 0 and ",
        "store rebuild --from BACKUP",
    ];
    for arguments in [
        &["store", "verify"][..],
        &["store", "hash"],
        &["store", "rebuild"],
        &["store", "backup", &backup],
    ] {
        assert_fails(&folder, arguments, &parts);
    }
    assert_fails(&folder, SERVE, &parts);
}

#[tokio::test]
async fn damaged_read_models_are_rebuilt_from_the_intact_log() {
    let folder = stopped().await;
    damage(&folder, "rows").await;
    let parts = [
        "penstock.db is damaged (",
        "all events, up to position ",
        "`rows`",
        "The log is intact",
        "store rebuild",
    ];
    assert_fails(&folder, SERVE, &parts);
    assert_fails(&folder, &["store", "verify"], &parts);
    let rebuilt = run(folder.path(), &["store", "rebuild"]);
    assert!(rebuilt.status.success(), "{rebuilt:?}");
    let verified = run(folder.path(), &["store", "verify"]);
    assert!(verified.status.success(), "{verified:?}");
    let penstock = Penstock::start(&folder).await;
    penstock.until_ready_instances("iris", "blue", 1).await;
    penstock.verify().await;
    penstock.stop().await;
}

#[tokio::test]
async fn a_truncated_write_ahead_log_is_reported_until_the_loss_is_accepted() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let saved = folder.path().join("penstock.db.heads.json");
    let head = penstock.get("/v1/events?after=0&limit=500").await["head"].clone();
    // The heads are saved while the server runs.
    eventually("saved heads up to the head", || async {
        let text = std::fs::read_to_string(&saved).ok()?;
        let heads: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut items = heads["items"].as_array().unwrap().iter();
        items
            .any(|item| item["position"].as_u64() >= head.as_u64())
            .then_some(())
    })
    .await;
    penstock.kill().await;
    let wal = folder.path().join("penstock.db-wal");
    let bytes = std::fs::read(&wal).unwrap();
    std::fs::write(&wal, &bytes[..bytes.len() / 2]).unwrap();

    let penstock = Penstock::start(&folder).await;
    let (ready, log) = (penstock.get("/readyz").await.to_string(), penstock.log());
    let report = penstock.get("/v1/events/verify").await;
    let problems = report["problems"].as_array().unwrap().clone();
    for text in [&ready, &log] {
        assert!(text.contains("penstock.db has lost events"), "{text}");
        assert!(text.contains("penstock.db.heads.json"), "{text}");
    }
    let recorded =
        |problem: &serde_json::Value| problem.as_str().unwrap().contains("recorded as the head");
    assert!(problems.iter().any(recorded), "{report:#}");

    std::fs::remove_file(&saved).unwrap();
    eventually("readiness without the warning", || async {
        let ready = penstock.get("/readyz").await.to_string();
        (!ready.contains("lost events")).then_some(())
    })
    .await;
    penstock.verify().await;
    penstock.stop().await;
}

#[tokio::test]
async fn saved_heads_that_cannot_be_read_are_not_taken_for_lost_events() {
    let folder = stopped().await;
    std::fs::write(folder.path().join("penstock.db.heads.json"), "").unwrap();
    let penstock = Penstock::start(&folder).await;
    let (ready, log) = (penstock.get("/readyz").await.to_string(), penstock.log());
    for text in [&ready, &log] {
        let is_said = text.contains("penstock.db.heads.json cannot be read: it is empty");
        assert!(is_said, "{text}");
    }
    assert!(!log.contains("does not contain"), "{log}");
    penstock.stop().await;
}
