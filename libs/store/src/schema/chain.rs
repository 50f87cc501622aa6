//! Adds the hash chain to a store of an older format, once.
//!
//! Invariants: an event that carries a hash keeps it; a store gets this format only when every event
//! carries one. Chaining may be interrupted at any point and is resumed; processes that start at the same
//! time can chain concurrently.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::RawRecord;

use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::schema::format::{self, known_format};
use crate::sql::connection::{Connection, OwnedConnection};
use crate::sql::location::StoreLocation;
use crate::sql::{postgres, statements};

/// The number of events that are chained per transaction: few enough that other writers do not wait long.
const PAGE: usize = 2_000;

/// How often progress is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// The first format in which every event is chained, and the migration that adds the column for it.
pub(crate) const FORMAT: u64 = 2;
pub(crate) const MIGRATION: i64 = 4;

/// A progress callback: the position up to which events are chained, and the head at the start.
pub(crate) type ChainProgress<'a> = dyn FnMut(Position, Position) + Send + 'a;

/// Returns a callback that logs progress periodically.
pub(crate) fn log_progress(
    location: &StoreLocation,
) -> impl FnMut(Position, Position) + Send + use<> {
    let (store, mut last_logged) = (location.to_string(), Instant::now());
    move |up_to, head| {
        if last_logged.elapsed() >= LOG_INTERVAL {
            last_logged = Instant::now();
            tracing::info!(store, %up_to, %head, "chaining events of an older format");
        }
    }
}

/// Chains all events that are not chained yet, and raises the store to this format.
pub(crate) async fn upgrade(
    location: &StoreLocation,
    connection: &mut OwnedConnection,
    progress: &mut ChainProgress<'_>,
) -> Result<(), StoreError> {
    let head = statements::head(&mut connection.get()).await?;
    let mut chain = ChainBuilder::default();
    loop {
        let mut transaction = connection.begin().await?;
        let mut tx = transaction.get();
        if let Connection::Postgres(connection, limit) = &mut tx {
            postgres::locks::lock_commits(connection, *limit).await?;
        }
        let page = statements::read_all(&mut tx, chain.up_to, PAGE).await?;
        let chained = chain.chain_page(&page);
        statements::chain_events(&mut tx, &chained).await?;
        let is_last = page.len() < PAGE;
        if is_last {
            finish(location, &mut tx).await?;
        }
        transaction.commit().await?;
        progress(chain.up_to, head);
        if is_last {
            return Ok(());
        }
    }
}

/// Must be called while nobody else writes.
async fn finish(
    location: &StoreLocation,
    connection: &mut Connection<'_>,
) -> Result<(), StoreError> {
    if let Some(stored) = statements::meta(connection, "format").await?
        && known_format(location, &stored)? >= FORMAT
    {
        return Ok(());
    }
    statements::set_meta(connection, "format", &format::FORMAT.to_string()).await?;
    if let Connection::Postgres(connection, _) = connection {
        postgres::require_chain(connection).await?;
    }
    Ok(())
}

/// The chains built so far.
#[derive(Default)]
struct ChainBuilder {
    up_to: Position,
    hashes: BTreeMap<Bucket, ChainHash>,
}

impl ChainBuilder {
    /// Returns the hashes for events that carry none.
    fn chain_page(&mut self, page: &[RawRecord]) -> Vec<(Position, ChainHash)> {
        let mut chained = Vec::new();
        for event in page {
            let before = self.hashes.get(&event.bucket).copied();
            let mut row = EventRow::from_raw(event);
            if row.prev_hash.is_none() {
                let hash = before.unwrap_or(ChainHash::START);
                chained.push((event.position, hash));
                row.prev_hash = Some(hash);
            }
            self.hashes.insert(event.bucket, row.hash());
            self.up_to = event.position;
        }
        chained
    }
}
