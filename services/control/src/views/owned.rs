//! Buckets whose rows this replica writes: how they come and go, and how their rows are brought to
//! where the fold stands.
//!
//! Invariant: rows and their cursor are written in one commit under the bucket's fence; where that
//! fails, the bucket is taken again, which begins at what the store has.

use std::collections::BTreeMap;
use std::time::Duration;

use bus::BusMessage;
use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, RowChange, StreamKind};
use contract::time::Timestamp;
use domain::views::{EndpointModel, MODEL_VERSION, Projection};
use futures::StreamExt;
use runtime::consumer::{load, take_fences};
use runtime::parking::{PARKED, catch_panic, history};
use store::{
    Commit, CommitError, CursorMove, Entry, Fence, PageQuery, Projector, RowQuery, StoreError,
};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{CONSUMER, ViewsConsumer, ViewsProjector};

/// Whose owner writes the rows that belong to no endpoint.
const OWNS_GLOBAL: Bucket = Bucket(0);

/// Records per read, and per commit of rows that a former owner has not written.
const PAGE: usize = 500;

/// Rows about parked endpoints that are looked through; more are not parked by any accident.
const PARKED_MAX: usize = 500;

/// Who was fenced waits for so long before it takes the bucket again: most often it has only not yet
/// heard that the bucket is somebody else's.
const TAKE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Buckets that are read at the same time; others read the log meanwhile, too.
const TAKEN_AT_ONCE: usize = 4;

/// A bucket whose rows this replica writes.
pub(super) struct Owned {
    pub(super) fence: Fence,
    /// The rows are those of the log up to here.
    pub(super) cursor: Position,
}

/// Rows of one bucket that wait for their commit.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) rows: Vec<RowChange>,
    pub(super) to: Position,
}

impl ViewsConsumer {
    pub(super) fn hear(&mut self, ownership: &mut mpsc::Receiver<BusMessage>) {
        while let Ok(message) = ownership.try_recv() {
            self.assigned(&message);
        }
    }

    pub(super) fn assigned(&mut self, message: &BusMessage) {
        match message {
            BusMessage::Record(_) => {}
            BusMessage::Assigned(buckets) => {
                for bucket in with_global(buckets) {
                    if !self.owned.contains_key(&bucket) {
                        self.to_take.insert(bucket, Instant::now());
                    }
                }
            }
            BusMessage::Revoked(buckets) => {
                for bucket in with_global(buckets) {
                    self.to_take.remove(&bucket);
                    self.disown(bucket);
                }
            }
        }
    }

    fn disown(&mut self, bucket: Bucket) {
        // Its next owner counts them.
        let models = self.models.lock();
        for (key, entry) in models.of(bucket) {
            let endpoint = entry.state.endpoint.iter();
            let names = endpoint.flat_map(|endpoint| endpoint.deployments.keys());
            names.for_each(|name| self.uncount(key, name));
        }
        drop(models);
        self.consumer.own(bucket, None);
        self.wanted.end(bucket);
        self.owned.remove(&bucket);
        self.progress.send_modify(|progress| {
            progress.written.remove(&bucket);
        });
    }

    /// Tries to take what is assigned and not owned. What the store does not give now is tried again.
    pub(super) async fn take_due(&mut self) -> Result<(), StoreError> {
        let now = Instant::now();
        let due = self.to_take.iter().filter(|(_, at)| **at <= now);
        let due: Vec<Bucket> = due.map(|(bucket, _)| *bucket).collect();
        if due.is_empty() {
            return Ok(());
        }
        let fences = match take_fences(&self.deps.store, CONSUMER, &due).await {
            Ok(fences) => fences,
            Err(StoreError::Closed) => return Err(StoreError::Closed),
            Err(error) => {
                tracing::warn!(%error, "read models cannot be taken over yet, trying again");
                let again = due
                    .into_iter()
                    .map(|bucket| (bucket, now + TAKE_AGAIN_AFTER));
                self.to_take.extend(again);
                return Ok(());
            }
        };
        let takes = fences.into_iter().map(|(bucket, fence)| {
            let taking = self.take(bucket, fence);
            async move { (bucket, taking.await) }
        });
        let taken: Vec<_> = futures::stream::iter(takes)
            .buffer_unordered(TAKEN_AT_ONCE)
            .collect()
            .await;
        for (bucket, taken) in taken {
            match taken {
                Ok(owned) => {
                    self.to_take.remove(&bucket);
                    self.own(bucket, owned);
                }
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                Err(error) => {
                    tracing::warn!(%bucket, %error, "read models cannot be taken over yet, trying again");
                    self.to_take.insert(bucket, now + TAKE_AGAIN_AFTER);
                }
            }
        }
        if self.progress.borrow().caught_up {
            // The former owner may have ended before it did this.
            self.publish_touched();
            self.react_to_touched().await?;
        }
        Ok(())
    }

