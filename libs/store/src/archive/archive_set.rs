//! The archives of one store: the list of files, their folder, and reads from them.
//!
//! Invariant: the list only grows, and is always a prefix of the database's list.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, StreamKind};

use crate::archive::file::ArchiveFile;
use crate::archive::lru::LruCache;
use crate::model::archive::Archive;
use crate::model::chain::BucketHead;
use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::connection::Connection;
use crate::sql::statements;

/// The maximum number of open archives, each with a table of contents of about 200 KB in memory.
const OPEN_FILES_MAX: usize = 32;

/// The maximum number of cached decompressed blocks, about 1 MB each.
const BLOCKS_MAX: usize = 8;

/// The meta key of the archive folder; if the database has none, the files are in the default folder.
pub(crate) const FOLDER: &str = "archive_folder";

/// Selects archived events.
#[derive(Clone, Debug)]
pub(crate) struct ArchiveQuery {
    /// None for all buckets.
    pub bucket: Option<Bucket>,
    pub after: Position,
    pub through: Position,
    /// Kinds of streams to exclude.
    pub excluded_kinds: Vec<StreamKind>,
    pub limit: usize,
}

impl ArchiveQuery {
    fn matches(&self, event: &RawRecord) -> bool {
        let kind = event.stream.split('/').next().unwrap_or_default();
        event.position > self.after
            && event.position <= self.through
            && self.bucket.is_none_or(|bucket| bucket == event.bucket)
            && !self
                .excluded_kinds
                .iter()
                .any(|excluded| excluded.as_str() == kind)
    }
}

/// The archives of a store; a cheap handle.
#[derive(Clone)]
pub(crate) struct ArchiveSet {
    inner: Arc<ArchiveSetInner>,
}

struct ArchiveSetInner {
    /// Configured for this process; takes precedence over the database.
    configured_folder: Option<PathBuf>,
    /// Used unless another folder is configured or recorded; None in PostgreSQL.
    default_folder: Option<PathBuf>,
    state: Mutex<ArchiveSetState>,
}

struct ArchiveSetState {
    archives: Arc<Vec<Archive>>,
    /// As recorded in the database.
    folder: Option<PathBuf>,
    files: LruCache<Position, Arc<ArchiveFile>>,
    blocks: LruCache<(Position, usize), Arc<Vec<RawRecord>>>,
}

