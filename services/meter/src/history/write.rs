//! Claiming buckets, saving, and deleting old rows.
//!
//! Invariant: the row of a bucket in `history_open` has the newest known owner generation. It is written
//! first, and if an older owner cannot write it, nothing of that bucket is written: the newer owner
//! counts the same frames.

use std::collections::{BTreeMap, BTreeSet};

use contract::frame::SourceKind;
use contract::ids::{Bucket, Position};
use store::sql::Connection;

use super::sql::{Arg, Sql};
use super::{postgres, sqlite};
use crate::coverage::Measured;
use crate::open::OpenUsage;
use crate::panes::{InstanceChunk, Pane, PaneKey, SecondRanges};
use crate::ready::ReadyChange;

/// Rows per insert.
const ROWS_PER_INSERT: usize = 100;

/// Most panes deleted per call, so that no call takes long.
const PRUNED_PANES_MAX: i64 = 20_000;

/// What is saved in one transaction. Panes, coverage and changes of buckets that are not in `buckets` are
/// not saved.
#[derive(Default)]
pub(crate) struct SaveBatch {
    pub buckets: BTreeMap<Bucket, BucketSave>,
    pub panes: BTreeMap<PaneKey, Pane>,
    pub covered: BTreeMap<Bucket, SecondRanges>,
    pub measured: BTreeMap<(Bucket, SourceKind), Vec<Measured>>,
    pub instances: Vec<InstanceChunk>,
    pub ready: Vec<ReadyChange>,
    /// The current second.
    pub now: i64,
}

/// The state of a bucket that its owner saves.
#[derive(Clone, Debug)]
pub(crate) struct BucketSave {
    pub generation: u64,
    /// The encoded open minutes.
    pub doc: String,
    /// Changes in ready instances are saved up to here.
    pub ready_through: Position,
}

/// The saved state of a bucket, for its new owner.
#[derive(Debug, Default)]
pub(crate) struct SavedBucket {
    pub open: Option<OpenUsage>,
    pub ready_through: Position,
    /// Panes have been saved only of seconds before this one.
    pub panes_before: i64,
}

const INSERT_OPEN: &str =
    "INSERT INTO history_open (bucket, generation, ready_through, panes_before, doc)";

const CLAIM: &str = " ON CONFLICT (bucket) DO UPDATE SET generation = excluded.generation";
/// A file has one meter, and its log may have been restored to a state with lower generations.
const CLAIM_IN_FILE: &str = "";
const CLAIM_IN_DATABASE: &str = " WHERE history_open.generation < excluded.generation";
const CLAIMED: &str = " RETURNING bucket, ready_through, panes_before, doc";

type ClaimedRow = (i64, i64, i64, String);

/// Fences out owners of earlier generations, and returns what they have saved.
pub(super) async fn claim(
    connection: &mut Connection<'_>,
    generations: &BTreeMap<Bucket, u64>,
) -> sqlx::Result<BTreeMap<Bucket, SavedBucket>> {
    let row = |(bucket, generation): (&Bucket, &u64)| {
        [
            Arg::Number(i64::from(bucket.0)),
            Arg::Number(*generation as i64),
            Arg::Number(0),
            Arg::Number(0),
            Arg::from(""),
        ]
    };
    if generations.is_empty() {
        return Ok(BTreeMap::new());
    }
    let condition = match connection {
        Connection::Sqlite(_) => CLAIM_IN_FILE,
        Connection::Postgres(..) => CLAIM_IN_DATABASE,
    };
    let rows: Vec<ClaimedRow> = Sql::new(INSERT_OPEN)
        .values(generations.iter().map(row))
        .push(CLAIM)
        .push(condition)
        .push(CLAIMED)
        .fetch(connection)
        .await?;
    let saved = |(bucket, ready_through, panes_before, doc): ClaimedRow| {
        let saved = SavedBucket {
            open: decode(bucket, &doc),
            ready_through: Position(ready_through as u64),
            panes_before,
        };
        (Bucket(bucket as u16), saved)
    };
    Ok(rows.into_iter().map(saved).collect())
}

fn decode(bucket: i64, doc: &str) -> Option<OpenUsage> {
    if doc.is_empty() {
        return None;
    }
    match OpenUsage::decode(doc) {
        Ok(open) => Some(open),
        // What was counted is still in the log; only the open minutes are lost.
        Err(error) => {
            tracing::error!(bucket, %error, "failed to decode saved open minutes");
            None
        }
    }
}

/// Whether this batch has been written and only the response was lost. Writes are atomic, so one row
/// tells.
pub(super) async fn is_written(
    connection: &mut Connection<'_>,
    batch: &SaveBatch,
) -> sqlx::Result<bool> {
    let rows: Vec<(i64, String)> = Sql::new("SELECT bucket, doc FROM history_open")
        .fetch(connection)
        .await?;
    let written = |(bucket, doc): &(i64, String)| {
        let save = batch.buckets.get(&Bucket(*bucket as u16));
        save.is_some_and(|save| save.doc == *doc)
    };
    Ok(rows.iter().any(written))
}

