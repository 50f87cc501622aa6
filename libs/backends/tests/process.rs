//! What is specific to the process backend: real processes, and what happens to them when Penstock is
//! killed.

#![allow(clippy::unwrap_used)]

mod grpc_server;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use backends::logs::{LogLimits, logs};
use backends::process::{Host, ProcessBackend, ProcessConfig, installation_id, node_id};
use backends::{Backend, BackendError, ObservedInstance, ObservedPhase, StartSpec};
use contract::ids::InstanceId;
use contract::resources::{EnvValue, ProbeProtocol};
use contract::time::Span;
use support::{Behaviour, call, is_running, start_spec};
use tokio::sync::mpsc;

#[path = "process/ending.rs"]
mod ending;
#[path = "process/escaped.rs"]
mod escaped;
#[path = "process/places.rs"]
mod places;

#[test]
#[ignore = "the server that other tests start"]
fn the_tiny_server() {
    grpc_server::serve();
    support::serve();
}

/// Far longer than anything takes; reached only if a test fails.
const TIMEOUT: Duration = Duration::from_secs(60);
const GRACE: Span = Span::from_secs(20);

/// Instances for [`penstock_parent`] to start, as JSON.
const STARTS: &str = "PARENT_STARTS";
const DATA: &str = "PARENT_DATA";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the Penstock that other tests kill"]
async fn penstock_parent() {
    let (Ok(data), Ok(starts)) = (std::env::var(DATA), std::env::var(STARTS)) else {
        return;
    };
    let backend = open(Path::new(&data)).await;
    let mut changes = backend.watch();
    let starts: Vec<StartSpec> = serde_json::from_str(&starts).unwrap();
    for start in starts {
        backend.ensure(start).await.unwrap();
    }
    loop {
        let change = changes.recv().await.unwrap();
        println!("{} {:?}", change.id, change.phase);
    }
}

/// A Penstock that can be killed.
struct Parent(Child);

