//! Reads the log across archives and the table: its beginning is in files, the rest in the table.
//!
//! Invariant: no event is missed while files are sealed and the table is cleared. A read from the table
//! counts only if nothing above the position it started from had been sealed by then. The sealed position
//! only increases, so it is checked after the table was read.

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::RawRecord;

use crate::archive::archive_set::{ArchiveQuery, ArchiveSet};
use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::connection::Connection;
use crate::sql::page::{Page, PageQuery, read_page};
use crate::sql::statements;

/// Reads events in `(after, through]`, of one bucket or of all, in order of position.
pub(crate) async fn select(
    archive_set: &ArchiveSet,
    connection: &mut Connection<'_>,
    bucket: Option<Bucket>,
    (after, through): (Position, Position),
    limit: usize,
) -> Result<Vec<RawRecord>, StoreError> {
    let archive_query = ArchiveQuery {
        bucket,
        after,
        through,
        excluded_kinds: Vec::new(),
        limit,
    };
    let mut sealed = archive_set.sealed();
    loop {
        let mut found = select_archived(archive_set, &archive_query, sealed).await?;
        let (above, rest) = (after.max(sealed), limit - found.len());
        if rest == 0 || through <= above {
            return Ok(found);
        }
        let mut rows = match bucket {
            Some(bucket) => statements::read_bucket(connection, bucket, above, rest).await?,
            None => statements::read_all(connection, above, rest).await?,
        };
        rows.retain(|row| row.position <= through);
        found.extend(rows);
        if statements::sealed(connection).await? <= above {
            return Ok(found);
        }
        archive_set.load(connection).await?;
        sealed = archive_set.sealed();
    }
}

async fn select_archived(
    archive_set: &ArchiveSet,
    archive_query: &ArchiveQuery,
    sealed: Position,
) -> Result<Vec<RawRecord>, StoreError> {
    if archive_query.after >= sealed {
        return Ok(Vec::new());
    }
    let archive_query = archive_query.clone();
    archive_set
        .run_blocking(move |archive_set| archive_set.select_blocking(&archive_query))
        .await
}

/// Reads the next events as pages, from archives and from the table: as many as requested, or all that there
/// are.
pub(crate) async fn pages(
    archive_set: &ArchiveSet,
    connection: &mut Connection<'_>,
    query: &PageQuery<'_>,
) -> Result<Vec<Page>, StoreError> {
    let archive_query = ArchiveQuery {
        bucket: query.bucket,
        after: query.after,
        through: query.through,
        excluded_kinds: query.excluded_kinds.to_vec(),
        limit: query.limit,
    };
    let mut sealed = archive_set.sealed();
    loop {
        let found = select_archived(archive_set, &archive_query, sealed).await?;
        let (above, rest) = (query.after.max(sealed), query.limit - found.len());
        let mut pages: Vec<Page> = Page::from_events(found, query).into_iter().collect();
        if rest == 0 || query.through <= above {
            return Ok(pages);
        }
        let rest = PageQuery {
            after: above,
            limit: rest,
            ..*query
        };
        pages.extend(read_page(connection, &rest).await?);
        if statements::sealed(connection).await? <= above {
            return Ok(pages);
        }
        archive_set.load(connection).await?;
        sealed = archive_set.sealed();
    }
}

/// Reads the events of a stream after a version. The table's part of a stream has no gaps and ends with the
/// stream's last event; if it does not start with the next version, that one is archived.
pub(crate) async fn stream(
    archive_set: &ArchiveSet,
    connection: &mut Connection<'_>,
    stream: &str,
    after: u64,
    limit: usize,
) -> Result<Vec<RawRecord>, StoreError> {
    let mut rows = statements::read_stream(connection, stream, after, limit).await?;
    let Some(first) = rows.first().map(|row| row.version) else {
        return Ok(rows);
    };
    if first <= after + 1 {
        return Ok(rows);
    }
    archive_set.load(connection).await?;
    let name = stream.to_owned();
    let before = archive_set.run_blocking(move |archive_set| {
        archive_set.read_stream_blocking(&name, (after, first - 1), limit)
    });
    let mut found = before.await?;
    rows.truncate(limit - found.len());
    found.extend(rows);
    Ok(found)
}

/// Reads the event with an id.
pub(crate) async fn event(
    archive_set: &ArchiveSet,
    connection: &mut Connection<'_>,
    id: &str,
) -> Result<Option<RawRecord>, StoreError> {
    if let Some(event) = statements::read_event(connection, id).await? {
        return Ok(Some(event));
    }
    archive_set.load(connection).await?;
    let id = id.to_owned();
    archive_set
        .run_blocking(move |archive_set| archive_set.find_event_blocking(&id))
        .await
}

/// Returns the position and the hash of a bucket's last event at or below a position.
pub(crate) async fn last_of_bucket(
    archive_set: &ArchiveSet,
    connection: &mut Connection<'_>,
    bucket: Bucket,
    at: Position,
) -> Result<Option<(Position, ChainHash)>, StoreError> {
    let row = statements::last_of_bucket(connection, bucket, at).await?;
    let row = row.map(|row| (row.position, EventRow::from_raw(&row).hash()));
    let sealed = statements::sealed(connection).await?;
    if sealed == Position::START || row.is_some_and(|(position, _)| position > sealed) {
        return Ok(row);
    }
    archive_set.load(connection).await?;
    let at = at.min(sealed);
    let found = archive_set
        .run_blocking(move |archive_set| archive_set.last_of_bucket_blocking(bucket, at));
    found.await
}
