//! Bulk inserts into PostgreSQL: one statement each, with an array per column.

use std::time::Duration;

use contract::chain::ChainHash;
use contract::ids::Position;
use contract::log::RowChange;
use sqlx::{AssertSqlSafe, PgConnection};

use crate::model::raw::EventRow;
use crate::model::snapshot::{SnapshotChange, SnapshotMeta};
use crate::sql::columns::{
    self, CursorRow, SnapshotParts, StoredIdempotencyKey, UPDATE_CHANGED_ROWS, UPDATE_PART,
    UPDATE_SNAPSHOT,
};
use crate::sql::connection::with_timeout;

/// The notification channel for new positions.
pub(crate) const CHANNEL: &str = "penstock_head";

/// The maximum number of snapshot parts per statement, as a snapshot may be large and statements have a
/// time limit.
const PARTS_MAX: usize = 1_000;

/// Inserts events in order of position, and notifies all processes of the last position on commit.
pub(crate) async fn insert_events(
    connection: &mut PgConnection,
    limit: Duration,
    events: &[EventRow<'_>],
) -> sqlx::Result<()> {
    let numbers = |of: fn(&EventRow<'_>) -> i64| events.iter().map(of).collect::<Vec<i64>>();
    let last = events.last().map_or(0, |event| event.position.0);
    let query = sqlx::query(
        "WITH added AS (INSERT INTO events \
         (position, prev, bucket, stream, version, id, type, type_version, time, actor, data, prev_hash) \
         SELECT * FROM UNNEST($1::BIGINT[], $2::BIGINT[], $3::BIGINT[], $4::TEXT[], $5::BIGINT[], \
         $6::TEXT[], $7::TEXT[], $8::BIGINT[], $9::BIGINT[], $10::TEXT[], $11::TEXT[], \
         $12::BYTEA[])) \
         SELECT pg_notify($13, $14)",
    )
    .bind(numbers(|event| event.position.0 as i64))
    .bind(numbers(|event| event.prev.0 as i64))
    .bind(numbers(|event| i64::from(event.bucket.0)))
    .bind(events.iter().map(|e| e.stream).collect::<Vec<&str>>())
    .bind(numbers(|event| event.version as i64))
    .bind(events.iter().map(|e| e.id.to_string()).collect::<Vec<_>>())
    .bind(events.iter().map(|e| e.type_name).collect::<Vec<&str>>())
    .bind(numbers(|event| i64::from(event.type_version)))
    .bind(numbers(|event| event.time.millis()))
    .bind(events.iter().map(|e| e.actor).collect::<Vec<&str>>())
    .bind(events.iter().map(|e| e.data).collect::<Vec<&str>>())
    .bind(
        events
            .iter()
            .map(|e| e.prev_hash.as_ref().map(|hash| &hash.0[..]))
            .collect::<Vec<Option<&[u8]>>>(),
    )
    .bind(CHANNEL)
    .bind(last.to_string())
    .execute(connection);
    with_timeout(limit, query).await?;
    Ok(())
}

pub(crate) async fn chain_events(
    connection: &mut PgConnection,
    limit: Duration,
    chained: &[(Position, ChainHash)],
) -> sqlx::Result<()> {
    let query = sqlx::query(
        "UPDATE events SET prev_hash = chained.hash \
         FROM UNNEST($1::BIGINT[], $2::BYTEA[]) AS chained (position, hash) \
         WHERE events.position = chained.position AND events.prev_hash IS NULL",
    )
    .bind(chained.iter().map(|c| c.0.0 as i64).collect::<Vec<_>>())
    .bind(chained.iter().map(|c| &c.1.0[..]).collect::<Vec<&[u8]>>())
    .execute(connection);
    with_timeout(limit, query).await?;
    Ok(())
}

/// Returns how many rows were changed.
pub(crate) async fn write_rows(
    connection: &mut PgConnection,
    limit: Duration,
    changes: &[&RowChange],
) -> sqlx::Result<u64> {
    let mut changed = 0;
    let (upserts, deletions): (Vec<&RowChange>, Vec<&RowChange>) =
        changes.iter().partition(|change| change.doc.is_some());
    let texts = |rows: &[&RowChange], of: for<'r> fn(&'r RowChange) -> &'r str| {
        rows.iter()
            .map(|row| of(row).to_owned())
            .collect::<Vec<String>>()
    };
    if !upserts.is_empty() {
        let upsert = format!(
            "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) \
             SELECT * FROM UNNEST($1::TEXT[], $2::TEXT[], $3::TEXT[], $4::TEXT[], $5::BIGINT[], \
             $6::BIGINT[], $7::TEXT[]){UPDATE_CHANGED_ROWS}"
        );
        let query = sqlx::query(AssertSqlSafe(upsert))
            .bind(texts(&upserts, |row| row.model))
            .bind(texts(&upserts, |row| &row.key))
            .bind(texts(&upserts, |row| &row.endpoint))
            .bind(texts(&upserts, |row| &row.deployment))
            .bind(
                upserts
                    .iter()
                    .map(|r| r.position.0 as i64)
                    .collect::<Vec<_>>(),
            )
            .bind(upserts.iter().map(|r| r.time.millis()).collect::<Vec<_>>())
            .bind(texts(&upserts, |row| {
                row.doc.as_deref().unwrap_or_default()
            }))
            .execute(&mut *connection);
        changed += with_timeout(limit, query).await?.rows_affected();
    }
    if !deletions.is_empty() {
        let query = sqlx::query(
            "DELETE FROM rows USING UNNEST($1::TEXT[], $2::TEXT[]) AS gone (model, key) \
             WHERE rows.model = gone.model AND rows.key = gone.key",
        )
        .bind(texts(&deletions, |row| row.model))
        .bind(texts(&deletions, |row| &row.key))
        .execute(&mut *connection);
        changed += with_timeout(limit, query).await?.rows_affected();
    }
    Ok(changed)
}

