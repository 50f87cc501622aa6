//! The rows of the buckets that this replica writes: bringing them up to the position of the fold when the
//! consumer has acquired them, and writing them.
//!
//! Invariant: rows and their cursor are written in one commit under the bucket's fence; if that fails,
//! the bucket is reacquired, which starts from the stored cursor.

use std::collections::{BTreeMap, BTreeSet};

use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, RowChange, StreamKind};
use contract::time::Timestamp;
use domain::views::{EndpointModel, MODEL_VERSION, Projection};
use futures::StreamExt;
use runtime::consumer::load;
use runtime::parking::{PARKED, catch_panic, global_row_key, history};
use store::{
    Commit, CommitError, CursorMove, Fence, LogEntry, PageQuery, Projector, Row, RowQuery,
    StoreError,
};

use super::{CONSUMER, ViewsConsumer, ViewsProjector};

/// Records per read, and per commit of rows that a previous owner left unwritten.
const PAGE: usize = 500;

/// Maximum rows of parked endpoints to read; far more than are ever parked.
const PARKED_MAX: usize = 500;

/// Buckets to acquire concurrently; others read the log at the same time.
const ACQUIRE_CONCURRENCY: usize = 4;

/// A bucket whose rows this replica writes.
pub(super) struct ProjectedBucket {
    pub(super) fence: Fence,
    /// The rows reflect the log up to this position.
    pub(super) cursor: Position,
}

/// Rows of one bucket to commit.
#[derive(Default)]
pub(super) struct RowBatch {
    pub(super) rows: Vec<RowChange>,
    pub(super) to: Position,
}

impl ViewsConsumer {
    /// Stops writing the rows of a bucket.
    pub(super) fn release(&mut self, bucket: Bucket) {
        // The next owner exports these counts.
        let models = self.models.lock();
        for (key, entry) in models.of(bucket) {
            let endpoint = entry.state.endpoint.iter();
            let names = endpoint.flat_map(|endpoint| endpoint.deployments.keys());
            names.for_each(|name| self.remove_states(key, name));
        }
        drop(models);
        self.row_filter.disable(bucket);
        self.owned.remove(&bucket);
        self.progress.send_modify(|progress| {
            progress.written.remove(&bucket);
        });
    }

    /// Acquires the rows of buckets. Failures are retried later.
    pub(super) async fn acquire_all(
        &mut self,
        fences: BTreeMap<Bucket, Fence>,
    ) -> Result<(), StoreError> {
        let attempts = fences.into_iter().map(|(bucket, fence)| {
            let acquiring = self.acquire(bucket, fence);
            async move { (bucket, acquiring.await) }
        });
        let acquired: Vec<_> = futures::stream::iter(attempts)
            .buffer_unordered(ACQUIRE_CONCURRENCY)
            .collect()
            .await;
        for (bucket, result) in acquired {
            match result {
                Ok(owned) => self.add_owned(bucket, owned),
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                Err(error) => {
                    tracing::warn!(%bucket, %error, "cannot take over read models, retrying");
                    self.mark_failing(bucket, &error);
                    self.consumer.reacquire_rows(bucket, false);
                }
            }
        }
        self.report_failing();
        if self.progress.borrow().caught_up {
            // The previous owner may have stopped before doing this.
            self.publish_touched();
            self.react_to_touched().await?;
        }
        Ok(())
    }

    fn add_owned(&mut self, bucket: Bucket, owned: ProjectedBucket) {
        let cursor = owned.cursor;
        self.consumer.confirm_written(bucket, cursor);
        self.row_filter.enable(bucket, cursor);
        let is_history_ahead = !self.progress.borrow().caught_up
            && bucket != Bucket::GLOBAL
            && self.folded_position(bucket) <= cursor;
        if is_history_ahead {
            self.row_filter.keep_written(bucket, cursor);
        }
        self.owned.insert(bucket, owned);
        self.failing.remove(&bucket);
        self.progress.send_modify(|progress| {
            progress.written.insert(bucket, cursor);
        });
        let models = self.models.lock();
        let keys = models.of(bucket).map(|(key, _)| key.clone());
        self.touched.extend(keys);
    }

