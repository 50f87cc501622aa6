//! The reconcile loop while buckets come and go, owners are replaced and events are poisonous.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bus::BusMessage;
use contract::events::{
    AccessRevoked, ConsumerUnparked, Empty, Event, EventSkipped, InstanceRemovalRequested,
    LeaveReason, MemberLeft, RemovalReason,
};
use contract::frame::{Frame, Source, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Position};
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use runtime::clock::{Clock, SystemClock};
use runtime::consumer::Fold;
use runtime::health::HealthRegistry;
use runtime::ids::{Ids, SystemIds};
use runtime::parking::{PARKED, Parking, UnprocessedEvent, global_row_key};
use runtime::reconcile::{Deps, Outputs, Reconciler, run};
use serde::{Deserialize, Serialize};
use store::{Append, Commit, Store};
use support::{ScriptedBus, append, append_to, execute, key, open};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Answers each request event once. Panics on an endpoint's deletion.
struct Echo {
    evaluated: mpsc::UnboundedSender<EndpointKey>,
    /// The buckets and starts of frames.
    observed: mpsc::UnboundedSender<(Bucket, Timestamp)>,
    forgotten: mpsc::UnboundedSender<Bucket>,
    /// The calls that prepare or evaluate.
    calls: mpsc::UnboundedSender<&'static str>,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Counts {
    requested: usize,
    answered: usize,
}

struct EchoFold;

impl Fold for EchoFold {
    type State = Counts;
    type Effect = ();

    const VERSION: u32 = 1;
    const READS: &'static [StreamKind] = &[
        StreamKind::Endpoint,
        StreamKind::Instances,
        StreamKind::Members,
    ];

    fn apply(&self, _key: &EndpointKey, state: &mut Counts, record: &Record) {
        match &record.event {
            Event::EndpointDeletionRequested(_) => state.requested += 1,
            Event::InstanceRemovalRequested(_) => state.answered += 1,
            Event::EndpointDeleted(_) => panic!("poison"),
            _ => {}
        }
    }

    fn writes(&self, stream: &StreamName) -> bool {
        stream.kind() == Some(StreamKind::Instances)
    }
}

impl Reconciler for Echo {
    type Fold = EchoFold;
    type Global = ();

    const SERVICE: &'static str = "echo";
    const STREAM: StreamKind = StreamKind::Instances;
    const TICK: Duration = Duration::from_millis(20);
    const FRAMES_AGAIN: Span = Span::from_secs(45);

    fn fold(&self) -> EchoFold {
        EchoFold
    }

    /// Panics on whatever belongs to no endpoint.
    fn apply_global(_global: &mut (), _record: &Record) {
        panic!("poison");
    }

    fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &Counts,
        _global: &(),
        _now: Timestamp,
    ) -> Outputs {
        let _ = self.calls.send("evaluate");
        let answer = || {
            Event::InstanceRemovalRequested(InstanceRemovalRequested {
                id: InstanceId::from("i".to_owned()),
                generation: 1,
                node: "n".into(),
                grace: Span::from_secs(1),
                reason: RemovalReason::Ended,
            })
        };
        let due = state.requested.saturating_sub(state.answered);
        if due > 0 {
            // The test may have ended.
            let _ = self.evaluated.send(key.clone());
        }
        let events = (0..due).map(|_| answer()).collect();
        Outputs::to(StreamName::of(Self::STREAM, key), events)
    }

    fn prepare(&mut self, _key: &EndpointKey, _state: &Counts, _now: Timestamp) {
        let _ = self.calls.send("prepare");
    }

    fn prepared(&mut self, _bucket: Bucket, _now: Timestamp) {
        let _ = self.calls.send("prepared");
    }

    fn observe(&mut self, frame: &Frame, _now: Timestamp) -> bool {
        // The test may not listen.
        let _ = self.observed.send((frame.bucket, frame.start));
        false
    }

    fn due(&mut self, _now: Timestamp) -> BTreeSet<Bucket> {
        BTreeSet::new()
    }

    fn forget(&mut self, bucket: Bucket) {
        let _ = self.forgotten.send(bucket);
    }
}

