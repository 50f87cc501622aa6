//! Statements on archives: the list of files, and which events may be sealed or cleared.

use contract::ids::{Bucket, Position};
use contract::time::Timestamp;
use sqlx::AssertSqlSafe;

use super::Result;
use crate::model::archive::Archive;
use crate::sql::connection::{Connection, execute, run};
use crate::sql::{postgres, sqlite};

type ArchiveColumns = (i64, i64, String, String, i64, i64, i64);

/// Returns the archives that begin after a position, in order.
pub(crate) async fn archives(
    connection: &mut Connection<'_>,
    after: Position,
) -> Result<Vec<Archive>> {
    let found = run!(
        connection,
        query_as<ArchiveColumns>.fetch_all,
        "SELECT first_position, last_position, file, hash, events, bytes, sealed_at \
         FROM archives WHERE first_position > $1 ORDER BY first_position",
        after.0 as i64
    )?;
    let archive = |(first, last, file, hash, events, bytes, sealed_at)| Archive {
        first: position(first),
        last: position(last),
        file,
        hash,
        events: events as u64,
        bytes: bytes as u64,
        sealed_at: Timestamp::from_millis(sealed_at),
    };
    Ok(found.into_iter().map(archive).collect())
}

fn position(number: i64) -> Position {
    Position(number as u64)
}

/// Returns the last archived position.
pub(crate) async fn sealed(connection: &mut Connection<'_>) -> Result<Position> {
    let last = run!(
        connection,
        query_scalar<i64>.fetch_one,
        "SELECT COALESCE(MAX(last_position), 0) FROM archives"
    )?;
    Ok(position(last))
}

pub(crate) async fn insert_archive(
    connection: &mut Connection<'_>,
    archive: &Archive,
) -> Result<()> {
    execute!(
        connection,
        "INSERT INTO archives (first_position, last_position, file, hash, events, bytes, sealed_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
        archive.first.0 as i64,
        archive.last.0 as i64,
        &archive.file,
        &archive.hash,
        archive.events as i64,
        archive.bytes as i64,
        archive.sealed_at.millis()
    )?;
    Ok(())
}

/// Returns the first and last positions and the count of the next events, at most `limit` of them.
pub(crate) async fn span(
    connection: &mut Connection<'_>,
    (after, through): (Position, Position),
    limit: u64,
) -> Result<Option<(Position, Position, u64)>> {
    let (first, last, count) = run!(
        connection,
        query_as<(Option<i64>, Option<i64>, i64)>.fetch_one,
        "SELECT MIN(position), MAX(position), COUNT(*) FROM (SELECT position FROM events \
         WHERE position > $1 AND position <= $2 ORDER BY position LIMIT $3) AS next",
        after.0 as i64,
        i64::try_from(through.0).unwrap_or(i64::MAX),
        limit as i64
    )?;
    let both = first.zip(last);
    Ok(both.map(|(first, last)| (position(first), position(last), count as u64)))
}

/// Returns the first event after a position that is not older than a time.
pub(crate) async fn first_since(
    connection: &mut Connection<'_>,
    after: Position,
    time: Timestamp,
) -> Result<Option<Position>> {
    let found = run!(
        connection,
        query_scalar<i64>.fetch_optional,
        "SELECT position FROM events WHERE position > $1 AND time >= $2 ORDER BY position LIMIT 1",
        after.0 as i64,
        time.millis()
    )?;
    Ok(found.map(position))
}

/// Returns the first event of a bucket after a position.
pub(crate) async fn next_of_bucket(
    connection: &mut Connection<'_>,
    bucket: Bucket,
    after: Position,
) -> Result<Option<Position>> {
    let found = run!(
        connection,
        query_scalar<Option<i64>>.fetch_one,
        "SELECT MIN(position) FROM events WHERE bucket = $1 AND position > $2",
        i64::from(bucket.0),
        after.0 as i64
    )?;
    Ok(found.map(position))
}

/// Returns how far each consumer has read each bucket, by its cursor and by its snapshot. Snapshots of a
/// consumer with a lease of the same name count only while the lease is held, that is, while it runs.
pub(crate) async fn consumer_positions(
    connection: &mut Connection<'_>,
) -> Result<Vec<(String, Bucket, Position)>> {
    let now = match connection {
        Connection::Sqlite(_) => sqlite::NOW,
        Connection::Postgres(..) => postgres::NOW,
    };
    let text = format!(
        "SELECT consumer, bucket, position FROM cursors UNION ALL \
         SELECT consumer, bucket, position FROM snapshots WHERE NOT EXISTS \
         (SELECT 1 FROM fences WHERE name = consumer AND (holder IS NULL OR expires <= {now}))"
    );
    let found = run!(
        connection,
        query_as<(String, i64, i64)>.fetch_all,
        AssertSqlSafe(text.clone())
    )?;
    let row = |(consumer, bucket, at)| (consumer, Bucket(bucket as u16), position(at));
    Ok(found.into_iter().map(row).collect())
}

/// Returns the first and last positions and the count of the next archived events that are not the last of
/// their stream.
pub(crate) async fn clearable(
    connection: &mut Connection<'_>,
    (after, through): (Position, Position),
    limit: u64,
) -> Result<Option<(Position, Position, u64)>> {
    let (first, last, count) = run!(
        connection,
        query_as<(Option<i64>, Option<i64>, i64)>.fetch_one,
        "SELECT MIN(position), MAX(position), COUNT(*) FROM (SELECT position FROM events \
         WHERE position > $1 AND position <= $2 AND EXISTS (SELECT 1 FROM events AS later \
         WHERE later.stream = events.stream AND later.version > events.version) \
         ORDER BY position LIMIT $3) AS next",
        after.0 as i64,
        through.0 as i64,
        limit as i64
    )?;
    let both = first.zip(last);
    Ok(both.map(|(first, last)| (position(first), position(last), count as u64)))
}

/// Deletes events between two positions, both inclusive, from the table, except the last of each stream.
pub(crate) async fn clear(
    connection: &mut Connection<'_>,
    (first, last): (Position, Position),
) -> Result<u64> {
    Ok(execute!(
        connection,
        "DELETE FROM events WHERE position >= $1 AND position <= $2 AND EXISTS \
         (SELECT 1 FROM events AS later \
         WHERE later.stream = events.stream AND later.version > events.version)",
        first.0 as i64,
        last.0 as i64
    )?)
}

/// Counts all events of the log, in archives and in the table.
pub(crate) async fn count(connection: &mut Connection<'_>) -> Result<u64> {
    let events = run!(
        connection,
        query_scalar<i64>.fetch_one,
        "SELECT CAST(COALESCE(SUM(events), 0) AS BIGINT) + (SELECT COUNT(*) FROM events \
         WHERE position > (SELECT COALESCE(MAX(last_position), 0) FROM archives)) FROM archives"
    )?;
    Ok(events as u64)
}
