//! A real Penstock for tests: the real binary in a separate process, with a private data folder and free
//! ports, and the API calls that tests need.

#![allow(dead_code)] // each test binary uses its own part

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// How long a test waits for something that should happen soon, even on a slow and busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Penstock {
    process: Child,
    pub control: String,
    pub gateway: String,
    pub token: String,
    data: PathBuf,
    /// The position of the last write; reads wait for it.
    position: AtomicU64,
    pub http: Client,
}

/// A temporary data folder; its instance processes are killed on drop.
pub struct DataFolder {
    folder: TempDir,
}

impl DataFolder {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Ids of this installation's running instance processes.
    pub fn instance_processes(&self) -> Vec<u32> {
        let Ok(installation) = std::fs::read_to_string(self.path().join("installation")) else {
            return Vec::new();
        };
        let wanted = format!("PENSTOCK_INSTALLATION={}", installation.trim());
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        ids.filter(|id| {
            let environment = std::fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|entry| entry == wanted.as_bytes())
        })
        .collect()
    }
}

impl Drop for DataFolder {
    /// A failed test must not leave model servers behind.
    fn drop(&mut self) {
        for id in self.instance_processes() {
            let _ = std::process::Command::new("kill")
                .args(["-9", &id.to_string()])
                .status();
        }
    }
}

/// The example model server.
pub fn scorer() -> String {
    neighbour("penstock-scorer")
}

/// A program that is built next to the binary under test.
fn neighbour(name: &str) -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_penstock")).with_file_name(name);
    assert!(
        program.exists(),
        "{} is missing: run `cargo build --bin {name}`",
        program.display()
    );
    program.display().to_string()
}

/// The binary under test behind `ulimit` with these arguments.
pub fn limited(ulimit: &str) -> Command {
    let script = format!("ulimit {ulimit} && exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_penstock")]);
    command
}

impl Penstock {
    /// Starts `penstock serve` and waits until it is ready.
    pub async fn start(folder: &DataFolder) -> Self {
        Self::start_with(folder, &[]).await
    }

    pub async fn start_with(folder: &DataFolder, arguments: &[&str]) -> Self {
        Self::start_in(folder, arguments, &[]).await
    }

    /// Starts with additional environment variables.
    pub async fn start_in(
        folder: &DataFolder,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        command.envs(environment.iter().copied());
        Self::start_by(command, folder, arguments).await
    }

    /// Starts behind `ulimit` with these arguments.
    pub async fn start_limited(folder: &DataFolder, ulimit: &str) -> Self {
        Self::start_by(limited(ulimit), folder, &[]).await
    }

    /// Starts by a program that is given the binary under test and its arguments.
    pub async fn start_through(folder: &DataFolder, program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .arg(env!("CARGO_BIN_EXE_penstock"))
            .stdout(Stdio::null());
        Self::start_by(command, folder, &[]).await
    }

