//! The node agent with a log and a backend.

#![allow(clippy::unwrap_used)]

#[path = "../../../libs/backends/tests/support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use actuator::node::{self, GONE_REASON, NodeConfig, NodeDeps, NodeError};
use async_trait::async_trait;
use backends::process::{ProcessBackend, ProcessConfig};
use backends::simulated::SimulatedBackend;
use backends::{Backend, BackendError, ObservedInstance, ObservedPhase, ResourceSample, StartSpec};
use bus::{Bus, LocalBus};
use contract::events::{
    ConsumerUnparked, Empty, Event, InstanceEnded, InstanceRemovalRequested, InstanceRequested,
    InstanceStarted, RemovalReason, RequestReason,
};
use contract::frame::{Frame, Hello, InstanceFrame, SourceKind};
use contract::ids::{BUCKETS, EndpointKey, InstanceId, Uid};
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::resources::{BackendKind, DeploymentSpec, SimulatedSpec};
use contract::time::{Span, Timestamp};
use runtime::clock::SystemClock;
use runtime::health::HealthRegistry;
use runtime::ids::{Ids, SeededIds};
use sqlx::Connection as _;
use store::{Append, Commit, Store};
use support::Behaviour;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

#[test]
#[ignore = "the server that other tests start"]
fn the_tiny_server() {
    support::serve();
}

/// Far longer than anything takes; reached only if a test fails.
const TIMEOUT: Duration = Duration::from_secs(60);
const NODE: &str = "node-1";
const ADDRESS: &str = "http://node-1.example:7072";

async fn with_timeout<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(TIMEOUT, what).await.unwrap()
}

fn endpoint() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

fn id(name: &str) -> InstanceId {
    InstanceId::from(name.to_owned())
}

fn spec(kind: &str) -> DeploymentSpec {
    serde_json::from_value(serde_json::json!({"backend": kind, "instanceType": "t"})).unwrap()
}

fn requested(name: &str, node: &str, spec: DeploymentSpec) -> Event {
    Event::InstanceRequested(Box::new(InstanceRequested {
        id: id(name),
        generation: 1,
        deployment: "iris/blue".parse().unwrap(),
        deployment_uid: Uid(uuid::Uuid::from_u128(7)),
        revision: 1,
        node: node.into(),
        decision: None,
        reason: RequestReason::ScaleOut,
        spec,
    }))
}

fn removal(name: &str) -> Event {
    Event::InstanceRemovalRequested(InstanceRemovalRequested {
        id: id(name),
        generation: 2,
        node: NODE.into(),
        grace: Span::from_secs(10),
        reason: RemovalReason::ScaleIn,
    })
}

/// A log with a bus, and the other writers besides the agent.
struct Harness {
    store: Store,
    bus: Arc<LocalBus>,
    ids: Arc<SeededIds>,
    commits: mpsc::UnboundedReceiver<Vec<Arc<Record>>>,
    inbox: VecDeque<Arc<Record>>,
    versions: BTreeMap<StreamName, u64>,
    data: tempfile::TempDir,
}

/// A running agent.
struct RunningAgent {
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), NodeError>>,
    health: HealthRegistry,
}

impl RunningAgent {
    async fn stop(self) -> Result<(), NodeError> {
        self.shutdown.cancel();
        with_timeout(self.task).await.unwrap()
    }

    async fn ready(&self) {
        with_timeout(self.health.until_ready()).await;
    }
}

