//! Failure modes specific to Kafka: groups, killed brokers, topics modified by others. Runs against
//! real brokers.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bus::kafka::{Extent, KafkaBus, KafkaConfig, MissingPosition, read_log};
use bus::{Bus, BusError, RouteMessage, Subscription};
use contract::chain::ChainHash;
use contract::frame::Frame;
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record};
use contract::time::Timestamp;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::{FutureProducer, FutureRecord};
use servers::Kafka;
use support::{Reader, TIMEOUT, endpoint, next, next_route, record, record_log, route, route_of};
use tokio::sync::mpsc::Receiver;
use uuid::Uuid;

fn client(kafka: &Kafka) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.addresses());
    config
}

async fn open(kafka: &Kafka, prefix: &str) -> Arc<KafkaBus> {
    let config = KafkaConfig::parse(&kafka.url(prefix)).unwrap();
    KafkaBus::open(config).await.unwrap()
}

async fn read_full_log(kafka: &Kafka, prefix: &str) -> (Vec<RawRecord>, Extent) {
    let config = KafkaConfig::parse(&kafka.url(prefix)).unwrap();
    read_log(&config).collect().await.unwrap()
}

fn stored(records: &[Arc<Record>]) -> Vec<RawRecord> {
    let raw = |record: &Arc<Record>| RawRecord::of(record).unwrap();
    records.iter().map(raw).collect()
}

async fn create_topic(kafka: &Kafka, name: &str, partitions: i32, settings: &[(&str, &str)]) {
    let admin: AdminClient<DefaultClientContext> = client(kafka).create().unwrap();
    let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
    let topic = settings
        .iter()
        .fold(topic, |topic, (name, value)| topic.set(name, value));
    let made = admin.create_topics([&topic], &AdminOptions::new()).await;
    made.unwrap().pop().unwrap().unwrap();
}

/// Publishes as the relay does: in order, and the same page again after an error.
async fn publish_all(bus: &dyn Bus, records: &[Arc<Record>]) {
    let all = async {
        for page in records.chunks(50) {
            while let Err(error) = bus.publish_records(page).await {
                assert!(matches!(error, BusError::NotPublished { .. }), "{error}");
            }
        }
    };
    tokio::time::timeout(TIMEOUT * 3, all)
        .await
        .expect("not published");
}

async fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let held = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, held)
        .await
        .unwrap_or_else(|_| panic!("timed out: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_a_group_share_the_buckets_and_rebalance() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let buses = [
        open(kafka, &prefix).await,
        open(kafka, &prefix).await,
        open(kafka, &prefix).await,
    ];
    let group = Subscription::Group("sharers");
    // A reader panics on a record outside of its assignments.
    let mut first = Reader::join(&*buses[0], group).await;
    let mut second = Reader::subscribe(&*buses[1], group);
    wait_for_shares(&mut [&mut first, &mut second]).await;
    assert_eq!((first.buckets.len(), second.buckets.len()), (32, 32));

    let mut third = Reader::subscribe(&*buses[2], group);
    wait_for_shares(&mut [&mut first, &mut second, &mut third]).await;
    let fair = 21..=22;
    for reader in [&first, &second, &third] {
        assert!(
            fair.contains(&reader.buckets.len()),
            "{}",
            reader.buckets.len()
        );
    }

    // Each bucket's records go to the one member that owns it.
    let records = record_log(200);
    buses[0].publish_records(&records).await.unwrap();
    for reader in [&mut first, &mut second, &mut third] {
        let theirs = records
            .iter()
            .filter(|record| reader.buckets.contains(&record.bucket));
        reader.wait_for_records(theirs.count()).await;
    }
    let got = [&first, &second, &third].map(|reader| reader.records.len());
    assert_eq!(got.iter().sum::<usize>(), 200);

    buses[2].close().await;
    third.wait_until_closed().await;
    assert!(
        third.buckets.is_empty(),
        "its buckets are revoked before it closes"
    );
    wait_for_shares(&mut [&mut first, &mut second]).await;
    buses[0].close().await;
    buses[1].close().await;
}

