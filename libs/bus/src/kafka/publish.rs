//! Producers: one for records and routes, which confirms, and one for frames, which never waits.
//!
//! Invariant: within a bucket, records lie on the topic in the order in which they were handed over,
//! unless a call of [`RecordProducer::publish`] has failed; then they are handed over again, and the
//! topic may have some of them twice and late.

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

use super::message::{Outgoing, encode_frame, encode_record, encode_route, source_of};
use super::topics::LARGE_MESSAGE_BYTES;
use super::{KafkaConfig, Quiet, Topics, is_broken, lock, no_client};
use crate::BusError;

/// A record that no broker has confirmed by then fails its call.
const CONFIRMED_WITHIN_MS: &str = "30000";

/// Frames older than this are of no use to a decision.
const FRAME_SENT_WITHIN_MS: &str = "10000";

/// Frames that wait for a broker; a gateway makes 64 a second.
const FRAMES_WAITING_MAX: &str = "4096";

const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(2);

/// One call's messages on their way.
struct Batch {
    left: AtomicUsize,
    failure: Mutex<Option<String>>,
    done: Notify,
}

impl Batch {
    fn new(messages: usize) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicUsize::new(messages),
            failure: Mutex::new(None),
            done: Notify::new(),
        })
    }

    fn settle(&self, outcome: Result<(), String>) {
        if let Err(why) = outcome {
            lock(&self.failure).get_or_insert(why);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.notify_one();
        }
    }

    async fn wait(&self) -> Result<(), String> {
        while self.left.load(Ordering::Acquire) > 0 {
            self.done.notified().await;
        }
        lock(&self.failure).take().map_or(Ok(()), Err)
    }
}

/// What a message's fate is reported to.
enum Fate {
    Record(Arc<Batch>),
    /// Nobody waits for it.
    Counted,
}

struct Reports {
    dropped: Arc<AtomicU64>,
}

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        Quiet.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        Quiet.error(error, reason);
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<Fate>;

    fn delivery(&self, result: &DeliveryResult<'_>, fate: Box<Fate>) {
        let failure = result.as_ref().err().map(|(error, _)| error.to_string());
        match (*fate, failure) {
            (Fate::Record(batch), failure) => batch.settle(failure.map_or(Ok(()), Err)),
            (Fate::Counted, Some(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            (Fate::Counted, None) => {}
        }
    }
}

type Client = ThreadedProducer<Reports>;

/// False: the queue is full.
fn send(
    client: &Client,
    (topic, partition): (&str, i32),
    message: &Outgoing<'_>,
    fate: Fate,
) -> KafkaResult<bool> {
    let record = BaseRecord::with_opaque_to(topic, Box::new(fate))
        .partition(partition)
        .key(&*message.key)
        .headers(message.kafka_headers());
    let record: BaseRecord<'_, str, str, Box<Fate>> = match &message.value {
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
pub struct RecordProducer(Arc<Records>);

struct Records {
    config: KafkaConfig,
    /// Who tells: the same in every message.
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
        Ok(Self(Arc::new(Records {
            client: Mutex::new(record_client(config, dropped.clone())?),
            source: source_of(&config.prefix),
            config: config.clone(),
            topics: topics.clone(),
            dropped,
        })))
    }

    /// The inner error says why not all of them were confirmed.
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
        // A caller that gives up (it may no longer be the owner) takes back what has not left yet.
        let mut taken_back = TakeBack(Some(&client));
        for event in events {
            let message = encode_record(&self.0.source, event);
            let to = self.0.topics.of_records(event.bucket);
            loop {
                match send(&client, to, &message, Fate::Record(batch.clone())) {
                    Ok(true) => break,
                    Ok(false) => tokio::time::sleep(QUEUE_FULL_PAUSE).await,
                    Err(error) => return Ok(Err(error.to_string())),
                }
            }
        }
        let confirmed = batch.wait().await;
        if confirmed.is_ok() {
            taken_back.0 = None;
        }
        Ok(confirmed)
    }

    pub fn publish_route(&self, update: &RouteUpdate) {
        let to = (&*self.0.topics.routes, i32::from(update.bucket().0));
        let sent = encode_route(update).is_ok_and(|message| {
            let client = lock(&self.0.client).clone();
            let sent = send(&client, to, &message, Fate::Counted);
            sent.unwrap_or_else(|error| {
                tracing::error!(%error, endpoint = %update.endpoint, "a route cannot be published");
                false
            })
        });
        if !sent {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn flush(&self, patience: Duration) {
        let client = lock(&self.0.client).clone();
        if let Err(error) = client.flush(patience) {
            tracing::warn!(%error, "not all routes have been published");
        }
    }

    /// The client, or a new one where it cannot go on.
    fn client(&self) -> Result<Client, BusError> {
        let mut client = lock(&self.0.client);
        if is_broken(client.client()) {
            let error = client.client().fatal_error();
            tracing::warn!(?error, "the Kafka producer cannot go on and is replaced");
            *client = record_client(&self.0.config, self.0.dropped.clone())?;
        }
        Ok(client.clone())
    }
}

/// Purges what a failed or abandoned call has left in the queue.
struct TakeBack<'a>(Option<&'a Client>);

impl Drop for TakeBack<'_> {
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
        .set("message.timeout.ms", CONFIRMED_WITHIN_MS)
        .set("request.timeout.ms", "10000")
        .set("retry.backoff.ms", "50");
    client(&settings, dropped)
}

fn client(settings: &rdkafka::ClientConfig, dropped: Arc<AtomicU64>) -> Result<Client, BusError> {
    ThreadedProducer::from_config_and_context(settings, Reports { dropped }).map_err(no_client)
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
            // The 64 frames of a second leave together.
            .set("linger.ms", "2")
            .set("compression.type", "lz4")
            .set("message.max.bytes", LARGE_MESSAGE_BYTES)
            .set("message.timeout.ms", FRAME_SENT_WITHIN_MS)
            .set("queue.buffering.max.messages", FRAMES_WAITING_MAX)
            .set("queue.buffering.max.kbytes", "65536");
        Ok(Self {
            client: client(&settings, dropped.clone())?,
            topics: topics.clone(),
            dropped,
        })
    }

    pub fn publish(&self, frame: &Frame) {
        let to = self.topics.of_frames(frame.bucket);
        let Ok(message) = encode_frame(frame) else {
            return self.lost();
        };
        if send(&self.client, to, &message, Fate::Counted).unwrap_or(false) {
            return;
        }
        // What waits is older, and worth less. Each of them is reported as failed, and counted there.
        self.client
            .purge(PurgeConfig::default().queue().non_blocking());
        if !send(&self.client, to, &message, Fate::Counted).unwrap_or(false) {
            self.lost();
        }
    }

    pub fn flush(&self, patience: Duration) {
        if let Err(error) = self.client.flush(patience) {
            tracing::debug!(%error, "not all frames have been published");
        }
    }

    fn lost(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}