impl Harness {
    async fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", data.path().join("log.db").display());
        let store = Store::open(&url).await.unwrap();
        let bus = LocalBus::new();
        let commits = store.subscribe();
        tokio::spawn(runtime::relay::run(
            store.clone(),
            bus.clone(),
            CancellationToken::new(),
        ));
        Self {
            store,
            bus,
            ids: Arc::new(SeededIds::new(1)),
            commits,
            inbox: VecDeque::new(),
            versions: BTreeMap::new(),
            data,
        }
    }

    fn agent(&self, kind: BackendKind, backend: Arc<dyn Backend>) -> RunningAgent {
        self.agent_with(kind, backend, false)
    }

    fn agent_with(
        &self,
        kind: BackendKind,
        backend: Arc<dyn Backend>,
        keep_instances: bool,
    ) -> RunningAgent {
        let health = HealthRegistry::default();
        let config = NodeConfig {
            node: NODE.into(),
            is_only: false,
            address: Some(ADDRESS.into()),
            keep_instances,
            grace: Span::from_secs(10),
        };
        let deps = NodeDeps {
            store: self.store.clone(),
            bus: self.bus.clone(),
            clock: Arc::new(SystemClock),
            ids: self.ids.clone(),
            backends: BTreeMap::from([(kind, backend)]),
            component: health.component("actuator"),
        };
        let shutdown = CancellationToken::new();
        RunningAgent {
            task: tokio::spawn(node::run(config, deps, shutdown.clone())),
            shutdown,
            health,
        }
    }

    async fn write(&mut self, stream: StreamName, event: Event) {
        let version = self.versions.entry(stream.clone()).or_default();
        let now = Timestamp::from_secs(1_000);
        let append = Append {
            stream,
            expected_version: *version,
            events: vec![NewEvent {
                id: self.ids.event_id(now),
                time: now,
                actor: Actor::service("test"),
                event,
            }],
        };
        *version += 1;
        let commit = Commit {
            appends: vec![append],
            ..Commit::default()
        };
        self.store.commit(commit).await.unwrap();
    }

    async fn request(&mut self, event: Event) {
        let stream = StreamName::of(StreamKind::Instances, &endpoint());
        self.write(stream, event).await;
    }

    /// Returns the next event of the node.
    async fn next_event(&mut self) -> Event {
        let ours = StreamName::of_node(&endpoint(), NODE);
        loop {
            while let Some(record) = self.inbox.pop_front() {
                if record.stream == ours {
                    return record.event.clone();
                }
            }
            let batch = with_timeout(self.commits.recv()).await.unwrap();
            self.inbox.extend(batch);
        }
    }

    async fn event_types(&self) -> Vec<&'static str> {
        let ours = StreamName::of_node(&endpoint(), NODE);
        let records = self.store.read_stream(&ours, 0, 1000).await.unwrap();
        records
            .iter()
            .map(|record| record.event.type_name())
            .collect()
    }
}

fn simulated() -> Arc<SimulatedBackend> {
    SimulatedBackend::new(NODE, Timestamp::from_secs(1_000))
}

/// Long enough for every simulated start.
const STARTED: Timestamp = Timestamp::from_secs(1_100);

#[tokio::test]
async fn a_requested_instance_is_started_and_its_changes_are_recorded() {
    let mut harness = Harness::new().await;
    let backend = simulated();
    let agent = harness.agent(BackendKind::SIMULATED, backend.clone());
    harness
        .request(requested("a-1", NODE, spec("simulated")))
        .await;
    let Event::InstanceStarted(started) = harness.next_event().await else {
        panic!("not started")
    };
    assert_eq!((started.id, started.generation), (id("a-1"), 1));
    assert!(!started.adopted);
    backend.advance(STARTED);
    assert_eq!(harness.next_event().await.type_name(), "instance.ready");
    harness.request(removal("a-1")).await;
    let Event::InstanceStopped(stopped) = harness.next_event().await else {
        panic!("not stopped")
    };
    assert_eq!(stopped.exit_code, Some(0));
    assert!(backend.list().await.unwrap().is_empty());
    agent.stop().await.unwrap();
    assert_eq!(
        harness.event_types().await,
        ["instance.started", "instance.ready", "instance.stopped"]
    );
}

