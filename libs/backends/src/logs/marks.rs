//! Marks: how large an output file was at which time, in a file next to it with lines of
//! `MILLISECONDS LENGTH`.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use contract::time::{Span, Timestamp};

/// How often the size of a file is recorded.
pub const MARK_EVERY: Span = Span::from_secs(10);

pub(super) fn marks_path(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".marks");
    name.into()
}

pub(super) fn mark(log: &Path, length: u64, now: Timestamp) -> io::Result<()> {
    let path = marks_path(log);
    let last = read_marks(log).last().copied();
    let due = last.is_none_or(|(time, size)| {
        size != length && now.since(time).millis() >= MARK_EVERY.millis()
    });
    if !due {
        return Ok(());
    }
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    // A single write, so that a crash leaves a complete line or none.
    file.write_all(format!("{} {length}\n", now.millis()).as_bytes())
}

pub(super) fn read_marks(log: &Path) -> Vec<(Timestamp, u64)> {
    let text = fs::read_to_string(marks_path(log)).unwrap_or_default();
    let parse = |line: &str| {
        let (time, length) = line.split_once(' ')?;
        Some((
            Timestamp::from_millis(time.parse().ok()?),
            length.parse().ok()?,
        ))
    };
    text.lines().filter_map(parse).collect()
}

/// Returns the largest size recorded by `since`; everything written later is beyond it.
pub(super) fn offset_at(log: &Path, since: Timestamp) -> u64 {
    let before = |mark: &&(Timestamp, u64)| mark.0 <= since;
    read_marks(log)
        .iter()
        .filter(before)
        .map(|mark| mark.1)
        .max()
        .unwrap_or(0)
}

/// Returns when the output up to `end` was first recorded, or else when the file was last modified.
pub(super) fn first_seen(marks: &[(Timestamp, u64)], end: u64, modified: Timestamp) -> Timestamp {
    let after = marks.partition_point(|(_, length)| *length < end);
    let noted = marks.get(after).map(|(time, _)| *time);
    noted.map_or(modified, |noted| noted.min(modified))
}

pub(super) fn modified(path: &Path) -> io::Result<Timestamp> {
    let modified = fs::metadata(path)?.modified()?;
    let since_1970 = modified
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Timestamp::from_millis(since_1970.as_millis() as i64))
}
