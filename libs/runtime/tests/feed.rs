//! The feed with a bus that loses, repeats and reorders records, and with the relay.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bus::{Bus, BusError, BusMessage, LocalBus, RouteMessage, Subscription};
use contract::events::{AccessRevoked, Empty, Event};
use contract::frame::Frame;
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use futures::FutureExt;
use proptest::prelude::*;
use runtime::feed::{Feed, FeedItem};
use runtime::relay;
use sqlx::Connection as _;
use store::{Append, Commit, Committed, Store};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const GROUP: Subscription = Subscription::Group("test");

/// Far longer than anything takes; reached only when a test fails.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A recheck interval short enough for tests.
const RECHECK_INTERVAL: Duration = Duration::from_millis(5);

async fn open(folder: &TempDir) -> Store {
    let url = format!("sqlite:{}", folder.path().join("log.db").display());
    Store::open(&url).await.unwrap()
}

/// Turns an event into one that a newer release might have written.
async fn damage(folder: &TempDir, position: i64) {
    let url = format!("sqlite:{}", folder.path().join("log.db").display());
    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::query("UPDATE events SET type = 'endpoint.not-invented-yet' WHERE position = $1")
        .bind(position)
        .execute(&mut connection)
        .await
        .unwrap();
}

/// Streams in different buckets, one of them global.
fn stream(index: usize) -> StreamName {
    match ["iris", "tulip", "rose"].get(index) {
        Some(name) => {
            let endpoint = EndpointKey::new(&name.parse().unwrap());
            StreamName::of(StreamKind::Endpoint, &endpoint)
        }
        None => StreamName::access(),
    }
}

#[derive(Default)]
struct Writer {
    versions: BTreeMap<usize, u64>,
}

impl Writer {
    async fn write(&mut self, store: &Store, index: usize) -> Arc<Record> {
        let version = self.versions.entry(index).or_default();
        let event = match index {
            0..3 => Event::EndpointDeletionRequested(Empty {}),
            _ => Event::AccessRevoked(AccessRevoked {
                name: "ci".to_owned(),
            }),
        };
        let append = Append {
            stream: stream(index),
            expected_version: *version,
            events: vec![NewEvent {
                id: Uuid::now_v7(),
                time: Timestamp::from_secs(1),
                actor: Actor::service("test"),
                event,
            }],
        };
        *version += 1;
        let commit = Commit {
            appends: vec![append],
            ..Commit::default()
        };
        match store.commit(commit).await.unwrap() {
            Committed::Written { records } => records[0].clone(),
            before => panic!("{before:?}"),
        }
    }
}

/// A bus whose messages are sent by the test.
struct ScriptedBus {
    sender: Mutex<Option<mpsc::Sender<BusMessage>>>,
}

impl ScriptedBus {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            sender: Mutex::new(None),
        })
    }

    fn send(&self, message: BusMessage) {
        let sender = self.sender.lock().unwrap();
        sender.as_ref().unwrap().try_send(message).unwrap();
    }

    fn assign_all(&self) {
        self.send(BusMessage::Assigned(Bucket::of_endpoints().collect()));
    }
}

#[async_trait::async_trait]
impl Bus for ScriptedBus {
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError> {
        for record in records {
            self.send(BusMessage::Record(record.clone()));
        }
        Ok(())
    }
    fn subscribe_records(&self, _subscription: Subscription) -> mpsc::Receiver<BusMessage> {
        let (sender, receiver) = mpsc::channel(10_000);
        *self.sender.lock().unwrap() = Some(sender);
        receiver
    }
    fn publish_frame(&self, _frame: Arc<Frame>) {}
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>> {
        mpsc::channel(1).1
    }
    fn publish_route(&self, _update: Arc<RouteUpdate>) {}
    fn subscribe_routes(&self) -> mpsc::Receiver<RouteMessage> {
        mpsc::channel(1).1
    }
    fn dropped(&self) -> u64 {
        0
    }
    fn problem(&self) -> Option<String> {
        None
    }
    async fn close(&self) {}
}

/// Collects what a feed delivers, and checks it.
struct Reader {
    feed: Feed,
    reached: BTreeMap<Bucket, Position>,
    delivered: Vec<u64>,
    /// The number of records delivered when each bucket had caught up.
    caught_up: BTreeMap<Bucket, usize>,
    unreadable: Vec<Position>,
}

impl Reader {
    fn new(feed: Feed) -> Self {
        Self {
            feed,
            reached: BTreeMap::new(),
            delivered: Vec::new(),
            caught_up: BTreeMap::new(),
            unreadable: Vec::new(),
        }
    }

