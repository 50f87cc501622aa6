//! The bus on Apache Kafka: one partition per bucket, so that Kafka's order is the log's order
//! within a bucket.
//!
//! | topic | holds | retention |
//! |---|---|---|
//! | `PREFIX.events` | records of endpoints, partition = bucket | forever |
//! | `PREFIX.global` | records of no endpoint, one partition | forever |
//! | `PREFIX.frames` | measurements, a few buckets to a partition | hours |
//! | `PREFIX.routes` | the newest route of each endpoint, partition = bucket | compacted |
//!
//! Invariants: a record is confirmed only when every in-sync replica has it. Kafka offsets are not
//! used as cursors: those live in the store, and a subscriber starts at the end of the topic.
//! Nothing here blocks a caller that serves requests: frames and routes are queued without waiting.
//!
//! librdkafka calls block, so each consumer ([`reader`]) and the connection monitor ([`health`])
//! runs on its own thread.

mod config;
mod diagnosis;
mod frames;
mod health;
mod log_reader;
mod message;
mod publish;
mod reader;
mod routes;
mod topics;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use contract::frame::{Frame, FrameHeader};
use contract::ids::Position;
use contract::log::{RawRecord, Record};
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use rdkafka::ClientContext;
use rdkafka::client::Client;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::KafkaError;
use tokio::sync::{mpsc, watch};

use crate::{Bus, BusError, BusMessage, RouteMessage, SUBSCRIBER_QUEUE_MAX, Subscription};
use publish::{FrameProducer, RecordProducer};

pub use config::KafkaConfig;
pub use log_reader::{Extent, LogItem, LogReader, MissingPosition, read_log};
pub use topics::Topics;

/// How long [`KafkaBus::open`] waits for a broker before it continues without one.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long [`Bus::close`] waits for queued messages to be sent.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The bus on Apache Kafka. It runs its own threads, which end with [`close`](Bus::close).
pub struct KafkaBus {
    shared: Arc<Shared>,
    records: RecordProducer,
    frames: FrameProducer,
    frame_subscribers: Mutex<Option<FrameSubscribers>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// State shared by the bus and its threads.
struct Shared {
    config: KafkaConfig,
    topics: Topics,
    gate: watch::Receiver<TopicsState>,
    problem: Mutex<Option<String>>,
    warning: Mutex<Option<String>>,
    dropped: Arc<AtomicU64>,
    /// The newest unreadable frames, until they are taken.
    unreadable_frames: Mutex<VecDeque<FrameHeader>>,
    is_stopping: AtomicBool,
}

/// The state of the topics. Nothing is read or written until they have been checked.
#[derive(Clone, Debug, PartialEq)]
enum TopicsState {
    Closed,
    Open,
    Refused(String),
}

type FrameSubscribers = Arc<Mutex<Vec<mpsc::Sender<Arc<Frame>>>>>;

impl KafkaBus {
    /// Creates missing topics and checks existing ones. If no broker answers in time, continues
    /// without one and reports the problem until one does.
    ///
    /// # Errors
    ///
    /// [`BusError::Refused`] if the topics are misconfigured, [`BusError::Failed`] if the
    /// configuration does not yield a client.
    pub async fn open(config: KafkaConfig) -> Result<Arc<Self>, BusError> {
        let (opened, gate) = watch::channel(TopicsState::Closed);
        let dropped = Arc::new(AtomicU64::new(0));
        let shared = Arc::new(Shared {
            topics: Topics::new(&config.prefix),
            gate: gate.clone(),
            problem: Mutex::new(None),
            warning: Mutex::new(None),
            dropped: dropped.clone(),
            unreadable_frames: Mutex::default(),
            is_stopping: AtomicBool::new(false),
            config,
        });
        let bus = Arc::new(Self {
            records: RecordProducer::new(&shared.config, &shared.topics, dropped.clone())?,
            frames: FrameProducer::new(&shared.config, &shared.topics, dropped)?,
            frame_subscribers: Mutex::new(None),
            threads: Mutex::new(Vec::new()),
            shared: shared.clone(),
        });
        let watch = health::watch(shared.clone(), opened)?;
        bus.spawn("kafka-health", watch);
        let mut gate = gate;
        let opened = tokio::time::timeout(
            OPEN_TIMEOUT,
            gate.wait_for(|gate| *gate != TopicsState::Closed),
        );
        match opened.await {
            Ok(Ok(gate)) => {
                if let TopicsState::Refused(why) = &*gate {
                    return Err(BusError::Refused(why.clone()));
                }
            }
            Ok(Err(_)) | Err(_) => {
                // The first request to a broker may take longer than this timeout.
                let problem = lock(&bus.shared.problem)
                    .get_or_insert_with(|| {
                        format!(
                            "Kafka at {}: no broker has answered yet",
                            bus.shared.config.brokers
                        )
                    })
                    .clone();
                tracing::warn!(%problem, "Kafka is unreachable, continuing without it");
            }
        }
        Ok(bus)
    }

