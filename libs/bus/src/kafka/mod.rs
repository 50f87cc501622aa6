//! The bus on Apache Kafka: one partition per bucket, so that Kafka's order is the log's order
//! within a bucket.
//!
//! | topic | holds | kept |
//! |---|---|---|
//! | `PREFIX.events` | records of endpoints, partition = bucket | for ever |
//! | `PREFIX.global` | records of no endpoint, one partition | for ever |
//! | `PREFIX.frames` | measurements, a few buckets to a partition | hours |
//! | `PREFIX.routes` | the newest route of each endpoint, partition = bucket | compacted |
//!
//! Invariants: a record is confirmed only when every in-sync copy has it. Offsets mean nothing:
//! cursors live in the store, and a subscriber begins at the end. Nothing here holds up a caller that
//! serves requests: frames and routes are handed over and never waited for.
//!
//! librdkafka calls block, so every consumer has a thread of its own ([`reader`]), and so has what
//! watches over the connection ([`health`]).

mod config;
mod frames;
mod health;
mod message;
mod publish;
mod reader;
mod reason;
mod routes;
mod topics;
mod whole;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use contract::frame::{Frame, FrameHead};
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
pub use topics::Topics;
pub use whole::{Extent, Hole, LogItem, LogReader, read_log};

/// How long [`KafkaBus::open`] waits for a broker before it goes on without.
const OPEN_PATIENCE: Duration = Duration::from_secs(5);

/// How long [`Bus::close`] waits for what is still to be sent.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);

/// The bus on Apache Kafka. It has threads of its own, which end with [`close`](Bus::close).
pub struct KafkaBus {
    shared: Arc<Shared>,
    records: RecordProducer,
    frames: FrameProducer,
    frame_readers: Mutex<Option<FrameReaders>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the bus and its threads have in common.
struct Shared {
    config: KafkaConfig,
    topics: Topics,
    gate: watch::Receiver<Gate>,
    trouble: Mutex<Option<String>>,
    remark: Mutex<Option<String>>,
    dropped: Arc<AtomicU64>,
    /// The newest of the frames that could not be read, until somebody takes them.
    unreadable_frames: Mutex<VecDeque<FrameHead>>,
    stopping: AtomicBool,
}

/// Nothing is read or written before the topics have been checked.
#[derive(Clone, Debug, PartialEq)]
enum Gate {
    Closed,
    Open,
    Refused(String),
}

type FrameReaders = Arc<Mutex<Vec<mpsc::Sender<Arc<Frame>>>>>;

impl KafkaBus {
    /// Makes the topics that are missing and checks those that exist. If no broker answers for a
    /// while, goes on without: [`Bus::trouble`] says so until one does.
    ///
    /// # Errors
    ///
    /// [`BusError::Refused`] where the topics are not as they must be, [`BusError::Failed`] where a client cannot be made
    /// of the configuration.
    pub async fn open(config: KafkaConfig) -> Result<Arc<Self>, BusError> {
        let (opened, gate) = watch::channel(Gate::Closed);
        let dropped = Arc::new(AtomicU64::new(0));
        let shared = Arc::new(Shared {
            topics: Topics::new(&config.prefix),
            gate: gate.clone(),
            trouble: Mutex::new(None),
            remark: Mutex::new(None),
            dropped: dropped.clone(),
            unreadable_frames: Mutex::default(),
            stopping: AtomicBool::new(false),
            config,
        });
        let bus = Arc::new(Self {
            records: RecordProducer::new(&shared.config, &shared.topics, dropped.clone())?,
            frames: FrameProducer::new(&shared.config, &shared.topics, dropped)?,
            frame_readers: Mutex::new(None),
            threads: Mutex::new(Vec::new()),
            shared: shared.clone(),
        });
        let watching = health::watch(shared.clone(), opened)?;
        bus.spawn("kafka-health", watching);
        let mut gate = gate;
        let opened =
            tokio::time::timeout(OPEN_PATIENCE, gate.wait_for(|gate| *gate != Gate::Closed));
        match opened.await {
            Ok(Ok(gate)) => {
                if let Gate::Refused(why) = &*gate {
                    return Err(BusError::Refused(why.clone()));
                }
            }
            Ok(Err(_)) | Err(_) => {
                // The first question to a broker may take longer than we wait.
                let trouble = lock(&bus.shared.trouble)
                    .get_or_insert_with(|| {
                        format!(
                            "Kafka at {}: no broker has answered yet",
                            bus.shared.config.brokers
                        )
                    })
                    .clone();
                tracing::warn!(%trouble, "Kafka is not there yet; goes on without");
            }
        }
        Ok(bus)
    }

    /// The names of its topics.
    pub fn topics(&self) -> &Topics {
        &self.shared.topics
    }