/// Waits until these members own all buckets, each bucket once, and no member has more than its
/// fair share.
async fn wait_for_shares(readers: &mut [&mut Reader]) {
    let most = 64usize.div_ceil(readers.len());
    let shared = async {
        loop {
            for reader in readers.iter_mut() {
                reader.receive_pending().await;
            }
            let all: BTreeSet<Bucket> = readers
                .iter()
                .flat_map(|reader| reader.buckets.clone())
                .collect();
            let sizes: Vec<usize> = readers.iter().map(|reader| reader.buckets.len()).collect();
            if all.len() == 64
                && sizes.iter().sum::<usize>() == 64
                && sizes.iter().all(|size| *size <= most)
            {
                return;
            }
        }
    };
    tokio::time::timeout(TIMEOUT, shared)
        .await
        .expect("the buckets were not shared");
}

/// A frame of a bucket.
fn frame_in(bucket: u16, sequence: u64) -> Arc<Frame> {
    Arc::new(Frame {
        bucket: Bucket(bucket),
        ..(*support::frame(sequence)).clone()
    })
}

/// Publishes frames and waits until Kafka has them.
async fn publish_frames(bus: &KafkaBus, live: &mut Receiver<Arc<Frame>>, frames: &[Arc<Frame>]) {
    frames
        .iter()
        .for_each(|frame| bus.publish_frame(frame.clone()));
    for _ in frames {
        next(live).await;
    }
}

/// Subscribes, and waits until the subscription has reached the end of the topic.
async fn live_frames(bus: &KafkaBus) -> Receiver<Arc<Frame>> {
    let mut live = bus.subscribe_frames();
    // Once a frame is received, later ones will be too.
    let begun = async {
        loop {
            bus.publish_frame(frame_in(0, 0));
            let received = tokio::time::timeout(Duration::from_millis(100), live.recv()).await;
            if received.is_ok() {
                break;
            }
        }
    };
    tokio::time::timeout(TIMEOUT, begun).await.unwrap();
    // Skip earlier frames, up to the marker.
    bus.publish_frame(frame_in(0, u64::MAX));
    while next(&mut live).await.sequence != u64::MAX {}
    live
}

