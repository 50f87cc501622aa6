//! How `penstock serve` ends: by which signals, and what becomes of instances and data.

use crate::support::{DataFolder, Penstock, eventually};

/// Runs a program on a terminal of its own, which closes when this script is killed.
const TERMINAL: &str = "import pty, sys; pty.spawn(sys.argv[1:])";

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
    let stopped = penstock.instances("iris", "blue", "stopped").await;
    assert_eq!(stopped.len(), 2, "{stopped:#?}");
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
    let penstock = Penstock::start(&folder).await;
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
