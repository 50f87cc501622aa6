//! Folds the events of an endpoint into its model and its changed rows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, RowChange, StreamKind, StreamName};
use domain::views::{EndpointModel, MODEL_VERSION};
use runtime::consumer::Fold;

/// Which buckets need rows, and from which position on. Making rows is most of the work, so it is skipped
/// for those that are already written or that another replica writes.
///
/// Invariant: no rows are made while the history is read, and usage events, which only make rows, are not
/// read at all. After that, the owner of a bucket brings its rows up to the position of the fold.
#[derive(Clone, Default)]
pub(super) struct RowFilter {
    after: Arc<Mutex<BTreeMap<Bucket, Position>>>,
    history_is_over: Arc<AtomicBool>,
    written: Arc<Mutex<BTreeMap<Bucket, WrittenModels>>>,
}

/// The models of a bucket as its rows show them: rows that the history lacks are made from there on, and
/// without a snapshot the bucket would have to be folded once more for that.
struct WrittenModels {
    cursor: Position,
    /// Endpoints that have changed since, as they were at the cursor.
    changed: BTreeMap<EndpointKey, EndpointModel>,
}

impl RowFilter {
    /// Enables rows of a bucket for records after a position.
    pub(super) fn enable(&self, bucket: Bucket, position: Position) {
        let mut after = self.after.lock().unwrap_or_else(PoisonError::into_inner);
        after.insert(bucket, position);
    }

    pub(super) fn disable(&self, bucket: Bucket) {
        let mut after = self.after.lock().unwrap_or_else(PoisonError::into_inner);
        after.remove(&bucket);
    }

    /// Marks the history as read: from now on, rows are made and usage events are read.
    pub(super) fn end_history(&self) {
        self.history_is_over.store(true, Ordering::Relaxed);
    }

    /// Keeps the models of a bucket as of a cursor that its fold has not passed.
    pub(super) fn keep_written(&self, bucket: Bucket, cursor: Position) {
        let changed = BTreeMap::new();
        let models = WrittenModels { cursor, changed };
        self.lock_written().insert(bucket, models);
    }

    /// Stops keeping models of a bucket. Returns those that have changed since this cursor, if they were kept.
    pub(super) fn take_written(
        &self,
        bucket: Bucket,
        cursor: Position,
    ) -> Option<BTreeMap<EndpointKey, EndpointModel>> {
        let models = self.lock_written().remove(&bucket)?;
        (models.cursor == cursor).then_some(models.changed)
    }

    /// Stops keeping models of these buckets.
    pub(super) fn forget_written(&self, is_forgotten: impl Fn(Bucket, Position) -> bool) {
        self.lock_written()
            .retain(|bucket, models| !is_forgotten(*bucket, models.cursor));
    }

    /// Keeps a model before its first change past the cursor.
    fn keep(&self, key: &EndpointKey, model: &EndpointModel, record: &Record) {
        if let Some(models) = self.lock_written().get_mut(&record.bucket)
            && record.position > models.cursor
            && !models.changed.contains_key(key)
        {
            models.changed.insert(key.clone(), model.clone());
        }
    }

    fn lock_written(&self) -> MutexGuard<'_, BTreeMap<Bucket, WrittenModels>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_history_over(&self) -> bool {
        self.history_is_over.load(Ordering::Relaxed)
    }

    fn includes(&self, bucket: Bucket, position: Position) -> bool {
        let after = self.after.lock().unwrap_or_else(PoisonError::into_inner);
        let after = after.get(&bucket);
        self.is_history_over() && after.is_some_and(|after| position > *after)
    }
}

pub(super) struct ViewsFold {
    filter: RowFilter,
}

impl ViewsFold {
    pub(super) fn new(filter: RowFilter) -> Self {
        Self { filter }
    }
}

impl Fold for ViewsFold {
    type State = EndpointModel;
    /// The rows that a record changes; empty unless the filter includes it.
    type Effect = Vec<RowChange>;

    const VERSION: u32 = MODEL_VERSION;
    const READS: &'static [StreamKind] = StreamKind::ALL;

    fn apply(
        &self,
        key: &EndpointKey,
        state: &mut EndpointModel,
        record: &Record,
    ) -> Vec<RowChange> {
        if self.filter.includes(record.bucket, record.position) {
            return state.apply(key, record);
        }
        self.filter.keep(key, state, record);
        state.apply_without_rows(key, record);
        Vec::new()
    }

    /// Usage events only make rows, and do not change the model.
    fn has_effects_only(&self, kind: StreamKind) -> bool {
        kind == StreamKind::Usage
    }

    fn effects_from(&self) -> Position {
        match self.filter.is_history_over() {
            true => Position::START,
            false => Position(u64::MAX),
        }
    }

    /// The consumer writes rows, not streams.
    fn writes(&self, _stream: &StreamName) -> bool {
        false
    }
}
