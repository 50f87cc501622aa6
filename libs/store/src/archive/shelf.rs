//! The archives of one store: which there are, where they are, and what stands in them.
//!
//! Invariant: the list only grows, and always is the whole beginning of what the database lists.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, StreamKind};

use crate::archive::file::Opened;
use crate::archive::recent::Recent;
use crate::model::archive::Archive;
use crate::model::chain::ChainHead;
use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::connection::Connection;
use crate::sql::statements;

/// Lists of contents that are kept in memory, some 200 KB each.
const OPENED_MAX: usize = 32;

/// Blocks that are kept unpacked, some 1 MB each.
const BLOCKS_MAX: usize = 8;

/// Where the database says that the files are; where it says nothing, they are in the usual place.
pub(crate) const FOLDER: &str = "archive_folder";

/// Which events are asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// None: of all buckets.
    pub bucket: Option<Bucket>,
    pub after: Position,
    pub through: Position,
    /// Not those of streams of these kinds.
    pub left_out: Vec<StreamKind>,
    pub limit: usize,
}

impl Wanted {
    fn is(&self, event: &RawRecord) -> bool {
        let kind = event.stream.split('/').next().unwrap_or_default();
        event.position > self.after
            && event.position <= self.through
            && self.bucket.is_none_or(|bucket| bucket == event.bucket)
            && !self
                .left_out
                .iter()
                .any(|left_out| left_out.as_str() == kind)
    }
}

/// A cheap handle.
#[derive(Clone)]
pub(crate) struct Shelf {
    inner: Arc<Inner>,
}

struct Inner {
    /// Named for this process, which goes before what the database says.
    named: Option<PathBuf>,
    /// Where they are unless something else is said; a server of databases has no such place.
    usual: Option<PathBuf>,
    state: Mutex<State>,
}

struct State {
    archives: Arc<Vec<Archive>>,
    /// As the database says.
    folder: Option<PathBuf>,
    opened: Recent<Position, Arc<Opened>>,
    blocks: Recent<(Position, usize), Arc<Vec<RawRecord>>>,
}

