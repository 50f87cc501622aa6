//! Penstock as separate processes on a real PostgreSQL and a real Kafka: two control planes (control,
//! autoscaler, meter), two gateways, two nodes; or one process per service, as in compose. Each process
//! has its own data folder and keeps its addresses across restarts.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use reqwest::{Client, Method, RequestBuilder};
use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::support::{DataFolder, PATIENCE};

/// What one process of the cluster runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    ControlPlane,
    Gateway,
    Node,
    Control,
    Autoscaler,
    Meter,
    /// The processes of a small installation.
    Combined,
}

impl Role {
    const fn services(self) -> &'static str {
        match self {
            Self::ControlPlane => "control,autoscaler,meter",
            Self::Gateway => "gateway",
            Self::Node => "actuator",
            Self::Control => "control",
            Self::Autoscaler => "autoscaler",
            Self::Meter => "meter",
            Self::Combined => "control,autoscaler,actuator",
        }
    }

    const fn has_control(self) -> bool {
        matches!(self, Self::ControlPlane | Self::Control | Self::Combined)
    }

    const fn has_actuator(self) -> bool {
        matches!(self, Self::Node | Self::Combined)
    }
}

/// Two of everything.
pub const TWO_OF_EACH: [(&str, Role); 6] = [
    ("control-1", Role::ControlPlane),
    ("control-2", Role::ControlPlane),
    ("gate-1", Role::Gateway),
    ("gate-2", Role::Gateway),
    ("node-1", Role::Node),
    ("node-2", Role::Node),
];

/// One process per service, with the names of `deploy/compose.yaml`.
pub const ONE_PER_SERVICE: [(&str, Role); 6] = [
    ("control", Role::Control),
    ("autoscaler", Role::Autoscaler),
    ("meter", Role::Meter),
    ("actuator", Role::Node),
    ("gateway-1", Role::Gateway),
    ("gateway-2", Role::Gateway),
];

/// The URLs of the servers; processes may reach the same servers by different URLs.
#[derive(Clone, Debug)]
pub struct ServerUrls {
    pub store: String,
    pub bus: String,
}

pub struct Process {
    pub name: &'static str,
    pub role: Role,
    pub folder: DataFolder,
    arguments: Vec<String>,
    environment: BTreeMap<&'static str, String>,
    state: Mutex<ProcessState>,
}

#[derive(Default)]
struct ProcessState {
    child: Option<Child>,
    /// The addresses of the last start, reused for the next one.
    addresses: Addresses,
}

#[derive(Clone, Debug, Default)]
pub struct Addresses {
    pub control: Option<String>,
    pub gateway: Option<String>,
    pub admin: Option<String>,
}

impl Process {
    pub fn new(name: &'static str, role: Role, servers: &ServerUrls, secrets: &Path) -> Self {
        let folder = DataFolder::new();
        let offset = folder.path().join("clock-offset");
        let file = |name: &str| format!("file:{}", secrets.join(name).display());
        let arguments = [
            "--services",
            role.services(),
            "--internal-token",
            &file("internal"),
            "--clock-offset-file",
            &offset.display().to_string(),
        ];
        let mut arguments = arguments.map(str::to_owned).to_vec();
        let mut environment = BTreeMap::from([
            ("PENSTOCK_BUS", servers.bus.clone()),
            ("PENSTOCK_LOG", "info".to_owned()),
        ]);
        // As in compose: processes get only the settings they need.
        if role.has_control() {
            arguments.extend(["--seal-key".to_owned(), file("seal")]);
        }
        if role != Role::Gateway {
            environment.insert("PENSTOCK_STORE", servers.store.clone());
        }
        // Simulates another host.
        if name == "node-2" {
            arguments.push("--advertise-host=127.0.0.2".to_owned());
        }
        Self {
            name,
            role,
            arguments,
            environment,
            folder,
            state: Mutex::default(),
        }
    }

