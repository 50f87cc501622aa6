//! Writing one archive.
//!
//! Invariants: a file has its name only when it is whole and on the disk, and has been read back; none is
//! written over, it may be another store's.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use contract::ids::Position;
use contract::log::RawRecord;
use contract::time::Timestamp;

use crate::archive::contents::{Beginning, Block, Contents, FORMAT, Heads, Line};
use crate::archive::file::{Opened, check, end, packed, sha256};
use crate::model::archive::Archive;
use crate::model::chain::ChainHead;
use crate::model::error::StoreError;

/// Events that are compressed together: enough that they compress well, few enough that one of them is
/// read quickly.
const BLOCK_EVENTS: u64 = 1_000;

/// The same in bytes, for large events.
const BLOCK_BYTES: usize = 1024 * 1024;

/// What a file is to hold, and where it stands in the row of files.
pub(crate) struct Span {
    pub first: Position,
    pub last: Position,
    pub events: u64,
    pub previous: Option<Archive>,
    pub heads: Vec<ChainHead>,
}

/// A file that is being written, under another name.
pub(crate) struct Making {
    folder: PathBuf,
    name: String,
    partial: PathBuf,
    file: BufWriter<File>,
    at: u64,
    text_bytes: u64,
    span: Span,
    heads: Heads,
    contents: Contents,
    block: Pending,
}

/// The block that is being filled.
#[derive(Default)]
struct Pending {
    text: Vec<u8>,
    first: Position,
    last: Position,
    events: u64,
    ids: Option<(String, String)>,
    buckets: u128,
}

impl Making {
    pub(crate) fn begin(folder: &Path, span: Span) -> Result<Self, StoreError> {
        fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
        let name = format!("{}-{}.penstock-events.gz", span.first, span.last);
        let partial = folder.join(format!("{name}.partial"));
        let file = File::create(&partial).map_err(|error| failed(&partial, &error))?;
        let beginning = Beginning {
            penstock_archive: FORMAT,
            first: span.first,
            last: span.last,
            events: span.events,
            previous: span.previous.as_ref().map(|before| before.hash.clone()),
            heads: span.heads.clone(),
        };
        let mut making = Self {
            folder: folder.to_owned(),
            name,
            partial,
            file: BufWriter::new(file),
            at: 0,
            text_bytes: 0,
            heads: Heads::new(&span.heads),
            contents: Contents {
                events: span.events,
                beginning: String::new(),
                blocks_at: 0,
                blocks: Vec::new(),
                streams: BTreeMap::new(),
                heads: Vec::new(),
            },
            block: Pending::default(),
            span,
        };
        let packed = making.packed_line(&beginning)?;
        making.contents.beginning = sha256(&packed);
        making.write(&packed)?;
        making.contents.blocks_at = making.at;
        Ok(making)
    }

    /// The next event. Refused where it does not continue the chain of its bucket: what is wrong in the
    /// table must not be sealed.
    pub(crate) fn add(&mut self, event: RawRecord) -> Result<(), StoreError> {
        self.heads.take_in(&event).map_err(|what| {
            StoreError::Refused(format!(
                "{what}: nothing is archived; `penstock events verify` says more"
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
        let packed = packed(&pending.text).map_err(|error| failed(&self.partial, &error))?;
        let block = Block {
            first: pending.first,
            last: pending.last,
            events: pending.events,
            at: self.at,
            bytes: packed.len() as u64,
            sha256: sha256(&packed),
            ids,
            buckets: format!("{:x}", pending.buckets),
        };
        self.contents.blocks.push(block);
        self.write(&packed)
    }

    /// Gives the file its name, when it is on the disk and reads back as it should; and says how many bytes
    /// its events have as text.
    pub(crate) fn finish(mut self, sealed_at: Timestamp) -> Result<(Archive, u64), StoreError> {
        self.end_block()?;
        self.contents.heads = self.heads.list();
        let text = serde_json::to_string(&self.contents).map_err(|error| self.unwritten(&error))?;
        let contents_at = self.at;
        let packed = packed(text.as_bytes()).map_err(|error| failed(&self.partial, &error))?;
        self.write(&packed)?;
        let end = end(contents_at).map_err(|error| failed(&self.partial, &error))?;
        self.write(&end)?;
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all())
            .map_err(|error| failed(&self.partial, &error))?;
        let mut archive = Archive {
            first: self.span.first,
            last: self.span.last,
            file: format!("{}.partial", self.name),
            hash: sha256(text.as_bytes()),
            events: self.span.events,
            bytes: self.at,
            sealed_at,
        };
        self.check(&archive)?;
        let path = self.folder.join(&self.name);
        archive.file.clone_from(&self.name);
        match path.exists() {
            true => self.check_left_over(&archive, &path)?,
            false => rename(&self.partial, &path)?,
        }
        Ok((archive, self.text_bytes))
    }

    fn check(&self, archive: &Archive) -> Result<(), StoreError> {
        let previous = self.span.previous.as_ref();
        let written = Opened::open(&self.folder, archive)?;
        check(&written, previous.map(|before| before.hash.as_str()))
    }

    /// What was written and not listed is the same to the byte; whatever else has this name is somebody's.
    fn check_left_over(&self, archive: &Archive, path: &Path) -> Result<(), StoreError> {
        self.check(archive).map_err(|_| {
            StoreError::Refused(format!(
                "{} exists already and is not what would be written: it is of another store, or damaged. \
                 Give each store a folder of its own with --archive, or take the file away",
                path.display()
            ))
        })
    }

    fn packed_line(&self, value: &Beginning) -> Result<Vec<u8>, StoreError> {
        let mut text = serde_json::to_vec(value).map_err(|error| self.unwritten(&error))?;
        text.push(b'\n');
        packed(&text).map_err(|error| failed(&self.partial, &error))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let written = self.file.write_all(bytes);
        written.map_err(|error| failed(&self.partial, &error))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn unwritten(&self, error: &serde_json::Error) -> StoreError {
        failed(&self.partial, &io::Error::other(error.to_string()))
    }
}

impl Drop for Making {
    /// What was broken off is of no use.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.partial);
    }
}

impl Pending {
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
        let line = serde_json::to_writer(&mut self.text, &Line::from(event));
        line.map_err(|error| {
            StoreError::Database(format!("an event cannot be archived: {error}"))
        })?;
        self.text.push(b'\n');
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.events >= BLOCK_EVENTS || self.text.len() >= BLOCK_BYTES
    }
}

/// Both names in one folder; the new one stays after a loss of power.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::rename(from, to).map_err(|error| failed(to, &error))?;
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| failed(folder, &error))
}

pub(crate) fn failed(path: &Path, error: &io::Error) -> StoreError {
    StoreError::Refused(format!("{} cannot be written: {error}", path.display()))
}
