//! Rebuilds read models from the log: the log is folded in memory while finished rows are written, in few
//! large transactions.
//!
//! Invariants: readers see each row either as it was or in its final state, never in between; rows that
//! are already correct are not written; stray rows are deleted last, when all correct rows exist. So an
//! interrupted rebuild does no harm, and the next one writes what is missing. Cursors move after the rows
//! they cover. Everything is written as the owner of every bucket: previous owners are refused from then
//! on, and as soon as one of them takes its bucket back, nothing more is written.
//!
//! Snapshots are not touched: they do not depend on rows, nor rows on them. Each is validated by its hash
//! and version, and only the owner of its consumer's bucket may write it. Only tables with unreadable pages
//! are first replaced by empty ones, be it of rows or of snapshots.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{Record, RowChange};
use contract::time::Timestamp;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle, JoinSet};

use crate::log::store::Store;
use crate::model::commit::{Commit, CursorMove};
use crate::model::error::{CommitError, StoreError};
use crate::model::raw::Unreadable;
use crate::model::rows::{PAGE_ROWS_MAX, Projector, covers};
use crate::sql::damage::{ROW_TABLES, SNAPSHOT_TABLES};
use crate::sql::statements;
use crate::writing::exclusive::{ExclusiveTask, Fences};

/// The maximum number of rows per transaction: enough that few index pages are written more than once, few
/// enough that other writers wait for less than a second.
const CHUNK_ROWS_MAX: usize = 16_000;

/// The same in bytes, for large documents.
const CHUNK_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The number of chunks that may be queued while one is written.
const CHUNKS_AHEAD: usize = 1;

