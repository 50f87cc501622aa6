//! A control service on a free port with its own store, and a client for it.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bus::{Bus, LocalBus};
use contract::events::Event;
use contract::ids::{EndpointKey, Name};
use contract::log::{Actor, NewEvent, StreamKind, StreamName};
use contract::own_secrets::OwnSecrets;
use contract::time::Timestamp;
use control::{
    Control, ControlConfig, ControlDeps, HistorySource, Limits, LogSource, NoHistory, NoLogs,
};
use domain::zones::ZoneData;
use reqwest::{Method, RequestBuilder, StatusCode};
use runtime::clock::{Clock, ManualClock};
use runtime::health::HealthRegistry;
use runtime::ids::{Ids, SeededIds};
use runtime::metrics::Metrics;
use serde_json::{Value, json};
use store::{Append, Commit, Committed, Store};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub struct TestWorld {
    pub dir: Arc<TempDir>,
    pub addr: SocketAddr,
    pub token: String,
    pub store: Store,
    pub bus: Arc<LocalBus>,
    pub clock: Arc<ManualClock>,
    pub ids: Arc<SeededIds>,
    pub health: HealthRegistry,
    pub http: reqwest::Client,
    /// Method, path template and status of every request so far.
    pub responses: Mutex<HashSet<(Method, String, u16)>>,
    shutdown: CancellationToken,
    /// Stops only control.
    control_shutdown: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// The configuration of a [`TestWorld`].
pub struct Setup {
    /// May contain the data of an earlier run.
    pub dir: Arc<TempDir>,
    pub seed: u64,
    pub bus: Arc<LocalBus>,
    pub logs: Arc<dyn LogSource>,
    pub history: Arc<dyn HistorySource>,
    pub limits: Limits,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            dir: Arc::new(tempfile::tempdir().unwrap()),
            seed: 1,
            bus: LocalBus::new(),
            logs: Arc::new(NoLogs),
            history: Arc::new(NoHistory),
            limits: Limits::default(),
        }
    }
}

/// A valid document for tests to corrupt.
pub const ENDPOINT: &str = "\
apiVersion: penstock/v1
kind: Endpoint
metadata:
  name: iris
spec:
  auth: key
";

pub const START: Timestamp = Timestamp::from_secs(1_790_000_000);

/// A complete response.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Reply {
    pub fn body(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub fn position(&self) -> u64 {
        self.header("penstock-position").unwrap().parse().unwrap()
    }

    pub fn code(&self) -> String {
        self.body()["code"].as_str().unwrap_or_default().to_owned()
    }

    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        self
    }
}

impl TestWorld {
    pub async fn start() -> Self {
        Self::start_with(Setup::default()).await
    }

