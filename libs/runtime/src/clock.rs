//! The wall clock, as an argument.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::time::{Span, Timestamp};

/// A source of the time of day. It may step forward and back, as the system clock does; monotonic
/// durations are measured by `Instant`.
pub trait Clock: Send + Sync + fmt::Debug + 'static {
    /// The current time in UTC, to the millisecond.
    fn now(&self) -> Timestamp;
}

/// The system clock.
#[derive(Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn now(&self) -> Timestamp {
        // A clock before 1970 is beyond repair; zero at least keeps order.
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Timestamp::from_millis(since_epoch.as_millis() as i64)
    }
}

/// A clock with an offset in milliseconds that is read from a file, again and again: for tests of
/// how a running process handles clock steps.
#[derive(Debug, Default)]
pub struct SteppedClock {
    offset_ms: Arc<AtomicI64>,
}

impl SteppedClock {
    /// How often the file is read.
    const POLL_INTERVAL: Duration = Duration::from_millis(20);

    /// Follows a file that holds an integer of milliseconds to add to the system clock; negative
    /// values put it behind. If the file is missing or invalid, the last value applies; initially
    /// 0. A thread reads it until the clock is dropped.
    pub fn follow(file: PathBuf) -> Self {
        let offset_ms = Arc::new(AtomicI64::new(0));
        let followed = Arc::downgrade(&offset_ms);
        std::thread::spawn(move || {
            while let Some(offset_ms) = followed.upgrade() {
                let text = std::fs::read_to_string(&file).ok();
                if let Some(offset) = text.and_then(|text| text.trim().parse().ok()) {
                    offset_ms.store(offset, Ordering::SeqCst);
                }
                drop(offset_ms);
                std::thread::sleep(Self::POLL_INTERVAL);
            }
        });
        Self { offset_ms }
    }
}

impl Clock for SteppedClock {
    fn now(&self) -> Timestamp {
        let offset = self.offset_ms.load(Ordering::SeqCst);
        Timestamp::from_millis(SystemClock.now().millis().saturating_add(offset))
    }
}

/// A clock that moves only when set. For tests and simulation.
#[derive(Debug)]
pub struct ManualClock {
    millis: AtomicI64,
}

impl ManualClock {
    /// Creates a clock that shows `now`.
    pub fn new(now: Timestamp) -> Self {
        Self {
            millis: AtomicI64::new(now.millis()),
        }
    }

    /// Sets the time, which may go back.
    pub fn set(&self, now: Timestamp) {
        self.millis.store(now.millis(), Ordering::SeqCst);
    }

    /// Advances the time by a span.
    pub fn advance(&self, by: Span) {
        self.millis.fetch_add(by.millis() as i64, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.millis.load(Ordering::SeqCst))
    }
}