    /// Starts the process and returns at once; [`until_ready`](Self::until_ready) waits.
    pub fn launch(&self) {
        let mut state = self.state.lock().unwrap();
        let _ = std::fs::remove_file(self.ready_file());
        let address = |url: &Option<String>| match url {
            Some(url) => url.trim_start_matches("http://").to_owned(),
            None => "127.0.0.1:0".to_owned(),
        };
        let addresses = &state.addresses;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.path().join("serve.log"))
            .unwrap();
        // The process must not outlive the test, even if that is killed.
        let mut command = Command::new("setpriv");
        command
            .args([
                "--pdeathsig",
                "KILL",
                env!("CARGO_BIN_EXE_penstock"),
                "serve",
            ])
            .arg("--data")
            .arg(self.folder.path())
            .arg("--ready-file")
            .arg(self.ready_file())
            .args(["--control-addr", &address(&addresses.control)])
            .args(["--gateway-addr", &address(&addresses.gateway)])
            .args(["--admin-addr", &admin_flag(self.role, addresses)])
            .args(&self.arguments)
            .envs(&self.environment)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        state.child = Some(servers::spawn(command));
    }

    fn ready_file(&self) -> PathBuf {
        self.folder.path().join("ready.json")
    }

    /// Waits for the ready file.
    pub async fn until_ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(text) = std::fs::read_to_string(self.ready_file())
                && let Ok(ready) = serde_json::from_str::<Value>(&text)
            {
                let url = |name: &str| ready[name].as_str().map(str::to_owned);
                self.state.lock().unwrap().addresses = Addresses {
                    control: url("control"),
                    gateway: url("gateway"),
                    admin: url("admin"),
                };
                return;
            }
            let ended = {
                let mut state = self.state.lock().unwrap();
                let child = state.child.as_mut();
                child.and_then(|child| child.try_wait().unwrap())
            };
            assert!(
                ended.is_none(),
                "{} ended ({ended:?}):\n{}",
                self.name,
                self.log()
            );
            assert!(
                Instant::now() < deadline,
                "{} is not ready:\n{}",
                self.name,
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn addresses(&self) -> Addresses {
        self.state.lock().unwrap().addresses.clone()
    }

    /// SIGKILL; returns when the process has ended.
    pub fn kill(&self) {
        if let Some(mut child) = self.state.lock().unwrap().child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGTERM; waits for the process to end.
    pub async fn stop(&self) -> std::process::ExitStatus {
        self.signal(Signal::TERM);
        let child = self.state.lock().unwrap().child.take();
        let mut child = child.unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "{} does not stop:\n{}",
                self.name,
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn signal(&self, signal: Signal) {
        let state = self.state.lock().unwrap();
        if let Some(child) = &state.child
            && let Some(pid) = Pid::from_raw(child.id() as i32)
        {
            rustix::process::kill_process(pid, signal).unwrap();
        }
    }

    /// Sets the offset of the process's clock.
    pub fn step_clock(&self, offset_ms: i64) {
        let file = self.folder.path().join("clock-offset");
        std::fs::write(file, offset_ms.to_string()).unwrap();
    }

    /// The full log, of all starts.
    pub fn full_log(&self) -> String {
        let log = std::fs::read_to_string(self.folder.path().join("serve.log"));
        log.unwrap_or_default()
    }

    /// The end of the log, for failure messages.
    pub fn log(&self) -> String {
        let log = self.full_log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

/// Control serves health and metrics on its own address.
fn admin_flag(role: Role, addresses: &Addresses) -> String {
    match &addresses.admin {
        Some(url) if !role.has_control() => url.trim_start_matches("http://").to_owned(),
        _ => "127.0.0.1:0".to_owned(),
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Cluster {
    pub processes: Vec<Process>,
    pub http: Client,
    token: String,
    // Read on every start.
    _secrets: tempfile::TempDir,
}

impl Cluster {
    /// Starts two of each; `urls_of` returns the server URLs for each process.
    pub async fn start(urls_of: impl Fn(&str) -> ServerUrls) -> Self {
        Self::start_of(&TWO_OF_EACH, 0, urls_of).await
    }

    /// Starts these members, of which the first must have control, with a common clock offset.
    pub async fn start_of(
        members: &[(&'static str, Role)],
        clock_offset_ms: i64,
        urls_of: impl Fn(&str) -> ServerUrls,
    ) -> Self {
        let secrets = tempfile::tempdir().unwrap();
        for name in ["seal", "internal"] {
            let secret: [u8; 16] = *uuid::Uuid::new_v4().as_bytes();
            let text: String = secret
                .iter()
                .chain(&secret)
                .map(|b| format!("{b:02x}"))
                .collect();
            std::fs::write(secrets.path().join(name), text).unwrap();
        }
        let processes: Vec<Process> = members
            .iter()
            .map(|(name, role)| Process::new(name, *role, &urls_of(name), secrets.path()))
            .collect();
        for process in &processes {
            process.step_clock(clock_offset_ms);
        }
        // The first control creates the first token and the tables.
        processes[0].launch();
        processes[0].until_ready().await;
        for process in &processes[1..] {
            process.launch();
        }
        for process in &processes[1..] {
            process.until_ready().await;
        }
        let client = std::fs::read_to_string(processes[0].folder.path().join("client.json"));
        let client: Value = serde_json::from_str(&client.unwrap()).unwrap();
        Self {
            processes,
            http: Client::builder()
                .timeout(Duration::from_secs(10))
                .build()
                .unwrap(),
            token: client["token"].as_str().unwrap().to_owned(),
            _secrets: secrets,
        }
    }

    pub fn get(&self, name: &str) -> &Process {
        let process = self.processes.iter().find(|process| process.name == name);
        process.unwrap_or_else(|| panic!("there is no process {name}"))
    }

    pub fn of(&self, role: Role) -> impl Iterator<Item = &Process> {
        self.processes
            .iter()
            .filter(move |process| process.role == role)
    }

    /// The processes with a control API.
    pub fn controls(&self) -> impl Iterator<Item = &Process> {
        let has_control = |process: &&Process| process.role.has_control();
        self.processes.iter().filter(has_control)
    }

    /// A request to the control API of one process.
    pub fn api(&self, control: &Process, method: Method, path: &str) -> RequestBuilder {
        let control = control.addresses().control.unwrap();
        self.http
            .request(method, format!("{control}{path}"))
            .bearer_auth(&self.token)
    }

    /// Sends a request to one control after the other until one accepts. Returns the body and the position.
    pub async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> (Value, u64) {
        let deadline = Instant::now() + PATIENCE;
        let mut last = String::new();
        loop {
            for control in self.controls() {
                let mut request = self.api(control, method.clone(), path);
                if let Some(body) = body {
                    request = request.json(body);
                }
                match request.send().await {
                    Ok(response) if response.status().is_success() => {
                        let position = response.headers().get("penstock-position");
                        let position = position.and_then(|value| value.to_str().ok()?.parse().ok());
                        let text = response.text().await.unwrap_or_default();
                        let value = serde_json::from_str(&text).unwrap_or_default();
                        return (value, position.unwrap_or_default());
                    }
                    Ok(response) => {
                        last = format!(
                            "{}: {}",
                            response.status(),
                            response.text().await.unwrap_or_default()
                        );
                    }
                    Err(error) => last = error.to_string(),
                }
            }
            assert!(
                Instant::now() < deadline,
                "{method} {path} is not accepted: {last}\n{}",
                self.logs()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn read(&self, path: &str) -> Value {
        self.call(Method::GET, path, None).await.0
    }

    pub async fn put(&self, path: &str, body: &Value) -> u64 {
        self.call(Method::PUT, path, Some(body)).await.1
    }

    /// The whole log, as the API shows it.
    pub async fn events(&self) -> Vec<Value> {
        let mut events: Vec<Value> = Vec::new();
        loop {
            let after = events
                .last()
                .map_or(0, |event| event["position"].as_u64().unwrap());
            let page = self
                .read(&format!("/v1/events?after={after}&limit=1000"))
                .await;
            let items = page["items"].as_array().unwrap();
            if items.is_empty() {
                return events;
            }
            events.extend(items.iter().cloned());
        }
    }

    /// Ids of running instance processes, by node.
    pub fn instance_processes(&self) -> BTreeMap<&'static str, Vec<u32>> {
        let of = |node: &Process| (node.name, node.folder.instance_processes());
        let nodes = self.processes.iter();
        let nodes = nodes.filter(|process| process.role.has_actuator());
        nodes.map(of).collect()
    }

    pub fn logs(&self) -> String {
        let parts = self.processes.iter();
        let parts = parts.map(|process| format!("== {}\n{}", process.name, process.log()));
        parts.collect::<Vec<_>>().join("\n")
    }
}
