//! The files of each instance: its log, and the numbered parts rotated out of it.
//!
//! Invariant: a position stays valid across rotations, and never points into parts that were dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A position in the output of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OutputPosition {
    /// The number of the part. The log itself has the number that it gets at its next rotation.
    pub part: u32,
    pub offset: u64,
    /// Whether the part had been rotated when it was last checked.
    pub is_rotated: bool,
}

impl OutputPosition {
    pub fn is_before(self, other: Self) -> bool {
        (self.part, self.offset) < (other.part, other.offset)
    }
}

/// The output of one instance as of when the folder was listed.
#[derive(Clone, Debug)]
pub(super) struct Output {
    pub log: PathBuf,
    pub modified: SystemTime,
    /// The size of the log itself.
    pub length: u64,
    /// The numbers of the rotated parts.
    pub parts: BTreeSet<u32>,
}

impl Output {
    /// Returns the number that the log itself gets at its next rotation.
    pub fn newest(&self) -> u32 {
        self.parts.last().map_or(1, |last| last + 1)
    }

    /// Returns the end of the output.
    pub fn end(&self) -> OutputPosition {
        OutputPosition {
            part: self.newest(),
            offset: self.length,
            is_rotated: false,
        }
    }

    pub fn path(&self, position: OutputPosition) -> PathBuf {
        match position.is_rotated {
            true => part_path(&self.log, position.part),
            false => self.log.clone(),
        }
    }

    /// Maps a position to the parts that exist now. If its part was dropped, returns the start of the next
    /// one; its number advances too, or every read would meet the same gap again.
    pub fn relocate(&self, position: OutputPosition) -> OutputPosition {
        match self.parts.range(position.part..).next() {
            Some(&part) if part == position.part => OutputPosition {
                is_rotated: true,
                ..position
            },
            Some(&part) => OutputPosition {
                part,
                offset: 0,
                is_rotated: true,
            },
            None if position.is_rotated => OutputPosition {
                part: position.part + 1,
                offset: 0,
                is_rotated: false,
            },
            None => position,
        }
    }

    /// Opens the file of a part, which may still be the log itself.
    pub fn open(&self, part: u32) -> io::Result<Option<File>> {
        match if_exists(File::open(part_path(&self.log, part)))? {
            None if part == self.newest() => if_exists(File::open(&self.log)),
            file => Ok(file),
        }
    }
}

/// Returns the output in a folder by instance; none if the folder does not exist.
pub(super) fn outputs(folder: &Path) -> io::Result<BTreeMap<String, Output>> {
    let mut outputs = BTreeMap::new();
    let mut parts: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    for entry in if_exists(fs::read_dir(folder))?.into_iter().flatten() {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(instance) = name.strip_suffix(".log") {
            // Dropped since it was listed.
            let Some(meta) = if_exists(entry.metadata())? else {
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

/// Splits `INSTANCE.log.NNNNNN`.
fn part_of(name: &str) -> Option<(&str, u32)> {
    let (log, number) = name.rsplit_once('.')?;
    Some((log.strip_suffix(".log")?, number.parse().ok()?))
}

pub(super) fn part_path(log: &Path, number: u32) -> PathBuf {
    log.with_extension(format!("log.{number:06}"))
}

/// Returns the rotated parts of a log, oldest first.
pub(super) fn rotated_parts(log: &Path) -> io::Result<Vec<(u32, PathBuf)>> {
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

/// Maps "not found" to `None`.
pub(super) fn if_exists<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
