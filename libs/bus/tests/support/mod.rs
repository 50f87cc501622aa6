//! Test data to publish, and subscribers that wait for what must arrive.

#![allow(dead_code)] // each test binary uses its own part

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, BusMessage, RouteMessage, Subscription};
use contract::events::{AccessRevoked, Empty, Event};
use contract::frame::{Frame, Source, SourceKind};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::route::{Route, RouteUpdate};
use contract::time::Timestamp;
use tokio::sync::mpsc::Receiver;
use uuid::Uuid;

/// How long something that must happen may take on a slow, busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Between attempts of something that may be lost.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

pub fn endpoint(name: &str) -> EndpointKey {
    EndpointKey::new(&name.parse().unwrap())
}

/// A record that claims to be the first of its bucket.
pub fn record(name: &str, position: u64) -> Arc<Record> {
    let endpoint = endpoint(name);
    Arc::new(Record {
        position: Position(position),
        prev: Position::START,
        bucket: endpoint.bucket(),
        stream: StreamName::of(StreamKind::Endpoint, &endpoint),
        version: position,
        id: Uuid::from_u128(u128::from(position)),
        time: Timestamp::from_secs(1),
        actor: Actor::service("test"),
        event: Event::EndpointDeletionRequested(Empty {}),
    })
}

pub fn global_record(position: u64) -> Arc<Record> {
    Arc::new(Record {
        bucket: Bucket::GLOBAL,
        stream: StreamName::access(),
        event: Event::AccessRevoked(AccessRevoked {
            name: "visitor".parse().unwrap(),
        }),
        ..(*record("iris", position)).clone()
    })
}

/// Records of many endpoints with positions 1 to `count`, chained per bucket as by the store.
pub fn record_log(count: u64) -> Vec<Arc<Record>> {
    let mut last: BTreeMap<Bucket, Position> = BTreeMap::new();
    let chained = (1..=count).map(|position| {
        let record = record(&format!("e{}", position * 7919 % 500), position);
        let prev = last.insert(record.bucket, record.position);
        Arc::new(Record {
            prev: prev.unwrap_or_default(),
            ..(*record).clone()
        })
    });
    chained.collect()
}

pub fn frame(sequence: u64) -> Arc<Frame> {
    Arc::new(Frame {
        source: Source {
            kind: SourceKind::GATEWAY,
            id: "g1".to_owned(),
        },
        boot: Uuid::nil(),
        sequence,
        bucket: Bucket(5),
        start: Timestamp::from_secs(sequence as i64),
        length_us: 1_000_000,
        routes: Default::default(),
        members: Position(3),
        hello: None,
        goodbye: false,
        deployments: Vec::new(),
    })
}

/// The removal of an endpoint's route.
pub fn route(name: &str, revision: u64) -> Arc<RouteUpdate> {
    Arc::new(RouteUpdate {
        endpoint: endpoint(name),
        revision: Position(revision),
        members: Position(2),
        route: None,
    })
}

pub fn route_of(name: &str, revision: u64) -> Arc<RouteUpdate> {
    let route = serde_json::json!({
        "endpointUid": Uuid::nil(), "auth": "key", "keyHashes": ["ab", "cd"],
        "modelClientErrors": "bad", "requestBytesMax": 1000, "deployments": {},
    });
    let route: Route = serde_json::from_value(route).unwrap();
    Arc::new(RouteUpdate {
        route: Some(route),
        ..(*self::route(name, revision)).clone()
    })
}

/// Takes everything that is queued.
pub fn drain<T>(receiver: &mut Receiver<T>) -> Vec<T> {
    std::iter::from_fn(|| receiver.try_recv().ok()).collect()
}

/// Receives the next message; panics if there is none.
pub async fn next<T>(receiver: &mut Receiver<T>) -> T {
    let next = tokio::time::timeout(TIMEOUT, receiver.recv());
    next.await.expect("nothing received").expect("closed")
}

pub async fn next_route(routes: &mut Receiver<RouteMessage>) -> Arc<RouteUpdate> {
    loop {
        if let RouteMessage::Update(update) = next(routes).await {
            return update;
        }
    }
}

