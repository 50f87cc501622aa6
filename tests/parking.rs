//! Every consumer of the log, on a log with events that none of them can read: each parks only the endpoint
//! of one, reports it, continues with the others, and unparks it on request; it skips and reports one that
//! belongs to no endpoint, until it can be read.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use actuator::node::{NodeConfig, NodeDeps};
use backends::Backend;
use backends::simulated::SimulatedBackend;
use bus::LocalBus;
use contract::events::{
    ConsumerUnparked, EndpointCreated, EndpointKeys, Event, EventSkipped, MemberJoined, SealedKey,
};
use contract::frame::{Source, SourceKind};
use contract::ids::{EndpointKey, Position, Uid};
use contract::log::{Actor, NewEvent, StreamKind, StreamName};
use contract::own_secrets::OwnSecrets;
use contract::resources::BackendKind;
use contract::time::{Span, Timestamp};
use control::{Control, ControlConfig, ControlDeps, NoHistory, NoLogs};
use domain::zones::ZoneData;
use meter::{Config, HistoryLocation, Meter};
use runtime::clock::ManualClock;
use runtime::health::HealthRegistry;
use runtime::ids::{Ids, SeededIds};
use runtime::metrics::Metrics;
use runtime::parking::PARKED;
use runtime::reconcile::Deps;
use sqlx::Connection as _;
use store::{Append, Commit, RowQuery, Store};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Generous; reached only if a test fails.
const PATIENCE: Duration = Duration::from_secs(60);
const START: Timestamp = Timestamp::from_secs(1_790_000_000);
/// All consumers, by the names used to skip events and unpark.
const CONSUMERS: [&str; 5] = ["views", "autoscaler", "actuator", "node", "meter"];
/// Those that read about members.
const MEMBER_READERS: [&str; 2] = ["views", "actuator"];

struct Harness {
    folder: TempDir,
    store: Store,
    bus: Arc<LocalBus>,
    clock: Arc<ManualClock>,
    ids: Arc<SeededIds>,
    stop: CancellationToken,
}

/// A running consumer.
struct RunningConsumer {
    health: HealthRegistry,
    metrics: Metrics,
    task: JoinHandle<()>,
}

