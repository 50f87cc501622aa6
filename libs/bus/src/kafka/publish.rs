//! Producers: one for records and routes, which confirms delivery, and one for frames, which never
//! blocks.
//!
//! Invariant: within a bucket, records are on the topic in the order in which they were published,
//! unless a call of [`RecordProducer::publish`] failed; then they are published again, and some may
//! be on the topic twice and late.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use contract::frame::Frame;
use contract::ids::Bucket;
use contract::log::RawRecord;
use contract::route::RouteUpdate;
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::producer::{
    BaseRecord, DeliveryResult, Producer, ProducerContext, PurgeConfig, ThreadedProducer,
};
use tokio::sync::Notify;

use super::message::{OutgoingMessage, encode_frame, encode_record, encode_route, source_of};
use super::topics::LARGE_MESSAGE_BYTES;
use super::{KafkaConfig, LogContext, Topics, client_error, has_fatal_error, lock};
use crate::BusError;

/// A record not confirmed within this time fails its call.
const RECORD_TIMEOUT_MS: &str = "30000";

/// Frames older than this are useless to a decision.
const FRAME_TIMEOUT_MS: &str = "10000";

/// The most frames queued for a broker; a gateway emits 64 a second.
const FRAME_QUEUE_MAX: &str = "4096";

const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(2);

/// The in-flight messages of one call.
struct Batch {
    remaining: AtomicUsize,
    failure: Mutex<Option<String>>,
    done: Notify,
}

impl Batch {
    fn new(messages: usize) -> Arc<Self> {
        Arc::new(Self {
            remaining: AtomicUsize::new(messages),
            failure: Mutex::new(None),
            done: Notify::new(),
        })
    }

    fn settle(&self, outcome: Result<(), String>) {
        if let Err(why) = outcome {
            lock(&self.failure).get_or_insert(why);
        }
        if self.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.notify_one();
        }
    }

    async fn wait(&self) -> Result<(), String> {
        while self.remaining.load(Ordering::Acquire) > 0 {
            self.done.notified().await;
        }
        lock(&self.failure).take().map_or(Ok(()), Err)
    }
}

/// Where the delivery result of a message is reported.
enum DeliveryTarget {
    Batch(Arc<Batch>),
    /// Nothing waits for it; a failure is only counted.
    DropCounter,
}

struct DeliveryContext {
    dropped: Arc<AtomicU64>,
}

impl ClientContext for DeliveryContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        LogContext.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        LogContext.error(error, reason);
    }
}

impl ProducerContext for DeliveryContext {
    type DeliveryOpaque = Box<DeliveryTarget>;

    fn delivery(&self, result: &DeliveryResult<'_>, target: Box<DeliveryTarget>) {
        let failure = result.as_ref().err().map(|(error, _)| error.to_string());
        match (*target, failure) {
            (DeliveryTarget::Batch(batch), failure) => batch.settle(failure.map_or(Ok(()), Err)),
            (DeliveryTarget::DropCounter, Some(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            (DeliveryTarget::DropCounter, None) => {}
        }
    }
}

type Client = ThreadedProducer<DeliveryContext>;

/// Queues a message; returns false if the queue is full.
fn send(
    client: &Client,
    (topic, partition): (&str, i32),
    message: &OutgoingMessage<'_>,
    target: DeliveryTarget,
) -> KafkaResult<bool> {
    let record = BaseRecord::with_opaque_to(topic, Box::new(target))
        .partition(partition)
        .key(&*message.key)
        .headers(message.kafka_headers());
    let record: BaseRecord<'_, str, str, Box<DeliveryTarget>> = match &message.value {
        Some(value) => record.payload(value),
        None => record,
    };
    match client.send(record) {
        Ok(()) => Ok(true),
        Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => Ok(false),
        Err((error, _)) => Err(error),
    }
}

#[derive(Clone)]
pub struct RecordProducer(Arc<Inner>);

struct Inner {
    config: KafkaConfig,
    /// The CloudEvents source, the same for every message.
    source: String,
    topics: Topics,
    dropped: Arc<AtomicU64>,
    client: Mutex<Client>,
}

impl RecordProducer {
    pub fn new(
        config: &KafkaConfig,
        topics: &Topics,
        dropped: Arc<AtomicU64>,
    ) -> Result<Self, BusError> {
        Ok(Self(Arc::new(Inner {
            client: Mutex::new(record_client(config, dropped.clone())?),
            source: source_of(&config.prefix),
            config: config.clone(),
            topics: topics.clone(),
            dropped,
        })))
    }

