//! All portable SQL, with its bindings. One text for both databases: `$n`, portable types, upserts that
//! name their columns. What has to differ is in `sqlite` and `postgres`.

mod archives;
mod chain;
mod models;
mod snapshots;

use std::collections::BTreeMap;

use contract::ids::{Bucket, Position};
use contract::log::RawRecord;
use contract::time::Timestamp;

use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::columns::{
    CursorRow, IdempotencyKeyColumns, RawColumns, StoredIdempotencyKey, from_columns,
    parse_position,
};
use crate::sql::connection::{Connection, execute, run};
use crate::sql::{postgres, sqlite};

pub(crate) use archives::*;
pub(crate) use chain::*;
pub(crate) use models::*;
pub(crate) use snapshots::*;

pub(crate) type Result<T> = std::result::Result<T, StoreError>;

pub(crate) async fn table_exists(connection: &mut Connection<'_>, table: &str) -> Result<bool> {
    let text = match connection {
        Connection::Sqlite(_) => sqlite::TABLE_EXISTS,
        Connection::Postgres(..) => postgres::TABLE_EXISTS,
    };
    let tables = run!(connection, query_scalar<i64>.fetch_one, text, table)?;
    Ok(tables > 0)
}

pub(crate) async fn format(connection: &mut Connection<'_>) -> Result<Option<String>> {
    if !table_exists(connection, "meta").await? {
        return Ok(None);
    }
    meta(connection, "format").await
}

pub(crate) async fn meta(connection: &mut Connection<'_>, key: &str) -> Result<Option<String>> {
    Ok(run!(
        connection,
        query_scalar<String>.fetch_optional,
        "SELECT value FROM meta WHERE key = $1",
        key
    )?)
}

pub(crate) async fn set_meta_once(
    connection: &mut Connection<'_>,
    key: &str,
    value: &str,
) -> Result<()> {
    execute!(
        connection,
        "INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING",
        key,
        value
    )?;
    Ok(())
}

pub(crate) async fn set_meta(
    connection: &mut Connection<'_>,
    key: &str,
    value: &str,
) -> Result<()> {
    execute!(
        connection,
        "INSERT INTO meta (key, value) VALUES ($1, $2) \
         ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        key,
        value
    )?;
    Ok(())
}

pub(crate) async fn remove_meta(connection: &mut Connection<'_>, key: &str) -> Result<()> {
    execute!(connection, "DELETE FROM meta WHERE key = $1", key)?;
    Ok(())
}

const NEXT_POSITION: &str = "next_position";

/// Returns the lowest position that the next event may get, if one was set.
pub(crate) async fn next_position(connection: &mut Connection<'_>) -> Result<Option<Position>> {
    let stored = meta(connection, NEXT_POSITION).await?;
    stored.as_deref().map(parse_position).transpose()
}

/// Raises the lowest position that the next event may get. Must be called while nobody else writes.
pub(crate) async fn set_next_position(
    connection: &mut Connection<'_>,
    next: Position,
) -> Result<()> {
    if next_position(connection)
        .await?
        .is_some_and(|at| at >= next)
    {
        return Ok(());
    }
    set_meta(connection, NEXT_POSITION, &next.0.to_string()).await
}

pub(crate) async fn head(connection: &mut Connection<'_>) -> Result<Position> {
    let position = run!(
        connection,
        query_scalar<i64>.fetch_one,
        "SELECT COALESCE(MAX(position), 0) FROM events"
    )?;
    Ok(Position(position as u64))
}

/// Returns the highest position of a bucket; [`Position::START`] for an empty one.
pub(crate) async fn bucket_head(
    connection: &mut Connection<'_>,
    bucket: Bucket,
) -> Result<Position> {
    let head = run!(
        connection,
        query_scalar<i64>.fetch_one,
        "SELECT COALESCE(MAX(position), 0) FROM events WHERE bucket = $1",
        i64::from(bucket.0)
    )?;
    Ok(Position(head as u64))
}

/// Returns the highest position of each non-empty bucket.
pub(crate) async fn bucket_heads(
    connection: &mut Connection<'_>,
) -> Result<BTreeMap<Bucket, Position>> {
    let mut heads = BTreeMap::new();
    for bucket in Bucket::all() {
        let head = bucket_head(connection, bucket).await?;
        if head > Position::START {
            heads.insert(bucket, head);
        }
    }
    Ok(heads)
}

/// Returns the time of the log's last event, which ages idempotency keys.
pub(crate) async fn last_time(connection: &mut Connection<'_>) -> Result<Option<Timestamp>> {
    let time = run!(
        connection,
        query_scalar<i64>.fetch_optional,
        "SELECT time FROM events ORDER BY position DESC LIMIT 1"
    )?;
    Ok(time.map(Timestamp::from_millis))
}