impl Parent {
    fn start(data: &Path, starts: &[StartSpec]) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "penstock_parent", "--ignored", "--nocapture"])
            .env(DATA, data)
            .env(STARTS, serde_json::to_string(starts).unwrap())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Waits until this many instances are ready, then kills it with SIGKILL.
    fn kill_when_ready(mut self, count: usize) {
        self.wait_until_ready(count);
        self.kill();
    }

    fn wait_until_ready(&mut self, count: usize) {
        use std::io::{BufRead, BufReader};
        let output = self.0.stdout.as_mut().unwrap();
        let lines = BufReader::new(output).lines();
        let ready = lines.filter(|line| line.as_ref().unwrap().ends_with(" Ready"));
        assert_eq!(ready.take(count).count(), count);
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn config(data: &Path) -> ProcessConfig {
    ProcessConfig::new(data.into(), "node-1".into(), "/".into())
}

async fn open(data: &Path) -> Arc<ProcessBackend> {
    ProcessBackend::open(config(data)).await.unwrap()
}

async fn until(
    changes: &mut mpsc::Receiver<ObservedInstance>,
    predicate: impl Fn(&ObservedPhase) -> bool,
) -> ObservedInstance {
    let wait = async {
        loop {
            let change = changes.recv().await.unwrap();
            if predicate(&change.phase) {
                return change;
            }
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.unwrap()
}

/// Polls for what is not announced.
async fn eventually(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.unwrap();
}

fn is_ready(phase: &ObservedPhase) -> bool {
    *phase == ObservedPhase::Ready
}

fn is_removed(phase: &ObservedPhase) -> bool {
    matches!(phase, ObservedPhase::Removed { .. })
}

fn reason_of_exit(observed: &ObservedInstance) -> &str {
    match &observed.phase {
        ObservedPhase::Exited { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

fn is_exited(phase: &ObservedPhase) -> bool {
    matches!(phase, ObservedPhase::Exited { .. })
}

/// Starts an instance and waits until it is ready.
async fn started(backend: &ProcessBackend, start: StartSpec) -> ObservedInstance {
    let mut changes = backend.watch();
    backend.ensure(start).await.unwrap();
    until(&mut changes, is_ready).await
}

async fn removed(backend: &ProcessBackend, id: &InstanceId, grace: Span) -> ObservedInstance {
    let mut changes = backend.watch();
    backend.remove(id, 9, grace).await.unwrap();
    until(&mut changes, is_removed).await
}

fn record_path(data: &Path, id: &str) -> PathBuf {
    data.join("instances").join(id).join("record.json")
}

fn record(data: &Path, id: &str) -> serde_json::Value {
    serde_json::from_slice(&fs::read(record_path(data, id)).unwrap()).unwrap()
}

fn pid_of(data: &Path, id: &str) -> u32 {
    record(data, id)["process"]["pid"].as_u64().unwrap() as u32
}

/// Returns all processes of an installation, with the instance from their environment.
fn processes_of(data: &Path) -> BTreeMap<u32, String> {
    let ours = format!("PENSTOCK_INSTALLATION={}", installation_id(data).unwrap());
    let mut processes = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        let text = String::from_utf8_lossy(&environ).into_owned();
        let instance = text
            .split('\0')
            .find_map(|v| v.strip_prefix("PENSTOCK_INSTANCE="));
        if let Some(instance) = instance
            && text.split('\0').any(|value| value == ours)
            && is_running(pid)
        {
            processes.insert(pid, instance.to_owned());
        }
    }
    processes
}

fn grandchild_of(data: &Path, id: &str) -> u32 {
    let log = data.join(format!("logs/iris/blue/{id}.log"));
    let text = fs::read_to_string(log).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("grandchild "));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_healthy_instance_is_adopted_after_penstock_was_killed() {
    let data = tempfile::tempdir().unwrap();
    let starts = ["a-1", "a-2"].map(|id| start_spec(id, 3, &Behaviour::default()));
    Parent::start(data.path(), &starts).kill_when_ready(2);
    let before = ["a-1", "a-2"].map(|id| pid_of(data.path(), id));

    let backend = open(data.path()).await;
    let mut changes = backend.watch();
    let listed = backend.list().await.unwrap();
    let after: Vec<_> = listed.iter().filter_map(|observed| observed.pid).collect();
    assert_eq!(after, before);
    assert!(
        listed
            .iter()
            .all(|o| o.adopted && o.generation == 3 && o.address.is_some())
    );
    until(&mut changes, is_ready).await;
    until(&mut changes, is_ready).await;

    // Starting the same generation again starts nothing.
    backend.ensure(starts[0].clone()).await.unwrap();
    assert_eq!(processes_of(data.path()).len(), 2);
    for start in starts {
        let gone = removed(&backend, &start.id, GRACE).await;
        assert_eq!(gone.phase, ObservedPhase::Removed { code: None });
    }
    assert!(processes_of(data.path()).is_empty());
}

#[tokio::test]
async fn an_adopted_instance_that_ends_is_noticed_and_its_code_is_unknown() {
    let data = tempfile::tempdir().unwrap();
    Parent::start(data.path(), &[start_spec("a-1", 1, &Behaviour::default())]).kill_when_ready(1);
    let backend = open(data.path()).await;
    let mut changes = backend.watch();
    until(&mut changes, is_ready).await;
    let pid = pid_of(data.path(), "a-1").to_string();
    Command::new("kill").args(["-9", &pid]).status().unwrap();
    let exited = until(&mut changes, is_exited).await;
    let ObservedPhase::Exited { code, reason } = exited.phase else {
        unreachable!()
    };
    assert_eq!(code, None);
    assert!(reason.contains("unknown"), "{reason}");
}

#[tokio::test]
async fn an_instance_that_died_with_penstock_is_reported_as_gone() {
    let data = tempfile::tempdir().unwrap();
    Parent::start(data.path(), &[start_spec("a-1", 1, &Behaviour::default())]).kill_when_ready(1);
    let pid = pid_of(data.path(), "a-1");
    Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .unwrap();
    eventually(|| !is_running(pid)).await;
    let backend = open(data.path()).await;
    let listed = backend.list().await.unwrap();
    assert_eq!(
        reason_of_exit(&listed[0]),
        "was gone when Penstock came back"
    );
}

#[tokio::test]
async fn processes_without_a_record_are_ended_at_startup() {
    let data = tempfile::tempdir().unwrap();
    let behaviour = Behaviour::default().with("GRANDCHILD", 1);
    let starts = [
        start_spec("a-1", 1, &behaviour),
        start_spec("a-2", 1, &Behaviour::default()),
    ];
    Parent::start(data.path(), &starts).kill_when_ready(2);
    let pid = pid_of(data.path(), "a-1");
    let grandchild = grandchild_of(data.path(), "a-1");
    fs::remove_dir_all(data.path().join("instances/a-1")).unwrap();
    let backend = open(data.path()).await;
    assert!(!is_running(pid) && !is_running(grandchild));
    assert_eq!(backend.list().await.unwrap().len(), 1);
    removed(&backend, &"a-2".to_owned().into(), GRACE).await;
}

#[tokio::test]
async fn an_instance_whose_start_was_only_partly_recorded_is_adopted() {
    let data = tempfile::tempdir().unwrap();
    Parent::start(data.path(), &[start_spec("a-1", 1, &Behaviour::default())]).kill_when_ready(1);
    let pid = pid_of(data.path(), "a-1");
    let mut record = record(data.path(), "a-1");
    record["phase"] = serde_json::json!({"is": "starting"});
    record["process"] = serde_json::Value::Null;
    record["port"] = serde_json::Value::Null;
    fs::write(record_path(data.path(), "a-1"), record.to_string()).unwrap();
    let backend = open(data.path()).await;
    let mut changes = backend.watch();
    let ready = until(&mut changes, is_ready).await;
    assert_eq!((ready.pid, ready.adopted), (Some(pid), true));
    removed(&backend, &ready.id, GRACE).await;
}

#[tokio::test]
async fn a_start_that_was_recorded_but_not_carried_out_can_be_repeated() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let start = start_spec("a-1", 1, &Behaviour::default());
    started(&backend, start.clone()).await;
    removed(&backend, &start.id, GRACE).await;
    backend.release().await;
    let mut record = record(data.path(), "a-1");
    record["phase"] = serde_json::json!({"is": "starting"});
    record["process"] = serde_json::Value::Null;
    record["generation"] = 1.into();
    fs::write(record_path(data.path(), "a-1"), record.to_string()).unwrap();
    let backend = open(data.path()).await;
    assert!(backend.list().await.unwrap().is_empty());
    started(&backend, start.clone()).await;
    removed(&backend, &start.id, GRACE).await;
}

#[tokio::test]
async fn an_interrupted_removal_is_finished_at_startup() {
    let data = tempfile::tempdir().unwrap();
    Parent::start(data.path(), &[start_spec("a-1", 1, &Behaviour::default())]).kill_when_ready(1);
    let pid = pid_of(data.path(), "a-1");
    let mut record = record(data.path(), "a-1");
    record["phase"] = serde_json::json!({"is": "removing"});
    record["generation"] = 2.into();
    fs::write(record_path(data.path(), "a-1"), record.to_string()).unwrap();
    let backend = open(data.path()).await;
    assert!(!is_running(pid));
    assert!(backend.list().await.unwrap().is_empty());
    let late = backend
        .ensure(start_spec("a-1", 2, &Behaviour::default()))
        .await;
    assert!(matches!(late, Err(BackendError::Stale { newest: 2, .. })));
}

#[tokio::test]
async fn tombstones_outlive_penstock() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    backend
        .remove(&"a-1".to_owned().into(), 5, GRACE)
        .await
        .unwrap();
    backend.release().await;
    let backend = open(data.path()).await;
    let late = backend
        .ensure(start_spec("a-1", 5, &Behaviour::default()))
        .await;
    assert!(matches!(late, Err(BackendError::Stale { newest: 5, .. })));
}

#[tokio::test]
async fn folders_of_removed_instances_go_except_for_the_newest() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    for index in 0..120 {
        let id = format!("a-{index:03}").into();
        backend.remove(&id, 1, GRACE).await.unwrap();
    }
    let folders = || {
        let folder = fs::read_dir(data.path().join("instances")).unwrap();
        folder
            .filter(|entry| entry.as_ref().unwrap().path().is_dir())
            .count()
    };
    eventually(|| folders() == 100).await;
    assert!(!record_path(data.path(), "a-000").exists());
    assert!(record_path(data.path(), "a-119").exists());
}

#[tokio::test]
async fn an_adopted_instance_that_is_not_ready_in_time_is_ended() {
    let data = tempfile::tempdir().unwrap();
    let mut start = start_spec("a-1", 1, &Behaviour::default());
    start.spec.readiness_probe.failure_threshold = 3;
    start.spec.startup_timeout = Some(Span::from_secs(5));
    start.spec.liveness_probe = None;
    Parent::start(data.path(), &[start]).kill_when_ready(1);
    let port = record(data.path(), "a-1")["port"].as_u64().unwrap();
    call(&format!("127.0.0.1:{port}"), "/sick");
    let pid = pid_of(data.path(), "a-1");
    let backend = open(data.path()).await;
    let mut changes = backend.watch();
    let exited = until(&mut changes, is_exited).await;
    assert!(reason_of_exit(&exited).starts_with("not ready after"));
    assert!(!is_running(pid));
}

#[tokio::test]
async fn a_second_penstock_cannot_open_the_same_data_folder() {
    let data = tempfile::tempdir().unwrap();
    let first = open(data.path()).await;
    let refused = ProcessBackend::open(config(data.path())).await;
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("another running Penstock"), "{message}");
    first.release().await;
    open(data.path()).await;
}

#[tokio::test]
async fn a_kill_during_many_starts_orphans_nothing_and_starts_nothing_twice() {
    const ROUNDS: u64 = 8;
    const INSTANCES: usize = 12;
    let data = tempfile::tempdir().unwrap();
    let starts: Vec<_> = (0..INSTANCES)
        .map(|n| start_spec(&format!("a-{n}"), 1, &Behaviour::default()))
        .collect();
    for round in 0..ROUNDS {
        let parent = Parent::start(data.path(), &starts);
        // Spread over the time that all starts take.
        tokio::time::sleep(Duration::from_millis(5 + 23 * round)).await;
        parent.kill();
    }
    let backend = open(data.path()).await;
    let running = processes_of(data.path());
    let pids: BTreeMap<u32, String> = backend
        .list()
        .await
        .unwrap()
        .into_iter()
        .filter_map(|observed| Some((observed.pid?, observed.id.to_string())))
        .collect();
    assert_eq!(running, pids);
    for start in &starts {
        backend.ensure(start.clone()).await.unwrap();
    }
    let after = processes_of(data.path());
    assert_eq!(after.len(), INSTANCES);
    assert!(running.iter().all(|(pid, id)| after.get(pid) == Some(id)));
    let mut changes = backend.watch();
    for start in &starts {
        backend.remove(&start.id, 2, GRACE).await.unwrap();
    }
    for _ in &starts {
        until(&mut changes, is_removed).await;
    }
    assert!(processes_of(data.path()).is_empty());
}

#[tokio::test]
async fn a_removed_instance_leaves_no_process_behind() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let behaviour = Behaviour::default().with("GRANDCHILD", 1);
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let grandchild = grandchild_of(data.path(), "a-1");
    assert!(is_running(grandchild));
    removed(&backend, &ready.id, GRACE).await;
    assert!(!is_running(grandchild) && !is_running(ready.pid.unwrap()));
}