    /// Publishes events. The inner error says why not all of them were confirmed.
    pub async fn publish(&self, events: &[RawRecord]) -> Result<Result<(), String>, BusError> {
        if let Some(event) = events.iter().find(|event| event.bucket > Bucket::GLOBAL) {
            let RawRecord {
                position, bucket, ..
            } = event;
            return Ok(Err(format!(
                "position {position}: there is no bucket {bucket}"
            )));
        }
        let client = self.client()?;
        let batch = Batch::new(events.len());
        // If the caller gives up (it may have lost ownership), unsent messages are purged.
        let mut purge = PurgeOnDrop(Some(&client));
        for event in events {
            let message = encode_record(&self.0.source, event);
            let destination = self.0.topics.records_partition(event.bucket);
            loop {
                match send(
                    &client,
                    destination,
                    &message,
                    DeliveryTarget::Batch(batch.clone()),
                ) {
                    Ok(true) => break,
                    Ok(false) => tokio::time::sleep(QUEUE_FULL_PAUSE).await,
                    Err(error) => return Ok(Err(error.to_string())),
                }
            }
        }
        let confirmed = batch.wait().await;
        if confirmed.is_ok() {
            purge.0 = None;
        }
        Ok(confirmed)
    }

    pub fn publish_route(&self, update: &RouteUpdate) {
        let destination = (&*self.0.topics.routes, i32::from(update.bucket().0));
        let sent = encode_route(update).is_ok_and(|message| {
            let client = lock(&self.0.client).clone();
            let sent = send(&client, destination, &message, DeliveryTarget::DropCounter);
            sent.unwrap_or_else(|error| {
                tracing::error!(%error, endpoint = %update.endpoint, "failed to publish a route");
                false
            })
        });
        if !sent {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn flush(&self, timeout: Duration) {
        let client = lock(&self.0.client).clone();
        if let Err(error) = client.flush(timeout) {
            tracing::warn!(%error, "failed to flush all routes");
        }
    }

    /// Returns the client, replacing it after a fatal error.
    fn client(&self) -> Result<Client, BusError> {
        let mut client = lock(&self.0.client);
        if has_fatal_error(client.client()) {
            let error = client.client().fatal_error();
            tracing::warn!(?error, "fatal error in the Kafka producer, replacing it");
            *client = record_client(&self.0.config, self.0.dropped.clone())?;
        }
        Ok(client.clone())
    }
}

/// Purges the queue after a failed or abandoned call.
struct PurgeOnDrop<'a>(Option<&'a Client>);

impl Drop for PurgeOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(client) = self.0 {
            client.purge(PurgeConfig::default().queue());
        }
    }
}

fn record_client(config: &KafkaConfig, dropped: Arc<AtomicU64>) -> Result<Client, BusError> {
    let mut settings = config.client("records");
    settings
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        .set("linger.ms", "1")
        .set("compression.type", "lz4")
        .set("message.max.bytes", LARGE_MESSAGE_BYTES)
        .set("message.timeout.ms", RECORD_TIMEOUT_MS)
        .set("request.timeout.ms", "10000")
        .set("retry.backoff.ms", "50");
    client(&settings, dropped)
}

fn client(settings: &rdkafka::ClientConfig, dropped: Arc<AtomicU64>) -> Result<Client, BusError> {
    ThreadedProducer::from_config_and_context(settings, DeliveryContext { dropped })
        .map_err(client_error)
}

#[derive(Clone)]
pub struct FrameProducer {
    client: Client,
    topics: Topics,
    dropped: Arc<AtomicU64>,
}

impl FrameProducer {
    pub fn new(
        config: &KafkaConfig,
        topics: &Topics,
        dropped: Arc<AtomicU64>,
    ) -> Result<Self, BusError> {
        let mut settings = config.client("frames");
        settings
            .set("acks", "1")
            // Batches the 64 frames of a second.
            .set("linger.ms", "2")
            .set("compression.type", "lz4")
            .set("message.max.bytes", LARGE_MESSAGE_BYTES)
            .set("message.timeout.ms", FRAME_TIMEOUT_MS)
            .set("queue.buffering.max.messages", FRAME_QUEUE_MAX)
            .set("queue.buffering.max.kbytes", "65536");
        Ok(Self {
            client: client(&settings, dropped.clone())?,
            topics: topics.clone(),
            dropped,
        })
    }

    pub fn publish(&self, frame: &Frame) {
        let destination = self.topics.frames_partition(frame.bucket);
        let Ok(message) = encode_frame(frame) else {
            return self.count_dropped();
        };
        if send(
            &self.client,
            destination,
            &message,
            DeliveryTarget::DropCounter,
        )
        .unwrap_or(false)
        {
            return;
        }
        // Queued frames are older, and worth less. Each is reported as failed, and counted then.
        self.client
            .purge(PurgeConfig::default().queue().non_blocking());
        if !send(
            &self.client,
            destination,
            &message,
            DeliveryTarget::DropCounter,
        )
        .unwrap_or(false)
        {
            self.count_dropped();
        }
    }

    pub fn flush(&self, timeout: Duration) {
        if let Err(error) = self.client.flush(timeout) {
            tracing::debug!(%error, "failed to flush all frames");
        }
    }

    fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}
