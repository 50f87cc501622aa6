//! One client connection as its requests see it, and what interrupts a wait.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};

use crate::body::Upload;
use crate::forwarded::Peer;
use crate::guard::ConnectionState;
use crate::reply::Refusal;
use crate::worker::Worker;

/// One client connection. It carries one request at a time.
#[derive(Debug)]
pub struct ClientConnection {
    pub worker: Rc<Worker>,
    pub connection: Rc<ConnectionState>,
    pub peer: Peer,
    pub upload: Rc<Upload>,
}

/// What interrupted a wait.
pub enum Interrupt {
    Deadline,
    ClientLeft,
}

/// Why a request gets no response from the model.
pub enum RequestError {
    Refusal(Refusal),
    ClientLeft,
}

impl From<Refusal> for RequestError {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

impl Interrupt {
    /// Converts the interrupt to an error; a deadline becomes `refusal`.
    pub fn into_error(self, refusal: Refusal) -> RequestError {
        match self {
            Self::Deadline => RequestError::Refusal(refusal),
            Self::ClientLeft => RequestError::ClientLeft,
        }
    }
}

impl ClientConnection {
    pub fn new(worker: Rc<Worker>, connection: Rc<ConnectionState>, peer: Peer) -> Self {
        Self {
            worker,
            connection,
            peer,
            upload: Rc::default(),
        }
    }

    /// Polls for what may interrupt a wait: the phase's deadline, or the client disconnecting.
    pub fn poll_interrupt(&self, cx: &mut Context<'_>) -> Poll<Interrupt> {
        if self.connection.deadline.borrow_mut().poll(cx).is_ready() {
            return Poll::Ready(Interrupt::Deadline);
        }
        // Reading a body notices when its sender disconnects; a body blocked on the instance does
        // not.
        let disconnected = if self.upload.is_streaming() {
            self.connection.poll_disconnect_while_uploading(cx)
        } else {
            self.connection.poll_disconnect(cx)
        };
        disconnected.map(|()| Interrupt::ClientLeft)
    }

    /// Whether the current request's body is left behind if its response ends now, so that no other request can
    /// follow on the connection.
    pub fn leaves_body(&self) -> bool {
        // What has arrived of a body of known length is skipped.
        self.upload.is_incomplete()
            && (self.connection.is_receiving() || !self.upload.is_length_known())
    }

    /// Waits until `poll` is ready, the deadline passes or the client disconnects.
    pub async fn wait<T>(
        &self,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Result<T, Interrupt> {
        poll_fn(|cx| match poll(cx) {
            Poll::Ready(value) => Poll::Ready(Ok(value)),
            Poll::Pending => self.poll_interrupt(cx).map(Err),
        })
        .await
    }
}