#[tokio::test]
async fn processes_left_behind_by_an_instance_are_ended_too() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let behaviour = Behaviour::default()
        .with("GRANDCHILD", 1)
        .with("EXIT_AFTER_MS", 300)
        .with("EXIT_CODE", 5);
    let mut changes = backend.watch();
    backend
        .ensure(start_spec("a-1", 1, &behaviour))
        .await
        .unwrap();
    let exited = until(&mut changes, is_exited).await;
    assert_eq!(reason_of_exit(&exited), "exited with code 5");
    assert!(!is_running(grandchild_of(data.path(), "a-1")));
}

#[tokio::test]
async fn an_instance_that_ignores_sigterm_is_killed_after_the_grace_period() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let behaviour = Behaviour::default().with("IGNORE_TERM", 1);
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let gone = removed(&backend, &ready.id, Span::from_millis(100)).await;
    assert_eq!(gone.phase, ObservedPhase::Removed { code: None });
    assert!(!is_running(ready.pid.unwrap()));
}

#[tokio::test]
async fn an_instance_listens_on_the_advertised_host_and_keeps_its_address_when_that_changes() {
    let data = tempfile::tempdir().unwrap();
    let mut elsewhere = config(data.path());
    elsewhere.host = Host::advertised("127.0.0.2").unwrap();
    let backend = ProcessBackend::open(elsewhere).await.unwrap();
    let start = start_spec("a-1", 1, &Behaviour::default());
    let ready = started(&backend, start.clone()).await;
    let address = ready.address.unwrap();
    assert!(address.starts_with("127.0.0.2:"), "{address}");
    call(&address, "/");
    backend.release().await;
    drop(backend);

    let backend = open(data.path()).await;
    let mut changes = backend.watch();
    // It is probed where it listens, even though the node now advertises another host.
    let adopted = until(&mut changes, is_ready).await;
    assert_eq!(adopted.address, Some(address));
    removed(&backend, &start.id, GRACE).await;
}

