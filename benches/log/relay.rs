//! The durable relay draining a backlog, compared with a plain producer loop.
//!
//! Both send the same messages to the same broker, the loop to its own topics: it sends what the relay has
//! put on its topics, byte for byte, with keys, headers and partitions, in log order, preloaded into memory.
//! Both producers are idempotent and wait for all replicas.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bus::Bus;
use bus::kafka::{KafkaBus, KafkaConfig, Topics};
use contract::ids::{BUCKETS, Bucket, Position};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Headers, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use runtime::relay::{RELAY, RelayDeps, run_durable};
use servers::Kafka;
use store::{Commit, CursorMove, Store};
use tokio_util::sync::CancellationToken;

use crate::table::{Bar, Measurement};
use crate::{Options, history};

/// Required ratio to the plain loop.
const BAR: f64 = 0.25;

/// How often the cursor is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

const PATIENCE: Duration = Duration::from_secs(120);

pub async fn drain(options: &Options, kafka: &Kafka) -> Measurement {
    let url = format!("sqlite:{}", options.path("relay.db").display());
    let store = Store::open(&url).await.unwrap();
    let events = history::write(&store, options.backlog).await;
    let (ours, theirs) = (open(kafka).await, open(kafka).await);
    // The first run warms up connections, leaders and caches, and produces the messages for the loop.
    drain_once(&store, &ours).await;
    let messages = messages_on(kafka, ours.topics(), events as usize);
    let plain_loop = || send_all(kafka, theirs.topics(), ours.topics(), &messages);
    tokio::task::block_in_place(plain_loop);
    let rate = |elapsed: Duration| events as f64 / elapsed.as_secs_f64();
    let (mut drained, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        plain.push(rate(tokio::task::block_in_place(plain_loop)));
        drained.push(rate(drain_once(&store, &ours).await));
    }
    ours.close().await;
    theirs.close().await;
    store.close().await;
    Measurement {
        what: format!("relay of {events} events from SQLite to Kafka, acks=all"),
        ours: drained,
        against: Bar::Relative { plain, bar: BAR },
    }
}

/// Opens a bus with unique topics.
async fn open(kafka: &Kafka) -> Arc<KafkaBus> {
    let config = KafkaConfig::parse(&kafka.url(&kafka.prefix())).unwrap();
    let bus = KafkaBus::open(config).await.unwrap();
    assert_eq!(bus.problem(), None);
    bus
}

/// Time from the start of the relay until its cursor has reached the end of the log.
async fn drain_once(store: &Store, bus: &Arc<KafkaBus>) -> Duration {
    let head = store.head().await.unwrap();
    let reached = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    let back = CursorMove {
        consumer: RELAY,
        bucket: Bucket::GLOBAL,
        from: reached,
        to: Position::START,
    };
    let back = Commit {
        cursor: Some(back),
        ..Commit::default()
    };
    store.commit(back).await.unwrap();
    let deps = RelayDeps {
        store: store.clone(),
        bus: bus.clone(),
        holder: "bench".to_owned(),
        component: HealthRegistry::default().component("relay"),
        metrics: Metrics::default(),
    };
    let stop = CancellationToken::new();
    let started = Instant::now();
    let relay = tokio::spawn(run_durable(deps, stop.clone()));
    while store.cursor(RELAY, Bucket::GLOBAL).await.unwrap() < head {
        assert!(started.elapsed() < PATIENCE, "the relay does not end");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let elapsed = started.elapsed();
    stop.cancel();
    relay.await.unwrap();
    elapsed
}

/// The messages on the relay's topics, in log order.
fn messages_on(kafka: &Kafka, topics: &Topics, count: usize) -> Vec<OwnedMessage> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.addresses())
        .set("group.id", "bench")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    let mut all = TopicPartitionList::new();
    for partition in 0..i32::from(BUCKETS) {
        all.add_partition_offset(&topics.events, partition, Offset::Beginning)
            .unwrap();
    }
    all.add_partition_offset(&topics.global, 0, Offset::Beginning)
        .unwrap();
    consumer.assign(&all).unwrap();
    let mut messages = Vec::with_capacity(count);
    while messages.len() < count {
        let message = consumer.poll(PATIENCE).unwrap();
        messages.push(message.unwrap().detach());
    }
    messages.sort_by_key(position);
    messages
}

fn position(message: &OwnedMessage) -> u64 {
    let headers = message.headers().unwrap();
    let header = headers
        .iter()
        .find(|header| header.key == "ce_penstockposition");
    let text = std::str::from_utf8(header.unwrap().value.unwrap());
    text.unwrap().parse().unwrap()
}

/// Sends all messages as fast as the producer accepts and confirms them.
fn send_all(kafka: &Kafka, to: &Topics, from: &Topics, messages: &[OwnedMessage]) -> Duration {
    let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka.addresses())
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("compression.type", "lz4")
        .create()
        .unwrap();
    let started = Instant::now();
    for message in messages {
        let topic = match message.topic() == from.global {
            true => &to.global,
            false => &to.events,
        };
        while !try_send(&producer, topic, message) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    producer.flush(PATIENCE).unwrap();
    started.elapsed()
}

/// Enqueues a message; returns false if the queue is full.
fn try_send(
    producer: &ThreadedProducer<DefaultProducerContext>,
    topic: &str,
    message: &OwnedMessage,
) -> bool {
    let record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic)
        .partition(message.partition())
        .key(message.key().unwrap())
        .payload(message.payload().unwrap())
        .headers(copied(message.headers().unwrap()));
    match producer.send(record) {
        Ok(()) => true,
        Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => false,
        Err((error, _)) => panic!("{error}"),
    }
}

/// A copy of the headers: the producer takes ownership.
fn copied(headers: &impl Headers) -> OwnedHeaders {
    let empty = OwnedHeaders::new_with_capacity(headers.count());
    headers.iter().fold(empty, |all, header| all.insert(header))
}
