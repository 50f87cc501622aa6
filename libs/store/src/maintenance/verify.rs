//! Verifies the entire log: order, hash chains, versions, schemas, and that the read models match the log.

use std::collections::BTreeMap;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record, StreamName};
use serde::Serialize;

use crate::log::store::Store;
use crate::maintenance::retained::{self, RetainedEvents};
use crate::maintenance::saved_heads;
use crate::model::chain::BucketHead;
use crate::model::error::StoreError;
use crate::model::kinds::belongs;
use crate::model::raw::{EventRow, Unreadable};
use crate::model::rows::{FoldedRows, PAGE_ROWS_MAX, Projector, Rows, covers};
use crate::sql::{damage, statements};
use crate::writing::restore::POSITIONS_SKIPPED;

/// The maximum number of problems that a report lists; the rest are only counted.
pub const PROBLEMS_MAX: usize = 100;

/// What was checked, and what is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyReport {
    /// The number of events in the log.
    pub events: u64,
    /// The number of streams with events.
    pub streams: u64,
    /// The number of buckets with events.
    pub buckets: u64,
    /// The number of rows in the compared models.
    pub rows: u64,
    /// The position of the last event.
    pub head: Position,
    /// One sentence per problem; empty for a sound store.
    pub problems: Vec<String>,
}

impl VerifyReport {
    /// Whether no problems were found.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Reads the log up to its head and compares the rows of `models` with those of the projector. May run
/// while the store is written: rows and cursors are read in one database snapshot, and each bucket is
/// folded up to its cursor (or to the head, if the consumer has no cursors at all).
///
/// # Errors
///
/// If the store cannot be read at all. Damage is a problem in the report.
pub async fn verify(
    store: &Store,
    projector: &mut dyn Projector,
    models: &[&str],
) -> Result<VerifyReport, StoreError> {
    verify_against(store, projector, models, &[]).await
}

/// The same, and checks that the log still contains these chain heads, which were recorded elsewhere, besides
/// those that are saved next to an SQLite store ([`SavedHeads`](crate::SavedHeads)). This detects a modified
/// last event and a truncated log.
///
/// # Errors
///
/// The same.
pub async fn verify_against(
    store: &Store,
    projector: &mut dyn Projector,
    models: &[&str],
    recorded: &[BucketHead],
) -> Result<VerifyReport, StoreError> {
    match read(store, projector, models, recorded).await {
        Err(StoreError::Damaged(error)) => Ok(VerifyReport {
            problems: vec![damage::describe(store.location(), error.as_str()).await],
            ..VerifyReport::default()
        }),
        read => read,
    }
}

async fn read(
    store: &Store,
    projector: &mut dyn Projector,
    models: &[&str],
    recorded: &[BucketHead],
) -> Result<VerifyReport, StoreError> {
    // Cached data would hide later damage to a file.
    store.archive_set().clear_caches();
    // Before the log: it may grow, and the file with it.
    let saved = saved_heads::read_saved(store).await;
    let heads = saved.iter().flatten().chain(recorded).copied();
    let heads: Vec<BucketHead> = heads.collect();
    let view = ReadView::read(store, projector.consumer(), models).await?;
    let (mut verifier, folded) = loop {
        let mut folded = FoldedRows::new(models);
        let verifier = verify_log(store, &view, projector, &mut folded, &heads).await?;
        if let Some(deferred) = projector.finish() {
            folded.apply(deferred);
            break (verifier, folded);
        }
    };
    if let Err(unreadable) = saved {
        verifier.problem(unreadable);
    }
    verifier.check_recorded();
    verifier.check_tables(store).await?;
    verifier.check_cursors(&view);
    verifier.check_rows(&view.rows, &folded.rows);
    Ok(verifier.report(&view))
}

async fn verify_log(
    store: &Store,
    view: &ReadView,
    projector: &mut dyn Projector,
    folded: &mut FoldedRows,
    recorded: &[BucketHead],
) -> Result<LogVerifier, StoreError> {
    let recorded = recorded
        .iter()
        .map(|recorded| (recorded.position, *recorded));
    let mut verifier = LogVerifier {
        recorded: recorded.collect(),
        retained: view.retained.clone(),
        ..LogVerifier::default()
    };
    let mut after = Position::START;
    while after < view.end() {
        let page = store.read_raw(after, PAGE_ROWS_MAX).await?;
        let Some(last) = page.last() else { break };
        let next = last.position;
        for raw in page.into_iter().filter(|r| r.position <= view.end()) {
            let covered = covers(&view.cursors, raw.bucket, raw.position);
            match verifier.check_event(&raw) {
                Ok(record) if covered => folded.apply(projector.project(&record)),
                Err(unreadable) if covered => projector.skip_unreadable(&unreadable),
                Ok(_) | Err(_) => {}
            }
        }
        after = next;
    }
    verifier.check_retained();
    Ok(verifier)
}

/// Rows, cursors and what the table retains of archived events, read in one database snapshot.
struct ReadView {
    head: Position,
    retained: RetainedEvents,
    cursors: BTreeMap<Bucket, Position>,
    rows: Rows,
}

impl ReadView {
    async fn read(store: &Store, consumer: &str, models: &[&str]) -> Result<Self, StoreError> {
        let mut reader = store.reader().await?;
        let mut snapshot = reader.snapshot().await?;
        let head = statements::head(&mut snapshot.get()).await?;
        let retained = RetainedEvents::read(&mut snapshot.get()).await?;
        let cursors = statements::cursors(&mut snapshot.get(), consumer).await?;
        let mut rows = Rows::new();
        for model in models {
            let mut after: Option<String> = None;
            loop {
                let page = statements::rows_by_key(
                    &mut snapshot.get(),
                    model,
                    after.as_deref(),
                    PAGE_ROWS_MAX,
                )
                .await?;
                let Some(last) = page.last() else { break };
                after = Some(last.key.clone());
                let keyed = page.into_iter().map(|row| (row.key.clone(), row));
                rows.entry((*model).to_owned()).or_default().extend(keyed);
            }
        }
        snapshot.rollback().await?;
        Ok(Self {
            head,
            retained,
            cursors,
            rows,
        })
    }

