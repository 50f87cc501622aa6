//! The endpoints that are held, and what is made of one of them.

use std::collections::{BTreeMap, BTreeSet};

use contract::events::{ClockStepped, Event};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::StreamName;
use contract::time::Timestamp;
use store::Append;

use super::{CLOCK_STEP, Deps, Reconciler};
use crate::parking::survive;

/// One endpoint, with what the loop itself needs to know of it.
#[derive(Default)]
pub(super) struct Entry<S> {
    pub(super) state: S,
    /// Version of the stream that we write.
    pub(super) version: u64,
    /// Position of the last record taken in.
    pub(super) position: Position,
    /// Greatest time recorded; our `now` never lies before it.
    pub(super) recorded: Timestamp,
    /// Our own last commit; until it has come back, the state is behind and is not evaluated.
    pub(super) awaiting: Position,
    /// A commit is under way, and whether it was due again meanwhile.
    pub(super) writing: Option<DueAgain>,
    /// After the store refused a commit for a reason of its own: not before this time.
    pub(super) retry_at: Option<Timestamp>,
}

/// Entries by bucket, since that is how they become due and go. Boxed, since a map moves its values
/// about as it grows, and these are large.
pub(super) struct Entries<S> {
    pub(super) buckets: BTreeMap<Bucket, BTreeMap<EndpointKey, Box<Entry<S>>>>,
}

impl<S: Default> Entries<S> {
    pub(super) fn get_mut(&mut self, key: &EndpointKey) -> Option<&mut Entry<S>> {
        let entry = self.buckets.get_mut(&key.bucket())?.get_mut(key)?;
        Some(entry)
    }

    pub(super) fn get_or_new(&mut self, key: &EndpointKey) -> &mut Entry<S> {
        let of_bucket = self.buckets.entry(key.bucket()).or_default();
        of_bucket.entry(key.clone()).or_default()
    }

    pub(super) fn remove(&mut self, key: &EndpointKey) {
        if let Some(of_bucket) = self.buckets.get_mut(&key.bucket()) {
            of_bucket.remove(key);
        }
    }

    pub(super) fn remove_all(&mut self, bucket: Bucket) {
        self.buckets.remove(&bucket);
    }
}

/// What is to be evaluated of one bucket.
pub(super) enum Due {
    /// All that there is: told without naming each, for that is what happens several times a second.
    All,
    Some(BTreeSet<EndpointKey>),
}

impl Default for Due {
    fn default() -> Self {
        Self::Some(BTreeSet::new())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum DueAgain {
    No,
    Yes,
}

/// What came of looking at one endpoint, if it is more than nothing.
pub(super) enum Evaluated {
    ToWrite { now: Timestamp, append: Append },
    Panicked { position: Position, detail: String },
}

/// What is to be done about one endpoint, if it can be told now.
pub(super) fn evaluate<R: Reconciler>(
    reconciler: &mut R,
    deps: &Deps,
    key: &EndpointKey,
    entry: &mut Entry<R::State>,
    clock: Timestamp,
) -> Option<Evaluated> {
    if let Some(due_again) = &mut entry.writing {
        *due_again = DueAgain::Yes;
        return None;
    }
    if entry.awaiting > entry.position || entry.retry_at.is_some_and(|at| clock < at) {
        return None;
    }
    entry.retry_at = None;
    let (now, events) = if entry.recorded > clock + CLOCK_STEP {
        let stepped = ClockStepped {
            recorded: entry.recorded,
            clock,
        };
        (clock, vec![Event::ClockStepped(stepped)])
    } else {
        let now = entry.recorded.max(clock);
        match survive(|| reconciler.evaluate(key, &mut entry.state, now)) {
            Ok(events) => (now, events),
            Err(detail) => {
                let position = entry.position;
                return Some(Evaluated::Panicked { position, detail });
            }
        }
    };
    if events.is_empty() {
        return None;
    }
    let events = events.into_iter();
    let append = Append {
        stream: StreamName::of(R::STREAM, key),
        expected_version: entry.version,
        events: events
            .map(|event| deps.new_event::<R>(now, event))
            .collect(),
    };
    Some(Evaluated::ToWrite { now, append })
}
