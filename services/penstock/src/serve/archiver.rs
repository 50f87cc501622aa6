//! Moves old events of the log from the store into archives, once a day.
//!
//! Invariant: one process at a time does it, under a lease that fences every commit. A failure affects
//! nothing else: it is reported and retried.

use std::sync::Arc;
use std::time::Duration;

use contract::time::Span;
use runtime::clock::Clock;
use runtime::health::Component;
use runtime::lease;
use store::{ARCHIVE_LEASE, Fence, SealLimits, SealedFile, Store, StoreError, seal};
use tokio_util::sync::CancellationToken;

/// How often to look for events that have become old enough.
const INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// How long to wait after a failure.
const RETRY_AFTER: Duration = Duration::from_secs(600);

pub struct Archiver {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    /// The name of this process as a lease holder; unique.
    pub holder: String,
    /// Events older than this are moved.
    pub age: Span,
    /// Minimum number of events per file.
    pub events_min: u64,
    pub component: Component,
}

impl Archiver {
    pub async fn run(self, stop: CancellationToken) {
        self.component.ready();
        let (store, holder) = (self.store.clone(), self.holder.clone());
        lease::hold(&store, ARCHIVE_LEASE, &holder, &stop, |fence, lost| {
            Box::pin(self.archive_while_held(fence, lost))
        })
        .await;
    }

    /// Archives for as long as the lease is held.
    async fn archive_while_held(&self, fence: Fence, lost: CancellationToken) {
        loop {
            let Some(pause) = lost.run_until_cancelled(self.run_once(&fence)).await else {
                return;
            };
            let pausing = lost.run_until_cancelled(tokio::time::sleep(pause));
            if pausing.await.is_none() {
                return;
            }
        }
    }

    /// Seals what is due; returns how long to wait until the next round.
    async fn run_once(&self, fence: &Fence) -> Duration {
        let sealed = self.seal(fence).await;
        let warning = sealed.as_ref().err().map(|error| {
            tracing::warn!(%error, "archiving failed");
            format!("old events stay in the store: {error}")
        });
        self.component.set_warning(warning);
        match sealed {
            Ok(()) => INTERVAL,
            Err(_) => RETRY_AFTER,
        }
    }

    async fn seal(&self, fence: &Fence) -> Result<(), StoreError> {
        let now = self.clock.now();
        let limits = SealLimits {
            older_than: Some(now - self.age),
            events_min: self.events_min,
            ..SealLimits::default()
        };
        let log_file = |file: &SealedFile| {
            tracing::info!(
                file = file.archive.file,
                events = file.archive.events,
                bytes = file.archive.bytes,
                "archived"
            );
        };
        seal(&self.store, fence, &limits, now, log_file)
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
    struct FixedClock(Timestamp);

    impl Clock for FixedClock {
        fn now(&self) -> Timestamp {
            self.0
        }
    }

    /// An archiver at second 1,000, of a store with events at these seconds.
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
        let fence = store.acquire_lease(ARCHIVE_LEASE, "test", INTERVAL).await;
        let health = Health::default();
        let archiver = Archiver {
            store,
            clock: Arc::new(FixedClock(Timestamp::from_secs(1_000))),
            holder: "test".to_owned(),
            age: AGE,
            events_min: 2,
            component: health.component(ARCHIVE_LEASE),
        };
        archiver.component.ready();
        (archiver, fence.unwrap().unwrap(), health)
    }

    #[tokio::test]
    async fn old_events_are_sealed_once_there_are_enough_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let (mut archiver, fence, _) = archiver(&folder, &[900, 939, 940, 990]).await;
        archiver.events_min = 3;
        assert_eq!(archiver.run_once(&fence).await, INTERVAL);
        assert_eq!(archiver.store.archives().await.unwrap(), []);
        archiver.events_min = 2;
        archiver.run_once(&fence).await;
        let archives = archiver.store.archives().await.unwrap();
        assert_eq!(archives[0].last.0, 2);
    }

    #[tokio::test]
    async fn a_failure_to_seal_is_a_warning_not_an_outage_and_is_retried() {
        let folder = tempfile::tempdir().unwrap();
        let (archiver, fence, health) = archiver(&folder, &[1, 2, 3]).await;
        let blocking_file = folder.path().join("archive");
        std::fs::write(&blocking_file, "").unwrap();
        assert_eq!(archiver.run_once(&fence).await, RETRY_AFTER);
        let warnings = health.warnings();
        assert!(warnings[0].contains("old events stay"), "{warnings:?}");
        assert_eq!(health.missing(), Vec::<String>::new());
        std::fs::remove_file(&blocking_file).unwrap();
        assert_eq!(archiver.run_once(&fence).await, INTERVAL);
        assert_eq!(health.warnings(), Vec::<String>::new());
    }
}
