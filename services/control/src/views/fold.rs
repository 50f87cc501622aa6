//! Folds the events of an endpoint into its model and its changed rows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
