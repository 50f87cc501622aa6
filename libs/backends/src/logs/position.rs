//! Positions in an output: where reading starts, and where a line does.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use contract::time::Timestamp;

use super::LINE_BYTES_MAX;
use super::files::{Output, OutputPosition, if_exists};
use super::marks::{modified, offset_at};

/// Returns where reading starts: in the first part that was written to after `since`.
pub(super) fn first_position(
    output: &Output,
    since: Option<Timestamp>,
) -> io::Result<OutputPosition> {
    let first = |part| OutputPosition {
        part,
        offset: 0,
        is_rotated: true,
    };
    let Some(since) = since else {
        return Ok(output.parts.first().map_or(
            OutputPosition {
                offset: 0,
                ..output.end()
            },
            |part| first(*part),
        ));
    };
    for part in &output.parts {
        let path = output.path(first(*part));
        if if_exists(modified(&path))?.is_some_and(|modified| modified >= since) {
            let offset = offset_at(&path, since);
            return Ok(OutputPosition {
                offset,
                ..first(*part)
            });
        }
    }
    let end = output.end();
    let is_later = if_exists(modified(&output.log))?.is_some_and(|modified| modified >= since);
    let offset = match is_later {
        true => offset_at(&output.log, since).min(end.offset),
        false => end.offset,
    };
    Ok(OutputPosition { offset, ..end })
}

/// Returns the start of the line around an offset, or the offset itself if no start is within range.
pub(super) fn line_start(path: &Path, offset: u64) -> io::Result<u64> {
    let from = offset.saturating_sub(LINE_BYTES_MAX as u64);
    let Some(chunk) = read_at(path, from, offset - from)? else {
        return Ok(offset);
    };
    let newline = chunk.bytes.iter().rposition(|byte| *byte == b'\n');
    Ok(match newline {
        Some(newline) => chunk.offset + newline as u64 + 1,
        None if from == 0 => 0,
        None => offset,
    })
}

pub(super) struct Chunk {
    /// Where the chunk starts in the file.
    pub offset: u64,
    pub bytes: Vec<u8>,
    /// Whether it reaches the end of the file.
    pub at_end: bool,
    /// When the file was last modified.
    pub modified: Timestamp,
}

/// Reads a file from an offset on; `None` if the file is gone.
pub(super) fn read_at(path: &Path, offset: u64, bytes_max: u64) -> io::Result<Option<Chunk>> {
    let Some(mut file) = if_exists(File::open(path))? else {
        return Ok(None);
    };
    let length = file.metadata()?.len();
    // Shorter than what was read: truncated by a rotation and written again from the start.
    let offset = if offset > length { 0 } else { offset };
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    (&file).take(bytes_max).read_to_end(&mut bytes)?;
    let Some(modified) = if_exists(modified(path))? else {
        return Ok(None);
    };
    Ok(Some(Chunk {
        offset,
        at_end: offset + bytes.len() as u64 >= length,
        modified,
        bytes,
    }))
}