    /// Takes over a fenced bucket: brings its rows up to the position of this fold.
    async fn acquire(&self, bucket: Bucket, fence: Fence) -> Result<ProjectedBucket, CommitError> {
        let store = &self.deps.store;
        let cursor = store.cursor(CONSUMER, bucket).await?;
        let folded = self.folded_position(bucket);
        let mut owned = ProjectedBucket { fence, cursor };
        // Until the history is read, the rows have to wait for its end.
        if self.progress.borrow().caught_up {
            if folded > cursor {
                self.write_missing(bucket, &mut owned, folded).await?;
            }
            self.write_unparked(bucket, &owned).await?;
        }
        Ok(owned)
    }

    /// The cursor has moved past unwritten rows of parked endpoints, and of events of no endpoint. For what
    /// this process can process, rewrites all rows and removes it from the list of parked endpoints.
    pub(super) async fn write_unparked(
        &self,
        bucket: Bucket,
        owned: &ProjectedBucket,
    ) -> Result<(), CommitError> {
        let query = RowQuery {
            model: PARKED.to_owned(),
            limit: PARKED_MAX,
            ..RowQuery::default()
        };
        for row in self.deps.store.rows(query).await? {
            let Some(mut rows) = self.rows_missed(bucket, &row, owned.cursor).await? else {
                continue;
            };
            tracing::info!(
                parked = row.key,
                "it can be processed again, rewriting its rows"
            );
            rows.push(RowChange {
                model: PARKED,
                key: row.key,
                endpoint: row.endpoint,
                deployment: row.deployment,
                position: row.position,
                time: row.time,
                doc: None,
            });
            let commit = Commit {
                rows: last_changes(rows),
                fence: Some(owned.fence.clone()),
                ..Commit::default()
            };
            self.deps.store.commit(commit).await?;
        }
        Ok(())
    }

    /// Returns all rows of what is listed as parked in a bucket, or none if it is of another bucket or
    /// consumer, or still cannot be processed.
    async fn rows_missed(
        &self,
        bucket: Bucket,
        parked: &Row,
        to: Position,
    ) -> Result<Option<Vec<RowChange>>, StoreError> {
        let parking = self.consumer.parking();
        let Ok(key) = parked.endpoint.parse::<EndpointKey>() else {
            let is_own =
                bucket == Bucket::GLOBAL && parked.key == global_row_key(CONSUMER, parked.position);
            return match is_own && !parking.is_unprocessed(parked.position) {
                true => self.rebuild_global_rows(to).await.map(Some),
                false => Ok(None),
            };
        };
        let is_own = parked.key == format!("{CONSUMER}/{key}") && key.bucket() == bucket;
        match is_own && !parking.is_parked(&key) {
            true => self.rebuild_rows(&key, to).await,
            false => Ok(None),
        }
    }

    /// Returns all rows of what belongs to no endpoint up to a position, without events that cannot be
    /// processed.
    async fn rebuild_global_rows(&self, to: Position) -> Result<Vec<RowChange>, StoreError> {
        let (mut projector, mut rows) = (ViewsProjector::default(), Vec::new());
        let mut after = Position::START;
        while after < to {
            let store = &self.deps.store;
            let page = store
                .read_bucket_entries(Bucket::GLOBAL, after, PAGE)
                .await?;
            let Some(last) = page.last() else { break };
            after = last.position();
            for entry in page.iter().filter(|entry| entry.position() <= to) {
                if let LogEntry::Record(record) = entry {
                    rows.extend(projector.project(record));
                }
            }
        }
        Ok(rows)
    }

    /// Returns all rows of an endpoint from its history up to a position, or none if that cannot be
    /// folded.
    pub(super) async fn rebuild_rows(
        &self,
        key: &EndpointKey,
        to: Position,
    ) -> Result<Option<Vec<RowChange>>, StoreError> {
        let entries = history(self.deps.store.clone(), key.clone(), to).await?;
        let (mut fresh, mut rows) = (Projection::default(), Vec::new());
        for entry in entries {
            if self.consumer.parking().is_skipped(entry.position()) {
                continue;
            }
            let LogEntry::Record(record) = entry else {
                return Ok(None);
            };
            match catch_panic(|| fresh.apply(&record)) {
                Ok(changes) => rows.extend(changes),
                Err(_) => return Ok(None),
            }
        }
        Ok(Some(rows))
    }

