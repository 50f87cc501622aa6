//! Brings the writer's cache up to date for a batch of commits when other processes also write the log.
//!
//! Invariants: fences are locked first, in order of their names; then the lock that orders all commits
//! of the store; only then is anything else read. So nothing that was read can change before the batch
//! is written, and positions become visible in order. Stream versions and bucket heads, with their
//! hashes, are cached across batches: what others have appended since is read under the lock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::StreamName;
use contract::time::Timestamp;
use sqlx::PgConnection;

use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::columns::{
    self, IdempotencyKeyColumns, RawColumns, SnapshotPosition, StoredIdempotencyKey, from_columns,
};
use crate::sql::connection::with_timeout;
use crate::sql::postgres::locks::lock_fences;
use crate::writing::cache::{CachedHead, WriterCache};

/// Everything that the commits of a batch need to read.
#[derive(Default)]
pub(crate) struct ReadSet<'a> {
    pub fences: BTreeSet<&'a str>,
    pub idempotency_keys: BTreeSet<&'a str>,
    pub cursors: BTreeSet<(&'static str, Bucket)>,
    pub snapshots: BTreeSet<(&'a str, Bucket)>,
    pub streams: BTreeSet<&'a StreamName>,
    pub buckets: BTreeSet<Bucket>,
}

/// Takes the remaining locks, and reads what the batch needs and the cache does not have.
pub(crate) async fn refresh(
    connection: &mut PgConnection,
    limit: Duration,
    reads: &ReadSet<'_>,
    cache: &mut WriterCache,
) -> Result<(), StoreError> {
    cache.fences.clear();
    if !reads.fences.is_empty() {
        cache.fences = lock_fences(connection, limit, reads.fences.clone()).await?;
    }
    refresh_log_state(connection, limit, reads, cache).await?;
    cache.idempotency_keys = Some(read_idempotency_keys(connection, limit, reads).await?);
    cache.snapshots = read_snapshots(connection, limit, reads).await?;
    Ok(())
}

// The kinds of rows that the query returns, all in one round trip.
const HEAD: i32 = 1;
const FLOOR: i32 = 2;
const APPENDED: i32 = 3;
const BUCKET_HEAD: i32 = 4;
const VERSION: i32 = 5;
const CURSOR: i32 = 6;

/// Kind, name, bucket, position or other value, then the time or stream version; for the last event of a
/// bucket also the other hashed columns.
type StateRow = (i32, String, i64, Option<i64>, i64, Option<TextColumns>);

/// As text: prev, type version, time, id, type, actor, data and the previous event's hash.
type TextColumns = Vec<Option<String>>;

/// Also a literal in the query, so that the planner sees how few rows there are.
const APPENDED_MAX: i64 = 5_000;

/// How many events of other processes are read individually before everything in the read set is looked
/// up again instead: about the break-even point.
fn appended_max(reads: &ReadSet<'_>) -> i64 {
    let named = (reads.streams.len() + reads.buckets.len()) as i64;
    (4 * named + 16).min(APPENDED_MAX)
}

async fn refresh_log_state(
    connection: &mut PgConnection,
    limit: Duration,
    reads: &ReadSet<'_>,
    cache: &mut WriterCache,
) -> Result<(), StoreError> {
    let streams: Vec<&str> = reads.streams.iter().map(|stream| stream.as_str()).collect();
    let new_streams = streams.iter().copied();
    let new_streams: Vec<&str> = new_streams
        .filter(|stream| !cache.versions.contains_key(*stream))
        .collect();
    // A cached bucket head was current as of the cached head of the log.
    let seen = reads.buckets.iter().map(|bucket| {
        let cached_up_to = cache.bucket_heads.get(bucket).map(|_| cache.head.0 as i64);
        cached_up_to.unwrap_or(0)
    });
    let consumers = reads.cursors.iter().map(|(consumer, _)| *consumer);
    let appended_max = appended_max(reads);
    let query = sqlx::query_as::<_, StateRow>(
        "WITH newest AS MATERIALIZED \
         (SELECT position, time FROM events ORDER BY position DESC LIMIT 1), \
         behind AS MATERIALIZED (SELECT COALESCE((SELECT position FROM newest), 0) - $1 \
         NOT BETWEEN 0 AND $2 AS far) \
         SELECT 1, '', 0::BIGINT, position, time, NULL::TEXT[] FROM newest \
         UNION ALL SELECT 2, value, 0, NULL, 0, NULL FROM meta WHERE key = 'next_position' \
         UNION ALL (SELECT 3, stream, bucket, position, version, NULL FROM events \
         WHERE position BETWEEN $1 + 1 AND $1 + $2 AND NOT (SELECT far FROM behind) \
         ORDER BY position LIMIT 5000) \
         UNION ALL SELECT 4, last.stream, w.bucket, last.position, last.version, \
         ARRAY[last.prev::TEXT, last.type_version::TEXT, last.time::TEXT, last.id, last.type, \
         last.actor, last.data, encode(last.prev_hash, 'hex')] \
         FROM UNNEST($3::BIGINT[], $4::BIGINT[]) AS w (bucket, seen) CROSS JOIN LATERAL \
         (SELECT * FROM events WHERE (events.bucket, position) > \
         (w.bucket, CASE WHEN (SELECT far FROM behind) THEN 0 ELSE w.seen END) \
         AND (events.bucket, position) < (w.bucket + 1, 0) \
         ORDER BY events.bucket DESC, position DESC LIMIT 1) AS last \
         UNION ALL SELECT 5, s, 0, (SELECT MAX(version) FROM events WHERE stream = s), 0, NULL \
         FROM UNNEST(CASE WHEN (SELECT far FROM behind) THEN $5::TEXT[] ELSE $6::TEXT[] END) AS s \
         UNION ALL SELECT 6, c.consumer, c.bucket, c.position, 0, NULL FROM cursors AS c \
         JOIN UNNEST($7::TEXT[], $8::BIGINT[]) AS w (consumer, bucket) USING (consumer, bucket)",
    )
    .bind(cache.head.0 as i64)
    .bind(appended_max)
    .bind(numbers(reads.buckets.iter()))
    .bind(seen.collect::<Vec<i64>>())
    .bind(&streams)
    .bind(&new_streams)
    .bind(consumers.collect::<Vec<&str>>())
    .bind(numbers(reads.cursors.iter().map(|(_, bucket)| bucket)))
    .fetch_all(connection);
    let rows = with_timeout(limit, query).await?;
    let head = rows.iter().find(|row| row.0 == HEAD);
    let head = head.and_then(|row| row.3).unwrap_or(0);
    if !(0..=appended_max).contains(&(head - cache.head.0 as i64)) {
        cache.versions.clear();
        cache.bucket_heads.clear();
    }
    cache.head = Position(head as u64);
    cache.cursors = reads
        .cursors
        .iter()
        .map(|cursor| (*cursor, Position::START))
        .collect();
    for row in rows {
        apply_row(cache, reads, row)?;
    }
    Ok(())
}

fn apply_row(
    cache: &mut WriterCache,
    reads: &ReadSet<'_>,
    row: StateRow,
) -> Result<(), StoreError> {
    let (kind, text, bucket, value, extra, rest) = row;
    let bucket = Bucket(bucket as u16);
    let position = Position(value.unwrap_or(0) as u64);
    match kind {
        HEAD => cache.last_time = Some(Timestamp::from_millis(extra)),
        FLOOR => cache.floor = columns::parse_position(&text)?,
        // Streams and buckets that are not cached are looked up when a batch needs them.
        APPENDED => {
            // Buckets of this batch get their last event by a row of its own.
            if !reads.buckets.contains(&bucket) {
                cache.bucket_heads.remove(&bucket);
            }
            if let Some(version) = cache.versions.get_mut(&text) {
                *version = (extra as u64).max(*version);
            }
        }
        BUCKET_HEAD => {
            let hash = Some(hash_of((bucket, position, text, extra), rest)?);
            cache
                .bucket_heads
                .insert(bucket, CachedHead { position, hash });
        }
        VERSION => {
            cache.versions.insert(text, position.0);
        }
        CURSOR => {
            let cursor = reads
                .cursors
                .iter()
                .find(|(consumer, of)| *consumer == text && *of == bucket);
            if let Some(cursor) = cursor {
                cache.cursors.insert(*cursor, position);
            }
        }
        _ => {}
    }
    Ok(())
}

/// Returns the chain hash of a bucket's last event.
fn hash_of(
    (bucket, position, stream, version): (Bucket, Position, String, i64),
    rest: Option<TextColumns>,
) -> Result<ChainHash, StoreError> {
    let broken = || StoreError::database(format!("position {position} was read incompletely"));
    let rest: [Option<String>; 8] = rest
        .and_then(|rest| rest.try_into().ok())
        .ok_or_else(broken)?;
    let [
        prev,
        type_version,
        time,
        id,
        type_name,
        actor,
        data,
        prev_hash,
    ] = rest;
    let text = |text: Option<String>| text.ok_or_else(broken);
    let number = |number: Option<String>| {
        let parsed = number.and_then(|text| text.parse().ok());
        parsed.ok_or_else(broken)
    };
    let prev_hash: Option<ChainHash> = prev_hash.and_then(|hash| hash.parse().ok());
    let columns: RawColumns = (
        position.0 as i64,
        number(prev)?,
        i64::from(bucket.0),
        stream,
        version,
        text(id)?,
        text(type_name)?,
        number(type_version)?,
        number(time)?,
        text(actor)?,
        text(data)?,
        prev_hash.map(|hash| hash.0.to_vec()),
    );
    Ok(EventRow::from_raw(&from_columns(columns)).hash())
}

fn numbers<'b>(buckets: impl Iterator<Item = &'b Bucket>) -> Vec<i64> {
    buckets.map(|bucket| i64::from(bucket.0)).collect()
}

