//! One archive on disk, read block by block.
//!
//! A file is a sequence of gzip members: the header, blocks of events, the table of contents, and an empty
//! trailer with the offset of the table. The store has the hash of the table, and the table has the hashes
//! of everything before it, so modified data is never read.

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

use crate::archive::contents::{Beginning, Block, Contents, FORMAT, Line};
use crate::model::archive::Archive;
use crate::model::error::StoreError;

/// Marks the gzip extra field with the offset of the table of contents, in the trailer.
const FIELD: [u8; 4] = [b'P', b'S', 8, 0];

/// The offset of that field in the trailer, and the length of the trailer.
const FIELD_AT: usize = 12;
pub(crate) const END_BYTES: usize = 34;

/// The compression level: higher ones take several times as long and gain little.
const LEVEL: Compression = Compression::new(6);

/// The maximum size of a decompressed gzip member. No store writes more.
const UNPACKED_MAX: u64 = 1 << 30;

pub(crate) fn packed(text: &[u8]) -> io::Result<Vec<u8>> {
    use std::io::Write;
    let mut encoder = GzEncoder::new(Vec::new(), LEVEL);
    encoder.write_all(text)?;
    encoder.finish()
}

fn unpacked(packed: &[u8]) -> io::Result<String> {
    let mut text = String::new();
    let mut decoder = GzDecoder::new(packed).take(UNPACKED_MAX);
    decoder.read_to_string(&mut text)?;
    Ok(text)
}

/// Returns the trailer, the last member.
pub(crate) fn end(contents_at: u64) -> io::Result<Vec<u8>> {
    let mut field = FIELD.to_vec();
    field.extend(contents_at.to_le_bytes());
    let encoder = GzBuilder::new().extra(field).write(Vec::new(), LEVEL);
    encoder.finish()
}

fn contents_at(end: &[u8]) -> Option<u64> {
    let field = end.get(FIELD_AT..FIELD_AT + 12)?;
    let (mark, at) = field.split_at(4);
    (mark == FIELD).then(|| u64::from_le_bytes(at.try_into().unwrap_or_default()))
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An open archive whose table of contents was verified.
pub(crate) struct Opened {
    path: PathBuf,
    of: Archive,
    file: File,
    pub contents: Contents,
}

impl Opened {
    /// Opens an archive. Refused if the file is missing or is not the one that was sealed.
    pub(crate) fn open(folder: &Path, of: &Archive) -> Result<Self, StoreError> {
        let path = folder.join(&of.file);
        let wrong = |what: String| wrong(&path, of, &what);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => wrong("is missing".to_owned()),
            _ => wrong(format!("cannot be opened ({error})")),
        })?;
        let contents = read_contents(&file, of).map_err(wrong)?;
        Ok(Self {
            path: path.clone(),
            of: of.clone(),
            file,
            contents,
        })
    }

    /// Reads the events of a block.
    pub(crate) fn block(&self, index: usize) -> Result<Vec<RawRecord>, StoreError> {
        let read = || -> Result<Vec<RawRecord>, String> {
            let block = self.contents.blocks.get(index).ok_or("is missing a block")?;
            let packed = part(&self.file, block.at, block.bytes)?;
            events_of(block, &packed)
        };
        read().map_err(|what| wrong(&self.path, &self.of, &what))
    }

    /// Reads the header.
    pub(crate) fn beginning(&self) -> Result<Beginning, StoreError> {
        let read = || -> Result<Beginning, String> {
            let packed = part(&self.file, 0, self.contents.blocks_at)?;
            if sha256(&packed) != self.contents.beginning {
                return Err("has a modified header".to_owned());
            }
            let text = unpacked(&packed).map_err(|error| unreadable(&error))?;
            let beginning: Beginning =
                serde_json::from_str(&text).map_err(|error| unreadable(&error))?;
            match beginning.penstock_archive {
                FORMAT => Ok(beginning),
                newer => Err(format!(
                    "has format {newer}, but this release reads only format {FORMAT}"
                )),
            }
        };
        read().map_err(|what| wrong(&self.path, &self.of, &what))
    }

    /// Returns the error for a problem with this file.
    pub(crate) fn wrong(&self, what: &str) -> StoreError {
        wrong(&self.path, &self.of, what)
    }
}

