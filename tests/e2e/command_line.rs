//! The command line client against a real server.

use contract::time::Timestamp;

use crate::support::{DataFolder, Penstock, eventually};

/// What the client prints; it must succeed.
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
async fn an_instance_that_was_replaced_is_no_longer_listed_but_with_all() {
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