struct Replica {
    bus: Arc<ScriptedBus>,
    health: HealthRegistry,
    evaluated: mpsc::UnboundedReceiver<EndpointKey>,
    observed: mpsc::UnboundedReceiver<(Bucket, Timestamp)>,
    forgotten: mpsc::UnboundedReceiver<Bucket>,
    calls: mpsc::UnboundedReceiver<&'static str>,
    _stop: tokio_util::sync::DropGuard,
}

fn replica(store: &Store) -> Replica {
    let (bus, health, stop) = (
        ScriptedBus::new(),
        HealthRegistry::default(),
        CancellationToken::new(),
    );
    let (evaluated, evaluated_rx) = mpsc::unbounded_channel();
    let (observed, observed_rx) = mpsc::unbounded_channel();
    let (forgotten, forgotten_rx) = mpsc::unbounded_channel();
    let (calls, calls_rx) = mpsc::unbounded_channel();
    let deps = Deps {
        store: store.clone(),
        bus: bus.clone(),
        clock: Arc::new(SystemClock),
        ids: Arc::new(SystemIds::default()),
    };
    let echo = Echo {
        evaluated,
        observed,
        forgotten,
        calls,
    };
    let run = run(echo, deps, health.component("echo"), stop.clone());
    tokio::spawn(run);
    Replica {
        bus,
        health,
        evaluated: evaluated_rx,
        observed: observed_rx,
        forgotten: forgotten_rx,
        calls: calls_rx,
        _stop: stop.drop_guard(),
    }
}

impl Replica {
    /// Assigns buckets, once the loop has subscribed.
    async fn assign(&self, endpoints: &[&str]) {
        tokio::task::yield_now().await;
        let buckets = endpoints.iter().map(|name| key(name).bucket()).collect();
        self.bus.send(BusMessage::Assigned(buckets));
    }

    fn revoke(&self, endpoint: &str) {
        let bucket = key(endpoint).bucket();
        self.bus.send(BusMessage::Revoked(vec![bucket]));
    }
}

/// A frame that was sent so long ago.
fn frame(bucket: Bucket, seconds_ago: u64) -> Arc<Frame> {
    let now = SystemClock.now();
    Arc::new(Frame {
        source: Source {
            kind: SourceKind::GATEWAY,
            id: "g".into(),
        },
        boot: Uuid::nil(),
        sequence: 0,
        bucket,
        start: Timestamp::from_millis(now.millis() - 1000 * seconds_ago as i64),
        length_us: 1_000_000,
        routes: Default::default(),
        members: Default::default(),
        hello: None,
        goodbye: false,
        deployments: Vec::new(),
    })
}

#[tokio::test]
async fn the_last_frames_of_an_acquired_bucket_are_read_again_before_those_that_arrive_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut replica = replica(&store);
    let bucket = key("iris").bucket();
    let other = Bucket((bucket.0 + 1) % 64);
    let kept = [
        frame(bucket, 60),
        frame(bucket, 30),
        frame(other, 20),
        frame(bucket, 10),
    ];
    *replica.bus.kept_frames.lock().unwrap() = kept.to_vec();
    replica.assign(&["iris"]).await;
    for expected in [&kept[1], &kept[3]] {
        let observed = replica.observed.recv().await.unwrap();
        assert_eq!(observed, (bucket, expected.start));
    }
}

async fn request(store: &Store, endpoint: &str) -> Arc<Record> {
    let event = Event::EndpointDeletionRequested(Empty {});
    append_to(store, StreamKind::Endpoint, endpoint, event).await
}

async fn answers(store: &Store, endpoint: &str) -> usize {
    let stream = StreamName::of(StreamKind::Instances, &key(endpoint));
    store.read_stream(&stream, 0, 100).await.unwrap().len()
}

async fn wait_for_answers(store: &Store, endpoint: &str, count: usize) {
    let mut head = store.head_watch();
    while answers(store, endpoint).await < count {
        head.changed().await.unwrap();
    }
    assert_eq!(answers(store, endpoint).await, count, "{endpoint}");
}

