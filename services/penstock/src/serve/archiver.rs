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
pub const EVENTS_MIN: u64 = 10_000;

pub struct Archiver {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    /// Names this process among those that may hold the lease; never the same for two.
    pub holder: String,
    /// What is older is moved.
    pub age: Span,
    /// No file is made of fewer events.
    pub events_min: u64,
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
            let Some(pause) = lost.run_until_cancelled(self.round(&fence)).await else {
                return;
            };
            let pausing = lost.run_until_cancelled(tokio::time::sleep(pause));
            if pausing.await.is_none() {
                return;
            }
        }
    }

    /// Seals what there is, and says how long to wait before the next time.
    async fn round(&self, fence: &Fence) -> Duration {
        let sealed = self.seal(fence).await;
        let remark = sealed.as_ref().err().map(|error| {
            tracing::warn!(%error, "nothing more is archived for now");
            format!("old events stay in the store: {error}")
        });
        self.component.remark(remark);
        match sealed {
            Ok(()) => EVERY,
            Err(_) => AGAIN,
        }
    }

    async fn seal(&self, fence: &Fence) -> Result<(), StoreError> {
        let now = self.clock.now();
        let limits = SealLimits {
            older_than: Some(now - self.age),
            events_min: self.events_min,
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
        seal(&self.store, fence, &limits, now, say)
            .await
            .map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use contract::events::{Empty, Event};
    use contract::log::{Actor, NewEvent};
    use contract::time::Timestamp;
    use runtime::health::Health;
    use store::{Append, Commit};

    use super::*;

    const AGE: Span = Span::from_secs(60);

    #[derive(Debug)]
    struct At(Timestamp);

    impl Clock for At {
        fn now(&self) -> Timestamp {
            self.0
        }
    }

    /// One of a store with events at these seconds, at a time of 1,000 seconds.
    async fn archiver(folder: &tempfile::TempDir, seconds: &[i64]) -> (Archiver, Fence, Health) {
        let url = format!("sqlite:{}", folder.path().join("log.db").display());
        let store = Store::open(&url).await.unwrap();
        let event = |second: &i64| NewEvent {
            id: uuid::Uuid::from_u128(*second as u128),
            time: Timestamp::from_secs(*second),
            actor: Actor::service("test"),
            event: Event::EndpointDeletionRequested(Empty {}),
        };
        let append = Append {
            stream: "endpoint/default/iris".parse().unwrap(),
            expected_version: 0,
            events: seconds.iter().map(event).collect(),
        };
        let commit = Commit {
            appends: vec![append],
            ..Commit::default()
        };
        store.commit(commit).await.unwrap();
        let fence = store.acquire_lease(ARCHIVE_LEASE, "test", EVERY).await;
        let health = Health::default();
        let archiver = Archiver {
            store,
            clock: Arc::new(At(Timestamp::from_secs(1_000))),
            holder: "test".to_owned(),
            age: AGE,
            events_min: 2,
            component: health.component(ARCHIVE_LEASE),
        };
        archiver.component.ready();
        (archiver, fence.unwrap().unwrap(), health)
    }

    #[tokio::test]
    async fn what_is_older_is_sealed_once_there_is_enough_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let (mut archiver, fence, _) = archiver(&folder, &[900, 939, 940, 990]).await;
        archiver.events_min = 3;
        assert_eq!(archiver.round(&fence).await, EVERY);
        assert_eq!(archiver.store.archives().await.unwrap(), []);
        archiver.events_min = 2;
        archiver.round(&fence).await;
        let archives = archiver.store.archives().await.unwrap();
        assert_eq!(archives[0].last.0, 2);
    }

    #[tokio::test]
    async fn what_cannot_be_sealed_is_a_remark_and_no_trouble_and_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let (archiver, fence, health) = archiver(&folder, &[1, 2, 3]).await;
        let in_the_way = folder.path().join("archive");
        std::fs::write(&in_the_way, "").unwrap();
        assert_eq!(archiver.round(&fence).await, AGAIN);
        let remarks = health.remarks();
        assert!(remarks[0].contains("old events stay"), "{remarks:?}");
        assert_eq!(health.missing(), Vec::<String>::new());
        std::fs::remove_file(&in_the_way).unwrap();
        assert_eq!(archiver.round(&fence).await, EVERY);
        assert_eq!(health.remarks(), Vec::<String>::new());
    }
}