    /// The names of the topics.
    pub fn topics(&self) -> &Topics {
        &self.shared.topics
    }

    /// Starts a thread, which must end soon after `is_stopping` is set.
    fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) {
        let thread = std::thread::Builder::new().name(name.to_owned());
        match thread.spawn(work) {
            Ok(handle) => {
                let mut threads = lock(&self.threads);
                threads.retain(|thread| !thread.is_finished());
                threads.push(handle);
            }
            Err(error) => tracing::error!(%error, name, "failed to start a thread"),
        }
    }

    /// Waits until the topics are ready; `position` is that of the last record to be published.
    async fn wait_for_topics(&self, position: Position) -> Result<(), BusError> {
        let mut gate = self.shared.gate.clone();
        let opened = tokio::time::timeout(
            OPEN_TIMEOUT,
            gate.wait_for(|gate| *gate != TopicsState::Closed),
        );
        match opened.await {
            Ok(Ok(gate)) => match &*gate {
                TopicsState::Refused(why) => Err(BusError::Refused(why.clone())),
                _ => Ok(()),
            },
            Ok(Err(_)) => Err(BusError::Closed),
            Err(_) => Err(BusError::NotPublished {
                position,
                detail: self.problem().unwrap_or_default(),
            }),
        }
    }
}

fn client_error(error: impl std::error::Error + Send + Sync + 'static) -> BusError {
    BusError::Failed {
        what: "Kafka client".to_owned(),
        source: error.into(),
    }
}

#[async_trait]
impl Bus for KafkaBus {
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError> {
        let raw = records.iter().map(|record| {
            let refused = |error: serde_json::Error| BusError::Failed {
                what: format!("position {}", record.position),
                source: error.into(),
            };
            RawRecord::of(record).map_err(refused)
        });
        let raw: Vec<RawRecord> = raw.collect::<Result<_, BusError>>()?;
        self.publish_stored(&raw).await
    }

    async fn publish_stored(&self, events: &[RawRecord]) -> Result<(), BusError> {
        let Some(last) = events.last() else {
            return Ok(());
        };
        if self.shared.is_stopping() {
            return Err(BusError::Closed);
        }
        self.wait_for_topics(last.position).await?;
        let published = self.records.publish(events).await?;
        published.map_err(|detail| BusError::NotPublished {
            position: last.position,
            detail,
        })
    }

