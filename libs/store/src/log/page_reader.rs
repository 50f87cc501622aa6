//! Readers of the log that share what they read. The consumers of one process start together and read the
//! same history, so each page is read once and each event decoded once, whoever comes first.
//!
//! Only full pages are shared: they are below the head, where the log never changes. A page is kept until
//! every reader has passed it, so nothing is kept once all have reached the end.
//!
//! Invariant: a shared page holds exactly the events that the reader would have read itself.

use std::sync::Arc;

use contract::ids::Position;
use contract::log::StreamKind;
use tokio::sync::Mutex as AsyncMutex;

use crate::archive::combined;
use crate::log::shared_pages::SharedPage;
use crate::log::store::{READ_LIMIT_MAX, Store};
use crate::model::error::StoreError;
use crate::model::raw::LogEntry;
use crate::sql::page::PageQuery;

/// Usage is most of a long log, and a reader without it wants most of the rest. So these readers read the same
/// pages, with everything but usage, and leave the other excluded kinds undecoded.
const SHARED_EXCLUDES: &[StreamKind] = &[StreamKind::Usage];

/// A reader of pages; see [`Store::page_reader`].
pub struct PageReader {
    store: Store,
    id: u64,
}

/// A page of the log that has been read, but not decoded yet.
#[derive(Clone)]
pub struct UndecodedPage {
    shared: Arc<SharedPage>,
    excluded_kinds: Vec<StreamKind>,
}

enum ReadError {
    /// The page is not full, so it is only for the one that has read it.
    NotFull(Arc<SharedPage>),
    Store(StoreError),
}

impl Store {
    /// Returns a reader of the log that shares what it reads with the other readers of this store. Drop it at
    /// the end of the log: until then, pages are kept for it.
    pub fn page_reader(&self) -> PageReader {
        PageReader {
            store: self.clone(),
            id: self.shared_pages().next_id(),
        }
    }
}

impl PageReader {
    /// Reads the selected events in order of position, to be decoded elsewhere.
    ///
    /// # Errors
    ///
    /// If the store cannot be read.
    pub async fn read(&mut self, query: &PageQuery<'_>) -> Result<UndecodedPage, StoreError> {
        let query = PageQuery {
            limit: query.limit.min(READ_LIMIT_MAX),
            ..*query
        };
        Ok(UndecodedPage {
            shared: self.read_shared(&query).await?,
            excluded_kinds: query.excluded_kinds.to_vec(),
        })
    }

    async fn read_shared(&self, query: &PageQuery<'_>) -> Result<Arc<SharedPage>, StoreError> {
        let is_shareable = query.bucket.is_none()
            && SHARED_EXCLUDES
                .iter()
                .all(|kind| query.excluded_kinds.contains(kind));
        let shared_pages = self.store.shared_pages();
        let slot = match is_shareable {
            true => shared_pages.slot(self.id, query),
            false => {
                shared_pages.leave(self.id);
                None
            }
        };
        let Some(slot) = slot else {
            return Ok(Arc::new(self.read_page(query).await?));
        };
        let shared_query = PageQuery {
            excluded_kinds: SHARED_EXCLUDES,
            ..*query
        };
        let read = slot.get_or_try_init(async || {
            let mut page = self
                .read_page(&shared_query)
                .await
                .map_err(ReadError::Store)?;
            page.decoded = Some(AsyncMutex::new(vec![Vec::new(); page.pages.len()]));
            match page.is_full {
                true => Ok(Arc::new(page)),
                false => Err(ReadError::NotFull(Arc::new(page))),
            }
        });
        match read.await {
            // Read by one who knew a higher head.
            Ok(page) if page.last.is_some_and(|last| last > query.through) => {
                Ok(Arc::new(self.read_page(query).await?))
            }
            Ok(page) => Ok(page.clone()),
            Err(ReadError::NotFull(page)) => Ok(page),
            Err(ReadError::Store(error)) => Err(error),
        }
    }

    async fn read_page(&self, query: &PageQuery<'_>) -> Result<SharedPage, StoreError> {
        let store = &self.store;
        let mut reader = store.reader().await?;
        let pages = combined::pages(store.archive_set(), &mut reader.get(), query).await?;
        drop(reader);
        Ok(SharedPage {
            decoded: None,
            last: pages.last().map(|page| page.last),
            is_full: pages.iter().map(|page| page.count).sum::<usize>() == query.limit,
            pages,
        })
    }
}

impl Drop for PageReader {
    fn drop(&mut self) {
        self.store.shared_pages().leave(self.id);
    }
}

impl UndecodedPage {
    /// The position of the last event; `None` if there are none. Events of excluded kinds may be among them.
    pub fn last(&self) -> Option<Position> {
        self.shared.last
    }

    /// Whether there are as many events as requested, so that more may follow.
    pub fn is_full(&self) -> bool {
        self.shared.is_full
    }

    /// Decodes the events, except those of excluded kinds. Waits while another reader decodes the same page, and
    /// then keeps its thread busy. Does not fail for events that cannot be decoded.
    ///
    /// # Errors
    ///
    /// If the database did not return a valid page.
    pub async fn decode(&self) -> Result<Vec<LogEntry>, StoreError> {
        let pages = &self.shared.pages;
        let mut entries = Vec::with_capacity(pages.iter().map(|page| page.count).sum());
        let Some(decoded) = &self.shared.decoded else {
            for page in pages {
                page.decode_each(|entry| entries.push(entry.into()))?;
            }
            return Ok(entries);
        };
        let mut decoded = decoded.lock().await;
        for (page, decoded) in pages.iter().zip(decoded.iter_mut()) {
            page.decode_more(&self.excluded_kinds, decoded, &mut entries)?;
        }
        Ok(entries)
    }
}
