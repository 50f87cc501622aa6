//! Keeps the lag metric correct while nothing is folded: a hanging consumer would not update it.

use std::time::Duration;

use contract::ids::Position;
use contract::time::{Span, Timestamp};
use runtime::clock::Clock;
use store::Store;
use tokio::sync::watch;
use tokio::time::sleep;

use super::ViewsProgress;
use crate::metrics::ControlMetrics;

const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Updates the lag of events that are not shown yet; the consumer sets it for the others. Never returns.
pub async fn watch(
    store: &Store,
    clock: &dyn Clock,
    progress: watch::Receiver<ViewsProgress>,
    metrics: &ControlMetrics,
) {
    let mut tracker = LagTracker::default();
    loop {
        sleep(CHECK_INTERVAL).await;
        let head = store.head().await.ok();
        let shown = progress.borrow().newest;
        if let Some(lag) = tracker.update(head, shown, clock.now()) {
            metrics.event_lag.set(lag.millis() as f64 / 1000.0);
        }
    }
}

#[derive(Default)]
struct LagTracker {
    /// The oldest head seen that is not shown yet, and when it was first seen.
    oldest_missing: Option<(Position, Timestamp)>,
}

impl LagTracker {
    /// Returns how long an event in the store has not been shown. `head` is none if the store does not
    /// answer.
    fn update(&mut self, head: Option<Position>, shown: Position, now: Timestamp) -> Option<Span> {
        self.oldest_missing = self
            .oldest_missing
            .filter(|(oldest_missing, _)| shown < *oldest_missing);
        if self.oldest_missing.is_none() {
            self.oldest_missing = head.filter(|head| shown < *head).map(|head| (head, now));
        }
        self.oldest_missing.map(|(_, since)| now.since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: i64) -> Timestamp {
        Timestamp::from_secs(secs)
    }

    #[test]
    fn lag_grows_until_the_missing_event_is_shown() {
        let mut tracker = LagTracker::default();
        assert_eq!(tracker.update(Some(Position(5)), Position(5), at(0)), None);
        let mut lag =
            |head, shown, now| tracker.update(Some(Position(head)), Position(shown), at(now));
        assert_eq!(lag(6, 5, 1), Some(Span::ZERO));
        assert_eq!(lag(9, 5, 31), Some(Span::from_secs(30)));
        assert_eq!(lag(9, 6, 32), Some(Span::ZERO), "a newer event is missing");
        assert_eq!(lag(9, 9, 33), None);
    }

    #[test]
    fn lag_keeps_growing_while_the_store_is_unavailable() {
        let mut tracker = LagTracker::default();
        tracker.update(Some(Position(6)), Position(5), at(0));
        assert_eq!(
            tracker.update(None, Position(5), at(40)),
            Some(Span::from_secs(40))
        );
    }
}
