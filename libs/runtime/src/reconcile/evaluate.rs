//! Evaluation of a reconciler and handling of its outputs, without a store or a clock, so that the
//! simulation drives the same code as the loop.

use std::collections::{BTreeMap, BTreeSet};

use contract::events::{ClockStepped, Event};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, NewEvent, Record, RowChange, StreamName};
use contract::time::Timestamp;
use store::Append;

use super::{CLOCK_STEP, Outputs, RETRY_AFTER, Reconciler};
use crate::consumer::{AppliedRecord, Core, Fold, FoldedEntry};
use crate::ids::Ids;
use crate::parking::{UnprocessedEvent, catch_panic};

/// The subject of a write: one endpoint, or what belongs to none.
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

/// A commit to be made under the fence of its subject's bucket.
#[derive(Debug)]
pub struct Write {
    /// The subject.
    pub subject: Subject,
    /// The time of evaluation; the events carry this time, or a later one that was recorded before.
    pub now: Timestamp,
    /// Events, with the expected version of each stream.
    pub appends: Vec<Append>,
    /// Rows of read models that change with them.
    pub rows: Vec<RowChange>,
}

/// An endpoint whose evaluation panicked.
#[derive(Debug)]
pub struct FailedEvaluation {
    /// The endpoint.
    pub key: EndpointKey,
    /// The panic message.
    pub detail: String,
}

/// A subject whose evaluation has to wait.
#[derive(Debug, Default)]
struct Pending {
    /// The position of our last commit; until it has been applied, the state is behind and is not
    /// evaluated.
    awaiting: Position,
    /// Set while a commit is in progress: whether the subject became due again meanwhile.
    writing: Option<DueAgain>,
    /// Set after a failed commit: not to be evaluated before this time.
    retry_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DueAgain {
    No,
    Yes,
}

/// The endpoints to be evaluated in one bucket.
enum Due {
    /// All of them, without listing each, since that happens several times a second.
    All,
    Some(BTreeSet<EndpointKey>),
}

impl Default for Due {
    fn default() -> Self {
        Self::Some(BTreeSet::new())
    }
}

/// The result of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitResult {
    /// It is in the log, up to this position.
    Written(Position),
    /// Another writer was first, whose events arrive through the feed; or the bucket is no longer
    /// ours.
    Refused,
    /// The store could not take it.
    Failed,
}

/// A reconciler, and what it waits for.
pub struct Evaluator<R: Reconciler> {
    /// The reconciler.
    pub reconciler: R,
    pending: BTreeMap<Subject, Pending>,
    due: BTreeMap<Bucket, Due>,
    /// Buckets that are ours and whose endpoints are prepared.
    prepared: BTreeSet<Bucket>,
    /// What belongs to no endpoint.
    global: FoldedEntry<R::Global>,
}

type State<R> = <<R as Reconciler>::Fold as Fold>::State;
type Effect<R> = <<R as Reconciler>::Fold as Fold>::Effect;

impl<R: Reconciler> Evaluator<R> {
    /// Creates an evaluator with nothing due.
    pub fn new(reconciler: R) -> Self {
        Self {
            reconciler,
            pending: BTreeMap::new(),
            due: BTreeMap::new(),
            prepared: BTreeSet::new(),
            global: FoldedEntry::default(),
        }
    }

    /// Handles records that were applied. Returns those that belong to no endpoint and could not be
    /// processed.
    #[must_use]
    pub fn applied(
        &mut self,
        core: &Core<R::Fold>,
        applied: Vec<AppliedRecord<Effect<R>>>,
    ) -> Vec<UnprocessedEvent> {
        let mut unprocessed = Vec::new();
        for AppliedRecord { record, effect } in applied {
            match (record.endpoint(), effect) {
                (Some(key), Some(effect)) => {
                    self.reconciler.applied(&key, &record, effect);
                    self.mark_one_due(key);
                }
                (None, _) => unprocessed.extend(self.applied_global(core, &record)),
                (Some(_), None) => {}
            }
        }
        unprocessed
    }

    fn applied_global(
        &mut self,
        core: &Core<R::Fold>,
        record: &Record,
    ) -> Option<UnprocessedEvent> {
        let global = &mut self.global;
        // A copy, since a panic may leave it partly changed. Such records are rare.
        let mut state = global.state.clone();
        let applied = catch_panic(|| R::apply_global(&mut state, record));
        if applied.is_ok() {
            global.state = state;
        }
        global.position = record.position;
        global.recorded = global.recorded.max(record.time);
        if core.writes(&record.stream) {
            global
                .versions
                .insert(record.stream.clone(), record.version);
        }
        applied.err().map(|detail| UnprocessedEvent {
            position: record.position,
            event_type: record.event.type_name().to_owned(),
            detail,
        })
    }

    /// Drops what is kept of an endpoint besides its state.
    pub fn forget_endpoint(&mut self, key: &EndpointKey) {
        self.reconciler.forget_endpoint(key);
        self.pending.remove(&Subject::Endpoint(key.clone()));
    }

    /// Drops what is kept of a bucket that now belongs to another owner.
    pub fn forget(&mut self, bucket: Bucket) {
        self.forget_pending(bucket);
        self.prepared.remove(&bucket);
        self.reconciler.forget(bucket);
    }