pub(crate) async fn stream_version(connection: &mut Connection<'_>, stream: &str) -> Result<u64> {
    let version = run!(
        connection,
        query_scalar<i64>.fetch_one,
        "SELECT COALESCE(MAX(version), 0) FROM events WHERE stream = $1",
        stream
    )?;
    Ok(version as u64)
}

pub(crate) async fn fence(connection: &mut Connection<'_>, name: &str) -> Result<u64> {
    let generation = run!(
        connection,
        query_scalar<i64>.fetch_optional,
        "SELECT generation FROM fences WHERE name = $1",
        name
    )?;
    Ok(generation.unwrap_or(0) as u64)
}

pub(crate) async fn cursor(
    connection: &mut Connection<'_>,
    consumer: &str,
    bucket: Bucket,
) -> Result<Position> {
    let position = run!(
        connection,
        query_scalar<i64>.fetch_optional,
        "SELECT position FROM cursors WHERE consumer = $1 AND bucket = $2",
        consumer,
        i64::from(bucket.0)
    )?;
    Ok(Position(position.unwrap_or(0) as u64))
}

pub(crate) async fn cursors(
    connection: &mut Connection<'_>,
    consumer: &str,
) -> Result<BTreeMap<Bucket, Position>> {
    let stored = run!(
        connection,
        query_as<(i64, i64)>.fetch_all,
        "SELECT bucket, position FROM cursors WHERE consumer = $1",
        consumer
    )?;
    let pair = |(bucket, position)| (Bucket(bucket as u16), Position(position as u64));
    Ok(stored.into_iter().map(pair).collect())
}

pub(crate) async fn idempotency_key(
    connection: &mut Connection<'_>,
    key: &str,
) -> Result<Option<StoredIdempotencyKey>> {
    Ok(run!(
        connection,
        query_as<StoredIdempotencyKey>.fetch_optional,
        "SELECT body_hash, result, positions, time FROM causes WHERE key = $1",
        key
    )?)
}

/// The `SELECT` of all event columns, followed by the rest of a query.
macro_rules! select_events {
    ($rest:literal) => {
        concat!(
            "SELECT position, prev, bucket, stream, version, id, type, type_version, time, actor, data, prev_hash FROM events ",
            $rest
        )
    };
}

use select_events;

fn raw(columns: Vec<RawColumns>) -> Vec<RawRecord> {
    columns.into_iter().map(from_columns).collect()
}

pub(crate) async fn read_stream(
    connection: &mut Connection<'_>,
    stream: &str,
    after_version: u64,
    limit: usize,
) -> Result<Vec<RawRecord>> {
    let found = run!(
        connection,
        query_as<RawColumns>.fetch_all,
        select_events!("WHERE stream = $1 AND version > $2 ORDER BY version LIMIT $3"),
        stream,
        after_version as i64,
        limit as i64
    )?;
    Ok(raw(found))
}

pub(crate) async fn read_bucket(
    connection: &mut Connection<'_>,
    bucket: Bucket,
    after: Position,
    limit: usize,
) -> Result<Vec<RawRecord>> {
    let found = run!(
        connection,
        query_as<RawColumns>.fetch_all,
        select_events!("WHERE bucket = $1 AND position > $2 ORDER BY position LIMIT $3"),
        i64::from(bucket.0),
        after.0 as i64,
        limit as i64
    )?;
    Ok(raw(found))
}

pub(crate) async fn read_all(
    connection: &mut Connection<'_>,
    after: Position,
    limit: usize,
) -> Result<Vec<RawRecord>> {
    let found = run!(
        connection,
        query_as<RawColumns>.fetch_all,
        select_events!("WHERE position > $1 ORDER BY position LIMIT $2"),
        after.0 as i64,
        limit as i64
    )?;
    Ok(raw(found))
}

/// Reads the events that the table has up to a position, including those at positions that no event of the log
/// has.
pub(crate) async fn read_through(
    connection: &mut Connection<'_>,
    after: Option<Position>,
    through: Position,
    limit: usize,
) -> Result<Vec<RawRecord>> {
    let found = run!(
        connection,
        query_as<RawColumns>.fetch_all,
        select_events!("WHERE position > $1 AND position <= $2 ORDER BY position LIMIT $3"),
        after.map_or(i64::MIN, |after| after.0 as i64),
        through.0 as i64,
        limit as i64
    )?;
    Ok(raw(found))
}

