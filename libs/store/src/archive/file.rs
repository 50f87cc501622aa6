//! One archive on the disk, read a block at a time.
//!
//! A file is a row of gzip members: the first line, blocks of events, the list of contents, and an empty one
//! that says where the list begins. The hash of the list is known to the store and the list has the hash of
//! everything before it, so nothing is read that is not as it was sealed.

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

/// Marks the field that says where the list of contents begins, in the head of the last member.
const FIELD: [u8; 4] = [b'P', b'S', 8, 0];

/// Where that field stands in the last member, and how long the member is.
const FIELD_AT: usize = 12;
pub(crate) const END_BYTES: usize = 34;

/// How strongly blocks are compressed: more takes several times as long and gains little.
const LEVEL: Compression = Compression::new(6);

/// What a part of a file may come to when it is unpacked. No store writes more.
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

/// The last member.
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

/// An opened archive, whose list of contents is the one that was sealed.
pub(crate) struct Opened {
    path: PathBuf,
    of: Archive,
    file: File,
    pub contents: Contents,
}

impl Opened {
    /// Refused where the file is not there, or is not the one that was sealed.
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

    /// The events of a block.
    pub(crate) fn block(&self, index: usize) -> Result<Vec<RawRecord>, StoreError> {
        let read = || -> Result<Vec<RawRecord>, String> {
            let block = self.contents.blocks.get(index).ok_or("has no such block")?;
            let packed = part(&self.file, block.at, block.bytes)?;
            events_of(block, &packed)
        };
        read().map_err(|what| wrong(&self.path, &self.of, &what))
    }

    /// What the file says of itself at its beginning.
    pub(crate) fn beginning(&self) -> Result<Beginning, StoreError> {
        let read = || -> Result<Beginning, String> {
            let packed = part(&self.file, 0, self.contents.blocks_at)?;
            if sha256(&packed) != self.contents.beginning {
                return Err("was changed at its beginning".to_owned());
            }
            let text = unpacked(&packed).map_err(|error| unreadable(&error))?;
            let beginning: Beginning =
                serde_json::from_str(&text).map_err(|error| unreadable(&error))?;
            match beginning.penstock_archive {
                FORMAT => Ok(beginning),
                newer => Err(format!(
                    "has format {newer}, and this release knows {FORMAT}"
                )),
            }
        };
        read().map_err(|what| wrong(&self.path, &self.of, &what))
    }

    /// What is wrong with this file, told as all that is wrong with files is.
    pub(crate) fn wrong(&self, what: &str) -> StoreError {
        wrong(&self.path, &self.of, what)
    }
}

fn read_contents(file: &File, of: &Archive) -> Result<Contents, String> {
    let length = file.metadata().map_err(|error| unreadable(&error))?.len();
    if length != of.bytes {
        return Err(format!(
            "has {length} bytes, and was sealed with {}",
            of.bytes
        ));
    }
    let end_at = length.saturating_sub(END_BYTES as u64);
    let end = part(file, end_at, length - end_at)?;
    let at = contents_at(&end).filter(|at| *at <= end_at);
    let at = at.ok_or("was changed at its end")?;
    let text = unpacked(&part(file, at, end_at - at)?);
    let text = text.map_err(|_| "was changed in its list of contents".to_owned())?;
    if sha256(text.as_bytes()) != of.hash {
        return Err("was changed in its list of contents".to_owned());
    }
    serde_json::from_str(&text).map_err(|error| unreadable(&error))
}

fn events_of(block: &Block, packed: &[u8]) -> Result<Vec<RawRecord>, String> {
    let between = format!("between positions {} and {}", block.first, block.last);
    if sha256(packed) != block.sha256 {
        return Err(format!("was changed {between}"));
    }
    let text = unpacked(packed).map_err(|error| unreadable(&error))?;
    let lines = text.lines().map(serde_json::from_str::<Line>);
    let events: Result<Vec<RawRecord>, _> = lines.map(|line| line.map(RawRecord::from)).collect();
    let events = events.map_err(|error| format!("cannot be read {between} ({error})"))?;
    match events.len() as u64 == block.events {
        true => Ok(events),
        false => Err(format!("has not the events that it says {between}")),
    }
}

fn unreadable(error: &dyn std::fmt::Display) -> String {
    format!("cannot be read ({error})")
}

fn part(file: &File, at: u64, bytes: u64) -> Result<Vec<u8>, String> {
    if bytes > UNPACKED_MAX {
        return Err("was changed in its list of contents".to_owned());
    }
    let mut part = vec![0; bytes as usize];
    let read = file.read_exact_at(&mut part, at);
    read.map_err(|error| unreadable(&error))?;
    Ok(part)
}

fn wrong(path: &Path, of: &Archive, what: &str) -> StoreError {
    let Archive { first, last, .. } = of;
    StoreError::Refused(format!(
        "the archive {} {what}: it holds the events from position {first} to {last}. Put it back from a \
         backup, or name the folder where it is with --archive",
        path.display()
    ))
}

/// Every event of a file, in order, each continuing the chain of its bucket from where the file before left
/// it, and the list of contents compared with what is there. `previous` is the hash of the file before.
pub(crate) fn check(opened: &Opened, previous: Option<&str>) -> Result<(), StoreError> {
    use crate::archive::contents::Heads;
    let beginning = opened.beginning()?;
    if beginning.previous.as_deref() != previous {
        return Err(opened.wrong("does not follow the file before it"));
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
        return Err(opened.wrong("does not hold what it says"));
    }
    Ok(())
}