impl Harness {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&url(&folder)).await.unwrap();
        let (bus, stop) = (LocalBus::new(), CancellationToken::new());
        let relay = runtime::relay::run(store.clone(), bus.clone(), stop.clone());
        tokio::spawn(relay);
        Self {
            folder,
            store,
            bus,
            clock: Arc::new(ManualClock::new(START)),
            ids: Arc::new(SeededIds::new(1)),
            stop,
        }
    }

    async fn append(&self, kind: StreamKind, endpoint: &str, event: Event) -> Position {
        self.append_to(StreamName::of(kind, &key(endpoint)), event)
            .await
    }

    async fn append_to(&self, stream: StreamName, event: Event) -> Position {
        let before = self.store.read_raw(Position::START, 1000).await.unwrap();
        let before = before.iter().filter(|raw| raw.stream == stream.as_str());
        let append = Append {
            stream: stream.clone(),
            expected_version: before.count() as u64,
            events: vec![NewEvent {
                id: self.ids.event_id(START),
                time: START,
                actor: Actor::service("test"),
                event,
            }],
        };
        let commit = Commit {
            appends: vec![append],
            ..Commit::default()
        };
        self.store.commit(commit).await.unwrap();
        self.store.head().await.unwrap()
    }

    async fn run(&self, consumer: &str) -> RunningConsumer {
        let (health, metrics) = (HealthRegistry::default(), Metrics::default());
        let task = self.spawn(consumer, &health, &metrics).await;
        RunningConsumer {
            health,
            metrics,
            task,
        }
    }

    async fn spawn(
        &self,
        consumer: &str,
        health: &HealthRegistry,
        metrics: &Metrics,
    ) -> JoinHandle<()> {
        let (health, metrics, stop) = (health.clone(), metrics.clone(), self.stop.clone());
        let deps = Deps {
            store: self.store.clone(),
            bus: self.bus.clone(),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
        };
        match consumer {
            "views" => {
                let control = self.control(health, metrics).await;
                tokio::spawn(async move { control.serve(stop).await.unwrap() })
            }
            "autoscaler" => tokio::spawn(async move {
                let run = autoscaler::run(deps, ZoneData::bundled(), None, &metrics, &health, stop);
                run.await.unwrap();
            }),
            "actuator" => tokio::spawn(async move {
                let own = actuator::planner::OwnNode {
                    id: "n".into(),
                    is_only: false,
                };
                let run = actuator::planner::run(Some(own), deps, &health, stop);
                run.await.unwrap();
            }),
            "node" => {
                let run = actuator::node::run(node_config(), self.node(&health), stop);
                tokio::spawn(async move { run.await.unwrap() })
            }
            "meter" => {
                let meter = self.meter(health, metrics).await;
                tokio::spawn(async move { meter.run(stop).await.unwrap() })
            }
            other => panic!("{other}"),
        }
    }

    async fn control(&self, health: HealthRegistry, metrics: Metrics) -> Control {
        let config = ControlConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            data: self.folder.path().to_owned(),
            seal_key: None,
            replica: None,
            only_node: None,
            gateway: None,
            limits: control::Limits::default(),
            own_secrets: OwnSecrets::default(),
            descriptors: Default::default(),
        };
        let deps = ControlDeps {
            store: self.store.clone(),
            bus: self.bus.clone(),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            metrics,
            health,
            internal_token: None,
            zones: ZoneData::bundled(),
            logs: Arc::new(NoLogs),
            history: Arc::new(NoHistory),
        };
        Control::bind(config, deps).await.unwrap()
    }

    fn node(&self, health: &HealthRegistry) -> NodeDeps {
        let backend: Arc<dyn Backend> = SimulatedBackend::new("n", START);
        NodeDeps {
            store: self.store.clone(),
            bus: self.bus.clone(),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            backends: BTreeMap::from([(BackendKind::SIMULATED, backend)]),
            component: health.component("node"),
        }
    }

    async fn meter(&self, health: HealthRegistry, metrics: Metrics) -> Meter {
        let place = HistoryLocation::for_store(&url(&self.folder), self.folder.path());
        let deps = meter::Deps {
            store: self.store.clone(),
            bus: self.bus.clone(),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            metrics,
            health,
        };
        Meter::open(Config::with_history(place), deps)
            .await
            .unwrap()
    }

    /// Stops the consumers, which must end.
    async fn stop(&mut self, running: Vec<RunningConsumer>) {
        std::mem::take(&mut self.stop).cancel();
        for running in running {
            let ended = tokio::time::timeout(PATIENCE, running.task).await;
            ended.expect("a consumer does not end").unwrap();
        }
    }

    /// Waits until exactly these are listed, as `CONSUMER/WORKSPACE/ENDPOINT` or `CONSUMER/POSITION`.
    async fn until_parked(&self, expected: &BTreeSet<String>, running: &[RunningConsumer]) {
        let listed = async || {
            let query = RowQuery {
                model: PARKED.into(),
                limit: 100,
                ..RowQuery::default()
            };
            let rows = self.store.rows(query).await.unwrap();
            rows.into_iter().map(|row| row.key).collect::<BTreeSet<_>>()
        };
        let waiting = async {
            while listed().await != *expected {
                for (consumer, running) in CONSUMERS.iter().zip(running) {
                    assert!(!running.task.is_finished(), "{consumer} has ended");
                }
                // There is no notification for written rows.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            panic!("parked: {:?}, expected: {expected:?}", listed().await);
        }
    }
}

fn url(folder: &TempDir) -> String {
    format!("sqlite:{}", folder.path().join("penstock.db").display())
}

fn key(endpoint: &str) -> EndpointKey {
    EndpointKey::new(&endpoint.parse().unwrap())
}

fn node_config() -> NodeConfig {
    NodeConfig {
        node: "n".into(),
        is_only: false,
        address: None,
        keep_instances: true,
        grace: Span::from_secs(1),
    }
}

fn created(name: &str) -> Event {
    let key = || SealedKey {
        hash: String::new(),
        sealed: String::new(),
    };
    Event::EndpointCreated(EndpointCreated {
        uid: Uid(Uuid::from_u128(7)),
        name: name.parse().unwrap(),
        labels: BTreeMap::default(),
        spec: serde_json::from_str("{}").unwrap(),
        keys: EndpointKeys {
            primary: key(),
            secondary: key(),
        },
    })
}