async fn wait_for_parked(store: &Store, count: usize) -> Vec<serde_json::Value> {
    loop {
        let query = store::RowQuery {
            model: PARKED.into(),
            limit: 100,
            ..Default::default()
        };
        let rows = store.rows(query).await.unwrap();
        if rows.len() == count {
            let doc = |row: &store::Row| serde_json::from_str(&row.doc).unwrap();
            return rows.iter().map(doc).collect();
        }
        // There is no notification for rows.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_reassigned_bucket_is_answered_by_its_new_owner_and_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "iris").await;
    let (mut first, second) = (replica(&store), replica(&store));
    first.assign(&["iris"]).await;
    wait_for_answers(&store, "iris", 1).await;
    first.revoke("iris");
    assert_eq!(first.forgotten.recv().await, Some(key("iris").bucket()));
    request(&store, "iris").await;
    second.assign(&["iris"]).await;
    wait_for_answers(&store, "iris", 2).await;
    // And back again.
    second.revoke("iris");
    request(&store, "iris").await;
    first.assign(&["iris"]).await;
    wait_for_answers(&store, "iris", 3).await;
}

#[tokio::test]
async fn an_acquired_bucket_is_prepared_before_anything_of_it_is_evaluated() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "iris").await;
    let mut replica = replica(&store);
    for acquired in 1..=2 {
        replica.assign(&["iris"]).await;
        for expected in ["prepare", "prepared", "evaluate"] {
            assert_eq!(replica.calls.recv().await, Some(expected), "{acquired}");
        }
        replica.revoke("iris");
        replica.forgotten.recv().await.unwrap();
        while let Ok(call) = replica.calls.try_recv() {
            assert_eq!(call, "evaluate", "{acquired}");
        }
    }
}

#[tokio::test]
async fn only_what_is_assigned_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "iris").await;
    request(&store, "tulip").await;
    let replica = replica(&store);
    replica.assign(&["tulip"]).await;
    wait_for_answers(&store, "tulip", 1).await;
    replica.health.until_ready().await;
    assert_eq!(answers(&store, "iris").await, 0);
    replica.assign(&["iris"]).await;
    wait_for_answers(&store, "iris", 1).await;
}

#[tokio::test]
async fn a_paused_owner_that_was_replaced_does_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "iris").await;
    let (mut paused, second) = (replica(&store), replica(&store));
    paused.assign(&["iris"]).await;
    wait_for_answers(&store, "iris", 1).await;
    assert!(paused.evaluated.recv().await.is_some());
    // It is not notified of its replacement.
    second.assign(&["iris"]).await;
    second.health.until_ready().await;
    let requested = request(&store, "iris").await;
    paused.bus.send(BusMessage::Record(requested.clone()));
    assert!(paused.evaluated.recv().await.is_some());
    second.bus.send(BusMessage::Record(requested));
    wait_for_answers(&store, "iris", 2).await;
    paused.revoke("iris");
    assert!(paused.forgotten.recv().await.is_some());
    let requested = request(&store, "iris").await;
    second.bus.send(BusMessage::Record(requested));
    wait_for_answers(&store, "iris", 3).await;
}

#[tokio::test]
async fn a_fenced_owner_that_is_still_assigned_reacquires_the_bucket() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "iris").await;
    let replica = replica(&store);
    replica.assign(&["iris"]).await;
    wait_for_answers(&store, "iris", 1).await;
    let bucket = key("iris").bucket();
    store
        .acquire_fence(&format!("echo/{bucket}"))
        .await
        .unwrap();
    let requested = request(&store, "iris").await;
    replica.bus.send(BusMessage::Record(requested));
    wait_for_answers(&store, "iris", 2).await;
}