    /// The last position to verify: that of the log's last event, even if the table has lost it.
    fn end(&self) -> Position {
        self.head.max(self.retained.sealed)
    }
}

/// The last event of a bucket.
#[derive(Clone, Copy, Default)]
struct BucketTail {
    position: Position,
    hash: ChainHash,
    /// The hash of the event before it.
    prev_hash: ChainHash,
}

/// The last event of a stream.
struct StreamTail {
    position: Position,
    version: u64,
    /// Whether it is in the table, as opposed to only in an archive, or was reported as missing.
    is_in_table: bool,
}

/// Checks the log event by event.
#[derive(Default)]
struct LogVerifier {
    events: u64,
    head: Position,
    buckets: BTreeMap<Bucket, BucketTail>,
    /// Recorded heads that were not found yet.
    recorded: BTreeMap<Position, BucketHead>,
    retained: RetainedEvents,
    streams: BTreeMap<String, StreamTail>,
    problems: Vec<String>,
    omitted: u64,
}

impl LogVerifier {
    fn problem(&mut self, problem: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        } else {
            self.omitted += 1;
        }
    }

    /// Checks one event and decodes it.
    fn check_event(&mut self, raw: &RawRecord) -> Result<Record, Box<Unreadable>> {
        let position = raw.position;
        self.events += 1;
        self.check_position(position);
        self.head = position;
        self.check_chain(raw);
        self.check_in_stream(raw);
        let entry = EventRow::from_raw(raw).decode_entry();
        match &entry {
            Ok(record) => {
                self.check_stream(record);
                self.check_bytes(record, raw);
            }
            Err(unreadable) => {
                let error = StoreError::Unreadable {
                    position,
                    detail: unreadable.detail.clone().into(),
                };
                self.problem(error.to_string());
            }
        }
        entry
    }

    /// Checks that positions rise one by one, except where a restored store starts well above what it held.
    fn check_position(&mut self, position: Position) {
        let head = self.head;
        if position <= head {
            self.problem(format!("position {position} does not follow {head}"));
            return;
        }
        let what = match position.0 - head.0 {
            1 | POSITIONS_SKIPPED.. => return,
            2 => format!("the event at {} is", head.0 + 1),
            step => format!("{} events are", step - 1),
        };
        self.problem(format!(
            "position {position} follows {head}: {what} missing"
        ));
    }

