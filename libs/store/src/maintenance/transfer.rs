//! A log as a whole: its hash, copies of it, and events that are taken in as another store had them.
//!
//! Invariants: what is taken in continues the log that is there, or is refused; a store that has
//! taken in events goes on well above the highest position seen, so that no position that was
//! given before is ever given to another event; a cursor is never copied without what it speaks for.

use std::collections::{BTreeMap, BTreeSet};

use contract::chain::{ChainHash, Fields};
use contract::ids::{Bucket, Position};
use contract::log::StreamName;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::model::raw::EventRow;
use crate::model::rows::VIEWS;
use crate::sql::connection::Connection;
use crate::sql::statements;
use crate::sql::statements::{CauseColumns, CursorRow, StoredCause};
use crate::writing::alone::{Alone, Answer};
use crate::{RawRecord, Store, StoreError};

/// How far above the highest position seen a store goes on that was made from a copy.
pub const POSITIONS_SKIPPED: u64 = 1 << 20;

/// Events that are read, or taken in, at once.
const PAGE: usize = 2_000;

/// Of all events up to a position: equal logs have equal hashes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LogHash {
    pub events: u64,
    /// The position of the last event that was taken in.
    pub head: Position,
    /// In hexadecimal.
    pub sha256: String,
}

/// A hash that is fed one event after the other, for logs that stand elsewhere.
#[derive(Clone, Default)]
pub struct LogHasher {
    hash: Sha256,
    events: u64,
    head: Position,
}

impl LogHasher {
    /// The hash that an event carries does not count: it follows from the others.
    pub fn take_in(&mut self, event: &RawRecord) {
        Fields::of(event).feed(&mut self.hash);
        self.events += 1;
        self.head = event.position;
    }