fn read_contents(file: &File, of: &Archive) -> Result<Contents, String> {
    let length = file.metadata().map_err(|error| unreadable(&error))?.len();
    if length != of.bytes {
        return Err(format!(
            "has {length} bytes, but was sealed with {}",
            of.bytes
        ));
    }
    let end_at = length.saturating_sub(END_BYTES as u64);
    let end = part(file, end_at, length - end_at)?;
    let at = contents_at(&end).filter(|at| *at <= end_at);
    let at = at.ok_or("has a modified trailer")?;
    let text = unpacked(&part(file, at, end_at - at)?);
    let text = text.map_err(|_| "has a modified table of contents".to_owned())?;
    if sha256(text.as_bytes()) != of.hash {
        return Err("has a modified table of contents".to_owned());
    }
    serde_json::from_str(&text).map_err(|error| unreadable(&error))
}

fn events_of(block: &Block, packed: &[u8]) -> Result<Vec<RawRecord>, String> {
    let between = format!("between positions {} and {}", block.first, block.last);
    if sha256(packed) != block.sha256 {
        return Err(format!("was modified {between}"));
    }
    let text = unpacked(packed).map_err(|error| unreadable(&error))?;
    let lines = text.lines().map(serde_json::from_str::<Line>);
    let events: Result<Vec<RawRecord>, _> = lines.map(|line| line.map(RawRecord::from)).collect();
    let events = events.map_err(|error| format!("cannot be read {between} ({error})"))?;
    match events.len() as u64 == block.events {
        true => Ok(events),
        false => Err(format!("does not hold the number of events that it lists {between}")),
    }
}

fn unreadable(error: &dyn std::fmt::Display) -> String {
    format!("cannot be read ({error})")
}

fn part(file: &File, at: u64, bytes: u64) -> Result<Vec<u8>, String> {
    if bytes > UNPACKED_MAX {
        return Err("has a modified table of contents".to_owned());
    }
    let mut part = vec![0; bytes as usize];
    let read = file.read_exact_at(&mut part, at);
    read.map_err(|error| unreadable(&error))?;
    Ok(part)
}

fn wrong(path: &Path, of: &Archive, what: &str) -> StoreError {
    let Archive { first, last, .. } = of;
    StoreError::Refused(format!(
        "the archive {} {what}: it holds the events from position {first} to {last}. Restore it from a \
         backup, or name the folder that contains it with --archive",
        path.display()
    ))
}

/// Verifies every event of a file: their order, that each continues the chain of its bucket from where the
/// previous file ended, and that they match the table of contents. `previous` is the hash of the previous
/// file.
pub(crate) fn check(opened: &Opened, previous: Option<&str>) -> Result<(), StoreError> {
    use crate::archive::contents::Heads;
    let beginning = opened.beginning()?;
    if beginning.previous.as_deref() != previous {
        return Err(opened.wrong("does not follow the previous file"));
    }
    let mut heads = Heads::new(&beginning.heads);
    let (mut at, mut events) = (Position::START, 0);
    for index in 0..opened.contents.blocks.len() {
        for event in opened.block(index)? {
            if event.position <= at {
                return Err(opened.wrong("has events out of order"));
            }
            at = event.position;
            events += 1;
            heads.take_in(&event).map_err(|what| opened.wrong(&what))?;
        }
    }
    let of = &opened.of;
    if (at, events) != (of.last, of.events) || heads.list() != opened.contents.heads {
        return Err(opened.wrong("does not match its table of contents"));
    }
    Ok(())
}
