//! Where instances are: their ports, their folders, and who reaches them.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;

use super::*;

/// An instance with two further ports, on which it listens.
fn with_ports(id: &str) -> StartSpec {
    let further = "{host}:{port:grpc},{host}:{port:metrics}";
    start_spec(id, 1, &Behaviour::default().with("FURTHER", further))
}

fn ports_of(data: &Path, id: &str) -> BTreeSet<u64> {
    let record = record(data, id);
    let further = ["grpc", "metrics"].map(|name| record["ports"][name].as_u64().unwrap());
    further.into_iter().chain(record["port"].as_u64()).collect()
}

fn environ(pid: u32) -> Vec<String> {
    let environ = fs::read(format!("/proc/{pid}/environ")).unwrap();
    let text = String::from_utf8(environ).unwrap();
    text.split('\0').map(str::to_owned).collect()
}

#[tokio::test]
async fn each_instance_gets_ports_of_its_own_for_each_name() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut all = BTreeSet::new();
    for id in ["a-1", "a-2"] {
        let ready = started(&backend, with_ports(id)).await;
        let ports = ports_of(data.path(), id);
        for port in &ports {
            TcpStream::connect(("127.0.0.1", *port as u16)).unwrap();
        }
        let grpc = format!("PORT_GRPC={}", record(data.path(), id)["ports"]["grpc"]);
        assert!(environ(ready.pid.unwrap()).contains(&grpc));
        all.extend(ports);
    }
    assert_eq!(all.len(), 6);
    for id in ["a-1", "a-2"] {
        removed(&backend, &id.to_owned().into(), GRACE).await;
    }
}

#[tokio::test]
async fn a_port_that_only_a_shell_names_is_given_too() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let mut start = start_spec("a-1", 1, &Behaviour::default());
    let program = start.spec.command.remove(0);
    let script = format!("TINY_FURTHER=127.0.0.1:$PORT_GRPC exec {program} \"$@\"");
    let shell = ["sh", "-c", &script, "sh"].map(str::to_owned);
    start.spec.command.splice(..0, shell);
    started(&backend, start.clone()).await;
    let port = record(data.path(), "a-1")["ports"]["grpc"]
        .as_u64()
        .unwrap();
    TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
    removed(&backend, &start.id, GRACE).await;
}

#[tokio::test]
async fn further_ports_of_a_partly_recorded_start_are_known_after_its_adoption() {
    let data = tempfile::tempdir().unwrap();
    Parent::start(data.path(), &[with_ports("a-1")]).kill_when_ready(1);
    let before = ports_of(data.path(), "a-1");
    let mut record = record(data.path(), "a-1");
    record["phase"] = serde_json::json!({"is": "starting"});
    for field in ["process", "port"] {
        record[field] = serde_json::Value::Null;
    }
    record.as_object_mut().unwrap().remove("ports");
    fs::write(record_path(data.path(), "a-1"), record.to_string()).unwrap();
    let backend = open(data.path()).await;
    assert_eq!(ports_of(data.path(), "a-1"), before);
    removed(&backend, &"a-1".to_owned().into(), GRACE).await;
}

#[tokio::test]
async fn an_instance_whose_further_port_was_taken_is_started_again_with_all_ports_new() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    // Takes its own further port, for somebody else, when it is started for the first time.
    let marker = data.path().join("first");
    let mut start = with_ports("a-1");
    let program = start.spec.command.remove(0);
    let script = format!(
        "if [ -e {marker} ]; then exec {program} \"$@\"; fi; echo $PORT $PORT_GRPC > {marker}.new; \
         mv {marker}.new {marker}; while [ ! -e {marker}.taken ]; do sleep 0.01; done; exec {program} \"$@\"",
        marker = marker.display(),
    );
    let shell = ["sh", "-c", &script, "sh"].map(str::to_owned);
    start.spec.command.splice(..0, shell);
    let mut changes = backend.watch();
    backend.ensure(start.clone()).await.unwrap();
    eventually(|| marker.exists()).await;
    let first = fs::read_to_string(&marker).unwrap();
    let ports: Vec<u16> = first
        .split_whitespace()
        .map(|p| p.parse().unwrap())
        .collect();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", ports[1])).unwrap();
    fs::write(marker.with_extension("taken"), "").unwrap();
    until(&mut changes, is_ready).await;
    let renewed = ports_of(data.path(), "a-1");
    assert!(
        ports
            .iter()
            .all(|port| !renewed.contains(&u64::from(*port)))
    );
    removed(&backend, &start.id, GRACE).await;
}

/// The folders of instances.
fn folders(data: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(data.join("run")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn with_folder(id: &str) -> StartSpec {
    start_spec(id, 1, &Behaviour::default().with("FOLDER", "{folder}"))
}

#[tokio::test]
async fn an_instance_has_a_private_folder_until_it_is_removed() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let plain = started(&backend, start_spec("a-0", 1, &Behaviour::default())).await;
    assert!(folders(data.path()).is_empty(), "nothing mentions it");
    let ready = started(&backend, with_folder("a-1")).await;
    let [folder] = &folders(data.path())[..] else {
        panic!()
    };
    let mode = fs::metadata(folder).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert!(folder.join("socket").exists());
    let folder = format!("TINY_FOLDER={}", folder.display());
    assert!(environ(ready.pid.unwrap()).contains(&folder));
    removed(&backend, &ready.id, GRACE).await;
    assert!(folders(data.path()).is_empty());
    removed(&backend, &plain.id, GRACE).await;
}

#[tokio::test]
async fn the_folder_of_an_instance_that_failed_goes_too() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let ready = started(&backend, with_folder("a-1")).await;
    let mut changes = backend.watch();
    call(ready.address.as_ref().unwrap(), "/exit");
    until(&mut changes, is_exited).await;
    assert!(folders(data.path()).is_empty());
}

#[tokio::test]
async fn the_folder_of_an_adopted_instance_stays_and_others_go_at_startup() {
    let data = tempfile::tempdir().unwrap();
    let starts = ["a-1", "a-2"].map(with_folder);
    Parent::start(data.path(), &starts).kill_when_ready(2);
    let gone = pid_of(data.path(), "a-2");
    let kill = Command::new("kill")
        .args(["-9", &gone.to_string()])
        .status();
    assert!(kill.unwrap().success());
    eventually(|| !is_running(gone)).await;
    let backend = open(data.path()).await;
    let [folder] = &folders(data.path())[..] else {
        panic!()
    };
    let folder = format!("TINY_FOLDER={}", folder.display());
    assert!(environ(pid_of(data.path(), "a-1")).contains(&folder));
    removed(&backend, &"a-1".to_owned().into(), GRACE).await;
    assert!(folders(data.path()).is_empty());
}

#[tokio::test]
async fn ports_that_are_open_to_the_network_are_reported_in_the_log_of_the_instance() {
    let data = tempfile::tempdir().unwrap();
    let backend = open(data.path()).await;
    let behaviour = Behaviour::default().with("FURTHER", "0.0.0.0:{port:metrics}");
    let ready = started(&backend, start_spec("a-1", 1, &behaviour)).await;
    let log = fs::read_to_string(data.path().join("logs/iris/blue/a-1.log")).unwrap();
    let warnings: Vec<&str> = log.lines().filter(|l| l.contains("warning")).collect();
    let port = &record(data.path(), "a-1")["ports"]["metrics"];
    let begin = format!("penstock: warning: port {port} is open to the network: ");
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(warnings[0].starts_with(&begin), "{log}");
    assert!(warnings[0].contains("--host {host}"), "{log}");
    removed(&backend, &ready.id, GRACE).await;
}