    /// A thread that ends soon after `stopping` is set.
    fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) {
        let thread = std::thread::Builder::new().name(name.to_owned());
        match thread.spawn(work) {
            Ok(handle) => {
                let mut threads = lock(&self.threads);
                threads.retain(|thread| !thread.is_finished());
                threads.push(handle);
            }
            Err(error) => tracing::error!(%error, name, "could not start a thread"),
        }
    }

    /// Waits for the topics; `position` is the last of what waits.
    async fn gate(&self, position: Position) -> Result<(), BusError> {
        let mut gate = self.shared.gate.clone();
        let opened =
            tokio::time::timeout(OPEN_PATIENCE, gate.wait_for(|gate| *gate != Gate::Closed));
        match opened.await {
            Ok(Ok(gate)) => match &*gate {
                Gate::Refused(why) => Err(BusError::Refused(why.clone())),
                _ => Ok(()),
            },
            Ok(Err(_)) => Err(BusError::Closed),
            Err(_) => Err(BusError::NotPublished {
                position,
                detail: self.trouble().unwrap_or_default(),
            }),
        }
    }
}

fn no_client(error: impl std::error::Error + Send + Sync + 'static) -> BusError {
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
        if self.shared.stopping() {
            return Err(BusError::Closed);
        }
        self.gate(last.position).await?;
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
            Subscription::Whole => {
                self.spawn("kafka-records", move || reader::read_all(&shared, sender));
            }
            Subscription::Group(name) => {
                let global = shared.clone();
                let global_sender = sender.clone();
                self.spawn("kafka-global", move || {
                    reader::read_global(&global, global_sender)
                });
                self.spawn("kafka-records", move || {
                    reader::read_as_member(&shared, name, sender);
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
        let mut readers = lock(&self.frame_readers);
        match &*readers {
            Some(readers) => lock(readers).push(sender),
            // One consumer serves the whole process.
            None => {
                let list: FrameReaders = Arc::new(Mutex::new(vec![sender]));
                *readers = Some(list.clone());
                let shared = self.shared.clone();
                self.spawn("kafka-frames", move || frames::read(&shared, &list));
            }
        }
        receiver
    }

    fn subscribe_frames_since(&self, since: Timestamp) -> mpsc::Receiver<Arc<Frame>> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        let shared = self.shared.clone();
        self.spawn("kafka-frames", move || {
            frames::read_since(&shared, since, sender);
        });
        receiver
    }

    fn take_unreadable_frames(&self) -> Vec<FrameHead> {
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

    fn trouble(&self) -> Option<String> {
        lock(&self.shared.trouble).clone()
    }

    fn remark(&self) -> Option<String> {
        lock(&self.shared.remark).clone()
    }

    async fn close(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        if let Some(readers) = &*lock(&self.frame_readers) {
            lock(readers).clear();
        }
        let (records, frames) = (self.records.clone(), self.frames.clone());
        let threads = std::mem::take(&mut *lock(&self.threads));
        let closing = tokio::task::spawn_blocking(move || {
            frames.flush(CLOSE_PATIENCE);
            records.flush(CLOSE_PATIENCE);
            for thread in threads {
                // A reader that panicked has said so already.
                let _ = thread.join();
            }
        });
        if closing.await.is_err() {
            tracing::error!("closing the bus failed half-way");
        }
    }
}

impl Drop for KafkaBus {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn note_unreadable(&self, head: FrameHead) {
        let mut heads = lock(&self.unreadable_frames);
        if heads.len() >= SUBSCRIBER_QUEUE_MAX {
            heads.pop_front();
        }
        heads.push_back(head);
    }

    /// Waits for the topics; false if there will be nothing to read.
    fn wait_for_topics(&self) -> bool {
        loop {
            match &*self.gate.borrow() {
                Gate::Open => return !self.stopping(),
                Gate::Refused(_) => return false,
                Gate::Closed => {}
            }
            if self.stopping() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sleeps, but not when it is time to stop.
    fn pause(&self, length: Duration) {
        let step = Duration::from_millis(50);
        let mut left = length;
        while !left.is_zero() && !self.stopping() {
            let now = left.min(step);
            std::thread::sleep(now);
            left -= now;
        }
    }
}

/// A panic elsewhere cannot leave what is locked here half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends what librdkafka has to say to our own log. It repeats itself while a broker is away, and
/// [`health`] says that once.
#[derive(Clone, Copy, Default)]
struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(target: "librdkafka", facility, "{message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, "{reason}");
    }
}

impl ConsumerContext for Quiet {}

/// After a fatal error a client can only be replaced.
fn is_broken<C: ClientContext>(client: &Client<C>) -> bool {
    client.fatal_error().is_some()
}