    async fn step(&mut self) -> FeedItem {
        let item = self.feed.next().await.unwrap();
        match &item {
            FeedItem::Records(records) => {
                assert!(!records.is_empty());
                records.iter().for_each(|record| self.check(record));
            }
            FeedItem::CaughtUp(buckets) => {
                for bucket in buckets {
                    let before = self.caught_up.insert(*bucket, self.delivered.len());
                    assert_eq!(before, None, "caught up with {bucket} twice");
                }
            }
            FeedItem::Unreadable(unreadable) => {
                let before = self.reached.insert(unreadable.bucket, unreadable.position);
                assert_eq!(unreadable.prev, before.unwrap_or_default());
                self.unreadable.push(unreadable.position);
            }
            FeedItem::Revoked(buckets) => {
                for bucket in buckets {
                    self.reached.remove(bucket);
                    self.caught_up.remove(bucket);
                }
            }
            FeedItem::Assigned(_) | FeedItem::Advanced(_) => {}
        }
        item
    }

    fn check(&mut self, record: &Record) {
        let before = self.reached.insert(record.bucket, record.position);
        assert_eq!(
            record.prev,
            before.unwrap_or(Position::START),
            "position {} of bucket {}",
            record.position,
            record.bucket
        );
        self.delivered.push(record.position.0);
    }

    async fn wait_for_records(&mut self, count: usize) {
        while self.delivered.len() < count || self.caught_up.is_empty() {
            self.step().await;
        }
    }

    fn sorted(&self) -> Vec<u64> {
        let mut delivered = self.delivered.clone();
        delivered.sort_unstable();
        delivered
    }
}

#[tokio::test]
async fn history_comes_first_then_caught_up_then_new_records() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = LocalBus::new();
    let mut writer = Writer::default();
    for n in 0..1200 {
        writer.write(&store, n % 4).await;
    }
    let shutdown = CancellationToken::new();
    let relay = tokio::spawn(relay::run(store.clone(), bus.clone(), shutdown.clone()));
    let feed = Feed::open(store.clone(), bus, GROUP);
    let mut reader = Reader::new(feed);
    assert!(matches!(reader.step().await, FeedItem::Assigned(buckets) if buckets.len() == 64));
    reader.wait_for_records(1200).await;
    assert_eq!(reader.caught_up.len(), 64);
    assert!(
        reader
            .caught_up
            .values()
            .all(|delivered| *delivered == 1200)
    );
    for n in 0..20 {
        writer.write(&store, n % 4).await;
        reader.wait_for_records(1201 + n).await;
    }
    assert_eq!(reader.sorted(), (1..=1220).collect::<Vec<_>>());
    shutdown.cancel();
    relay.await.unwrap();
}

#[tokio::test]
async fn a_consumer_that_never_waits_long_still_reads_a_slow_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut writer = Writer::default();
    for n in 0..4 {
        writer.write(&store, n).await;
    }
    let mut feed = Feed::open(store, LocalBus::new(), GROUP);
    let mut received = 0;
    let receiving = async {
        while received < 4 {
            // The store has never answered at the first poll.
            match feed.next().now_or_never() {
                Some(item) => {
                    if let FeedItem::Records(records) = item.unwrap() {
                        received += records.len();
                    }
                }
                None => tokio::task::yield_now().await,
            }
        }
    };
    let received = tokio::time::timeout(TIMEOUT, receiving).await;
    received.expect("nothing was delivered");
}

#[tokio::test]
async fn an_empty_log_is_caught_up_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut feed = Feed::open(store, LocalBus::new(), GROUP);
    assert!(matches!(feed.next().await.unwrap(), FeedItem::Assigned(_)));
    let all = Bucket::of_endpoints().collect();
    assert_eq!(feed.next().await.unwrap(), FeedItem::CaughtUp(all));
}

#[tokio::test]
async fn each_bucket_is_read_from_its_start_position() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut writer = Writer::default();
    let mut written = Vec::new();
    for n in 0..40 {
        written.push(writer.write(&store, n % 4).await);
    }
    let from = BTreeMap::from([
        (written[0].bucket, Position(21)),
        (Bucket::GLOBAL, Position(40)),
    ]);
    let mut feed = Feed::open(store, LocalBus::new(), GROUP);
    let mut delivered = BTreeSet::new();
    loop {
        match feed.next().await.unwrap() {
            FeedItem::Assigned(_) => {
                for (bucket, position) in &from {
                    feed.start_from(*bucket, *position);
                }
            }
            FeedItem::Records(records) => delivered.extend(records.iter().map(|r| r.position)),
            FeedItem::CaughtUp(_) => break,
            _ => {}
        }
    }
    let expected = written
        .iter()
        .filter(|r| r.position > from.get(&r.bucket).copied().unwrap_or_default())
        .map(|r| r.position);
    assert_eq!(delivered, expected.collect());
}