pub async fn expect_closed<T>(receiver: &mut Receiver<T>) {
    let drained = async { while receiver.recv().await.is_some() {} };
    tokio::time::timeout(TIMEOUT, drained)
        .await
        .expect("still open");
}

/// Waits until frames reach all these subscribers; consumes what they received by then.
pub async fn wait_for_frames(bus: &dyn Bus, subscribers: &mut [Receiver<Arc<Frame>>]) {
    let flows = async {
        let mut probe = 1000;
        for subscriber in subscribers {
            loop {
                probe += 1;
                bus.publish_frame(frame(probe));
                if tokio::time::timeout(RETRY_INTERVAL, subscriber.recv())
                    .await
                    .is_ok()
                {
                    break;
                }
            }
        }
    };
    tokio::time::timeout(TIMEOUT, flows)
        .await
        .expect("no frame received");
}

/// A subscriber of records that keeps what it received, and checks it.
pub struct Reader {
    messages: Receiver<BusMessage>,
    pub buckets: BTreeSet<Bucket>,
    pub records: BTreeMap<Position, Arc<Record>>,
    pub repeated: u64,
    /// Whether each bucket's records came in order, apart from repeats.
    pub is_in_order: bool,
    last: BTreeMap<Bucket, Position>,
}

impl Reader {
    pub fn subscribe(bus: &dyn Bus, subscription: Subscription) -> Self {
        Self {
            messages: bus.subscribe_records(subscription),
            buckets: BTreeSet::new(),
            records: BTreeMap::new(),
            repeated: 0,
            is_in_order: true,
            last: BTreeMap::new(),
        }
    }

    /// Subscribes, and waits until all buckets are assigned.
    pub async fn join(bus: &dyn Bus, subscription: Subscription) -> Self {
        let mut reader = Self::subscribe(bus, subscription);
        reader
            .wait_for_buckets(Bucket::of_endpoints().count())
            .await;
        reader
    }

    pub async fn wait_for_buckets(&mut self, count: usize) {
        while self.buckets.len() != count {
            let message = next(&mut self.messages).await;
            self.receive(message);
        }
    }

    /// Waits until this many different records have been received.
    pub async fn wait_for_records(&mut self, count: usize) {
        while self.records.len() < count {
            let message = tokio::time::timeout(TIMEOUT, self.messages.recv()).await;
            let Ok(message) = message else {
                let had = self.records.keys().collect::<Vec<_>>();
                panic!("only {} of {count} records received: {had:?}", had.len());
            };
            self.receive(message.expect("closed"));
        }
    }

    /// Receives what arrives within [`RETRY_INTERVAL`]; returns whether anything did.
    pub async fn receive_pending(&mut self) -> bool {
        match tokio::time::timeout(RETRY_INTERVAL, self.messages.recv()).await {
            Ok(message) => {
                self.receive(message.expect("closed"));
                for message in drain(&mut self.messages) {
                    self.receive(message);
                }
                true
            }
            Err(_) => false,
        }
    }

    pub async fn wait_until_closed(&mut self) {
        while let Some(message) = tokio::time::timeout(TIMEOUT, self.messages.recv())
            .await
            .expect("still open")
        {
            self.receive(message);
        }
    }

    fn receive(&mut self, message: BusMessage) {
        match message {
            BusMessage::Assigned(buckets) => {
                for bucket in buckets {
                    assert!(
                        self.buckets.insert(bucket),
                        "bucket {bucket} assigned twice"
                    );
                }
            }
            BusMessage::Revoked(buckets) => {
                for bucket in buckets {
                    assert!(self.buckets.remove(&bucket), "bucket {bucket} was not ours");
                }
            }
            BusMessage::Record(record) => {
                let ours = record.bucket == Bucket::GLOBAL || self.buckets.contains(&record.bucket);
                assert!(
                    ours,
                    "a record of bucket {}, which is not ours",
                    record.bucket
                );
                self.remember(record);
            }
        }
    }

    fn remember(&mut self, record: Arc<Record>) {
        if self
            .records
            .insert(record.position, record.clone())
            .is_some()
        {
            self.repeated += 1;
            return;
        }
        let last = self.last.insert(record.bucket, record.position);
        self.is_in_order &= last.unwrap_or_default() < record.position;
    }
}