/// Writes all buckets that are still ours, and returns those that are not.
pub(super) async fn write(
    connection: &mut Connection<'_>,
    batch: &SaveBatch,
) -> sqlx::Result<BTreeSet<Bucket>> {
    let ours = write_open(connection, batch).await?;
    let is_ours = |bucket: &Bucket| ours.contains(bucket);
    let panes = batch.panes.iter();
    let panes: Vec<[Arg; 5]> = panes
        .filter(|(key, _)| is_ours(&key.endpoint.bucket()))
        .map(|(key, pane)| pane_row(key, pane))
        .collect::<sqlx::Result<_>>()?;
    let mut panes = panes.into_iter().peekable();
    while panes.peek().is_some() {
        Sql::new("INSERT INTO history_panes (endpoint, deployment, second, role, doc)")
            .values(panes.by_ref().take(ROWS_PER_INSERT))
            .execute(connection)
            .await?;
    }
    for (bucket, spans) in batch.covered.iter().filter(|(bucket, _)| is_ours(bucket)) {
        for (start, end) in spans {
            extend_coverage(connection, *bucket, *start, *end).await?;
        }
    }
    for ((bucket, kind), spans) in &batch.measured {
        for span in spans.iter().filter(|_| is_ours(bucket)) {
            extend_measured(connection, *bucket, kind, span).await?;
        }
    }
    let chunks = batch.instances.iter();
    for chunk in chunks.filter(|chunk| is_ours(&chunk.endpoint.bucket())) {
        write_instances(connection, chunk).await?;
    }
    let ready = batch.ready.iter();
    for change in ready.filter(|change| is_ours(&change.endpoint.bucket())) {
        write_ready(connection, change).await?;
    }
    let refused = batch.buckets.keys().filter(|bucket| !is_ours(bucket));
    Ok(refused.copied().collect())
}

/// Returns the buckets that no newer owner has claimed; none can be claimed until the transaction ends.
async fn write_open(
    connection: &mut Connection<'_>,
    batch: &SaveBatch,
) -> sqlx::Result<BTreeSet<Bucket>> {
    let before = panes_before(batch);
    let row = |(bucket, save): (&Bucket, &BucketSave)| {
        [
            Arg::Number(i64::from(bucket.0)),
            Arg::Number(save.generation as i64),
            Arg::Number(save.ready_through.0 as i64),
            Arg::Number(before.get(bucket).copied().unwrap_or(0)),
            Arg::Text(save.doc.clone()),
        ]
    };
    if batch.buckets.is_empty() {
        return Ok(BTreeSet::new());
    }
    let ours: Vec<(i64,)> = Sql::new(INSERT_OPEN)
        .values(batch.buckets.iter().map(row))
        .push(
            " ON CONFLICT (bucket) DO UPDATE SET generation = excluded.generation, \
                 ready_through = excluded.ready_through, doc = excluded.doc, \
                 panes_before = CASE WHEN excluded.panes_before > history_open.panes_before \
                 THEN excluded.panes_before ELSE history_open.panes_before END \
                 WHERE excluded.generation >= history_open.generation RETURNING bucket",
        )
        .fetch(connection)
        .await?;
    Ok(ours.into_iter().map(|(b,)| Bucket(b as u16)).collect())
}

/// Returns the end of the panes in this batch by bucket, limited to now in case a source's clock is ahead.
fn panes_before(batch: &SaveBatch) -> BTreeMap<Bucket, i64> {
    let mut before: BTreeMap<Bucket, i64> = BTreeMap::new();
    let panes = batch.panes.keys();
    let panes = panes.map(|key| (key.endpoint.bucket(), key.second + 1));
    let covered = batch.covered.iter();
    let covered = covered.flat_map(|(bucket, spans)| spans.iter().map(|span| (*bucket, span.1)));
    for (bucket, end) in panes.chain(covered) {
        let latest = before.entry(bucket).or_default();
        *latest = (*latest).max(end.min(batch.now + 1));
    }
    before
}

fn pane_row(key: &PaneKey, pane: &Pane) -> sqlx::Result<[Arg; 5]> {
    let doc = serde_json::to_string(pane).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
    Ok([
        Arg::from(key.endpoint.as_str()),
        Arg::from(key.deployment.as_str()),
        Arg::Number(key.second),
        Arg::from(key.role.as_str()),
        Arg::Text(doc),
    ])
}