#[tokio::test]
async fn an_unknown_backend_kind_runs_instances_like_any_other() {
    let mut harness = Harness::new().await;
    let toy: BackendKind = "toy".parse().unwrap();
    assert!(!BackendKind::KNOWN.contains(&toy));
    let mut frames = harness.bus.subscribe_frames();
    let backend = simulated();
    let agent = harness.agent(toy.clone(), backend.clone());
    harness.request(requested("a-1", NODE, spec("toy"))).await;
    assert_eq!(harness.next_event().await.type_name(), "instance.started");
    backend.advance(STARTED);
    assert_eq!(harness.next_event().await.type_name(), "instance.ready");
    let offered = loop {
        let frame = frames.recv().await.unwrap();
        if let Some(hello) = &frame.hello {
            break hello.backends.clone();
        }
    };
    assert_eq!(offered, [toy]);
    harness.request(removal("a-1")).await;
    assert_eq!(harness.next_event().await.type_name(), "instance.stopped");
    agent.stop().await.unwrap();
}

#[tokio::test]
async fn instances_of_other_nodes_are_ignored() {
    let mut harness = Harness::new().await;
    let backend = simulated();
    let _agent = harness.agent(BackendKind::SIMULATED, backend.clone());
    harness
        .request(requested("a-1", "node-2", spec("simulated")))
        .await;
    harness
        .request(requested("a-2", NODE, spec("simulated")))
        .await;
    harness.next_event().await;
    let ids: Vec<_> = backend
        .list()
        .await
        .unwrap()
        .into_iter()
        .map(|o| o.id)
        .collect();
    assert_eq!(ids, [id("a-2")]);
}

#[tokio::test]
async fn an_instance_that_crashes_has_failed_with_its_exit_code() {
    let mut harness = Harness::new().await;
    let backend = simulated();
    let _agent = harness.agent(BackendKind::SIMULATED, backend.clone());
    let mut fragile = spec("simulated");
    fragile.simulated = Some(SimulatedSpec {
        mean_time_to_failure: Span::from_secs(1),
        ..SimulatedSpec::default()
    });
    harness.request(requested("a-1", NODE, fragile)).await;
    assert_eq!(harness.next_event().await.type_name(), "instance.started");
    backend.advance(STARTED);
    let mut event = harness.next_event().await;
    while event.type_name() == "instance.ready" {
        event = harness.next_event().await;
    }
    let Event::InstanceFailed(failed) = event else {
        panic!("not failed")
    };
    assert_eq!(failed.exit_code, Some(134));
}

#[tokio::test]
async fn an_instance_lost_while_the_agent_was_down_has_failed() {
    let mut harness = Harness::new().await;
    harness
        .request(requested("a-1", NODE, spec("simulated")))
        .await;
    let started = Event::InstanceStarted(InstanceStarted {
        id: id("a-1"),
        generation: 1,
        address: "127.0.0.1:1".into(),
        pid: None,
        adopted: false,
    });
    harness
        .write(StreamName::of_node(&endpoint(), NODE), started)
        .await;
    assert_eq!(harness.next_event().await.type_name(), "instance.started");
    let _agent = harness.agent(BackendKind::SIMULATED, simulated());
    let expected = InstanceEnded {
        id: id("a-1"),
        reason: GONE_REASON.into(),
        exit_code: None,
    };
    assert_eq!(harness.next_event().await, Event::InstanceFailed(expected));
}

async fn until_removed(changes: &mut mpsc::Receiver<ObservedInstance>) -> ObservedInstance {
    loop {
        let change = with_timeout(changes.recv()).await.unwrap();
        if matches!(change.phase, ObservedPhase::Removed { .. }) {
            return change;
        }
    }
}

#[tokio::test]
async fn an_instance_that_is_not_in_the_log_is_ended_without_an_event() {
    let harness = Harness::new().await;
    let backend = simulated();
    let stray = support::start_spec("stray-1", 1, &Behaviour::default());
    backend.ensure(stray).await.unwrap();
    let mut changes = backend.watch();
    let _agent = harness.agent(BackendKind::SIMULATED, backend.clone());
    assert_eq!(until_removed(&mut changes).await.id, id("stray-1"));
    assert!(harness.event_types().await.is_empty());
}