#[tokio::test]
async fn an_instance_that_listens_on_loopback_alone_is_not_ready_on_another_host() {
    let data = tempfile::tempdir().unwrap();
    let mut elsewhere = config(data.path());
    elsewhere.host = Host::advertised("127.0.0.2").unwrap();
    let backend = ProcessBackend::open(elsewhere).await.unwrap();
    let mut start = start_spec("a-1", 1, &Behaviour::default().with("HOST", "127.0.0.1"));
    start.spec.startup_timeout = Some(Span::from_secs(1));
    let mut changes = backend.watch();
    backend.ensure(start).await.unwrap();
    let ended = until(&mut changes, is_exited).await;
    let reason = reason_of_exit(&ended);
    assert!(reason.contains("must listen on {host}"), "{reason}");
}

#[tokio::test]
async fn an_instance_whose_liveness_probe_fails_is_reported_and_runs_until_its_removal() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let ready = started(&backend, start_spec("a-1", 1, &Behaviour::default())).await;
    let mut changes = backend.watch();
    call(ready.address.as_ref().unwrap(), "/sick");
    let reported = async {
        loop {
            if let Some(reason) = changes.recv().await.unwrap().unhealthy {
                return reason;
            }
        }
    };
    let reason = tokio::time::timeout(TIMEOUT, reported).await.unwrap();
    let expected = "its liveness probe `/live` failed 5 times in a row; the last: it answered 500";
    assert_eq!(reason, expected);
    assert!(is_running(ready.pid.unwrap()));
    removed(&backend, &ready.id, GRACE).await;
}