impl Shelf {
    pub(crate) fn new(named: Option<PathBuf>, usual: Option<PathBuf>) -> Self {
        let state = State {
            archives: Arc::default(),
            folder: None,
            opened: Recent::new(OPENED_MAX),
            blocks: Recent::new(BLOCKS_MAX),
        };
        Self {
            inner: Arc::new(Inner {
                named,
                usual,
                state: Mutex::new(state),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn archives(&self) -> Arc<Vec<Archive>> {
        self.state().archives.clone()
    }

    /// As far as is known.
    pub(crate) fn sealed(&self) -> Position {
        let state = self.state();
        let last = state.archives.last();
        last.map_or(Position::START, |archive| archive.last)
    }

    /// Takes in what the database lists by now.
    pub(crate) async fn load(&self, connection: &mut Connection<'_>) -> Result<(), StoreError> {
        let new = statements::archives(connection, self.sealed()).await?;
        if new.is_empty() {
            return Ok(());
        }
        let folder = statements::meta(connection, FOLDER).await?;
        let mut state = self.state();
        state.folder = folder.map(PathBuf::from);
        let mut archives = state.archives.to_vec();
        let known = archives.last().map_or(Position::START, |last| last.last);
        // Another reader may have taken them in meanwhile.
        archives.extend(new.into_iter().filter(|archive| archive.first > known));
        state.archives = Arc::new(archives);
        Ok(())
    }

    /// Where the files are.
    pub(crate) fn folder(&self) -> Result<PathBuf, StoreError> {
        let inner = &self.inner;
        let folder = inner.named.clone().or_else(|| self.state().folder.clone());
        folder.or_else(|| inner.usual.clone()).ok_or_else(|| {
            StoreError::Refused(
                "a store in PostgreSQL has no folder for archives yet: name one that every process with \
                 the store can reach, with --archive DIR"
                    .to_owned(),
            )
        })
    }

    /// What the database has to say of the folder, so that others find it: nothing of the usual one.
    pub(crate) fn folder_to_tell(&self) -> Result<Option<String>, StoreError> {
        let folder = self.folder()?;
        if self.inner.usual.as_deref() == Some(&*folder) {
            return Ok(None);
        }
        let absolute = std::path::absolute(&folder).unwrap_or(folder);
        Ok(Some(absolute.display().to_string()))
    }

    fn open(&self, archive: &Archive) -> Result<Arc<Opened>, StoreError> {
        if let Some(opened) = self.state().opened.get(&archive.last) {
            return Ok(opened);
        }
        let opened = Arc::new(Opened::open(&self.folder()?, archive)?);
        self.state().opened.put(archive.last, opened.clone());
        Ok(opened)
    }

    fn block(
        &self,
        archive: &Archive,
        opened: &Opened,
        index: usize,
    ) -> Result<Arc<Vec<RawRecord>>, StoreError> {
        let key = (archive.last, index);
        if let Some(block) = self.state().blocks.get(&key) {
            return Ok(block);
        }
        let block = Arc::new(opened.block(index)?);
        self.state().blocks.put(key, block.clone());
        Ok(block)
    }

    /// What is wanted of what stands in files, in order of position.
    pub(crate) fn select_now(&self, wanted: &Wanted) -> Result<Vec<RawRecord>, StoreError> {
        let archives = self.archives();
        let begin = archives.partition_point(|archive| archive.last <= wanted.after);
        let mut found = Vec::new();
        for archive in &archives[begin..] {
            if archive.first > wanted.through {
                break;
            }
            let opened = self.open(archive)?;
            let blocks = &opened.contents.blocks;
            let begin = blocks.partition_point(|block| block.last <= wanted.after);
            for (index, block) in blocks.iter().enumerate().skip(begin) {
                if block.first > wanted.through {
                    break;
                }
                if wanted
                    .bucket
                    .is_some_and(|bucket| !block.has_bucket(bucket))
                {
                    continue;
                }
                let events = self.block(archive, &opened, index)?;
                for event in events.iter().filter(|event| wanted.is(event)) {
                    found.push(event.clone());
                    if found.len() >= wanted.limit {
                        return Ok(found);
                    }
                }
            }
        }
        Ok(found)
    }

    /// Events of a stream after a version, up to another one, in order.
    pub(crate) fn stream_now(
        &self,
        stream: &str,
        (after, through): (u64, u64),
        limit: usize,
    ) -> Result<Vec<RawRecord>, StoreError> {
        let mut found = Vec::new();
        for archive in self.archives().iter() {
            let opened = self.open(archive)?;
            let Some((last, blocks)) = opened.contents.streams.get(stream) else {
                continue;
            };
            if *last <= after {
                continue;
            }
            for index in blocks {
                let events = self.block(archive, &opened, *index)?;
                let events = events.iter().filter(|event| {
                    event.stream == stream && event.version > after && event.version <= through
                });
                found.extend(events.take(limit - found.len()).cloned());
                if found.len() >= limit {
                    return Ok(found);
                }
            }
            if *last >= through {
                break;
            }
        }
        Ok(found)
    }

    /// The event with an id, from the newest back.
    pub(crate) fn event_now(&self, id: &str) -> Result<Option<RawRecord>, StoreError> {
        for archive in self.archives().iter().rev() {
            let opened = self.open(archive)?;
            for (index, block) in opened.contents.blocks.iter().enumerate().rev() {
                if !block.may_have_id(id) {
                    continue;
                }
                let events = self.block(archive, &opened, index)?;
                if let Some(event) = events.iter().find(|event| event.id == id) {
                    return Ok(Some(event.clone()));
                }
            }
        }
        Ok(None)
    }

    /// The last event of a bucket at or below a position, of what stands in files.
    pub(crate) fn last_of_bucket_now(
        &self,
        bucket: Bucket,
        at: Position,
    ) -> Result<Option<(Position, ChainHash)>, StoreError> {
        let archives = self.archives();
        let whole = archives.partition_point(|archive| archive.last <= at);
        if let Some(archive) = archives.get(whole).filter(|archive| archive.first <= at) {
            let opened = self.open(archive)?;
            let blocks = &opened.contents.blocks;
            let begun = blocks.partition_point(|block| block.first <= at);
            for index in (0..begun).rev() {
                if !blocks[index].has_bucket(bucket) {
                    continue;
                }
                let events = self.block(archive, &opened, index)?;
                let of_bucket = |event: &&RawRecord| event.bucket == bucket && event.position <= at;
                if let Some(event) = events.iter().rev().find(of_bucket) {
                    let hash = EventRow::raw(event).hash();
                    return Ok(Some((event.position, hash)));
                }
            }
        }
        match archives[..whole].last() {
            None => Ok(None),
            Some(before) => Ok(self.open(before)?.contents.head(bucket)),
        }
    }

    /// The hash of the last file and the ends of chains after it.
    pub(crate) fn end_now(&self) -> Result<Option<(Archive, Vec<ChainHead>)>, StoreError> {
        let Some(last) = self.archives().last().cloned() else {
            return Ok(None);
        };
        let heads = self.open(&last)?.contents.heads.clone();
        Ok(Some((last, heads)))
    }

    /// Forgets what was read, so that all is read from the disk again.
    pub(crate) fn forget(&self) {
        let mut state = self.state();
        state.opened.clear();
        state.blocks.clear();
    }

    /// Does what may wait for the disk without holding up others.
    pub(crate) async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shelf = self.clone();
        let worked = tokio::task::spawn_blocking(move || work(&shelf)).await;
        worked.map_err(|error| StoreError::Database(format!("an archive was not read: {error}")))?
    }
}

/// Where the archives of a store in a file are, unless something else is said.
pub(crate) fn beside(database: &Path) -> PathBuf {
    database.with_file_name("archive")
}