pub(crate) async fn read_event(
    connection: &mut Connection<'_>,
    id: &str,
) -> Result<Option<RawRecord>> {
    let found = run!(
        connection,
        query_as<RawColumns>.fetch_optional,
        select_events!("WHERE id = $1"),
        id
    )?;
    Ok(found.map(from_columns))
}

pub(crate) async fn insert_events(
    connection: &mut Connection<'_>,
    events: &[EventRow<'_>],
) -> sqlx::Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    match connection {
        Connection::Sqlite(connection) => sqlite::inserts::insert_events(connection, events).await,
        Connection::Postgres(connection, limit) => {
            postgres::inserts::insert_events(connection, *limit, events).await
        }
    }
}

pub(crate) async fn write_cursors(
    connection: &mut Connection<'_>,
    cursors: &[CursorRow<'_>],
) -> sqlx::Result<()> {
    if cursors.is_empty() {
        return Ok(());
    }
    match connection {
        Connection::Sqlite(connection) => sqlite::inserts::write_cursors(connection, cursors).await,
        Connection::Postgres(connection, limit) => {
            postgres::inserts::write_cursors(connection, *limit, cursors).await
        }
    }
}

pub(crate) async fn write_idempotency_keys(
    connection: &mut Connection<'_>,
    idempotency_keys: &[(&str, &StoredIdempotencyKey)],
) -> sqlx::Result<()> {
    if idempotency_keys.is_empty() {
        return Ok(());
    }
    match connection {
        Connection::Sqlite(connection) => {
            sqlite::inserts::write_idempotency_keys(connection, idempotency_keys).await
        }
        Connection::Postgres(connection, limit) => {
            postgres::inserts::write_idempotency_keys(connection, *limit, idempotency_keys).await
        }
    }
}

/// Deletes idempotency keys of requests that are older than this. Those of consumers stay.
pub(crate) async fn prune_request_keys(
    connection: &mut Connection<'_>,
    before: Timestamp,
) -> sqlx::Result<()> {
    execute!(
        connection,
        "DELETE FROM causes WHERE time < $1 AND substr(key, 1, 5) = 'http:'",
        before.millis()
    )?;
    Ok(())
}

/// Returns all cursors.
pub(crate) async fn all_cursors(
    connection: &mut Connection<'_>,
) -> Result<Vec<(String, i64, i64)>> {
    Ok(run!(
        connection,
        query_as<(String, i64, i64)>.fetch_all,
        "SELECT consumer, bucket, position FROM cursors ORDER BY consumer, bucket"
    )?)
}

/// Removes all cursors of a consumer.
pub(crate) async fn remove_cursors(connection: &mut Connection<'_>, consumer: &str) -> Result<()> {
    execute!(
        connection,
        "DELETE FROM cursors WHERE consumer = $1",
        consumer
    )?;
    Ok(())
}

/// Returns all fences with their generations.
pub(crate) async fn all_fences(connection: &mut Connection<'_>) -> Result<Vec<(String, i64)>> {
    Ok(run!(
        connection,
        query_as<(String, i64)>.fetch_all,
        "SELECT name, generation FROM fences ORDER BY name"
    )?)
}

/// Raises a fence's generation and ends its lease; does nothing if the stored generation is not lower.
pub(crate) async fn raise_fence(
    connection: &mut Connection<'_>,
    name: &str,
    generation: i64,
) -> sqlx::Result<()> {
    execute!(
        connection,
        "INSERT INTO fences (name, generation) VALUES ($1, $2) \
         ON CONFLICT (name) DO UPDATE SET generation = excluded.generation, \
         holder = NULL, expires = NULL WHERE fences.generation < excluded.generation",
        name,
        generation
    )?;
    Ok(())
}

/// Returns idempotency keys, in order.
pub(crate) async fn idempotency_keys_after(
    connection: &mut Connection<'_>,
    after: &str,
    limit: usize,
) -> Result<Vec<IdempotencyKeyColumns>> {
    Ok(run!(
        connection,
        query_as<IdempotencyKeyColumns>.fetch_all,
        "SELECT key, body_hash, result, positions, time FROM causes \
         WHERE key > $1 ORDER BY key LIMIT $2",
        after,
        limit as i64
    )?)
}

/// Returns the idempotency keys between two keys, both inclusive.
pub(crate) async fn existing_idempotency_keys(
    connection: &mut Connection<'_>,
    first: &str,
    last: &str,
) -> Result<Vec<String>> {
    Ok(run!(
        connection,
        query_scalar<String>.fetch_all,
        "SELECT key FROM causes WHERE key >= $1 AND key <= $2",
        first,
        last
    )?)
}