#[tokio::test]
async fn instances_of_an_endpoint_that_is_deleted_are_ended() {
    let mut harness = Harness::new().await;
    let backend = simulated();
    let mut changes = backend.watch();
    let _agent = harness.agent(BackendKind::SIMULATED, backend.clone());
    harness
        .request(requested("a-1", NODE, spec("simulated")))
        .await;
    harness.next_event().await;
    let stream = StreamName::of(StreamKind::Endpoint, &endpoint());
    harness
        .write(stream, Event::EndpointDeleted(Empty {}))
        .await;
    assert_eq!(until_removed(&mut changes).await.id, id("a-1"));
}

#[tokio::test]
async fn a_graceful_shutdown_stops_all_instances_and_records_it() {
    let mut harness = Harness::new().await;
    let backend = simulated();
    let agent = harness.agent(BackendKind::SIMULATED, backend.clone());
    for name in ["a-1", "a-2"] {
        harness
            .request(requested(name, NODE, spec("simulated")))
            .await;
        assert_eq!(harness.next_event().await.type_name(), "instance.started");
    }
    agent.stop().await.unwrap();
    assert!(backend.list().await.unwrap().is_empty());
    for _ in 0..2 {
        let Event::InstanceStopped(stopped) = harness.next_event().await else {
            panic!("not stopped")
        };
        assert!(stopped.reason.contains("Penstock was stopped"));
    }
}

#[tokio::test]
async fn instances_that_are_kept_outlive_the_agent() {
    let mut harness = Harness::new().await;
    let backend = simulated();
    let agent = harness.agent_with(BackendKind::SIMULATED, backend.clone(), true);
    harness
        .request(requested("a-1", NODE, spec("simulated")))
        .await;
    harness.next_event().await;
    agent.stop().await.unwrap();
    assert_eq!(backend.list().await.unwrap().len(), 1);
    assert_eq!(harness.event_types().await, ["instance.started"]);
}

#[tokio::test]
async fn a_disallowed_backend_fails_the_instance_which_can_still_be_removed() {
    let mut harness = Harness::new().await;
    let _agent = harness.agent(BackendKind::SIMULATED, simulated());
    harness
        .request(requested("a-1", NODE, spec("process")))
        .await;
    let Event::InstanceFailed(failed) = harness.next_event().await else {
        panic!("not failed")
    };
    assert!(
        failed.reason.contains("does not allow"),
        "{}",
        failed.reason
    );
    harness.request(removal("a-1")).await;
    assert_eq!(harness.next_event().await.type_name(), "instance.stopped");
}

#[tokio::test]
async fn a_node_holds_its_lease_while_it_runs() {
    let harness = Harness::new().await;
    let agent = harness.agent(BackendKind::SIMULATED, simulated());
    agent.ready().await;
    let name = format!("node/{NODE}");
    let other = || {
        harness
            .store
            .acquire_lease(&name, "other", Duration::from_secs(1))
    };
    assert_eq!(other().await.unwrap(), None);
    agent.stop().await.unwrap();
    assert!(other().await.unwrap().is_some());
}

/// A backend whose first start panics.
struct PanicsOnce {
    backend: Arc<SimulatedBackend>,
    has_panicked: AtomicBool,
}

#[async_trait]
impl Backend for PanicsOnce {
    async fn ensure(&self, start: StartSpec) -> Result<(), BackendError> {
        assert!(self.has_panicked.swap(true, Ordering::Relaxed), "test");
        self.backend.ensure(start).await
    }

    async fn remove(
        &self,
        id: &InstanceId,
        generation: u64,
        grace: Span,
    ) -> Result<(), BackendError> {
        self.backend.remove(id, generation, grace).await
    }

    async fn list(&self) -> Result<Vec<ObservedInstance>, BackendError> {
        self.backend.list().await
    }

    fn watch(&self) -> mpsc::Receiver<ObservedInstance> {
        self.backend.watch()
    }

    async fn resources(&self) -> Vec<ResourceSample> {
        self.backend.resources().await
    }