    fn subscribe_records(&self, subscription: Subscription) -> mpsc::Receiver<BusMessage> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        let shared = self.shared.clone();
        match subscription {
            Subscription::All => {
                self.spawn("kafka-records", move || reader::read_all(&shared, sender));
            }
            Subscription::Group(name) => {
                let global = shared.clone();
                let global_sender = sender.clone();
                self.spawn("kafka-global", move || {
                    reader::read_global(&global, global_sender)
                });
                self.spawn("kafka-records", move || {
                    reader::read_group(&shared, name, sender);
                });
            }
        }
        receiver
    }

    fn publish_frame(&self, frame: Arc<Frame>) {
        self.frames.publish(&frame);
    }

    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        let mut subscribers = lock(&self.frame_subscribers);
        match &*subscribers {
            Some(subscribers) => lock(subscribers).push(sender),
            // One consumer serves all subscribers of the process.
            None => {
                let senders: FrameSubscribers = Arc::new(Mutex::new(vec![sender]));
                *subscribers = Some(senders.clone());
                let shared = self.shared.clone();
                self.spawn("kafka-frames", move || frames::read_live(&shared, &senders));
            }
        }
        receiver
    }

    fn subscribe_frames_since(&self, since: Timestamp) -> Option<mpsc::Receiver<Arc<Frame>>> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        let shared = self.shared.clone();
        self.spawn("kafka-frames", move || {
            frames::read_since(&shared, since, sender);
        });
        Some(receiver)
    }

    fn take_unreadable_frames(&self) -> Vec<FrameHeader> {
        lock(&self.shared.unreadable_frames).drain(..).collect()
    }

    fn publish_route(&self, update: Arc<RouteUpdate>) {
        self.records.publish_route(&update);
    }

    fn subscribe_routes(&self) -> mpsc::Receiver<RouteMessage> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        let shared = self.shared.clone();
        self.spawn("kafka-routes", move || routes::read(&shared, sender));
        receiver
    }

    fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    fn problem(&self) -> Option<String> {
        lock(&self.shared.problem).clone()
    }

    fn warning(&self) -> Option<String> {
        lock(&self.shared.warning).clone()
    }

    async fn close(&self) {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
        if let Some(subscribers) = &*lock(&self.frame_subscribers) {
            lock(subscribers).clear();
        }
        let (records, frames) = (self.records.clone(), self.frames.clone());
        let threads = std::mem::take(&mut *lock(&self.threads));
        let closing = tokio::task::spawn_blocking(move || {
            frames.flush(CLOSE_TIMEOUT);
            records.flush(CLOSE_TIMEOUT);
            for thread in threads {
                // The panic has been logged already.
                let _ = thread.join();
            }
        });
        if closing.await.is_err() {
            tracing::error!("failed to close the bus cleanly");
        }
    }
}

impl Drop for KafkaBus {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Relaxed)
    }

    fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn record_unreadable(&self, head: FrameHeader) {
        let mut heads = lock(&self.unreadable_frames);
        if heads.len() >= SUBSCRIBER_QUEUE_MAX {
            heads.pop_front();
        }
        heads.push_back(head);
    }

    /// Blocks until the topics are ready; returns false if there will be nothing to read.
    fn wait_for_topics(&self) -> bool {
        loop {
            match &*self.gate.borrow() {
                TopicsState::Open => return !self.is_stopping(),
                TopicsState::Refused(_) => return false,
                TopicsState::Closed => {}
            }
            if self.is_stopping() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sleeps, but returns early once the bus is stopping.
    fn pause(&self, length: Duration) {
        let step = Duration::from_millis(50);
        let mut remaining = length;
        while !remaining.is_zero() && !self.is_stopping() {
            let now = remaining.min(step);
            std::thread::sleep(now);
            remaining -= now;
        }
    }
}

/// A panic cannot leave the locked state half modified.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forwards librdkafka's messages to `tracing` at debug level. It repeats itself while a broker is
/// down; [`health`] reports that once.
#[derive(Clone, Copy, Default)]
struct LogContext;

impl ClientContext for LogContext {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(target: "librdkafka", facility, "{message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, "{reason}");
    }
}

impl ConsumerContext for LogContext {}

/// Whether the client has hit a fatal error, after which it must be replaced.
fn has_fatal_error<C: ClientContext>(client: &Client<C>) -> bool {
    client.fatal_error().is_some()
}
