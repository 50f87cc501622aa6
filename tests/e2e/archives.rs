//! A server whose oldest events are in archives.

use std::fs;
use std::process::{Command, Output};
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;

use crate::support::{DataFolder, Penstock};

/// Archives everything that no service would resume from.
fn archive(folder: &DataFolder) -> Output {
    Command::new(env!("CARGO_BIN_EXE_penstock"))
        .args(["store", "archive", "--before", "1000000", "-o", "json"])
        .arg("--data")
        .arg(folder.path())
        .env_remove("PENSTOCK_STORE")
        .env_remove("PENSTOCK_ARCHIVE")
        .output()
        .unwrap()
}

#[tokio::test]
async fn a_server_continues_and_verifies_after_its_log_was_archived() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let events = penstock.get("/v1/events?after=0&limit=5").await["items"].clone();
    penstock.stop().await;
    let output = archive(&folder);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["sealed"].as_array().unwrap().len(), 1, "{answer}");

    let penstock = Penstock::start(&folder).await;
    let again = penstock.get("/v1/events?after=0&limit=5").await;
    assert_eq!(again["items"], events);
    penstock.deploy("roses", "blue", 1).await;
    let path = "/v1/endpoints/iris/keys/primary/regenerate";
    penstock.post(path, &json!({})).await;
    let key = penstock.key("roses").await;
    let response = penstock.score("roses", &key).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    penstock.verify().await;
    let replay = json!({"checkDecisions": true});
    let replayed = penstock.post("/v1/events/replay", &replay).await;
    assert_eq!(replayed["ok"], true, "{replayed}");
    penstock.stop().await;
    // A missing file is named in the error.
    fs::rename(folder.path().join("archive"), folder.path().join("away")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_penstock"))
        .args(["store", "hash", "--data"])
        .arg(folder.path())
        .env_remove("PENSTOCK_STORE")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("archive/1-") && said.contains("is missing"),
        "{said}"
    );
}

#[tokio::test]
async fn a_store_that_a_server_holds_is_archived_by_that_server() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let events = penstock.get("/v1/events?after=0&limit=5").await["items"].clone();
    penstock.stop().await;
    // Every service has stored how far it has read.
    let penstock = Penstock::start(&folder).await;
    let output = archive(&folder);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["sealed"].as_array().unwrap().len(), 1, "{answer}");
    assert_eq!(
        fs::read_dir(folder.path().join("archive")).unwrap().count(),
        1
    );
    let again = penstock.get("/v1/events?after=0&limit=5").await;
    assert_eq!(again["items"], events);
    penstock.verify().await;
    penstock.stop().await;
}

#[tokio::test]
async fn a_running_server_archives_on_schedule_what_is_old_enough() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let events = penstock.get("/v1/events?after=0&limit=5").await["items"].clone();
    penstock.stop().await;
    // Every service has stored how far it has read.
    let archiving = ["--archive-after", "0s", "--archive-min-events", "1"];
    let penstock = Penstock::start_with(&folder, &archiving).await;
    let archive = folder.path().join("archive");
    let sealed = async {
        while fs::read_dir(&archive).map_or(0, Iterator::count) == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), sealed)
        .await
        .unwrap();
    let again = penstock.get("/v1/events?after=0&limit=5").await;
    assert_eq!(again["items"], events);
    penstock.verify().await;
    penstock.stop().await;
}
