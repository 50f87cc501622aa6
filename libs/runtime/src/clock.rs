//! The wall clock, as something that is passed in.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::time::{Span, Timestamp};

/// Tells the time of day. It may step forward and back, as the system's clock does; what must not
/// is measured by `Instant`.
pub trait Clock: Send + Sync + fmt::Debug + 'static {
    /// The present, to the millisecond, in UTC.
    fn now(&self) -> Timestamp;
}

/// The system's clock.
#[derive(Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn now(&self) -> Timestamp {
        // A clock before 1970 is broken beyond what we could mend; zero keeps order at least.
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Timestamp::from_millis(since_epoch.as_millis() as i64)
    }
}

/// A clock that is off by as many milliseconds as a file says, looked at again and again: for
/// tests of what a step of the clock does to a running process.
#[derive(Debug, Default)]
pub struct SteppedClock {
    offset_ms: Arc<AtomicI64>,
}

impl SteppedClock {
    /// How often the file is looked at.
    const EVERY: Duration = Duration::from_millis(20);

    /// Follows a file that holds a whole number of milliseconds, ahead of the system's clock or,
    /// below zero, behind it. Without a file, or with another text in it, the last number holds; 0
    /// at first. A thread looks at it until the clock is dropped.
    pub fn follow(file: PathBuf) -> Self {
        let offset_ms = Arc::new(AtomicI64::new(0));
        let followed = Arc::downgrade(&offset_ms);
        std::thread::spawn(move || {
            while let Some(offset_ms) = followed.upgrade() {
                let read = std::fs::read_to_string(&file).ok();
                if let Some(offset) = read.and_then(|text| text.trim().parse().ok()) {
                    offset_ms.store(offset, Ordering::SeqCst);
                }
                drop(offset_ms);
                std::thread::sleep(Self::EVERY);
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

/// A clock that stands still until it is moved. For tests and simulation.
#[derive(Debug)]
pub struct ManualClock {
    millis: AtomicI64,
}

impl ManualClock {
    /// Stands at `now`.
    pub fn new(now: Timestamp) -> Self {
        Self {
            millis: AtomicI64::new(now.millis()),
        }
    }

    /// Moves it to `now`, back too.
    pub fn set(&self, now: Timestamp) {
        self.millis.store(now.millis(), Ordering::SeqCst);
    }

    /// Moves it by a span.
    pub fn advance(&self, by: Span) {
        self.millis.fetch_add(by.millis() as i64, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.millis.load(Ordering::SeqCst))
    }
}
