//! One client's connection as its requests see it, and what ends a wait before its time.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};

use crate::body::Upload;
use crate::guard::Shared;
use crate::reply::Refusal;
use crate::thread::Thread;

/// One client's connection. It carries one request at a time.
#[derive(Debug)]
pub struct Client {
    pub thread: Rc<Thread>,
    pub shared: Rc<Shared>,
    pub upload: Rc<Upload>,
}

/// What ended a wait before its time.
pub enum Stopped {
    Deadline,
    ClientLeft,
}

/// Why there is no answer of the model.
pub enum Failure {
    Refusal(Refusal),
    ClientLeft,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

impl Stopped {
    /// A wait whose deadline means this refusal.
    pub fn or(self, refusal: Refusal) -> Failure {
        match self {
            Self::Deadline => Failure::Refusal(refusal),
            Self::ClientLeft => Failure::ClientLeft,
        }
    }
}

impl Client {
    pub fn new(thread: Rc<Thread>, shared: Rc<Shared>) -> Self {
        Self {
            thread,
            shared,
            upload: Rc::default(),
        }
    }

    /// What may end a wait: the deadline of the phase, or the client.
    pub fn poll_stopped(&self, cx: &mut Context<'_>) -> Poll<Stopped> {
        if self.shared.deadline.borrow_mut().poll(cx).is_ready() {
            return Poll::Ready(Stopped::Deadline);
        }
        // A body that is read tells by itself when its sender leaves, one that has to wait does not.
        let left = if self.upload.is_running() {
            self.shared.poll_left_sending(cx)
        } else {
            self.shared.poll_left(cx)
        };
        left.map(|()| Stopped::ClientLeft)
    }

    /// Waits for something as long as it makes sense.
    pub async fn wait<T>(
        &self,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Result<T, Stopped> {
        poll_fn(|cx| match poll(cx) {
            Poll::Ready(value) => Poll::Ready(Ok(value)),
            Poll::Pending => self.poll_stopped(cx).map(Err),
        })
        .await
    }
}