async fn execute(folder: &TempDir, sql: &'static str) {
    let mut connection = sqlx::SqliteConnection::connect(&url(folder)).await.unwrap();
    sqlx::query(sql).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

fn joined() -> Event {
    Event::MemberJoined(MemberJoined {
        source: Source {
            kind: SourceKind::GATEWAY,
            id: "g".into(),
        },
        address: None,
        backends: Vec::new(),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_consumer_reports_what_it_cannot_read_and_continues() {
    let mut harness = Harness::new().await;
    let poison = harness
        .append(StreamKind::Endpoint, "rose", created("rose"))
        .await;
    let global_poison = harness.append_to(StreamName::members(), joined()).await;
    harness
        .append(StreamKind::Endpoint, "iris", created("iris"))
        .await;
    let corrupt = "UPDATE events SET type = type || '-x' WHERE position <= 2";
    assert_eq!((poison, global_poison), (Position(1), Position(2)));
    execute(&harness.folder, corrupt).await;

    let mut running = Vec::new();
    for consumer in CONSUMERS {
        running.push(harness.run(consumer).await);
    }
    let skipped = MEMBER_READERS.map(|consumer| format!("{consumer}/{global_poison}"));
    let all = CONSUMERS.map(|consumer| format!("{consumer}/{}", key("rose")));
    let all = all.into_iter().chain(skipped.clone()).collect();
    harness.until_parked(&all, &running).await;
    for (consumer, running) in CONSUMERS.iter().zip(&running) {
        let ready = tokio::time::timeout(PATIENCE, running.health.until_ready()).await;
        assert!(ready.is_ok(), "{consumer}: {:?}", running.health.missing());
        let warnings = running.health.warnings().join("; ");
        assert!(
            warnings.contains("rose (position 1)"),
            "{consumer}: {warnings}"
        );
        let alarm = format!("penstock_parked_endpoints{{consumer=\"{consumer}\"}} 1");
        assert!(running.metrics.encode().contains(&alarm), "{consumer}");
        let is_skipping = MEMBER_READERS.contains(consumer);
        assert_eq!(
            warnings.contains("member.joined-x (position 2)"),
            is_skipping,
            "{consumer}: {warnings}"
        );
        let unprocessed = u8::from(is_skipping);
        let alarm = format!("penstock_unprocessed_events{{consumer=\"{consumer}\"}} {unprocessed}");
        assert!(running.metrics.encode().contains(&alarm), "{consumer}");
    }

    // Each consumer keeps reading, and unparking one does not affect the others.
    for (decided, consumer) in CONSUMERS.into_iter().enumerate() {
        let skip = Event::EventSkipped(EventSkipped {
            consumer: consumer.into(),
            position: poison,
            reason: "test".into(),
        });
        harness.append(StreamKind::Parking, "rose", skip).await;
        let unparked = Event::ConsumerUnparked(ConsumerUnparked {
            consumer: consumer.into(),
            reason: "test".into(),
        });
        harness.append(StreamKind::Parking, "rose", unparked).await;
        let left = CONSUMERS.into_iter().skip(decided + 1);
        let left = left.map(|consumer| format!("{consumer}/{}", key("rose")));
        let left = left.chain(skipped.clone()).collect();
        harness.until_parked(&left, &running).await;
        let warnings = running[decided].health.warnings().join("; ");
        assert!(!warnings.contains("rose"), "{consumer}: {warnings}");
    }
    harness.stop(running).await;

    // As with the release that wrote the events.
    let readable = "UPDATE events SET type = replace(type, '-x', '')";
    execute(&harness.folder, readable).await;
    let mut running = Vec::new();
    for consumer in CONSUMERS {
        running.push(harness.run(consumer).await);
    }
    harness.until_parked(&BTreeSet::new(), &running).await;
    for (consumer, running) in CONSUMERS.iter().zip(&running) {
        let warnings = running.health.warnings().join("; ");
        assert!(!warnings.contains("skipped"), "{consumer}: {warnings}");
    }
    harness.stop(running).await;
}