#[tokio::test]
async fn poison_parks_only_its_endpoint_until_it_is_skipped_and_unparked() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "rose").await;
    let poison = Event::EndpointDeleted(Empty {});
    let poison = append_to(&store, StreamKind::Endpoint, "rose", poison).await;
    request(&store, "iris").await;
    let replica = replica(&store);
    replica.assign(&["iris", "rose"]).await;
    wait_for_answers(&store, "iris", 1).await;
    let parked = wait_for_parked(&store, 1).await;
    assert_eq!(parked[0]["consumer"], "echo");
    assert_eq!(parked[0]["endpoint"], "rose");
    assert_eq!(parked[0]["position"], poison.position.0);
    assert_eq!(parked[0]["detail"], "poison");
    replica.health.until_ready().await;
    assert_eq!(replica.health.warnings().len(), 1);
    assert_eq!(answers(&store, "rose").await, 0);

    let parking = StreamKind::Parking;
    let unparked = || {
        Event::ConsumerUnparked(ConsumerUnparked {
            consumer: "echo".into(),
            reason: "test".into(),
        })
    };
    // Without a skip, the poison parks it again.
    let again = append_to(&store, parking, "rose", unparked()).await;
    replica.bus.send(BusMessage::Record(again));
    let skipped = Event::EventSkipped(EventSkipped {
        consumer: "echo".into(),
        position: poison.position,
        reason: "test".into(),
    });
    let skipped = append_to(&store, parking, "rose", skipped).await;
    replica.bus.send(BusMessage::Record(skipped));
    let unparked = append_to(&store, parking, "rose", unparked()).await;
    replica.bus.send(BusMessage::Record(unparked));
    wait_for_answers(&store, "rose", 1).await;
    wait_for_parked(&store, 0).await;
    assert!(replica.health.warnings().is_empty());
}

#[tokio::test]
async fn poison_that_belongs_to_no_endpoint_is_skipped_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let left = MemberLeft {
        source: Source {
            kind: SourceKind::GATEWAY,
            id: "a".into(),
        },
        reason: LeaveReason::Goodbye,
    };
    let append = Append {
        stream: StreamName::members(),
        expected_version: 0,
        events: vec![NewEvent {
            id: SystemIds::default().event_id(Timestamp::from_secs(1)),
            time: Timestamp::from_secs(1),
            actor: Actor::service("test"),
            event: Event::MemberLeft(left),
        }],
    };
    let commit = Commit {
        appends: vec![append],
        ..Commit::default()
    };
    store.commit(commit).await.unwrap();
    request(&store, "iris").await;
    let replica = replica(&store);
    replica.assign(&["iris"]).await;
    wait_for_answers(&store, "iris", 1).await;
    let warnings = replica.health.warnings().join("; ");
    assert!(
        warnings.contains("are skipped: member.left (position 1)"),
        "{warnings}"
    );
}

/// An event of no endpoint that cannot be processed.
fn unprocessed(position: u64) -> UnprocessedEvent {
    UnprocessedEvent {
        position: Position(position),
        event_type: "member.left".into(),
        detail: "poison".into(),
    }
}

#[tokio::test]
async fn only_the_owner_of_bucket_0_removes_rows_of_events_of_no_endpoint() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let now = Timestamp::from_secs(1);
    let parking = || {
        Parking::open(
            "echo",
            store.clone(),
            HealthRegistry::default().component("echo"),
        )
    };
    let (mut older, mut newer) = (parking(), parking());
    older.report(unprocessed(7), now);
    wait_for_parked(&store, 1).await;
    newer.caught_up(&[Bucket(1)]);
    // Rows are written in order.
    newer.report(unprocessed(9), now);
    let row = |position| {
        let key = global_row_key("echo", Position(position));
        let store = store.clone();
        async move { store.row(PARKED, &key).await.unwrap() }
    };
    while row(9).await.is_none() {
        tokio::task::yield_now().await;
    }
    assert!(row(7).await.is_some());
    newer.caught_up(&[Bucket(0)]);
    let left = wait_for_parked(&store, 1).await;
    assert_eq!(left[0]["position"], 9);
}

#[tokio::test]
async fn decisions_about_parking_hold_for_the_next_owner() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let poison = Event::EndpointDeleted(Empty {});
    let poison = append_to(&store, StreamKind::Endpoint, "rose", poison).await;
    request(&store, "rose").await;
    let skipped = Event::EventSkipped(EventSkipped {
        consumer: "echo".into(),
        position: poison.position,
        reason: "test".into(),
    });
    append_to(&store, StreamKind::Parking, "rose", skipped).await;
    let unparked = Event::ConsumerUnparked(ConsumerUnparked {
        consumer: "echo".into(),
        reason: "test".into(),
    });
    append_to(&store, StreamKind::Parking, "rose", unparked).await;
    let replica = replica(&store);
    replica.assign(&["rose"]).await;
    wait_for_answers(&store, "rose", 1).await;
    wait_for_parked(&store, 0).await;
}