pub(crate) async fn write_cursors(
    connection: &mut PgConnection,
    limit: Duration,
    cursors: &[CursorRow<'_>],
) -> sqlx::Result<()> {
    let query = sqlx::query(
        "INSERT INTO cursors (consumer, bucket, position) \
         SELECT * FROM UNNEST($1::TEXT[], $2::BIGINT[], $3::BIGINT[]) \
         ON CONFLICT (consumer, bucket) DO UPDATE SET position = excluded.position",
    )
    .bind(cursors.iter().map(|c| c.consumer).collect::<Vec<&str>>())
    .bind(
        cursors
            .iter()
            .map(|c| i64::from(c.bucket.0))
            .collect::<Vec<_>>(),
    )
    .bind(
        cursors
            .iter()
            .map(|c| c.position.0 as i64)
            .collect::<Vec<_>>(),
    )
    .execute(connection);
    with_timeout(limit, query).await?;
    Ok(())
}

pub(crate) async fn write_snapshots(
    connection: &mut PgConnection,
    limit: Duration,
    changes: &[&SnapshotChange],
) -> sqlx::Result<()> {
    let replaced = columns::fully_replaced(changes);
    if !replaced.is_empty() {
        let query = sqlx::query(
            "DELETE FROM snapshot_parts AS part USING UNNEST($1::TEXT[], $2::BIGINT[]) \
             AS gone (consumer, bucket) \
             WHERE part.consumer = gone.consumer AND part.bucket = gone.bucket",
        )
        .bind(consumers(replaced.iter().copied()))
        .bind(buckets(replaced.iter().copied()))
        .execute(&mut *connection);
        with_timeout(limit, query).await?;
    }
    let upsert = format!(
        "INSERT INTO snapshots (consumer, bucket, version, position, event_hash, hash) \
         SELECT * FROM UNNEST($1::TEXT[], $2::BIGINT[], $3::BIGINT[], $4::BIGINT[], $5::BYTEA[], \
         $6::TEXT[]){UPDATE_SNAPSHOT}"
    );
    let metas = || changes.iter().map(|change| &change.meta);
    let query = sqlx::query(AssertSqlSafe(upsert))
        .bind(consumers(metas()))
        .bind(buckets(metas()))
        .bind(metas().map(|m| i64::from(m.version)).collect::<Vec<_>>())
        .bind(metas().map(|m| m.position.0 as i64).collect::<Vec<_>>())
        .bind(
            metas()
                .map(|m| m.event_hash.as_ref().map(|hash| &hash.0[..]))
                .collect::<Vec<Option<&[u8]>>>(),
        )
        .bind(changes.iter().map(|c| c.hash.as_str()).collect::<Vec<_>>())
        .execute(&mut *connection);
    with_timeout(limit, query).await?;
    let parts = SnapshotParts::of(changes);
    for chunk in parts.upserts.chunks(PARTS_MAX) {
        let upsert = format!(
            "INSERT INTO snapshot_parts (consumer, bucket, key, doc) \
             SELECT * FROM UNNEST($1::TEXT[], $2::BIGINT[], $3::TEXT[], $4::TEXT[]){UPDATE_PART}"
        );
        let query = sqlx::query(AssertSqlSafe(upsert))
            .bind(consumers(chunk.iter().map(|(meta, ..)| *meta)))
            .bind(buckets(chunk.iter().map(|(meta, ..)| *meta)))
            .bind(chunk.iter().map(|(_, key, _)| *key).collect::<Vec<_>>())
            .bind(chunk.iter().map(|(.., doc)| *doc).collect::<Vec<_>>())
            .execute(&mut *connection);
        with_timeout(limit, query).await?;
    }
    for chunk in parts.deletions.chunks(PARTS_MAX) {
        let query = sqlx::query(
            "DELETE FROM snapshot_parts AS part \
             USING UNNEST($1::TEXT[], $2::BIGINT[], $3::TEXT[]) AS gone (consumer, bucket, key) \
             WHERE part.consumer = gone.consumer AND part.bucket = gone.bucket \
             AND part.key = gone.key",
        )
        .bind(consumers(chunk.iter().map(|(meta, _)| *meta)))
        .bind(buckets(chunk.iter().map(|(meta, _)| *meta)))
        .bind(chunk.iter().map(|(_, key)| *key).collect::<Vec<_>>())
        .execute(&mut *connection);
        with_timeout(limit, query).await?;
    }
    Ok(())
}

fn consumers<'a>(metas: impl Iterator<Item = &'a SnapshotMeta>) -> Vec<&'a str> {
    metas.map(|meta| meta.consumer.as_str()).collect()
}

