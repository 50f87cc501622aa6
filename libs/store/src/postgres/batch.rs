//! What a batch of commits has to know of the log, when other processes write it as well.
//!
//! Invariants: fences are locked first, in order of their names; then the one lock that orders all
//! commits of the store is taken; only then is anything else read. So nothing that was read can have
//! changed when the batch is written, and positions become visible in order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use contract::ids::{Bucket, Position};
use contract::log::StreamName;
use contract::time::Timestamp;
use sqlx::PgConnection;

use crate::StoreError;
use crate::connection::limited;
use crate::known::Known;
use crate::statements::{self, CauseColumns, StoredCause};

/// `penstock` in ASCII: whoever holds it may give positions.
const COMMIT_LOCK: i64 = 0x7065_6e73_746f_636b;

/// What the commits of a batch name.
#[derive(Default)]
pub(crate) struct Wants<'a> {
    pub fences: BTreeSet<&'a str>,
    pub causes: BTreeSet<&'a str>,
    pub cursors: BTreeSet<(&'static str, Bucket)>,
    pub streams: BTreeSet<&'a StreamName>,
    pub buckets: BTreeSet<Bucket>,
}

/// Takes the locks, and reads all that was named.
pub(crate) async fn know(
    connection: &mut PgConnection,
    limit: Duration,
    wants: &Wants<'_>,
) -> Result<Known, StoreError> {
    let mut known = Known {
        fences: lock_fences(connection, limit, wants).await?,
        ..Known::default()
    };
    lock_commits(connection, limit).await?;
    read_places(connection, limit, wants, &mut known).await?;
    known.causes = Some(read_causes(connection, limit, wants).await?);
    Ok(known)
}

/// Until the end of the transaction no other process writes events, cursors or causes.
pub(crate) async fn lock_commits(
    connection: &mut PgConnection,
    limit: Duration,
) -> sqlx::Result<()> {
    let locking = sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(COMMIT_LOCK)
        .execute(connection);
    limited(limit, locking).await.map(|_| ())
}

/// Until the end of the transaction nobody can take what these fences stand for.
async fn lock_fences(
    connection: &mut PgConnection,
    limit: Duration,
    wants: &Wants<'_>,
) -> Result<HashMap<String, u64>, StoreError> {
    if wants.fences.is_empty() {
        return Ok(HashMap::new());
    }
    let names: Vec<&str> = wants.fences.iter().copied().collect();
    let reading = sqlx::query_as::<_, (String, i64)>(
        "SELECT name, generation FROM fences WHERE name = ANY($1) ORDER BY name FOR SHARE",
    )
    .bind(&names)
    .fetch_all(connection);
    let stored = limited(limit, reading).await?;
    let mut fences: HashMap<String, u64> =
        names.into_iter().map(|name| (name.to_owned(), 0)).collect();
    let stored = stored.into_iter().map(|(name, at)| (name, at as u64));
    fences.extend(stored);
    Ok(fences)
}

/// The kinds of rows that one round trip brings.
const HEAD: i32 = 1;
const FLOOR: i32 = 2;
const LAST_TIME: i32 = 3;
const BUCKET_HEAD: i32 = 4;
const VERSION: i32 = 5;
const CURSOR: i32 = 6;

async fn read_places(
    connection: &mut PgConnection,
    limit: Duration,
    wants: &Wants<'_>,
    known: &mut Known,
) -> Result<(), StoreError> {
    let streams: Vec<&str> = wants.streams.iter().map(|stream| stream.as_str()).collect();
    let reading = sqlx::query_as::<_, (i32, String, i64, Option<i64>)>(
        "SELECT 1, '', 0::BIGINT, MAX(position) FROM events \
         UNION ALL SELECT 2, value, 0, NULL FROM meta WHERE key = 'next_position' \
         UNION ALL (SELECT 3, '', 0, time FROM events ORDER BY position DESC LIMIT 1) \
         UNION ALL SELECT 4, '', b, (SELECT MAX(position) FROM events WHERE bucket = b) \
         FROM UNNEST($1::BIGINT[]) AS b \
         UNION ALL SELECT 5, s, 0, (SELECT MAX(version) FROM events WHERE stream = s) \
         FROM UNNEST($2::TEXT[]) AS s \
         UNION ALL SELECT 6, c.consumer, c.bucket, c.position FROM cursors AS c \
         JOIN UNNEST($3::TEXT[], $4::BIGINT[]) AS w (consumer, bucket) USING (consumer, bucket)",
    )
    .bind(numbers(wants.buckets.iter()))
    .bind(&streams)
    .bind(
        wants
            .cursors
            .iter()
            .map(|(consumer, _)| *consumer)
            .collect::<Vec<&str>>(),
    )
    .bind(numbers(wants.cursors.iter().map(|(_, bucket)| bucket)))
    .fetch_all(connection);
    for stream in &wants.streams {
        known.versions.insert((*stream).clone(), 0);
    }
    for cursor in &wants.cursors {
        known.cursors.insert(*cursor, Position::START);
    }
    for (what, text, bucket, value) in limited(limit, reading).await? {
        let bucket = Bucket(bucket as u16);
        let Some(value) = value else {
            if what == FLOOR {
                known.floor = statements::parse_position(&text)?;
            }
            continue;
        };
        let position = Position(value as u64);
        match what {
            HEAD => known.head = position,
            LAST_TIME => known.last_time = Some(Timestamp::from_millis(value)),
            BUCKET_HEAD => {
                known.bucket_heads.insert(bucket, position);
            }
            VERSION => {
                let stream = wants.streams.iter().find(|stream| stream.as_str() == text);
                if let Some(stream) = stream {
                    known.versions.insert((*stream).clone(), value as u64);
                }
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
    }
    Ok(())
}

fn numbers<'b>(buckets: impl Iterator<Item = &'b Bucket>) -> Vec<i64> {
    buckets.map(|bucket| i64::from(bucket.0)).collect()
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
