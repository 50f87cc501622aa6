//! Reads output from a place on, a piece at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use contract::ids::{DeploymentRef, InstanceId};
use contract::time::Timestamp;

use super::files::{Output, Place, found, outputs};
use super::marks::{modified, offset_at, read_marks, seen};
use super::rotate::hold_still;
use super::tail::{Most, Tail};
use super::{LINE_BYTES_MAX, LogLine, folder};

/// Most lines in one piece. Of the shortest lines a piece of the largest size holds so many that they
/// take a hundred times its room.
const PIECE_LINES_MAX: usize = 4096;

/// Reads the output of a deployment: what there is, and then what comes. It holds no file open
/// between reads and never blocks for long; to follow, read again after a while.
#[derive(Debug)]
pub struct LogReader {
    pub(super) folder: PathBuf,
    since: Option<Timestamp>,
    instance: Option<InstanceId>,
    /// By instance: how far it has been read.
    places: BTreeMap<String, Place>,
    /// Instances whose place may be in the middle of a line.
    amid: BTreeSet<String>,
    /// What is left of the past, instance by instance, and where it ends.
    past: VecDeque<(String, Place)>,
    bytes_read: u64,
}

/// The output of a deployment, from `since` on (all that is kept, without it), of all instances or one.
pub fn logs(
    data: &Path,
    deployment: &DeploymentRef,
    since: Option<Timestamp>,
    instance: Option<InstanceId>,
) -> LogReader {
    LogReader {
        folder: folder(data, &deployment.to_string()),
        since,
        instance,
        places: BTreeMap::new(),
        amid: BTreeSet::new(),
        past: VecDeque::new(),
        bytes_read: 0,
    }
}

impl LogReader {
    /// Begins to look for the place from which the last lines stand that have been written by now.
    ///
    /// # Errors
    ///
    /// Where a file of output is there and cannot be read. One that was rotated away or removed
    /// meanwhile is no error.
    pub fn tail(&self, most: Most) -> io::Result<Tail> {
        let waiting = self.outputs()?;
        Ok(Tail::new(waiting, self.since, most))
    }

    /// Goes to the place that was found. [`read_past`](Self::read_past) gives the lines from there to
    /// the end that was there when the search began, [`read`](Self::read) then what was written since.
    pub fn start_at(&mut self, tail: Tail) {
        self.bytes_read += tail.bytes_read();
        for found in tail.into_stretches() {
            if found.start.is_before(found.end) {
                self.past.push_back((found.instance.clone(), found.end));
            } else if !found.is_settled {
                self.amid.insert(found.instance.clone());
            }
            self.places.insert(found.instance, found.start);
        }
    }

    /// The next lines of the past, at least one and at most about `bytes_max`; none when it is over.
    ///
    /// # Errors
    ///
    /// Where a file of output is there and cannot be read. One that was rotated away or removed
    /// meanwhile is no error.
    pub fn read_past(&mut self, bytes_max: usize) -> io::Result<Option<Vec<LogLine>>> {
        let _still = hold_still();
        let outputs = outputs(&self.folder)?;
        let mut lines = Vec::new();
        while lines.is_empty() {
            let Some((name, end)) = self.past.front().cloned() else {
                return Ok(None);
            };
            let more = match outputs.get(&name) {
                Some(output) => self.read_part(&name, output, Some(end), &mut lines, bytes_max)?,
                None => false,
            };
            if !more {
                self.past.pop_front();
            }
        }
        Ok(Some(lines))
    }

    /// The next lines, at most about `bytes_max`; none when all that is there has been read. Lines of
    /// an instance are in order; instances come one after the other, those that wrote last at the end.
    ///
    /// # Errors
    ///
    /// Where a file of output is there and cannot be read. One that was rotated away or removed
    /// meanwhile is no error.
    pub fn read(&mut self, bytes_max: usize) -> io::Result<Vec<LogLine>> {
        let _still = hold_still();
        let mut lines: Vec<LogLine> = Vec::new();
        let mut left = bytes_max.max(1);
        for (name, output) in self.outputs()? {
            while left > 0 && lines.len() < PIECE_LINES_MAX {
                let before = lines.len();
                let more = self.read_part(&name, &output, None, &mut lines, left)?;
                let taken: usize = lines[before..].iter().map(|l| l.text.len() + 1).sum();
                left = left.saturating_sub(taken);
                if !more {
                    break;
                }
            }
        }
        Ok(lines)
    }

    /// How much has been read from files, to find places too.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// What there is of the instances asked for, in order of their last write.
    fn outputs(&self) -> io::Result<Vec<(String, Output)>> {
        let wanted = |name: &str| self.instance.as_ref().is_none_or(|id| id.as_str() == name);
        let all = outputs(&self.folder)?.into_iter();
        let mut wanted: Vec<_> = all.filter(|(name, _)| wanted(name)).collect();
        wanted.sort_by(|(a, one), (b, other)| (one.modified, a).cmp(&(other.modified, b)));
        Ok(wanted)
    }