#[tokio::test]
async fn an_event_that_cannot_be_decoded_parks_its_endpoint() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "rose").await;
    request(&store, "iris").await;
    execute(
        &folder,
        "UPDATE events SET type = 'endpoint.not-invented-yet' WHERE position = 1",
    )
    .await;
    let replica = replica(&store);
    replica.assign(&["iris", "rose"]).await;
    wait_for_answers(&store, "iris", 1).await;
    let parked = wait_for_parked(&store, 1).await;
    assert_eq!(parked[0]["eventType"], "endpoint.not-invented-yet");
    assert_eq!(parked[0]["position"], Position(1).0);
    assert_eq!(answers(&store, "rose").await, 0);
}

#[tokio::test]
async fn a_store_outage_is_reported_and_survived() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut replica = replica(&store);
    replica.assign(&["iris"]).await;
    replica.health.until_ready().await;
    execute(&folder, "ALTER TABLE events RENAME TO events_away").await;
    while replica.health.missing().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let missing = replica.health.missing().join("\n");
    assert!(missing.contains("the store cannot be reached"), "{missing}");
    execute(&folder, "ALTER TABLE events_away RENAME TO events").await;
    replica.health.until_ready().await;
    request(&store, "iris").await;
    wait_for_answers(&store, "iris", 1).await;
    assert!(replica.evaluated.recv().await.is_some());
}

/// Writes two streams and a row for each endpoint with a request, and as many events that belong to no
/// endpoint as are wanted.
struct Ledger {
    wanted: Arc<AtomicUsize>,
}

const POISON: &str = "poison";

struct LedgerFold;

impl Fold for LedgerFold {
    type State = Counts;
    type Effect = ();

    const VERSION: u32 = 1;
    const READS: &'static [StreamKind] = &[
        StreamKind::Endpoint,
        StreamKind::Instances,
        StreamKind::Usage,
        StreamKind::Access,
    ];

    fn apply(&self, key: &EndpointKey, state: &mut Counts, record: &Record) {
        if matches!(record.event, Event::UsageGap(_)) {
            return;
        }
        EchoFold.apply(key, state, record);
    }

    fn writes(&self, stream: &StreamName) -> bool {
        matches!(
            stream.kind(),
            Some(StreamKind::Instances | StreamKind::Usage | StreamKind::Access)
        )
    }
}

impl Reconciler for Ledger {
    type Fold = LedgerFold;
    /// The number of events.
    type Global = usize;

    const SERVICE: &'static str = "ledger";
    const STREAM: StreamKind = StreamKind::Instances;
    const TICK: Duration = Duration::from_millis(20);

    fn fold(&self) -> LedgerFold {
        LedgerFold
    }

    fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &Counts,
        _global: &usize,
        now: Timestamp,
    ) -> Outputs {
        if state.requested == state.answered {
            return Outputs::default();
        }
        let removal = Event::InstanceRemovalRequested(InstanceRemovalRequested {
            id: InstanceId::from("i".to_owned()),
            generation: 1,
            node: "n".into(),
            grace: Span::from_secs(1),
            reason: RemovalReason::Ended,
        });
        let gap = Event::UsageGap(contract::usage::UsageGap {
            minute: now,
            source: Source {
                kind: SourceKind::GATEWAY,
                id: "a".into(),
            },
            boot: Default::default(),
            first: 1,
            last: 1,
        });
        let row = contract::log::RowChange {
            model: "ledger",
            key: key.to_string(),
            endpoint: key.as_str().to_owned(),
            deployment: String::new(),
            position: Position::START,
            time: now,
            doc: Some(state.requested.to_string()),
        };
        Outputs {
            events: vec![
                (StreamName::of(StreamKind::Instances, key), removal),
                (StreamName::of(StreamKind::Usage, key), gap),
            ],
            rows: vec![row],
        }
    }

    fn apply_global(applied: &mut usize, record: &Record) {
        *applied += 1;
        let is_poison = matches!(&record.event, Event::AccessRevoked(of) if of.name == POISON);
        assert!(!is_poison, "poison");
    }

    fn evaluate_global(&mut self, applied: &usize, _now: Timestamp) -> Outputs {
        if *applied >= self.wanted.load(Ordering::Relaxed) {
            return Outputs::default();
        }
        let revoked = Event::AccessRevoked(AccessRevoked { name: "x".into() });
        Outputs::to(StreamName::access(), vec![revoked])
    }

    fn due(&mut self, _now: Timestamp) -> BTreeSet<Bucket> {
        BTreeSet::new()
    }
}