/// A time after everything that Kafka has and before everything that follows.
async fn time_between() -> Timestamp {
    let step = Duration::from_millis(5);
    tokio::time::sleep(step).await;
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    tokio::time::sleep(step).await;
    Timestamp::from_millis(now.as_millis() as i64)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_since_a_time_are_replayed_for_every_bucket_before_later_ones() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let mut live = live_frames(&bus).await;
    let of = |buckets: &[u16], sequences: std::ops::Range<u64>| -> Vec<Arc<Frame>> {
        let frames = sequences.flat_map(|s| buckets.iter().map(move |b| frame_in(*b, s)));
        frames.collect()
    };
    publish_frames(&bus, &mut live, &of(&[5, 6, 7], 0..30)).await;
    let since = time_between().await;
    // Bucket 7 has none since then, and 8 has none from before.
    let expected_frames = of(&[5, 6, 8], 30..60);
    publish_frames(&bus, &mut live, &expected_frames).await;

    let successor = open(kafka, &prefix).await;
    let mut again = successor.subscribe_frames_since(since).unwrap();
    let mut received = Vec::new();
    while received.len() < expected_frames.len() {
        received.push(next(&mut again).await);
    }
    let later = of(&[5, 6, 7, 8], 60..70);
    publish_frames(&bus, &mut live, &later).await;
    while received.len() < expected_frames.len() + later.len() {
        received.push(next(&mut again).await);
    }
    for bucket in 5..=8 {
        let of_bucket = |frames: &[Arc<Frame>]| -> Vec<u64> {
            let theirs = frames.iter().filter(|frame| frame.bucket == Bucket(bucket));
            theirs.map(|frame| frame.sequence).collect()
        };
        let expected = [of_bucket(&expected_frames), of_bucket(&later)].concat();
        assert_eq!(of_bucket(&received), expected, "bucket {bucket}");
    }
    successor.close().await;
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_of_an_older_release_are_read_and_those_of_a_newer_one_are_reported_missing() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let mut live = live_frames(&bus).await;
    let since = time_between().await;
    let producer: FutureProducer = client(kafka).create().unwrap();
    let put = async |sequence: u64, version: Option<u32>| {
        let text = frame_in(5, sequence).encode().unwrap();
        let mut frame: serde_json::Value = serde_json::from_str(&text).unwrap();
        match version {
            Some(version) => frame["version"] = version.into(),
            None => drop(frame.as_object_mut().unwrap().remove("version")),
        }
        let text = frame.to_string();
        let record = FutureRecord::to(&bus.topics().frames);
        let record = record.key("gateway").payload(&text);
        producer.send(record, TIMEOUT).await.unwrap();
    };
    put(1, None).await;
    put(2, Some(contract::frame::FRAME_VERSION + 1)).await;
    put(3, Some(contract::frame::FRAME_VERSION)).await;
    assert_eq!(*next(&mut live).await, *frame_in(5, 1));
    assert_eq!(*next(&mut live).await, *frame_in(5, 3));
    let unreadable = |bus: &KafkaBus| -> Vec<(Bucket, u64)> {
        let heads = bus.take_unreadable_frames().into_iter();
        heads.map(|head| (head.bucket, head.sequence)).collect()
    };
    assert_eq!(unreadable(&bus), [(Bucket(5), 2)]);
    assert_eq!(unreadable(&bus), [], "each is reported once");
    // The same holds for a replay.
    let mut again = bus.subscribe_frames_since(since).unwrap();
    while next(&mut again).await.sequence != 3 {}
    assert_eq!(unreadable(&bus), [(Bucket(5), 2)]);
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replayed_frames_wait_for_a_slow_subscriber() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let mut live = live_frames(&bus).await;
    let since = time_between().await;
    let count = bus::SUBSCRIBER_QUEUE_MAX as u64 + 3000;
    for from in (0..count).step_by(1000) {
        let to = count.min(from + 1000);
        let frames: Vec<_> = (from..to).map(|s| frame_in((s % 64) as u16, s)).collect();
        publish_frames(&bus, &mut live, &frames).await;
    }
    let mut again = bus.subscribe_frames_since(since).unwrap();
    wait_for("its queue is full", || {
        again.len() == bus::SUBSCRIBER_QUEUE_MAX
    })
    .await;
    let mut received = BTreeSet::new();
    while (received.len() as u64) < count {
        assert!(
            received.insert(next(&mut again).await.sequence),
            "received twice"
        );
    }
    assert_eq!(bus.dropped(), 0);
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kafkas_partitioner_maps_a_key_to_its_bucket() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let producer: FutureProducer = client(kafka)
        .set("partitioner", "murmur2_random")
        .create()
        .unwrap();
    for number in 0..300 {
        let key = endpoint(&format!("endpoint-{number}"));
        let record = FutureRecord::<str, str>::to(&bus.topics().events)
            .key(key.as_str())
            .payload("{}");
        let placed = producer.send(record, TIMEOUT).await.unwrap();
        assert_eq!(placed.partition, i32::from(key.bucket().0), "{key}");
    }
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_of_several_megabytes_is_delivered() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let mut large = (*route_of("iris", 1)).clone();
    // Incompressible data.
    let hash = || format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    large.route.as_mut().unwrap().key_hashes = (0..45_000).map(|_| hash()).collect();
    let large = Arc::new(large);
    assert!(serde_json::to_vec(&*large).unwrap().len() > 3_000_000);

    let mut early = bus.subscribe_routes();
    bus.publish_route(large.clone());
    assert!(
        *next_route(&mut early).await == *large,
        "it arrived changed"
    );
    let mut late = bus.subscribe_routes();
    assert!(*next_route(&mut late).await == *large, "it arrived changed");
    assert_eq!(bus.dropped(), 0);
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_catches_up_with_constantly_changing_routes() {
    let Some(kafka) = Kafka::shared() else { return };
    let bus = open(kafka, &kafka.prefix()).await;
    let changing = tokio::spawn({
        let bus = bus.clone();
        async move {
            for revision in 1.. {
                bus.publish_route(route("iris", revision));
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    });
    let mut early = bus.subscribe_routes();
    while next_route(&mut early).await.revision < Position(5) {}
    let mut late = bus.subscribe_routes();
    let mut before = Vec::new();
    while let RouteMessage::Update(update) = next(&mut late).await {
        before.push(update.endpoint.clone());
    }
    assert_eq!(before, [endpoint("iris")]);
    changing.abort();
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stored_events_are_read_back_unchanged() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let mut reader = Reader::join(&*bus, Subscription::All).await;
    let (known, next) = (record("iris", 1), record("iris", 4));
    let first = RawRecord {
        prev_hash: Some(ChainHash::START),
        ..RawRecord::of(&known).unwrap()
    };
    let of_another_type = RawRecord {
        position: Position(2),
        prev: Position(1),
        prev_hash: Some(ChainHash([0xa7; 32])),
        version: 2,
        id: "not a UUID".to_owned(),
        type_name: "endpoint.not-invented-yet".to_owned(),
        type_version: 7,
        actor: "robot:\"ü\"".to_owned(),
        data: "{ \"a\" : 1.0 }\n".to_owned(),
        ..first.clone()
    };
    let of_another_stream = RawRecord {
        position: Position(3),
        prev: Position(2),
        // As published by a release that predates the hash chain.
        prev_hash: None,
        stream: "forecast/default/iris/weekly/1".to_owned(),
        version: 1,
        data: "no JSON".to_owned(),
        ..of_another_type.clone()
    };
    let last = RawRecord {
        prev: Position(3),
        ..RawRecord::of(&next).unwrap()
    };
    let all = [first.clone(), of_another_type, of_another_stream, last];
    bus.publish_stored(&all).await.unwrap();
    let nowhere = RawRecord {
        position: Position(3),
        bucket: Bucket(999),
        ..first
    };
    let refused = bus.publish_stored(&[nowhere]).await.unwrap_err();
    let expected = "position 3: there is no bucket 999";
    assert!(refused.to_string().contains(expected), "{refused}");
    let (events, extent) = read_full_log(kafka, &prefix).await;
    assert_eq!(events, all);
    assert_eq!(extent.unreadable, Vec::<String>::new());
    assert_eq!(extent.contiguous, Position(4));
    // A subscriber receives the records it can decode; the rest it finds in the store.
    reader.wait_for_records(2).await;
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_messages_on_a_topic_are_skipped() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let mut all = Reader::join(&*bus, Subscription::All).await;
    let mut member = Reader::join(&*bus, Subscription::Group("g")).await;
    let mut routes = bus.subscribe_routes();
    let producer: FutureProducer = client(kafka).create().unwrap();
    let (first, second) = (record("iris", 1), record("iris", 2));
    bus.publish_records(&[first]).await.unwrap();
    for topic in [&bus.topics().events, &bus.topics().routes] {
        for payload in [&b"\xff\x00 not json"[..], b"{}", b""] {
            let poison = FutureRecord::<str, [u8]>::to(topic)
                .partition(second.bucket.0.into())
                .key("default/iris")
                .payload(payload);
            producer.send(poison, TIMEOUT).await.unwrap();
        }
    }
    bus.publish_records(&[second]).await.unwrap();
    all.wait_for_records(2).await;
    member.wait_for_records(2).await;
    bus.publish_route(route("iris", 3));
    assert_eq!(next_route(&mut routes).await.revision, Position(3));
    wait_for("nine are skipped", || bus.dropped() == 9).await;

    let (records, extent) = read_full_log(kafka, &prefix).await;
    assert_eq!(records.len(), 2);
    assert_eq!(extent.unreadable.len(), 3);
    assert!(
        extent.unreadable[0].contains("offset 1"),
        "{:?}",
        extent.unreadable
    );
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_would_lose_or_misplace_events_is_refused() {
    let Some(kafka) = Kafka::shared() else { return };
    for (partitions, settings, message) in [
        (32, &[("retention.ms", "-1")][..], "32 partitions"),
        (
            64,
            &[("retention.ms", "86400000")][..],
            "retention.ms=86400000",
        ),
        (
            64,
            &[("retention.ms", "-1"), ("cleanup.policy", "compact")][..],
            "cleanup.policy=compact",
        ),
    ] {
        let prefix = kafka.prefix();
        create_topic(kafka, &format!("{prefix}.events"), partitions, settings).await;
        let config = KafkaConfig::parse(&kafka.url(&prefix)).unwrap();
        let Err(BusError::Refused(why)) = KafkaBus::open(config).await else {
            panic!("not refused: {message}")
        };
        assert!(why.contains(message) && why.contains(&prefix), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_full_log_is_read_back_and_gaps_are_named() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let records = record_log(2000);
    bus.publish_records(&records[..1000]).await.unwrap();
    // Repeat some, as after a lost confirmation.
    bus.publish_records(&records[900..1000]).await.unwrap();
    let (copy, extent) = read_full_log(kafka, &prefix).await;
    assert_eq!(copy, stored(&records[..1000]));
    let expected = Extent {
        contiguous: Position(1000),
        last: Position(1000),
        records: 1000,
        repeated: 100,
        ..Extent::default()
    };
    assert_eq!(extent, expected);

    // Leave one out; its successor in the bucket names it.
    let lost = &records[1499];
    let needs_it = records
        .iter()
        .find(|record| record.prev == lost.position)
        .unwrap();
    let rest: Vec<_> = records[1000..]
        .iter()
        .filter(|record| *record != lost)
        .cloned()
        .collect();
    bus.publish_records(&rest).await.unwrap();
    let (copy, extent) = read_full_log(kafka, &prefix).await;
    assert_eq!(copy.len(), 1999);
    assert_eq!(
        (extent.contiguous, extent.last),
        (Position(1499), Position(2000))
    );
    let gap = MissingPosition {
        missing: lost.position,
        bucket: lost.bucket,
        needed_by: needs_it.position,
    };
    assert_eq!(extent.gaps, [gap]);
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_broker_loses_nothing_that_was_confirmed() {
    let Some(kafka) = Kafka::start(1) else { return };
    let prefix = kafka.prefix();
    let bus = open(&kafka, &prefix).await;
    let mut reader = Reader::join(&*bus, Subscription::Group("g")).await;
    let records = record_log(10_000);
    let published = tokio::spawn({
        let (bus, records) = (bus.clone(), records.clone());
        async move { publish_all(&*bus, &records).await }
    });
    reader.wait_for_records(300).await;
    kafka.kill(0);
    assert!(
        !published.is_finished(),
        "the broker was killed too late for the test to be meaningful"
    );
    wait_for("the problem is reported", || bus.problem().is_some()).await;
    let problem = bus.problem().unwrap();
    assert!(problem.contains(kafka.addresses()), "{problem}");
    // Frames are not waited for while no broker accepts them.
    (0..10_000).for_each(|sequence| bus.publish_frame(support::frame(sequence)));
    wait_for("lost frames are counted", || bus.dropped() > 0).await;
    kafka.restart(0);
    published.await.unwrap();
    wait_for("the problem is cleared", || bus.problem().is_none()).await;
    let (copy, extent) = read_full_log(&kafka, &prefix).await;
    assert_eq!(copy, stored(&records));
    assert_eq!(
        (extent.contiguous, extent.gaps),
        (Position(10_000), Vec::new())
    );
    // The member continues too; what it missed it would find in the store.
    let again = Arc::new(Record {
        position: Position(10_001),
        ..(*records[9999]).clone()
    });
    while !reader.records.contains_key(&Position(10_001)) {
        bus.publish_records(std::slice::from_ref(&again))
            .await
            .unwrap();
        reader.receive_pending().await;
    }
    // Closing works without a broker.
    kafka.kill(0);
    tokio::time::timeout(TIMEOUT, bus.close())
        .await
        .expect("still closing");
    reader.wait_until_closed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_opens_without_a_broker_and_works_once_one_is_up() {
    let Some(kafka) = Kafka::start(1) else { return };
    kafka.kill(0);
    let bus = open(&kafka, "late").await;
    assert!(bus.problem().is_some());
    let mut reader = Reader::subscribe(&*bus, Subscription::Group("g"));
    let refused = bus.publish_records(&[record("iris", 1)]).await.unwrap_err();
    assert!(
        matches!(refused, BusError::NotPublished { .. }),
        "{refused}"
    );
    kafka.restart(0);
    reader.wait_for_buckets(64).await;
    bus.publish_records(&[record("iris", 1)]).await.unwrap();
    reader.wait_for_records(1).await;
    assert_eq!(bus.problem(), None);
    bus.close().await;
}

/// Topics created with a single broker are used, with a warning.
async fn single_replicas_are_warned_about(kafka: &Kafka) {
    let prefix = kafka.prefix();
    let settings = [("retention.ms", "-1"), ("min.insync.replicas", "1")];
    create_topic(kafka, &format!("{prefix}.events"), 64, &settings).await;
    let bus = open(kafka, &prefix).await;
    wait_for("a warning about the replicas", || bus.warning().is_some()).await;
    let warning = bus.warning().unwrap();
    assert!(warning.contains("have 1 of the 3 replicas"), "{warning}");
    assert!(
        warning.contains("kafka-reassign-partitions.sh"),
        "{warning}"
    );
    // It does not affect readiness.
    wait_for("no problem is reported", || bus.problem().is_none()).await;
    bus.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_a_leader_of_three_brokers_loses_nothing() {
    let Some(kafka) = Kafka::start(3) else { return };
    let prefix = kafka.prefix();
    let bus = open(&kafka, &prefix).await;
    assert_eq!(bus.warning(), None);
    single_replicas_are_warned_about(&kafka).await;
    let events = bus.topics().events.clone();
    let mut reader = Reader::join(&*bus, Subscription::All).await;
    let records = record_log(10_000);
    let published = tokio::spawn({
        let (bus, records) = (bus.clone(), records.clone());
        async move { publish_all(&*bus, &records).await }
    });
    reader.wait_for_records(300).await;
    let leads = leaders(&kafka, &events);
    let (copies, leader) = leads[&0];
    assert_eq!(copies, 3);
    kafka.kill(leader);
    assert!(
        !published.is_finished(),
        "the broker was killed too late for the test to be meaningful"
    );
    published.await.unwrap();
    let (copy, extent) = read_full_log(&kafka, &prefix).await;
    assert_eq!(copy, stored(&records));
    assert_eq!(extent.contiguous, Position(10_000));
    reader.wait_for_records(10_000).await;
    kafka.restart(leader);
    bus.close().await;
}

/// The number of replicas and the leader of each partition.
fn leaders(kafka: &Kafka, topic: &str) -> BTreeMap<i32, (usize, usize)> {
    let consumer: BaseConsumer = client(kafka).create().unwrap();
    let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT).unwrap();
    let port = |id: i32| {
        let broker = metadata
            .brokers()
            .iter()
            .find(|broker| broker.id() == id)
            .unwrap();
        broker.port() as u16
    };
    let partitions = metadata.topics()[0].partitions().iter();
    let leaders = partitions.map(|partition| {
        let leader = kafka.index_of(port(partition.leader())).unwrap();
        (partition.id(), (partition.replicas().len(), leader))
    });
    leaders.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_subscriber_is_waited_for_and_stays_in_its_group() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let mut slow = Reader::join(&*bus, Subscription::Group("slow")).await;
    // More than its queue holds.
    let records = record_log(bus::SUBSCRIBER_QUEUE_MAX as u64 + 5000);
    for page in records.chunks(5000) {
        bus.publish_records(page).await.unwrap();
    }
    slow.wait_for_records(records.len()).await;
    assert!(slow.is_in_order);
    assert_eq!((slow.repeated, bus.dropped()), (0, 0));
    bus.close().await;
}

/// The message as any consumer of the topic sees it, byte for byte. Update with `UPDATE_GOLDEN=1`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_is_a_cloudevent_that_matches_the_golden_file() {
    let Some(kafka) = Kafka::shared() else { return };
    let prefix = kafka.prefix();
    let bus = open(kafka, &prefix).await;
    let record = Record {
        prev: Position(41),
        ..(*record("iris", 42)).clone()
    };
    let bucket = record.bucket;
    bus.publish_records(&[Arc::new(record)]).await.unwrap();
    let shown = tokio::task::spawn_blocking({
        let (config, topic) = (client(kafka), bus.topics().events.clone());
        move || show_first(config, &topic, bucket)
    });
    let shown = shown.await.unwrap().replace(&prefix, "PREFIX");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/message.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &shown).unwrap();
    }
    assert_eq!(shown, std::fs::read_to_string(&path).unwrap());
    bus.close().await;
}

fn show_first(mut config: ClientConfig, topic: &str, bucket: Bucket) -> String {
    use rdkafka::message::Headers;
    use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
    let consumer: BaseConsumer = config.set("group.id", "golden").create().unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, bucket.0.into(), Offset::Beginning)
        .unwrap();
    consumer.assign(&list).unwrap();
    let message = consumer.poll(TIMEOUT).unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let mut shown = format!(
        "topic {topic} partition {}\nkey {}\n",
        message.partition(),
        text(message.key().unwrap())
    );
    for header in message.headers().unwrap().iter() {
        shown += &format!("header {} = {}\n", header.key, text(header.value.unwrap()));
    }
    shown + &format!("value {}\n", text(message.payload().unwrap()))
}
