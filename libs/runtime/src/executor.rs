//! Carrying out what events ask for, and answering by events: the second half of a service that acts on
//! something outside (instances, notifications, jobs).
//!
//! Level-triggered, like the consumer that drives it: what is to be done follows from the whole state, compared
//! anew after every change. So a request may reach its target more than once, and is one in result by its
//! generation; an answer is written once, because the next comparison waits until the log has brought it
//! back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use contract::ids::Position;
use contract::log::{NewEvent, Record, StreamName};
use store::{Append, Commit, Fence};
use tokio::task::JoinSet;

/// Something to be carried out.
pub trait Request: Send + 'static {
    /// What it is about.
    type Target: Clone + Ord + Send;
    /// Tells one request about the same target from another.
    type Mark: Copy + PartialEq + Send;

    /// What this one is about.
    fn target(&self) -> &Self::Target;
    /// What tells it from others about the same target, such as a generation.
    fn mark(&self) -> Self::Mark;
}

/// Which requests have been handed over, so that the same comparison does not hand one over twice.
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
    /// The request, unless it was the last one handed over about its target.
    pub fn dispatch(&mut self, request: R) -> Option<R> {
        let mark = request.mark();
        let before = self.newest.insert(request.target().clone(), mark);
        (before != Some(mark)).then_some(request)
    }

    /// It has failed, or its target is over: the same request may be handed over again.
    pub fn forget(&mut self, target: &R::Target) {
        self.newest.remove(target);
    }

    /// Nothing is known any more of what became of them; the targets.
    pub fn forget_all(&mut self) -> BTreeSet<R::Target> {
        std::mem::take(&mut self.newest).into_keys().collect()
    }
}

/// Requests that are being carried out, each in a task of its own.
pub struct Running<R, E> {
    tasks: JoinSet<(R, Result<(), E>)>,
}

impl<R: Send + 'static, E: Send + 'static> Default for Running<R, E> {
    fn default() -> Self {
        Self {
            tasks: JoinSet::new(),
        }
    }
}

impl<R: Send + 'static, E: Send + 'static> Running<R, E> {
    /// Begins one without waiting for it.
    pub fn begin<F>(&mut self, request: R, carry_out: impl FnOnce(&R) -> F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
    {
        let carrying_out = carry_out(&request);
        self.tasks
            .spawn(async move { (request, carrying_out.await) });
    }

    /// The next one that is over, and how it went; waits for ever while there is none. May be cancelled.
    pub async fn next(&mut self) -> (R, Result<(), E>) {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(over)) => return over,
                // A panic has been told of; the next comparison hands the request over again.
                Some(Err(error)) => tracing::error!(%error, "a request was not carried out"),
                None => return std::future::pending().await,
            }
        }
    }

    /// Waits until all are over, however they go.
    pub async fn finish(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// What has been answered in one stream for each subject, and has not come back through the log yet.
#[derive(Debug)]
pub struct Answers<S> {
    ahead: BTreeMap<S, Ahead>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    version: u64,
    position: Position,
}

impl<S> Default for Answers<S> {
    fn default() -> Self {
        Self {
            ahead: BTreeMap::new(),
        }
    }
}

impl<S: Clone + Ord> Answers<S> {
    /// Whether all that was answered has come back, with the subject applied up to `position`. Until then
    /// nothing more is to be answered.
    pub fn have_come_back(&mut self, subject: &S, position: Position) -> bool {
        let ahead = self.ahead.get(subject);
        let back = ahead.is_none_or(|ahead| position >= ahead.position);
        if back {
            self.ahead.remove(subject);
        }
        back
    }

    /// The version of the stream that is answered in, which is `applied` as far as it has come back.
    pub fn version(&self, subject: &S, applied: u64) -> u64 {
        let ahead = self.ahead.get(subject);
        ahead.map_or(applied, |ahead| ahead.version.max(applied))
    }

    /// These stand in the stream now.
    pub fn committed(&mut self, subject: &S, records: &[Arc<Record>]) {
        let ahead = self.ahead.entry(subject.clone()).or_default();
        for record in records {
            ahead.version = ahead.version.max(record.version);
            ahead.position = ahead.position.max(record.position);
        }
    }

    /// The subject is not dealt with any more.
    pub fn forget(&mut self, subject: &S) {
        self.ahead.remove(subject);
    }
}

/// One commit of answers, under the fence of whoever gives them.
pub fn answer(
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
    struct Ring {
        bell: &'static str,
        times: u64,
    }

    impl Request for Ring {
        type Target = &'static str;
        type Mark = u64;

        fn target(&self) -> &&'static str {
            &self.bell
        }

        fn mark(&self) -> u64 {
            self.times
        }
    }

    fn ring(bell: &'static str, times: u64) -> Ring {
        Ring { bell, times }
    }

    #[test]
    fn the_same_request_is_handed_over_once_until_it_has_failed() {
        let mut dispatched = Dispatched::default();
        assert!(dispatched.dispatch(ring("a", 1)).is_some());
        assert!(dispatched.dispatch(ring("a", 1)).is_none());
        assert!(dispatched.dispatch(ring("b", 1)).is_some());
        assert!(dispatched.dispatch(ring("a", 2)).is_some());
        dispatched.forget(&"a");
        assert!(dispatched.dispatch(ring("a", 2)).is_some());
        assert_eq!(dispatched.forget_all(), BTreeSet::from(["a", "b"]));
        assert!(dispatched.dispatch(ring("b", 1)).is_some());
    }

    #[tokio::test]
    async fn what_is_carried_out_comes_back_with_its_result() {
        let mut running = Running::<Ring, &str>::default();
        running.begin(ring("a", 1), |_| async { Err("cracked") });
        assert_eq!(running.next().await, (ring("a", 1), Err("cracked")));
    }

    #[tokio::test]
    async fn a_request_that_panics_ends_no_other() {
        let mut running = Running::<Ring, &str>::default();
        running.begin(ring("a", 1), |_| async { panic!("it fell") });
        running.begin(ring("b", 1), |_| async {
            tokio::task::yield_now().await;
            Ok(())
        });
        assert_eq!(running.next().await, (ring("b", 1), Ok(())));
    }
}
