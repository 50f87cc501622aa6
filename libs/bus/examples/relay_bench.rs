//! Publishing the log beside a plain producer loop with the same messages, on one broker in one run:
//! how much of Kafka's own pace is left. Prints the ratio.
//!
//! `cargo run --release -p penstock-bus --features kafka --example relay_bench -- [RECORDS]`

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bus::Bus;
use bus::kafka::{KafkaBus, KafkaConfig};
use contract::events::{EndpointStateChanged, Event};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::time::Timestamp;
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use uuid::Uuid;

/// What the relay reads from the store at a time.
const PAGE: usize = 1000;

const ROUNDS: usize = 3;

fn records(count: u64) -> Vec<Arc<Record>> {
    let mut last: BTreeMap<Bucket, Position> = BTreeMap::new();
    let state = serde_json::json!({"state": "Succeeded", "reason": "x".repeat(120)});
    let state: EndpointStateChanged = serde_json::from_value(state).unwrap();
    let record = |position| {
        let endpoint = EndpointKey::new(&format!("e{}", position % 500).parse().unwrap());
        let bucket = endpoint.bucket();
        Arc::new(Record {
            position: Position(position),
            prev: last.insert(bucket, Position(position)).unwrap_or_default(),
            bucket,
            stream: StreamName::of(StreamKind::Endpoint, &endpoint),
            version: position,
            id: Uuid::from_u128(position.into()),
            time: Timestamp::from_millis(position as i64),
            actor: Actor::service("bench"),
            event: Event::EndpointStateChanged(state.clone()),
        })
    };
    (1..=count).map(record).collect()
}

/// Topic and partition, key, headers, value: made beforehand, so that the loop does nothing else.
type Plain = (i32, String, Vec<(String, String)>, String);

fn plain(records: &[Arc<Record>]) -> Vec<Plain> {
    let plain = records.iter().map(|record| {
        let headers = [
            ("ce_specversion", "1.0".to_owned()),
            ("ce_id", record.id.to_string()),
            ("ce_source", "/penstock/bench".to_owned()),
            ("ce_type", record.event.type_name().to_owned()),
            ("ce_time", record.time.to_string()),
            ("ce_subject", record.stream.to_string()),
            ("content-type", "application/json".to_owned()),
            ("ce_penstockposition", record.position.to_string()),
            ("ce_penstockprev", record.prev.to_string()),
            ("ce_penstockbucket", record.bucket.to_string()),
            ("ce_penstockversion", record.version.to_string()),
            ("ce_penstocktypevers", record.event.version().to_string()),
            ("ce_penstockactor", record.actor.to_string()),
        ];
        let headers = headers.map(|(name, value)| (name.to_owned(), value));
        let key = record.endpoint().unwrap().to_string();
        let value = record.event.data_json().unwrap();
        (record.bucket.0.into(), key, headers.to_vec(), value)
    });
    plain.collect()
}

/// The same durability: idempotent, confirmed by all copies.
fn plain_loop(addresses: &str, topic: &str, messages: &[Plain]) -> Duration {
    let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", addresses)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("compression.type", "lz4")
        .create()
        .unwrap();
    let began = Instant::now();
    for (partition, key, headers, value) in messages {
        loop {
            let empty = OwnedHeaders::new_with_capacity(headers.len());
            let headers = headers.iter().fold(empty, |all, (key, value)| {
                let value = Some(value.as_str());
                all.insert(Header { key, value })
            });
            let record = BaseRecord::to(topic)
                .partition(*partition)
                .key(key)
                .payload(value);
            match producer.send(record.headers(headers)) {
                Ok(()) => break,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err((error, _)) => panic!("{error}"),
            }
        }
    }
    producer.flush(Duration::from_secs(120)).unwrap();
    began.elapsed()
}

#[tokio::main]
async fn main() {
    let count = std::env::args()
        .nth(1)
        .map_or(200_000, |count| count.parse().unwrap());
    let Some(kafka) = servers::Kafka::shared() else {
        return;
    };
    let records = records(count);
    let messages = plain(&records);
    let config = KafkaConfig::parse(&kafka.url(&kafka.prefix())).unwrap();
    let bus = KafkaBus::open(config).await.unwrap();
    let topic = bus.topics().events.clone();
    // Connections, leaders, caches.
    bus.publish_records(&records[..PAGE]).await.unwrap();
    plain_loop(kafka.addresses(), &topic, &messages[..PAGE]);
    let mut ratios = Vec::new();
    for round in 1..=ROUNDS {
        let limit = plain_loop(kafka.addresses(), &topic, &messages);
        let began = Instant::now();
        for page in records.chunks(PAGE) {
            bus.publish_records(page).await.unwrap();
        }
        let ours = began.elapsed();
        let rate = |elapsed: Duration| count as f64 / elapsed.as_secs_f64();
        let ratio = rate(ours) / rate(limit);
        println!(
            "round {round}: published {:.0}/s, plain loop {:.0}/s, ratio {ratio:.2}",
            rate(ours),
            rate(limit)
        );
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "ratio {:.2} (median of {ROUNDS}; wanted: at least 0.25)",
        ratios[ROUNDS / 2]
    );
    bus.close().await;
}
