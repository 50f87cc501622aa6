//! A bus whose messages are sent by the test, and helpers that append events.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![allow(dead_code)]

pub mod positions;

use std::sync::{Arc, Mutex};

use bus::{Bus, BusError, BusMessage, RouteMessage, Subscription};
use contract::events::Event;
use contract::frame::Frame;
use contract::ids::{EndpointKey, Position};
use contract::log::{Actor, NewEvent, RawRecord, Record, StreamKind, StreamName};
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use store::{Append, Commit, Committed, Store};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

pub async fn open(folder: &TempDir) -> Store {
    let url = format!("sqlite:{}", folder.path().join("log.db").display());
    Store::open(&url).await.unwrap()
}

pub async fn execute(folder: &TempDir, sql: &'static str) {
    use sqlx::Connection as _;
    let url = format!("sqlite:{}", folder.path().join("log.db").display());
    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::query(sql).execute(&mut connection).await.unwrap();
}

pub fn key(endpoint: &str) -> EndpointKey {
    EndpointKey::new(&endpoint.parse().unwrap())
}

pub async fn append(store: &Store, stream: StreamName, event: Event) -> Arc<Record> {
    let version = store.read_stream(&stream, 0, 10_000).await.unwrap().len() as u64;
    let append = Append {
        stream,
        expected_version: version,
        events: vec![NewEvent {
            id: Uuid::now_v7(),
            time: Timestamp::from_secs(1),
            actor: Actor::service("test"),
            event,
        }],
    };
    let commit = Commit {
        appends: vec![append],
        ..Commit::default()
    };
    match store.commit(commit).await.unwrap() {
        Committed::Written { records } => records[0].clone(),
        before => panic!("{before:?}"),
    }
}

pub async fn append_to(
    store: &Store,
    kind: StreamKind,
    endpoint: &str,
    event: Event,
) -> Arc<Record> {
    append(store, StreamName::of(kind, &key(endpoint)), event).await
}

/// How the bus reacts to what is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishMode {
    Accept,
    Refuse,
    /// Publishes, and never returns.
    Hang,
}

pub struct ScriptedBus {
    subscribers: Mutex<Vec<mpsc::Sender<BusMessage>>>,
    pub published: watch::Sender<Vec<Position>>,
    /// Events that were published as stored.
    pub stored: Mutex<Vec<RawRecord>>,
    /// The frames that it has kept.
    pub kept_frames: Mutex<Vec<Arc<Frame>>>,
    live_frames: Mutex<Vec<mpsc::Sender<Arc<Frame>>>>,
    pub mode: Mutex<PublishMode>,
    pub refused: watch::Sender<u32>,
}

impl ScriptedBus {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            subscribers: Mutex::default(),
            stored: Mutex::default(),
            kept_frames: Mutex::default(),
            live_frames: Mutex::default(),
            published: watch::Sender::new(Vec::new()),
            mode: Mutex::new(PublishMode::Accept),
            refused: watch::Sender::new(0),
        })
    }

    pub fn send(&self, message: BusMessage) {
        for subscriber in self.subscribers.lock().unwrap().iter() {
            // A subscriber may be gone.
            let _ = subscriber.try_send(message.clone());
        }
    }

    pub fn set_mode(&self, mode: PublishMode) {
        *self.mode.lock().unwrap() = mode;
    }

    /// Waits until this many have been published.
    pub async fn wait_for_published(&self, count: usize) -> Vec<u64> {
        let mut published = self.published.subscribe();
        let published = published
            .wait_for(|positions| positions.len() >= count)
            .await;
        published
            .unwrap()
            .iter()
            .map(|position| position.0)
            .collect()
    }
}

#[async_trait::async_trait]
impl Bus for ScriptedBus {
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError> {
        let mode = *self.mode.lock().unwrap();
        if mode == PublishMode::Refuse {
            self.refused.send_modify(|count| *count += 1);
            return Err(BusError::NotPublished {
                position: records.last().unwrap().position,
                detail: "the test says so".into(),
            });
        }
        self.published
            .send_modify(|all| all.extend(records.iter().map(|record| record.position)));
        for record in records {
            self.send(BusMessage::Record(record.clone()));
        }
        if mode == PublishMode::Hang {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
    async fn publish_stored(&self, events: &[RawRecord]) -> Result<(), BusError> {
        let mode = *self.mode.lock().unwrap();
        if mode == PublishMode::Refuse {
            self.refused.send_modify(|count| *count += 1);
            return Err(BusError::NotPublished {
                position: events.last().unwrap().position,
                detail: "the test says so".into(),
            });
        }
        self.stored.lock().unwrap().extend_from_slice(events);
        self.published
            .send_modify(|all| all.extend(events.iter().map(|event| event.position)));
        if mode == PublishMode::Hang {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
    fn subscribe_records(&self, _subscription: Subscription) -> mpsc::Receiver<BusMessage> {
        let (sender, receiver) = mpsc::channel(10_000);
        self.subscribers.lock().unwrap().push(sender);
        receiver
    }
    fn publish_frame(&self, _frame: Arc<Frame>) {}
    fn subscribe_frames_since(&self, since: Timestamp) -> Option<mpsc::Receiver<Arc<Frame>>> {
        let (sender, receiver) = mpsc::channel(100);
        let kept_frames = self.kept_frames.lock().unwrap();
        // The newest one arrives at this moment.
        if let Some(newest) = kept_frames.last() {
            for subscriber in self.live_frames.lock().unwrap().iter() {
                subscriber.try_send(newest.clone()).unwrap();
            }
        }
        for frame in kept_frames.iter() {
            if frame.start >= since {
                sender.try_send(frame.clone()).unwrap();
            }
        }
        Some(receiver)
    }
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>> {
        let (sender, receiver) = mpsc::channel(100);
        self.live_frames.lock().unwrap().push(sender);
        receiver
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
