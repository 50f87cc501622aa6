//! The synchronous part of a consumer, which needs no store: which buckets it owns, their folded
//! states, what is parked, and what goes into snapshots. The consumer of a service and the
//! simulation both drive it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::Record;
use contract::time::Timestamp;
use store::{Fence, Unreadable};

use super::fold::{Fold, SharedEntries};
use super::snapshot::{Backlog, Draft, Initial, StoredSnapshot};
use crate::parking::{Handling, Parking, UnprocessedEvent, catch_panic};

/// A record and its effect besides the state. `None` if it was skipped, its endpoint is parked, or
/// it belongs to no endpoint.
#[derive(Debug)]
pub struct AppliedRecord<E> {
    /// The record.
    pub record: Arc<Record>,
    /// The effect returned by the fold.
    pub effect: Option<E>,
}

/// The outcome of applying a record.
pub enum ApplyOutcome<E> {
    /// It was folded, with this effect.
    Applied(E),
    /// It was skipped, or belongs to no endpoint.
    Skipped,
    /// Its endpoint has been parked.
    Parked(EndpointKey),
    /// The endpoint is to be unparked: its history must be read and passed to [`Core::rebuild`].
    Rebuild(EndpointKey),
}

/// The folded states of the buckets that a consumer owns.
pub struct Core<F: Fold> {
    fold: Arc<F>,
    folds: SharedEntries<F::State>,
    parking: Parking,
    owned: BTreeMap<Bucket, OwnedBucket>,
}

/// A bucket that the consumer owns or follows.
#[derive(Default)]
struct OwnedBucket {
    fence: Option<Fence>,
    is_caught_up: bool,
    /// Everything in the bucket up to here has been applied or skipped.
    position: Position,
    /// The snapshot in the store.
    stored: StoredSnapshot,
    /// Endpoints that differ from the stored snapshot.
    changed: BTreeSet<EndpointKey>,
    backlog: Backlog,
}

impl<F: Fold> Core<F> {
    /// Creates a core without buckets.
    pub fn new(fold: Arc<F>, parking: Parking) -> Self {
        Self {
            fold,
            folds: SharedEntries::default(),
            parking,
            owned: BTreeMap::new(),
        }
    }

    /// The states, locked on access.
    pub fn folds(&self) -> &SharedEntries<F::State> {
        &self.folds
    }

    /// Whether the consumer writes this stream.
    pub fn writes(&self, stream: &contract::log::StreamName) -> bool {
        self.fold.writes(stream)
    }

    /// The parked endpoints.
    pub fn parking(&self) -> &Parking {
        &self.parking
    }

    /// Starts a bucket, from a snapshot or empty. Returns the endpoints that are parked.
    pub fn acquire(
        &mut self,
        bucket: Bucket,
        fence: Option<Fence>,
        initial: Initial<F::State>,
        now: Timestamp,
    ) -> Vec<EndpointKey> {
        let owned = OwnedBucket {
            fence,
            position: initial.position,
            stored: initial.stored,
            ..OwnedBucket::default()
        };
        self.owned.insert(bucket, owned);
        let mut entries = self.folds.lock();
        entries.remove_all(bucket);
        for (key, entry) in initial.entries {
            entries.insert(key, entry);
        }
        drop(entries);
        self.parking.forget(bucket);
        self.parking.skip(bucket, initial.skipped);
        // This release may be able to process what another could not.
        let mut parked = Vec::new();
        for (key, history) in initial.parked {
            if self.rebuild(&key, history, now).is_none() {
                parked.push(key);
            }
        }
        parked
    }

    /// Replaces the fence of a bucket, or removes it.
    pub fn set_fence(&mut self, bucket: Bucket, fence: Option<Fence>) {
        if let Some(owned) = self.owned.get_mut(&bucket) {
            owned.fence = fence;
        }
    }

    /// Drops a bucket that now belongs to another owner.
    pub fn release(&mut self, bucket: Bucket) {
        self.owned.remove(&bucket);
        self.folds.lock().remove_all(bucket);
        self.parking.forget(bucket);
    }

    /// Marks a bucket that another owner has taken meanwhile: there may be events that have not
    /// been applied.
    pub fn mark_lost(&mut self, bucket: Bucket) {
        if let Some(owned) = self.owned.get_mut(&bucket) {
            owned.fence = None;
            owned.is_caught_up = false;
        }
    }

    /// Marks buckets whose history has been applied.
    pub fn caught_up(&mut self, buckets: &[Bucket]) {
        for bucket in buckets {
            if let Some(owned) = self.owned.get_mut(bucket) {
                owned.is_caught_up = true;
            }
        }
    }

