//! The part of a consumer that is neither asynchronous nor in need of a store: which buckets it has, what is
//! folded of them, what is parked, and what goes into snapshots. The shell around it in a service and the
//! one in the simulation drive the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::Record;
use contract::time::Timestamp;
use store::{Fence, Unreadable};

use super::fold::{Fold, Folds};
use super::snapshot::{Draft, Initial, Stored};
use crate::parking::{Handling, Parking, catch_panic};

/// A record, and what applying it changed beside the state. None: it was skipped, its endpoint is parked,
/// or it belongs to no endpoint.
#[derive(Debug)]
pub struct Applied<E> {
    /// The record.
    pub record: Arc<Record>,
    /// What the fold made of it.
    pub effect: Option<E>,
}

/// What became of a record.
pub enum Handled<E> {
    /// It was folded, with this effect.
    Applied(E),
    /// Skipped, or of no endpoint.
    Skipped,
    /// Its endpoint cannot be gone on with.
    Parked(EndpointKey),
    /// People want the endpoint back: its history is to be read, and given to [`Core::rebuild`].
    Rebuild(EndpointKey),
}

/// What is folded of the buckets that a consumer has.
pub struct Core<F: Fold> {
    fold: Arc<F>,
    folds: Folds<F::State>,
    parking: Parking,
    held: BTreeMap<Bucket, Held>,
}

/// A bucket that the consumer has.
#[derive(Default)]
struct Held {
    fence: Option<Fence>,
    caught_up: bool,
    /// Everything of the bucket up to here has been applied, skipped or passed.
    position: Position,
    /// What the store has of it.
    stored: Stored,
    /// Endpoints that are not in the stored snapshot as they are.
    changed: BTreeSet<EndpointKey>,
    backlog: Backlog,
}

/// How far a stored snapshot is behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Events that would have to be applied once more.
    pub applied: usize,
    /// Events that would only have to be read once more.
    pub passed: usize,
}

impl<F: Fold> Core<F> {
    /// Has no bucket yet.
    pub fn new(fold: Arc<F>, parking: Parking) -> Self {
        Self {
            fold,
            folds: Folds::default(),
            parking,
            held: BTreeMap::new(),
        }
    }

    /// The states, to be locked for reading.
    pub fn folds(&self) -> &Folds<F::State> {
        &self.folds
    }

    /// Whether the consumer writes this stream.
    pub fn writes(&self, stream: &contract::log::StreamName) -> bool {
        self.fold.writes(stream)
    }

    /// What is parked.
    pub fn parking(&self) -> &Parking {
        &self.parking
    }

    /// Begins a bucket, with what a snapshot holds or with nothing. Returns the endpoints that are parked.
    pub fn take(
        &mut self,
        bucket: Bucket,
        fence: Option<Fence>,
        initial: Initial<F::State>,
        now: Timestamp,
    ) -> Vec<EndpointKey> {
        let held = Held {
            fence,
            position: initial.position,
            stored: initial.stored,
            ..Held::default()
        };
        self.held.insert(bucket, held);
        let mut entries = self.folds.lock();
        entries.remove_all(bucket);
        for (key, entry) in initial.entries {
            entries.insert(key, entry);
        }
        drop(entries);
        self.parking.forget(bucket);
        self.parking.skip(bucket, initial.skipped);
        // This release may be able to digest what another could not.
        let mut parked = Vec::new();
        for (key, history) in initial.parked {
            if self.rebuild(&key, history, now).is_none() {
                parked.push(key);
            }
        }
        parked
    }

    /// The bucket is owned under another fence from here on, or under none.
    pub fn set_fence(&mut self, bucket: Bucket, fence: Option<Fence>) {
        if let Some(held) = self.held.get_mut(&bucket) {
            held.fence = fence;
        }
    }

