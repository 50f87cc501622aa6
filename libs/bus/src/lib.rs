//! The published log, frames and routes, behind one port.
//!
//! A subscriber may miss records (it was slow, or the bus lost them) but never gets them out of order
//! within a bucket; a record's `prev` shows a hole, and the store fills it. Frames and routes may be
//! lost: frames are measurements, routes are published again.

mod local;

use std::sync::Arc;

use async_trait::async_trait;
use contract::frame::Frame;
use contract::ids::{Bucket, Position};
use contract::log::Record;
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use tokio::sync::mpsc;

pub use local::LocalBus;

/// Largest number of messages that wait for one subscriber. Past it, records and frames are
/// dropped (and counted): a slow consumer must not hold the log in memory.
pub const SUBSCRIBER_QUEUE_MAX: usize = 65_536;

/// Which buckets a subscriber of records is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subscription {
    /// Buckets are dealt among the replicas of this group.
    Group(&'static str),
    /// Every bucket, whoever else reads it.
    Whole,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum BusError {
    #[error("the bus did not take records up to position {position}: {detail}")]
    NotPublished { position: Position, detail: String },
    #[error("the bus is shut down")]
    Closed,
}

#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Records in order of position. Returns when the log's topic has all of them; after an error
    /// any of them may have been published. Called by the relay only.
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError>;
    /// The records of the buckets that are assigned to this subscriber, and the global ones.
    fn subscribe_records(&self, subscription: Subscription) -> mpsc::Receiver<BusMessage>;

    /// Never waits: what does not fit is dropped, and counted.
    fn publish_frame(&self, frame: Arc<Frame>);
    /// Frames of all buckets from now on.
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>>;

    /// Frames of all buckets that a bus which keeps them for a while has had since then, and the
    /// later ones. One that keeps nothing gives them from now on.
    fn subscribe_frames_since(&self, _since: Timestamp) -> mpsc::Receiver<Arc<Frame>> {
        self.subscribe_frames()
    }

    fn publish_route(&self, update: Arc<RouteUpdate>);
    /// All current routes first, then every update.
    fn subscribe_routes(&self) -> mpsc::Receiver<Arc<RouteUpdate>>;

    /// Messages dropped because a subscriber was slow or the bus was away.
    fn dropped(&self) -> u64;
    /// A sentence for readiness while the bus cannot be reached.
    fn trouble(&self) -> Option<String>;
    /// Sends what waits, and leaves its groups.
    async fn close(&self);
}

#[derive(Clone, Debug)]
pub enum BusMessage {
    /// These buckets are ours from now on (with the global one).
    Assigned(Vec<Bucket>),
    Revoked(Vec<Bucket>),
    Record(Arc<Record>),
}
