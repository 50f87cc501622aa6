//! Bulk inserts into SQLite: a few fixed numbers of rows per statement, so that few statements have to be
//! prepared and cached.

use contract::chain::ChainHash;
use contract::ids::Position;
use contract::log::RowChange;
use sqlx::{QueryBuilder, SqliteConnection};

use crate::model::raw::EventRow;
use crate::model::snapshot::SnapshotChange;
use crate::sql::columns::{
    self, CursorRow, SnapshotParts, StoredIdempotencyKey, UPDATE_CHANGED_ROWS, UPDATE_PART,
    UPDATE_SNAPSHOT,
};

type Db = sqlx::Sqlite;

/// The numbers of rows per insert.
const CHUNKS: [usize; 4] = [64, 16, 4, 1];

pub(crate) async fn insert_events(
    connection: &mut SqliteConnection,
    events: &[EventRow<'_>],
) -> sqlx::Result<()> {
    for chunk in chunks(events) {
        QueryBuilder::<Db>::new(
            "INSERT INTO events (position, prev, bucket, stream, version, id, type, type_version, time, actor, data, prev_hash) ",
        )
        .push_values(chunk, |mut row, event| {
            row.push_bind(event.position.0 as i64)
                .push_bind(event.prev.0 as i64)
                .push_bind(i64::from(event.bucket.0))
                .push_bind(event.stream.to_owned())
                .push_bind(event.version as i64)
                .push_bind(event.id.to_string())
                .push_bind(event.type_name.to_owned())
                .push_bind(i64::from(event.type_version))
                .push_bind(event.time.millis())
                .push_bind(event.actor.to_owned())
                .push_bind(event.data.to_owned())
                .push_bind(event.prev_hash.map(|hash| hash.0.to_vec()));
        })
        .build()
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

pub(crate) async fn chain_events(
    connection: &mut SqliteConnection,
    chained: &[(Position, ChainHash)],
) -> sqlx::Result<()> {
    for chunk in chunks(chained) {
        QueryBuilder::<Db>::new("WITH chained (position, hash) AS (")
            .push_values(chunk, |mut row, (position, hash)| {
                row.push_bind(position.0 as i64).push_bind(hash.0.to_vec());
            })
            .push(
                ") UPDATE events SET prev_hash = chained.hash FROM chained \
                 WHERE events.position = chained.position AND events.prev_hash IS NULL",
            )
            .build()
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

/// Returns how many rows were changed.
pub(crate) async fn write_rows(
    connection: &mut SqliteConnection,
    changes: &[&RowChange],
) -> sqlx::Result<u64> {
    let mut changed = 0;
    let upserts: Vec<(&RowChange, &String)> = changes
        .iter()
        .filter_map(|change| Some((*change, change.doc.as_ref()?)))
        .collect();
    for chunk in chunks(&upserts) {
        let mut upsert = QueryBuilder::<Db>::new(
            "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) ",
        );
        upsert.push_values(chunk, |mut row, (change, doc)| {
            row.push_bind(change.model)
                .push_bind(change.key.clone())
                .push_bind(change.endpoint.clone())
                .push_bind(change.deployment.clone())
                .push_bind(change.position.0 as i64)
                .push_bind(change.time.millis())
                .push_bind((*doc).clone());
        });
        upsert.push(UPDATE_CHANGED_ROWS);
        let written = upsert.build().execute(&mut *connection).await?;
        changed += written.rows_affected();
    }
    for change in changes.iter().filter(|change| change.doc.is_none()) {
        let deleted = sqlx::query("DELETE FROM rows WHERE model = $1 AND key = $2")
            .bind(change.model)
            .bind(&change.key)
            .execute(&mut *connection)
            .await?;
        changed += deleted.rows_affected();
    }
    Ok(changed)
}

pub(crate) async fn write_cursors(
    connection: &mut SqliteConnection,
    cursors: &[CursorRow<'_>],
) -> sqlx::Result<()> {
    for chunk in chunks(cursors) {
        QueryBuilder::<Db>::new("INSERT INTO cursors (consumer, bucket, position) ")
            .push_values(chunk, |mut row, cursor| {
                row.push_bind(cursor.consumer.to_owned())
                    .push_bind(i64::from(cursor.bucket.0))
                    .push_bind(cursor.position.0 as i64);
            })
            .push(" ON CONFLICT (consumer, bucket) DO UPDATE SET position = excluded.position")
            .build()
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

pub(crate) async fn write_snapshots(
    connection: &mut SqliteConnection,
    changes: &[&SnapshotChange],
) -> sqlx::Result<()> {
    for meta in columns::fully_replaced(changes) {
        sqlx::query("DELETE FROM snapshot_parts WHERE consumer = $1 AND bucket = $2")
            .bind(&meta.consumer)
            .bind(i64::from(meta.bucket.0))
            .execute(&mut *connection)
            .await?;
    }
    for chunk in chunks(changes) {
        QueryBuilder::<Db>::new(
            "INSERT INTO snapshots (consumer, bucket, version, position, event_hash, hash) ",
        )
        .push_values(chunk, |mut row, change| {
            let meta = &change.meta;
            row.push_bind(meta.consumer.clone())
                .push_bind(i64::from(meta.bucket.0))
                .push_bind(i64::from(meta.version))
                .push_bind(meta.position.0 as i64)
                .push_bind(meta.event_hash.map(|hash| hash.0.to_vec()))
                .push_bind(change.hash.clone());
        })
        .push(UPDATE_SNAPSHOT)
        .build()
        .execute(&mut *connection)
        .await?;
    }
    let parts = SnapshotParts::of(changes);
    for chunk in chunks(&parts.upserts) {
        QueryBuilder::<Db>::new("INSERT INTO snapshot_parts (consumer, bucket, key, doc) ")
            .push_values(chunk, |mut row, (meta, key, doc)| {
                row.push_bind(meta.consumer.clone())
                    .push_bind(i64::from(meta.bucket.0))
                    .push_bind((*key).to_owned())
                    .push_bind((*doc).to_owned());
            })
            .push(UPDATE_PART)
            .build()
            .execute(&mut *connection)
            .await?;
    }
    for (meta, key) in parts.deletions {
        sqlx::query("DELETE FROM snapshot_parts WHERE consumer = $1 AND bucket = $2 AND key = $3")
            .bind(&meta.consumer)
            .bind(i64::from(meta.bucket.0))
            .bind(key)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

pub(crate) async fn write_idempotency_keys(
    connection: &mut SqliteConnection,
    idempotency_keys: &[(&str, &StoredIdempotencyKey)],
) -> sqlx::Result<()> {
    for chunk in chunks(idempotency_keys) {
        QueryBuilder::<Db>::new("INSERT INTO causes (key, body_hash, result, positions, time) ")
            .push_values(chunk, |mut row, (key, stored)| {
                row.push_bind((*key).to_owned())
                    .push_bind(stored.body_hash.clone())
                    .push_bind(stored.result.clone())
                    .push_bind(stored.positions.clone())
                    .push_bind(stored.time);
            })
            .build()
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

/// Splits a list into pieces of a few fixed sizes.
fn chunks<T>(mut items: &[T]) -> Vec<&[T]> {
    let mut pieces = Vec::new();
    while let Some(size) = CHUNKS.iter().find(|size| **size <= items.len()) {
        let (piece, rest) = items.split_at(*size);
        pieces.push(piece);
        items = rest;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_split_into_fixed_sizes_without_loss() {
        for length in 0..200 {
            let items: Vec<usize> = (0..length).collect();
            let pieces = chunks(&items);
            assert!(pieces.iter().all(|piece| CHUNKS.contains(&piece.len())));
            assert_eq!(pieces.concat(), items);
        }
    }
}