    pub async fn start_with(setup: Setup) -> Self {
        let Setup {
            dir,
            seed,
            bus,
            logs,
            history,
            limits,
        } = setup;
        let url = format!("sqlite:{}", dir.path().join("penstock.db").display());
        let store = Store::open(&url).await.unwrap();
        let clock = Arc::new(ManualClock::new(START));
        let ids = Arc::new(SeededIds::new(seed));
        let health = HealthRegistry::default();
        let shutdown = CancellationToken::new();
        let deps = ControlDeps {
            store: store.clone(),
            bus: bus.clone(),
            clock: clock.clone(),
            ids: ids.clone(),
            metrics: Metrics::default(),
            health: health.clone(),
            internal_token: None,
            zones: ZoneData::bundled(),
            logs,
            history,
        };
        let mut own_secrets = OwnSecrets::default();
        own_secrets.add_path(dir.path());
        own_secrets.add_variable("BUS_PASSWORD");
        let config = ControlConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            data: dir.path().to_owned(),
            seal_key: None,
            replica: None,
            only_node: None,
            gateway: Some("http://127.0.0.1:8080".into()),
            limits,
            own_secrets,
            descriptors: Default::default(),
        };
        let relay = runtime::relay::run(store.clone(), bus.clone(), shutdown.clone());
        let control = Control::bind(config, deps).await.unwrap();
        let addr = control.addr;
        let control_shutdown = shutdown.child_token();
        let stop = control_shutdown.clone();
        let tasks = vec![
            tokio::spawn(relay),
            tokio::spawn(async move { control.serve(stop).await.unwrap() }),
        ];
        health.until_ready().await;
        let file = std::fs::read_to_string(dir.path().join("client.json")).unwrap();
        let file: Value = serde_json::from_str(&file).unwrap();
        assert_eq!(file["server"], format!("http://{addr}"));
        let token = file["token"].as_str().unwrap().to_owned();
        let http = reqwest::Client::new();
        Self {
            dir,
            addr,
            token,
            store,
            bus,
            clock,
            ids,
            health,
            http,
            responses: Mutex::default(),
            shutdown,
            control_shutdown,
            tasks,
        }
    }

    /// Starts with the endpoint `iris`.
    pub async fn with_iris() -> Self {
        let world = Self::start().await;
        world.create_endpoint("iris").await;
        world
    }

    /// Starts with the endpoint `iris` and its deployment `blue`.
    pub async fn with_blue() -> Self {
        let world = Self::with_iris().await;
        world.create_deployment("iris", "blue").await;
        world
    }

    pub async fn create_endpoint(&self, name: &str) -> Reply {
        let path = format!("/v1/endpoints/{name}");
        self.put(&path, &endpoint(name)).await.expect(201)
    }

    /// Creates a deployment of an existing endpoint.
    pub async fn create_deployment(&self, of: &str, name: &str) -> Reply {
        let path = format!("/v1/endpoints/{of}/deployments/{name}");
        self.put(&path, &deployment(of, name)).await.expect(201)
    }

    /// Stops control; the store and the bus stay open.
    pub fn stop_control(&self) {
        self.control_shutdown.cancel();
    }

    /// Stops the service and returns the directory.
    pub async fn stop(self) -> Arc<TempDir> {
        self.shutdown.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
        self.store.close().await;
        self.dir
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!("http://{}{path}", self.addr);
        self.http.request(method, url).bearer_auth(&self.token)
    }

    /// Sends a request, and checks the response against the OpenAPI document.
    pub async fn send(&self, request: RequestBuilder) -> Reply {
        let request = request.build().unwrap();
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let response =
            tokio::time::timeout(Duration::from_secs(20), self.http.execute(request)).await;
        let response = response.unwrap().unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        let reply = Reply {
            status,
            headers,
            text,
        };
        if let Some(template) = assert_conforms(&method, &path, &reply) {
            let response = (method, template, reply.status.as_u16());
            self.responses.lock().unwrap().insert(response);
        }
        reply
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(self.request(Method::GET, path)).await
    }

    /// Reads at the position that a write returned.
    pub async fn get_at(&self, path: &str, position: u64) -> Reply {
        let request = self.request(Method::GET, path);
        self.send(request.header("penstock-position", position))
            .await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Reply {
        self.send(self.request(Method::PUT, path).json(body)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        self.send(self.request(Method::DELETE, path)).await
    }

    pub async fn head(&self) -> u64 {
        self.store.head().await.unwrap().0
    }

    /// Waits until the read models are up to date and no state transition is pending.
    /// Only without instances, which could delay a deletion.
    pub async fn wait_until_settled(&self) {
        loop {
            let head = self.head().await;
            self.get_at("/v1/endpoints", head).await.expect(200);
            let states = self.states().await;
            let is_pending = states.iter().any(|(name, state)| {
                let is_endpoint = !name.contains('/');
                state == "Deleting" || is_endpoint && state != "Succeeded"
            });
            if !is_pending && self.head().await == head {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Waits until settled, and returns the newest position.
    pub async fn settled_head(&self) -> u64 {
        self.wait_until_settled().await;
        self.head().await
    }

    /// Waits until a resource is in a state.
    pub async fn wait_for_state(&self, name: &str, state: &str) {
        let waiting = async {
            while self.states().await.get(name).map(String::as_str) != Some(state) {
                tokio::task::yield_now().await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), waiting).await;
        assert!(
            waited.is_ok(),
            "{name} did not become {state}: {:?}",
            self.states().await
        );
    }

    /// Appends events as another service would.
    pub async fn write(&self, stream: StreamName, events: Vec<Event>) -> u64 {
        let mut version = 0;
        loop {
            let records = self
                .store
                .read_stream(&stream, version, 1000)
                .await
                .unwrap();
            let Some(last) = records.last() else { break };
            version = last.version;
        }
        let now = self.clock.now();
        let events = events.into_iter().map(|event| NewEvent {
            id: self.ids.event_id(now),
            time: now,
            actor: Actor::service("test"),
            event,
        });
        let append = Append {
            stream,
            expected_version: version,
            events: events.collect(),
        };
        let commit = Commit {
            appends: vec![append],
            ..Commit::default()
        };
        match self.store.commit(commit).await.unwrap() {
            Committed::Written { records } => records.last().unwrap().position.0,
            Committed::Duplicate { .. } => unreachable!("there is no idempotency key"),
        }
    }

    pub fn stream(&self, kind: StreamKind, endpoint: &str) -> StreamName {
        let name: Name = endpoint.parse().unwrap();
        StreamName::of(kind, &EndpointKey::new(&name))
    }

    /// The state of every endpoint and deployment.
    pub async fn states(&self) -> BTreeMap<String, String> {
        let mut states = BTreeMap::new();
        let lists = ["/v1/endpoints?limit=1000", "/v1/deployments?limit=1000"];
        for path in lists {
            for item in self.get(path).await.expect(200).body()["items"]
                .as_array()
                .unwrap()
            {
                let name = match item["metadata"]["endpoint"].as_str() {
                    Some(endpoint) => {
                        format!("{endpoint}/{}", item["metadata"]["name"].as_str().unwrap())
                    }
                    None => item["metadata"]["name"].as_str().unwrap().to_owned(),
                };
                let state = item["status"]["provisioningState"].as_str().unwrap();
                states.insert(name, state.to_owned());
            }
        }
        states
    }
}

static OPENAPI: LazyLock<Value> = LazyLock::new(control::openapi::document);

/// Asserts that a response conforms to the OpenAPI document, and returns the template of the path. Paths
/// that are not in the document must be rejected.
fn assert_conforms(method: &Method, path: &str, reply: &Reply) -> Option<String> {
    let context = format!("{method} {path}: {} {}", reply.status, reply.text);
    let paths = OPENAPI["paths"].as_object().unwrap();
    let found = paths.iter().find(|(template, _)| matches(template, path));
    let operation = found.map(|(_, item)| &item[method.as_str().to_lowercase()]);
    let Some((template, operation)) = found.zip(operation.filter(|o| o.is_object())) else {
        assert!(
            [404, 405].contains(&reply.status.as_u16()),
            "not described: {context}"
        );
        return None;
    };
    let status = reply.status.as_u16().to_string();
    let response = match &operation["responses"][&status] {
        Value::Null => &OPENAPI["components"]["responses"]["Problem"],
        response => response,
    };
    let content = response["content"].as_object().unwrap();
    let kind = reply.header("content-type").unwrap();
    if let Some(media) = content.get(kind) {
        let mut schema = media["schema"].clone();
        schema["components"] = OPENAPI["components"].clone();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let body = reply.body();
        let errors: Vec<String> = validator
            .iter_errors(&body)
            .map(|e| format!("{} {e}", e.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{context}\n{errors:#?}");
    } else {
        let kind = kind.split(';').next().unwrap();
        assert!(content.contains_key(kind), "content type {kind}: {context}");
    }
    Some(template.0.clone())
}

fn matches(template: &str, path: &str) -> bool {
    let (template, path): (Vec<_>, Vec<_>) =
        (template.split('/').collect(), path.split('/').collect());
    template.len() == path.len()
        && template
            .iter()
            .zip(&path)
            .all(|(part, given)| part == given || part.starts_with('{'))
}

pub fn endpoint(name: &str) -> Value {
    json!({"apiVersion": "penstock/v1", "kind": "Endpoint", "metadata": {"name": name}, "spec": {}})
}

pub fn deployment(endpoint: &str, name: &str) -> Value {
    json!({
        "apiVersion": "penstock/v1", "kind": "Deployment",
        "metadata": {"name": name, "endpoint": endpoint},
        "spec": {"backend": "simulated", "instanceType": "cpu-small"},
    })
}

pub fn autoscale(endpoint: &str, name: &str) -> Value {
    json!({
        "apiVersion": "penstock/v1", "kind": "Autoscale",
        "spec": {
            "target": {"endpoint": endpoint, "deployment": name},
            "profiles": [{"name": "default", "capacity": {"min": 1, "max": 5, "default": 1}, "rules": [{
                "name": "busy",
                "metric": {"name": "concurrency", "window": "30s", "aggregation": "average", "perInstance": true},
                "when": "> 4",
                "scale": {"direction": "out", "by": 1},
            }, {
                "name": "idle",
                "metric": {"name": "concurrency", "window": "30s", "aggregation": "average", "perInstance": true},
                "when": "< 1",
                "scale": {"direction": "in", "by": 1},
            }]}],
        },
    })
}

pub fn bus_of(world: &TestWorld) -> Arc<dyn Bus> {
    world.bus.clone()
}
