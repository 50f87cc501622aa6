//! The published log, frames and routes, behind one port.
//!
//! A subscriber may miss records (it was slow, or the bus lost them) but never gets them out of order
//! within a bucket; a record's `prev` shows a hole, and the store fills it. Frames and routes may be
//! lost: frames are measurements, routes are published again.

mod local;

use std::sync::Arc;

use contract::frame::Frame;
use contract::ids::Bucket;
use contract::log::Record;
use contract::route::RouteUpdate;
use tokio::sync::mpsc;

pub use local::LocalBus;

/// Largest number of messages that wait for one subscriber. Past it, records and frames are
/// dropped (and counted): a slow consumer must not hold the log in memory.
pub const SUBSCRIBER_QUEUE_MAX: usize = 65_536;

pub trait Bus: Send + Sync + 'static {
    /// Records of one commit, in order of position. Called by the relay only.
    fn publish_records(&self, records: &[Arc<Record>]);
    /// The records of all buckets that this process is assigned, as member of a consumer group.
    fn subscribe_records(&self, group: &str) -> mpsc::Receiver<BusMessage>;

    fn publish_frame(&self, frame: Arc<Frame>);
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>>;

    fn publish_route(&self, update: Arc<RouteUpdate>);
    /// All current routes first, then every update.
    fn subscribe_routes(&self) -> mpsc::Receiver<Arc<RouteUpdate>>;

    /// Messages dropped because a subscriber was slow.
    fn dropped(&self) -> u64;
}

#[derive(Clone, Debug)]
pub enum BusMessage {
    /// These buckets are ours from now on (with the global one).
    Assigned(Vec<Bucket>),
    Revoked(Vec<Bucket>),
    Record(Arc<Record>),
}