    /// Drops what is in progress for a bucket under an earlier ownership.
    pub fn forget_pending(&mut self, bucket: Bucket) {
        self.pending.retain(|subject, _| subject.bucket() != bucket);
    }

    /// Marks all endpoints of these buckets to be evaluated.
    pub fn mark_due(&mut self, buckets: impl IntoIterator<Item = Bucket>) {
        self.due
            .extend(buckets.into_iter().map(|bucket| (bucket, Due::All)));
    }

    /// Marks an endpoint to be evaluated.
    pub fn mark_one_due(&mut self, key: EndpointKey) {
        if let Due::Some(keys) = self.due.entry(key.bucket()).or_default() {
            keys.insert(key);
        }
    }

    /// Evaluates what is due in buckets that are ours and caught up.
    pub fn evaluate_due(
        &mut self,
        core: &Core<R::Fold>,
        ids: &dyn Ids,
        clock: Timestamp,
    ) -> (Vec<Write>, Vec<FailedEvaluation>) {
        let (mut writes, mut failed) = (Vec::new(), Vec::new());
        if self.due.is_empty() {
            return (writes, failed);
        }
        let entries = core.folds().lock();
        for (bucket, mut due) in std::mem::take(&mut self.due) {
            // It becomes due again once its bucket has caught up.
            if !core.is_caught_up(bucket) || core.fence(bucket).is_none() {
                continue;
            }
            if self.prepared.insert(bucket) {
                self.prepare(bucket, entries.of(bucket), clock);
                due = Due::All;
            }
            let mut visit = |key: &EndpointKey, entry: &FoldedEntry<State<R>>| match self
                .evaluate(key, entry, ids, clock)
            {
                Ok(write) => writes.extend(write),
                Err(detail) => failed.push(FailedEvaluation {
                    key: key.clone(),
                    detail,
                }),
            };
            match due {
                Due::All => entries
                    .of(bucket)
                    .for_each(|(key, entry)| visit(key, entry)),
                Due::Some(keys) => keys.iter().for_each(|key| {
                    if let Some(entry) = entries.get(key) {
                        visit(key, entry);
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

    fn prepare<'a>(
        &mut self,
        bucket: Bucket,
        entries: impl Iterator<Item = (&'a EndpointKey, &'a FoldedEntry<State<R>>)>,
        clock: Timestamp,
    ) where
        State<R>: 'a,
    {
        for (key, entry) in entries {
            let now = entry.recorded.max(clock);
            // What panics here does so again when it is evaluated, and is parked then.
            let _ = catch_panic(|| self.reconciler.prepare(key, &entry.state, now));
        }
        self.reconciler.prepared(bucket, clock);
    }

    /// Evaluates one endpoint; the error is a panic message.
    fn evaluate(
        &mut self,
        key: &EndpointKey,
        entry: &FoldedEntry<State<R>>,
        ids: &dyn Ids,
        clock: Timestamp,
    ) -> Result<Option<Write>, String> {
        let subject = Subject::Endpoint(key.clone());
        if !self.is_ready(&subject, entry.position, clock) {
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
            let (reconciler, global) = (&mut self.reconciler, &self.global.state);
            let outputs = catch_panic(|| reconciler.evaluate(key, &entry.state, global, now))?;
            (now, outputs)
        };
        Ok(write::<R, _>(subject, outputs, entry, ids, now))
    }

    /// Evaluates what belongs to no endpoint; to be called by its owner.
    pub fn evaluate_global(&mut self, ids: &dyn Ids, clock: Timestamp) -> Option<Write> {
        if !self.is_ready(&Subject::Global, self.global.position, clock) {
            return None;
        }
        let now = self.global.recorded.max(clock);
        let (reconciler, global) = (&mut self.reconciler, &self.global.state);
        let evaluated = catch_panic(|| reconciler.evaluate_global(global, now));
        let outputs = evaluated.unwrap_or_else(|detail| {
            tracing::error!(
                service = R::SERVICE,
                detail,
                "failed to evaluate what belongs to no endpoint"
            );
            Outputs::default()
        });
        let write = write::<R, _>(Subject::Global, outputs, &self.global, ids, now)?;
        let pending = self.pending.entry(Subject::Global).or_default();
        pending.writing = Some(DueAgain::No);
        Some(write)
    }

    /// Whether the subject can be evaluated now; if not, it becomes due when it can.
    fn is_ready(&mut self, subject: &Subject, position: Position, clock: Timestamp) -> bool {
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

    /// Handles the result of a commit.
    pub fn settle(&mut self, subject: Subject, now: Timestamp, result: CommitResult) {
        let Some(pending) = self.pending.get_mut(&subject) else {
            return;
        };
        let due_again = pending.writing.take() == Some(DueAgain::Yes);
        match result {
            CommitResult::Written(position) => pending.awaiting = position,
            CommitResult::Refused => {}
            CommitResult::Failed => pending.retry_at = Some(now + RETRY_AFTER),
        }
        if let (true, Subject::Endpoint(key)) = (due_again, subject) {
            self.mark_one_due(key);
        }
    }
}

/// Builds a write with one append per stream.
fn write<R: Reconciler, S>(
    subject: Subject,
    outputs: Outputs,
    entry: &FoldedEntry<S>,
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
