//! Failing starts: the process reports why and exits, whatever has been started by then.

use std::net::TcpListener;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::support::{DataFolder, PATIENCE};

/// `penstock serve` with a port for control; the gateway, which starts before it, has a free one.
fn serve(folder: &DataFolder, control: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    command
        .args(["serve", "--gateway-addr", "127.0.0.1:0", "--control-addr"])
        .arg(control)
        .arg("--data")
        .arg(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn run_to_end(mut command: Command) -> Output {
    let output = command.spawn().unwrap().wait_with_output();
    tokio::time::timeout(PATIENCE, output)
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test]
async fn a_port_in_use_fails_the_start_with_a_message() {
    let folder = DataFolder::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run_to_end(serve(&folder, &address)).await;
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains(&format!("cannot listen on {address}")),
        "{errors}"
    );
    assert_eq!(errors.matches("already in use").count(), 1, "{errors}");
    assert!(errors.contains("--control-addr"), "{errors}");
}

#[tokio::test]
async fn a_separate_control_warns_about_missing_secrets_at_startup() {
    let folder = DataFolder::new();
    let mut process = serve(&folder, "127.0.0.1:0")
        // Nothing listens there, so the start gets no further.
        .args(["--services", "control"])
        .args(["--bus", "kafka://127.0.0.1:1/penstock"])
        .args(["--store", "postgres://penstock@127.0.0.1:1/penstock"])
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
    let mut warnings = Vec::new();
    let two = async {
        while warnings.len() < 2 {
            let line = lines.next_line().await.unwrap().unwrap();
            if line.contains("WARN") {
                warnings.push(line);
            }
        }
    };
    tokio::time::timeout(PATIENCE, two).await.unwrap();
    assert!(warnings[0].contains("--internal-token"), "{warnings:?}");
    assert!(warnings[1].contains("--seal-key"), "{warnings:?}");
    process.kill().await.unwrap();
}

#[tokio::test]
async fn sigterm_in_the_middle_of_a_start_ends_it() {
    let folder = DataFolder::new();
    let mut process = serve(&folder, "127.0.0.1:0").spawn().unwrap();
    // The lock is taken early during startup.
    while !folder.path().join("lock").exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let id = process.id().unwrap().to_string();
    let status = std::process::Command::new("kill")
        .args(["-TERM", &id])
        .status();
    assert!(status.unwrap().success());
    let ended = tokio::time::timeout(PATIENCE, process.wait())
        .await
        .unwrap();
    assert!(ended.unwrap().success());
}