#[tokio::test]
async fn an_instance_without_a_liveness_probe_is_not_probed_for_it() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 1, &Behaviour::default());
    start.spec.liveness_probe = None;
    start.spec.readiness_probe.failure_threshold = 10;
    let ready = started(&backend, start).await;
    let mut changes = backend.watch();
    call(ready.address.as_ref().unwrap(), "/sick");
    let unready = until(&mut changes, |phase| {
        matches!(phase, ObservedPhase::Unready { .. })
    })
    .await;
    assert_eq!(unready.unhealthy, None);
    assert!(is_running(ready.pid.unwrap()));
}

#[tokio::test]
async fn an_instance_whose_readiness_probe_fails_is_unready_and_keeps_running() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 1, &Behaviour::default());
    start.spec.readiness_probe.failure_threshold = 3;
    start.spec.liveness_probe = None;
    let ready = started(&backend, start).await;
    let mut changes = backend.watch();
    call(ready.address.as_ref().unwrap(), "/sick");
    until(&mut changes, |phase| {
        matches!(phase, ObservedPhase::Unready { .. })
    })
    .await;
    assert!(is_running(ready.pid.unwrap()));
    removed(&backend, &ready.id, GRACE).await;
}

#[tokio::test]
async fn an_instance_that_is_not_ready_in_time_is_ended() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 1, &Behaviour::default().with("FAIL_READINESS", 1));
    start.spec.startup_timeout = Some(Span::from_millis(400));
    let mut changes = backend.watch();
    backend.ensure(start).await.unwrap();
    let exited = until(&mut changes, is_exited).await;
    let reason = reason_of_exit(&exited);
    // Depending on how fast it starts, it answers before the end, or its port is still closed.
    assert!(
        reason.starts_with("not ready after 400ms (`startupTimeout`): "),
        "{reason}"
    );
    assert!(processes_of(data.path()).is_empty());
}

