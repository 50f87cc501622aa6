//! One archive on disk, read block by block.
//!
//! A file is a sequence of gzip members: the header, blocks of events, the table of contents, and an empty
//! trailer with the offset of the table. The store has the hash of the table, and the table has the hashes
//! of everything before it, so modified data is never read.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use contract::ids::Position;
use contract::log::RawRecord;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};
use sha2::{Digest, Sha256};

use crate::archive::contents::{ArchiveHeader, Block, Contents, EventLine, FORMAT};
use crate::model::archive::Archive;
use crate::model::error::{Failure, StoreError};

/// Marks the gzip extra field with the offset of the table of contents, in the trailer.
const OFFSET_FIELD: [u8; 4] = [b'P', b'S', 8, 0];

/// The offset of that field in the trailer, and the length of the trailer.
const OFFSET_FIELD_START: usize = 12;
pub(crate) const TRAILER_BYTES: usize = 34;

/// The compression level: higher ones take several times as long and gain little.
const COMPRESSION_LEVEL: Compression = Compression::new(6);

/// The maximum size of a decompressed gzip member. No store writes more.
const DECOMPRESSED_BYTES_MAX: u64 = 1 << 30;

pub(crate) fn compress(text: &[u8]) -> io::Result<Vec<u8>> {
    use std::io::Write;
    let mut encoder = GzEncoder::new(Vec::new(), COMPRESSION_LEVEL);
    encoder.write_all(text)?;
    encoder.finish()
}

fn decompress(compressed: &[u8]) -> io::Result<String> {
    let mut text = String::new();
    let mut decoder = GzDecoder::new(compressed).take(DECOMPRESSED_BYTES_MAX);
    decoder.read_to_string(&mut text)?;
    Ok(text)
}

/// Returns the trailer, the last member.
pub(crate) fn trailer(contents_at: u64) -> io::Result<Vec<u8>> {
    let mut field = OFFSET_FIELD.to_vec();
    field.extend(contents_at.to_le_bytes());
    let encoder = GzBuilder::new()
        .extra(field)
        .write(Vec::new(), COMPRESSION_LEVEL);
    encoder.finish()
}

fn contents_at(trailer: &[u8]) -> Option<u64> {
    let field = trailer.get(OFFSET_FIELD_START..OFFSET_FIELD_START + 12)?;
    let (mark, at) = field.split_at(4);
    (mark == OFFSET_FIELD).then(|| u64::from_le_bytes(at.try_into().unwrap_or_default()))
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An open archive whose table of contents was verified.
pub(crate) struct ArchiveFile {
    path: PathBuf,
    archive: Archive,
    file: File,
    pub contents: Contents,
}

impl ArchiveFile {
    /// Opens an archive. Fails if the file is missing or is not the one that was sealed.
    pub(crate) fn open(folder: &Path, archive: &Archive) -> Result<Self, StoreError> {
        let path = folder.join(&archive.file);
        let open = || {
            let file = File::open(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Failure::from("is missing").caused_by(error),
                _ => Failure::from(format!("cannot be opened ({error})")).caused_by(error),
            })?;
            let contents = read_contents(&file, archive)?;
            Ok((file, contents))
        };
        let (file, contents) = open().map_err(|what| invalid(&path, archive, what))?;
        Ok(Self {
            path,
            archive: archive.clone(),
            file,
            contents,
        })
    }

    /// Reads the events of a block.
    pub(crate) fn block(&self, index: usize) -> Result<Vec<RawRecord>, StoreError> {
        let read = || -> Result<Vec<RawRecord>, Failure> {
            let block = self
                .contents
                .blocks
                .get(index)
                .ok_or("is missing a block")?;
            let compressed = read_range(&self.file, block.at, block.bytes)?;
            events_of(block, &compressed)
        };
        read().map_err(|what| self.invalid(what))
    }

    /// Reads the header.
    pub(crate) fn header(&self) -> Result<ArchiveHeader, StoreError> {
        let read = || -> Result<ArchiveHeader, Failure> {
            let compressed = read_range(&self.file, 0, self.contents.blocks_at)?;
            if sha256(&compressed) != self.contents.beginning {
                return Err("has a modified header".into());
            }
            let text = decompress(&compressed).map_err(unreadable)?;
            let header: ArchiveHeader = serde_json::from_str(&text).map_err(unreadable)?;
            match header.penstock_archive {
                FORMAT => Ok(header),
                newer => Err(Failure::from(format!(
                    "has format {newer}, but this release reads only format {FORMAT}"
                ))),
            }
        };
        read().map_err(|what| self.invalid(what))
    }

    /// Returns the error for a problem with this file.
    pub(crate) fn invalid(&self, what: impl Into<Failure>) -> StoreError {
        invalid(&self.path, &self.archive, what.into())
    }
}

