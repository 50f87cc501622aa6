//! Seals the beginning of the log into files and deletes it from the table.
//!
//! Invariants: sealed events lie below every position from which a running consumer or the relay would
//! resume; a file is complete and durable before the store lists it, and listed before its events are deleted
//! from the table; the last event of each stream stays there, so stream versions, the heads of the buckets'
//! chains and the head of the log can always be read from it. Sealing may be interrupted at any point and is
//! resumed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::archive::builder::{ArchiveBuilder, ArchiveRange};
use crate::log::store::Store;
use crate::model::archive::Archive;
use crate::model::commit::Fence;
use crate::model::error::StoreError;
use crate::sql::connection::Connection;
use crate::sql::statements;
use crate::writing::exclusive::{ExclusiveTask, Fences};
use crate::writing::sealing::NewArchive;

/// The lease that allows one process at a time to seal.
pub const ARCHIVE_LEASE: &str = "archive";

/// The maximum number of events per file.
pub const ARCHIVE_EVENTS_MAX: u64 = 100_000;

/// The number of events that are read at once, and deleted per transaction: few enough that other writers
/// hardly wait.
const PAGE: usize = 1_000;

/// The consumer whose cursor in the global bucket is the position that the bus has confirmed for all buckets.
const RELAY: &str = "relay";

/// Limits on what is sealed. All given limits apply.
#[derive(Clone, Debug, Default)]
pub struct SealLimits {
    /// Only events below this position.
    pub before: Option<Position>,
    /// Only events before the first that is not older than this.
    pub older_than: Option<Timestamp>,
    /// The minimum number of events per file; 0 and 1 allow any file.
    pub events_min: u64,
    /// The maximum number of events per file; [`ARCHIVE_EVENTS_MAX`] by default.
    pub events_max: Option<u64>,
}

impl SealLimits {
    fn events_max(&self) -> u64 {
        let max = self.events_max.unwrap_or(ARCHIVE_EVENTS_MAX);
        max.clamp(1, ARCHIVE_EVENTS_MAX)
    }
}

/// What could be sealed, and what blocks more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sealable {
    /// The last position that is already sealed.
    pub after: Position,
    /// The last position that could be sealed within the limits.
    pub through: Position,
    /// The number of events above `after`, up to and including `through`.
    pub events: u64,
    /// The consumer without which more could be sealed; None if only the limits or the end of the log are in
    /// the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_back: Option<BlockingConsumer>,
}

/// The consumer that blocks sealing because it has not read far enough.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BlockingConsumer {
    /// Its name.
    pub consumer: String,
    /// None for all buckets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket: Option<Bucket>,
    /// The position that it has reached.
    pub at: Position,
}

impl std::fmt::Display for BlockingConsumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { consumer, at, .. } = self;
        match self.bucket {
            Some(bucket) => write!(f, "`{consumer}` is at position {at} of bucket {bucket}"),
            None => write!(f, "`{consumer}` is at position {at}"),
        }
    }
}

/// A file that was sealed by this call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SealedFile {
    /// The file, as listed in the store.
    #[serde(flatten)]
    pub archive: Archive,
    /// The uncompressed size of its events in bytes.
    pub bytes_before: u64,
}

/// Returns what would be sealed within these limits.
///
/// # Errors
///
/// If the store cannot be read or is closed.
pub async fn sealable(store: &Store, limits: &SealLimits) -> Result<Sealable, StoreError> {
    store.archives().await?;
    let after = store.archive_set().sealed();
    let mut reader = store.reader().await?;
    let connection = &mut reader.get();
    let head = statements::head(connection).await?;
    let allowed = last_allowed(connection, after, limits).await?.min(head);
    let blocked = find_blocker(connection, after).await?;
    let (through, held_back) = match blocked {
        Some((through, blocker)) if through < allowed => (through, Some(blocker)),
        _ => (allowed, None),
    };
    let range = statements::span(connection, (after, through), i64::MAX as u64).await?;
    Ok(Sealable {
        after,
        through,
        events: range.map_or(0, |(.., events)| events),
        held_back,
    })
}

/// Returns the last position that the limits allow, regardless of consumers.
async fn last_allowed(
    connection: &mut Connection<'_>,
    after: Position,
    limits: &SealLimits,
) -> Result<Position, StoreError> {
    let mut through = Position(u64::MAX);
    if let Some(before) = limits.before {
        through = Position(before.0.saturating_sub(1));
    }
    if let Some(time) = limits.older_than
        && let Some(first) = statements::first_since(connection, after, time).await?
    {
        through = through.min(Position(first.0 - 1));
    }
    Ok(through)
}

/// Returns the last position that no consumer still has to read, and the consumer that blocks more.
async fn find_blocker(
    connection: &mut Connection<'_>,
    after: Position,
) -> Result<Option<(Position, BlockingConsumer)>, StoreError> {
    let mut reached: BTreeMap<String, BTreeMap<Bucket, Position>> = BTreeMap::new();
    let mut blocked: Option<(Position, BlockingConsumer)> = None;
    for (consumer, bucket, at) in statements::consumer_positions(connection).await? {
        if consumer == RELAY {
            let bucket = None;
            keep_lowest(
                &mut blocked,
                at,
                BlockingConsumer {
                    consumer,
                    bucket,
                    at,
                },
            );
            continue;
        }
        // The views have a cursor and a snapshot, and may resume from either.
        let positions = reached.entry(consumer).or_default();
        let lowest = positions.entry(bucket).or_insert(at);
        *lowest = at.min(*lowest);
    }
    for (consumer, positions) in reached {
        for bucket in buckets_of(&positions) {
            let at = positions.get(&bucket).copied().unwrap_or_default();
            let next = statements::next_of_bucket(connection, bucket, at.max(after)).await?;
            if let Some(next) = next {
                let blocker = BlockingConsumer {
                    consumer: consumer.clone(),
                    bucket: Some(bucket),
                    at,
                };
                keep_lowest(&mut blocked, Position(next.0 - 1), blocker);
            }
        }
    }
    Ok(blocked)
}