    async fn start_by(mut command: Command, folder: &DataFolder, arguments: &[&str]) -> Self {
        let data = folder.path().to_owned();
        let ready_file = data.join("ready.json");
        let _ = std::fs::remove_file(&ready_file);
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(data.join("serve.log"));
        let mut process = command
            .arg("serve")
            .arg("--data")
            .arg(&data)
            .args([
                "--control-addr",
                "127.0.0.1:0",
                "--gateway-addr",
                "127.0.0.1:0",
            ])
            .arg("--ready-file")
            .arg(&ready_file)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(log.unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        let ready: Value = loop {
            if let Ok(text) = std::fs::read_to_string(&ready_file)
                && let Ok(ready) = serde_json::from_str(&text)
            {
                break ready;
            }
            if let Some(status) = process.try_wait().unwrap() {
                panic!("penstock ended with {status}:\n{}", serve_log(&data));
            }
            assert!(
                Instant::now() < deadline,
                "penstock is not ready:\n{}",
                serve_log(&data)
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let client = std::fs::read_to_string(data.join("client.json")).unwrap();
        let client: Value = serde_json::from_str(&client).unwrap();
        Self {
            process,
            control: ready["control"].as_str().unwrap().to_owned(),
            gateway: ready["gateway"].as_str().unwrap().to_owned(),
            token: client["token"].as_str().unwrap().to_owned(),
            data,
            position: AtomicU64::new(0),
            http: Client::new(),
        }
    }

    pub fn process_id(&self) -> u32 {
        self.process.id().unwrap()
    }

    /// SIGKILL, as in a crash.
    pub async fn kill(mut self) {
        self.process.kill().await.unwrap();
    }

    /// Sends a signal, such as `-HUP`.
    pub fn signal(&self, signal: &str) {
        let id = self.process_id().to_string();
        std::process::Command::new("kill")
            .args([signal, &id])
            .status()
            .unwrap();
    }

    /// SIGTERM; waits for the process to end.
    pub async fn stop(self) -> std::process::ExitStatus {
        self.stop_by("-TERM").await
    }

    /// Sends a signal; waits for the process to end.
    pub async fn stop_by(mut self, signal: &str) -> std::process::ExitStatus {
        self.signal(signal);
        let ended = tokio::time::timeout(PATIENCE, self.process.wait()).await;
        ended
            .unwrap_or_else(|_| panic!("penstock does not stop:\n{}", serve_log(&self.data)))
            .unwrap()
    }

    pub fn api(&self, method: Method, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("{}{path}", self.control))
            .bearer_auth(&self.token)
            .header("penstock-position", self.position.load(Ordering::Relaxed))
    }

    pub async fn get(&self, path: &str) -> Value {
        self.accepted(self.api(Method::GET, path)).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Value {
        self.accepted(self.api(Method::PUT, path).json(body)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Value {
        self.accepted(self.api(Method::POST, path).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Value {
        self.accepted(self.api(Method::DELETE, path)).await
    }

    async fn accepted(&self, request: RequestBuilder) -> Value {
        let response = request.send().await.unwrap();
        if let Some(position) = response.headers().get("penstock-position") {
            let position = position.to_str().unwrap().parse().unwrap();
            self.position.fetch_max(position, Ordering::Relaxed);
        }
        let (status, url) = (response.status(), response.url().clone());
        let text = response.text().await.unwrap();
        assert!(status.is_success(), "{url} answered {status}: {text}");
        if status == StatusCode::NO_CONTENT {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap()
        }
    }

    /// Runs the command line client against this server.
    pub async fn cli(&self, arguments: &[&str]) -> std::process::Output {
        self.run_client(env!("CARGO_BIN_EXE_penstock"), arguments)
            .await
    }

    /// As [`cli`](Self::cli), by the program that has no server in it.
    pub async fn client_alone(&self, arguments: &[&str]) -> std::process::Output {
        self.run_client(&neighbour("penstock-client"), arguments)
            .await
    }

    async fn run_client(&self, program: &str, arguments: &[&str]) -> std::process::Output {
        Command::new(program)
            .args(arguments)
            .env("PENSTOCK_SERVER", &self.control)
            .env("PENSTOCK_TOKEN", &self.token)
            .env("PENSTOCK_CONFIG", self.data.join("client.json"))
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap()
    }

    /// The primary key of an endpoint.
    pub async fn key(&self, endpoint: &str) -> String {
        let keys = self.get(&format!("/v1/endpoints/{endpoint}/keys")).await;
        keys["primary"].as_str().unwrap().to_owned()
    }

    pub fn score(&self, endpoint: &str, key: &str) -> RequestBuilder {
        self.http
            .post(format!("{}/endpoints/{endpoint}/score", self.gateway))
            .bearer_auth(key)
            .json(&serde_json::json!({"data": [[5.1, 3.5, 1.4, 0.2]]}))
    }

    /// Instances of a deployment in a state.
    pub async fn instances(&self, endpoint: &str, deployment: &str, state: &str) -> Vec<Value> {
        let path = format!("/v1/instances?endpoint={endpoint}&deployment={deployment}&limit=500");
        let list = self.get(&path).await;
        let items = list["items"].as_array().unwrap().clone();
        items
            .into_iter()
            .filter(|item| item["state"] == state)
            .collect()
    }

    pub async fn until_ready_instances(&self, endpoint: &str, deployment: &str, count: usize) {
        let what = format!("{count} ready instances of {endpoint}/{deployment}");
        eventually(&what, || async {
            let ready = self.instances(endpoint, deployment, "ready").await.len();
            let draining = self.instances(endpoint, deployment, "draining").await.len();
            (ready == count && draining == 0).then_some(())
        })
        .await
    }

    /// Asserts that the log is consistent and every read model equals a rebuild.
    pub async fn verify(&self) {
        let report = self.get("/v1/events/verify").await;
        assert_eq!(report["problems"], serde_json::json!([]), "{report:#}");
    }

    pub fn log(&self) -> String {
        serve_log(&self.data)
    }
}

fn serve_log(data: &Path) -> String {
    std::fs::read_to_string(data.join("serve.log")).unwrap_or_default()
}

/// Polls until there is a result; panics with `what` after [`PATIENCE`].
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut poll: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = poll().await {
            return answer;
        }
        assert!(
            Instant::now() < deadline,
            "timed out after {PATIENCE:?} waiting for {what}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Documents of an endpoint and a deployment served by the example scorer.
pub fn endpoint_document(name: &str) -> Value {
    serde_json::json!({"apiVersion": "penstock/v1", "kind": "Endpoint", "metadata": {"name": name}, "spec": {"auth": "key"}})
}

pub fn deployment_document(endpoint: &str, name: &str, instances: u32) -> Value {
    serde_json::json!({
        "apiVersion": "penstock/v1", "kind": "Deployment", "metadata": {"name": name, "endpoint": endpoint},
        "spec": {
            "backend": "process", "instanceType": "cpu-small", "instances": instances,
            "command": [scorer(), "--host", "{host}", "--port", "{port}"],
            "requestSettings": {"maxConcurrentRequestsPerInstance": 4, "maxQueueWait": "5s"},
            "readinessProbe": {"path": "/", "period": "100ms"}
        }
    })
}

impl Penstock {
    /// Creates an endpoint with one deployment that takes all traffic; waits until it is ready.
    pub async fn deploy(&self, endpoint: &str, deployment: &str, instances: u32) {
        self.put(
            &format!("/v1/endpoints/{endpoint}"),
            &endpoint_document(endpoint),
        )
        .await;
        let path = format!("/v1/endpoints/{endpoint}/deployments/{deployment}");
        self.put(&path, &deployment_document(endpoint, deployment, instances))
            .await;
        let traffic = serde_json::json!({"traffic": {deployment: 100}});
        self.put(&format!("/v1/endpoints/{endpoint}/traffic"), &traffic)
            .await;
        self.until_ready_instances(endpoint, deployment, instances as usize)
            .await;
    }
}
