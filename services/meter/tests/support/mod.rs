//! The meter with a real store on either database, a real bus and a manual clock.

#![allow(dead_code)]

pub mod shared;

use std::collections::VecDeque;
use std::sync::Arc;

use bus::{Bus, LocalBus};
use contract::events::{EndpointCreated, EndpointKeys, Event, SealedKey};
use contract::frame::{DeploymentFrame, Frame, InstanceFrame, Outcomes, Role, Source, SourceKind};
use contract::histogram::Histogram;
use contract::ids::{EndpointKey, Name, Uid};
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use contract::usage::UsageMinute;
use meter::{Config, Deps, HistoryLocation, HistoryStore, Meter, Point, PointsQuery};
use runtime::clock::ManualClock;
use runtime::health::HealthRegistry;
use runtime::ids::{Ids, SeededIds};
use runtime::metrics::Metrics;
use runtime::relay;
use store::{Append, Commit, CommitError, Store};
use tempfile::TempDir;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

/// The start of a minute.
pub const START: i64 = 1_700_000_040;

#[derive(Clone, Copy)]
pub enum Database {
    Sqlite,
    Postgres,
}

/// Runs each test on both databases.
#[macro_export]
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                let harness = $crate::support::Harness::new($crate::support::Database::Sqlite).await;
                super::$name(harness.unwrap()).await;
            })*
        }
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                let Some(harness) = $crate::support::Harness::new($crate::support::Database::Postgres).await else {
                    return;
                };
                super::$name(harness).await;
            })*
        }
    };
}

pub struct Harness {
    _folder: TempDir,
    pub location: HistoryLocation,
    pub store: Store,
    pub bus: Arc<LocalBus>,
    pub clock: Arc<ManualClock>,
    pub ids: Arc<SeededIds>,
    committed: UnboundedReceiver<Vec<Arc<Record>>>,
    /// Committed usage events that have not been returned yet.
    usage_events: VecDeque<Event>,
    _relay: DropGuard,
}

