//! The command line client against a real server.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use contract::time::Timestamp;

use crate::support::{DataFolder, Penstock, eventually};

/// The output of a client command, which must succeed.
async fn printed(penstock: &Penstock, arguments: &[&str]) -> String {
    let output = penstock.cli(arguments).await;
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {err}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn logs_show_when_a_line_was_first_seen_and_since_agrees() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let before = Timestamp::from_millis(chrono::Utc::now().timestamp_millis());
    penstock.deploy("iris", "blue", 1).await;
    let stamped = ["logs", "iris/blue", "--timestamps"];
    let text = eventually("a line of output", || async {
        let text = printed(&penstock, &stamped).await;
        (!text.is_empty()).then_some(text)
    })
    .await;
    let plain = printed(&penstock, &["logs", "iris/blue"]).await;
    for (stamped, plain) in text.lines().zip(plain.lines()) {
        let (time, rest) = stamped.split_once(' ').unwrap();
        let time: Timestamp = time.strip_prefix('~').unwrap().parse().unwrap();
        assert!(time >= before, "{stamped}");
        assert_eq!(rest, plain);
    }
    let since = before.to_string();
    let since_before = [&stamped[..], &["--since", &since]].concat();
    assert_eq!(
        printed(&penstock, &since_before).await.lines().count(),
        text.lines().count()
    );
    let later = "2999-01-01T00:00:00Z";
    let since_later = [&stamped[..], &["--since", later]].concat();
    assert_eq!(printed(&penstock, &since_later).await, "");
}

#[tokio::test]
async fn the_client_alone_shows_the_same_tables() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let listing = ["get", "endpoints"];
    let output = penstock.client_alone(&listing).await;
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{err}");
    let table = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<&str> = table.lines().collect();
    assert_eq!(rows.len(), 2, "{table}");
    assert!(
        rows[0].starts_with("NAME") && rows[1].starts_with("iris"),
        "{table}"
    );
    assert_eq!(printed(&penstock, &listing).await, table);
}

/// The exit code and the error message of a failing command.
async fn failure(penstock: &Penstock, arguments: &[&str]) -> (i32, String) {
    let output = penstock.cli(arguments).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{arguments:?}");
    let err = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), err)
}

#[tokio::test]
async fn a_list_for_a_missing_endpoint_fails_like_the_endpoint_itself() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let expected = failure(&penstock, &["get", "endpoint", "nosuch"]).await;
    assert!(expected.1.contains("no endpoint `nosuch`"), "{expected:?}");
    for words in [
        &["decisions", "nosuch"][..],
        &["decisions", "nosuch/x"],
        &["decisions", "nosuch", "-o", "json"],
        &["get", "decisions", "nosuch"],
        &["get", "instances", "nosuch"],
        &["get", "instances", "nosuch/x"],
        &["get", "deployments", "nosuch"],
        &["top", "nosuch", "--once"],
    ] {
        assert_eq!(failure(&penstock, words).await, expected, "{words:?}");
    }
    let (code, message) = failure(&penstock, &["decisions", "iris/nosuch"]).await;
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("no deployment `iris/nosuch`"), "{message}");
}

#[tokio::test]
async fn a_gateway_in_place_of_the_control_api_is_detected() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    for words in [
        &["get", "endpoints"][..],
        &["get", "endpoint", "iris"],
        &["delete", "endpoint", "iris"],
        &["logs", "iris/blue", "--follow"],
    ] {
        let words = [words, &["--server", &penstock.gateway]].concat();
        let (code, message) = failure(&penstock, &words).await;
        assert_eq!(code, 3, "{words:?}: {message}");
        for word in [&penstock.gateway, "gateway", "client.json", "--server"] {
            assert!(message.contains(word), "{words:?}: no {word} in {message}");
        }
    }
}

#[tokio::test]
async fn a_replaced_instance_is_listed_only_with_all() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let first = penstock.instances("iris", "blue", "ready").await;
    let (id, pid) = (first[0]["id"].as_str().unwrap(), &first[0]["pid"]);
    let killed = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status();
    assert!(killed.unwrap().success());
    eventually("a replacement", || async {
        let ready = penstock.instances("iris", "blue", "ready").await;
        ready
            .iter()
            .any(|instance| instance["id"] != id)
            .then_some(())
    })
    .await;
    let listed = printed(&penstock, &["get", "instances", "iris/blue"]).await;
    assert!(!listed.contains(id) && listed.contains("ready"), "{listed}");
    let all = printed(&penstock, &["get", "instances", "iris/blue", "--all"]).await;
    assert!(all.contains(id), "{all}");
    let one = printed(&penstock, &["get", "instances", id]).await;
    assert!(one.contains(id) && one.contains("failed"), "{one}");
}