    /// The bucket belongs to somebody else from here on.
    pub fn release(&mut self, bucket: Bucket) {
        self.held.remove(&bucket);
        self.folds.lock().remove_all(bucket);
        self.parking.forget(bucket);
    }

    /// Somebody else has owned the bucket meanwhile, and may have written what has not been applied yet.
    pub fn mark_lost(&mut self, bucket: Bucket) {
        if let Some(held) = self.held.get_mut(&bucket) {
            held.fence = None;
            held.caught_up = false;
        }
    }

    /// The history of these buckets has been applied.
    pub fn caught_up(&mut self, buckets: &[Bucket]) {
        for bucket in buckets {
            if let Some(held) = self.held.get_mut(bucket) {
                held.caught_up = true;
            }
        }
    }

    /// The buckets that it has, in order.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> {
        self.held.keys().copied()
    }

    /// Whether it has the bucket.
    pub fn has(&self, bucket: Bucket) -> bool {
        self.held.contains_key(&bucket)
    }

    /// The fence that the bucket is owned under; none where it is owned elsewhere.
    pub fn fence(&self, bucket: Bucket) -> Option<&Fence> {
        self.held.get(&bucket)?.fence.as_ref()
    }

    /// Whether the bucket's history up to the head at its assignment has been applied.
    pub fn is_caught_up(&self, bucket: Bucket) -> bool {
        self.held.get(&bucket).is_some_and(|held| held.caught_up)
    }

    /// Whether the history of every bucket that it has, has been applied.
    pub fn all_caught_up(&self) -> bool {
        self.held.values().all(|held| held.caught_up)
    }

    /// How far a bucket has been applied.
    pub fn position(&self, bucket: Bucket) -> Position {
        let held = self.held.get(&bucket);
        held.map_or(Position::START, |held| held.position)
    }

    /// Applies the next record of its bucket.
    pub fn apply(&mut self, record: &Arc<Record>, now: Timestamp) -> Handled<F::Effect> {
        if let Some(held) = self.held.get_mut(&record.bucket) {
            held.position = record.position;
            held.backlog.applied += 1;
        }
        match self.parking.classify(record) {
            Handling::Apply => {}
            Handling::Skip => return Handled::Skipped,
            Handling::Rebuild => {
                return record.endpoint().map_or(Handled::Skipped, Handled::Rebuild);
            }
        }
        let Some(key) = record.endpoint().filter(|_| self.has(record.bucket)) else {
            return Handled::Skipped;
        };
        match self.apply_to(&key, record) {
            Ok(effect) => Handled::Applied(effect),
            Err(detail) => {
                self.park(
                    &key,
                    record.position,
                    record.event.type_name(),
                    &detail,
                    now,
                );
                Handled::Parked(key)
            }
        }
    }

    fn apply_to(&mut self, key: &EndpointKey, record: &Record) -> Result<F::Effect, String> {
        let mut entries = self.folds.lock();
        let entry = entries.get_or_default(key);
        let fold = &self.fold;
        let effect = catch_panic(|| fold.apply(key, &mut entry.state, record))?;
        let kind = record.stream.kind();
        if kind.is_some_and(|kind| fold.has_effects_only(kind)) {
            return Ok(effect);
        }
        entry.position = record.position;
        entry.recorded = entry.recorded.max(record.time);
        if fold.writes(&record.stream) {
            entry.versions.insert(record.stream.clone(), record.version);
            if let Event::ClockStepped(stepped) = &record.event {
                entry.recorded = stepped.clock;
            }
        }
        drop(entries);
        self.mark_changed(key);
        Ok(effect)
    }

    fn mark_changed(&mut self, key: &EndpointKey) {
        if let Some(held) = self.held.get_mut(&key.bucket())
            && !held.changed.contains(key)
        {
            held.changed.insert(key.clone());
        }
    }

    /// There was nothing more to apply in the bucket up to here.
    pub fn pass(&mut self, bucket: Bucket, position: Position) {
        if let Some(held) = self.held.get_mut(&bucket) {
            held.position = held.position.max(position);
            held.backlog.passed += 1;
        }
    }

    /// An event in its place that cannot be decoded; the endpoint that is parked for it.
    pub fn unreadable(&mut self, unreadable: &Unreadable, now: Timestamp) -> Option<EndpointKey> {
        self.pass(unreadable.bucket, unreadable.position);
        let key = self.parking.unreadable(unreadable, now)?;
        self.remove(&key);
        Some(key)
    }

    /// Parks an endpoint, which has no state from here on.
    pub fn park(
        &mut self,
        key: &EndpointKey,
        position: Position,
        event_type: &str,
        detail: &str,
        now: Timestamp,
    ) {
        self.remove(key);
        self.parking.park(key, position, event_type, detail, now);
    }

    fn remove(&mut self, key: &EndpointKey) {
        self.folds.lock().remove(key);
        self.mark_changed(key);
    }

    /// Applies the history of an endpoint that was parked. None: it is parked again.
    pub fn rebuild(
        &mut self,
        key: &EndpointKey,
        history: Vec<store::Entry>,
        now: Timestamp,
    ) -> Option<Vec<Applied<F::Effect>>> {
        self.remove(key);
        self.parking.release(key);
        let mut applied = Vec::new();
        for past in history {
            if self.parking.is_skipped(past.position()) {
                continue;
            }
            match past {
                store::Entry::Record(record) => {
                    // What is read of the log as it goes on is not among it either.
                    let kind = record.stream.kind();
                    if kind.is_some_and(|kind| !F::READS.contains(&kind)) {
                        continue;
                    }
                    match self.apply_to(key, &record) {
                        Ok(effect) => applied.push(Applied {
                            record,
                            effect: Some(effect),
                        }),
                        Err(detail) => {
                            let event_type = record.event.type_name();
                            self.park(key, record.position, event_type, &detail, now);
                            return None;
                        }
                    }
                }
                store::Entry::Unreadable(unreadable) => {
                    self.parking.unreadable(&unreadable, now);
                    self.remove(key);
                    return None;
                }
            }
        }
        Some(applied)
    }

    /// How far the stored snapshot of a bucket is behind.
    pub fn backlog(&self, bucket: Bucket) -> Backlog {
        let held = self.held.get(&bucket);
        held.map(|held| held.backlog).unwrap_or_default()
    }

    /// What is to be stored of a bucket as it is now. None where nothing is new, or the bucket is not ours.
    pub fn draft(&mut self, bucket: Bucket) -> Option<Draft> {
        let held = self.held.get_mut(&bucket)?;
        if held.backlog == Backlog::default() || held.stored.at == Some(held.position) {
            return None;
        }
        let entries = self.folds.lock();
        let parked = self.parking.parked_in(bucket);
        let skipped = self.parking.skipped_in(bucket);
        let draft = match held.stored.at {
            Some(_) => {
                let changed = held.changed.iter().map(|key| (key, entries.get(key)));
                Draft::make(held.position, &held.stored, changed, parked, skipped)
            }
            None => {
                let all = entries.of(bucket).map(|(key, entry)| (key, Some(entry)));
                Draft::make(held.position, &held.stored, all, parked, skipped)
            }
        };
        match draft {
            Ok(draft) => {
                held.changed.clear();
                held.backlog = Backlog::default();
                Some(draft)
            }
            Err(error) => {
                tracing::error!(%bucket, %error, "a snapshot cannot be written");
                None
            }
        }
    }

    /// The draft of a bucket has been stored, or could not be: then the next one holds everything.
    pub fn stored(&mut self, bucket: Bucket, stored: Option<Stored>) {
        if let Some(held) = self.held.get_mut(&bucket) {
            held.stored = stored.unwrap_or_default();
            if held.stored.at.is_none() {
                held.backlog.passed += 1;
            }
        }
    }
}
