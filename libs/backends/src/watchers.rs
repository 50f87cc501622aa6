//! Subscribers to changes of a backend. A subscriber that is too slow is closed rather than given a
//! stream with gaps, so that it notices and lists everything again.

use tokio::sync::mpsc;

use crate::ObservedInstance;

/// Changes that may be queued for one watcher.
const WATCHER_QUEUE_MAX: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Watchers(Vec<mpsc::Sender<ObservedInstance>>);

impl Watchers {
    pub(crate) fn subscribe(&mut self) -> mpsc::Receiver<ObservedInstance> {
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE_MAX);
        self.0.push(sender);
        receiver
    }

    pub(crate) fn publish(&mut self, observed: &ObservedInstance) {
        self.0
            .retain(|watcher| watcher.try_send(observed.clone()).is_ok());
    }

    /// Closes all subscriptions.
    pub(crate) fn close(&mut self) {
        self.0.clear();
    }
}