    async fn release(&self) {
        self.backend.release().await;
    }
}

#[tokio::test]
async fn a_start_that_panicked_is_repeated() {
    let mut harness = Harness::new().await;
    let backend = Arc::new(PanicsOnce {
        backend: simulated(),
        has_panicked: AtomicBool::new(false),
    });
    let agent = harness.agent(BackendKind::SIMULATED, backend.clone());
    agent.ready().await;
    let mut changes = backend.watch();
    harness
        .request(requested("a-1", NODE, spec("simulated")))
        .await;
    assert_eq!(with_timeout(changes.recv()).await.unwrap().id, id("a-1"));
    agent.stop().await.unwrap();
}

#[tokio::test]
async fn an_agent_whose_node_was_taken_over_stops() {
    let mut harness = Harness::new().await;
    let agent = harness.agent(BackendKind::SIMULATED, simulated());
    agent.ready().await;
    harness
        .store
        .acquire_fence(&format!("node/{NODE}"))
        .await
        .unwrap();
    harness
        .request(requested("a-1", NODE, spec("simulated")))
        .await;
    let end = with_timeout(agent.task).await.unwrap();
    assert!(matches!(end, Err(NodeError::TakenOver { .. })));
    assert!(harness.event_types().await.is_empty());
}

#[tokio::test]
async fn every_bucket_gets_a_frame_each_second_and_a_final_goodbye() {
    let harness = Harness::new().await;
    let mut frames = harness.bus.subscribe_frames();
    let agent = harness.agent(BackendKind::SIMULATED, simulated());
    let mut second = Vec::<Arc<Frame>>::new();
    while second.len() < 2 * usize::from(BUCKETS) {
        second.push(with_timeout(frames.recv()).await.unwrap());
    }
    let buckets: BTreeSet<_> = second
        .iter()
        .map(|frame| (frame.bucket, frame.sequence))
        .collect();
    assert_eq!(buckets.len(), second.len());
    assert!(
        second
            .iter()
            .all(|frame| frame.source.kind == SourceKind::NODE
                && frame.sequence < 2
                && frame.start.millis() % 1000 == 0
                && !frame.goodbye)
    );
    for frame in &second {
        let hello = (frame.bucket.0 == 0).then(|| Hello {
            address: Some(ADDRESS.into()),
            backends: vec![BackendKind::SIMULATED],
        });
        assert_eq!(frame.hello, hello, "the hello is in the first bucket");
    }
    agent.stop().await.unwrap();
    let mut last = BTreeMap::new();
    while let Ok(frame) = frames.try_recv() {
        last.insert(frame.bucket, frame.goodbye);
    }
    assert_eq!(last.len(), usize::from(BUCKETS));
    assert!(last.values().all(|goodbye| *goodbye));
}

#[tokio::test]
async fn a_process_is_adopted_by_the_next_agent_then_measured_and_stopped() {
    let mut harness = Harness::new().await;
    let config = ProcessConfig::new(harness.data.path().into(), NODE.into(), "/".into());
    let backend = ProcessBackend::open(config.clone()).await.unwrap();
    let agent = harness.agent_with(BackendKind::PROCESS, backend, true);
    let start = support::start_spec("a-1", 1, &Behaviour::default());
    harness.request(requested("a-1", NODE, start.spec)).await;
    let Event::InstanceStarted(first) = harness.next_event().await else {
        panic!("not started")
    };
    assert_eq!(harness.next_event().await.type_name(), "instance.ready");
    agent.stop().await.unwrap();

    let backend = ProcessBackend::open(config).await.unwrap();
    let mut frames = harness.bus.subscribe_frames();
    let agent = harness.agent(BackendKind::PROCESS, backend);
    let Event::InstanceStarted(second) = harness.next_event().await else {
        panic!("not started")
    };
    assert!(second.adopted);
    assert_eq!((second.pid, &second.address), (first.pid, &first.address));
    assert_eq!(harness.next_event().await.type_name(), "instance.ready");
    let measured = with_timeout(async {
        loop {
            let frame = frames.recv().await.unwrap();
            if let Some(deployment) = frame.deployments.first() {
                break deployment.instances[0].clone();
            }
        }
    });
    let measured = measured.await;
    assert!(measured.memory_bytes.unwrap() > 0);
    assert!(measured.memory_limit_bytes.unwrap() > measured.memory_bytes.unwrap());
    agent.stop().await.unwrap();
    assert_eq!(harness.next_event().await.type_name(), "instance.stopped");
    assert!(!support::is_running(first.pid.unwrap()));
}

