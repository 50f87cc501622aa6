//! Writes one archive.
//!
//! Invariants: a file gets its final name only once it is complete, durable and verified by reading it back;
//! existing files, which may belong to another store, are never overwritten.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use contract::ids::Position;
use contract::log::RawRecord;
use contract::time::Timestamp;

use crate::archive::contents::{ArchiveHeader, Block, ChainHeads, Contents, EventLine, FORMAT};
use crate::archive::file::{ArchiveFile, compress, sha256, trailer, verify};
use crate::model::archive::Archive;
use crate::model::chain::BucketHead;
use crate::model::error::StoreError;

/// The maximum number of events per block: enough to compress well, few enough to read a single event
/// quickly.
const BLOCK_EVENTS: u64 = 1_000;

/// The same in bytes of uncompressed text, for large events.
const BLOCK_BYTES: usize = 1024 * 1024;

/// The range of the log that a file holds, and what precedes it.
pub(crate) struct ArchiveRange {
    pub first: Position,
    pub last: Position,
    pub events: u64,
    pub previous: Option<Archive>,
    pub heads: Vec<BucketHead>,
}

/// An archive that is being written, under a temporary name.
pub(crate) struct ArchiveBuilder {
    folder: PathBuf,
    name: String,
    partial: PathBuf,
    file: BufWriter<File>,
    at: u64,
    text_bytes: u64,
    range: ArchiveRange,
    heads: ChainHeads,
    contents: Contents,
    block: PendingBlock,
}

/// The block that is being filled.
#[derive(Default)]
struct PendingBlock {
    text: Vec<u8>,
    first: Position,
    last: Position,
    events: u64,
    ids: Option<(String, String)>,
    buckets: u128,
}

impl ArchiveBuilder {
    pub(crate) fn create(folder: &Path, range: ArchiveRange) -> Result<Self, StoreError> {
        fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
        let name = format!("{}-{}.penstock-events.gz", range.first, range.last);
        let partial = folder.join(format!("{name}.partial"));
        let file = File::create(&partial).map_err(|error| failed(&partial, error))?;
        let header = ArchiveHeader {
            penstock_archive: FORMAT,
            first: range.first,
            last: range.last,
            events: range.events,
            previous: range.previous.as_ref().map(|before| before.hash.clone()),
            heads: range.heads.clone(),
        };
        let mut builder = Self {
            folder: folder.to_owned(),
            name,
            partial,
            file: BufWriter::new(file),
            at: 0,
            text_bytes: 0,
            heads: ChainHeads::new(&range.heads),
            contents: Contents {
                events: range.events,
                beginning: String::new(),
                blocks_at: 0,
                blocks: Vec::new(),
                streams: BTreeMap::new(),
                heads: Vec::new(),
            },
            block: PendingBlock::default(),
            range,
        };
        let compressed = builder.compress_header(&header)?;
        builder.contents.beginning = sha256(&compressed);
        builder.write(&compressed)?;
        builder.contents.blocks_at = builder.at;
        Ok(builder)
    }

    /// Appends the next event. Refused if it does not continue the chain of its bucket, so that damage in the
    /// table is never sealed.
    pub(crate) fn add(&mut self, event: RawRecord) -> Result<(), StoreError> {
        self.heads.append(&event).map_err(|what| {
            StoreError::refused(format!(
                "{what}: nothing is archived; run `penstock events verify` for details"
            ))
        })?;
        let index = self.contents.blocks.len();
        let stream = self.contents.streams.entry(event.stream.clone());
        let (version, blocks) = stream.or_default();
        *version = event.version;
        if blocks.last() != Some(&index) {
            blocks.push(index);
        }
        self.block.add(event)?;
        match self.block.is_full() {
            true => self.end_block(),
            false => Ok(()),
        }
    }

    fn end_block(&mut self) -> Result<(), StoreError> {
        let pending = std::mem::take(&mut self.block);
        let Some(ids) = pending.ids else {
            return Ok(());
        };
        self.text_bytes += pending.text.len() as u64;
        let compressed = compress(&pending.text).map_err(|error| failed(&self.partial, error))?;
        let block = Block {
            first: pending.first,
            last: pending.last,
            events: pending.events,
            at: self.at,
            bytes: compressed.len() as u64,
            sha256: sha256(&compressed),
            ids,
            buckets: format!("{:x}", pending.buckets),
        };
        self.contents.blocks.push(block);
        self.write(&compressed)
    }

