//! The published log, frames and routes, behind one port.
//!
//! A subscriber may miss records (they were published before it was there, or the bus lost them), and
//! may get one twice or late; a record's `prev` shows a hole, and the store fills it. Frames and
//! routes may be lost: frames are measurements, routes are published again.

#![warn(missing_docs, clippy::missing_errors_doc)]

#[cfg(feature = "kafka")]
pub mod kafka;
mod local;

use std::sync::Arc;

use async_trait::async_trait;
use contract::frame::{Frame, FrameHead};
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record};
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use tokio::sync::mpsc;

pub use local::LocalBus;

/// Largest number of messages that wait for one subscriber.
pub const SUBSCRIBER_QUEUE_MAX: usize = 65_536;

/// Which records a subscriber gets. Those of the global bucket come to everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subscription {
    /// The buckets are dealt among all processes that subscribe under this name.
    Group(&'static str),
    /// Every bucket.
    Whole,
}

/// The port to the bus. Whoever publishes and whoever subscribes need know nothing of what carries
/// it.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Returns when all of them are on the log's topic, confirmed by as many brokers as it asks for.
    /// After an error some may be there: publishing the same again is right. Whoever publishes does so
    /// alone, and in order of position.
    ///
    /// # Errors
    ///
    /// [`BusError::NotPublished`] where the brokers did not take all of them in time,
    /// [`BusError::Closed`] after [`close`](Bus::close). The first says that the same is to be
    /// published again.
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError>;
    /// The same for events as the log has them: they go out with all that a newer release has written
    /// into them, whether or not this one can read it. A bus that keeps nothing has no use for it.
    ///
    /// # Errors
    ///
    /// As [`publish_records`](Bus::publish_records).
    async fn publish_stored(&self, _events: &[RawRecord]) -> Result<(), BusError> {
        Ok(())
    }
    /// Begins with what is published from now on. Between [`BusMessage::Assigned`] and
    /// [`BusMessage::Revoked`] of a bucket come its records, and none outside of it.
    fn subscribe_records(&self, subscription: Subscription) -> mpsc::Receiver<BusMessage>;

    /// Never waits. What cannot be kept until it is sent is lost, and counted.
    fn publish_frame(&self, frame: Arc<Frame>);
    /// From now on, of all buckets.
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>>;

    /// Frames of all buckets that a bus which keeps them for a while has had since then, and the
    /// later ones. One that keeps nothing gives them from now on.
    fn subscribe_frames_since(&self, _since: Timestamp) -> mpsc::Receiver<Arc<Frame>> {
        self.subscribe_frames()
    }

    /// Frames of all buckets that came since this was asked last and could not be read, such as those of
    /// a newer release; no subscriber gets them. Whoever counts frames has to know that they are missing.
    fn take_unreadable_frames(&self) -> Vec<FrameHead> {
        Vec::new()
    }

    /// Never waits. Of an endpoint only the newest update is kept for those who come later: one
    /// that is older by revision, then by the deal of its slots, is passed over.
    fn publish_route(&self, update: Arc<RouteUpdate>);
    /// All current routes first, then every update.
    fn subscribe_routes(&self) -> mpsc::Receiver<RouteMessage>;

    /// Messages that did not reach the bus, or not a subscriber that was slow.
    fn dropped(&self) -> u64;
    /// None while all is well, else a sentence for readiness.
    fn trouble(&self) -> Option<String>;
    /// What people should know of although all works, such as events without a second copy.
    fn remark(&self) -> Option<String> {
        None
    }
    /// Sends what waits to be sent, ends all subscriptions and leaves their groups.
    async fn close(&self);
}

/// What a subscriber of records is told.
#[derive(Clone, Debug)]
pub enum BusMessage {
    /// These buckets are ours from now on (with the global one).
    Assigned(Vec<Bucket>),
    /// These buckets are somebody else's from now on.
    Revoked(Vec<Bucket>),
    /// The next record of a bucket that is assigned; it may be one that came before.
    Record(Arc<Record>),
}

/// What a subscriber of routes is told.
#[derive(Clone, Debug)]
pub enum RouteMessage {
    /// The newest route of one endpoint, or that it is gone.
    Update(Arc<RouteUpdate>),
    /// All routes that were there have come. Said once at least, and again after a reconnection.
    CaughtUp,
}

/// Why the bus cannot be opened, or has not done what it was asked to.
///
/// Where brokers said no or nothing, the variants hold sentences and no source: what librdkafka says is a code
/// for each of many tries, and they are put into words for people where it says it.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The URL names no bus that this binary can use.
    #[error("--bus {url}: {reason}")]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it, and how one is written.
        reason: String,
    },
    /// It answers, and is not what it should be; trying again changes nothing.
    #[error("{0}")]
    Refused(String),
    /// Some of the records may be on the bus, the rest is not; publish the same again.
    #[error("the bus did not take records up to position {position}: {detail}")]
    NotPublished {
        /// Of the last record that was to be published.
        position: Position,
        /// What the bus said, or did not.
        detail: String,
    },
    /// It was closed in this process; nothing more goes through it.
    #[error("the bus is shut down")]
    Closed,
    /// Something on it cannot be read; the sentence says what.
    #[error("the bus cannot be read: {0}")]
    Unreadable(String),
    /// Something of this process stands in the way, such as a client that cannot be made.
    #[error("{what}: {source}")]
    Failed {
        /// What failed.
        what: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nobody answers, and has not for as long as it is waited for.
    #[error("{0}")]
    Unreachable(String),
}

/// The bus that a URL names: `local`, or `kafka://HOST:PORT[,…]/PREFIX`.
///
/// # Errors
///
/// [`BusError::Url`] where the URL names no bus that this binary has, [`BusError::Refused`] and
/// [`BusError::Unreachable`] where the brokers are not what they should be, or do not answer.
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
    })
}