    /// The buckets, in order.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> {
        self.owned.keys().copied()
    }

    /// Whether it has the bucket.
    pub fn has(&self, bucket: Bucket) -> bool {
        self.owned.contains_key(&bucket)
    }

    /// The fence under which the bucket is owned; `None` if it is owned elsewhere.
    pub fn fence(&self, bucket: Bucket) -> Option<&Fence> {
        self.owned.get(&bucket)?.fence.as_ref()
    }

    /// Whether the bucket's history up to the head at its assignment has been applied.
    pub fn is_caught_up(&self, bucket: Bucket) -> bool {
        self.owned
            .get(&bucket)
            .is_some_and(|owned| owned.is_caught_up)
    }

    /// Whether the history of every bucket has been applied.
    pub fn all_caught_up(&self) -> bool {
        self.owned.values().all(|owned| owned.is_caught_up)
    }

    /// The position up to which a bucket has been applied.
    pub fn position(&self, bucket: Bucket) -> Position {
        let owned = self.owned.get(&bucket);
        owned.map_or(Position::START, |owned| owned.position)
    }

    /// Applies the next record of its bucket.
    pub fn apply(&mut self, record: &Arc<Record>, now: Timestamp) -> ApplyOutcome<F::Effect> {
        if let Some(owned) = self.owned.get_mut(&record.bucket) {
            owned.position = record.position;
            owned.backlog.applied += 1;
        }
        match self.parking.classify(record) {
            Handling::Apply => {}
            Handling::Skip => return ApplyOutcome::Skipped,
            Handling::Rebuild => {
                return record
                    .endpoint()
                    .map_or(ApplyOutcome::Skipped, ApplyOutcome::Rebuild);
            }
        }
        let Some(key) = record.endpoint().filter(|_| self.has(record.bucket)) else {
            return ApplyOutcome::Skipped;
        };
        match self.apply_to(&key, record) {
            Ok(effect) => ApplyOutcome::Applied(effect),
            Err(detail) => {
                self.park(
                    &key,
                    record.position,
                    record.event.type_name(),
                    &detail,
                    now,
                );
                ApplyOutcome::Parked(key)
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
        if let Some(owned) = self.owned.get_mut(&key.bucket())
            && !owned.changed.contains(key)
        {
            owned.changed.insert(key.clone());
        }
    }

    /// Advances the position of a bucket over events that need not be applied.
    pub fn advance(&mut self, bucket: Bucket, position: Position) {
        if let Some(owned) = self.owned.get_mut(&bucket) {
            owned.position = owned.position.max(position);
            owned.backlog.skipped += 1;
        }
    }

    /// Handles an event that cannot be decoded; returns the endpoint that is parked because of it.
    pub fn park_unreadable(
        &mut self,
        unreadable: &Unreadable,
        now: Timestamp,
    ) -> Option<EndpointKey> {
        self.advance(unreadable.bucket, unreadable.position);
        let key = self.parking.park_unreadable(unreadable, now)?;
        self.remove(&key);
        Some(key)
    }

    /// Parks an endpoint and drops its state.
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

    /// Reports an event that belongs to no endpoint and cannot be processed.
    pub fn report(&mut self, event: UnprocessedEvent, now: Timestamp) {
        self.parking.report(event, now);
    }

    fn remove(&mut self, key: &EndpointKey) {
        self.folds.lock().remove(key);
        self.mark_changed(key);
    }

    /// Unparks an endpoint and applies its history. Returns `None` if it is parked again.
    pub fn rebuild(
        &mut self,
        key: &EndpointKey,
        history: Vec<store::LogEntry>,
        now: Timestamp,
    ) -> Option<Vec<AppliedRecord<F::Effect>>> {
        self.remove(key);
        self.parking.release(key);
        let mut applied = Vec::new();
        for entry in history {
            if self.parking.is_skipped(entry.position()) {
                continue;
            }
            match entry {
                store::LogEntry::Record(record) => {
                    // Streams that the fold does not read are excluded here as well.
                    let kind = record.stream.kind();
                    if kind.is_some_and(|kind| !F::READS.contains(&kind)) {
                        continue;
                    }
                    match self.apply_to(key, &record) {
                        Ok(effect) => applied.push(AppliedRecord {
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
                store::LogEntry::Unreadable(unreadable) => {
                    self.parking.park_unreadable(&unreadable, now);
                    self.remove(key);
                    return None;
                }
            }
        }
        Some(applied)
    }

    /// How far the stored snapshot of a bucket is behind.
    pub fn backlog(&self, bucket: Bucket) -> Backlog {
        let owned = self.owned.get(&bucket);
        owned.map(|owned| owned.backlog).unwrap_or_default()
    }

    /// Drafts a snapshot of a bucket as it is now. Returns `None` if nothing has changed, or the
    /// bucket is not owned.
    pub fn draft(&mut self, bucket: Bucket) -> Option<Draft> {
        let owned = self.owned.get_mut(&bucket)?;
        if owned.backlog == Backlog::default() || owned.stored.at == Some(owned.position) {
            return None;
        }
        let entries = self.folds.lock();
        let parked = self.parking.parked_in(bucket);
        let skipped = self.parking.skipped_in(bucket);
        let draft = match owned.stored.at {
            Some(_) => {
                let changed = owned.changed.iter().map(|key| (key, entries.get(key)));
                Draft::make(owned.position, &owned.stored, changed, parked, skipped)
            }
            None => {
                let all = entries.of(bucket).map(|(key, entry)| (key, Some(entry)));
                Draft::make(owned.position, &owned.stored, all, parked, skipped)
            }
        };
        match draft {
            Ok(draft) => {
                owned.changed.clear();
                owned.backlog = Backlog::default();
                Some(draft)
            }
            Err(error) => {
                tracing::error!(%bucket, %error, "failed to encode a snapshot");
                None
            }
        }
    }

    /// Records that the draft of a bucket has been stored; `None` if that failed, in which case the
    /// next one is complete.
    pub fn stored(&mut self, bucket: Bucket, stored: Option<StoredSnapshot>) {
        if let Some(owned) = self.owned.get_mut(&bucket) {
            owned.stored = stored.unwrap_or_default();
            if owned.stored.at.is_none() {
                owned.backlog.skipped += 1;
            }
        }
    }
}