/// Returns all endpoint buckets, because one without a stored position is read from its start, and the
/// buckets with one. The global bucket is always read from its start by many consumers.
fn buckets_of(positions: &BTreeMap<Bucket, Position>) -> BTreeSet<Bucket> {
    let endpoints = Bucket::all().filter(|bucket| *bucket != Bucket::GLOBAL);
    endpoints.chain(positions.keys().copied()).collect()
}

fn keep_lowest(
    blocked: &mut Option<(Position, BlockingConsumer)>,
    through: Position,
    blocker: BlockingConsumer,
) {
    if blocked.as_ref().is_none_or(|(lowest, _)| through < *lowest) {
        *blocked = Some((through, blocker));
    }
}

/// Seals what may be sealed, file by file, under this fence of [`ARCHIVE_LEASE`]. `progress` receives each
/// file.
///
/// # Errors
///
/// Refused if the lease was taken over, the folder cannot be written, or the log is damaged. Files that were
/// sealed before stay.
pub async fn seal(
    store: &Store,
    fence: &Fence,
    limits: &SealLimits,
    now: Timestamp,
    mut progress: impl FnMut(&SealedFile),
) -> Result<Vec<SealedFile>, StoreError> {
    let fences = Arc::new(Fences {
        fences: vec![fence.clone()],
        lost: StoreError::refused(
            "another process is archiving the log of this store: run this again when it is done"
                .to_owned(),
        ),
    });
    let through = sealable(store, limits).await?.through;
    // Finishes an interrupted run.
    clear(store, &fences, Position::START).await?;
    let mut sealed = Vec::new();
    while let Some(file) = seal_next(store, &fences, limits, through, now).await? {
        clear(store, &fences, file.archive.first).await?;
        progress(&file);
        sealed.push(file);
    }
    Ok(sealed)
}

async fn seal_next(
    store: &Store,
    fences: &Arc<Fences>,
    limits: &SealLimits,
    through: Position,
    now: Timestamp,
) -> Result<Option<SealedFile>, StoreError> {
    let after = store.archive_set().sealed();
    let next = (after, through);
    let range = {
        let mut reader = store.reader().await?;
        statements::span(&mut reader.get(), next, limits.events_max()).await?
    };
    let range = range.filter(|(.., events)| *events >= limits.events_min);
    let Some((first, last, events)) = range else {
        return Ok(None);
    };
    let end = store
        .archive_set()
        .run_blocking(|archive_set| archive_set.last_archive_blocking())
        .await?;
    let (previous, heads) = end.map_or((None, Vec::new()), |(previous, heads)| {
        (Some(previous), heads)
    });
    let range = ArchiveRange {
        first,
        last,
        events,
        previous,
        heads,
    };
    let file = build_archive(store, range, now).await?;
    let new_archive = NewArchive {
        archive: file.archive.clone(),
        after,
        folder: store.archive_set().folder_to_record()?,
    };
    let listed = ExclusiveTask::ListArchive(Box::new(new_archive), fences.clone());
    store.run_exclusive(listed).await?;
    store.archives().await?;
    Ok(Some(file))
}

async fn build_archive(
    store: &Store,
    range: ArchiveRange,
    now: Timestamp,
) -> Result<SealedFile, StoreError> {
    let folder = store.archive_set().folder()?;
    let (last, mut after) = (range.last, Position(range.first.0 - 1));
    let begin = store
        .archive_set()
        .run_blocking(move |_| ArchiveBuilder::create(&folder, range));
    let mut builder = begin.await?;
    while after < last {
        let mut reader = store.reader().await?;
        let mut page = statements::read_all(&mut reader.get(), after, PAGE).await?;
        drop(reader);
        page.retain(|event| event.position <= last);
        let Some(end) = page.last() else { break };
        after = end.position;
        let add = move |mut builder: ArchiveBuilder| {
            page.into_iter().try_for_each(|event| builder.add(event))?;
            Ok(builder)
        };
        builder = store
            .archive_set()
            .run_blocking(move |_| add(builder))
            .await?;
    }
    let finish = store
        .archive_set()
        .run_blocking(move |_| builder.finish(now));
    let (archive, bytes_before) = finish.await?;
    Ok(SealedFile {
        archive,
        bytes_before,
    })
}

/// Deletes archived events from the table, except the last event of each stream.
async fn clear(store: &Store, fences: &Arc<Fences>, from: Position) -> Result<(), StoreError> {
    let sealed = store.archive_set().sealed();
    let mut after = Position(from.0.saturating_sub(1));
    loop {
        let next = {
            let mut reader = store.reader().await?;
            statements::clearable(&mut reader.get(), (after, sealed), PAGE as u64).await?
        };
        let Some((first, last, _)) = next else {
            return Ok(());
        };
        let cleared = ExclusiveTask::ClearSealed((first, last), fences.clone());
        store.run_exclusive(cleared).await?;
        after = last;
    }
}
