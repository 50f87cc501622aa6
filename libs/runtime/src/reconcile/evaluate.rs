//! What a reconciler is asked, and what is made of its answers: without a store or a clock, so that the
//! simulation drives the same as the loop.

use std::collections::{BTreeMap, BTreeSet};

use contract::events::{ClockStepped, Event};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, NewEvent, Record, RowChange, StreamName};
use contract::time::Timestamp;
use store::Append;

use super::{CLOCK_STEP, Outputs, RETRY_AFTER, Reconciler};
use crate::consumer::{Applied, Core, Entry, Fold};
use crate::ids::Ids;
use crate::parking::catch_panic;

/// What is written about: one endpoint, or what belongs to none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// What belongs to no endpoint.
    Global,
    /// One endpoint.
    Endpoint(EndpointKey),
}

impl Subject {
    /// The bucket whose owner writes about it.
    pub fn bucket(&self) -> Bucket {
        match self {
            Self::Global => Bucket::GLOBAL,
            Self::Endpoint(key) => key.bucket(),
        }
    }
}

/// Something to be committed under the fence of its subject's bucket.
#[derive(Debug)]
pub struct Write {
    /// What it is about.
    pub subject: Subject,
    /// When it was evaluated; the events carry this time, or a later one that was recorded before.
    pub now: Timestamp,
    /// Events, each with the version that its stream must have.
    pub appends: Vec<Append>,
    /// Rows of read models that change with them.
    pub rows: Vec<RowChange>,
}

/// An endpoint whose evaluation panicked.
#[derive(Debug)]
pub struct Failed {
    /// Which one.
    pub key: EndpointKey,
    /// The words of the panic.
    pub detail: String,
}

/// A subject that is not simply evaluated when it is due.
#[derive(Debug, Default)]
struct Pending {
    /// Our own last commit; until it has come back, the state is behind and is not evaluated.
    awaiting: Position,
    /// A commit is under way, and whether the subject was due again meanwhile.
    writing: Option<DueAgain>,
    /// After the store refused a commit for a reason of its own: not before this time.
    retry_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DueAgain {
    No,
    Yes,
}

/// What is to be evaluated of one bucket.
enum Due {
    /// All that there is: told without naming each, for that is what happens several times a second.
    All,
    Some(BTreeSet<EndpointKey>),
}

impl Default for Due {
    fn default() -> Self {
        Self::Some(BTreeSet::new())
    }
}

/// How a commit went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitResult {
    /// It stands in the log, up to this position.
    Written(Position),
    /// Somebody has written before us, and the feed brings it; or the bucket is not ours any more.
    Refused,
    /// The store could not take it.
    Failed,
}

/// A reconciler, and what it waits for.
pub struct Evaluator<R: Reconciler> {
    /// What is asked.
    pub reconciler: R,
    pending: BTreeMap<Subject, Pending>,
    due: BTreeMap<Bucket, Due>,
    /// Of what belongs to no endpoint.
    global: Entry<()>,
}

type State<R> = <<R as Reconciler>::Fold as Fold>::State;
type Effect<R> = <<R as Reconciler>::Fold as Fold>::Effect;

impl<R: Reconciler> Evaluator<R> {
    /// Asks this reconciler; nothing is due yet.
    pub fn new(reconciler: R) -> Self {
        Self {
            reconciler,
            pending: BTreeMap::new(),
            due: BTreeMap::new(),
            global: Entry::default(),
        }
    }

    /// Takes note of records that were applied.
    pub fn applied(&mut self, core: &Core<R::Fold>, applied: Vec<Applied<Effect<R>>>) {
        for Applied { record, effect } in applied {
            match (record.endpoint(), effect) {
                (Some(key), Some(effect)) => {
                    self.reconciler.applied(&key, &record, effect);
                    self.mark_one_due(key);
                }
                (None, _) => self.applied_global(core, &record),
                (Some(_), None) => {}
            }
        }
    }

    /// What belongs to no endpoint parks none.
    fn applied_global(&mut self, core: &Core<R::Fold>, record: &Record) {
        let reconciler = &mut self.reconciler;
        if let Err(detail) = catch_panic(|| reconciler.apply_global(record)) {
            let (position, event_type) = (record.position, record.event.type_name());
            tracing::error!(service = R::SERVICE, %position, event_type, detail, "an event that belongs to no endpoint cannot be applied, and is skipped");
        }
        let global = &mut self.global;
        global.position = record.position;
        global.recorded = global.recorded.max(record.time);
        if core.writes(&record.stream) {
            global
                .versions
                .insert(record.stream.clone(), record.version);
        }
    }

    /// What is kept of an endpoint beside its state is of no use any more.
    pub fn forget_endpoint(&mut self, key: &EndpointKey) {
        self.reconciler.forget_endpoint(key);
        self.pending.remove(&Subject::Endpoint(key.clone()));
    }

    /// The bucket is somebody else's now.
    pub fn forget(&mut self, bucket: Bucket) {
        self.forget_pending(bucket);
        self.reconciler.forget(bucket);
    }

    /// What is under way of a bucket is of an ownership that is over.
    pub fn forget_pending(&mut self, bucket: Bucket) {
        self.pending.retain(|subject, _| subject.bucket() != bucket);
    }

    /// All endpoints of these buckets are to be evaluated.
    pub fn mark_due(&mut self, buckets: impl IntoIterator<Item = Bucket>) {
        self.due
            .extend(buckets.into_iter().map(|bucket| (bucket, Due::All)));
    }