async fn ledger(store: &Store) -> (Arc<ScriptedBus>, tokio_util::sync::DropGuard) {
    ledger_that_wants(store, Arc::new(AtomicUsize::new(1))).await
}

async fn ledger_that_wants(
    store: &Store,
    wanted: Arc<AtomicUsize>,
) -> (Arc<ScriptedBus>, tokio_util::sync::DropGuard) {
    let (bus, stop) = (ScriptedBus::new(), CancellationToken::new());
    let deps = Deps {
        store: store.clone(),
        bus: bus.clone(),
        clock: Arc::new(SystemClock),
        ids: Arc::new(SystemIds::default()),
    };
    let component = HealthRegistry::default().component("ledger");
    let ledger = run(Ledger { wanted }, deps, component, stop.clone());
    tokio::spawn(ledger);
    tokio::task::yield_now().await;
    (bus, stop.drop_guard())
}

async fn wait_for_events(store: &Store, stream: StreamName, count: usize) {
    let mut head = store.head_watch();
    while store.read_stream(&stream, 0, 100).await.unwrap().len() < count {
        head.changed().await.unwrap();
    }
}

#[tokio::test]
async fn a_service_writes_several_streams_and_rows_in_one_commit() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "iris").await;
    let (bus, _stop) = ledger(&store).await;
    bus.send(BusMessage::Assigned(vec![key("iris").bucket()]));
    wait_for_answers(&store, "iris", 1).await;
    let usage = StreamName::of(StreamKind::Usage, &key("iris"));
    assert_eq!(store.read_stream(&usage, 0, 10).await.unwrap().len(), 1);
    let row = store.row("ledger", key("iris").as_str()).await.unwrap();
    assert_eq!(row.unwrap().doc, "1");
    // Both streams continue.
    let requested = request(&store, "iris").await;
    bus.send(BusMessage::Record(requested));
    wait_for_answers(&store, "iris", 2).await;
    assert_eq!(store.read_stream(&usage, 0, 10).await.unwrap().len(), 2);
}

#[tokio::test]
async fn only_the_owner_of_bucket_0_writes_what_belongs_to_no_endpoint() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    request(&store, "iris").await;
    let other = key("iris").bucket();
    assert_ne!(other, Bucket(0));
    let (bus, _stop) = ledger(&store).await;
    bus.send(BusMessage::Assigned(vec![other]));
    wait_for_answers(&store, "iris", 1).await;
    let access = StreamName::access();
    assert!(store.read_stream(&access, 0, 10).await.unwrap().is_empty());
    bus.send(BusMessage::Assigned(vec![Bucket(0)]));
    wait_for_events(&store, access, 1).await;
}

#[tokio::test]
async fn an_event_of_no_endpoint_that_panics_changes_no_state() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let poison = Event::AccessRevoked(AccessRevoked {
        name: POISON.into(),
    });
    append(&store, StreamName::access(), poison).await;
    let (bus, _stop) = ledger(&store).await;
    bus.send(BusMessage::Assigned(vec![Bucket(0)]));
    // Only if the event was not counted is there another one to write.
    wait_for_events(&store, StreamName::access(), 2).await;
}

#[tokio::test]
async fn what_belongs_to_no_endpoint_is_written_again_after_another_owner_took_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let wanted = Arc::new(AtomicUsize::new(1));
    let (bus, _stop) = ledger_that_wants(&store, wanted.clone()).await;
    bus.send(BusMessage::Assigned(vec![Bucket(0)]));
    wait_for_events(&store, StreamName::access(), 1).await;
    let fence = format!("ledger/{}", Bucket::GLOBAL);
    store.acquire_fence(&fence).await.unwrap();
    wanted.store(2, Ordering::Relaxed);
    wait_for_events(&store, StreamName::access(), 2).await;
}