#[tokio::test]
async fn a_record_after_a_gap_brings_the_missing_ones() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    // Without rechecks, only the gap itself can bring the missing records.
    let feed = Feed::open(store.clone(), bus.clone(), GROUP)
        .with_recheck_interval(Duration::from_secs(3600));
    let mut reader = Reader::new(feed);
    bus.assign_all();
    reader.wait_for_records(0).await;
    let mut writer = Writer::default();
    for _ in 0..4 {
        writer.write(&store, 0).await;
    }
    let last = writer.write(&store, 0).await;
    bus.send(BusMessage::Record(last));
    reader.wait_for_records(5).await;
    assert_eq!(reader.sorted(), [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn records_dropped_at_the_tail_are_found_in_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    let feed =
        Feed::open(store.clone(), bus.clone(), GROUP).with_recheck_interval(RECHECK_INTERVAL);
    let mut reader = Reader::new(feed);
    bus.assign_all();
    reader.wait_for_records(0).await;
    let mut writer = Writer::default();
    writer.write(&store, 0).await;
    // The newest position arrives; an older one of another bucket was lost.
    let newest = writer.write(&store, 1).await;
    bus.send(BusMessage::Record(newest));
    reader.wait_for_records(2).await;
}

#[tokio::test]
async fn a_revoked_bucket_is_silent_and_a_new_one_brings_its_history() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    let mut writer = Writer::default();
    let first = writer.write(&store, 0).await;
    let other = writer.write(&store, 1).await;
    let feed =
        Feed::open(store.clone(), bus.clone(), GROUP).with_recheck_interval(RECHECK_INTERVAL);
    let mut reader = Reader::new(feed);
    bus.send(BusMessage::Assigned(vec![first.bucket]));
    reader.wait_for_records(1).await;
    assert_eq!(reader.delivered, [1]);

    bus.send(BusMessage::Assigned(vec![other.bucket]));
    bus.send(BusMessage::Revoked(vec![first.bucket]));
    reader.wait_for_records(2).await;
    assert_eq!(reader.delivered, [1, 2]);
    while reader.reached.contains_key(&first.bucket) {
        reader.step().await;
    }

    let ignored = writer.write(&store, 0).await;
    bus.send(BusMessage::Record(ignored));
    let received = writer.write(&store, 1).await;
    bus.send(BusMessage::Record(received));
    reader.wait_for_records(3).await;
    assert_eq!(reader.delivered, [1, 2, 4]);
}

#[tokio::test]
async fn a_reassigned_bucket_brings_its_full_history_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    let mut writer = Writer::default();
    let bucket = writer.write(&store, 0).await.bucket;
    let feed =
        Feed::open(store.clone(), bus.clone(), GROUP).with_recheck_interval(RECHECK_INTERVAL);
    let mut reader = Reader::new(feed);
    bus.send(BusMessage::Assigned(vec![bucket]));
    reader.wait_for_records(1).await;
    let live = writer.write(&store, 0).await;
    bus.send(BusMessage::Record(live));
    bus.send(BusMessage::Revoked(vec![bucket]));
    while !matches!(reader.step().await, FeedItem::Revoked(_)) {}
    reader.delivered.clear();
    writer.write(&store, 0).await;
    bus.send(BusMessage::Assigned(vec![bucket]));
    while !matches!(reader.step().await, FeedItem::CaughtUp(_)) {}
    assert_eq!(reader.delivered, [1, 2, 3]);
}

#[tokio::test]
async fn live_buckets_continue_while_others_catch_up() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    let mut writer = Writer::default();
    let live = writer.write(&store, 0).await.bucket;
    let mut late = live;
    // Several pages of history.
    for _ in 0..3500 {
        late = writer.write(&store, 1).await.bucket;
    }
    let feed = Feed::open(store.clone(), bus.clone(), GROUP)
        .with_recheck_interval(Duration::from_secs(3600));
    let mut reader = Reader::new(feed);
    bus.send(BusMessage::Assigned(vec![live]));
    reader.wait_for_records(1).await;
    bus.send(BusMessage::Assigned(vec![late]));
    while !matches!(reader.step().await, FeedItem::Assigned(_)) {}
    let fresh = writer.write(&store, 0).await;
    let position = fresh.position.0;
    bus.send(BusMessage::Record(fresh));
    while !reader.delivered.contains(&position) {
        reader.step().await;
    }
    assert!(!reader.caught_up.contains_key(&late));
    while !reader.caught_up.contains_key(&late) {
        reader.step().await;
    }
    assert_eq!(reader.delivered.len(), 3502);
}

