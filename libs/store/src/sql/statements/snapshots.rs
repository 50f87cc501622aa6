//! Statements on snapshots.

use std::collections::BTreeMap;

use super::Result;
use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};

use crate::model::snapshot::{SnapshotChange, SnapshotMeta};
use crate::sql::columns::{SnapshotPosition, snapshot_position_of, version_of};
use crate::sql::connection::{Connection, run};
use crate::sql::{postgres, sqlite};

/// Returns the version and position of a snapshot, if there is one.
pub(crate) async fn snapshot_position(
    connection: &mut Connection<'_>,
    consumer: &str,
    bucket: Bucket,
) -> Result<Option<SnapshotPosition>> {
    let found = run!(
        connection,
        query_as<(i64, i64)>.fetch_optional,
        "SELECT version, position FROM snapshots WHERE consumer = $1 AND bucket = $2",
        consumer,
        i64::from(bucket.0)
    )?;
    Ok(found.map(snapshot_position_of))
}

/// Returns a snapshot's metadata and hash, without its parts.
pub(crate) async fn snapshot(
    connection: &mut Connection<'_>,
    consumer: &str,
    bucket: Bucket,
) -> sqlx::Result<Option<(SnapshotMeta, String)>> {
    let found = run!(
        connection,
        query_as<(i64, i64, Option<Vec<u8>>, String)>.fetch_optional,
        "SELECT version, position, event_hash, hash FROM snapshots \
         WHERE consumer = $1 AND bucket = $2",
        consumer,
        i64::from(bucket.0)
    )?;
    Ok(found.map(|(version, position, event_hash, hash)| {
        let meta = SnapshotMeta {
            consumer: consumer.to_owned(),
            bucket,
            version: version_of(version),
            position: Position(position as u64),
            event_hash: event_hash.as_deref().and_then(ChainHash::from_bytes),
        };
        (meta, hash)
    }))
}

/// Returns all parts of a snapshot.
pub(crate) async fn snapshot_parts(
    connection: &mut Connection<'_>,
    consumer: &str,
    bucket: Bucket,
) -> sqlx::Result<BTreeMap<String, String>> {
    let found = run!(
        connection,
        query_as<(String, String)>.fetch_all,
        "SELECT key, doc FROM snapshot_parts WHERE consumer = $1 AND bucket = $2",
        consumer,
        i64::from(bucket.0)
    )?;
    Ok(found.into_iter().collect())
}

/// Writes snapshots, with at most one change per snapshot.
pub(crate) async fn write_snapshots(
    connection: &mut Connection<'_>,
    changes: &[&SnapshotChange],
) -> sqlx::Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    match connection {
        Connection::Sqlite(connection) => {
            sqlite::inserts::write_snapshots(connection, changes).await
        }
        Connection::Postgres(connection, limit) => {
            postgres::inserts::write_snapshots(connection, *limit, changes).await
        }
    }
}
