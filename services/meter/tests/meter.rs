//! The meter with a real store, a real bus and a clock that the test moves.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use bus::{Bus, LocalBus};
use contract::events::{
    EndpointCreated, EndpointKeys, Event, InstanceRequested, InstanceStarted, OfInstance,
    RequestReason, SealedKey,
};
use contract::frame::{DeploymentFrame, Frame, Outcomes, Role, Source, SourceKind};
use contract::histogram::Histogram;
use contract::ids::{DeploymentRef, EndpointKey, InstanceId, Name, Uid};
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use contract::usage::UsageMinute;
use meter::{Config, Deps, GapSpan, History, Meter, Point, Query};
use runtime::clock::ManualClock;
use runtime::health::Health;
use runtime::ids::{Ids, SeededIds};
use runtime::metrics::Metrics;
use runtime::relay;
use store::{Append, Commit, Store};
use tempfile::TempDir;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

/// A whole minute.
const START: i64 = 1_700_000_040;

struct House {
    folder: TempDir,
    store: Store,
    bus: Arc<LocalBus>,
    clock: Arc<ManualClock>,
    ids: Arc<SeededIds>,
    committed: UnboundedReceiver<Vec<Arc<Record>>>,
    _relay: DropGuard,
}

struct Running {
    history: History,
    metrics: Metrics,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

impl House {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("log.db").display());
        let store = Store::open(&url).await.unwrap();
        let bus = LocalBus::new();
        let stop = CancellationToken::new();
        tokio::spawn(relay::run(store.clone(), bus.clone(), stop.clone()));
        let house = Self {
            folder,
            committed: store.committed(),
            store,
            bus,
            clock: Arc::new(ManualClock::new(Timestamp::from_secs(START))),
            ids: Arc::new(SeededIds::new(1)),
            _relay: stop.drop_guard(),
        };
        house.append(StreamKind::Endpoint, vec![created()]).await;
        house
    }

    async fn append(&self, kind: StreamKind, events: Vec<Event>) {
        let stream = StreamName::of(kind, &endpoint());
        let before = self.store.read_stream(&stream, 0, 1000).await.unwrap();
        let new = |event| NewEvent {
            id: self.ids.event_id(Timestamp::from_secs(START)),
            time: Timestamp::from_secs(START),
            actor: Actor::service("test"),
            event,
        };
        let append = Append {
            stream,
            expected_version: before.len() as u64,
            events: events.into_iter().map(new).collect(),
        };
        let commit = Commit {
            appends: vec![append],
            ..Commit::default()
        };
        self.store.commit(commit).await.unwrap();
    }

    async fn run(&self) -> Running {
        let health = Health::default();
        let metrics = Metrics::default();
        let deps = Deps {
            store: self.store.clone(),
            bus: self.bus.clone(),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            metrics: metrics.clone(),
            health: health.clone(),
        };
        let meter = Meter::open(Config::new(self.folder.path()), deps)
            .await
            .unwrap();
        let history = meter.history();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move { meter.run(stopped).await.unwrap() });
        health.until_ready().await;
        Running {
            history,
            metrics,
            stop,
            task,
        }
    }

    /// The gateway tells of these seconds of the minute, one request each.
    fn seconds(&self, boot: u128, seconds: std::ops::Range<u64>) {
        for second in seconds {
            self.bus.publish_frame(Arc::new(frame(boot, second)));
        }
    }

    fn at(&self, second: u64) {
        let start = Timestamp::from_secs(START);
        self.clock.set(start + Span::from_secs(second));
    }

    /// The next event of usage.
    async fn usage(&mut self) -> Event {
        loop {
            let records = self.committed.recv().await.unwrap();
            for record in records {
                if record.stream.as_str().starts_with("usage/") {
                    return record.event.clone();
                }
            }
        }
    }

    async fn closed(&mut self) -> UsageMinute {
        match self.usage().await {
            Event::UsageClosed(minute) => minute,
            event => panic!("{event:?}"),
        }
    }
}

fn endpoint() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

fn blue() -> Name {
    "blue".parse().unwrap()
}

fn uid() -> Uid {
    Uid(Uuid::from_u128(7))
}