    /// Gives the file its final name once it is durable and verified. Also returns the uncompressed size of
    /// its events in bytes.
    pub(crate) fn finish(mut self, sealed_at: Timestamp) -> Result<(Archive, u64), StoreError> {
        self.end_block()?;
        self.contents.heads = self.heads.to_vec();
        let text = serde_json::to_string(&self.contents).map_err(|error| self.unwritten(error))?;
        let contents_at = self.at;
        let compressed = compress(text.as_bytes()).map_err(|error| failed(&self.partial, error))?;
        self.write(&compressed)?;
        let trailer = trailer(contents_at).map_err(|error| failed(&self.partial, error))?;
        self.write(&trailer)?;
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all())
            .map_err(|error| failed(&self.partial, error))?;
        let mut archive = Archive {
            first: self.range.first,
            last: self.range.last,
            file: format!("{}.partial", self.name),
            hash: sha256(text.as_bytes()),
            events: self.range.events,
            bytes: self.at,
            sealed_at,
        };
        self.verify(&archive)?;
        let path = self.folder.join(&self.name);
        archive.file.clone_from(&self.name);
        match path.exists() {
            true => self.verify_existing(&archive, &path)?,
            false => rename(&self.partial, &path)?,
        }
        Ok((archive, self.text_bytes))
    }

    fn verify(&self, archive: &Archive) -> Result<(), StoreError> {
        let previous = self.range.previous.as_ref();
        let written = ArchiveFile::open(&self.folder, archive)?;
        verify(&written, previous.map(|before| before.hash.as_str()))
    }

    /// Checks an existing file of this name. One that was written but not listed is identical; any other is
    /// not ours.
    fn verify_existing(&self, archive: &Archive, path: &Path) -> Result<(), StoreError> {
        self.verify(archive).map_err(|error| {
            StoreError::refused(format!(
                "{} exists already and is not what would be written: it belongs to another store, or is \
                 damaged. Give each store its own folder with --archive, or remove the file",
                path.display()
            ))
            .caused_by(error)
        })
    }

    fn compress_header(&self, value: &ArchiveHeader) -> Result<Vec<u8>, StoreError> {
        let mut text = serde_json::to_vec(value).map_err(|error| self.unwritten(error))?;
        text.push(b'\n');
        compress(&text).map_err(|error| failed(&self.partial, error))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let written = self.file.write_all(bytes);
        written.map_err(|error| failed(&self.partial, error))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn unwritten(&self, error: serde_json::Error) -> StoreError {
        failed(&self.partial, io::Error::other(error))
    }
}

impl Drop for ArchiveBuilder {
    /// Removes the unfinished file.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.partial);
    }
}

impl PendingBlock {
    fn add(&mut self, event: RawRecord) -> Result<(), StoreError> {
        if self.events == 0 {
            self.first = event.position;
        }
        self.last = event.position;
        self.events += 1;
        let (low, high) = self
            .ids
            .get_or_insert_with(|| (event.id.clone(), event.id.clone()));
        if event.id < *low {
            low.clone_from(&event.id);
        }
        if event.id > *high {
            high.clone_from(&event.id);
        }
        self.buckets |= 1u128.checked_shl(u32::from(event.bucket.0)).unwrap_or(0);
        let line = serde_json::to_writer(&mut self.text, &EventLine::from(event));
        line.map_err(|error| {
            StoreError::database(format!("an event cannot be archived: {error}")).caused_by(error)
        })?;
        self.text.push(b'\n');
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.events >= BLOCK_EVENTS || self.text.len() >= BLOCK_BYTES
    }
}

/// Renames a file within its folder, durably.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::rename(from, to).map_err(|error| failed(to, error))?;
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| failed(folder, error))
}

pub(crate) fn failed(path: &Path, error: io::Error) -> StoreError {
    StoreError::refused(format!("{} cannot be written: {error}", path.display())).caused_by(error)
}
