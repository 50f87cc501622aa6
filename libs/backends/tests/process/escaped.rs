//! Processes that left their instance: how they are found and ended, and what becomes of control groups.

use super::*;

/// A backend without control groups, as where they may not be created.
async fn without_control_groups(data: &Path) -> Arc<ProcessBackend> {
    let mut config = config(data);
    config.control_groups = false;
    ProcessBackend::open(config).await.unwrap()
}

/// The process that the instance left in a session of its own, once it runs.
async fn escaped_of(data: &Path) -> u32 {
    let log = data.join("logs/iris/blue/a-1.log");
    eventually(|| fs::read_to_string(&log).unwrap().contains("grandchild ")).await;
    grandchild_of(data, "a-1")
}

#[tokio::test]
async fn a_child_that_left_its_session_and_environment_is_found_by_its_output() {
    let data = tempfile::tempdir().unwrap();
    let backend = without_control_groups(data.path()).await;
    let behaviour = Behaviour::default().with("ESCAPES", "kept");
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let escaped = escaped_of(data.path()).await;
    assert!(is_running(escaped));
    removed(&backend, &ready.id, GRACE).await;
    assert!(!is_running(escaped));
}

#[tokio::test]
async fn a_child_that_escaped_is_ended_too_if_the_instance_exits_by_itself() {
    let data = tempfile::tempdir().unwrap();
    let backend = without_control_groups(data.path()).await;
    let behaviour = Behaviour::default()
        .with("ESCAPES", "kept")
        .with("EXIT_AFTER_MS", 1000)
        .with("EXIT_CODE", 5);
    let mut changes = backend.watch();
    backend
        .ensure(start_spec("a-1", 1, &behaviour))
        .await
        .unwrap();
    let exited = until(&mut changes, is_exited).await;
    assert_eq!(reason_of_exit(&exited), "exited with code 5");
    assert!(!is_running(escaped_of(data.path()).await));
}

#[tokio::test]
async fn an_escaped_child_of_an_instance_that_is_gone_is_ended_at_startup() {
    let data = tempfile::tempdir().unwrap();
    let behaviour = Behaviour::default().with("ESCAPES", "kept");
    Parent::start(data.path(), &[start_spec("a-1", 1, &behaviour)]).kill_when_ready(1);
    let escaped = escaped_of(data.path()).await;
    let pid = pid_of(data.path(), "a-1");
    Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .unwrap();
    eventually(|| !is_running(pid)).await;
    assert!(is_running(escaped));
    let backend = open(data.path()).await;
    assert!(!is_running(escaped));
    drop(backend);
}

#[tokio::test]
async fn a_child_that_escaped_without_output_is_found_by_its_descent() {
    let data = tempfile::tempdir().unwrap();
    let backend = without_control_groups(data.path()).await;
    let behaviour = Behaviour::default().with("ESCAPES", "child");
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let escaped = escaped_of(data.path()).await;
    assert!(is_running(escaped));
    removed(&backend, &ready.id, GRACE).await;
    assert!(!is_running(escaped));
}

#[tokio::test]
async fn a_descendant_is_remembered_when_the_instance_exits_by_itself() {
    let data = tempfile::tempdir().unwrap();
    let backend = without_control_groups(data.path()).await;
    let behaviour = Behaviour::default().with("ESCAPES", "child");
    let mut changes = backend.watch();
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let escaped = escaped_of(data.path()).await;
    // As once a second.
    backend.resources().await;
    call(ready.address.as_ref().unwrap(), "/exit");
    until(&mut changes, is_exited).await;
    assert!(!is_running(escaped));
}

#[tokio::test]
async fn a_child_that_escaped_without_output_is_found_by_its_control_group() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let behaviour = Behaviour::default().with("ESCAPES", "dropped");
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let escaped = escaped_of(data.path()).await;
    let installation = installation_id(data.path()).unwrap();
    let groups = fs::read_to_string(format!("/proc/{escaped}/cgroup")).unwrap();
    if !groups.contains(&format!("penstock-{installation}-a-1")) {
        eprintln!("skipped: no control groups can be created here");
        Command::new("kill")
            .args(["-9", &escaped.to_string()])
            .status()
            .unwrap();
        return;
    }
    removed(&backend, &ready.id, GRACE).await;
    assert!(!is_running(escaped));
}

/// The folder of the control group (version 2) that a process is in, as far as it can be seen here.
fn control_group_of(pid: u32) -> Option<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mut folders = mounts.lines().filter_map(|line| {
        let [_, point, "cgroup2", ..] = line.split(' ').collect::<Vec<_>>()[..] else {
            return None;
        };
        Some(Path::new(point).join(group))
    });
    folders.find(|folder| folder.is_dir())
}

#[tokio::test]
async fn the_control_group_of_an_instance_that_ended_unseen_is_removed_at_startup() {
    let data = tempfile::tempdir().unwrap();
    Parent::start(data.path(), &[start_spec("a-1", 1, &Behaviour::default())]).kill_when_ready(1);
    let pid = pid_of(data.path(), "a-1");
    let installation = installation_id(data.path()).unwrap();
    let group = control_group_of(pid)
        .filter(|group| group.ends_with(format!("penstock-{installation}-a-1")));
    Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .unwrap();
    eventually(|| !is_running(pid)).await;
    let Some(group) = group else {
        eprintln!("skipped: no control groups can be created here");
        return;
    };
    assert!(group.is_dir());
    let _backend = open(data.path()).await;
    assert!(!group.exists());
}

/// A process that is not of the instance, and listens on its port once the instance has freed it.
#[tokio::test]
async fn a_process_that_listens_on_the_port_of_an_ended_instance_is_named() {
    let data = tempfile::tempdir().unwrap();
    let backend = without_control_groups(data.path()).await;
    let behaviour = Behaviour::default().with("ESCAPES", "listening");
    let mut changes = backend.watch();
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let port = ready
        .address
        .as_ref()
        .unwrap()
        .rsplit_once(':')
        .unwrap()
        .1
        .to_owned();
    let escaped = escaped_of(data.path()).await;
    call(ready.address.as_ref().unwrap(), "/exit");
    let exited = until(&mut changes, is_exited).await;
    let reason = reason_of_exit(&exited);
    let named = format!("process {escaped} (");
    assert!(reason.contains(&named), "{reason}");
    assert!(
        reason.contains(&format!("listens on its port {port}")),
        "{reason}"
    );
    Command::new("kill")
        .args(["-9", &escaped.to_string()])
        .status()
        .unwrap();
}