    /// Checks that an event of the current type version is stored exactly as it would be encoded now.
    fn check_bytes(&mut self, record: &Record, raw: &RawRecord) {
        if raw.type_version != record.event.version() {
            return;
        }
        if record
            .event
            .data_json()
            .is_ok_and(|again| again != raw.data)
        {
            self.problem(format!(
                "position {}: the data of `{}` differs from how this version writes it",
                record.position,
                record.event.type_name()
            ));
        }
    }

    fn check_chain(&mut self, raw: &RawRecord) {
        let last = self.buckets.get(&raw.bucket).copied().unwrap_or_default();
        let hash = EventRow::from_raw(raw).hash();
        let next = BucketTail {
            position: raw.position,
            hash,
            prev_hash: last.hash,
        };
        self.buckets.insert(raw.bucket, next);
        if let Some(problem) = chain_problem(raw, last) {
            self.problem(problem);
        }
        let recorded = self.recorded.remove(&raw.position);
        if recorded.is_some_and(|recorded| (recorded.bucket, recorded.hash) != (raw.bucket, hash)) {
            self.problem(format!(
                "position {}: its hash does not match the recorded head of bucket {}: it was changed, or an \
                 earlier event was and the chain was recomputed",
                raw.position, raw.bucket
            ));
        }
    }

    /// Reports recorded heads that are not in the log.
    fn check_recorded(&mut self) {
        for recorded in std::mem::take(&mut self.recorded).into_values() {
            let ends = self
                .buckets
                .get(&recorded.bucket)
                .copied()
                .unwrap_or_default();
            let has = match ends.position {
                Position::START => "is empty".to_owned(),
                end => format!("ends at {end}"),
            };
            self.problem(format!(
                "position {}, recorded as the head of bucket {}, is missing; the bucket {has}",
                recorded.position, recorded.bucket
            ));
        }
    }

    /// Checks that versions rise one by one, and that the part of a stream that is in the table has no gaps.
    fn check_in_stream(&mut self, raw: &RawRecord) {
        let position = raw.position;
        let before = self.streams.get(&raw.stream);
        let was_in_table = before.is_some_and(|before| before.is_in_table);
        let before = before.map_or(0, |before| before.version);
        let copied = match position <= self.retained.sealed {
            true => self.retained.take(raw),
            false => Ok(true),
        };
        let is_in_table = copied != Ok(false);
        if let Err(differs) = copied {
            self.problem(differs);
        } else if was_in_table && !is_in_table {
            self.problem(retained::missing(position));
        }
        let tail = StreamTail {
            position,
            version: raw.version,
            is_in_table: was_in_table || is_in_table,
        };
        self.streams.insert(raw.stream.clone(), tail);
        if raw.version != before + 1 {
            self.problem(format!(
                "position {position}: version {} of stream `{}` does not follow {before}",
                raw.version, raw.stream
            ));
        }
    }

    /// Checks that the table has the last event of each stream, and nothing that the archives lack.
    fn check_retained(&mut self) {
        let tails = self.streams.values().filter(|tail| !tail.is_in_table);
        let missing = tails.map(|tail| retained::missing(tail.position));
        let unarchived = std::mem::take(&mut self.retained).unarchived();
        let problems: Vec<String> = missing.chain(unarchived).collect();
        problems
            .into_iter()
            .for_each(|problem| self.problem(problem));
    }

    fn check_stream(&mut self, record: &Record) {
        let stream: &StreamName = &record.stream;
        let bucket = stream.bucket_key().bucket();
        if bucket != record.bucket {
            self.problem(format!(
                "position {}: stream `{stream}` belongs in bucket {bucket}, not {}",
                record.position, record.bucket
            ));
        }
        if !belongs(&record.event, stream) {
            self.problem(format!(
                "position {}: an event `{}` does not belong in stream `{stream}`",
                record.position,
                record.event.type_name()
            ));
        }
    }

