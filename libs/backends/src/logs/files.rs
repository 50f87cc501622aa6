//! Which files there are of each instance: its log, and the rotated parts of it by number.
//!
//! Invariant: a place stays where it is when the log is rotated, and is never behind what was dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How far an instance's output has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The number of a part. The log itself has the one that it gets when it is rotated next.
    pub part: u32,
    pub offset: u64,
    /// The part had been rotated when it was looked at last.
    pub is_rotated: bool,
}

impl Place {
    pub fn is_before(self, other: Self) -> bool {
        (self.part, self.offset) < (other.part, other.offset)
    }
}

/// The output of one instance, as it was when the folder was listed.
#[derive(Clone, Debug)]
pub(super) struct Output {
    pub log: PathBuf,
    pub modified: SystemTime,
    /// Of the log itself.
    pub length: u64,
    /// Numbers of the rotated parts.
    pub parts: BTreeSet<u32>,
}

impl Output {
    /// The number that the log itself gets when it is rotated next.
    pub fn newest(&self) -> u32 {
        self.parts.last().map_or(1, |last| last + 1)
    }

    /// Where the output ends.
    pub fn end(&self) -> Place {
        Place {
            part: self.newest(),
            offset: self.length,
            is_rotated: false,
        }
    }

    pub fn path(&self, place: Place) -> PathBuf {
        match place.is_rotated {
            true => part_path(&self.log, place.part),
            false => self.log.clone(),
        }
    }

    /// The same place among the parts that there are now. Where its part was dropped, the start of the
    /// next: the number moves on too, or every reading would meet the same gap again.
    pub fn locate(&self, place: Place) -> Place {
        match self.parts.range(place.part..).next() {
            Some(&part) if part == place.part => Place {
                is_rotated: true,
                ..place
            },
            Some(&part) => Place {
                part,
                offset: 0,
                is_rotated: true,
            },
            None if place.is_rotated => Place {
                part: place.part + 1,
                offset: 0,
                is_rotated: false,
            },
            None => place,
        }
    }

    /// The file of a part: by now the log itself may have been rotated.
    pub fn open(&self, part: u32) -> io::Result<Option<File>> {
        match found(File::open(part_path(&self.log, part)))? {
            None if part == self.newest() => found(File::open(&self.log)),
            file => Ok(file),
        }
    }
}

/// By instance. A folder that is not there has none.
pub(super) fn outputs(folder: &Path) -> io::Result<BTreeMap<String, Output>> {
    let mut outputs = BTreeMap::new();
    let mut parts: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    for entry in found(fs::read_dir(folder))?.into_iter().flatten() {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(instance) = name.strip_suffix(".log") {
            // None if it was dropped since it was listed.
            let Some(meta) = found(entry.metadata())? else {
                continue;
            };
            let output = Output {
                log: entry.path(),
                modified: meta.modified()?,
                length: meta.len(),
                parts: BTreeSet::new(),
            };
            outputs.insert(instance.to_owned(), output);
        } else if let Some((instance, number)) = part_of(name) {
            parts.entry(instance.to_owned()).or_default().insert(number);
        }
    }
    for (instance, output) in &mut outputs {
        output.parts = parts.remove(instance).unwrap_or_default();
    }
    Ok(outputs)
}

/// `INSTANCE.log.NNNNNN`
fn part_of(name: &str) -> Option<(&str, u32)> {
    let (log, number) = name.rsplit_once('.')?;
    Some((log.strip_suffix(".log")?, number.parse().ok()?))
}

pub(super) fn part_path(log: &Path, number: u32) -> PathBuf {
    log.with_extension(format!("log.{number:06}"))
}

/// The rotated parts of a log, oldest first.
pub(super) fn rotated(log: &Path) -> io::Result<Vec<(u32, PathBuf)>> {
    let (Some(folder), Some(stem)) = (log.parent(), log.file_stem().and_then(|n| n.to_str()))
    else {
        return Ok(Vec::new());
    };
    let mut parts = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let part = name.to_str().and_then(part_of);
        if let Some((_, number)) = part.filter(|(instance, _)| *instance == stem) {
            parts.push((number, entry.path()));
        }
    }
    parts.sort();
    Ok(parts)
}

/// None of what is not there, or no longer.
pub(super) fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