    /// Reads on in one instance, up to `end` at most; true if there may be more.
    fn read_part(
        &mut self,
        name: &str,
        output: &Output,
        end: Option<Place>,
        lines: &mut Vec<LogLine>,
        bytes_max: usize,
    ) -> io::Result<bool> {
        let known = match self.places.get(name) {
            Some(place) => *place,
            None => first_place(output, self.since)?,
        };
        let mut place = output.locate(known);
        self.places.insert(name.to_owned(), place);
        let is_over = match end {
            Some(end) => !place.is_before(end),
            None => !place.is_rotated && place.offset == output.length,
        };
        if is_over {
            return Ok(false);
        }
        let path = output.path(place);
        if self.amid.remove(name) {
            place.offset = line_start(&path, place.offset)?;
        }
        let end = end.filter(|end| end.part == place.part);
        let bytes_max = bytes_max.max(LINE_BYTES_MAX) as u64;
        let to_end = end.map_or(bytes_max, |end| end.offset - place.offset);
        let Some(piece) = read_at(&path, place.offset, bytes_max.min(to_end))? else {
            // Dropped for its age since it was listed.
            return Ok(false);
        };
        self.bytes_read += piece.bytes.len() as u64;
        // The end of a part that is closed is the end of a line, whatever stands there, and so is the
        // end that was noted for the past.
        let is_closed = match end {
            Some(_) => piece.bytes.len() as u64 == to_end,
            None => place.is_rotated && piece.at_end,
        };
        let taken = take_lines(name, &path, &piece, is_closed, lines);
        place.offset = piece.offset + taken as u64;
        let mut more = taken > 0;
        if place.is_rotated && piece.at_end && taken == piece.bytes.len() {
            place = Place {
                part: place.part + 1,
                offset: 0,
                is_rotated: false,
            };
            more = true;
        }
        self.places.insert(name.to_owned(), place);
        Ok(more)
    }
}

/// Where reading starts: the first part that was still written to after `since`.
pub(super) fn first_place(output: &Output, since: Option<Timestamp>) -> io::Result<Place> {
    let first = |part| Place {
        part,
        offset: 0,
        is_rotated: true,
    };
    let Some(since) = since else {
        return Ok(output.parts.first().map_or(
            Place {
                offset: 0,
                ..output.end()
            },
            |part| first(*part),
        ));
    };
    for part in &output.parts {
        let path = output.path(first(*part));
        if found(modified(&path))?.is_some_and(|modified| modified >= since) {
            let offset = offset_at(&path, since);
            return Ok(Place {
                offset,
                ..first(*part)
            });
        }
    }
    let end = output.end();
    let is_later = found(modified(&output.log))?.is_some_and(|modified| modified >= since);
    let offset = match is_later {
        true => offset_at(&output.log, since).min(end.offset),
        false => end.offset,
    };
    Ok(Place { offset, ..end })
}

/// Where the line begins that goes on at an offset; the offset itself, where no beginning is in sight.
pub(super) fn line_start(path: &Path, offset: u64) -> io::Result<u64> {
    let from = offset.saturating_sub(LINE_BYTES_MAX as u64);
    let Some(piece) = read_at(path, from, offset - from)? else {
        return Ok(offset);
    };
    let newline = piece.bytes.iter().rposition(|byte| *byte == b'\n');
    Ok(match newline {
        Some(newline) => piece.offset + newline as u64 + 1,
        None if from == 0 => 0,
        None => offset,
    })
}

struct Piece {
    /// Where it begins.
    offset: u64,
    bytes: Vec<u8>,
    /// Nothing stands behind it.
    at_end: bool,
    /// Not before any of it was written.
    modified: Timestamp,
}

/// What stands in a file from an offset on; none where the file is gone.
fn read_at(path: &Path, offset: u64, bytes_max: u64) -> io::Result<Option<Piece>> {
    let Some(mut file) = found(File::open(path))? else {
        return Ok(None);
    };
    let length = file.metadata()?.len();
    // Shorter than what was read: truncated by a rotation, and written anew from its start.
    let offset = if offset > length { 0 } else { offset };
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    (&file).take(bytes_max).read_to_end(&mut bytes)?;
    let Some(modified) = found(modified(path))? else {
        return Ok(None);
    };
    Ok(Some(Piece {
        offset,
        at_end: offset + bytes.len() as u64 >= length,
        modified,
        bytes,
    }))
}

/// Adds the whole lines of a piece; how many bytes they are.
fn take_lines(
    name: &str,
    path: &Path,
    piece: &Piece,
    is_closed: bool,
    lines: &mut Vec<LogLine>,
) -> usize {
    let whole = whole_lines(&piece.bytes, is_closed);
    let marks = match whole {
        [] => Vec::new(),
        _ => read_marks(path),
    };
    let mut taken = 0;
    let parts = whole
        .split_inclusive(|byte| *byte == b'\n')
        .flat_map(|line| line.chunks(LINE_BYTES_MAX));
    for text in parts {
        if lines.len() == PIECE_LINES_MAX {
            break;
        }
        taken += text.len();
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        lines.push(LogLine {
            instance: InstanceId::from(name.to_owned()),
            seen: seen(&marks, piece.offset + taken as u64, piece.modified),
            text: String::from_utf8_lossy(text).into_owned(),
        });
    }
    taken
}

/// What can be given away: up to the last newline, and of a line without an end in sight all that
/// makes a line of the largest size.
fn whole_lines(bytes: &[u8], is_closed: bool) -> &[u8] {
    if is_closed {
        return bytes;
    }
    let newline = bytes.iter().rposition(|byte| *byte == b'\n');
    let end = newline.map_or(0, |last| last + 1);
    let rest = bytes.len() - end;
    &bytes[..end + rest - rest % LINE_BYTES_MAX]
}
