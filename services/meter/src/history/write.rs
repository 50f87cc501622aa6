//! Taking over what was saved, saving, and deleting what is old.
//!
//! Invariant: the row of a bucket in `history_open` carries the newest ownership that has been seen.
//! It is written first, and where an older owner cannot write it, nothing of that bucket is written:
//! the newer owner counts the same frames.

use std::collections::{BTreeMap, BTreeSet};

use contract::ids::{Bucket, Position};
use store::sql::Connection;

use super::sql::{Arg, Sql};
use super::{postgres, sqlite};
use crate::open::Open;
use crate::panes::{Pane, Place, Spans};
use crate::ready::ReadyChange;

/// Rows per insert.
const CHUNK: usize = 100;

/// Old panes that one call deletes at most, so that none takes long.
const PRUNED_MAX: i64 = 20_000;

/// What is saved together. Panes, coverage and changes of buckets that `open` does not name are not
/// saved.
#[derive(Default)]
pub(crate) struct Save {
    pub open: BTreeMap<Bucket, Owned>,
    pub panes: BTreeMap<Place, Pane>,
    pub covered: BTreeMap<Bucket, Spans>,
    pub ready: Vec<ReadyChange>,
    /// The second in which it is saved.
    pub now: i64,
}

/// What an owner saves of a bucket.
#[derive(Clone, Debug)]
pub(crate) struct Owned {
    pub generation: u64,
    /// The open minute.
    pub doc: String,
    /// Changes of what is ready are saved up to here.
    pub ready_through: Position,
}

/// What was saved of a bucket, for its new owner.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    pub open: Option<Open>,
    pub ready_through: Position,
    /// Later seconds have no pane yet.
    pub panes_before: i64,
}

const INSERT_OPEN: &str =
    "INSERT INTO history_open (bucket, generation, ready_through, panes_before, doc)";

const CLAIM: &str = " ON CONFLICT (bucket) DO UPDATE SET generation = excluded.generation";
/// A file has one meter. Its log may have been put back to where generations were lower.
const CLAIM_IN_FILE: &str = "";
const CLAIM_IN_DATABASE: &str = " WHERE history_open.generation < excluded.generation";
const CLAIMED: &str = " RETURNING bucket, ready_through, panes_before, doc";

type ClaimedRow = (i64, i64, i64, String);

/// Keeps all owners of earlier generations from writing, and reads what they have saved.
pub(super) async fn claim(
    connection: &mut Connection<'_>,
    generations: &BTreeMap<Bucket, u64>,
) -> sqlx::Result<BTreeMap<Bucket, Saved>> {
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
    let who = match connection {
        Connection::Sqlite(_) => CLAIM_IN_FILE,
        Connection::Postgres(..) => CLAIM_IN_DATABASE,
    };
    let rows: Vec<ClaimedRow> = Sql::new(INSERT_OPEN)
        .values(generations.iter().map(row))
        .push(CLAIM)
        .push(who)
        .push(CLAIMED)
        .fetch(connection)
        .await?;
    let saved = |(bucket, ready_through, panes_before, doc): ClaimedRow| {
        let saved = Saved {
            open: decode(bucket, &doc),
            ready_through: Position(ready_through as u64),
            panes_before,
        };
        (Bucket(bucket as u16), saved)
    };
    Ok(rows.into_iter().map(saved).collect())
}

fn decode(bucket: i64, doc: &str) -> Option<Open> {
    if doc.is_empty() {
        return None;
    }
    match Open::decode(doc) {
        Ok(open) => Some(open),
        // The log still says what was counted; only the open minute is lost.
        Err(error) => {
            tracing::error!(bucket, %error, "a saved minute cannot be read");
            None
        }
    }
}

/// Whether this very save has been written: its answer may have been lost. It was whole, or not at all.
pub(super) async fn is_written(connection: &mut Connection<'_>, save: &Save) -> sqlx::Result<bool> {
    let rows: Vec<(i64, String)> = Sql::new("SELECT bucket, doc FROM history_open")
        .fetch(connection)
        .await?;
    let written = |(bucket, doc): &(i64, String)| {
        let owned = save.open.get(&Bucket(*bucket as u16));
        owned.is_some_and(|owned| owned.doc == *doc)
    };
    Ok(rows.iter().any(written))
}

