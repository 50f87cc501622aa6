//! Every SQL text, with its bindings. One text for every dialect: `$n`, portable types, upserts
//! that name their columns.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::{Bucket, Position};
use contract::log::{Actor, Record, RowChange, StreamName};
use contract::time::Timestamp;
use sqlx::QueryBuilder;
use uuid::Uuid;

use crate::rows::{Row, RowQuery};
use crate::sqlite::{Connection, Db, TABLE_EXISTS};
use crate::{CursorMove, StoreError};

/// Rows per insert. Few sizes, so that few statements have to be prepared and kept.
const CHUNKS: [usize; 4] = [64, 16, 4, 1];

pub(crate) type Result<T> = std::result::Result<T, StoreError>;

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::PoolClosed => Self::Closed,
            error => Self::Database(error.to_string()),
        }
    }
}

/// An event as it is stored, not decoded yet.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct RawEvent {
    pub position: i64,
    pub prev: i64,
    pub bucket: i64,
    pub stream: String,
    pub version: i64,
    pub id: String,
    pub r#type: String,
    pub type_version: i64,
    pub time: i64,
    pub actor: String,
    pub data: String,
}

impl RawEvent {
    pub(crate) fn position(&self) -> Position {
        Position(self.position as u64)
    }

    pub(crate) fn decode(self) -> Result<Record> {
        let position = self.position();
        let unreadable = |detail: String| StoreError::Unreadable { position, detail };
        let version = u32::try_from(self.type_version)
            .map_err(|_| unreadable(format!("type version {}", self.type_version)))?;
        let event = Event::decode(&self.r#type, version, &self.data)
            .map_err(|error| unreadable(error.to_string()))?;
        let stream: StreamName = self
            .stream
            .parse()
            .map_err(|_| unreadable(format!("`{}` is not a stream", self.stream)))?;
        let id = Uuid::parse_str(&self.id)
            .map_err(|error| unreadable(format!("event id `{}`: {error}", self.id)))?;
        let bucket = u16::try_from(self.bucket)
            .map_err(|_| unreadable(format!("bucket {}", self.bucket)))?;
        Ok(Record {
            position,
            prev: Position(self.prev as u64),
            bucket: Bucket(bucket),
            stream,
            version: self.version as u64,
            id,
            time: Timestamp::from_millis(self.time),
            actor: Actor(self.actor),
            event,
        })
    }
}

fn decode_all(raw: Vec<RawEvent>) -> Result<Vec<Record>> {
    raw.into_iter().map(RawEvent::decode).collect()
}

pub(crate) async fn format(connection: &mut Connection) -> Result<Option<String>> {
    let tables: i64 = sqlx::query_scalar(TABLE_EXISTS)
        .bind("meta")
        .fetch_one(&mut *connection)
        .await?;
    if tables == 0 {
        return Ok(None);
    }
    meta(connection, "format").await
}

pub(crate) async fn meta(connection: &mut Connection, key: &str) -> Result<Option<String>> {
    let value = sqlx::query_scalar("SELECT value FROM meta WHERE key = $1")
        .bind(key)
        .fetch_optional(connection)
        .await?;
    Ok(value)
}

pub(crate) async fn set_meta_once(
    connection: &mut Connection,
    key: &str,
    value: &str,
) -> Result<()> {
    sqlx::query("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING")
        .bind(key)
        .bind(value)
        .execute(connection)
        .await?;
    Ok(())
}

pub(crate) async fn head(connection: &mut Connection) -> Result<Position> {
    let position: i64 = sqlx::query_scalar("SELECT COALESCE(MAX(position), 0) FROM events")
        .fetch_one(connection)
        .await?;
    Ok(Position(position as u64))
}

/// The newest position of each bucket that holds something.
pub(crate) async fn bucket_heads(
    connection: &mut Connection,
) -> Result<BTreeMap<Bucket, Position>> {
    let mut heads = BTreeMap::new();
    for bucket in Bucket::all() {
        let head: Option<i64> =
            sqlx::query_scalar("SELECT MAX(position) FROM events WHERE bucket = $1")
                .bind(i64::from(bucket.0))
                .fetch_one(&mut *connection)
                .await?;
        if let Some(head) = head {
            heads.insert(bucket, Position(head as u64));
        }
    }
    Ok(heads)
}

/// The time of the log's last event: what causes are aged by.
pub(crate) async fn last_time(connection: &mut Connection) -> Result<Option<Timestamp>> {
    let time: Option<i64> =
        sqlx::query_scalar("SELECT time FROM events ORDER BY position DESC LIMIT 1")
            .fetch_optional(connection)
            .await?;
    Ok(time.map(Timestamp::from_millis))
}

pub(crate) async fn stream_version(connection: &mut Connection, stream: &str) -> Result<u64> {
    let version: i64 =
        sqlx::query_scalar("SELECT COALESCE(MAX(version), 0) FROM events WHERE stream = $1")
            .bind(stream)
            .fetch_one(connection)
            .await?;
    Ok(version as u64)
}

pub(crate) async fn fence(connection: &mut Connection, name: &str) -> Result<u64> {
    let generation: Option<i64> =
        sqlx::query_scalar("SELECT generation FROM fences WHERE name = $1")
            .bind(name)
            .fetch_optional(connection)
            .await?;
    Ok(generation.unwrap_or(0) as u64)
}

pub(crate) async fn cursor(
    connection: &mut Connection,
    consumer: &str,
    bucket: Bucket,
) -> Result<Position> {
    let position: Option<i64> =
        sqlx::query_scalar("SELECT position FROM cursors WHERE consumer = $1 AND bucket = $2")
            .bind(consumer)
            .bind(i64::from(bucket.0))
            .fetch_optional(connection)
            .await?;
    Ok(Position(position.unwrap_or(0) as u64))
}

pub(crate) async fn cursors(
    connection: &mut Connection,
    consumer: &str,
) -> Result<BTreeMap<Bucket, Position>> {
    let stored: Vec<(i64, i64)> =
        sqlx::query_as("SELECT bucket, position FROM cursors WHERE consumer = $1")
            .bind(consumer)
            .fetch_all(connection)
            .await?;
    let pair = |(bucket, position)| (Bucket(bucket as u16), Position(position as u64));
    Ok(stored.into_iter().map(pair).collect())
}

/// A cause as it is stored.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct StoredCause {
    pub body_hash: String,
    pub result: Option<String>,
    /// The positions that the commit wrote, as a JSON list.
    pub positions: String,
    pub time: i64,
}