#[tokio::test]
async fn a_start_may_take_longer_than_readiness_probes_may_fail() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 1, &Behaviour::default().with("START_DELAY_MS", 1000));
    start.spec.readiness_probe.failure_threshold = 3;
    let ready = started(&backend, start).await;
    removed(&backend, &ready.id, GRACE).await;
}

/// The first thing that an instance is reported to wait for.
async fn progress(backend: &ProcessBackend, start: StartSpec) -> String {
    let mut changes = backend.watch();
    backend.ensure(start).await.unwrap();
    let reported = async {
        loop {
            let observed = changes.recv().await.unwrap();
            if let Some(progress) = observed.progress {
                assert_eq!(observed.phase, ObservedPhase::Starting);
                return progress;
            }
        }
    };
    tokio::time::timeout(TIMEOUT, reported).await.unwrap()
}

#[tokio::test]
async fn an_instance_whose_port_stays_closed_is_reported_to_be_starting() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let start = start_spec(
        "a-1",
        1,
        &Behaviour::default().with("START_DELAY_MS", 60_000),
    );
    let progress = progress(&backend, start).await;
    let port = record(data.path(), "a-1")["port"].as_u64().unwrap();
    assert_eq!(progress, format!("port {port} is closed"));
    removed(&backend, &InstanceId::from("a-1".to_owned()), Span::ZERO).await;
}

#[tokio::test]
async fn a_probe_path_that_does_not_exist_is_reported_with_what_to_set() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 1, &Behaviour::default());
    start.spec.readiness_probe.path = "/missing".into();
    let progress = progress(&backend, start).await;
    let expected = "probe `/missing` answers 404: set `readinessProbe.path`";
    assert_eq!(progress, expected);
    removed(&backend, &InstanceId::from("a-1".to_owned()), Span::ZERO).await;
}

#[tokio::test]
async fn a_tcp_probe_needs_only_an_open_port() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 1, &Behaviour::default().with("FAIL_READINESS", 1));
    start.spec.readiness_probe.protocol = ProbeProtocol::Tcp;
    start.spec.liveness_probe = None;
    let ready = started(&backend, start).await;
    removed(&backend, &ready.id, GRACE).await;
}

