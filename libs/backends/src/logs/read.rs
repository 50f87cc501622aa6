//! Reads output from a position on, one chunk at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};

use contract::ids::{DeploymentRef, InstanceId};
use contract::time::Timestamp;

use super::files::{Output, OutputPosition, outputs};
use super::marks::{first_seen, read_marks};
use super::position::{Chunk, first_position, line_start, read_at};
use super::rotate::block_rotation;
use super::tail::{TailLimits, TailSearch};
use super::{LINE_BYTES_MAX, LogLine, folder};

/// Most lines in one chunk. The shortest lines would otherwise take a hundred times the memory of the
/// chunk that they came from.
const CHUNK_LINES_MAX: usize = 4096;

/// Reads the output of a deployment: existing lines first, then new ones. Holds no file open between
/// reads and never blocks for long; to follow, read again after a while.
#[derive(Debug)]
pub struct OutputReader {
    pub(super) folder: PathBuf,
    since: Option<Timestamp>,
    instance: Option<InstanceId>,
    /// How far each instance has been read.
    positions: BTreeMap<String, OutputPosition>,
    /// Instances whose position may be in the middle of a line.
    mid_line: BTreeSet<String>,
    /// Instances whose backlog is still to be read, and where it ends.
    backlog: VecDeque<(String, OutputPosition)>,
    bytes_read: u64,
}

/// Returns a reader of a deployment's output, of all instances or one, from `since` or else the oldest
/// line that is kept.
pub fn logs(
    data: &Path,
    deployment: &DeploymentRef,
    since: Option<Timestamp>,
    instance: Option<InstanceId>,
) -> OutputReader {
    OutputReader {
        folder: folder(data, &deployment.to_string()),
        since,
        instance,
        positions: BTreeMap::new(),
        mid_line: BTreeSet::new(),
        backlog: VecDeque::new(),
        bytes_read: 0,
    }
}

impl OutputReader {
    /// Starts a search for the position of the last lines written so far.
    ///
    /// # Errors
    ///
    /// If an existing output file cannot be read. A file that was rotated or removed meanwhile is no
    /// error.
    pub fn tail(&self, limits: TailLimits) -> io::Result<TailSearch> {
        let waiting = self.outputs()?;
        Ok(TailSearch::new(waiting, self.since, limits))
    }

    /// Moves to the position that was found. The lines from there to the end as of the start of the search
    /// are the backlog; [`read`](Self::read) returns what was written since.
    pub fn start_at(&mut self, tail: TailSearch) {
        self.bytes_read += tail.bytes_read();
        for range in tail.into_ranges() {
            if range.start.is_before(range.end) {
                self.backlog.push_back((range.instance.clone(), range.end));
            } else if !range.is_settled {
                self.mid_line.insert(range.instance.clone());
            }
            self.positions.insert(range.instance, range.start);
        }
    }

    /// Returns the next lines of the backlog, at least one and at most about `bytes_max`; `None` at its end.
    ///
    /// # Errors
    ///
    /// If an existing output file cannot be read. A file that was rotated or removed meanwhile is no
    /// error.
    pub fn read_backlog(&mut self, bytes_max: usize) -> io::Result<Option<Vec<LogLine>>> {
        let _guard = block_rotation();
        let outputs = outputs(&self.folder)?;
        let mut lines = Vec::new();
        while lines.is_empty() {
            let Some((name, end)) = self.backlog.front().cloned() else {
                return Ok(None);
            };
            let more = match outputs.get(&name) {
                Some(output) => self.read_part(&name, output, Some(end), &mut lines, bytes_max)?,
                None => false,
            };
            if !more {
                self.backlog.pop_front();
            }
        }
        Ok(Some(lines))
    }

