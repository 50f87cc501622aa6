//! Reading the log from some position to its end, as quickly as it goes: pages are read ahead while
//! earlier ones are decoded, several at a time.
//!
//! Invariant: records come in order of position, and an error ends the replay.

use std::collections::VecDeque;

use contract::ids::Position;
use contract::log::Record;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::{RawRecord, Store, StoreError};

/// Records per page.
const PAGE: usize = 2_000;

/// Pages that are read ahead.
const AHEAD_MAX: usize = 2;

type Page = Result<Vec<Record>, StoreError>;

/// Comes to its end at the position that was the head when it came there.
pub struct Replay {
    pages: mpsc::Receiver<Result<Vec<RawRecord>, StoreError>>,
    decoding: VecDeque<JoinHandle<Page>>,
    decoders: usize,
    ended: bool,
}

impl Store {
    pub fn replay(&self, after: Position) -> Replay {
        let (sender, pages) = mpsc::channel(AHEAD_MAX);
        let store = self.clone();
        tokio::spawn(async move {
            let mut after = after;
            loop {
                let page = store.read_raw(after, PAGE).await;
                let last = page.as_ref().ok().and_then(|page| page.last());
                let last = last.map(|event| event.position);
                if let Ok(page) = &page
                    && page.is_empty()
                {
                    return;
                }
                if sender.send(page).await.is_err() {
                    return;
                }
                let Some(last) = last else { return };
                after = last;
            }
        });
        Replay {
            pages,
            decoding: VecDeque::new(),
            decoders: std::thread::available_parallelism().map_or(1, usize::from),
            ended: false,
        }
    }
}

impl Replay {
    /// The next records; none after the last.
    pub async fn next(&mut self) -> Option<Page> {
        while !self.ended && self.decoding.len() < self.decoders {
            match self.pages.recv().await {
                Some(Ok(page)) => self.decoding.push_back(tokio::task::spawn_blocking(|| {
                    page.into_iter().map(RawRecord::decode).collect()
                })),
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
            Err(StoreError::Database(format!(
                "a page was not decoded: {error}"
            )))
        });
        if page.is_err() {
            self.ended = true;
            self.decoding.clear();
        }
        Some(page)
    }
}
