//! Statements on the hash chains: their heads, single events, and hashes for events that have none.

use super::{Result, raw, select_events};
use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::RawRecord;

use crate::sql::columns::{RawColumns, from_columns};
use crate::sql::connection::{Connection, run};
use crate::sql::{postgres, sqlite};

/// Returns the last event of a bucket at or below a position. The order includes the bucket, so that no
/// database scans by position, which would read the entire log for an empty bucket.
pub(crate) async fn last_of_bucket(
    connection: &mut Connection<'_>,
    bucket: Bucket,
    up_to: Position,
) -> Result<Option<RawRecord>> {
    let found = run!(
        connection,
        query_as<RawColumns>.fetch_optional,
        select_events!(
            "WHERE (bucket, position) > ($1, 0) AND (bucket, position) <= ($1, $2) \
             ORDER BY bucket DESC, position DESC LIMIT 1"
        ),
        i64::from(bucket.0),
        i64::try_from(up_to.0).unwrap_or(i64::MAX)
    )?;
    Ok(found.map(from_columns))
}

/// Reads backwards from the end, or from before a position.
pub(crate) async fn read_back(
    connection: &mut Connection<'_>,
    before: Option<Position>,
    limit: usize,
) -> Result<Vec<RawRecord>> {
    let found = run!(
        connection,
        query_as<RawColumns>.fetch_all,
        select_events!("WHERE position < $1 ORDER BY position DESC LIMIT $2"),
        before.map_or(i64::MAX, |before| before.0 as i64),
        limit as i64
    )?;
    Ok(raw(found))
}

pub(crate) async fn read_at(
    connection: &mut Connection<'_>,
    position: Position,
) -> Result<Option<RawRecord>> {
    let found = run!(
        connection,
        query_as<RawColumns>.fetch_optional,
        select_events!("WHERE position = $1"),
        position.0 as i64
    )?;
    Ok(found.map(from_columns))
}

/// Sets the previous event's hash on events that have none.
pub(crate) async fn chain_events(
    connection: &mut Connection<'_>,
    chained: &[(Position, ChainHash)],
) -> sqlx::Result<()> {
    match connection {
        Connection::Sqlite(connection) => sqlite::inserts::chain_events(connection, chained).await,
        Connection::Postgres(connection, limit) => {
            postgres::inserts::chain_events(connection, *limit, chained).await
        }
    }
}