    /// Returns the next lines, at most about `bytes_max`; none if everything has been read. Lines of an
    /// instance are in order; instances follow one another, in order of their last write.
    ///
    /// # Errors
    ///
    /// If an existing output file cannot be read. A file that was rotated or removed meanwhile is no
    /// error.
    pub fn read(&mut self, bytes_max: usize) -> io::Result<Vec<LogLine>> {
        let _guard = block_rotation();
        let mut lines: Vec<LogLine> = Vec::new();
        let mut left = bytes_max.max(1);
        for (name, output) in self.outputs()? {
            while left > 0 && lines.len() < CHUNK_LINES_MAX {
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

    /// Returns how many bytes have been read from files, including searches.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Returns the output of the requested instances, in order of their last write.
    fn outputs(&self) -> io::Result<Vec<(String, Output)>> {
        let is_wanted = |name: &str| self.instance.as_ref().is_none_or(|id| id.as_str() == name);
        let all = outputs(&self.folder)?.into_iter();
        let mut outputs: Vec<_> = all.filter(|(name, _)| is_wanted(name)).collect();
        outputs.sort_by(|(a, one), (b, other)| (one.modified, a).cmp(&(other.modified, b)));
        Ok(outputs)
    }

    /// Continues reading one instance, up to `end` at most. Returns whether there may be more.
    fn read_part(
        &mut self,
        name: &str,
        output: &Output,
        end: Option<OutputPosition>,
        lines: &mut Vec<LogLine>,
        bytes_max: usize,
    ) -> io::Result<bool> {
        let previous = match self.positions.get(name) {
            Some(position) => *position,
            None => first_position(output, self.since)?,
        };
        let mut position = output.relocate(previous);
        self.positions.insert(name.to_owned(), position);
        let is_over = match end {
            Some(end) => !position.is_before(end),
            None => !position.is_rotated && position.offset == output.length,
        };
        if is_over {
            return Ok(false);
        }
        let path = output.path(position);
        if self.mid_line.remove(name) {
            position.offset = line_start(&path, position.offset)?;
        }
        let end = end.filter(|end| end.part == position.part);
        let bytes_max = bytes_max.max(LINE_BYTES_MAX) as u64;
        let length = end.map_or(bytes_max, |end| end.offset - position.offset);
        let Some(chunk) = read_at(&path, position.offset, bytes_max.min(length))? else {
            // Dropped since it was listed.
            return Ok(false);
        };
        self.bytes_read += chunk.bytes.len() as u64;
        // The end of a closed part counts as the end of a line, and so does the end of the backlog.
        let is_closed = match end {
            Some(_) => chunk.bytes.len() as u64 == length,
            None => position.is_rotated && chunk.at_end,
        };
        let taken = collect_lines(name, &path, &chunk, is_closed, lines);
        position.offset = chunk.offset + taken as u64;
        let mut more = taken > 0;
        if position.is_rotated && chunk.at_end && taken == chunk.bytes.len() {
            position = OutputPosition {
                part: position.part + 1,
                offset: 0,
                is_rotated: false,
            };
            more = true;
        }
        self.positions.insert(name.to_owned(), position);
        Ok(more)
    }
}

/// Appends the complete lines of a chunk and returns their size in bytes.
fn collect_lines(
    name: &str,
    path: &Path,
    chunk: &Chunk,
    is_closed: bool,
    lines: &mut Vec<LogLine>,
) -> usize {
    let complete = complete_lines(&chunk.bytes, is_closed);
    let marks = match complete {
        [] => Vec::new(),
        _ => read_marks(path),
    };
    let mut taken = 0;
    let parts = complete
        .split_inclusive(|byte| *byte == b'\n')
        .flat_map(|line| line.chunks(LINE_BYTES_MAX));
    for text in parts {
        if lines.len() == CHUNK_LINES_MAX {
            break;
        }
        taken += text.len();
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        lines.push(LogLine {
            instance: InstanceId::from(name.to_owned()),
            seen: first_seen(&marks, chunk.offset + taken as u64, chunk.modified),
            text: String::from_utf8_lossy(text).into_owned(),
        });
    }
    taken
}

/// Returns what can be split into lines: everything up to the last newline, and of an unfinished line
/// as many lines of the maximum size as it fills.
fn complete_lines(bytes: &[u8], is_closed: bool) -> &[u8] {
    if is_closed {
        return bytes;
    }
    let newline = bytes.iter().rposition(|byte| *byte == b'\n');
    let end = newline.map_or(0, |last| last + 1);
    let rest = bytes.len() - end;
    &bytes[..end + rest - rest % LINE_BYTES_MAX]
}
