//! Reads the log from a position to its end as fast as possible: pages are read ahead while earlier ones
//! are decoded in parallel.
//!
//! Invariants: records come in order of position; an error ends the replay.

use std::collections::VecDeque;

use contract::ids::Position;
use contract::log::Record;

use contract::time::Timestamp;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::archive::combined;
use crate::log::store::Store;
use crate::model::error::StoreError;
use crate::model::raw::Unreadable;
use crate::sql::page::{Page, PageQuery};

/// Records per page.
const PAGE: usize = 2_000;

/// The number of pages that are read ahead.
const PAGES_AHEAD: usize = 2;

/// Records, and events that cannot be decoded.
type Decoded = Result<Vec<Result<Record, Box<Unreadable>>>, StoreError>;

/// A read of the log up to its head at the time the replay gets there.
pub struct LogReplay {
    pages: mpsc::Receiver<Result<Page, StoreError>>,
    decoding: VecDeque<JoinHandle<Decoded>>,
    decoders: usize,
    ended: bool,
}

impl Store {
    /// Starts to read the log above a position. Must be called within a tokio runtime.
    pub fn replay(&self, after: Position) -> LogReplay {
        let (sender, pages) = mpsc::channel(PAGES_AHEAD);
        let store = self.clone();
        tokio::spawn(async move {
            let mut after = after;
            loop {
                let pages = match store.read_pages(after).await {
                    Ok(pages) if pages.is_empty() => return,
                    Ok(pages) => pages,
                    Err(error) => {
                        let _ = sender.send(Err(error)).await;
                        return;
                    }
                };
                for page in pages {
                    after = page.last;
                    if sender.send(Ok(page)).await.is_err() {
                        return;
                    }
                }
            }
        });
        LogReplay {
            pages,
            decoding: VecDeque::new(),
            decoders: std::thread::available_parallelism().map_or(1, usize::from),
            ended: false,
        }
    }

    async fn read_pages(&self, after: Position) -> Result<Vec<Page>, StoreError> {
        let query = PageQuery {
            bucket: None,
            after,
            through: Position(u64::MAX),
            excluded_kinds: &[],
            slices_from: Timestamp::MIN,
            limit: PAGE,
        };
        combined::pages(self.archive_set(), &mut self.reader().await?.get(), &query).await
    }
}

impl LogReplay {
    /// Returns the next records, or None after the last. An event that cannot be decoded is an error.
    pub async fn next(&mut self) -> Option<Result<Vec<Record>, StoreError>> {
        let page = self.next_entries().await?;
        let readable = |entry: Result<Record, Box<Unreadable>>| {
            entry.map_err(|unreadable| StoreError::Unreadable {
                position: unreadable.position,
                detail: unreadable.detail.into(),
            })
        };
        let page = page.and_then(|page| page.into_iter().map(readable).collect());
        if page.is_err() {
            self.end();
        }
        Some(page)
    }

    /// The same, but does not fail for events that cannot be decoded.
    pub async fn next_entries(&mut self) -> Option<Decoded> {
        while !self.ended && self.decoding.len() < self.decoders {
            match self.pages.recv().await {
                Some(Ok(page)) => self
                    .decoding
                    .push_back(tokio::task::spawn_blocking(move || page.decode())),
                Some(Err(error)) => {
                    let failed = tokio::spawn(std::future::ready(Err(error)));
                    self.decoding.push_back(failed);
                    self.ended = true;
                }
                None => self.ended = true,
            }
        }
        let page = self.decoding.pop_front()?.await;
        let page = page.unwrap_or_else(|error| {
            Err(StoreError::database(format!("a page was not decoded: {error}")).caused_by(error))
        });
        if page.is_err() {
            self.end();
        }
        Some(page)
    }

    fn end(&mut self) {
        self.ended = true;
        self.decoding.clear();
    }
}
