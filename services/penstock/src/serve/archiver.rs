//! Moves old events of the log from the store into archives, once a day.
//!
//! Invariant: a failure affects nothing else: it is reported and retried.

use std::sync::Arc;
use std::time::Duration;

use contract::time::Span;
use runtime::archive::{ArchiveError, archive};
use runtime::clock::Clock;
use runtime::health::Component;
use runtime::ids::Ids;
use store::{SealLimits, Store};
use tokio_util::sync::CancellationToken;

/// How often to look for events that have become old enough.
const INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// How long to wait after a failure, or while another process archives.
const RETRY_AFTER: Duration = Duration::from_secs(600);

pub struct Archiver {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    /// Events older than this are moved.
    pub age: Span,
    /// Minimum number of events per file.
    pub events_min: u64,
    pub component: Component,
}

impl Archiver {
    pub async fn run(self, stop: CancellationToken) {
        self.component.ready();
        let rounds = async {
            loop {
                tokio::time::sleep(self.run_once().await).await;
            }
        };
        // Large, with what a seal holds.
        stop.run_until_cancelled(Box::pin(rounds)).await;
    }

    /// Seals what is due; returns how long to wait until the next round.
    async fn run_once(&self) -> Duration {
        let now = self.clock.now();
        let limits = SealLimits {
            older_than: Some(now - self.age),
            events_min: self.events_min,
            ..SealLimits::default()
        };
        let holder = self.ids.uid().to_string();
        let (warning, pause) = match archive(&self.store, &holder, &limits, now).await {
            Ok(_) => (None, INTERVAL),
            Err(ArchiveError::Busy) => (None, RETRY_AFTER),
            Err(ArchiveError::Store(error)) => {
                tracing::warn!(%error, "archiving failed");
                let warning = format!("old events stay in the store: {error}");
                (Some(warning), RETRY_AFTER)
            }
        };
        self.component.set_warning(warning);
        pause
    }
}

#[cfg(test)]
mod tests {
    use contract::events::{Empty, Event};
    use contract::log::{Actor, NewEvent};
    use contract::time::Timestamp;
    use runtime::health::HealthRegistry;
    use runtime::ids::SeededIds;
    use store::{ARCHIVE_LEASE, Append, Commit};

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
    async fn archiver(folder: &tempfile::TempDir, seconds: &[i64]) -> (Archiver, HealthRegistry) {
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
        let health = HealthRegistry::default();
        let archiver = Archiver {
            store,
            clock: Arc::new(FixedClock(Timestamp::from_secs(1_000))),
            ids: Arc::new(SeededIds::new(1)),
            age: AGE,
            events_min: 2,
            component: health.component(ARCHIVE_LEASE),
        };
        archiver.component.ready();
        (archiver, health)
    }

    #[tokio::test]
    async fn old_events_are_sealed_once_there_are_enough_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let (mut archiver, _) = archiver(&folder, &[900, 939, 940, 990]).await;
        archiver.events_min = 3;
        assert_eq!(archiver.run_once().await, INTERVAL);
        assert_eq!(archiver.store.archives().await.unwrap(), []);
        archiver.events_min = 2;
        archiver.run_once().await;
        let archives = archiver.store.archives().await.unwrap();
        assert_eq!(archives[0].last.0, 2);
    }

    #[tokio::test]
    async fn a_failure_to_seal_is_a_warning_not_an_outage_and_is_retried() {
        let folder = tempfile::tempdir().unwrap();
        let (archiver, health) = archiver(&folder, &[1, 2, 3]).await;
        let blocking_file = folder.path().join("archive");
        std::fs::write(&blocking_file, "").unwrap();
        assert_eq!(archiver.run_once().await, RETRY_AFTER);
        let warnings = health.warnings();
        assert!(warnings[0].contains("old events stay"), "{warnings:?}");
        assert_eq!(health.missing(), Vec::<String>::new());
        std::fs::remove_file(&blocking_file).unwrap();
        assert_eq!(archiver.run_once().await, INTERVAL);
        assert_eq!(health.warnings(), Vec::<String>::new());
    }
}