pub struct RunningMeter {
    pub history: HistoryStore,
    pub metrics: Metrics,
    pub health: HealthRegistry,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl RunningMeter {
    pub async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    /// Aborts the meter without a final save.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

impl Harness {
    /// Returns `None` if tests run without the server.
    pub async fn new(database: Database) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let url = match database {
            Database::Sqlite => format!("sqlite:{}", folder.path().join("log.db").display()),
            Database::Postgres => servers::Postgres::shared()?.database(),
        };
        let store = Store::open(&url).await.unwrap();
        let bus = LocalBus::new();
        let stop = CancellationToken::new();
        tokio::spawn(relay::run(store.clone(), bus.clone(), stop.clone()));
        let harness = Self {
            location: HistoryLocation::for_store(&url, folder.path()),
            _folder: folder,
            committed: store.subscribe(),
            usage_events: VecDeque::new(),
            store,
            bus,
            clock: Arc::new(ManualClock::new(Timestamp::from_secs(START))),
            ids: Arc::new(SeededIds::new(1)),
            _relay: stop.drop_guard(),
        };
        harness.append(StreamKind::Endpoint, vec![created()]).await;
        Some(harness)
    }

    pub async fn append(&self, kind: StreamKind, events: Vec<Event>) {
        let stream = StreamName::of(kind, &endpoint());
        let new = |event| NewEvent {
            id: self.ids.event_id(Timestamp::from_secs(START)),
            time: Timestamp::from_secs(START),
            actor: Actor::service("test"),
            event,
        };
        let events: Vec<NewEvent> = events.into_iter().map(new).collect();
        loop {
            let before = self.store.read_stream(&stream, 0, 1000).await.unwrap();
            let append = Append {
                stream: stream.clone(),
                expected_version: before.len() as u64,
                events: events.clone(),
            };
            let commit = Commit {
                appends: vec![append],
                ..Commit::default()
            };
            match self.store.commit(commit).await {
                Ok(_) => return,
                // The meter under test was faster.
                Err(CommitError::Conflict { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub async fn run(&self) -> RunningMeter {
        let meter = self.run_on(self.bus.clone()).await;
        meter.health.until_ready().await;
        meter
    }

    /// Starts a meter that may not own any bucket yet.
    pub async fn run_on(&self, bus: Arc<dyn Bus>) -> RunningMeter {
        let health = HealthRegistry::default();
        let metrics = Metrics::default();
        let deps = Deps {
            store: self.store.clone(),
            bus,
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            metrics: metrics.clone(),
            health: health.clone(),
        };
        let meter = Meter::open(Config::with_history(self.location.clone()), deps)
            .await
            .unwrap();
        let history = meter.history();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move { meter.run(stopped).await.unwrap() });
        RunningMeter {
            history,
            metrics,
            health,
            stop,
            task,
        }
    }

    /// Publishes gateway frames for these seconds of the minute, one request each.
    pub fn report(&self, boot: u128, seconds: std::ops::Range<u64>) {
        for second in seconds {
            self.bus.publish_frame(Arc::new(frame(boot, second)));
        }
    }

    /// Publishes node frames for these seconds, in which the instance is idle.
    pub fn report_idle(&self, seconds: std::ops::Range<u64>) {
        for second in seconds {
            self.bus.publish_frame(Arc::new(idle_frame(second)));
        }
    }

    pub fn set_second(&self, second: u64) {
        let start = Timestamp::from_secs(START);
        self.clock.set(start + Span::from_secs(second));
    }

    /// Returns the next usage event.
    pub async fn next_usage_event(&mut self) -> Event {
        loop {
            if let Some(event) = self.usage_events.pop_front() {
                return event;
            }
            let records = self.committed.recv().await.unwrap();
            let usage_events = records
                .iter()
                .filter(|r| r.stream.as_str().starts_with("usage/"));
            self.usage_events
                .extend(usage_events.map(|record| record.event.clone()));
        }
    }

    pub async fn next_closed(&mut self) -> UsageMinute {
        match self.next_usage_event().await {
            Event::UsageClosed(minute) => minute,
            event => panic!("{event:?}"),
        }
    }
}

pub fn endpoint() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

pub fn blue() -> Name {
    "blue".parse().unwrap()
}

pub fn uid() -> Uid {
    Uid(Uuid::from_u128(7))
}

pub fn created() -> Event {
    let key = || SealedKey {
        hash: String::new(),
        sealed: String::new(),
    };
    Event::EndpointCreated(EndpointCreated {
        uid: uid(),
        name: "iris".parse().unwrap(),
        labels: Default::default(),
        spec: serde_json::from_str("{}").unwrap(),
        keys: EndpointKeys {
            primary: key(),
            secondary: key(),
        },
    })
}

pub fn frame(boot: u128, second: u64) -> Frame {
    let mut latency = Histogram::default();
    latency.record(20_000);
    Frame {
        source: Source {
            kind: SourceKind::GATEWAY,
            id: "g1".to_owned(),
        },
        boot: Uuid::from_u128(boot),
        sequence: second,
        bucket: endpoint().bucket(),
        start: Timestamp::from_secs(START) + Span::from_secs(second),
        length_us: 1_000_000,
        routes: Default::default(),
        members: Default::default(),
        hello: None,
        goodbye: false,
        deployments: vec![DeploymentFrame {
            outcomes: Outcomes {
                success: 1,
                ..Outcomes::default()
            },
            arrivals: 1,
            in_flight_us: 500_000,
            in_flight_max: 1,
            request_bytes: 10,
            response_bytes: 20,
            latency,
            ..DeploymentFrame::new(endpoint(), blue(), uid(), Role::LIVE)
        }],
    }
}

/// A node's frame of a second in which its instance is idle.
pub fn idle_frame(second: u64) -> Frame {
    let instance = InstanceFrame {
        cpu_us: Some(100),
        memory_bytes: Some(1000 + second),
        ..InstanceFrame::new("iris-blue-1".to_owned().into())
    };
    let mut frame = frame(1, second);
    frame.source = Source {
        kind: SourceKind::NODE,
        id: "n1".to_owned(),
    };
    frame.deployments = vec![DeploymentFrame {
        instances: vec![instance],
        ..DeploymentFrame::new(endpoint(), blue(), uid(), Role::LIVE)
    }];
    frame
}

/// Total CPU time of a usage event.
pub fn cpu_us(minute: &UsageMinute) -> u64 {
    let instances = minute.slices.iter().flat_map(|s| s.by_instance.values());
    instances.map(|usage| usage.cpu_us).sum()
}

pub fn arrivals(minute: &UsageMinute) -> u64 {
    let slices = minute.slices.iter();
    let live = slices.filter_map(|slice| slice.by_role.get(&Role::LIVE));
    live.map(|counts| counts.arrivals).sum()
}

/// Returns requests and covered seconds of a minute from the history.
pub async fn saved_totals(history: &HistoryStore, minute: i64) -> (u64, u64) {
    let query = PointsQuery {
        endpoint: Some("iris".parse().unwrap()),
        deployment: None,
        from: Timestamp::from_secs(START + 60 * minute),
        to: Timestamp::from_secs(START + 60 * (minute + 1)),
        step: Span::from_secs(60),
    };
    let points = history.points(&query).await.unwrap();
    let point = points.first();
    point.map_or((0, 0), |p| (p.requests, p.covered_seconds))
}

pub async fn points(history: &HistoryStore, step: u64) -> Vec<Point> {
    let query = PointsQuery {
        endpoint: Some("iris".parse().unwrap()),
        deployment: None,
        from: Timestamp::from_secs(START),
        to: Timestamp::from_secs(START + 60),
        step: Span::from_secs(step),
    };
    history.points(&query).await.unwrap()
}
