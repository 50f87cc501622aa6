//! Requests for frames before the end of the second: a request is queued, and its deployment has no
//! instance.

use std::sync::atomic::{AtomicU64, Ordering};

use contract::Bucket;
use tokio::sync::Notify;

/// Buckets that need a frame before the second is over.
#[derive(Debug, Default)]
pub struct EarlyFrames {
    buckets: AtomicU64,
    notify: Notify,
}

impl EarlyFrames {
    pub fn request(&self, bucket: Bucket) {
        self.buckets.fetch_or(1 << bucket.0, Ordering::SeqCst);
        self.notify.notify_one();
    }

    /// Waits until at least one bucket is requested.
    pub async fn requested(&self) -> Vec<Bucket> {
        loop {
            let buckets = self.buckets.swap(0, Ordering::SeqCst);
            if buckets != 0 {
                return Bucket::of_endpoints()
                    .filter(|bucket| buckets & (1 << bucket.0) != 0)
                    .collect();
            }
            self.notify.notified().await;
        }
    }
}
