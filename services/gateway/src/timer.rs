//! Time inside the gateway: a monotonic clock in whole microseconds, and deadlines that are free to
//! move. Postponing a deadline leaves its timer in place; the timer re-arms when it fires early. So
//! a connection with a timeout of 5 s touches the timer wheel once in 5 s, not twice per request.

use std::future::Future;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// The origin is a second before the first reading, so that no reading is 0.
static ORIGIN: LazyLock<std::time::Instant> = LazyLock::new(|| {
    let now = std::time::Instant::now();
    now.checked_sub(Duration::from_secs(1)).unwrap_or(now)
});

/// Microseconds of the monotonic clock since shortly before the process's first reading.
pub fn now_us() -> u64 {
    ORIGIN.elapsed().as_micros() as u64 + 1
}

fn instant_of(us: u64) -> Instant {
    Instant::from_std(*ORIGIN + Duration::from_micros(us))
}

/// The time at which a wait ends. Polled by a single task.
#[derive(Debug, Default)]
pub struct Deadline {
    at_us: Option<u64>,
    sleep: Option<Pin<Box<Sleep>>>,
    /// When the timer fires now.
    armed_us: u64,
    /// Whether the timer has the task's waker.
    registered: bool,
}

impl Deadline {
    pub fn set(&mut self, at_us: u64) {
        self.at_us = Some(at_us);
    }

    pub fn clear(&mut self) {
        self.at_us = None;
    }

    pub fn is_set(&self) -> bool {
        self.at_us.is_some()
    }

    /// Ready once the deadline has passed; pending if none is set.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.at_us {
            Some(at_us) => self.poll_until(cx, at_us),
            None => Poll::Pending,
        }
    }

    /// Ready once `at_us` has passed, whatever deadline is set.
    pub fn poll_until(&mut self, cx: &mut Context<'_>, at_us: u64) -> Poll<()> {
        let sleep = match &mut self.sleep {
            Some(sleep) if at_us >= self.armed_us => {
                if self.registered && !sleep.is_elapsed() {
                    return Poll::Pending;
                }
                sleep
            }
            Some(sleep) => {
                sleep.as_mut().reset(instant_of(at_us));
                self.armed_us = at_us;
                sleep
            }
            none => {
                self.armed_us = at_us;
                none.insert(Box::pin(tokio::time::sleep_until(instant_of(at_us))))
            }
        };
        self.registered = false;
        while sleep.as_mut().poll(cx).is_ready() {
            if now_us() >= at_us {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(instant_of(at_us));
            self.armed_us = at_us;
        }
        self.registered = true;
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn a_deadline_that_is_moved_in_either_direction_fires_at_its_new_time() {
        let mut deadline = Deadline::default();
        let start = now_us();
        deadline.set(start + 10_000_000);
        assert!(
            poll_fn(|cx| Poll::Ready(deadline.poll(cx)))
                .await
                .is_pending()
        );
        deadline.set(start + 5_000);
        poll_fn(|cx| deadline.poll(cx)).await;
        assert!(now_us() >= start + 5_000);
        deadline.set(now_us() + 5_000);
        assert!(
            poll_fn(|cx| Poll::Ready(deadline.poll(cx)))
                .await
                .is_pending()
        );
        let put_off = now_us() + 20_000;
        deadline.set(put_off);
        poll_fn(|cx| deadline.poll(cx)).await;
        assert!(now_us() >= put_off);
    }
}
