//! The published log, frames and routes, behind one trait.
//!
//! A subscriber may miss records (published before it subscribed, or lost by the bus), and may
//! receive one twice or late: a record's `prev` reveals a gap, which is filled from the store.
//! Frames and routes may be lost: frames are measurements, and routes are published again.

#![warn(missing_docs, clippy::missing_errors_doc)]

#[cfg(feature = "kafka")]
pub mod kafka;
mod local;

use std::sync::Arc;

use async_trait::async_trait;
use contract::frame::{Frame, FrameHeader};
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record};
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use tokio::sync::mpsc;

pub use local::LocalBus;

/// The most messages queued for one subscriber.
pub const SUBSCRIBER_QUEUE_MAX: usize = 65_536;

/// Which records a subscriber receives. Those of the global bucket go to every subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subscription {
    /// The buckets are distributed among all processes that subscribe under this name.
    Group(&'static str),
    /// Every bucket.
    All,
}

/// The bus, independent of what transports it.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Publishes records to the log's topic and returns once as many brokers as the topic requires
    /// have confirmed all of them. After an error some may have been published; publishing the same
    /// records again is safe. The caller must be the only publisher, and publish in order of
    /// position.
    ///
    /// # Errors
    ///
    /// [`BusError::NotPublished`] if the brokers did not confirm all of them in time; publish the
    /// same records again. [`BusError::Closed`] after [`close`](Bus::close).
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError>;
    /// Publishes events exactly as the log stores them, including anything written by a newer
    /// release that this one cannot read. A bus that retains nothing ignores this.
    ///
    /// # Errors
    ///
    /// Same as [`publish_records`](Bus::publish_records).
    async fn publish_stored(&self, _events: &[RawRecord]) -> Result<(), BusError> {
        Ok(())
    }
    /// Subscribes to records published from now on. Records of a bucket are delivered only between
    /// its [`BusMessage::Assigned`] and [`BusMessage::Revoked`].
    fn subscribe_records(&self, subscription: Subscription) -> mpsc::Receiver<BusMessage>;

    /// Never blocks. Frames that cannot be queued are dropped and counted.
    fn publish_frame(&self, frame: Arc<Frame>);
    /// Subscribes to the frames of all buckets from now on.
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>>;

    /// Subscribes to the frames of all buckets since `since`; `None` if the bus retains no frames, so
    /// that only a subscription that exists already has earlier ones.
    fn subscribe_frames_since(&self, _since: Timestamp) -> Option<mpsc::Receiver<Arc<Frame>>> {
        None
    }

    /// Returns the heads of frames of any bucket that arrived since the last call and could not be
    /// read, such as those of a newer release. No subscriber receives them, but a consumer that
    /// counts frames must know that they are missing.
    fn take_unreadable_frames(&self) -> Vec<FrameHeader> {
        Vec::new()
    }

    /// Never blocks. Only the newest update of each endpoint is retained for later subscribers; an
    /// update that is older by revision, then by slot assignment, is ignored.
    fn publish_route(&self, update: Arc<RouteUpdate>);
    /// Whether routes that earlier processes published are delivered, too.
    fn retains_routes(&self) -> bool {
        true
    }
    /// Says that the routes of all endpoints in the log have been published at least once. On a bus
    /// that retains no routes of earlier processes, subscribers have caught up only then.
    fn mark_routes_complete(&self) {}
    /// Delivers all current routes first, then every update.
    fn subscribe_routes(&self) -> mpsc::Receiver<RouteMessage>;

    /// The number of messages that did not reach the bus, or were dropped because a subscriber was
    /// slow.
    fn dropped(&self) -> u64;
    /// What is wrong, as a sentence for readiness; `None` while the bus works.
    fn problem(&self) -> Option<String>;
    /// A condition that operators should know of although the bus works, such as events without a
    /// second replica.
    fn warning(&self) -> Option<String> {
        None
    }
    /// Flushes queued messages, ends all subscriptions and leaves their consumer groups.
    async fn close(&self);
}

/// A message to a subscriber of records.
#[derive(Clone, Debug)]
pub enum BusMessage {
    /// These buckets now belong to this subscriber (in addition to the global one).
    Assigned(Vec<Bucket>),
    /// These buckets no longer belong to this subscriber.
    Revoked(Vec<Bucket>),
    /// The next record of an assigned bucket; it may be a repeat.
    Record(Arc<Record>),
}

/// A message to a subscriber of routes.
#[derive(Clone, Debug)]
pub enum RouteMessage {
    /// The newest route of one endpoint, or its removal.
    Update(Arc<RouteUpdate>),
    /// All routes that existed at subscription have been delivered, at least those of the log when
    /// it was opened. Sent at least once, and again after a reconnection.
    CaughtUp,
}

/// Why the bus could not be opened, or could not do what was requested.
///
/// Broker failures are sentences without a source: librdkafka reports a code per attempt, and those
/// codes are turned into advice where they occur.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The URL does not name a bus supported by this binary.
    #[error("--bus {url}: {reason}")]
    Url {
        /// The URL as given.
        url: String,
        /// What is wrong with it, and the expected format.
        reason: String,
        /// The error behind it, such as of a file that an option names; the reason includes it.
        source: Option<std::io::Error>,
    },
    /// The bus is reachable but misconfigured; retrying does not help.
    #[error("{0}")]
    Refused(String),
    /// Some of the records may have been published, the rest were not; publish the same ones again.
    #[error("the bus did not accept records up to position {position}: {detail}")]
    NotPublished {
        /// The position of the last record to be published.
        position: Position,
        /// What the bus reported, if anything.
        detail: String,
    },
    /// The bus was closed by this process; nothing more can be published.
    #[error("the bus is shut down")]
    Closed,
    /// Something on the bus cannot be read; the sentence says what.
    #[error("the bus cannot be read: {0}")]
    Unreadable(String),
    /// A failure in this process, such as a client that cannot be created.
    #[error("{what}: {source}")]
    Failed {
        /// What failed.
        what: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No broker answered within the timeout.
    #[error("{0}")]
    Unreachable(String),
}

/// Opens the bus that a URL names: `local`, or `kafka://HOST:PORT[,…]/PREFIX`.
///
/// # Errors
///
/// [`BusError::Url`] if the URL does not name a bus supported by this binary, [`BusError::Refused`]
/// if the brokers are misconfigured, and [`BusError::Unreachable`] if they do not answer.
pub async fn open(url: &str) -> Result<Arc<dyn Bus>, BusError> {
    if url == "local" {
        return Ok(LocalBus::new());
    }
    #[cfg(feature = "kafka")]
    if url.starts_with("kafka://") {
        let config = kafka::KafkaConfig::parse(url)?;
        return Ok(kafka::KafkaBus::open(config).await?);
    }
    let reason = match (cfg!(feature = "kafka"), url.starts_with("kafka://")) {
        (false, true) => {
            "this binary was built without Kafka; `cargo build --release --bin penstock` makes one with it"
        }
        _ => "write local, or kafka://HOST:PORT/PREFIX",
    };
    Err(BusError::Url {
        url: url.to_owned(),
        reason: reason.to_owned(),
        source: None,
    })
}