/// Writes all that is still ours to write; gives the buckets that are not.
pub(super) async fn write(
    connection: &mut Connection<'_>,
    save: &Save,
) -> sqlx::Result<BTreeSet<Bucket>> {
    let ours = write_open(connection, save).await?;
    let is_ours = |bucket: &Bucket| ours.contains(bucket);
    let panes = save.panes.iter();
    let panes: Vec<[Arg; 5]> = panes
        .filter(|(place, _)| is_ours(&place.endpoint.bucket()))
        .map(|(place, pane)| pane_row(place, pane))
        .collect::<sqlx::Result<_>>()?;
    let mut panes = panes.into_iter().peekable();
    while panes.peek().is_some() {
        Sql::new("INSERT INTO history_panes (endpoint, deployment, second, role, doc)")
            .values(panes.by_ref().take(CHUNK))
            .execute(connection)
            .await?;
    }
    for (bucket, spans) in save.covered.iter().filter(|(bucket, _)| is_ours(bucket)) {
        for (start, end) in spans {
            cover(connection, *bucket, *start, *end).await?;
        }
    }
    let ready = save.ready.iter();
    for change in ready.filter(|change| is_ours(&change.endpoint.bucket())) {
        write_ready(connection, change).await?;
    }
    let refused = save.open.keys().filter(|bucket| !is_ours(bucket));
    Ok(refused.copied().collect())
}

/// Gives the buckets that no newer owner has claimed; nobody claims them until the transaction ends.
async fn write_open(
    connection: &mut Connection<'_>,
    save: &Save,
) -> sqlx::Result<BTreeSet<Bucket>> {
    let before = panes_before(save);
    let row = |(bucket, owned): (&Bucket, &Owned)| {
        [
            Arg::Number(i64::from(bucket.0)),
            Arg::Number(owned.generation as i64),
            Arg::Number(owned.ready_through.0 as i64),
            Arg::Number(before.get(bucket).copied().unwrap_or(0)),
            Arg::Text(owned.doc.clone()),
        ]
    };
    if save.open.is_empty() {
        return Ok(BTreeSet::new());
    }
    let ours: Vec<(i64,)> = Sql::new(INSERT_OPEN)
        .values(save.open.iter().map(row))
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

/// The end of what this save holds of each bucket. A source whose clock is ahead does not count.
fn panes_before(save: &Save) -> BTreeMap<Bucket, i64> {
    let mut before: BTreeMap<Bucket, i64> = BTreeMap::new();
    let panes = save.panes.keys();
    let panes = panes.map(|place| (place.endpoint.bucket(), place.second + 1));
    let covered = save.covered.iter();
    let covered = covered.flat_map(|(bucket, spans)| spans.iter().map(|span| (*bucket, span.1)));
    for (bucket, end) in panes.chain(covered) {
        let known = before.entry(bucket).or_default();
        *known = (*known).max(end.min(save.now + 1));
    }
    before
}

fn pane_row(place: &Place, pane: &Pane) -> sqlx::Result<[Arg; 5]> {
    let doc = serde_json::to_string(pane).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
    Ok([
        Arg::from(place.endpoint.as_str()),
        Arg::from(place.deployment.as_str()),
        Arg::Number(place.second),
        Arg::from(place.role.as_str()),
        Arg::Text(doc),
    ])
}

/// Adds a span of covered seconds; most often it goes on where the last one ended.
async fn cover(
    connection: &mut Connection<'_>,
    bucket: Bucket,
    start: i64,
    end: i64,
) -> sqlx::Result<()> {
    let bucket = i64::from(bucket.0);
    let longer =
        Sql::new("UPDATE history_coverage SET \"end\" = $3 WHERE bucket = $1 AND \"end\" = $2")
            .with([bucket.into(), start.into(), end.into()])
            .execute(connection)
            .await?;
    if longer == 0 {
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

/// Any meter may delete what is old, of all buckets.
pub(super) async fn prune(connection: &mut Connection<'_>, before: i64) -> sqlx::Result<()> {
    let panes = match connection {
        Connection::Sqlite(_) => sqlite::PRUNE_PANES,
        Connection::Postgres(..) => postgres::PRUNE_PANES,
    };
    Sql::new(panes)
        .with([before.into(), PRUNED_MAX.into()])
        .execute(connection)
        .await?;
    Sql::new("DELETE FROM history_coverage WHERE \"end\" < $1")
        .with([before.into()])
        .execute(connection)
        .await?;
    // The last change before the limit still says how many are ready after it.
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
