//! Wake-ups inside one task. A client's connection, its request and the connection to an instance
//! are polled by one task, and their parts talk by waking each other. A wake-up from inside a poll
//! only means that there is more to do, so it is noted and the poll repeated, instead of sending
//! the whole task to the end of the queue once more.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Turns in one poll before the rest of the thread gets its own.
const TURNS_MAX: usize = 8;

static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Tells this thread from all others.
    static HERE: usize = THREADS.fetch_add(1, Ordering::Relaxed);
}

fn here() -> usize {
    HERE.with(|here| *here)
}

/// A waker that stands between a task and what it polls, all on one thread. Only that thread looks
/// at the flags, so they need no order; a wake-up from another thread goes straight to the task.
#[derive(Debug)]
pub struct Relay {
    inner: Arc<Inner>,
    waker: Waker,
}

#[derive(Debug)]
struct Inner {
    home: usize,
    task: Mutex<Option<Waker>>,
    inside: AtomicBool,
    again: AtomicBool,
}

impl Default for Relay {
    fn default() -> Self {
        let inner = Arc::new(Inner {
            home: here(),
            task: Mutex::default(),
            inside: AtomicBool::default(),
            again: AtomicBool::default(),
        });
        Self {
            waker: inner.clone().into(),
            inner,
        }
    }
}

impl Relay {
    /// Wake-ups from outside go to this task from now on.
    pub fn attach(&self, task: &Waker) {
        let mut known = self
            .inner
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !known.as_ref().is_some_and(|known| known.will_wake(task)) {
            *known = Some(task.clone());
        }
    }

    /// Whether anything has woken it since the last poll came to rest.
    pub fn is_woken(&self) -> bool {
        self.inner.again.load(Ordering::Relaxed)
    }

    /// Polls until nothing inside has more to do.
    pub fn poll<T>(&self, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let cx = &mut Context::from_waker(&self.waker);
        self.inner.inside.store(true, Ordering::Relaxed);
        let mut polled = Poll::Pending;
        // Bounded: what has used up its turn asks for another each time.
        for _ in 0..TURNS_MAX {
            self.inner.again.store(false, Ordering::Relaxed);
            polled = poll(cx);
            if polled.is_ready() || !self.is_woken() {
                break;
            }
        }
        self.inner.inside.store(false, Ordering::Relaxed);
        if polled.is_pending() && self.is_woken() {
            self.inner.wake_task();
        }
        polled
    }

    /// Puts back what `is_woken` said before something whose wake-ups mean nothing.
    pub fn restore(&self, woken: bool) {
        self.inner.again.store(woken, Ordering::Relaxed);
    }
}

impl Inner {
    fn wake_task(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = &*task {
            task.wake_by_ref();
        }
    }
}

impl Wake for Inner {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.home != here() {
            return self.wake_task();
        }
        self.again.store(true, Ordering::Relaxed);
        if !self.inside.load(Ordering::Relaxed) {
            self.wake_task();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_wake_up_from_inside_repeats_the_poll_and_one_from_outside_wakes_the_task() {
        let count = Arc::new(Count::default());
        let relay = Relay::default();
        relay.attach(&count.clone().into());
        let mut polls = 0;
        let mut kept = None;
        let polled: Poll<()> = relay.poll(|cx| {
            polls += 1;
            kept = Some(cx.waker().clone());
            if polls < 3 {
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!((polls, count.0.load(Ordering::SeqCst)), (3, 0));
        kept.unwrap().wake();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(relay.is_woken());
    }

    #[test]
    fn a_wake_up_from_another_thread_reaches_the_task_even_in_the_middle_of_a_poll() {
        let count = Arc::new(Count::default());
        let relay = Relay::default();
        relay.attach(&count.clone().into());
        let polled: Poll<()> = relay.poll(|cx| {
            let waker = cx.waker().clone();
            std::thread::spawn(move || waker.wake()).join().unwrap();
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn who_never_rests_gives_the_others_their_turn() {
        let count = Arc::new(Count::default());
        let relay = Relay::default();
        relay.attach(&count.clone().into());
        let polled: Poll<()> = relay.poll(|cx| {
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_wake_up_that_is_taken_back_does_not_repeat_the_poll() {
        let relay = Relay::default();
        let mut polls = 0;
        let polled: Poll<()> = relay.poll(|cx| {
            polls += 1;
            let woken = relay.is_woken();
            cx.waker().wake_by_ref();
            relay.restore(woken);
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(polls, 1);
    }
}
