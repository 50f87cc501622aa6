//! What is read and written of snapshots.

use std::collections::BTreeMap;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};

use super::Result;
use crate::model::snapshot::{SnapshotChange, SnapshotMeta};
use crate::sql::connection::{Connection, run};
use crate::sql::{postgres, sqlite};
use crate::writing::known::SnapshotPlace;

/// How an upsert of snapshots ends, and one of their parts.
pub(crate) const UPDATE_SNAPSHOT: &str = " ON CONFLICT (consumer, bucket) DO UPDATE SET \
     version = excluded.version, position = excluded.position, event_hash = excluded.event_hash, \
     hash = excluded.hash";
pub(crate) const UPDATE_PART: &str =
    " ON CONFLICT (consumer, bucket, key) DO UPDATE SET doc = excluded.doc";

/// What no store writes becomes a version that nobody asks for.
fn version_of(version: i64) -> u32 {
    u32::try_from(version).unwrap_or(u32::MAX)
}

pub(crate) fn snapshot_place_of((version, position): (i64, i64)) -> SnapshotPlace {
    SnapshotPlace {
        version: version_of(version),
        position: Position(position as u64),
    }
}

/// Where a snapshot stands, if there is one.
pub(crate) async fn snapshot_place(
    connection: &mut Connection<'_>,
    consumer: &str,
    bucket: Bucket,
) -> Result<Option<SnapshotPlace>> {
    let found = run!(
        connection,
        query_as<(i64, i64)>.fetch_optional,
        "SELECT version, position FROM snapshots WHERE consumer = $1 AND bucket = $2",
        consumer,
        i64::from(bucket.0)
    )?;
    Ok(found.map(snapshot_place_of))
}

/// What is stored of a snapshot beside its parts: with its hash.
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

/// All parts of a snapshot.
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

/// The parts of snapshots on their way into the table, or out of it.
pub(crate) struct Parts<'a> {
    /// Key and document.
    pub kept: Vec<(&'a SnapshotMeta, &'a str, &'a str)>,
    pub gone: Vec<(&'a SnapshotMeta, &'a str)>,
}

impl<'a> Parts<'a> {
    pub(crate) fn of(changes: &[&'a SnapshotChange]) -> Self {
        let (mut kept, mut gone) = (Vec::new(), Vec::new());
        for change in changes {
            for (key, doc) in &change.parts {
                match doc {
                    Some(doc) => kept.push((&change.meta, key.as_str(), doc.as_str())),
                    None => gone.push((&change.meta, key.as_str())),
                }
            }
        }
        Self { kept, gone }
    }
}

/// Those of which all is stored anew.
pub(crate) fn replaced<'a>(changes: &[&'a SnapshotChange]) -> Vec<&'a SnapshotMeta> {
    let whole = changes.iter().filter(|change| change.base.is_none());
    whole.map(|change| &change.meta).collect()
}

/// At most one change of each snapshot.
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