#[tokio::test]
async fn an_instance_that_its_backend_does_not_measure_is_reported_without_resources() {
    let mut harness = Harness::new().await;
    let backend = simulated();
    let mut frames = harness.bus.subscribe_frames();
    let agent = harness.agent(BackendKind::SIMULATED, backend.clone());
    harness
        .request(requested("a-1", NODE, spec("simulated")))
        .await;
    assert_eq!(harness.next_event().await.type_name(), "instance.started");
    backend.advance(STARTED);
    let reported = with_timeout(async {
        loop {
            let frame = frames.recv().await.unwrap();
            let deployment = frame.deployments.first();
            let reported = deployment.map(|deployment| deployment.instances[0].clone());
            if let Some(reported) = reported.filter(|reported| reported.ready_for_us.is_some()) {
                break reported;
            }
        }
    });
    let expected = InstanceFrame {
        ready_for_us: Some(0),
        ..InstanceFrame::new(id("a-1"))
    };
    assert_eq!(reported.await, expected);
    harness.request(removal("a-1")).await;
    assert_eq!(harness.next_event().await.type_name(), "instance.ready");
    assert_eq!(harness.next_event().await.type_name(), "instance.stopped");
    let is_gone =
        |frame: &Frame| frame.bucket == endpoint().bucket() && frame.deployments.is_empty();
    with_timeout(async { while !is_gone(&frames.recv().await.unwrap()) {} }).await;
    agent.stop().await.unwrap();
}

#[tokio::test]
async fn an_instance_is_reported_ready_from_the_second_after_it_became_ready() {
    let mut harness = Harness::new().await;
    let config = ProcessConfig::new(harness.data.path().into(), NODE.into(), "/".into());
    let backend = ProcessBackend::open(config).await.unwrap();
    let mut frames = harness.bus.subscribe_frames();
    let agent = harness.agent(BackendKind::PROCESS, backend);
    let start = support::start_spec("a-1", 1, &Behaviour::default());
    harness.request(requested("a-1", NODE, start.spec)).await;
    let reports = with_timeout(async {
        let mut reports: Vec<(u64, Option<u64>)> = Vec::new();
        while reports.iter().filter(|(_, ready)| ready.is_some()).count() < 3 {
            let frame = frames.recv().await.unwrap();
            if let Some(deployment) = frame.deployments.first() {
                reports.push((frame.length_us, deployment.instances[0].ready_for_us));
            }
        }
        reports
    });
    let reports = reports.await;
    let ready: Vec<_> = (reports.iter())
        .filter_map(|(length_us, ready_for_us)| Some((*length_us, (*ready_for_us)?)))
        .collect();
    assert_eq!(ready[0].1, 0, "only a part of the second: {reports:?}");
    assert_eq!(ready[1].1, ready[1].0);
    assert!(
        ready[2].1.abs_diff(ready[1].0 + ready[2].0) <= 1,
        "{reports:?}"
    );
    let started = reports.iter().take_while(|(_, ready)| ready.is_none());
    assert_eq!(started.count() + ready.len(), reports.len(), "{reports:?}");
    agent.stop().await.unwrap();
}