#[tokio::test]
async fn a_grpc_probe_asks_for_the_health_of_the_service() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 1, &Behaviour::default().with("GRPC_SERVICE", "iris"));
    start.spec.readiness_probe.protocol = ProbeProtocol::Grpc;
    start.spec.readiness_probe.service = "iris".into();
    start.spec.liveness_probe = None;
    let ready = started(&backend, start.clone()).await;
    removed(&backend, &ready.id, GRACE).await;
    start.id = InstanceId::from("a-2".to_owned());
    start.spec.readiness_probe.service = "rose".into();
    start.spec.startup_timeout = Some(Span::from_secs(2));
    let mut changes = backend.watch();
    backend.ensure(start).await.unwrap();
    let exited = until(&mut changes, is_exited).await;
    let reason = reason_of_exit(&exited);
    assert!(reason.contains("knows no service `rose`"), "{reason}");
}

#[tokio::test]
async fn a_missing_program_is_reported_and_cannot_be_started() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut changes = backend.watch();
    let mut start = start_spec("a-1", 1, &Behaviour::default());
    start.spec.command = vec!["./no-such-program".into()];
    let refused = backend.ensure(start.clone()).await.unwrap_err();
    assert!(matches!(refused, BackendError::CannotStart { .. }));
    let message = refused.to_string();
    assert!(
        message.contains("no-such-program") && message.contains("spec.command"),
        "{message}"
    );
    assert!(is_exited(&until(&mut changes, is_exited).await.phase));
    removed(&backend, &start.id, GRACE).await;
}

#[tokio::test]
async fn ids_that_would_leave_the_data_folder_are_refused() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    for bad in ["../../etc", "", ".", "a/b", "-rf"] {
        let refused = backend
            .ensure(start_spec(bad, 1, &Behaviour::default()))
            .await;
        assert!(
            matches!(refused, Err(BackendError::CannotStart { .. })),
            "{bad}"
        );
        assert!(
            backend
                .remove(&bad.to_owned().into(), 1, GRACE)
                .await
                .is_err()
        );
    }
}

#[tokio::test]
async fn output_of_instances_is_kept_and_rotated() {
    let data = tempfile::tempdir().unwrap();
    let limits = LogLimits {
        file_bytes_max: 100_000,
        deployment_bytes_max: 2_000_000,
    };
    let config = ProcessConfig {
        log_limits: limits,
        ..config(data.path())
    };
    let backend = ProcessBackend::open(config).await.unwrap();
    let behaviour = Behaviour::default().with("CHATTER", 1);
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let mut reader = logs(data.path(), &"iris/blue".parse().unwrap(), None, None);
    let rotated = data.path().join("logs/iris/blue/a-1.log.000002");
    eventually(|| rotated.exists()).await;
    removed(&backend, &ready.id, GRACE).await;
    let lines = reader.read(1 << 20).unwrap();
    assert!(lines.len() > 100);
    assert!(lines.iter().all(|line| line.instance == ready.id));
}

fn files(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            files(&entry.path(), paths);
        } else {
            paths.push(entry.path());
        }
    }
}

#[tokio::test]
async fn a_secret_reaches_the_instance_and_no_file() {
    const SECRET: &str = "correct-horse-battery";
    let data = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("db");
    fs::write(&path, format!("{SECRET}\n")).unwrap();
    let backend = open(data.path()).await;
    let reference = format!("file:{}", path.display());
    let behaviour = Behaviour::default().with_secret("DB", &reference);
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let environ = fs::read(format!("/proc/{}/environ", ready.pid.unwrap())).unwrap();
    let environ = String::from_utf8(environ).unwrap();
    assert!(environ.contains(&format!("DB={SECRET}\0")));
    removed(&backend, &ready.id, GRACE).await;
    let mut all = Vec::new();
    files(data.path(), &mut all);
    assert!(all.len() > 3);
    for file in all {
        let content = fs::read(&file).unwrap();
        let text = String::from_utf8_lossy(&content);
        assert!(!text.contains(SECRET), "{}", file.display());
    }
}