#[tokio::test]
async fn the_global_history_comes_before_the_first_caught_up() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    let mut writer = Writer::default();
    let endpoint = writer.write(&store, 0).await;
    for _ in 0..1500 {
        writer.write(&store, 3).await;
    }
    let feed =
        Feed::open(store.clone(), bus.clone(), GROUP).with_recheck_interval(RECHECK_INTERVAL);
    let mut reader = Reader::new(feed);
    bus.send(BusMessage::Assigned(vec![endpoint.bucket]));
    while !matches!(reader.step().await, FeedItem::CaughtUp(_)) {}
    assert_eq!(reader.delivered.len(), 1501);
}

#[tokio::test]
async fn a_replica_without_buckets_catches_up_with_the_global_one() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    let mut writer = Writer::default();
    writer.write(&store, 0).await;
    writer.write(&store, 3).await;
    let mut feed = Feed::open(store.clone(), bus.clone(), GROUP);
    bus.send(BusMessage::Assigned(vec![]));
    assert_eq!(feed.next().await.unwrap(), FeedItem::Assigned(vec![]));
    assert!(matches!(feed.next().await.unwrap(), FeedItem::Records(records) if records.len() == 1));
    assert_eq!(feed.next().await.unwrap(), FeedItem::CaughtUp(vec![]));
}

#[tokio::test]
async fn an_undecodable_event_is_delivered_in_order_and_the_rest_follows() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    let mut writer = Writer::default();
    for _ in 0..3 {
        writer.write(&store, 0).await;
    }
    damage(&folder, 2).await;
    let feed =
        Feed::open(store.clone(), bus.clone(), GROUP).with_recheck_interval(RECHECK_INTERVAL);
    let mut reader = Reader::new(feed);
    bus.assign_all();
    assert!(matches!(reader.step().await, FeedItem::Assigned(_)));
    assert!(matches!(reader.step().await, FeedItem::Records(_)));
    assert!(matches!(reader.step().await, FeedItem::Unreadable(_)));
    assert!(matches!(reader.step().await, FeedItem::Records(_)));
    assert_eq!(reader.unreadable, [Position(2)]);
    assert_eq!(reader.delivered, [1, 3]);
}

#[tokio::test]
async fn a_bucket_that_catches_up_again_brings_only_new_records() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    let mut writer = Writer::default();
    let bucket = writer.write(&store, 0).await.bucket;
    writer.write(&store, 1).await;
    let feed = Feed::open(store.clone(), bus.clone(), GROUP);
    let mut reader = Reader::new(feed);
    bus.assign_all();
    reader.wait_for_records(2).await;
    // The bus does not deliver it, and the feed does not look for it yet.
    writer.write(&store, 0).await;
    reader.caught_up.remove(&bucket);
    reader.feed.catch_up_again(&[bucket]);
    while !reader.caught_up.contains_key(&bucket) {
        reader.step().await;
    }
    assert_eq!(reader.delivered, [1, 2, 3]);
}

#[tokio::test]
async fn only_the_position_of_excluded_events_is_delivered() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut writer = Writer::default();
    let bucket = writer.write(&store, 0).await.bucket;
    // An excluded event need not be readable.
    writer.write(&store, 0).await;
    damage(&folder, 2).await;
    let feed = Feed::open(store.clone(), LocalBus::new(), GROUP);
    let mut feed = feed.with_filter(Arc::new(|_| {
        (vec![StreamKind::Endpoint], Position(u64::MAX))
    }));
    let mut items = Vec::new();
    loop {
        match feed.next().await.unwrap() {
            FeedItem::CaughtUp(_) => break,
            item => items.push(item),
        }
    }
    let passed = BTreeMap::from([(bucket, Position(2))]);
    assert_eq!(items[1..], [FeedItem::Advanced(passed)]);
}