fn buckets<'a>(metas: impl Iterator<Item = &'a SnapshotMeta>) -> Vec<i64> {
    metas.map(|meta| i64::from(meta.bucket.0)).collect()
}

pub(crate) async fn write_idempotency_keys(
    connection: &mut PgConnection,
    limit: Duration,
    idempotency_keys: &[(&str, &StoredIdempotencyKey)],
) -> sqlx::Result<()> {
    let query = sqlx::query(
        "INSERT INTO causes (key, body_hash, result, positions, time) \
         SELECT * FROM UNNEST($1::TEXT[], $2::TEXT[], $3::TEXT[], $4::TEXT[], $5::BIGINT[])",
    )
    .bind(
        idempotency_keys
            .iter()
            .map(|(key, _)| *key)
            .collect::<Vec<&str>>(),
    )
    .bind(
        idempotency_keys
            .iter()
            .map(|(_, c)| c.body_hash.as_str())
            .collect::<Vec<&str>>(),
    )
    .bind(
        idempotency_keys
            .iter()
            .map(|(_, c)| c.result.as_deref())
            .collect::<Vec<Option<&str>>>(),
    )
    .bind(
        idempotency_keys
            .iter()
            .map(|(_, c)| c.positions.as_str())
            .collect::<Vec<&str>>(),
    )
    .bind(
        idempotency_keys
            .iter()
            .map(|(_, c)| c.time)
            .collect::<Vec<i64>>(),
    )
    .execute(connection);
    with_timeout(limit, query).await?;
    Ok(())
}
