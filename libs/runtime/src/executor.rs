//! Execution of requests made by events, and recording their outcomes as events: the second half of
//! a service that acts on something external (instances, notifications, jobs).
//!
//! Level-triggered, like the consumer that drives it: what to do follows from the full state,
//! compared again after every change. So a request may reach its target more than once, but has one
//! effect thanks to its generation; an outcome is recorded once, because the next comparison waits
//! until the log has returned it.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use contract::ids::Position;
use contract::log::{NewEvent, Record, StreamName};
use futures::FutureExt;
use store::{Append, Commit, Fence};
use tokio::task::JoinSet;

use crate::parking::panic_message;

/// A request to be executed.
pub trait Request: Send + 'static {
    /// What the request is about.
    type Target: Clone + Ord + Send;
    /// Distinguishes requests about the same target.
    type Mark: Copy + PartialEq + Send;

    /// What the request is about.
    fn target(&self) -> &Self::Target;
    /// Distinguishes the request from others about the same target, such as a generation.
    fn mark(&self) -> Self::Mark;
}

/// The requests that have been dispatched, so that a repeated comparison does not dispatch one
/// twice.
#[derive(Debug)]
pub struct Dispatched<R: Request> {
    newest: BTreeMap<R::Target, R::Mark>,
}

impl<R: Request> Default for Dispatched<R> {
    fn default() -> Self {
        Self {
            newest: BTreeMap::new(),
        }
    }
}

impl<R: Request> Dispatched<R> {
    /// Returns the request, unless it was the last one dispatched for its target.
    pub fn dispatch(&mut self, request: R) -> Option<R> {
        let mark = request.mark();
        let before = self.newest.insert(request.target().clone(), mark);
        (before != Some(mark)).then_some(request)
    }

    /// Allows the same request to be dispatched again, after it failed or its target is gone.
    pub fn forget(&mut self, target: &R::Target) {
        self.newest.remove(target);
    }

    /// Forgets all requests, when their outcomes are unknown; returns the targets.
    pub fn forget_all(&mut self) -> BTreeSet<R::Target> {
        std::mem::take(&mut self.newest).into_keys().collect()
    }
}

/// Why a request was not carried out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecutionError<E> {
    /// The error that it returned.
    #[error(transparent)]
    Failed(E),
    /// It panicked, with this message.
    #[error("it panicked: {0}")]
    Panicked(String),
}

/// Requests in progress, each in a task of its own.
pub struct RunningRequests<R, E> {
    tasks: JoinSet<(R, Result<(), ExecutionError<E>>)>,
}

impl<R: Send + 'static, E: Send + 'static> Default for RunningRequests<R, E> {
    fn default() -> Self {
        Self {
            tasks: JoinSet::new(),
        }
    }
}

