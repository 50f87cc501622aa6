//! Restores events as another store had them, with its cursors, fences and idempotency keys.
//!
//! Invariants: restored events continue the existing log or are refused; afterwards, new positions start
//! well above the highest position seen.

use std::collections::{BTreeMap, BTreeSet};

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, StreamName};

use crate::archive::archive_set::ArchiveSet;
use crate::archive::combined;
use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::columns::{CursorRow, IdempotencyKeyColumns, StoredIdempotencyKey};
use crate::sql::connection::Connection;
use crate::sql::statements;

/// How far above the highest position seen a restored store assigns new positions.
pub const POSITIONS_SKIPPED: u64 = 1 << 20;

/// A part of another store.
#[derive(Default)]
pub(crate) struct RestoreBatch {
    pub events: Vec<RawRecord>,
    pub cursors: Vec<(String, i64, i64)>,
    pub fences: Vec<(String, i64)>,
    /// In order of their keys.
    pub idempotency_keys: Vec<IdempotencyKeyColumns>,
}

impl RestoreBatch {
    /// Returns how many events were written, and the new head of the log.
    pub(crate) async fn write(
        &self,
        connection: &mut Connection<'_>,
        archive_set: &ArchiveSet,
    ) -> Result<(u64, Position), StoreError> {
        let written = self.write_events(connection, archive_set).await?;
        let cursor = |(consumer, bucket, position): &'_ (String, i64, i64)| {
            (consumer.clone(), *bucket as u16, *position as u64)
        };
        let cursors: Vec<(String, u16, u64)> = self.cursors.iter().map(cursor).collect();
        let cursors: Vec<CursorRow<'_>> = cursors
            .iter()
            .map(|(consumer, bucket, position)| CursorRow {
                consumer,
                bucket: Bucket(*bucket),
                position: Position(*position),
            })
            .collect();
        statements::write_cursors(connection, &cursors).await?;
        for (name, generation) in &self.fences {
            statements::raise_fence(connection, name, *generation).await?;
        }
        self.write_idempotency_keys(connection).await?;
        Ok(written)
    }

    async fn write_events(
        &self,
        connection: &mut Connection<'_>,
        archive_set: &ArchiveSet,
    ) -> Result<(u64, Position), StoreError> {
        let (Some(first), Some(last)) = (self.events.first(), self.events.last()) else {
            return Ok((0, Position::START));
        };
        let head = statements::head(connection).await?;
        let existing = self.events.partition_point(|event| event.position <= head);
        let (existing, new) = self.events.split_at(existing);
        if !existing.is_empty() {
            let between = (
                Position(first.position.0.saturating_sub(1)),
                Position(u64::MAX),
            );
            let limit = existing.len() + 1;
            let mut stored =
                combined::select(archive_set, connection, None, between, limit).await?;
            // If all of these exist already, the store may hold more.
            let up_to = if new.is_empty() { last.position } else { head };
            stored.retain(|event| event.position <= up_to);
            check_identical(existing, &stored)?;
        }
        let rows = check_continuation(connection, head, new).await?;
        statements::insert_events(connection, &rows).await?;
        let next = Position(last.position.0.max(head.0) + POSITIONS_SKIPPED);
        statements::set_next_position(connection, next).await?;
        Ok((
            new.len() as u64,
            new.last().map_or(head, |event| event.position),
        ))
    }

    async fn write_idempotency_keys(
        &self,
        connection: &mut Connection<'_>,
    ) -> Result<(), StoreError> {
        let (Some((first, ..)), Some((last, ..))) =
            (self.idempotency_keys.first(), self.idempotency_keys.last())
        else {
            return Ok(());
        };
        let stored = statements::existing_idempotency_keys(connection, first, last).await?;
        let stored: BTreeSet<String> = stored.into_iter().collect();
        let idempotency_keys: Vec<(&str, StoredIdempotencyKey)> = self
            .idempotency_keys
            .iter()
            .filter(|(key, ..)| !stored.contains(key))
            .map(|(key, body_hash, result, positions, time)| {
                let stored = StoredIdempotencyKey {
                    body_hash: body_hash.clone(),
                    result: result.clone(),
                    positions: positions.clone(),
                    time: *time,
                };
                (key.as_str(), stored)
            })
            .collect();
        let idempotency_keys: Vec<(&str, &StoredIdempotencyKey)> =
            idempotency_keys.iter().map(|(k, c)| (*k, c)).collect();
        Ok(statements::write_idempotency_keys(connection, &idempotency_keys).await?)
    }
}

/// Checks that events which exist already are identical to the restored ones.
fn check_identical(theirs: &[RawRecord], ours: &[RawRecord]) -> Result<(), StoreError> {
    let differs = theirs
        .iter()
        .zip(ours)
        .find(|(theirs, ours)| !theirs.is_same_as(ours));
    let at = match differs {
        Some((theirs, ours)) => Some(theirs.position.min(ours.position)),
        None => {
            let shorter = theirs.len().min(ours.len());
            let rest = theirs.get(shorter).or_else(|| ours.get(shorter));
            rest.map(|event| event.position)
        }
    };
    match at {
        None => Ok(()),
        Some(at) => Err(StoreError::refused(format!(
            "position {at} differs between the two logs: use an empty store, or one that holds the beginning of this log"
        ))),
    }
}

/// Checks that new events continue the log's order, the chains of their buckets and their streams.
/// Events that were published before the chain existed carry no hash and are chained here.
async fn check_continuation<'e>(
    connection: &mut Connection<'_>,
    head: Position,
    events: &'e [RawRecord],
) -> Result<Vec<EventRow<'e>>, StoreError> {
    let mut rows = Vec::with_capacity(events.len());
    let mut before = head;
    let mut buckets: BTreeMap<Bucket, (Position, ChainHash)> = BTreeMap::new();
    let mut streams: BTreeMap<&str, u64> = BTreeMap::new();
    for event in events {
        let at = event.position;
        let refused = |what: String| Err(StoreError::refused(format!("position {at}: {what}")));
        if at <= before {
            return refused(format!("it does not come after {before}"));
        }
        before = at;
        if let Ok(stream) = event.stream.parse::<StreamName>()
            && stream.bucket_key().bucket() != event.bucket
        {
            return refused(format!(
                "stream `{stream}` does not belong in bucket {}",
                event.bucket
            ));
        }
        let (prev, hash) = match buckets.get(&event.bucket) {
            Some(last) => *last,
            None => statements::last_of_bucket(connection, event.bucket, head)
                .await?
                .map(|last| (last.position, EventRow::from_raw(&last).hash()))
                .unwrap_or_default(),
        };
        if event.prev != prev {
            return refused(format!(
                "prev is {}, but bucket {} is at {prev}",
                event.prev, event.bucket
            ));
        }
        if event.prev_hash.is_some_and(|carried| carried != hash) {
            return refused(format!(
                "its previous-event hash does not match the event at {prev}, the one before it in bucket {}: \
                 one of them was changed after it was written",
                event.bucket
            ));
        }
        let mut row = EventRow::from_raw(event);
        row.prev_hash = Some(hash);
        buckets.insert(event.bucket, (at, row.hash()));
        rows.push(row);
        let version = match streams.get(event.stream.as_str()) {
            Some(version) => *version,
            None => statements::stream_version(connection, &event.stream).await?,
        };
        if event.version != version + 1 {
            return refused(format!(
                "version {} does not follow version {version} of stream `{}`",
                event.version, event.stream
            ));
        }
        streams.insert(&event.stream, event.version);
    }
    Ok(rows)
}
