//! Coalesces wake-ups within one task. A client connection, its request and the connection to an
//! instance are polled by one task, and these parts wake each other. A wake-up during a poll only
//! means that there is more to do, so it is recorded and the poll repeated, instead of sending the
//! whole task to the back of the run queue.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Repeated polls before yielding to other tasks on the thread.
const POLLS_MAX: usize = 8;

static NEXT_THREAD_ID: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Identifies this thread.
    static THREAD_ID: usize = NEXT_THREAD_ID.fetch_add(1, Ordering::Relaxed);
}

fn thread_id() -> usize {
    THREAD_ID.with(|thread_id| *thread_id)
}

/// A waker between a task and what it polls, all on one thread. Only that thread reads the flags,
/// so relaxed ordering suffices; a wake-up from another thread goes straight to the task.
#[derive(Debug)]
pub struct WakeCoalescer {
    inner: Arc<Inner>,
    waker: Waker,
}

#[derive(Debug)]
struct Inner {
    thread_id: usize,
    task: Mutex<Option<Waker>>,
    is_polling: AtomicBool,
    is_woken: AtomicBool,
}

impl Default for WakeCoalescer {
    fn default() -> Self {
        let inner = Arc::new(Inner {
            thread_id: thread_id(),
            task: Mutex::default(),
            is_polling: AtomicBool::default(),
            is_woken: AtomicBool::default(),
        });
        Self {
            waker: inner.clone().into(),
            inner,
        }
    }
}

impl WakeCoalescer {
    /// Sends wake-ups from outside to this task from now on.
    pub fn attach(&self, task: &Waker) {
        let mut current = self
            .inner
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !current
            .as_ref()
            .is_some_and(|current| current.will_wake(task))
        {
            *current = Some(task.clone());
        }
    }

    /// Whether there was a wake-up since the last poll began.
    pub fn is_woken(&self) -> bool {
        self.inner.is_woken.load(Ordering::Relaxed)
    }

    /// Polls until nothing inside has more to do.
    pub fn poll<T>(&self, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let cx = &mut Context::from_waker(&self.waker);
        self.inner.is_polling.store(true, Ordering::Relaxed);
        let mut polled = Poll::Pending;
        // Bounded: what yields after using up its budget wakes itself each time.
        for _ in 0..POLLS_MAX {
            self.inner.is_woken.store(false, Ordering::Relaxed);
            polled = poll(cx);
            if polled.is_ready() || !self.is_woken() {
                break;
            }
        }
        self.inner.is_polling.store(false, Ordering::Relaxed);
        if polled.is_pending() && self.is_woken() {
            self.inner.wake_task();
        }
        polled
    }

    /// Restores what `is_woken` returned before something whose wake-ups are to be ignored.
    pub fn restore_woken(&self, woken: bool) {
        self.inner.is_woken.store(woken, Ordering::Relaxed);
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
        if self.thread_id != thread_id() {
            return self.wake_task();
        }
        self.is_woken.store(true, Ordering::Relaxed);
        if !self.is_polling.load(Ordering::Relaxed) {
            self.wake_task();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct WakeCount(AtomicUsize);

    impl Wake for WakeCount {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_wake_up_from_inside_repeats_the_poll_and_one_from_outside_wakes_the_task() {
        let count = Arc::new(WakeCount::default());
        let wakes = WakeCoalescer::default();
        wakes.attach(&count.clone().into());
        let mut polls = 0;
        let mut kept = None;
        let polled: Poll<()> = wakes.poll(|cx| {
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
        assert!(wakes.is_woken());
    }

    #[test]
    fn a_wake_up_from_another_thread_reaches_the_task_even_during_a_poll() {
        let count = Arc::new(WakeCount::default());
        let wakes = WakeCoalescer::default();
        wakes.attach(&count.clone().into());
        let polled: Poll<()> = wakes.poll(|cx| {
            let waker = cx.waker().clone();
            std::thread::spawn(move || waker.wake()).join().unwrap();
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_task_that_always_wakes_itself_still_yields() {
        let count = Arc::new(WakeCount::default());
        let wakes = WakeCoalescer::default();
        wakes.attach(&count.clone().into());
        let polled: Poll<()> = wakes.poll(|cx| {
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_wake_up_that_is_undone_does_not_repeat_the_poll() {
        let wakes = WakeCoalescer::default();
        let mut polls = 0;
        let polled: Poll<()> = wakes.poll(|cx| {
            polls += 1;
            let woken = wakes.is_woken();
            cx.waker().wake_by_ref();
            wakes.restore_woken(woken);
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(polls, 1);
    }
}