    /// Reports damage where nothing was read, such as in snapshots.
    async fn check_tables(&mut self, store: &Store) -> Result<(), StoreError> {
        let mut reader = store.reader().await?;
        let damaged = damage::damaged_tables(&mut reader.get(), damage::TABLES).await?;
        if !damaged.is_empty() {
            let detail = "it has unreadable pages";
            self.problem(damage::describe(store.location(), detail).await);
        }
        Ok(())
    }

    fn check_cursors(&mut self, view: &ReadView) {
        for (bucket, cursor) in &view.cursors {
            if *cursor > view.head {
                self.problem(format!(
                    "the cursor of bucket {bucket} is at {cursor}, past the head {}",
                    view.head
                ));
            }
        }
    }

    fn check_rows(&mut self, stored: &Rows, folded: &Rows) {
        let none = BTreeMap::new();
        for (model, folded) in folded {
            let stored = stored.get(model).unwrap_or(&none);
            for (key, row) in folded {
                match stored.get(key) {
                    None => self.problem(format!("row `{key}` of `{model}` is missing")),
                    Some(other) if other != row => {
                        let what = difference(other, row);
                        self.problem(format!("row `{key}` of `{model}` {what}"));
                    }
                    Some(_) => {}
                }
            }
            for key in stored.keys().filter(|key| !folded.contains_key(*key)) {
                self.problem(format!(
                    "row `{key}` of `{model}` is stored, but the log does not produce it"
                ));
            }
        }
    }

    fn report(mut self, view: &ReadView) -> VerifyReport {
        if self.omitted > 0 {
            let more = format!("and {} more problems", self.omitted);
            self.problems.push(more);
        }
        VerifyReport {
            events: self.events,
            streams: self.streams.len() as u64,
            buckets: self.buckets.len() as u64,
            rows: view.rows.values().map(BTreeMap::len).sum::<usize>() as u64,
            head: view.head,
            problems: self.problems,
        }
    }
}

/// Returns what is wrong between an event and the one before it in its bucket, if anything.
fn chain_problem(raw: &RawRecord, last: BucketTail) -> Option<String> {
    let (at, prev, bucket, before) = (raw.position, raw.prev, raw.bucket, last.position);
    let was_last = raw.prev_hash == Some(last.prev_hash) && before > Position::START;
    if prev != before {
        let why = match prev > before {
            true => format!("the event at {prev} is missing"),
            false if was_last => format!("the event at {before} was inserted"),
            false => format!("the event at {before} was inserted, or this one was changed"),
        };
        return Some(format!(
            "position {at}: prev is {prev}, but the previous event of bucket {bucket} is at {before}: {why}"
        ));
    }
    if raw.prev_hash == Some(last.hash) {
        return None;
    }
    let why = match raw.prev_hash {
        None => {
            return Some(format!(
                "position {at}: the hash of the previous event of bucket {bucket} is missing: the event was \
                 inserted, or the hash was removed"
            ));
        }
        Some(_) if before == Position::START => {
            "events before it are missing, or it was inserted".to_owned()
        }
        Some(_) if was_last => format!("the event at {before} was inserted"),
        Some(_) => {
            format!("the event at {before} was changed, or one between them is missing")
        }
    };
    Some(format!(
        "position {at}: its previous-event hash does not match position {before}, the previous event of \
         bucket {bucket}: {why}"
    ))
}

fn difference(stored: &crate::Row, folded: &crate::Row) -> String {
    let field = |name: &str, a: &dyn std::fmt::Display, b: &dyn std::fmt::Display| {
        format!("has {name} {a}, but the log produces {b}")
    };
    if stored.position != folded.position {
        return field("position", &stored.position, &folded.position);
    }
    if stored.time != folded.time {
        return field("time", &stored.time.millis(), &folded.time.millis());
    }
    if stored.endpoint != folded.endpoint {
        return field("endpoint", &stored.endpoint, &folded.endpoint);
    }
    if stored.deployment != folded.deployment {
        return field("deployment", &stored.deployment, &folded.deployment);
    }
    field("document", &shortened(&stored.doc), &shortened(&folded.doc))
}

/// Truncates a document for display.
fn shortened(doc: &str) -> String {
    const CHARS_MAX: usize = 200;
    if doc.chars().count() <= CHARS_MAX {
        return doc.to_owned();
    }
    let start: String = doc.chars().take(CHARS_MAX).collect();
    format!("{start}…")
}
