//! Hashes and copies an entire log, and restores events as another store had them.
//!
//! Invariants: restored events continue the existing log or are refused; afterwards, new positions start
//! well above the highest position seen, so that no position is ever assigned to two events; a cursor is
//! never copied without the data that it covers.

use contract::chain::HashedFields;
use contract::ids::Position;
use contract::log::RawRecord;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::archive::combined;
use crate::log::store::Store;
use crate::model::error::StoreError;
use crate::model::rows::VIEWS;
use crate::sql::connection::Connection;
use crate::sql::statements;
use crate::writing::exclusive::ExclusiveTask;
use crate::writing::restore::{POSITIONS_SKIPPED, RestoreBatch};

/// The number of events that are read or restored at once.
const PAGE: usize = 2_000;

/// The hash of all events up to a position: equal logs have equal hashes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LogHash {
    /// The number of hashed events.
    pub events: u64,
    /// The position of the last hashed event.
    pub head: Position,
    /// In hexadecimal.
    pub sha256: String,
}

/// Hashes a log event by event, for logs outside a store.
#[derive(Clone, Default)]
pub struct LogHasher {
    hash: Sha256,
    events: u64,
    head: Position,
}

impl LogHasher {
    /// Adds an event. Its chain hash is not included: it follows from the earlier events.
    pub fn update(&mut self, event: &RawRecord) {
        HashedFields::of(event).hash_into(&mut self.hash);
        self.events += 1;
        self.head = event.position;
    }

    /// Returns the hash of the events that were added.
    pub fn finish(self) -> LogHash {
        let digest = self.hash.finalize();
        LogHash {
            events: self.events,
            head: self.head,
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

/// Returns the hash of all events up to a position, in order.
///
/// # Errors
///
/// If the store cannot be read or is closed.
pub async fn log_hash(store: &Store, up_to: Position) -> Result<LogHash, StoreError> {
    let mut hasher = LogHasher::default();
    let mut after = Position::START;
    while after < up_to {
        let page = store.read_raw(after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = last.position;
        for event in page.iter().filter(|event| event.position <= up_to) {
            hasher.update(event);
        }
    }
    Ok(hasher.finish())
}

/// Restores events as another store had them, with their positions. Events that exist already are compared;
/// the rest must continue the log. Returns how many were written. New positions start
/// [`POSITIONS_SKIPPED`] above.
///
/// # Errors
///
/// [`StoreError::Refused`] if an event differs from the existing one or does not continue the log, others if
/// the store cannot be written. Earlier pages of the events stay written.
pub async fn append_raw(store: &Store, events: Vec<RawRecord>) -> Result<u64, StoreError> {
    let mut written = 0;
    let mut events = events.into_iter();
    loop {
        let events: Vec<RawRecord> = events.by_ref().take(PAGE).collect();
        if events.is_empty() {
            return Ok(written);
        }
        let restore = RestoreBatch {
            events,
            ..RestoreBatch::default()
        };
        written += store.restore(restore).await?;
    }
}

/// Makes new positions start [`POSITIONS_SKIPPED`] above a position that was seen elsewhere, and above the
/// head.
///
/// # Errors
///
/// If the store cannot be written or is closed.
pub async fn skip_positions_above(store: &Store, seen: Position) -> Result<(), StoreError> {
    let next = Position(seen.max(store.head().await?).0 + POSITIONS_SKIPPED);
    store
        .run_exclusive(ExclusiveTask::RaiseFloor(next))
        .await
        .map(|_| ())
}

/// Copies events, cursors, fences and idempotency keys into an empty store, or one that holds the beginning
/// of the same log. Everything is read in one database snapshot. Read models, their cursors and snapshots
/// are not copied: they are rebuilt explicitly, or by their consumers on the next run. `progress` receives
/// the number of copied events and the total.
///
/// # Errors
///
/// [`StoreError::Refused`] if the target holds anything but the beginning of this log, others if one store
/// cannot be read or the other cannot be written. What was copied before stays: call it again to continue.
pub async fn copy(
    from: &Store,
    to: &Store,
    mut progress: impl FnMut(u64, u64),
) -> Result<LogHash, StoreError> {
    let mut reader = from.reader().await?;
    let mut snapshot = reader.snapshot().await?;
    let mut connection = snapshot.get();
    let total = statements::count(&mut connection).await?;
    let head = statements::head(&mut connection).await?;
    let mut hasher = LogHasher::default();
    let mut after = Position::START;
    loop {
        let between = (after, head);
        let events =
            combined::select(from.archive_set(), &mut connection, None, between, PAGE).await?;
        let Some(last) = events.last() else { break };
        after = last.position;
        for event in &events {
            hasher.update(event);
        }
        let restore = RestoreBatch {
            events,
            ..RestoreBatch::default()
        };
        to.restore(restore).await?;
        progress(hasher.events, total);
    }
    copy_idempotency_keys(&mut connection, to).await?;
    let rest = RestoreBatch {
        cursors: copyable_cursors(statements::all_cursors(&mut connection).await?),
        fences: statements::all_fences(&mut connection).await?,
        ..RestoreBatch::default()
    };
    to.restore(rest).await?;
    if let Some(next) = statements::next_position(&mut connection).await? {
        to.run_exclusive(ExclusiveTask::RaiseFloor(next)).await?;
    }
    snapshot.rollback().await?;
    Ok(hasher.finish())
}

/// Keeps the cursors that also hold for a copy. The relay's says that the bus has the events, whichever
/// store they are in, so they are not published again. That of the views says that their rows were written;
/// a copy has no rows, and with the cursor they would never be written.
fn copyable_cursors(mut cursors: Vec<(String, i64, i64)>) -> Vec<(String, i64, i64)> {
    cursors.retain(|(consumer, ..)| consumer != VIEWS);
    cursors
}

async fn copy_idempotency_keys(
    connection: &mut Connection<'_>,
    to: &Store,
) -> Result<(), StoreError> {
    let mut after = String::new();
    loop {
        let idempotency_keys = statements::idempotency_keys_after(connection, &after, PAGE).await?;
        let Some((last, ..)) = idempotency_keys.last() else {
            return Ok(());
        };
        after = last.clone();
        let restore = RestoreBatch {
            idempotency_keys,
            ..RestoreBatch::default()
        };
        to.restore(restore).await?;
    }
}

impl Store {
    pub(crate) async fn restore(&self, restore: RestoreBatch) -> Result<u64, StoreError> {
        let output = self.run_exclusive(ExclusiveTask::Restore(restore)).await?;
        Ok(output.number.unwrap_or_default())
    }
}
