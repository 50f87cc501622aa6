//! How `penstock serve` ends, by which signals, what becomes of instances and data, and how the next one goes
//! on.

use crate::support::{DataFolder, Penstock, eventually};

/// Runs a program on a terminal of its own, which closes when this script is killed. SIGHUP is not ignored
/// there, even if it is for the tests.
const TERMINAL: &str = "import pty, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); pty.spawn(sys.argv[1:])";

/// Runs a program that does not ignore SIGHUP, even if the tests do.
const HEEDING_SIGHUP: &str = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])";

fn log(folder: &DataFolder) -> String {
    std::fs::read_to_string(folder.path().join("serve.log")).unwrap()
}

#[tokio::test]
async fn closing_the_terminal_ends_the_instances_too() {
    let folder = DataFolder::new();
    let penstock = Penstock::start_through(&folder, "python3", &["-c", TERMINAL]).await;
    penstock.deploy("iris", "blue", 2).await;
    penstock.kill().await;
    eventually("the instances to end", || async {
        folder.instance_processes().is_empty().then_some(())
    })
    .await;
    // It has left the data folder, and recorded that it stopped them.
    let penstock = eventually_started(&folder).await;
    eventually("both to be recorded as stopped", || async {
        let stopped = penstock.instances("iris", "blue", "stopped").await;
        (stopped.len() == 2).then_some(())
    })
    .await;
    penstock.verify().await;
}

/// Starts once the previous process has left the data folder.
async fn eventually_started(folder: &DataFolder) -> Penstock {
    eventually("the data folder to be free", || async {
        let lock = std::fs::File::open(folder.path().join("lock"));
        let is_free = lock.map_or(true, |lock| lock.try_lock().is_ok());
        is_free.then_some(())
    })
    .await;
    Penstock::start(folder).await
}

#[tokio::test]
async fn sighup_ends_it_like_sigterm() {
    let folder = DataFolder::new();
    let penstock = Penstock::start_through(&folder, "python3", &["-c", HEEDING_SIGHUP]).await;
    penstock.deploy("iris", "blue", 1).await;
    assert!(penstock.stop_by("-HUP").await.success());
    assert_eq!(folder.instance_processes(), Vec::<u32>::new());
}

#[tokio::test]
async fn an_ignored_sighup_stays_ignored() {
    let folder = DataFolder::new();
    let script = "trap '' HUP; exec \"$0\" \"$@\"";
    let penstock = Penstock::start_through(&folder, "sh", &["-c", script]).await;
    penstock.signal("-HUP");
    penstock.deploy("iris", "blue", 1).await;
    assert!(penstock.stop().await.success());
}

#[tokio::test]
async fn ctrl_c_says_what_became_of_instances_and_data() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 2).await;
    assert!(penstock.stop_by("-INT").await.success());
    let text = log(&folder);
    assert!(text.contains("ended the instances of this node"), "{text}");
    assert!(text.contains("\"ended\":2,\"left\":0"), "{text}");
    assert!(text.contains("all data is kept"), "{text}");
}

#[tokio::test]
async fn ctrl_c_says_that_instances_keep_running_if_they_do() {
    let folder = DataFolder::new();
    let penstock = Penstock::start_with(&folder, &["--keep-instances"]).await;
    penstock.deploy("iris", "blue", 2).await;
    assert!(penstock.stop_by("-INT").await.success());
    let text = log(&folder);
    assert!(
        text.contains("leaving the instances of this node running"),
        "{text}"
    );
    assert!(text.contains("\"running\":2"), "{text}");
    assert_eq!(folder.instance_processes().len(), 2);
}

#[tokio::test]
async fn a_killed_server_serves_every_endpoint_once_it_is_ready() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 1).await;
    let key = penstock.key("iris").await;
    penstock.kill().await;
    // As if it had been killed before its gateway saved them.
    let _ = std::fs::remove_file(folder.path().join("gateway-routes.json"));
    let penstock = Penstock::start(&folder).await;
    assert_eq!(
        penstock.score("iris", &key).send().await.unwrap().status(),
        200
    );
}

fn forget_node(folder: &DataFolder) {
    std::fs::remove_file(folder.path().join("node")).unwrap();
}

#[tokio::test]
async fn a_node_whose_file_is_gone_keeps_what_it_runs() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 2).await;
    let key = penstock.key("iris").await;
    let before = folder.instance_processes();
    penstock.kill().await;
    forget_node(&folder);
    let penstock = Penstock::start(&folder).await;
    penstock.until_ready_instances("iris", "blue", 2).await;
    assert_eq!(
        penstock.score("iris", &key).send().await.unwrap().status(),
        200
    );
    assert_eq!(folder.instance_processes(), before);
}

#[tokio::test]
async fn a_new_node_id_takes_over_what_the_former_one_ran_at_once() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 2).await;
    let former = penstock.instances("iris", "blue", "ready").await[0]["node"].clone();
    assert!(penstock.stop().await.success());
    forget_node(&folder);
    let penstock = Penstock::start(&folder).await;
    penstock.until_ready_instances("iris", "blue", 2).await;
    eventually(
        "those that the former node ran to be listed as stopped",
        || async {
            let stopped = penstock.instances("iris", "blue", "stopped").await;
            (stopped.len() == 2 && stopped.iter().all(|one| one["node"] == former)).then_some(())
        },
    )
    .await;
    // Nothing more was requested on the former node.
    let all = penstock.get("/v1/instances?endpoint=iris&limit=500").await;
    assert_eq!(all["items"].as_array().unwrap().len(), 4, "{all:#}");
    penstock.verify().await;
}

#[tokio::test]
async fn a_new_node_id_takes_over_what_still_runs() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock.deploy("iris", "blue", 2).await;
    let key = penstock.key("iris").await;
    let before = folder.instance_processes();
    penstock.kill().await;
    std::fs::write(folder.path().join("node"), "node-another\n").unwrap();
    let penstock = Penstock::start(&folder).await;
    eventually("the new node to have the instances", || async {
        let ready = penstock.instances("iris", "blue", "ready").await;
        let are_taken_over = ready.iter().all(|one| one["node"] == "node-another");
        (ready.len() == 2 && are_taken_over).then_some(())
    })
    .await;
    assert_eq!(
        penstock.score("iris", &key).send().await.unwrap().status(),
        200
    );
    assert_eq!(folder.instance_processes(), before);
    penstock.verify().await;
    assert!(penstock.stop().await.success());
    assert_eq!(folder.instance_processes(), Vec::<u32>::new());
}