async fn read_snapshots(
    connection: &mut PgConnection,
    limit: Duration,
    reads: &ReadSet<'_>,
) -> Result<HashMap<(String, Bucket), Option<SnapshotPosition>>, StoreError> {
    if reads.snapshots.is_empty() {
        return Ok(HashMap::new());
    }
    let consumers = reads.snapshots.iter().map(|(consumer, _)| *consumer);
    let query = sqlx::query_as::<_, (String, i64, i64, i64)>(
        "SELECT s.consumer, s.bucket, s.version, s.position FROM snapshots AS s \
         JOIN UNNEST($1::TEXT[], $2::BIGINT[]) AS w (consumer, bucket) USING (consumer, bucket)",
    )
    .bind(consumers.collect::<Vec<&str>>())
    .bind(numbers(reads.snapshots.iter().map(|(_, bucket)| bucket)))
    .fetch_all(connection);
    let rows = with_timeout(limit, query).await?;
    let requested = reads.snapshots.iter();
    let mut snapshots: HashMap<_, _> = requested
        .map(|(consumer, bucket)| (((*consumer).to_owned(), *bucket), None))
        .collect();
    for (consumer, bucket, version, position) in rows {
        let position = columns::snapshot_position_of((version, position));
        snapshots.insert((consumer, Bucket(bucket as u16)), Some(position));
    }
    Ok(snapshots)
}

async fn read_idempotency_keys(
    connection: &mut PgConnection,
    limit: Duration,
    reads: &ReadSet<'_>,
) -> Result<BTreeMap<String, StoredIdempotencyKey>, StoreError> {
    if reads.idempotency_keys.is_empty() {
        return Ok(BTreeMap::new());
    }
    let keys: Vec<&str> = reads.idempotency_keys.iter().copied().collect();
    let query = sqlx::query_as::<_, IdempotencyKeyColumns>(
        "SELECT key, body_hash, result, positions, time FROM causes WHERE key = ANY($1)",
    )
    .bind(&keys)
    .fetch_all(connection);
    let rows = with_timeout(limit, query).await?;
    let entry = |(key, body_hash, result, positions, time)| {
        let stored = StoredIdempotencyKey {
            body_hash,
            result,
            positions,
            time,
        };
        (key, stored)
    };
    Ok(rows.into_iter().map(entry).collect())
}