    fn own(&mut self, bucket: Bucket, owned: Owned) {
        let cursor = owned.cursor;
        self.consumer.own(bucket, Some(owned.fence.clone()));
        self.consumer.confirm_written(bucket, cursor);
        self.wanted.begin(bucket, cursor);
        self.owned.insert(bucket, owned);
        self.progress.send_modify(|progress| {
            progress.written.insert(bucket, cursor);
        });
        let models = self.models.lock();
        let theirs = models.of(bucket).map(|(key, _)| key.clone());
        self.touched.extend(theirs);
    }

    /// Takes a bucket over that is fenced: brings its rows to where our fold stands.
    async fn take(&self, bucket: Bucket, fence: Fence) -> Result<Owned, CommitError> {
        let store = &self.deps.store;
        let cursor = store.cursor(CONSUMER, bucket).await?;
        let folded = self.folded(bucket);
        let mut owned = Owned { fence, cursor };
        // While the history is read, its end is waited for.
        if self.progress.borrow().caught_up {
            if folded > cursor {
                self.write_missing(bucket, &mut owned, folded).await?;
            }
            self.write_released(bucket, &owned).await?;
        }
        Ok(owned)
    }

    /// The cursor has passed rows of a parked endpoint that were not written. When another life of
    /// this consumer can read it again, all its rows are written anew, and it is no longer listed.
    pub(super) async fn write_released(
        &self,
        bucket: Bucket,
        owned: &Owned,
    ) -> Result<(), CommitError> {
        let query = RowQuery {
            model: PARKED.to_owned(),
            limit: PARKED_MAX,
            ..RowQuery::default()
        };
        for row in self.deps.store.rows(query).await? {
            let Ok(key) = row.endpoint.parse::<EndpointKey>() else {
                continue;
            };
            let ours = row.key == format!("{CONSUMER}/{key}") && key.bucket() == bucket;
            if !ours || self.consumer.parking().is_parked(&key) {
                continue;
            }
            let Some(mut rows) = self.all_rows(&key, owned.cursor).await? else {
                continue;
            };
            tracing::info!(endpoint = %key, "can be digested again, its rows are written anew");
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
                rows: newest_only(rows),
                fence: Some(owned.fence.clone()),
                ..Commit::default()
            };
            self.deps.store.commit(commit).await?;
        }
        Ok(())
    }

    /// All rows of an endpoint, as its history up to a position makes them; none if that cannot be
    /// digested.
    pub(super) async fn all_rows(
        &self,
        key: &EndpointKey,
        to: Position,
    ) -> Result<Option<Vec<RowChange>>, StoreError> {
        let past = history(self.deps.store.clone(), key.clone(), to).await?;
        let (mut fresh, mut rows) = (Projection::default(), Vec::new());
        for entry in past {
            if self.consumer.parking().is_skipped(entry.position()) {
                continue;
            }
            let Entry::Record(record) = entry else {
                return Ok(None);
            };
            match catch_panic(|| fresh.apply(&record)) {
                Ok(changes) => rows.extend(changes),
                Err(_) => return Ok(None),
            }
        }
        Ok(Some(rows))
    }

    /// Rows between the stored cursor and our fold: the bucket is folded once more by itself, from its
    /// snapshot on.
    async fn write_missing(
        &self,
        bucket: Bucket,
        owned: &mut Owned,
        to: Position,
    ) -> Result<(), CommitError> {
        let skipped = self.consumer.parking().skipped();
        let initial =
            load::<EndpointModel>(&self.deps.store, CONSUMER, bucket, MODEL_VERSION).await?;
        let mut after = initial.position;
        // None stands above the cursor; if one did, rows would be missing.
        let models = initial.into_states().filter(|_| after <= owned.cursor);
        if models.is_none() {
            after = Position::START;
        }
        let models = models.unwrap_or_default();
        let mut projector = ViewsProjector::beginning_with(models, skipped);
        self.fold_written(bucket, &mut projector, (after, owned.cursor))
            .await?;
        after = owned.cursor;
        while after < to {
            let page = self
                .deps
                .store
                .read_bucket_entries(bucket, after, PAGE)
                .await?;
            let Some(last) = page.last().map(Entry::position) else {
                return Ok(());
            };
            let mut batch = Batch::default();
            for entry in page.iter().filter(|entry| entry.position() <= to) {
                after = entry.position();
                let Entry::Record(record) = entry else {
                    continue;
                };
                // Rows of a parked endpoint stay as they were before the event.
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

    /// Brings a projector to where the rows are. Usage is nothing but rows, and is not even read.
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
                if let Entry::Record(record) = entry {
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

    /// What the former owner would have written for an endpoint that people wanted back.
    async fn rows_of_unparked(&self, record: &Record) -> Result<Vec<RowChange>, StoreError> {
        let (Event::ConsumerUnparked(unparked), Some(key)) = (&record.event, record.endpoint())
        else {
            return Ok(Vec::new());
        };
        if unparked.consumer != CONSUMER {
            return Ok(Vec::new());
        }
        let rows = self.all_rows(&key, record.position).await?;
        Ok(rows.unwrap_or_default())
    }

    /// One commit for each bucket. Where one fails, the bucket is taken again, which begins at what
    /// the store has.
    pub(super) async fn write_all(
        &mut self,
        batches: BTreeMap<Bucket, Batch>,
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
                Err(error) => self.take_again(bucket, &error),
            }
        }
        Ok(written)
    }

    pub(super) fn take_again(&mut self, bucket: Bucket, error: &CommitError) {
        tracing::warn!(%bucket, %error, "read models cannot be written, taking the bucket again");
        self.retake(bucket, Instant::now() + TAKE_AGAIN_AFTER);
    }

    /// Takes a bucket again at this time, which brings its rows to where the fold stands by then.
    pub(super) fn retake(&mut self, bucket: Bucket, at: Instant) {
        self.disown(bucket);
        self.to_take.insert(bucket, at);
    }

    async fn write(
        &self,
        bucket: Bucket,
        owned: &Owned,
        batch: Batch,
    ) -> Result<Position, CommitError> {
        let cursor = CursorMove {
            consumer: CONSUMER,
            bucket,
            from: owned.cursor,
            to: batch.to,
        };
        let commit = Commit {
            rows: newest_only(batch.rows),
            cursor: Some(cursor),
            fence: Some(owned.fence.clone()),
            ..Commit::default()
        };
        self.deps.store.commit(commit).await?;
        Ok(batch.to)
    }
}

/// The owner of one of the buckets owns the global one with it.
fn with_global(buckets: &[Bucket]) -> Vec<Bucket> {
    let mut buckets = buckets.to_vec();
    if buckets.contains(&OWNS_GLOBAL) {
        buckets.push(Bucket::GLOBAL);
    }
    buckets
}

/// Of several changes of one row only the last one matters.
fn newest_only(rows: Vec<RowChange>) -> Vec<RowChange> {
    let mut newest: BTreeMap<(&'static str, String), RowChange> = BTreeMap::new();
    for row in rows {
        newest.insert((row.model, row.key.clone()), row);
    }
    newest.into_values().collect()
}
