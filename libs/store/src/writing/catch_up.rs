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
    self, CauseColumns, RawColumns, SnapshotPlace, StoredCause, from_columns,
};
use crate::sql::connection::limited;
use crate::sql::postgres::locks::lock_fences;
use crate::writing::known::{BucketHead, Known};

/// Everything that the commits of a batch need to read.
#[derive(Default)]
pub(crate) struct Wants<'a> {
    pub fences: BTreeSet<&'a str>,
    pub causes: BTreeSet<&'a str>,
    pub cursors: BTreeSet<(&'static str, Bucket)>,
    pub snapshots: BTreeSet<(&'a str, Bucket)>,
    pub streams: BTreeSet<&'a StreamName>,
    pub buckets: BTreeSet<Bucket>,
}

/// Takes the remaining locks, and reads what the batch needs and the cache does not have.
pub(crate) async fn know(
    connection: &mut PgConnection,
    limit: Duration,
    wants: &Wants<'_>,
    known: &mut Known,
) -> Result<(), StoreError> {
    known.fences.clear();
    if !wants.fences.is_empty() {
        known.fences = lock_fences(connection, limit, wants.fences.clone()).await?;
    }
    read_places(connection, limit, wants, known).await?;
    known.causes = Some(read_causes(connection, limit, wants).await?);
    known.snapshots = read_snapshots(connection, limit, wants).await?;
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
type Place = (i32, String, i64, Option<i64>, i64, Option<Rest>);

/// As text: prev, type version, time, id, type, actor, data and the previous event's hash.
type Rest = Vec<Option<String>>;

/// Also a literal in the query, so that the planner sees how few rows there are.
const APPENDED_MAX: i64 = 5_000;

/// How many events of other processes are read individually before everything in the read set is looked
/// up again instead: about the break-even point.
fn appended_max(wants: &Wants<'_>) -> i64 {
    let named = (wants.streams.len() + wants.buckets.len()) as i64;
    (4 * named + 16).min(APPENDED_MAX)
}

async fn read_places(
    connection: &mut PgConnection,
    limit: Duration,
    wants: &Wants<'_>,
    known: &mut Known,
) -> Result<(), StoreError> {
    let streams: Vec<&str> = wants.streams.iter().map(|stream| stream.as_str()).collect();
    let new_streams = streams.iter().copied();
    let new_streams: Vec<&str> = new_streams
        .filter(|stream| !known.versions.contains_key(*stream))
        .collect();
    // A cached bucket head was current as of the cached head of the log.
    let seen = wants.buckets.iter().map(|bucket| {
        let known_up_to = known.bucket_heads.get(bucket).map(|_| known.head.0 as i64);
        known_up_to.unwrap_or(0)
    });
    let consumers = wants.cursors.iter().map(|(consumer, _)| *consumer);
    let appended_max = appended_max(wants);
    let reading = sqlx::query_as::<_, Place>(
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
    .bind(known.head.0 as i64)
    .bind(appended_max)
    .bind(numbers(wants.buckets.iter()))
    .bind(seen.collect::<Vec<i64>>())
    .bind(&streams)
    .bind(&new_streams)
    .bind(consumers.collect::<Vec<&str>>())
    .bind(numbers(wants.cursors.iter().map(|(_, bucket)| bucket)))
    .fetch_all(connection);
    let places = limited(limit, reading).await?;
    let head = places.iter().find(|place| place.0 == HEAD);
    let head = head.and_then(|place| place.3).unwrap_or(0);
    if !(0..=appended_max).contains(&(head - known.head.0 as i64)) {
        known.versions.clear();
        known.bucket_heads.clear();
    }
    known.head = Position(head as u64);
    known.cursors = wants
        .cursors
        .iter()
        .map(|cursor| (*cursor, Position::START))
        .collect();
    for place in places {
        take_in(known, wants, place)?;
    }
    Ok(())
}

fn take_in(known: &mut Known, wants: &Wants<'_>, place: Place) -> Result<(), StoreError> {
    let (what, text, bucket, value, more, rest) = place;
    let bucket = Bucket(bucket as u16);
    let position = Position(value.unwrap_or(0) as u64);
    match what {
        HEAD => known.last_time = Some(Timestamp::from_millis(more)),
        FLOOR => known.floor = columns::parse_position(&text)?,
        // Streams and buckets that are not cached are looked up when a batch needs them.
        APPENDED => {
            // Buckets of this batch get their last event by a row of its own.
            if !wants.buckets.contains(&bucket) {
                known.bucket_heads.remove(&bucket);
            }
            if let Some(version) = known.versions.get_mut(&text) {
                *version = (more as u64).max(*version);
            }
        }
        BUCKET_HEAD => {
            let hash = Some(hash_of((bucket, position, text, more), rest)?);
            known
                .bucket_heads
                .insert(bucket, BucketHead { position, hash });
        }
        VERSION => {
            known.versions.insert(text, position.0);
        }
        CURSOR => {
            let cursor = wants
                .cursors
                .iter()
                .find(|(consumer, of)| *consumer == text && *of == bucket);
            if let Some(cursor) = cursor {
                known.cursors.insert(*cursor, position);
            }
        }
        _ => {}
    }
    Ok(())
}

/// Returns the chain hash of a bucket's last event.
fn hash_of(
    (bucket, position, stream, version): (Bucket, Position, String, i64),
    rest: Option<Rest>,
) -> Result<ChainHash, StoreError> {
    let broken = || StoreError::Database(format!("position {position} was read incompletely"));
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
    Ok(EventRow::raw(&from_columns(columns)).hash())
}

fn numbers<'b>(buckets: impl Iterator<Item = &'b Bucket>) -> Vec<i64> {
    buckets.map(|bucket| i64::from(bucket.0)).collect()
}

async fn read_snapshots(
    connection: &mut PgConnection,
    limit: Duration,
    wants: &Wants<'_>,
) -> Result<HashMap<(String, Bucket), Option<SnapshotPlace>>, StoreError> {
    if wants.snapshots.is_empty() {
        return Ok(HashMap::new());
    }
    let consumers = wants.snapshots.iter().map(|(consumer, _)| *consumer);
    let reading = sqlx::query_as::<_, (String, i64, i64, i64)>(
        "SELECT s.consumer, s.bucket, s.version, s.position FROM snapshots AS s \
         JOIN UNNEST($1::TEXT[], $2::BIGINT[]) AS w (consumer, bucket) USING (consumer, bucket)",
    )
    .bind(consumers.collect::<Vec<&str>>())
    .bind(numbers(wants.snapshots.iter().map(|(_, bucket)| bucket)))
    .fetch_all(connection);
    let found = limited(limit, reading).await?;
    let wanted = wants.snapshots.iter();
    let mut places: HashMap<_, _> = wanted
        .map(|(consumer, bucket)| (((*consumer).to_owned(), *bucket), None))
        .collect();
    for (consumer, bucket, version, position) in found {
        let place = columns::snapshot_place_of((version, position));
        places.insert((consumer, Bucket(bucket as u16)), Some(place));
    }
    Ok(places)
}

async fn read_causes(
    connection: &mut PgConnection,
    limit: Duration,
    wants: &Wants<'_>,
) -> Result<BTreeMap<String, StoredCause>, StoreError> {
    if wants.causes.is_empty() {
        return Ok(BTreeMap::new());
    }
    let keys: Vec<&str> = wants.causes.iter().copied().collect();
    let reading = sqlx::query_as::<_, CauseColumns>(
        "SELECT key, body_hash, result, positions, time FROM causes WHERE key = ANY($1)",
    )
    .bind(&keys)
    .fetch_all(connection);
    let found = limited(limit, reading).await?;
    let cause = |(key, body_hash, result, positions, time)| {
        let stored = StoredCause {
            body_hash,
            result,
            positions,
            time,
        };
        (key, stored)
    };
    Ok(found.into_iter().map(cause).collect())
}