    pub fn finish(self) -> LogHash {
        let digest = self.hash.finalize();
        LogHash {
            events: self.events,
            head: self.head,
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

/// The hash over all events up to a position, in their order.
pub async fn log_hash(store: &Store, up_to: Position) -> Result<LogHash, StoreError> {
    let mut hasher = LogHasher::default();
    let mut after = Position::START;
    while after < up_to {
        let page = store.read_raw(after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = last.position;
        for event in page.iter().filter(|event| event.position <= up_to) {
            hasher.take_in(event);
        }
    }
    Ok(hasher.finish())
}

/// Takes in events as they stood in another store, with their positions. What is there already is
/// compared; the rest must continue it. Returns how many were written. New events go on
/// [`POSITIONS_SKIPPED`] above.
pub async fn append_raw(store: &Store, events: Vec<RawRecord>) -> Result<u64, StoreError> {
    let mut written = 0;
    let mut events = events.into_iter();
    loop {
        let events: Vec<RawRecord> = events.by_ref().take(PAGE).collect();
        if events.is_empty() {
            return Ok(written);
        }
        let restore = Restore {
            events,
            ..Restore::default()
        };
        written += store.restore(restore).await?;
    }
}

/// Makes new events go on [`POSITIONS_SKIPPED`] above a position that was seen somewhere.
pub async fn go_on_above(store: &Store, seen: Position) -> Result<(), StoreError> {
    let next = Position(seen.0 + POSITIONS_SKIPPED);
    store.alone(Alone::Floor(next)).await.map(|_| ())
}

/// Copies events, cursors, fences and causes into an empty store, or one that holds the beginning of
/// the same log. All is read as of one moment. Read models and snapshots are not copied, nor the cursors
/// of those who keep them: they are rebuilt, or whoever keeps them makes them when it next runs.
/// `progress` hears how many events were copied, and of how many.
pub async fn copy(
    from: &Store,
    to: &Store,
    mut progress: impl FnMut(u64, u64),
) -> Result<LogHash, StoreError> {
    let mut reader = from.reader().await?;
    let mut snapshot = reader.snapshot().await?;
    let mut connection = snapshot.get();
    let total = statements::count(&mut connection).await?;
    let mut hasher = LogHasher::default();
    let mut after = Position::START;
    loop {
        let events = statements::read_all(&mut connection, after, PAGE).await?;
        let Some(last) = events.last() else { break };
        after = last.position;
        for event in &events {
            hasher.take_in(event);
        }
        let restore = Restore {
            events,
            ..Restore::default()
        };
        to.restore(restore).await?;
        progress(hasher.events, total);
    }
    copy_causes(&mut connection, to).await?;
    let rest = Restore {
        cursors: done_outside(statements::all_cursors(&mut connection).await?),
        fences: statements::all_fences(&mut connection).await?,
        ..Restore::default()
    };
    to.restore(rest).await?;
    if let Some(next) = statements::next_position(&mut connection).await? {
        to.alone(Alone::Floor(next)).await?;
    }
    snapshot.rollback().await?;
    Ok(hasher.finish())
}

/// A cursor says that something has been done up to a position. The relay's says that the bus has the
/// events; that is so whichever store they stand in, and nothing is to be published once more. The one
/// of the views says that their rows have been written, which no copy has: with it, they would never be.
fn done_outside(mut cursors: Vec<(String, i64, i64)>) -> Vec<(String, i64, i64)> {
    cursors.retain(|(consumer, ..)| consumer != VIEWS);
    cursors
}

async fn copy_causes(connection: &mut Connection<'_>, to: &Store) -> Result<(), StoreError> {
    let mut after = String::new();
    loop {
        let causes = statements::causes_after(connection, &after, PAGE).await?;
        let Some((last, ..)) = causes.last() else {
            return Ok(());
        };
        after = last.clone();
        let restore = Restore {
            causes,
            ..Restore::default()
        };
        to.restore(restore).await?;
    }
}

/// What another store had.
#[derive(Default)]
pub(crate) struct Restore {
    events: Vec<RawRecord>,
    cursors: Vec<(String, i64, i64)>,
    fences: Vec<(String, i64)>,
    /// In order of their keys.
    causes: Vec<CauseColumns>,
}

impl Restore {
    pub(crate) async fn write(
        &self,
        connection: &mut Connection<'_>,
    ) -> Result<Answer, StoreError> {
        let (number, head) = self.write_events(connection).await?;
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
        self.write_causes(connection).await?;
        Ok(Answer {
            number: Some(number),
            head,
            ..Answer::default()
        })
    }

    async fn write_events(
        &self,
        connection: &mut Connection<'_>,
    ) -> Result<(u64, Position), StoreError> {
        let (Some(first), Some(last)) = (self.events.first(), self.events.last()) else {
            return Ok((0, Position::START));
        };
        let head = statements::head(connection).await?;
        let known = self.events.partition_point(|event| event.position <= head);
        let (known, new) = self.events.split_at(known);
        if !known.is_empty() {
            let after = Position(first.position.0.saturating_sub(1));
            let mut stored = statements::read_all(connection, after, known.len() + 1).await?;
            // Where all of these are known, the store may hold more.
            let up_to = if new.is_empty() { last.position } else { head };
            stored.retain(|event| event.position <= up_to);
            same(known, &stored)?;
        }
        let rows = continuing(connection, head, new).await?;
        statements::insert_events(connection, &rows).await?;
        let next = Position(last.position.0.max(head.0) + POSITIONS_SKIPPED);
        statements::set_next_position(connection, next).await?;
        Ok((
            new.len() as u64,
            new.last().map_or(head, |event| event.position),
        ))
    }

    async fn write_causes(&self, connection: &mut Connection<'_>) -> Result<(), StoreError> {
        let (Some((first, ..)), Some((last, ..))) = (self.causes.first(), self.causes.last())
        else {
            return Ok(());
        };
        let stored = statements::cause_keys(connection, first, last).await?;
        let stored: BTreeSet<String> = stored.into_iter().collect();
        let causes: Vec<(&str, StoredCause)> = self
            .causes
            .iter()
            .filter(|(key, ..)| !stored.contains(key))
            .map(|(key, body_hash, result, positions, time)| {
                let cause = StoredCause {
                    body_hash: body_hash.clone(),
                    result: result.clone(),
                    positions: positions.clone(),
                    time: *time,
                };
                (key.as_str(), cause)
            })
            .collect();
        let causes: Vec<(&str, &StoredCause)> = causes.iter().map(|(k, c)| (*k, c)).collect();
        Ok(statements::write_causes(connection, &causes).await?)
    }
}

/// What is there already must be what is taken in.
fn same(theirs: &[RawRecord], ours: &[RawRecord]) -> Result<(), StoreError> {
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
        Some(at) => Err(StoreError::Refused(format!(
            "position {at} is not the same in both logs: use an empty store, or one that holds the beginning of this log"
        ))),
    }
}

/// New events must continue the log's order, the chains of their buckets and their streams. One that
/// was published before there was a chain carries no hash, and is chained now.
async fn continuing<'e>(
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
        let refused = |what: String| Err(StoreError::Refused(format!("position {at}: {what}")));
        if at <= before {
            return refused(format!("it does not come after {before}"));
        }
        before = at;
        if let Ok(stream) = event.stream.parse::<StreamName>()
            && stream.bucket_key().bucket() != event.bucket
        {
            return refused(format!(
                "stream `{stream}` is not of bucket {}",
                event.bucket
            ));
        }
        let (prev, hash) = match buckets.get(&event.bucket) {
            Some(last) => *last,
            None => statements::last_of_bucket(connection, event.bucket, head)
                .await?
                .map(|last| (last.position, EventRow::raw(&last).hash()))
                .unwrap_or_default(),
        };
        if event.prev != prev {
            return refused(format!(
                "prev is {}, but bucket {} stands at {prev}",
                event.prev, event.bucket
            ));
        }
        if event.prev_hash.is_some_and(|carried| carried != hash) {
            return refused(format!(
                "the hash that it carries is not that of the event at {prev}, which is before it in \
                 bucket {}: one of them was changed after it was written",
                event.bucket
            ));
        }
        let mut row = EventRow::raw(event);
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

impl Store {
    pub(crate) async fn restore(&self, restore: Restore) -> Result<u64, StoreError> {
        let answer = self.alone(Alone::Restore(restore)).await?;
        Ok(answer.number.unwrap_or_default())
    }
}