impl StoredCause {
    pub(crate) fn positions(&self) -> Result<Vec<Position>> {
        serde_json::from_str(&self.positions)
            .map_err(|error| StoreError::Database(format!("positions of a cause: {error}")))
    }
}

pub(crate) async fn cause(connection: &mut Connection, key: &str) -> Result<Option<StoredCause>> {
    let cause =
        sqlx::query_as("SELECT body_hash, result, positions, time FROM causes WHERE key = $1")
            .bind(key)
            .fetch_optional(connection)
            .await?;
    Ok(cause)
}

pub(crate) async fn read_stream(
    connection: &mut Connection,
    stream: &str,
    after_version: u64,
    limit: usize,
) -> Result<Vec<Record>> {
    let raw = sqlx::query_as(
        "SELECT position, prev, bucket, stream, version, id, type, type_version, time, actor, data \
         FROM events WHERE stream = $1 AND version > $2 ORDER BY version LIMIT $3",
    )
    .bind(stream)
    .bind(after_version as i64)
    .bind(limit as i64)
    .fetch_all(connection)
    .await?;
    decode_all(raw)
}

pub(crate) async fn read_bucket(
    connection: &mut Connection,
    bucket: Bucket,
    after: Position,
    limit: usize,
) -> Result<Vec<Record>> {
    let raw = sqlx::query_as(
        "SELECT position, prev, bucket, stream, version, id, type, type_version, time, actor, data \
         FROM events WHERE bucket = $1 AND position > $2 ORDER BY position LIMIT $3",
    )
    .bind(i64::from(bucket.0))
    .bind(after.0 as i64)
    .bind(limit as i64)
    .fetch_all(connection)
    .await?;
    decode_all(raw)
}

pub(crate) async fn read_all_raw(
    connection: &mut Connection,
    after: Position,
    limit: usize,
) -> Result<Vec<RawEvent>> {
    let raw = sqlx::query_as(
        "SELECT position, prev, bucket, stream, version, id, type, type_version, time, actor, data \
         FROM events WHERE position > $1 ORDER BY position LIMIT $2",
    )
    .bind(after.0 as i64)
    .bind(limit as i64)
    .fetch_all(connection)
    .await?;
    Ok(raw)
}

