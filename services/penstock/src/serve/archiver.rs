//! Moves what is old of the log from the store into archives, once a day.
//!
//! Invariant: one process at a time does it, under a lease that goes with every commit. That it fails
//! hinders nobody: it is said, and tried again.

use std::sync::Arc;
use std::time::Duration;

use contract::time::Span;
use runtime::clock::Clock;
use runtime::health::Component;
use runtime::lease;
use store::{ARCHIVE_LEASE, Fence, SealLimits, SealedFile, Store, StoreError, seal};
use tokio_util::sync::CancellationToken;

/// How often it is looked for what has become old.
const EVERY: Duration = Duration::from_secs(24 * 3600);

/// How long after something went wrong it is tried again.
const AGAIN: Duration = Duration::from_secs(600);

/// Fewer events wait for more, so that a quiet installation does not get a file a day.
const EVENTS_MIN: u64 = 10_000;

pub struct Archiver {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    /// Names this process among those that may hold the lease; never the same for two.
    pub holder: String,
    /// What is older is moved.
    pub age: Span,
    pub component: Component,
}

impl Archiver {
    pub async fn run(self, stop: CancellationToken) {
        self.component.ready();
        let (store, holder) = (self.store.clone(), self.holder.clone());
        lease::hold(&store, ARCHIVE_LEASE, &holder, &stop, |fence, lost| {
            Box::pin(self.hold(fence, lost))
        })
        .await;
    }

    /// One tenure.
    async fn hold(&self, fence: Fence, lost: CancellationToken) {
        loop {
            let Some(done) = lost.run_until_cancelled(self.seal(&fence)).await else {
                return;
            };
            let pause = match done {
                Ok(()) => EVERY,
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::warn!(%error, "nothing more is archived for now");
                    let remark = format!("old events stay in the store: {error}");
                    self.component.remark(Some(remark));
                    AGAIN
                }
            };
            let pausing = lost.run_until_cancelled(tokio::time::sleep(pause));
            if pausing.await.is_none() {
                return;
            }
        }
    }

    async fn seal(&self, fence: &Fence) -> Result<(), StoreError> {
        let now = self.clock.now();
        let limits = SealLimits {
            older_than: Some(now - self.age),
            events_min: EVENTS_MIN,
            ..SealLimits::default()
        };
        let say = |file: &SealedFile| {
            tracing::info!(
                file = file.archive.file,
                events = file.archive.events,
                bytes = file.archive.bytes,
                "archived"
            );
        };
        seal(&self.store, fence, &limits, now, say).await?;
        self.component.remark(None);
        Ok(())
    }
}
