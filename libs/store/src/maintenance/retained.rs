//! Compares the events that the table retains of the archived part of the log with the archives.
//!
//! The table has at least the last event of each archived stream. Readers of a stream, of an event by its id, and
//! of the versions and hashes that new events continue take it from there, without opening an archive.

use std::collections::BTreeMap;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, StreamName};

use crate::archive::archive_set::ArchiveSet;
use crate::log::store::{READ_LIMIT_MAX, Store};
use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::model::rows::PAGE_ROWS_MAX;
use crate::sql::connection::Connection;
use crate::sql::statements;

/// What identifies an event with all its fields.
type Fingerprint = (Option<ChainHash>, ChainHash);

fn fingerprint(event: &RawRecord) -> Fingerprint {
    (event.prev_hash, EventRow::from_raw(event).hash())
}

/// The events in the table at or below the last archived position.
#[derive(Clone, Default)]
pub(crate) struct RetainedEvents {
    /// The last archived position.
    pub sealed: Position,
    events: BTreeMap<Position, Fingerprint>,
}

impl RetainedEvents {
    /// Reads them; on a connection that sees one database snapshot.
    pub(crate) async fn read(connection: &mut Connection<'_>) -> Result<Self, StoreError> {
        let sealed = statements::sealed(connection).await?;
        let mut events = BTreeMap::new();
        let mut after = None;
        loop {
            let page = statements::read_through(connection, after, sealed, PAGE_ROWS_MAX).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.position);
            events.extend(
                page.iter()
                    .map(|event| (event.position, fingerprint(event))),
            );
        }
        Ok(Self { sealed, events })
    }

    /// Removes the copy of an archived event. Returns whether there is one, or what is wrong with it.
    pub(crate) fn take(&mut self, archived: &RawRecord) -> Result<bool, String> {
        match self.events.remove(&archived.position) {
            None => Ok(false),
            Some(retained) if retained == fingerprint(archived) => Ok(true),
            Some(_) => Err(differs(archived.position)),
        }
    }

    /// Returns what is wrong with the events that were not taken.
    pub(crate) fn unarchived(self) -> impl Iterator<Item = String> {
        self.events.into_keys().map(not_archived)
    }
}

fn differs(position: Position) -> String {
    format!("position {position}: the store's copy differs from the archive")
}

pub(crate) fn missing(position: Position) -> String {
    format!("position {position}: the archive has this event, but the store's copy is missing")
}

fn not_archived(position: Position) -> String {
    // Positions below 1 are negative in the database.
    let position = position.0 as i64;
    format!("position {position}: the store has an event there that is not in the archive")
}

/// Checks those retained events on which the next ones and all access depend: the head of each bucket's chain,
/// and the access tokens. Much less work than [`verify`](crate::verify()), for a start.
///
/// # Errors
///
/// [`StoreError::Refused`] if one of them differs from the archives, with its position; others if the store or an
/// archive cannot be read.
pub async fn check_retained(store: &Store) -> Result<(), StoreError> {
    let mut reader = store.reader().await?;
    let mut snapshot = reader.snapshot().await?;
    let connection = &mut snapshot.get();
    let archive_set = store.archive_set();
    archive_set.load(connection).await?;
    let sealed = statements::sealed(connection).await?;
    if sealed == Position::START {
        return Ok(());
    }
    let mut problem = check_heads(archive_set, connection, sealed).await?;
    if problem.is_none() {
        problem = check_stream(archive_set, connection, sealed, &StreamName::access()).await?;
    }
    match problem {
        None => Ok(()),
        Some(problem) => Err(StoreError::refused(format!(
            "{} was changed: {problem}. `penstock store verify` lists all differences. Restore the store from a \
             backup, with `penstock store rebuild --from`",
            store.location()
        ))),
    }
}

async fn check_heads(
    archive_set: &ArchiveSet,
    connection: &mut Connection<'_>,
    sealed: Position,
) -> Result<Option<String>, StoreError> {
    let mut ends = Vec::new();
    for bucket in Bucket::all() {
        let last = statements::last_of_bucket(connection, bucket, Position(u64::MAX)).await?;
        let end = last.map(|last| (last.position, EventRow::from_raw(&last).hash()));
        if end.is_none_or(|(position, _)| position <= sealed) {
            ends.push((bucket, end));
        }
    }
    let compare = move |archive_set: &ArchiveSet| {
        for (bucket, end) in ends {
            let archived = archive_set.last_of_bucket_blocking(bucket, sealed)?;
            if end != archived {
                return Ok(Some(describe(
                    end.map(|(position, _)| position),
                    archived.map(|(position, _)| position),
                )));
            }
        }
        Ok(None)
    };
    archive_set.run_blocking(compare).await
}

async fn check_stream(
    archive_set: &ArchiveSet,
    connection: &mut Connection<'_>,
    sealed: Position,
    stream: &StreamName,
) -> Result<Option<String>, StoreError> {
    let limit = READ_LIMIT_MAX;
    let mut retained = statements::read_stream(connection, stream.as_str(), 0, limit).await?;
    let first = retained.first().map_or(1, |first| first.version);
    let is_empty = retained.is_empty();
    // Including positions below 1, which are negative in the database.
    retained.retain(|event| event.position.0 as i64 <= sealed.0 as i64);
    if retained.is_empty() && !is_empty {
        return Ok(None);
    }
    let name = stream.as_str().to_owned();
    let archived = archive_set.run_blocking(move |archive_set| {
        archive_set.read_stream_blocking(&name, (first.saturating_sub(1), u64::MAX), limit)
    });
    let mut archived = archived.await?;
    archived.retain(|event| event.position <= sealed);
    let length = retained.len().max(archived.len());
    let differing = (0..length).find(|index| retained.get(*index) != archived.get(*index));
    Ok(differing.map(|index| {
        let position = |events: &[RawRecord]| events.get(index).map(|event| event.position);
        describe(position(&retained), position(&archived))
    }))
}

/// Describes the difference between the position of a retained event and that of the archived one.
fn describe(retained: Option<Position>, archived: Option<Position>) -> String {
    match (retained, archived) {
        (Some(retained), Some(archived)) if retained == archived => differs(archived),
        (Some(retained), archived) if archived.is_none_or(|archived| archived < retained) => {
            not_archived(retained)
        }
        (_, archived) => missing(archived.unwrap_or_default()),
    }
}
