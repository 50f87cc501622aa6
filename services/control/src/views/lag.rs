//! Keeps the lag of the read models true while nothing is folded: a consumer that hangs sets no gauge.

use std::time::Duration;

use contract::ids::Position;
use contract::time::{Span, Timestamp};
use runtime::clock::Clock;
use store::Store;
use tokio::sync::watch;
use tokio::time::sleep;

use super::Progress;
use crate::metrics::ControlMetrics;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Never ends. What is folded in time sets its own lag.
pub async fn watch(
    store: &Store,
    clock: &dyn Clock,
    progress: watch::Receiver<Progress>,
    metrics: &ControlMetrics,
) {
    let mut behind = Behind::default();
    loop {
        sleep(LOOK_EVERY).await;
        let head = store.head().await.ok();
        let shown = progress.borrow().newest;
        if let Some(lag) = behind.look(head, shown, clock.now()) {
            metrics.event_lag.set(lag.millis() as f64 / 1000.0);
        }
    }
}

#[derive(Default)]
struct Behind {
    /// The oldest head that was seen and is not shown yet, and when it was seen first.
    missing: Option<(Position, Timestamp)>,
}

impl Behind {
    /// How long an event has been in the store that is not shown. A store that does not answer has no
    /// head to tell.
    fn look(&mut self, head: Option<Position>, shown: Position, now: Timestamp) -> Option<Span> {
        self.missing = self.missing.filter(|(missing, _)| shown < *missing);
        if self.missing.is_none() {
            self.missing = head.filter(|head| shown < *head).map(|head| (head, now));
        }
        self.missing.map(|(_, since)| now.since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: i64) -> Timestamp {
        Timestamp::from_secs(secs)
    }

    #[test]
    fn lag_grows_until_what_was_missing_is_shown() {
        let mut behind = Behind::default();
        assert_eq!(behind.look(Some(Position(5)), Position(5), at(0)), None);
        let mut lag =
            |head, shown, now| behind.look(Some(Position(head)), Position(shown), at(now));
        assert_eq!(lag(6, 5, 1), Some(Span::ZERO));
        assert_eq!(lag(9, 5, 31), Some(Span::from_secs(30)));
        assert_eq!(lag(9, 6, 32), Some(Span::ZERO), "another is missing now");
        assert_eq!(lag(9, 9, 33), None);
    }

    #[test]
    fn a_store_that_is_away_stops_no_lag_that_began_before() {
        let mut behind = Behind::default();
        behind.look(Some(Position(6)), Position(5), at(0));
        assert_eq!(
            behind.look(None, Position(5), at(40)),
            Some(Span::from_secs(40))
        );
    }
}
