//! Who watches a backend. A watcher that is too slow is closed rather than fed a stream with holes:
//! it notices, and reads the whole list again.

use tokio::sync::mpsc;

use crate::Observed;

/// Changes that may wait for one watcher.
const WATCHER_QUEUE_MAX: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Watchers(Vec<mpsc::Sender<Observed>>);

impl Watchers {
    pub(crate) fn subscribe(&mut self) -> mpsc::Receiver<Observed> {
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE_MAX);
        self.0.push(sender);
        receiver
    }

    pub(crate) fn publish(&mut self, observed: &Observed) {
        self.0
            .retain(|watcher| watcher.try_send(observed.clone()).is_ok());
    }

    /// Tells all watchers that nothing follows.
    pub(crate) fn close(&mut self) {
        self.0.clear();
    }
}
