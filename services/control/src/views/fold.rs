//! How the events of an endpoint become its model, and the rows that change with it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, RowChange, StreamKind, StreamName};
use domain::views::{EndpointModel, MODEL_VERSION};
use runtime::consumer::Fold;

/// Of which buckets rows are to be made, and from which position on: making them is most of the work, and
/// what is written already, or is for another replica to write, is not wanted.
///
/// Invariant: none are made while the history is read, and usage, which is nothing but rows, is left out of
/// it. At its end whoever owns a bucket brings its rows to where the fold stands.
#[derive(Clone, Default)]
pub(super) struct RowsWanted {
    after: Arc<Mutex<BTreeMap<Bucket, Position>>>,
    history_is_over: Arc<AtomicBool>,
}

impl RowsWanted {
    /// Rows of this bucket are wanted of records after this position.
    pub(super) fn begin(&self, bucket: Bucket, after: Position) {
        let mut wanted = self.after.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.insert(bucket, after);
    }

    pub(super) fn end(&self, bucket: Bucket) {
        let mut wanted = self.after.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.remove(&bucket);
    }

    /// From here on nothing is left out.
    pub(super) fn end_history(&self) {
        self.history_is_over.store(true, Ordering::Relaxed);
    }

    fn is_history_over(&self) -> bool {
        self.history_is_over.load(Ordering::Relaxed)
    }

    fn of(&self, bucket: Bucket, position: Position) -> bool {
        let wanted = self.after.lock().unwrap_or_else(PoisonError::into_inner);
        let after = wanted.get(&bucket);
        self.is_history_over() && after.is_some_and(|after| position > *after)
    }
}

pub(super) struct ViewsFold {
    wanted: RowsWanted,
}

impl ViewsFold {
    pub(super) fn new(wanted: RowsWanted) -> Self {
        Self { wanted }
    }
}

impl Fold for ViewsFold {
    type State = EndpointModel;
    /// The rows that a record changes; none where nobody wants them.
    type Effect = Vec<RowChange>;

    const VERSION: u32 = MODEL_VERSION;
    const READS: &'static [StreamKind] = StreamKind::ALL;

    fn apply(
        &self,
        key: &EndpointKey,
        state: &mut EndpointModel,
        record: &Record,
    ) -> Vec<RowChange> {
        if self.wanted.of(record.bucket, record.position) {
            return state.apply(key, record);
        }
        state.apply_silently(key, record);
        Vec::new()
    }

    /// Usage is rows, and nothing of the model.
    fn has_effects_only(&self, kind: StreamKind) -> bool {
        kind == StreamKind::Usage
    }

    fn effects_from(&self) -> Position {
        match self.wanted.is_history_over() {
            true => Position::START,
            false => Position(u64::MAX),
        }
    }

    /// Rows are no stream.
    fn writes(&self, _stream: &StreamName) -> bool {
        false
    }
}