#[tokio::test]
async fn prefetched_events_that_are_excluded_meanwhile_are_not_delivered() {
    const MORE_THAN_A_PAGE: usize = 1500;
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let event = || NewEvent {
        id: Uuid::now_v7(),
        time: Timestamp::from_secs(1),
        actor: Actor::service("test"),
        event: Event::EndpointDeletionRequested(Empty {}),
    };
    let append = Append {
        stream: stream(0),
        expected_version: 0,
        events: std::iter::repeat_with(event)
            .take(MORE_THAN_A_PAGE)
            .collect(),
    };
    let commit = Commit {
        appends: vec![append],
        ..Commit::default()
    };
    store.commit(commit).await.unwrap();
    let is_wanted = Arc::new(AtomicBool::new(true));
    let include = is_wanted.clone();
    let feed = Feed::open(store.clone(), LocalBus::new(), GROUP);
    let mut feed = feed.with_filter(Arc::new(move |_| {
        let excluded = match include.load(Ordering::Relaxed) {
            true => Vec::new(),
            false => vec![StreamKind::Endpoint],
        };
        (excluded, Position(u64::MAX))
    }));
    let (mut delivered, mut passed) = (Vec::new(), BTreeMap::new());
    loop {
        match feed.next().await.unwrap() {
            FeedItem::CaughtUp(_) => break,
            FeedItem::Records(records) => {
                delivered.push(records.len());
                is_wanted.store(false, Ordering::Relaxed);
            }
            FeedItem::Advanced(positions) => passed = positions,
            _ => {}
        }
    }
    assert!(
        matches!(delivered[..], [page] if page < MORE_THAN_A_PAGE),
        "one page: {delivered:?}"
    );
    assert_eq!(
        passed.into_values().collect::<Vec<_>>(),
        [Position(MORE_THAN_A_PAGE as u64)]
    );
}

#[tokio::test]
async fn a_feed_is_cancel_safe() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = LocalBus::new();
    let shutdown = CancellationToken::new();
    let _stop = shutdown.clone().drop_guard();
    tokio::spawn(relay::run(store.clone(), bus.clone(), shutdown));
    let mut writer = Writer::default();
    for n in 0..50 {
        writer.write(&store, n % 4).await;
    }
    let feed = Feed::open(store.clone(), bus, GROUP).with_recheck_interval(RECHECK_INTERVAL);
    let mut reader = Reader::new(feed);
    let writing = tokio::spawn(async move {
        for n in 0..200 {
            writer.write(&store, n % 4).await;
        }
    });
    while reader.delivered.len() < 250 {
        tokio::select! {
            biased;
            _ = reader.step() => {}
            () = tokio::task::yield_now() => {}
        }
    }
    writing.await.unwrap();
    assert_eq!(reader.sorted(), (1..=250).collect::<Vec<_>>());
}

#[derive(Clone, Copy, Debug)]
enum Delivery {
    Once,
    Dropped,
    Twice,
}

fn delivery() -> impl Strategy<Value = Delivery> {
    prop_oneof![
        3 => Just(Delivery::Once),
        1 => Just(Delivery::Dropped),
        1 => Just(Delivery::Twice),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Each record: its stream, what the bus does with it, and where it is moved among the others.
    #[test]
    fn every_record_is_delivered_once_and_in_order_whatever_the_bus_does(
        before in prop::collection::vec(0usize..4, 0..20),
        live in prop::collection::vec((0usize..4, delivery(), any::<u16>()), 0..60),
        batch_len in 1usize..20,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let store = open(&folder).await;
            let bus = ScriptedBus::new();
            let mut writer = Writer::default();
            for index in &before {
                writer.write(&store, *index).await;
            }
            let feed = Feed::open(store.clone(), bus.clone(), GROUP)
                .with_recheck_interval(RECHECK_INTERVAL);
            bus.assign_all();
            let mut reader = Reader::new(feed);
            let mut sent = before.len();
            for batch in live.chunks(batch_len) {
                let mut messages = Vec::new();
                for (index, delivery, order) in batch {
                    let record = writer.write(&store, *index).await;
                    let copies = match delivery { Delivery::Dropped => 0, Delivery::Once => 1, Delivery::Twice => 2 };
                    for copy in 0..copies {
                        messages.push((order.wrapping_add(copy), record.clone()));
                    }
                }
                messages.sort_by_key(|(order, _)| *order);
                for (_, record) in messages {
                    bus.send(BusMessage::Record(record));
                }
                sent += batch.len();
                reader.wait_for_records(sent).await;
            }
            reader.wait_for_records(sent).await;
            assert_eq!(reader.sorted(), (1..=sent as u64).collect::<Vec<_>>());
        });
    }
}
