//! Queries to the store that outlive the future waiting for them. A consumer that has something to
//! do every second drops the feed's future that often; if the query were restarted each time, a
//! slower store would never answer.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{Record, StreamKind};
use contract::time::Timestamp;
use store::{Entry, Store, StoreError, Unreadable};
use tokio_util::task::AbortOnDropHandle;

use super::PAGE;

/// Selects events after a position: returns the kinds of streams to exclude, and up to which
/// position that holds.
pub type EventFilter = Arc<dyn Fn(Position) -> (Vec<StreamKind>, Position) + Send + Sync>;

/// Excludes nothing.
pub(super) fn unfiltered() -> EventFilter {
    Arc::new(|_| (Vec::new(), Position(u64::MAX)))
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Query {
    /// The head of the log, and the newest position of each of these buckets.
    Heads(Vec<Bucket>),
    Page(PageQuery),
}

/// The page after a position, of one bucket or of the whole log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PageQuery {
    bucket: Option<Bucket>,
    after: Position,
    /// Kinds of streams to exclude, and up to which position that holds.
    excluded: Vec<StreamKind>,
    valid_until: Position,
    /// Usage that ended by then is read without its slices.
    slices_from: Timestamp,
}

#[derive(Default)]
struct QueryResult {
    head: Position,
    heads: BTreeMap<Bucket, Position>,
    page: Page,
}

/// A page of the log.
#[derive(Default)]
pub(super) struct Page {
    pub events: Vec<ReadEvent>,
    /// Complete up to here.
    pub through: Position,
    /// There is more to read at once.
    is_full: bool,
}

/// One event of the log.
pub(super) struct ReadEvent {
    pub bucket: Bucket,
    pub prev: Position,
    pub position: Position,
    pub outcome: ReadOutcome,
}

pub(super) enum ReadOutcome {
    Record(Arc<Record>),
    Unreadable(Unreadable),
    /// Excluded by the filter.
    Filtered,
}

pub(super) struct StoreReader {
    store: Store,
    pub filter: EventFilter,
    pub slices_from: Timestamp,
    /// The query in progress; aborted on drop. While a page is handled, the next one is read.
    pending: Option<PendingQuery>,
}

type PendingQuery = (Query, AbortOnDropHandle<Result<QueryResult, StoreError>>);

impl StoreReader {
    pub fn new(store: Store) -> Self {
        Self {
            store,
            filter: unfiltered(),
            slices_from: Timestamp::MIN,
            pending: None,
        }
    }

    pub async fn heads(
        &mut self,
        of: Vec<Bucket>,
    ) -> Result<(Position, BTreeMap<Bucket, Position>), StoreError> {
        let result = self.result(Query::Heads(of)).await?;
        Ok((result.head, result.heads))
    }

    pub async fn page(
        &mut self,
        bucket: Option<Bucket>,
        after: Position,
    ) -> Result<Page, StoreError> {
        let query = self.page_query(bucket, after);
        let page = self.result(Query::Page(query)).await?.page;
        if page.is_full {
            let next = self.page_query(bucket, page.through);
            self.start(Query::Page(next));
        }
        Ok(page)
    }

    fn page_query(&self, bucket: Option<Bucket>, after: Position) -> PageQuery {
        let (excluded, valid_until) = (self.filter)(after);
        PageQuery {
            bucket,
            after,
            excluded,
            valid_until,
            slices_from: self.slices_from,
        }
    }

    /// Applies the filter to a record from the bus.
    pub fn classify(&self, record: Arc<Record>) -> ReadEvent {
        let before = Position(record.position.0.saturating_sub(1));
        let (excluded, _) = (self.filter)(before);
        let is_excluded = record
            .stream
            .kind()
            .is_some_and(|kind| excluded.contains(&kind));
        ReadEvent {
            bucket: record.bucket,
            prev: record.prev,
            position: record.position,
            outcome: match is_excluded {
                true => ReadOutcome::Filtered,
                false => ReadOutcome::Record(record),
            },
        }
    }

    /// Cancels the query in progress, so that later queries see the store as it is by then.
    pub fn cancel(&mut self) {
        self.pending = None;
    }

    async fn result(&mut self, query: Query) -> Result<QueryResult, StoreError> {
        let (_, result) = match self.pending.take_if(|(pending, _)| *pending == query) {
            Some(pending) => self.pending.insert(pending),
            None => self.start(query),
        };
        let result = result.await;
        self.pending = None;
        result.unwrap_or_else(|error| Err(StoreError::Database(error.to_string())))
    }

    fn start(&mut self, query: Query) -> &mut PendingQuery {
        let task = run_query(self.store.clone(), query.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(task));
        self.pending.insert((query, task))
    }
}

async fn run_query(store: Store, query: Query) -> Result<QueryResult, StoreError> {
    let mut result = QueryResult::default();
    match query {
        Query::Heads(buckets) => {
            result.head = store.head().await?;
            result.heads = store.bucket_heads(&buckets).await?;
        }
        Query::Page(page) => {
            // Events committed after this may be only partly included in the read.
            let valid_until = page.valid_until.min(store.head().await?);
            let query = store::PageQuery {
                bucket: page.bucket,
                after: page.after,
                through: valid_until,
                excluded_kinds: &page.excluded,
                slices_from: page.slices_from,
                limit: PAGE,
            };
            let entries = store.read_page(&query).await?;
            result.page.is_full = entries.len() == PAGE;
            result.page.through = match entries.last() {
                Some(last) if result.page.is_full => last.position(),
                _ => valid_until,
            };
            result.page.events = entries.into_iter().map(ReadEvent::from).collect();
        }
    }
    Ok(result)
}

impl From<Entry> for ReadEvent {
    fn from(entry: Entry) -> Self {
        let (bucket, prev, position) = match &entry {
            Entry::Record(record) => (record.bucket, record.prev, record.position),
            Entry::Unreadable(unreadable) => {
                (unreadable.bucket, unreadable.prev, unreadable.position)
            }
        };
        Self {
            bucket,
            prev,
            position,
            outcome: match entry {
                Entry::Record(record) => ReadOutcome::Record(record),
                Entry::Unreadable(unreadable) => ReadOutcome::Unreadable(unreadable),
            },
        }
    }
}