fn created() -> Event {
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

fn frame(boot: u128, second: u64) -> Frame {
    let mut latency = Histogram::default();
    latency.record(20_000);
    Frame {
        source: Source {
            kind: SourceKind::Gateway,
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
            endpoint: endpoint(),
            deployment: blue(),
            deployment_uid: uid(),
            role: Role::Live,
            outcomes: Outcomes {
                success: 1,
                ..Outcomes::default()
            },
            arrivals: 1,
            in_flight_us: 500_000,
            in_flight_max: 1,
            queued_us: 0,
            queued_max: 0,
            request_bytes: 10,
            response_bytes: 20,
            at_or_below: BTreeMap::new(),
            latency,
            instances: Vec::new(),
        }],
    }
}

fn arrivals(minute: &UsageMinute) -> u64 {
    let slices = minute.slices.iter();
    slices
        .map(|slice| slice.by_role[&Role::Live].arrivals)
        .sum()
}

async fn points(history: &History, step: u64) -> Vec<Point> {
    let query = Query {
        endpoint: Some("iris".parse().unwrap()),
        deployment: None,
        from: Timestamp::from_secs(START),
        to: Timestamp::from_secs(START + 60),
        step: Span::from_secs(step),
    };
    history.points(&query).await.unwrap()
}

#[tokio::test]
async fn a_minute_is_written_to_the_log_once_it_is_over() {
    let mut house = House::new().await;
    let meter = house.run().await;
    house.seconds(1, 0..60);
    house.at(60);
    let minute = house.closed().await;
    assert_eq!(minute.minute, Timestamp::from_secs(START));
    assert_eq!((minute.deployment_uid, arrivals(&minute)), (uid(), 60));
    let text = meter.metrics.encode();
    assert!(
        text.contains("penstock_meter_frames_total{counted=\"in-time\"} 60"),
        "{text}"
    );
    meter.stop().await;
}

#[tokio::test]
async fn an_open_minute_survives_a_restart() {
    let mut house = House::new().await;
    let meter = house.run().await;
    house.seconds(1, 0..30);
    house.at(30);
    meter.stop().await;
    let meter = house.run().await;
    // The gateway has gone on; what it sent meanwhile comes again, or not at all.
    house.seconds(1, 25..60);
    house.at(60);
    let minute = house.closed().await;
    assert_eq!(arrivals(&minute), 60);
    meter.stop().await;
}

#[tokio::test]
async fn frames_that_never_came_are_named() {
    let mut house = House::new().await;
    let meter = house.run().await;
    house.seconds(1, 0..20);
    house.seconds(1, 24..60);
    house.at(60);
    assert_eq!(arrivals(&house.closed().await), 56);
    let stream = StreamName::of(StreamKind::Usage, &endpoint());
    let records = house.store.read_stream(&stream, 0, 10).await.unwrap();
    let Event::UsageGap(gap) = &records[1].event else {
        panic!("{records:?}")
    };
    assert_eq!((gap.first, gap.last), (20, 23));
    meter.stop().await;
}

#[tokio::test]
async fn a_meter_that_was_taken_over_takes_again() {
    let mut house = House::new().await;
    let meter = house.run().await;
    let bucket = endpoint().bucket();
    let other = house.store.take(&format!("meter/{bucket}")).await.unwrap();
    house.seconds(1, 0..60);
    house.at(60);
    assert_eq!(arrivals(&house.closed().await), 60);
    let next = house.store.take(&other.name).await.unwrap();
    assert_eq!(next.generation, other.generation + 2);
    meter.stop().await;
}

#[tokio::test]
async fn a_usage_stream_that_moved_on_is_caught_up_with() {
    let mut house = House::new().await;
    let meter = house.run().await;
    house.seconds(1, 0..60);
    let foreign = UsageMinute {
        deployment: blue(),
        deployment_uid: uid(),
        minute: Timestamp::from_secs(START - 600),
        slices: Vec::new(),
        counted: Vec::new(),
    };
    house
        .append(StreamKind::Usage, vec![Event::UsageClosed(foreign)])
        .await;
    house.closed().await;
    house.at(60);
    assert_eq!(arrivals(&house.closed().await), 60);
    meter.stop().await;
}

