//! The in-process bus. It retains no records or frames, and guarantees no more order than Kafka
//! does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use contract::frame::Frame;
use contract::ids::{Bucket, EndpointKey};
use contract::log::Record;
use contract::route::RouteUpdate;
use tokio::sync::mpsc::{self, error::TrySendError};

use crate::{Bus, BusError, BusMessage, RouteMessage, SUBSCRIBER_QUEUE_MAX, Subscription};

/// The in-process bus: records and frames go to current subscribers, and the newest route of each
/// endpoint is retained.
#[derive(Default)]
pub struct LocalBus {
    records: Mutex<Vec<mpsc::Sender<BusMessage>>>,
    frames: Mutex<Vec<mpsc::Sender<Arc<Frame>>>>,
    routes: Mutex<Routes>,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Routes {
    /// The newest update of each endpoint, as a compacted topic would keep it.
    newest: BTreeMap<EndpointKey, Arc<RouteUpdate>>,
    subscribers: Vec<mpsc::Sender<RouteMessage>>,
    /// Whether every endpoint of the log has been published: a new process knows no routes.
    is_complete: bool,
}

impl LocalBus {
    /// Creates an empty bus; clones of the `Arc` share it.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    fn send_all<T: Clone>(&self, subscribers: &mut Vec<mpsc::Sender<T>>, message: &T) {
        subscribers.retain(|subscriber| match subscriber.try_send(message.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(TrySendError::Closed(_)) => false,
        });
    }
}

/// A panic cannot leave these lists half modified, so a poisoned lock is still usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Bus for LocalBus {
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError> {
        let mut subscribers = lock(&self.records);
        for record in records {
            self.send_all(&mut subscribers, &BusMessage::Record(record.clone()));
        }
        Ok(())
    }

    /// With a single process, every group gets all buckets.
    fn subscribe_records(&self, _subscription: Subscription) -> mpsc::Receiver<BusMessage> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        // A new channel has room for its first message.
        let _ = sender.try_send(BusMessage::Assigned(Bucket::of_endpoints().collect()));
        lock(&self.records).push(sender);
        receiver
    }

    fn publish_frame(&self, frame: Arc<Frame>) {
        self.send_all(&mut lock(&self.frames), &frame);
    }

    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        lock(&self.frames).push(sender);
        receiver
    }

    fn publish_route(&self, update: Arc<RouteUpdate>) {
        let mut routes = lock(&self.routes);
        let stale = routes.newest.get(&update.endpoint).is_some_and(|newest| {
            (newest.revision, newest.members) > (update.revision, update.members)
        });
        if stale {
            return;
        }
        routes
            .newest
            .insert(update.endpoint.clone(), update.clone());
        self.send_all(&mut routes.subscribers, &RouteMessage::Update(update));
    }

    fn retains_routes(&self) -> bool {
        false
    }

    fn mark_routes_complete(&self) {
        let mut routes = lock(&self.routes);
        if !std::mem::replace(&mut routes.is_complete, true) {
            self.send_all(&mut routes.subscribers, &RouteMessage::CaughtUp);
        }
    }

    fn subscribe_routes(&self) -> mpsc::Receiver<RouteMessage> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE_MAX);
        let mut routes = lock(&self.routes);
        let current = routes.newest.values().cloned().map(RouteMessage::Update);
        let caught_up = routes.is_complete.then_some(RouteMessage::CaughtUp);
        for message in current.chain(caught_up) {
            if sender.try_send(message).is_err() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        routes.subscribers.push(sender);
        receiver
    }

    fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn problem(&self) -> Option<String> {
        None
    }

    async fn close(&self) {
        lock(&self.records).clear();
        lock(&self.frames).clear();
        lock(&self.routes).subscribers.clear();
    }
}