impl ArchiveSet {
    pub(crate) fn new(configured_folder: Option<PathBuf>, default_folder: Option<PathBuf>) -> Self {
        let state = ArchiveSetState {
            archives: Arc::default(),
            folder: None,
            files: LruCache::new(OPEN_FILES_MAX),
            blocks: LruCache::new(BLOCKS_MAX),
        };
        Self {
            inner: Arc::new(ArchiveSetInner {
                configured_folder,
                default_folder,
                state: Mutex::new(state),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, ArchiveSetState> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn archives(&self) -> Arc<Vec<Archive>> {
        self.state().archives.clone()
    }

    /// The last archived position, as far as loaded.
    pub(crate) fn sealed(&self) -> Position {
        let state = self.state();
        let last = state.archives.last();
        last.map_or(Position::START, |archive| archive.last)
    }

    /// Loads the archives that the database has listed since the last call.
    pub(crate) async fn load(&self, connection: &mut Connection<'_>) -> Result<(), StoreError> {
        let new = statements::archives(connection, self.sealed()).await?;
        if new.is_empty() {
            return Ok(());
        }
        let folder = statements::meta(connection, FOLDER).await?;
        let mut state = self.state();
        state.folder = folder.map(PathBuf::from);
        let mut archives = state.archives.to_vec();
        let loaded = archives.last().map_or(Position::START, |last| last.last);
        // Another reader may have loaded them in the meantime.
        archives.extend(new.into_iter().filter(|archive| archive.first > loaded));
        state.archives = Arc::new(archives);
        Ok(())
    }

    /// The folder of the files.
    pub(crate) fn folder(&self) -> Result<PathBuf, StoreError> {
        let inner = &self.inner;
        let folder = inner
            .configured_folder
            .clone()
            .or_else(|| self.state().folder.clone());
        folder.or_else(|| inner.default_folder.clone()).ok_or_else(|| {
            StoreError::refused(
                "this store in PostgreSQL has no archive folder yet: name one that every process of the \
                 store can reach, with --archive DIR"
                    .to_owned(),
            )
        })
    }

    /// The folder to record in the database so that other processes find it; None for the default one.
    pub(crate) fn folder_to_record(&self) -> Result<Option<String>, StoreError> {
        let folder = self.folder()?;
        if self.inner.default_folder.as_deref() == Some(&*folder) {
            return Ok(None);
        }
        let absolute = std::path::absolute(&folder).unwrap_or(folder);
        Ok(Some(absolute.display().to_string()))
    }

    fn open(&self, archive: &Archive) -> Result<Arc<ArchiveFile>, StoreError> {
        if let Some(file) = self.state().files.get(&archive.last) {
            return Ok(file);
        }
        let file = Arc::new(ArchiveFile::open(&self.folder()?, archive)?);
        self.state().files.put(archive.last, file.clone());
        Ok(file)
    }

    fn block(
        &self,
        archive: &Archive,
        file: &ArchiveFile,
        index: usize,
    ) -> Result<Arc<Vec<RawRecord>>, StoreError> {
        let key = (archive.last, index);
        if let Some(block) = self.state().blocks.get(&key) {
            return Ok(block);
        }
        let block = Arc::new(file.block(index)?);
        self.state().blocks.put(key, block.clone());
        Ok(block)
    }

    /// Returns the archived events that match, in order of position.
    pub(crate) fn select_blocking(
        &self,
        query: &ArchiveQuery,
    ) -> Result<Vec<RawRecord>, StoreError> {
        let archives = self.archives();
        let begin = archives.partition_point(|archive| archive.last <= query.after);
        let mut found = Vec::new();
        for archive in &archives[begin..] {
            if archive.first > query.through {
                break;
            }
            let file = self.open(archive)?;
            let blocks = &file.contents.blocks;
            let begin = blocks.partition_point(|block| block.last <= query.after);
            for (index, block) in blocks.iter().enumerate().skip(begin) {
                if block.first > query.through {
                    break;
                }
                if query.bucket.is_some_and(|bucket| !block.has_bucket(bucket)) {
                    continue;
                }
                let events = self.block(archive, &file, index)?;
                for event in events.iter().filter(|event| query.matches(event)) {
                    found.push(event.clone());
                    if found.len() >= query.limit {
                        return Ok(found);
                    }
                }
            }
        }
        Ok(found)
    }

    /// Returns the archived events of a stream with versions in `(after, through]`, in order.
    pub(crate) fn read_stream_blocking(
        &self,
        stream: &str,
        (after, through): (u64, u64),
        limit: usize,
    ) -> Result<Vec<RawRecord>, StoreError> {
        let mut found = Vec::new();
        for archive in self.archives().iter() {
            let file = self.open(archive)?;
            let Some((last, blocks)) = file.contents.streams.get(stream) else {
                continue;
            };
            if *last <= after {
                continue;
            }
            for index in blocks {
                let events = self.block(archive, &file, *index)?;
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

    /// Looks up an archived event by id, searching from the newest file backwards.
    pub(crate) fn find_event_blocking(&self, id: &str) -> Result<Option<RawRecord>, StoreError> {
        for archive in self.archives().iter().rev() {
            let file = self.open(archive)?;
            for (index, block) in file.contents.blocks.iter().enumerate().rev() {
                if !block.may_have_id(id) {
                    continue;
                }
                let events = self.block(archive, &file, index)?;
                if let Some(event) = events.iter().find(|event| event.id == id) {
                    return Ok(Some(event.clone()));
                }
            }
        }
        Ok(None)
    }

    /// Returns the position and the hash of a bucket's last archived event at or below a position.
    pub(crate) fn last_of_bucket_blocking(
        &self,
        bucket: Bucket,
        at: Position,
    ) -> Result<Option<(Position, ChainHash)>, StoreError> {
        let archives = self.archives();
        let covered = archives.partition_point(|archive| archive.last <= at);
        if let Some(archive) = archives.get(covered).filter(|archive| archive.first <= at) {
            let file = self.open(archive)?;
            let blocks = &file.contents.blocks;
            let started = blocks.partition_point(|block| block.first <= at);
            for index in (0..started).rev() {
                if !blocks[index].has_bucket(bucket) {
                    continue;
                }
                let events = self.block(archive, &file, index)?;
                let of_bucket = |event: &&RawRecord| event.bucket == bucket && event.position <= at;
                if let Some(event) = events.iter().rev().find(of_bucket) {
                    let hash = EventRow::from_raw(event).hash();
                    return Ok(Some((event.position, hash)));
                }
            }
        }
        match archives[..covered].last() {
            None => Ok(None),
            Some(before) => Ok(self.open(before)?.contents.head(bucket)),
        }
    }

    /// Returns the last archive and the heads of the chains after it.
    pub(crate) fn last_archive_blocking(
        &self,
    ) -> Result<Option<(Archive, Vec<BucketHead>)>, StoreError> {
        let Some(last) = self.archives().last().cloned() else {
            return Ok(None);
        };
        let heads = self.open(&last)?.contents.heads.clone();
        Ok(Some((last, heads)))
    }

    /// Clears the caches, so that everything is read from disk again.
    pub(crate) fn clear_caches(&self) {
        let mut state = self.state();
        state.files.clear();
        state.blocks.clear();
    }

    /// Runs blocking file access on the blocking thread pool.
    pub(crate) async fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let archive_set = self.clone();
        let worked = tokio::task::spawn_blocking(move || work(&archive_set)).await;
        worked.map_err(|error| {
            StoreError::database(format!("an archive was not read: {error}")).caused_by(error)
        })?
    }
}

/// Returns the default archive folder of a store in a file.
pub(crate) fn default_folder(database: &Path) -> PathBuf {
    database.with_file_name("archive")
}
