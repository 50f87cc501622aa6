//! Instances whose first process ends before the others, and the time that they all are given.

use super::*;

/// An instance whose first process lets another one serve.
fn led(id: &str) -> StartSpec {
    start_spec(id, 1, &Behaviour::default().with("LEADER", 1))
}

fn log_of(data: &Path) -> String {
    fs::read_to_string(data.join("logs/iris/blue/a-1.log")).unwrap()
}

/// Waits until another process of a ready instance is watched, and returns its id.
async fn next_pid(changes: &mut mpsc::Receiver<ObservedInstance>, first: Option<u32>) -> u32 {
    loop {
        let observed = until(changes, is_ready).await;
        if observed.pid != first {
            return observed.pid.unwrap();
        }
    }
}

#[tokio::test]
async fn what_a_child_still_answers_is_waited_for_when_the_first_process_ends_at_sigterm() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let ready = started(&backend, led("a-1")).await;
    let address = ready.address.clone().unwrap();
    let answered = tokio::task::spawn_blocking(move || call(&address, "/slow"));
    eventually(|| log_of(data.path()).contains("answering late")).await;
    let gone = removed(&backend, &ready.id, GRACE).await;
    answered.await.unwrap();
    assert_eq!(gone.phase, ObservedPhase::Removed { code: None });
    assert!(processes_of(data.path()).is_empty());
}

#[tokio::test]
async fn the_signal_to_end_reaches_children_too() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let behaviour = Behaviour::default().with("LEADER", 1).with("FAREWELL", 1);
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    removed(&backend, &ready.id, GRACE).await;
    assert!(log_of(data.path()).contains("farewell of the child"));
}

#[tokio::test]
async fn a_child_that_serves_on_is_the_instance_until_it_ends_too() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let ready = started(&backend, led("a-1")).await;
    let mut changes = backend.watch();
    let address = ready.address.clone().unwrap();
    call(&address, "/orphan");
    let pid = next_pid(&mut changes, ready.pid).await;
    assert!(!is_running(ready.pid.unwrap()) && is_running(pid));
    call(&address, "/");
    assert_eq!(pid_of(data.path(), "a-1"), pid);
    let before = backend.resources().await;
    call(&address, "/burn");
    let after = backend.resources().await;
    assert!(after[0].cpu_us_total >= before[0].cpu_us_total + 50_000);
    call(&address, "/exit");
    let exited = until(&mut changes, is_exited).await;
    assert_eq!(reason_of_exit(&exited), "ended by signal 9");
}

#[tokio::test]
async fn an_instance_that_a_child_serves_is_removed_like_any_other() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let ready = started(&backend, led("a-1")).await;
    let mut changes = backend.watch();
    call(ready.address.as_ref().unwrap(), "/orphan");
    next_pid(&mut changes, ready.pid).await;
    removed(&backend, &ready.id, Span::from_millis(100)).await;
    assert!(processes_of(data.path()).is_empty());
}

#[tokio::test]
async fn a_child_that_served_on_before_penstock_was_killed_is_adopted() {
    let data = tempfile::tempdir().unwrap();
    let mut parent = Parent::start(data.path(), &[led("a-1")]);
    parent.wait_until_ready(1);
    let first = pid_of(data.path(), "a-1");
    let port = record(data.path(), "a-1")["port"].as_u64().unwrap();
    call(&format!("127.0.0.1:{port}"), "/orphan");
    eventually(|| pid_of(data.path(), "a-1") != first).await;
    let pid = pid_of(data.path(), "a-1");
    parent.kill();
    let backend = open(data.path()).await;
    let mut changes = backend.watch();
    let ready = until(&mut changes, is_ready).await;
    assert_eq!((ready.pid, ready.adopted), (Some(pid), true));
    removed(&backend, &ready.id, Span::from_millis(100)).await;
    assert!(processes_of(data.path()).is_empty());
}

#[tokio::test]
async fn a_child_that_serves_on_since_penstock_was_killed_is_adopted() {
    let data = tempfile::tempdir().unwrap();
    Parent::start(data.path(), &[led("a-1")]).kill_when_ready(1);
    let first = pid_of(data.path(), "a-1");
    let port = record(data.path(), "a-1")["port"].as_u64().unwrap();
    call(&format!("127.0.0.1:{port}"), "/orphan");
    eventually(|| !is_running(first)).await;
    let backend = open(data.path()).await;
    let mut changes = backend.watch();
    let ready = until(&mut changes, is_ready).await;
    assert!(ready.adopted && ready.pid != Some(first));
    removed(&backend, &ready.id, Span::from_millis(100)).await;
    assert!(processes_of(data.path()).is_empty());
}

#[tokio::test]
async fn an_instance_that_is_ended_for_its_probes_is_given_its_own_grace() {
    let data = tempfile::tempdir().unwrap();
    let mut config = config(data.path());
    config.grace = Span::ZERO;
    let backend = ProcessBackend::open(config).await.unwrap();
    let behaviour = Behaviour::default()
        .with("FAREWELL", 1)
        .with("FAIL_READINESS", 1);
    let mut start = start_spec("a-1", 1, &behaviour);
    start.spec.startup_timeout = Some(Span::from_secs(1));
    start.spec.termination_grace = Some(GRACE);
    let mut changes = backend.watch();
    backend.ensure(start).await.unwrap();
    until(&mut changes, is_exited).await;
    assert!(log_of(data.path()).contains("farewell"));
}
