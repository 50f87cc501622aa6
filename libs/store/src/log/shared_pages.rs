//! The pages that the readers of a store share, below the handle to it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::ids::Position;
use tokio::sync::{Mutex as AsyncMutex, OnceCell};

use crate::model::raw::LogEntry;
use crate::sql::page::{Page, PageQuery};

/// The maximum number of pages that are kept. A reader that is further behind than that reads by itself.
const SHARED_PAGES_MAX: usize = 16;

/// The pages that the readers of a store share.
#[derive(Default)]
pub(crate) struct SharedPages {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last_id: u64,
    /// The position from which each reader continues.
    readers: BTreeMap<u64, Position>,
    /// By the position that they follow, and their limit.
    pages: BTreeMap<(Position, usize), PageSlot>,
}

/// A page, once one of its readers has read it.
pub(super) type PageSlot = Arc<OnceCell<Arc<SharedPage>>>;

pub(super) struct SharedPage {
    /// Of archives and of the table.
    pub pages: Vec<Page>,
    /// The events of each page that a reader has decoded; `None` if the page is for one reader.
    pub decoded: Option<AsyncMutex<Vec<Vec<Option<LogEntry>>>>>,
    pub last: Option<Position>,
    pub is_full: bool,
}

impl SharedPages {
    /// Returns an id for a new reader.
    pub(super) fn next_id(&self) -> u64 {
        let mut state = self.lock();
        state.last_id += 1;
        state.last_id
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves a reader on to a page, and returns the place of that page; `None` if it is not kept.
    pub(super) fn slot(&self, id: u64, query: &PageQuery<'_>) -> Option<PageSlot> {
        let mut state = self.lock();
        state.readers.insert(id, query.after);
        state.forget_passed();
        let key = (query.after, query.limit);
        if let Some(slot) = state.pages.get(&key) {
            return Some(slot.clone());
        }
        if state.pages.len() >= SHARED_PAGES_MAX {
            if state.pages.keys().next().is_some_and(|first| key < *first) {
                return None;
            }
            state.pages.pop_first();
        }
        let slot = PageSlot::default();
        state.pages.insert(key, slot.clone());
        Some(slot)
    }

    /// Keeps no pages for a reader any more.
    pub(super) fn leave(&self, id: u64) {
        let mut state = self.lock();
        if state.readers.remove(&id).is_some() {
            state.forget_passed();
        }
    }
}

impl State {
    /// Drops the pages that every reader has passed.
    fn forget_passed(&mut self) {
        match self.readers.values().min() {
            Some(first) => self.pages.retain(|(after, _), _| after >= first),
            None => self.pages.clear(),
        }
    }
}