/// Rebuilds the rows of these models from the log, up to their consumer's cursors. If it has none, the
/// entire log is folded and its cursors are set to the end. Events that cannot be decoded are left to the
/// projector. Refused, before it does harm, if the consumer is running and writes. Returns how many rows
/// were changed.
///
/// # Errors
///
/// [`StoreError::Refused`] if the consumer is running and writes, others if the store cannot be read or
/// written. Rows that were written before the error are correct.
pub async fn rebuild(
    store: &Store,
    projector: &mut dyn Projector,
    models: &[&'static str],
) -> Result<usize, StoreError> {
    rebuild_with(store, projector, models, |_| {}).await
}

/// The same; `progress` receives the position up to which the log was folded.
///
/// # Errors
///
/// The same.
pub async fn rebuild_with(
    store: &Store,
    projector: &mut dyn Projector,
    models: &[&'static str],
    mut progress: impl FnMut(Position),
) -> Result<usize, StoreError> {
    let consumer = projector.consumer();
    let fences = take_buckets(store, consumer).await?;
    for tables in [ROW_TABLES, SNAPSHOT_TABLES] {
        store
            .recreate_if_damaged(tables, Some(fences.clone()))
            .await?;
    }
    // They can no longer be moved without taking a fence.
    let cursors = store.cursors(consumer).await?;
    let (mut changed, mut reached) = (0, BTreeMap::new());
    let mut is_complete = false;
    while !is_complete {
        let mut rows = RowCollector::new(models, projector, store, &fences);
        let mut replay = store.replay(Position::START);
        while let Some(page) = replay.next_entries().await {
            let mut last = None;
            for entry in page? {
                let (bucket, position) = position_of(&entry);
                last = Some(position);
                if !covers(&cursors, bucket, position) {
                    continue;
                }
                match &entry {
                    Ok(record) => rows.apply(projector.project(record)).await?,
                    Err(unreadable) => projector.skip_unreadable(unreadable),
                }
                // Skips invalid buckets, which have no owner.
                if bucket <= Bucket::GLOBAL {
                    reached.insert(bucket, position);
                }
            }
            last.map(&mut progress);
        }
        let deferred = projector.finish();
        is_complete = deferred.is_some();
        changed += rows.finish(deferred).await?;
    }
    if store.cursors(consumer).await? != cursors {
        return Err(running_error(consumer));
    }
    if cursors.is_empty() {
        set_cursors(store, consumer, reached, &fences).await?;
    }
    Ok(changed)
}

fn position_of(entry: &Result<Record, Box<Unreadable>>) -> (Bucket, Position) {
    match entry {
        Ok(record) => (record.bucket, record.position),
        Err(unreadable) => (unreadable.bucket, unreadable.position),
    }
}

/// Takes over every bucket from its owner.
async fn take_buckets(store: &Store, consumer: &'static str) -> Result<Arc<Fences>, StoreError> {
    let names = Bucket::all().map(|bucket| fence_name(consumer, bucket));
    let taken = store
        .run_exclusive(ExclusiveTask::TakeFences(names.collect()))
        .await?;
    Ok(Arc::new(Fences {
        fences: taken.fences,
        lost: running_error(consumer),
    }))
}

/// The fence name that every owner of a bucket uses.
fn fence_name(consumer: &str, bucket: Bucket) -> String {
    format!("{consumer}/{bucket}")
}

fn running_error(consumer: &str) -> StoreError {
    StoreError::refused(format!(
        "`{consumer}` wrote read models while they were rebuilt: stop it and rebuild again"
    ))
}

/// Sets the cursors of a consumer that has read nothing yet, so that it does not write the rebuilt rows
/// again.
async fn set_cursors(
    store: &Store,
    consumer: &'static str,
    reached: BTreeMap<Bucket, Position>,
    fences: &Fences,
) -> Result<(), StoreError> {
    // Concurrently, so that they share a transaction.
    let mut moves = JoinSet::new();
    for (bucket, to) in reached {
        let cursor = CursorMove {
            consumer,
            bucket,
            from: Position::START,
            to,
        };
        let name = fence_name(consumer, bucket);
        let fence = fences.fences.iter().find(|fence| fence.name == name);
        let commit = Commit {
            cursor: Some(cursor),
            fence: fence.cloned(),
            ..Commit::default()
        };
        let store = store.clone();
        moves.spawn(async move { store.commit(commit).await });
    }
    while let Some(moved) = moves.join_next().await {
        match moved.map_err(writer_failed)? {
            Ok(_) => {}
            Err(CommitError::Store(error)) => return Err(error),
            Err(_) => return Err(running_error(consumer)),
        }
    }
    Ok(())
}

/// Collects the rows of all models and sends finished ones to the writer.
struct RowCollector {
    store: Store,
    models: HashMap<&'static str, ModelRows>,
    chunk: Chunk,
    fences: Arc<Fences>,
    writer: ChunkWriter,
}

/// The rows of one model.
#[derive(Default)]
struct ModelRows {
    is_written_once: bool,
    /// Rows that later events may still change.
    pending: BTreeMap<String, RowChange>,
    /// The keys of rows that were sent to the writer.
    sent: HashSet<String>,
}

impl RowCollector {
    fn new(
        models: &[&'static str],
        projector: &dyn Projector,
        store: &Store,
        fences: &Arc<Fences>,
    ) -> Self {
        let models = models.iter().map(|model| {
            let rows = ModelRows {
                is_written_once: projector.is_written_once(model),
                ..ModelRows::default()
            };
            (*model, rows)
        });
        Self {
            store: store.clone(),
            models: models.collect(),
            chunk: Chunk::default(),
            fences: fences.clone(),
            writer: ChunkWriter::start(store, fences),
        }
    }

    async fn apply(&mut self, changes: Vec<RowChange>) -> Result<(), StoreError> {
        for change in changes {
            let Some(model) = self.models.get_mut(change.model) else {
                continue;
            };
            if model.is_written_once {
                self.send(change).await?;
            } else if change.doc.is_some() {
                model.pending.insert(change.key.clone(), change);
            } else {
                model.pending.remove(&change.key);
            }
        }
        Ok(())
    }

    async fn send(&mut self, change: RowChange) -> Result<(), StoreError> {
        if let Some(model) = self.models.get_mut(change.model) {
            match change.doc.is_some() {
                true => model.sent.insert(change.key.clone()),
                false => model.sent.remove(&change.key),
            };
        }
        if let Some(full) = self.chunk.add(change) {
            self.writer.write(full).await?;
        }
        Ok(())
    }

    /// Writes the remaining rows, then deletes rows that the log does not produce. Does neither if the
    /// projector could not finish.
    async fn finish(mut self, deferred: Option<Vec<RowChange>>) -> Result<usize, StoreError> {
        let Some(deferred) = deferred else {
            return self.writer.finish().await;
        };
        self.apply(deferred).await?;
        let models: Vec<&'static str> = self.models.keys().copied().collect();
        for model in &models {
            let pending = self.models.get_mut(model);
            let pending = pending.map(|model| std::mem::take(&mut model.pending));
            for change in pending.into_iter().flat_map(BTreeMap::into_values) {
                self.send(change).await?;
            }
        }
        self.writer.write(self.chunk.take()).await?;
        let written = self.writer.finish().await?;
        let mut writer = ChunkWriter::start(&self.store, &self.fences);
        for (model, rows) in &self.models {
            for chunk in strays(&self.store, model, &rows.sent).await? {
                writer.write(chunk).await?;
            }
        }
        Ok(written + writer.finish().await?)
    }
}

/// Returns deletions of a model's stored rows other than those with these keys, all of which are stored.
async fn strays(
    store: &Store,
    model: &'static str,
    keys: &HashSet<String>,
) -> Result<Vec<Vec<RowChange>>, StoreError> {
    let mut reader = store.reader().await?;
    if statements::count_rows(&mut reader.get(), model).await? == keys.len() {
        return Ok(Vec::new());
    }
    let (mut chunk, mut full) = (Chunk::default(), Vec::new());
    let mut after = String::new();
    loop {
        let page = statements::row_keys(&mut reader.get(), model, &after, PAGE_ROWS_MAX).await?;
        let Some(last) = page.last() else { break };
        after.clone_from(last);
        for key in page.into_iter().filter(|key| !keys.contains(key)) {
            full.extend(chunk.add(deletion(model, key)));
        }
    }
    full.push(chunk.take());
    Ok(full)
}

fn deletion(model: &'static str, key: String) -> RowChange {
    RowChange {
        model,
        key,
        endpoint: String::new(),
        deployment: String::new(),
        position: Position::START,
        time: Timestamp::default(),
        doc: None,
    }
}

/// The changes of one transaction.
#[derive(Default)]
struct Chunk {
    changes: Vec<RowChange>,
    bytes: usize,
}

impl Chunk {
    /// Adds a change and returns all changes if the chunk is full.
    fn add(&mut self, change: RowChange) -> Option<Vec<RowChange>> {
        self.bytes += change.doc.as_ref().map_or(0, String::len);
        self.changes.push(change);
        let full = self.changes.len() >= CHUNK_ROWS_MAX || self.bytes >= CHUNK_BYTES_MAX;
        full.then(|| self.take())
    }

    fn take(&mut self) -> Vec<RowChange> {
        std::mem::take(self).changes
    }
}

/// Writes chunks one by one while the next one is built.
struct ChunkWriter {
    chunks: mpsc::Sender<Vec<RowChange>>,
    task: JoinHandle<Result<usize, StoreError>>,
}

impl ChunkWriter {
    fn start(store: &Store, fences: &Arc<Fences>) -> Self {
        let (chunks, mut queue) = mpsc::channel(CHUNKS_AHEAD);
        let (store, fences) = (store.clone(), fences.clone());
        let task = tokio::spawn(async move {
            let mut changed = 0;
            while let Some(chunk) = queue.recv().await {
                let output = store
                    .run_exclusive(ExclusiveTask::WriteRows(
                        last_changes(chunk),
                        fences.clone(),
                    ))
                    .await?;
                changed += output.number.unwrap_or(0) as usize;
            }
            Ok(changed)
        });
        Self { chunks, task }
    }

    async fn write(&mut self, chunk: Vec<RowChange>) -> Result<(), StoreError> {
        if chunk.is_empty() || self.chunks.send(chunk).await.is_ok() {
            return Ok(());
        }
        // The task ended early, so it failed.
        match (&mut self.task).await {
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) => Err(StoreError::Closed),
            Err(error) => Err(writer_failed(error)),
        }
    }

    async fn finish(self) -> Result<usize, StoreError> {
        drop(self.chunks);
        self.task.await.map_err(writer_failed)?
    }
}

fn writer_failed(error: JoinError) -> StoreError {
    StoreError::database(format!("rebuilt rows were not written: {error}")).caused_by(error)
}

/// Sorts changes by model and key, and keeps only the last change of each row.
fn last_changes(mut changes: Vec<RowChange>) -> Vec<RowChange> {
    // The sort is stable, so the last change of each row comes last; reversed, it is the one that is kept.
    changes.sort_by(|a, b| (a.model, &a.key).cmp(&(b.model, &b.key)));
    changes.reverse();
    changes.dedup_by(|a, b| (a.model, &a.key) == (b.model, &b.key));
    changes.reverse();
    changes
}
