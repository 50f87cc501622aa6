//! A server whose oldest events are in archives.

use std::fs;
use std::process::{Command, Output};
use std::time::Duration;

use reqwest::{Method, Response, StatusCode};
use serde_json::json;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

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

/// Checks that a response names the missing file.
async fn unavailable(response: Response) {
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let problem: serde_json::Value = response.json().await.unwrap();
    assert_eq!(problem["code"], "archive-unavailable", "{problem}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(
        detail.contains("archive/1-") && detail.contains("is missing"),
        "{problem}"
    );
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
    // A missing file is named in the error, by the server and without it.
    fs::rename(folder.path().join("archive"), folder.path().join("away")).unwrap();
    for (path, body) in [
        ("/v1/events/verify", json!({"heads": []})),
        ("/v1/events/replay", replay),
    ] {
        let request = penstock.api(Method::POST, path).json(&body);
        unavailable(request.send().await.unwrap()).await;
    }
    let exported = penstock.api(Method::GET, "/v1/events?after=0&limit=5");
    unavailable(exported.send().await.unwrap()).await;
    penstock.stop().await;
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
async fn a_server_does_not_start_with_a_forged_access_token_of_the_archived_log() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    penstock.stop().await;
    assert!(archive(&folder).status.success());
    let file = folder.path().join("penstock.db");
    let mut connection = SqliteConnectOptions::new()
        .filename(file)
        .connect()
        .await
        .unwrap();
    // Only the last event of the stream is still there, and the access of everybody follows from it.
    let forge = "UPDATE events SET data = replace(data, 'hash', 'hAsh') \
                 WHERE stream = 'access/default' RETURNING position";
    let position: i64 = sqlx::query_scalar(forge)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
    let expected = format!("position {position}: the store's copy differs from the archive");
    for arguments in [
        &[
            "serve",
            "--control-addr",
            "127.0.0.1:0",
            "--gateway-addr",
            "127.0.0.1:0",
        ][..],
        &["store", "verify"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_penstock"))
            .args(arguments)
            .arg("--data")
            .arg(folder.path())
            .env_remove("PENSTOCK_STORE")
            .env_remove("PENSTOCK_ARCHIVE")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains(&expected), "{arguments:?}: {said}");
    }
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