/// What is wrong with a table of contents; the file itself can be read.
const MODIFIED_CONTENTS: &str = "has a modified table of contents";

fn read_contents(file: &File, archive: &Archive) -> Result<Contents, Failure> {
    let length = file.metadata().map_err(unreadable)?.len();
    if length != archive.bytes {
        return Err(Failure::from(format!(
            "has {length} bytes, but was sealed with {}",
            archive.bytes
        )));
    }
    let trailer_at = length.saturating_sub(TRAILER_BYTES as u64);
    let trailer = read_range(file, trailer_at, length - trailer_at)?;
    let at = contents_at(&trailer).filter(|at| *at <= trailer_at);
    let at = at.ok_or("has a modified trailer")?;
    let text = decompress(&read_range(file, at, trailer_at - at)?);
    let text = text.map_err(|error| Failure::from(MODIFIED_CONTENTS).caused_by(error))?;
    if sha256(text.as_bytes()) != archive.hash {
        return Err(MODIFIED_CONTENTS.into());
    }
    serde_json::from_str(&text).map_err(unreadable)
}

fn events_of(block: &Block, compressed: &[u8]) -> Result<Vec<RawRecord>, Failure> {
    let between = format!("between positions {} and {}", block.first, block.last);
    if sha256(compressed) != block.sha256 {
        return Err(Failure::from(format!("was modified {between}")));
    }
    let text = decompress(compressed).map_err(unreadable)?;
    let lines = text.lines().map(serde_json::from_str::<EventLine>);
    let events: Result<Vec<RawRecord>, _> = lines.map(|line| line.map(RawRecord::from)).collect();
    let events = events.map_err(|error| {
        Failure::from(format!("cannot be read {between} ({error})")).caused_by(error)
    })?;
    match events.len() as u64 == block.events {
        true => Ok(events),
        false => Err(Failure::from(format!(
            "does not hold the number of events that it lists {between}"
        ))),
    }
}

fn unreadable(error: impl Error + Send + Sync + 'static) -> Failure {
    Failure::from(format!("cannot be read ({error})")).caused_by(error)
}

fn read_range(file: &File, at: u64, bytes: u64) -> Result<Vec<u8>, Failure> {
    if bytes > DECOMPRESSED_BYTES_MAX {
        return Err(MODIFIED_CONTENTS.into());
    }
    let mut buffer = vec![0; bytes as usize];
    let read = file.read_exact_at(&mut buffer, at);
    read.map_err(unreadable)?;
    Ok(buffer)
}

fn invalid(path: &Path, archive: &Archive, what: Failure) -> StoreError {
    let Archive { first, last, .. } = archive;
    StoreError::ArchiveUnavailable(what.within(|what| {
        format!(
            "the archive {} {what}: it holds the events from position {first} to {last}. Restore it from a \
             backup, or name the folder that contains it with --archive",
            path.display()
        )
    }))
}

/// Verifies every event of a file: their order, that each continues the chain of its bucket from where the
/// previous file ended, and that they match the table of contents. `previous` is the hash of the previous
/// file.
pub(crate) fn verify(file: &ArchiveFile, previous: Option<&str>) -> Result<(), StoreError> {
    use crate::archive::contents::ChainHeads;
    let header = file.header()?;
    if header.previous.as_deref() != previous {
        return Err(file.invalid("does not follow the previous file"));
    }
    let mut heads = ChainHeads::new(&header.heads);
    let (mut at, mut events) = (Position::START, 0);
    for index in 0..file.contents.blocks.len() {
        for event in file.block(index)? {
            if event.position <= at {
                return Err(file.invalid("has events out of order"));
            }
            at = event.position;
            events += 1;
            heads.append(&event).map_err(|what| file.invalid(what))?;
        }
    }
    let archive = &file.archive;
    if (at, events) != (archive.last, archive.events) || heads.to_vec() != file.contents.heads {
        return Err(file.invalid("does not match its table of contents"));
    }
    Ok(())
}
