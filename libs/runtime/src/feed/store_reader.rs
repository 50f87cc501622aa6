//! Queries to the store that outlive the future waiting for them. A consumer that has something to
//! do every second drops the feed's future that often; if the query were restarted each time, a
//! slower store would never answer.
//!
//! Pages are read ahead: while the consumer handles one, the next is decoded, and the one after that
//! is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{Record, StreamKind};
use contract::time::Timestamp;
use store::{LogEntry, Store, StoreError, UndecodedPage, Unreadable};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::task::AbortOnDropHandle;

use super::PAGE;

/// One page that is decoded, and one that is read.
const PAGES_AHEAD: usize = 2;

/// Selects events after a position: returns the kinds of streams to exclude, and up to which
/// position that holds.
pub type EventFilter = Arc<dyn Fn(Position) -> (Vec<StreamKind>, Position) + Send + Sync>;

/// Excludes nothing.
pub(super) fn unfiltered() -> EventFilter {
    Arc::new(|_| (Vec::new(), Position(u64::MAX)))
}

/// The page after a position, of one bucket or of the whole log.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FeedQuery {
    bucket: Option<Bucket>,
    after: Position,
    /// Kinds of streams to exclude, and up to which position that holds.
    excluded: Vec<StreamKind>,
    valid_until: Position,
    /// Usage that ended by then is read without its slices.
    slices_from: Timestamp,
}

/// A page of the log.
pub(super) struct FeedPage {
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
    Unreadable(Box<Unreadable>),
    /// Excluded by the filter.
    Filtered,
}

pub(super) struct StoreReader {
    store: Store,
    pub filter: EventFilter,
    pub slices_from: Timestamp,
    heads: Option<HeadsQuery>,
    scan: Option<PageStream>,
}

/// The head of the log, and the newest position of some buckets.
type Heads = (Position, BTreeMap<Bucket, Position>);

/// A query in progress; aborted on drop.
struct HeadsQuery {
    of: Vec<Bucket>,
    heads: AbortOnDropHandle<Result<Heads, StoreError>>,
}

/// Pages that are read one after the other, up to the first that is not full; aborted on drop.
struct PageStream {
    pages: mpsc::Receiver<PendingPage>,
    /// The first page, while it is being decoded.
    first: Option<PendingPage>,
    _task: AbortOnDropHandle<()>,
}

/// A page that is being decoded, or why it could not be read.
struct PendingPage {
    query: FeedQuery,
    page: JoinHandle<Result<FeedPage, StoreError>>,
}

impl StoreReader {
    pub fn new(store: Store) -> Self {
        Self {
            store,
            filter: unfiltered(),
            slices_from: Timestamp::MIN,
            heads: None,
            scan: None,
        }
    }

    pub async fn heads(&mut self, of: Vec<Bucket>) -> Result<Heads, StoreError> {
        self.scan = None;
        let query = match self.heads.take_if(|query| query.of == of) {
            Some(query) => self.heads.insert(query),
            None => {
                let heads = tokio::spawn(read_heads(self.store.clone(), of.clone()));
                let heads = AbortOnDropHandle::new(heads);
                self.heads.insert(HeadsQuery { of, heads })
            }
        };
        let heads = (&mut query.heads).await;
        self.heads = None;
        heads.unwrap_or_else(|error| Err(task_failed(error)))
    }