#[tokio::test]
async fn an_instance_that_refers_to_an_own_secret_of_penstock_fails_and_never_runs() {
    const SECRET: &str = "correct-horse-battery";
    let data = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    fs::write(data.path().join("seal.key"), SECRET).unwrap();
    let link = elsewhere.path().join("link");
    std::os::unix::fs::symlink(data.path().join("seal.key"), &link).unwrap();
    let link = format!("file:{}", link.display());
    for (number, reference) in [&*link, "file:/proc/self/environ", "env:PENSTOCK_STORE"]
        .into_iter()
        .enumerate()
    {
        let behaviour = Behaviour::default().with_secret("DB", reference);
        let id = format!("a-{number}");
        let mut watch = backend.watch();
        let ensured = backend.ensure(start_spec(&id, 1, &behaviour)).await;
        let message = match ensured {
            Err(error) => error.to_string(),
            Ok(()) => loop {
                let observed = watch.recv().await.unwrap();
                if let ObservedPhase::Exited { reason, .. } = observed.phase {
                    break reason;
                }
            },
        };
        assert!(message.contains(reference), "{message}");
        assert!(message.contains("reserved for Penstock"), "{message}");
        assert!(!message.contains(SECRET), "{message}");
    }
}

#[tokio::test]
async fn an_instance_gets_its_own_variables_and_not_all_of_penstocks() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 7, &Behaviour::default());
    let level = EnvValue::Plain("2".into());
    start.spec.env.insert("LEVEL".into(), level);
    let ready = started(&backend, start).await;
    let environ = fs::read(format!("/proc/{}/environ", ready.pid.unwrap())).unwrap();
    let text = String::from_utf8(environ).unwrap();
    let has = |value: &str| text.split('\0').any(|entry| entry == value);
    assert!(has("LEVEL=2") && has("PENSTOCK_INSTANCE=a-1") && has("PENSTOCK_GENERATION=7"));
    // Set by Cargo for tests.
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
    assert!(!text.contains("CARGO_MANIFEST_DIR"));
    removed(&backend, &ready.id, GRACE).await;
}

#[tokio::test]
async fn cpu_and_memory_of_an_instance_are_measured() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let ready = started(&backend, start_spec("a-1", 1, &Behaviour::default())).await;
    let before = backend.resources().await;
    call(ready.address.as_ref().unwrap(), "/burn");
    let after = backend.resources().await;
    assert_eq!((before.len(), &after[0].id), (1, &ready.id));
    assert!(after[0].cpu_us_total >= before[0].cpu_us_total + 50_000);
    assert!(after[0].memory_bytes >= before[0].memory_bytes + (16 << 20));
    assert!(after[0].memory_limit_bytes.unwrap() > after[0].memory_bytes);
    removed(&backend, &ready.id, GRACE).await;
    assert!(backend.resources().await.is_empty());
}

#[test]
fn installation_and_node_ids_are_created_once() {
    let data = tempfile::tempdir().unwrap();
    let ids = || {
        (
            installation_id(data.path()).unwrap(),
            node_id(data.path()).unwrap(),
        )
    };
    let first = ids();
    assert_eq!(ids(), first);
    assert!(!first.1.contains('/') && first.0 != first.1);
}

/// The id of a node whose file is gone, after the Penstock that ran an instance was killed.
fn node_without_its_file(data: &Path) -> String {
    let _ = fs::remove_file(data.join("node"));
    node_id(data).unwrap()
}

#[tokio::test]
async fn a_node_without_its_file_is_the_node_of_the_instances_that_still_run() {
    let data = tempfile::tempdir().unwrap();
    Parent::start(data.path(), &[start_spec("a-1", 1, &Behaviour::default())]).kill_when_ready(1);
    assert_eq!(node_without_its_file(data.path()), "node-1");
    let backend = open(data.path()).await;
    removed(&backend, &"a-1".to_owned().into(), GRACE).await;
    assert_ne!(node_without_its_file(data.path()), "node-1");
}
