//! Frames that cannot wait for the end of the second: a request waits, and its deployment has no
//! instance.

use std::sync::atomic::{AtomicU64, Ordering};

use contract::Bucket;
use tokio::sync::Notify;

/// Says which buckets want a frame before the second is over.
#[derive(Debug, Default)]
pub struct Early {
    buckets: AtomicU64,
    notify: Notify,
}

impl Early {
    pub fn ask(&self, bucket: Bucket) {
        self.buckets.fetch_or(1 << bucket.0, Ordering::SeqCst);
        self.notify.notify_one();
    }

    /// Waits until a bucket is asked for.
    pub async fn asked(&self) -> Vec<Bucket> {
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