impl<R: Send + 'static, E: Send + 'static> RunningRequests<R, E> {
    /// Starts a request without waiting for it.
    pub fn begin<F>(&mut self, request: R, execute: impl FnOnce(&R) -> F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
    {
        let task = AssertUnwindSafe(execute(&request)).catch_unwind();
        self.tasks.spawn(async move {
            let result = match task.await {
                Ok(result) => result.map_err(ExecutionError::Failed),
                Err(panic) => Err(ExecutionError::Panicked(panic_message(panic.as_ref()))),
            };
            (request, result)
        });
    }

    /// Returns the next finished request with its result; pends forever while there is none. Cancel
    /// safe.
    pub async fn next(&mut self) -> (R, Result<(), ExecutionError<E>>) {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(finished)) => return finished,
                // Only at shutdown: panics are results.
                Some(Err(error)) => tracing::error!(%error, "a request task failed"),
                None => return std::future::pending().await,
            }
        }
    }

    /// Waits until all are finished, whatever their results.
    pub async fn finish(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// The events written to one stream per subject that have not been read back from the log yet.
#[derive(Debug)]
pub struct UnconfirmedWrites<S> {
    unconfirmed: BTreeMap<S, Unconfirmed>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Unconfirmed {
    version: u64,
    position: Position,
}

impl<S> Default for UnconfirmedWrites<S> {
    fn default() -> Self {
        Self {
            unconfirmed: BTreeMap::new(),
        }
    }
}

impl<S: Clone + Ord> UnconfirmedWrites<S> {
    /// Whether everything written has been read back, given that the subject has been applied up to
    /// `position`. Until then nothing more may be written.
    pub fn are_confirmed(&mut self, subject: &S, position: Position) -> bool {
        let unconfirmed = self.unconfirmed.get(subject);
        let is_confirmed = unconfirmed.is_none_or(|unconfirmed| position >= unconfirmed.position);
        if is_confirmed {
            self.unconfirmed.remove(subject);
        }
        is_confirmed
    }

    /// The version of the stream, which is `applied` unless later events have not been read back
    /// yet.
    pub fn version(&self, subject: &S, applied: u64) -> u64 {
        let unconfirmed = self.unconfirmed.get(subject);
        unconfirmed.map_or(applied, |unconfirmed| unconfirmed.version.max(applied))
    }

    /// Records that these were written to the stream.
    pub fn committed(&mut self, subject: &S, records: &[Arc<Record>]) {
        let unconfirmed = self.unconfirmed.entry(subject.clone()).or_default();
        for record in records {
            unconfirmed.version = unconfirmed.version.max(record.version);
            unconfirmed.position = unconfirmed.position.max(record.position);
        }
    }

    /// Forgets a subject that is no longer handled.
    pub fn forget(&mut self, subject: &S) {
        self.unconfirmed.remove(subject);
    }
}

/// Builds a commit of outcomes under the writer's fence.
pub fn outcome_commit(
    stream: StreamName,
    expected_version: u64,
    events: Vec<NewEvent>,
    fence: Fence,
) -> Commit {
    Commit {
        appends: vec![Append {
            stream,
            expected_version,
            events,
        }],
        fence: Some(fence),
        ..Commit::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct TestRequest {
        target: &'static str,
        version: u64,
    }

    impl Request for TestRequest {
        type Target = &'static str;
        type Mark = u64;

        fn target(&self) -> &&'static str {
            &self.target
        }

        fn mark(&self) -> u64 {
            self.version
        }
    }

    fn request(target: &'static str, version: u64) -> TestRequest {
        TestRequest { target, version }
    }

    #[test]
    fn a_request_is_dispatched_once_until_it_has_failed() {
        let mut dispatched = Dispatched::default();
        assert!(dispatched.dispatch(request("a", 1)).is_some());
        assert!(dispatched.dispatch(request("a", 1)).is_none());
        assert!(dispatched.dispatch(request("b", 1)).is_some());
        assert!(dispatched.dispatch(request("a", 2)).is_some());
        dispatched.forget(&"a");
        assert!(dispatched.dispatch(request("a", 2)).is_some());
        assert_eq!(dispatched.forget_all(), BTreeSet::from(["a", "b"]));
        assert!(dispatched.dispatch(request("b", 1)).is_some());
    }

    #[tokio::test]
    async fn a_finished_request_is_returned_with_its_result() {
        let mut running = RunningRequests::<TestRequest, &str>::default();
        running.begin(request("a", 1), |_| async { Err("failed") });
        let failed = Err(ExecutionError::Failed("failed"));
        assert_eq!(running.next().await, (request("a", 1), failed));
    }

    #[tokio::test]
    async fn a_request_that_panics_is_returned_too_so_that_it_can_be_repeated() {
        let mut running = RunningRequests::<TestRequest, &str>::default();
        running.begin(request("a", 1), |_| async { panic!("test") });
        let panicked = Err(ExecutionError::Panicked("test".to_owned()));
        assert_eq!(running.next().await, (request("a", 1), panicked));
        running.begin(request("b", 1), |_| async { Ok(()) });
        assert_eq!(running.next().await, (request("b", 1), Ok(())));
    }
}