    /// This endpoint is to be evaluated.
    pub fn mark_one_due(&mut self, key: EndpointKey) {
        if let Due::Some(keys) = self.due.entry(key.bucket()).or_default() {
            keys.insert(key);
        }
    }

    /// Evaluates what is due of buckets that are ours and caught up with.
    pub fn evaluate_due(
        &mut self,
        core: &Core<R::Fold>,
        ids: &dyn Ids,
        clock: Timestamp,
    ) -> (Vec<Write>, Vec<Failed>) {
        let (mut writes, mut failed) = (Vec::new(), Vec::new());
        if self.due.is_empty() {
            return (writes, failed);
        }
        let entries = core.folds().lock();
        for (bucket, due) in std::mem::take(&mut self.due) {
            // It becomes due when its bucket is caught up with.
            if !core.is_caught_up(bucket) || core.fence(bucket).is_none() {
                continue;
            }
            let mut look = |key: &EndpointKey, entry: &Entry<State<R>>| match self
                .evaluate(key, entry, ids, clock)
            {
                Ok(write) => writes.extend(write),
                Err(detail) => failed.push(Failed {
                    key: key.clone(),
                    detail,
                }),
            };
            match due {
                Due::All => entries.of(bucket).for_each(|(key, entry)| look(key, entry)),
                Due::Some(keys) => keys.iter().for_each(|key| {
                    if let Some(entry) = entries.get(key) {
                        look(key, entry);
                    }
                }),
            }
        }
        for write in &writes {
            let pending = self.pending.entry(write.subject.clone()).or_default();
            pending.writing = Some(DueAgain::No);
        }
        (writes, failed)
    }

    /// What is to be written about one endpoint; the words of a panic.
    fn evaluate(
        &mut self,
        key: &EndpointKey,
        entry: &Entry<State<R>>,
        ids: &dyn Ids,
        clock: Timestamp,
    ) -> Result<Option<Write>, String> {
        let subject = Subject::Endpoint(key.clone());
        if !self.is_free(&subject, entry.position, clock) {
            return Ok(None);
        }
        let stepped = entry.recorded > clock + CLOCK_STEP;
        let (now, outputs) = if stepped {
            let stepped = Event::ClockStepped(ClockStepped {
                recorded: entry.recorded,
                clock,
            });
            let stream = StreamName::of(R::STREAM, key);
            (clock, Outputs::to(stream, vec![stepped]))
        } else {
            let now = entry.recorded.max(clock);
            let reconciler = &mut self.reconciler;
            let outputs = catch_panic(|| reconciler.evaluate(key, &entry.state, now))?;
            (now, outputs)
        };
        Ok(write::<R, _>(subject, outputs, entry, ids, now))
    }

    /// Evaluates what belongs to no endpoint, for who owns it.
    pub fn evaluate_global(&mut self, ids: &dyn Ids, clock: Timestamp) -> Option<Write> {
        if !self.is_free(&Subject::Global, self.global.position, clock) {
            return None;
        }
        let now = self.global.recorded.max(clock);
        let reconciler = &mut self.reconciler;
        let outputs = catch_panic(|| reconciler.evaluate_global(now)).unwrap_or_else(|detail| {
            tracing::error!(
                service = R::SERVICE,
                detail,
                "what belongs to no endpoint cannot be evaluated"
            );
            Outputs::default()
        });
        let write = write::<R, _>(Subject::Global, outputs, &self.global, ids, now)?;
        let pending = self.pending.entry(Subject::Global).or_default();
        pending.writing = Some(DueAgain::No);
        Some(write)
    }

    /// Whether the subject can be evaluated now; if not, it will be when it can.
    fn is_free(&mut self, subject: &Subject, position: Position, clock: Timestamp) -> bool {
        let Some(pending) = self.pending.get_mut(subject) else {
            return true;
        };
        if let Some(due_again) = &mut pending.writing {
            *due_again = DueAgain::Yes;
            return false;
        }
        if pending.awaiting > position || pending.retry_at.is_some_and(|at| clock < at) {
            return false;
        }
        self.pending.remove(subject);
        true
    }

    /// A commit is over.
    pub fn settle(&mut self, subject: Subject, now: Timestamp, settled: CommitResult) {
        let Some(pending) = self.pending.get_mut(&subject) else {
            return;
        };
        let due_again = pending.writing.take() == Some(DueAgain::Yes);
        match settled {
            CommitResult::Written(position) => pending.awaiting = position,
            CommitResult::Refused => {}
            CommitResult::Failed => pending.retry_at = Some(now + RETRY_AFTER),
        }
        if let (true, Subject::Endpoint(key)) = (due_again, subject) {
            self.mark_one_due(key);
        }
    }
}

/// One append for each stream that something is written to.
fn write<R: Reconciler, S>(
    subject: Subject,
    outputs: Outputs,
    entry: &Entry<S>,
    ids: &dyn Ids,
    now: Timestamp,
) -> Option<Write> {
    let Outputs { events, rows } = outputs;
    if events.is_empty() && rows.is_empty() {
        return None;
    }
    let mut appends: Vec<Append> = Vec::new();
    for (stream, event) in events {
        let event = NewEvent {
            id: ids.event_id(now),
            time: now,
            actor: Actor::service(R::SERVICE),
            event,
        };
        match appends.iter_mut().find(|append| append.stream == stream) {
            Some(append) => append.events.push(event),
            None => appends.push(Append {
                expected_version: entry.version(&stream),
                stream,
                events: vec![event],
            }),
        }
    }
    Some(Write {
        subject,
        now,
        appends,
        rows,
    })
}