#[tokio::test]
async fn history_has_a_point_for_each_step_and_says_what_is_missing() {
    let house = House::new().await;
    let deployment = DeploymentRef {
        endpoint: "iris".parse().unwrap(),
        deployment: blue(),
    };
    let id = InstanceId::new(&deployment, Uuid::from_u128(1));
    let spec = serde_json::from_value(serde_json::json!({
        "backend": "process", "instanceType": "cpu-small", "command": ["serve", "{port}"]
    }));
    let requested = InstanceRequested {
        id: id.clone(),
        generation: 1,
        deployment,
        deployment_uid: uid(),
        revision: 1,
        node: "n1".to_owned(),
        decision: None,
        reason: RequestReason::ScaleOut,
        spec: spec.unwrap(),
    };
    house
        .append(
            StreamKind::Instances,
            vec![Event::InstanceRequested(Box::new(requested))],
        )
        .await;
    let started = InstanceStarted {
        id: id.clone(),
        generation: 1,
        address: "127.0.0.1:1".to_owned(),
        pid: None,
        adopted: false,
    };
    append_node(
        &house,
        vec![
            Event::InstanceStarted(started),
            Event::InstanceReady(OfInstance { id }),
        ],
    )
    .await;
    let meter = house.run().await;
    house.seconds(1, 0..20);
    house.seconds(1, 30..40);
    house.at(45);
    meter.stop().await;
    let meter = house.run().await;
    let points = points(&meter.history, 10).await;
    let told: Vec<_> = points
        .iter()
        .map(|p| (p.time.secs() - START, p.covered_seconds, p.requests))
        .collect();
    assert_eq!(told, [(0, 10, 10), (10, 10, 10), (30, 10, 10)]);
    assert_eq!(points[0].requests_per_second, 1.0);
    assert_eq!(points[0].concurrency, 0.5);
    assert_eq!(points[0].instances, Some(1));
    let p99 = points[0].latency_p99_ms.unwrap();
    assert!((20.0..20.5).contains(&p99), "{p99}");
    let gaps = meter
        .history
        .gaps(
            &endpoint(),
            Timestamp::from_secs(START),
            Timestamp::from_secs(START + 40),
        )
        .await
        .unwrap();
    let gap = GapSpan {
        from: Timestamp::from_secs(START + 20),
        to: Timestamp::from_secs(START + 30),
    };
    assert_eq!(gaps, [gap]);
    meter.stop().await;
}

async fn append_node(house: &House, events: Vec<Event>) {
    let new = |event| NewEvent {
        id: house.ids.event_id(Timestamp::from_secs(START)),
        time: Timestamp::from_secs(START),
        actor: Actor::service("test"),
        event,
    };
    let append = Append {
        stream: StreamName::of_node(&endpoint(), "n1"),
        expected_version: 0,
        events: events.into_iter().map(new).collect(),
    };
    let commit = Commit {
        appends: vec![append],
        ..Commit::default()
    };
    house.store.commit(commit).await.unwrap();
}

#[tokio::test]
async fn panes_past_the_retention_are_deleted() {
    let house = House::new().await;
    let meter = house.run().await;
    house.seconds(1, 0..60);
    house.at(60);
    meter.stop().await;
    let meter = house.run().await;
    assert_eq!(points(&meter.history, 60).await.len(), 1);
    house.at(15 * 24 * 3600);
    meter.stop().await;
    let meter = house.run().await;
    assert_eq!(points(&meter.history, 60).await, []);
    meter.stop().await;
}

#[tokio::test]
async fn a_query_for_too_many_points_is_refused() {
    let house = House::new().await;
    let meter = house.run().await;
    let query = Query {
        endpoint: None,
        deployment: None,
        from: Timestamp::from_secs(0),
        to: Timestamp::from_secs(1_000_000),
        step: Span::from_secs(1),
    };
    let refused = meter.history.points(&query).await.unwrap_err().to_string();
    assert!(refused.contains("longer step"), "{refused}");
    meter.stop().await;
}