pub(crate) async fn read_all(
    connection: &mut Connection,
    after: Position,
    limit: usize,
) -> Result<Vec<Record>> {
    decode_all(read_all_raw(connection, after, limit).await?)
}

pub(crate) async fn read_event(connection: &mut Connection, id: Uuid) -> Result<Option<Record>> {
    let raw: Option<RawEvent> = sqlx::query_as(
        "SELECT position, prev, bucket, stream, version, id, type, type_version, time, actor, data \
         FROM events WHERE id = $1",
    )
    .bind(id.to_string())
    .fetch_optional(connection)
    .await?;
    raw.map(RawEvent::decode).transpose()
}

#[derive(sqlx::FromRow)]
struct RawRow {
    key: String,
    endpoint: String,
    deployment: String,
    position: i64,
    time: i64,
    doc: String,
}

impl From<RawRow> for Row {
    fn from(raw: RawRow) -> Self {
        Self {
            key: raw.key,
            endpoint: raw.endpoint,
            deployment: raw.deployment,
            position: Position(raw.position as u64),
            time: Timestamp::from_millis(raw.time),
            doc: raw.doc,
        }
    }
}

pub(crate) async fn row(
    connection: &mut Connection,
    model: &str,
    key: &str,
) -> Result<Option<Row>> {
    let raw: Option<RawRow> = sqlx::query_as(
        "SELECT key, endpoint, deployment, position, time, doc \
         FROM rows WHERE model = $1 AND key = $2",
    )
    .bind(model)
    .bind(key)
    .fetch_optional(connection)
    .await?;
    Ok(raw.map(Row::from))
}

/// Newest first; rows of one position in descending order of their key.
pub(crate) async fn rows(connection: &mut Connection, query: &RowQuery) -> Result<Vec<Row>> {
    let mut sql = select_rows(query);
    if let Some(before) = query.before {
        sql.push(" AND position < ").push_bind(before.0 as i64);
    }
    sql.push(" ORDER BY position DESC, key DESC LIMIT ")
        .push_bind(query.limit as i64);
    let mut page = fetch_rows(&mut sql, connection).await?;
    if let Some(last) = page.last().filter(|_| page.len() == query.limit) {
        // A page is continued by position alone, so rows of one position must not be split.
        let mut sql = select_rows(query);
        sql.push(" AND position = ")
            .push_bind(last.position.0 as i64)
            .push(" AND key < ")
            .push_bind(last.key.clone())
            .push(" ORDER BY key DESC");
        page.extend(fetch_rows(&mut sql, connection).await?);
    }
    Ok(page)
}

fn select_rows(query: &RowQuery) -> QueryBuilder<Db> {
    let mut sql = QueryBuilder::new(
        "SELECT key, endpoint, deployment, position, time, doc FROM rows WHERE model = ",
    );
    sql.push_bind(query.model.clone());
    if let Some(endpoint) = &query.endpoint {
        sql.push(" AND endpoint = ").push_bind(endpoint.clone());
    }
    if let Some(deployment) = &query.deployment {
        sql.push(" AND deployment = ").push_bind(deployment.clone());
    }
    if let Some(since) = query.since {
        sql.push(" AND time >= ").push_bind(since.millis());
    }
    sql
}

async fn fetch_rows(sql: &mut QueryBuilder<Db>, connection: &mut Connection) -> Result<Vec<Row>> {
    let raw: Vec<RawRow> = sql.build_query_as().fetch_all(connection).await?;
    Ok(raw.into_iter().map(Row::from).collect())
}