    /// Writes the rows between the stored cursor and the position of this fold.
    async fn write_missing(
        &self,
        bucket: Bucket,
        owned: &mut ProjectedBucket,
        to: Position,
    ) -> Result<(), CommitError> {
        let mut projector = match self.written_models(bucket, owned.cursor) {
            Some(models) => ViewsProjector::resuming_from(models, BTreeSet::new()),
            None => self.projector_at(bucket, owned.cursor).await?,
        };
        let mut after = owned.cursor;
        while after < to {
            let page = self
                .deps
                .store
                .read_bucket_entries(bucket, after, PAGE)
                .await?;
            let Some(last) = page.last().map(LogEntry::position) else {
                return Ok(());
            };
            let mut batch = RowBatch::default();
            for entry in page.iter().filter(|entry| entry.position() <= to) {
                after = entry.position();
                let LogEntry::Record(record) = entry else {
                    continue;
                };
                // Rows of a parked endpoint stay as they were before the event that parked it.
                let parked = record
                    .endpoint()
                    .and_then(|k| self.consumer.parking().parked_at(&k));
                let parked = parked.is_some_and(|position| after >= position);
                let rows = projector.project(record);
                if !parked {
                    batch.rows.extend(rows);
                    batch.rows.extend(self.rows_of_unparked(record).await?);
                }
            }
            batch.to = after;
            if batch.to > owned.cursor {
                owned.cursor = self.write(bucket, owned, batch).await?;
            }
            if last >= to {
                break;
            }
        }
        Ok(())
    }

    /// Returns the models of a bucket as of its cursor, if they were kept while the history was read.
    fn written_models(
        &self,
        bucket: Bucket,
        cursor: Position,
    ) -> Option<BTreeMap<EndpointKey, EndpointModel>> {
        let changed = self.row_filter.take_written(bucket, cursor)?;
        let parking = self.consumer.parking();
        // What is parked or skipped depends on where folding begins.
        if !parking.parked_in(bucket).is_empty() || !parking.skipped_in(bucket).is_empty() {
            return None;
        }
        let entries = self.models.lock();
        let current = entries.of(bucket).map(|(key, entry)| (key, &entry.state));
        let mut models: BTreeMap<EndpointKey, EndpointModel> = current
            .filter(|(key, _)| !changed.contains_key(*key))
            .map(|(key, model)| (key.clone(), model.clone()))
            .collect();
        models.extend(changed);
        Some(models)
    }

    /// Folds the bucket once more up to the cursor, starting from its snapshot.
    async fn projector_at(
        &self,
        bucket: Bucket,
        cursor: Position,
    ) -> Result<ViewsProjector, StoreError> {
        let skipped = self.consumer.parking().skipped();
        let initial =
            load::<EndpointModel>(&self.deps.store, CONSUMER, bucket, MODEL_VERSION).await?;
        let mut after = initial.position;
        // No snapshot should be past the cursor; from one that is, rows would be missing.
        let models = initial.into_states().filter(|_| after <= cursor);
        if models.is_none() {
            after = Position::START;
        }
        let models = models.unwrap_or_default();
        let mut projector = ViewsProjector::resuming_from(models, skipped);
        self.fold_written(bucket, &mut projector, (after, cursor))
            .await?;
        Ok(projector)
    }

    /// Brings a projector up to the cursor. Usage events only make rows, so they are not read.
    async fn fold_written(
        &self,
        bucket: Bucket,
        projector: &mut ViewsProjector,
        (mut after, cursor): (Position, Position),
    ) -> Result<(), StoreError> {
        let store = &self.deps.store;
        while after < cursor {
            let query = PageQuery {
                bucket: Some(bucket),
                after,
                through: cursor,
                excluded_kinds: &[StreamKind::Usage],
                slices_from: Timestamp::MIN,
                limit: PAGE,
            };
            let page = store.read_page(&query).await?;
            for entry in &page {
                if let LogEntry::Record(record) = entry {
                    projector.fold(record);
                }
            }
            after = match page.last() {
                Some(last) if page.len() == PAGE => last.position(),
                _ => cursor,
            };
        }
        Ok(())
    }

