//! A bus shared by several meters: every meter gets all frames, which are kept, and the test assigns the
//! buckets.

use std::sync::{Arc, Mutex};

use bus::{Bus, BusError, BusMessage, RouteMessage, Subscription};
use contract::frame::{Frame, FrameHeader};
use contract::ids::Bucket;
use contract::log::Record;
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use tokio::sync::mpsc;

#[derive(Default)]
pub struct SharedFrames {
    kept: Mutex<Vec<Arc<Frame>>>,
    subscribers: Mutex<Vec<mpsc::Sender<Arc<Frame>>>>,
}

impl SharedFrames {
    pub fn publish(&self, frame: Frame) {
        let frame = Arc::new(frame);
        let mut kept = self.kept.lock().unwrap();
        kept.push(frame.clone());
        for subscriber in self.subscribers.lock().unwrap().iter() {
            // The subscriber may have ended.
            let _ = subscriber.try_send(frame.clone());
        }
    }

    fn subscribe(&self, since: Option<Timestamp>) -> mpsc::Receiver<Arc<Frame>> {
        let (sender, receiver) = mpsc::channel(10_000);
        let kept = self.kept.lock().unwrap();
        for frame in kept.iter() {
            if since.is_some_and(|since| frame.start >= since) {
                sender.try_send(frame.clone()).unwrap();
            }
        }
        self.subscribers.lock().unwrap().push(sender);
        receiver
    }
}

/// The bus as seen by one of the meters.
pub struct MemberBus {
    frames: Arc<SharedFrames>,
    records: Mutex<Vec<mpsc::Sender<BusMessage>>>,
    pub unreadable: Mutex<Vec<FrameHeader>>,
}

impl MemberBus {
    pub fn of(frames: &Arc<SharedFrames>) -> Arc<Self> {
        Arc::new(Self {
            frames: frames.clone(),
            records: Mutex::default(),
            unreadable: Mutex::default(),
        })
    }

    pub fn assign(&self) {
        self.send(BusMessage::Assigned(Bucket::of_endpoints().collect()));
    }

    pub fn revoke(&self) {
        self.send(BusMessage::Revoked(Bucket::of_endpoints().collect()));
    }

    fn send(&self, message: BusMessage) {
        for subscriber in self.records.lock().unwrap().iter() {
            subscriber.try_send(message.clone()).unwrap();
        }
    }
}

#[async_trait::async_trait]
impl Bus for MemberBus {
    async fn publish_records(&self, _records: &[Arc<Record>]) -> Result<(), BusError> {
        Ok(())
    }
    fn subscribe_records(&self, _subscription: Subscription) -> mpsc::Receiver<BusMessage> {
        let (sender, receiver) = mpsc::channel(100);
        self.records.lock().unwrap().push(sender);
        receiver
    }
    fn publish_frame(&self, frame: Arc<Frame>) {
        self.frames.publish((*frame).clone());
    }
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>> {
        self.frames.subscribe(None)
    }
    fn subscribe_frames_since(&self, since: Timestamp) -> Option<mpsc::Receiver<Arc<Frame>>> {
        Some(self.frames.subscribe(Some(since)))
    }
    fn take_unreadable_frames(&self) -> Vec<FrameHeader> {
        std::mem::take(&mut self.unreadable.lock().unwrap())
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