/// Rows of a model in order of their key, for walks over all of them.
pub(crate) async fn rows_by_key(
    connection: &mut Connection,
    model: &str,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<Row>> {
    let raw: Vec<RawRow> = sqlx::query_as(
        "SELECT key, endpoint, deployment, position, time, doc \
         FROM rows WHERE model = $1 AND key > $2 ORDER BY key LIMIT $3",
    )
    .bind(model)
    // Keys are never empty, so the empty text stands before all of them.
    .bind(after.unwrap_or_default())
    .bind(limit as i64)
    .fetch_all(connection)
    .await?;
    Ok(raw.into_iter().map(Row::from).collect())
}

pub(crate) async fn insert_events(
    connection: &mut Connection,
    events: &[(&Record, &str)],
) -> sqlx::Result<()> {
    for chunk in chunks(events) {
        QueryBuilder::<Db>::new(
            "INSERT INTO events (position, prev, bucket, stream, version, id, type, type_version, time, actor, data) ",
        )
        .push_values(chunk, |mut row, (record, data)| {
            row.push_bind(record.position.0 as i64)
                .push_bind(record.prev.0 as i64)
                .push_bind(i64::from(record.bucket.0))
                .push_bind(record.stream.as_str().to_owned())
                .push_bind(record.version as i64)
                .push_bind(record.id.to_string())
                .push_bind(record.event.type_name())
                .push_bind(i64::from(record.event.version()))
                .push_bind(record.time.millis())
                .push_bind(record.actor.0.clone())
                .push_bind((*data).to_owned());
        })
        .build()
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

pub(crate) async fn write_rows(
    connection: &mut Connection,
    changes: &[&RowChange],
) -> sqlx::Result<()> {
    let upserts: Vec<(&RowChange, &String)> = changes
        .iter()
        .filter_map(|change| Some((*change, change.doc.as_ref()?)))
        .collect();
    for chunk in chunks(&upserts) {
        QueryBuilder::<Db>::new(
            "INSERT INTO rows (model, key, endpoint, deployment, position, time, doc) ",
        )
        .push_values(chunk, |mut row, (change, doc)| {
            row.push_bind(change.model)
                .push_bind(change.key.clone())
                .push_bind(change.endpoint.clone())
                .push_bind(change.deployment.clone())
                .push_bind(change.position.0 as i64)
                .push_bind(change.time.millis())
                .push_bind((*doc).clone());
        })
        .push(
            " ON CONFLICT (model, key) DO UPDATE SET endpoint = excluded.endpoint, \
             deployment = excluded.deployment, position = excluded.position, \
             time = excluded.time, doc = excluded.doc",
        )
        .build()
        .execute(&mut *connection)
        .await?;
    }
    for change in changes.iter().filter(|change| change.doc.is_none()) {
        sqlx::query("DELETE FROM rows WHERE model = $1 AND key = $2")
            .bind(change.model)
            .bind(&change.key)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

pub(crate) async fn write_cursors(
    connection: &mut Connection,
    moves: &[CursorMove],
) -> sqlx::Result<()> {
    for chunk in chunks(moves) {
        QueryBuilder::<Db>::new("INSERT INTO cursors (consumer, bucket, position) ")
            .push_values(chunk, |mut row, cursor| {
                row.push_bind(cursor.consumer)
                    .push_bind(i64::from(cursor.bucket.0))
                    .push_bind(cursor.to.0 as i64);
            })
            .push(" ON CONFLICT (consumer, bucket) DO UPDATE SET position = excluded.position")
            .build()
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

pub(crate) async fn write_fence(
    connection: &mut Connection,
    name: &str,
    generation: u64,
) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO fences (name, generation) VALUES ($1, $2) \
         ON CONFLICT (name) DO UPDATE SET generation = excluded.generation",
    )
    .bind(name)
    .bind(generation as i64)
    .execute(connection)
    .await?;
    Ok(())
}

pub(crate) async fn write_causes(
    connection: &mut Connection,
    causes: &[(&String, &StoredCause)],
) -> sqlx::Result<()> {
    for chunk in chunks(causes) {
        QueryBuilder::<Db>::new("INSERT INTO causes (key, body_hash, result, positions, time) ")
            .push_values(chunk, |mut row, (key, cause)| {
                row.push_bind((*key).clone())
                    .push_bind(cause.body_hash.clone())
                    .push_bind(cause.result.clone())
                    .push_bind(cause.positions.clone())
                    .push_bind(cause.time);
            })
            .build()
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

/// Forgets idempotency keys of requests that are older than this. Causes of consumers stay.
pub(crate) async fn prune_causes(
    connection: &mut Connection,
    before: Timestamp,
) -> sqlx::Result<()> {
    sqlx::query("DELETE FROM causes WHERE time < $1 AND substr(key, 1, 5) = 'http:'")
        .bind(before.millis())
        .execute(connection)
        .await?;
    Ok(())
}

/// Cuts a list into pieces of a few fixed sizes.
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
    fn a_list_is_cut_into_known_sizes_and_loses_nothing() {
        for length in 0..200 {
            let items: Vec<usize> = (0..length).collect();
            let pieces = chunks(&items);
            assert!(pieces.iter().all(|piece| CHUNKS.contains(&piece.len())));
            assert_eq!(pieces.concat(), items);
        }
    }
}