    /// Returns the rows that the previous owner would have written for an unparked endpoint.
    async fn rows_of_unparked(&self, record: &Record) -> Result<Vec<RowChange>, StoreError> {
        let (Event::ConsumerUnparked(unparked), Some(key)) = (&record.event, record.endpoint())
        else {
            return Ok(Vec::new());
        };
        if unparked.consumer != CONSUMER {
            return Ok(Vec::new());
        }
        let rows = self.rebuild_rows(&key, record.position).await?;
        Ok(rows.unwrap_or_default())
    }

    /// Commits the batch of each bucket. If that fails, the bucket is reacquired, which starts from the
    /// stored cursor.
    pub(super) async fn write_all(
        &mut self,
        batches: BTreeMap<Bucket, RowBatch>,
    ) -> Result<BTreeMap<Bucket, Position>, StoreError> {
        let this = &*self;
        let commits = batches.into_iter().filter_map(|(bucket, batch)| {
            let owned = this.owned.get(&bucket)?;
            Some(async move { (bucket, this.write(bucket, owned, batch).await) })
        });
        let outcomes = futures::future::join_all(commits).await;
        let mut written = BTreeMap::new();
        for (bucket, outcome) in outcomes {
            match outcome {
                Ok(to) => {
                    written.insert(bucket, to);
                    if let Some(owned) = self.owned.get_mut(&bucket) {
                        owned.cursor = to;
                    }
                    self.consumer.confirm_written(bucket, to);
                }
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                Err(error) => self.reacquire_after_error(bucket, &error),
            }
        }
        Ok(written)
    }

    pub(super) fn reacquire_after_error(&mut self, bucket: Bucket, error: &CommitError) {
        tracing::warn!(%bucket, %error, "cannot write read models, reacquiring the bucket");
        self.reacquire(bucket, false);
        self.mark_failing(bucket, error);
        self.report_failing();
    }

    fn mark_failing(&mut self, bucket: Bucket, error: &CommitError) {
        // A bucket taken by another owner has its rows written there.
        if !matches!(error, CommitError::Fenced { .. }) {
            self.failing.insert(bucket, error.to_string());
        }
    }

    /// Reports in readiness whether rows of our buckets cannot be written.
    pub(super) fn report_failing(&self) {
        let problem = self.failing.first_key_value().map(|(bucket, error)| {
            let count = self.failing.len();
            format!("cannot write the read models of {count} buckets, retrying; bucket {bucket}: {error}")
        });
        self.rows_component.set_problem(problem);
    }

    /// Reacquires a bucket, at once or after a while, which then brings its rows up to the position of
    /// the fold.
    pub(super) fn reacquire(&mut self, bucket: Bucket, at_once: bool) {
        self.release(bucket);
        self.consumer.reacquire_rows(bucket, at_once);
    }

    async fn write(
        &self,
        bucket: Bucket,
        owned: &ProjectedBucket,
        batch: RowBatch,
    ) -> Result<Position, CommitError> {
        let cursor = CursorMove {
            consumer: CONSUMER,
            bucket,
            from: owned.cursor,
            to: batch.to,
        };
        let commit = Commit {
            rows: last_changes(batch.rows),
            cursor: Some(cursor),
            fence: Some(owned.fence.clone()),
            ..Commit::default()
        };
        self.deps.store.commit(commit).await?;
        Ok(batch.to)
    }
}

/// Keeps only the last change of each row.
fn last_changes(rows: Vec<RowChange>) -> Vec<RowChange> {
    let mut newest: BTreeMap<(&'static str, String), RowChange> = BTreeMap::new();
    for row in rows {
        newest.insert((row.model, row.key.clone()), row);
    }
    newest.into_values().collect()
}