    pub async fn page(
        &mut self,
        bucket: Option<Bucket>,
        after: Position,
    ) -> Result<FeedPage, StoreError> {
        self.heads = None;
        let query = page_query(&self.filter, self.slices_from, bucket, after);
        if let Some(scan) = &mut self.scan {
            let is_wanted = scan.first().await.is_some_and(|first| first.query == query);
            if !is_wanted {
                self.scan = None;
            }
        }
        let scan = self.scan.get_or_insert_with(|| {
            let (store, filter) = (self.store.clone(), self.filter.clone());
            PageStream::start(store, filter, query)
        });
        let page = match scan.first().await {
            Some(first) => (&mut first.page).await,
            None => Ok(Err(StoreError::database("a page was not read".to_owned()))),
        };
        scan.first = None;
        let page = page.unwrap_or_else(|error| Err(task_failed(error)));
        if page.as_ref().map_or(true, |page| !page.is_full) {
            self.scan = None;
        }
        page
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

    /// Cancels the queries in progress, so that later ones see the store as it is by then.
    pub fn cancel(&mut self) {
        self.heads = None;
        self.scan = None;
    }
}

impl PageStream {
    /// Starts with this page.
    fn start(store: Store, filter: EventFilter, query: FeedQuery) -> Self {
        let (sender, pages) = mpsc::channel(PAGES_AHEAD);
        Self {
            pages,
            first: None,
            _task: AbortOnDropHandle::new(tokio::spawn(scan(store, filter, query, sender))),
        }
    }

    /// Waits until the first page has been read; `None` after the last.
    async fn first(&mut self) -> Option<&mut PendingPage> {
        if self.first.is_none() {
            self.first = self.pages.recv().await;
        }
        self.first.as_mut()
    }
}

async fn read_heads(store: Store, of: Vec<Bucket>) -> Result<Heads, StoreError> {
    Ok((store.head().await?, store.bucket_heads(&of).await?))
}

async fn scan(
    store: Store,
    filter: EventFilter,
    mut query: FeedQuery,
    pages: mpsc::Sender<PendingPage>,
) {
    let mut reader = store.page_reader();
    // Events committed after this may be only partly included in a read.
    let head = store.head().await;
    while let Ok(place) = pages.reserve().await {
        let head = head.clone();
        let read = async {
            let through = query.valid_until.min(head?);
            let query = store::PageQuery {
                bucket: query.bucket,
                after: query.after,
                through,
                excluded_kinds: &query.excluded,
                slices_from: query.slices_from,
                limit: PAGE,
            };
            let page = reader.read(&query).await?;
            Ok((page, through))
        };
        let (page, through) = match read.await {
            Ok(read) => read,
            Err(error) => {
                let page = tokio::spawn(std::future::ready(Err(error)));
                place.send(PendingPage { query, page });
                return;
            }
        };
        let is_full = page.is_full();
        let through = page.last().filter(|_| is_full).unwrap_or(through);
        let next = page_query(&filter, query.slices_from, query.bucket, through);
        let page = tokio::spawn(decode(page, through));
        place.send(PendingPage { query, page });
        if !is_full {
            return;
        }
        query = next;
    }
}

async fn decode(page: UndecodedPage, through: Position) -> Result<FeedPage, StoreError> {
    let events = page.decode().await?.into_iter();
    let events = events.map(ReadEvent::from).collect();
    Ok(FeedPage {
        events,
        through,
        is_full: page.is_full(),
    })
}

fn page_query(
    filter: &EventFilter,
    slices_from: Timestamp,
    bucket: Option<Bucket>,
    after: Position,
) -> FeedQuery {
    let (excluded, valid_until) = filter(after);
    FeedQuery {
        bucket,
        after,
        excluded,
        valid_until,
        slices_from,
    }
}

fn task_failed(error: JoinError) -> StoreError {
    StoreError::database(error.to_string()).caused_by(error)
}

impl From<LogEntry> for ReadEvent {
    fn from(entry: LogEntry) -> Self {
        let (bucket, prev, position) = match &entry {
            LogEntry::Record(record) => (record.bucket, record.prev, record.position),
            LogEntry::Unreadable(unreadable) => {
                (unreadable.bucket, unreadable.prev, unreadable.position)
            }
        };
        Self {
            bucket,
            prev,
            position,
            outcome: match entry {
                LogEntry::Record(record) => ReadOutcome::Record(record),
                LogEntry::Unreadable(unreadable) => ReadOutcome::Unreadable(Box::new(unreadable)),
            },
        }
    }
}