/// Adds a span of covered seconds, which usually continues where the last one ended.
async fn extend_coverage(
    connection: &mut Connection<'_>,
    bucket: Bucket,
    start: i64,
    end: i64,
) -> sqlx::Result<()> {
    let bucket = i64::from(bucket.0);
    let extended =
        Sql::new("UPDATE history_coverage SET \"end\" = $3 WHERE bucket = $1 AND \"end\" = $2")
            .with([bucket.into(), start.into(), end.into()])
            .execute(connection)
            .await?;
    if extended == 0 {
        Sql::new(
            "INSERT INTO history_coverage (bucket, start, \"end\") VALUES ($1, $2, $3) \
             ON CONFLICT (bucket, start) DO UPDATE SET \"end\" = excluded.\"end\" \
             WHERE excluded.\"end\" > history_coverage.\"end\"",
        )
        .with([bucket.into(), start.into(), end.into()])
        .execute(connection)
        .await?;
    }
    Ok(())
}

/// The longest row of measured seconds. Their length is read back as an average over the row.
const MEASURED_ROW_SECONDS_MAX: i64 = 600;

/// Adds measured seconds, which usually continue where the last ones ended.
async fn extend_measured(
    connection: &mut Connection<'_>,
    bucket: Bucket,
    kind: &SourceKind,
    span: &Measured,
) -> sqlx::Result<()> {
    let key = || [i64::from(bucket.0).into(), Arg::from(kind.as_str())];
    let [of_bucket, of_kind] = key();
    let extended = Sql::new(
        "UPDATE history_measured SET \"end\" = $4, length_us = length_us + $5 \
         WHERE bucket = $1 AND kind = $2 AND \"end\" = $3 AND partial = $6 AND start >= $7",
    )
    .with([
        of_bucket,
        of_kind,
        span.start.into(),
        span.end.into(),
        (span.length_us as i64).into(),
        i64::from(span.is_partial).into(),
        (span.end - MEASURED_ROW_SECONDS_MAX).into(),
    ])
    .execute(connection)
    .await?;
    if extended == 0 {
        let [of_bucket, of_kind] = key();
        Sql::new(
            "INSERT INTO history_measured (bucket, kind, start, \"end\", partial, length_us) \
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (bucket, kind, start) DO NOTHING",
        )
        .with([
            of_bucket,
            of_kind,
            span.start.into(),
            span.end.into(),
            i64::from(span.is_partial).into(),
            (span.length_us as i64).into(),
        ])
        .execute(connection)
        .await?;
    }
    Ok(())
}

async fn write_instances(
    connection: &mut Connection<'_>,
    chunk: &InstanceChunk,
) -> sqlx::Result<()> {
    let doc = serde_json::to_string(&chunk.seconds);
    let doc = doc.map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
    Sql::new(
        "INSERT INTO history_instances (endpoint, deployment, start, \"end\", doc) \
         VALUES ($1, $2, $3, $4, $5) ON CONFLICT (endpoint, deployment, start) DO NOTHING",
    )
    .with([
        chunk.endpoint.as_str().into(),
        chunk.deployment.as_str().into(),
        chunk.start.into(),
        chunk.end.into(),
        Arg::Text(doc),
    ])
    .execute(connection)
    .await
    .map(|_| ())
}

async fn write_ready(connection: &mut Connection<'_>, change: &ReadyChange) -> sqlx::Result<()> {
    Sql::new(
        "INSERT INTO history_ready (endpoint, deployment, second, instances) \
         VALUES ($1, $2, $3, $4) ON CONFLICT (endpoint, deployment, second) \
         DO UPDATE SET instances = excluded.instances",
    )
    .with([
        change.endpoint.as_str().into(),
        change.deployment.as_str().into(),
        change.second.into(),
        i64::from(change.instances).into(),
    ])
    .execute(connection)
    .await
    .map(|_| ())
}

/// Deletes old rows of all buckets; any meter may do so. What only windows of rules need is older than
/// `windows_before`.
pub(super) async fn prune(
    connection: &mut Connection<'_>,
    before: i64,
    windows_before: i64,
) -> sqlx::Result<()> {
    let panes = match connection {
        Connection::Sqlite(_) => sqlite::PRUNE_PANES,
        Connection::Postgres(..) => postgres::PRUNE_PANES,
    };
    Sql::new(panes)
        .with([before.into(), PRUNED_PANES_MAX.into()])
        .execute(connection)
        .await?;
    Sql::new("DELETE FROM history_coverage WHERE \"end\" < $1")
        .with([before.into()])
        .execute(connection)
        .await?;
    for text in [
        "DELETE FROM history_measured WHERE \"end\" < $1",
        "DELETE FROM history_instances WHERE \"end\" < $1",
    ] {
        Sql::new(text)
            .with([windows_before.into()])
            .execute(connection)
            .await?;
    }
    // Keep the last change before the limit, which determines the count after it.
    Sql::new(
        "DELETE FROM history_ready WHERE second < $1 AND second < \
         (SELECT MAX(newer.second) FROM history_ready AS newer \
         WHERE newer.endpoint = history_ready.endpoint \
         AND newer.deployment = history_ready.deployment AND newer.second <= $1)",
    )
    .with([before.into()])
    .execute(connection)
    .await?;
    Ok(())
}