#[tokio::test]
async fn a_process_that_fails_its_liveness_probe_is_reported_and_runs_until_its_removal() {
    let mut harness = Harness::new().await;
    let config = ProcessConfig::new(harness.data.path().into(), NODE.into(), "/".into());
    let backend = ProcessBackend::open(config).await.unwrap();
    let _agent = harness.agent(BackendKind::PROCESS, backend);
    let start = support::start_spec("a-1", 1, &Behaviour::default());
    harness.request(requested("a-1", NODE, start.spec)).await;
    let Event::InstanceStarted(started) = harness.next_event().await else {
        panic!("not started")
    };
    assert_eq!(harness.next_event().await.type_name(), "instance.ready");
    support::call(&started.address, "/sick");
    let Event::InstanceUnhealthy(unhealthy) = harness.next_event().await else {
        panic!("not unhealthy")
    };
    assert!(
        unhealthy.reason.contains("`/live` failed 5 times"),
        "{unhealthy:?}"
    );
    assert!(support::is_running(started.pid.unwrap()));
    harness.request(removal("a-1")).await;
    assert_eq!(harness.next_event().await.type_name(), "instance.stopped");
}

async fn execute(harness: &Harness, sql: &'static str) {
    let url = format!("sqlite:{}", harness.data.path().join("log.db").display());
    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::query(sql).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

fn unparked() -> Event {
    Event::ConsumerUnparked(ConsumerUnparked {
        consumer: node::CONSUMER.into(),
        reason: "test".into(),
    })
}

/// Waits until the agent has handled everything so far, by a request for another endpoint.
async fn request_elsewhere(harness: &mut Harness, name: &str) {
    let rose = EndpointKey::new(&"rose".parse().unwrap());
    let instances = StreamName::of(StreamKind::Instances, &rose);
    harness
        .write(instances, requested(name, NODE, spec("simulated")))
        .await;
    let node_stream = StreamName::of_node(&rose, NODE);
    let started_elsewhere = async {
        let started = |record: &Record| matches!(&record.event, Event::InstanceStarted(started) if started.id == id(name));
        loop {
            let records = harness
                .store
                .read_stream(&node_stream, 0, 1000)
                .await
                .unwrap();
            if records.iter().any(started) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    with_timeout(started_elsewhere).await;
}

#[tokio::test]
async fn instances_of_a_parked_endpoint_are_left_alone_until_it_is_unparked() {
    let mut harness = Harness::new().await;
    let backend = simulated();
    let agent = harness.agent_with(BackendKind::SIMULATED, backend.clone(), true);
    harness
        .request(requested("iris-blue-1", NODE, spec("simulated")))
        .await;
    assert_eq!(harness.next_event().await.type_name(), "instance.started");
    agent.stop().await.unwrap();
    execute(
        &harness,
        "UPDATE events SET type = 'x-' || type WHERE type = 'instance.requested'",
    )
    .await;
    // As after a change of the fold: the next run starts from the log.
    execute(&harness, "DELETE FROM snapshots").await;

    // The next run does not know that the instance is wanted, and must not end it as a stray.
    let agent = harness.agent_with(BackendKind::SIMULATED, backend.clone(), true);
    agent.ready().await;
    harness.request(removal("iris-blue-1")).await;
    request_elsewhere(&mut harness, "rose-blue-1").await;
    let warnings = agent.health.warnings();
    assert!(warnings[0].contains("iris"), "{warnings:?}");
    assert_eq!(backend.list().await.unwrap().len(), 2);

    let stream = StreamName::of(StreamKind::Parking, &endpoint());
    harness.write(stream.clone(), unparked()).await;
    request_elsewhere(&mut harness, "rose-blue-2").await;
    assert_eq!(
        backend.list().await.unwrap().len(),
        3,
        "the event is still there"
    );
    execute(
        &harness,
        "UPDATE events SET type = substr(type, 3) WHERE type LIKE 'x-%'",
    )
    .await;
    harness.write(stream, unparked()).await;
    // The removal requested meanwhile is carried out now.
    assert_eq!(harness.next_event().await.type_name(), "instance.stopped");
    assert!(agent.health.warnings().is_empty());
    agent.stop().await.unwrap();
}
