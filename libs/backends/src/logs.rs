//! Output of instances, in files: `DATA/logs/ENDPOINT/DEPLOYMENT/INSTANCE.log`.
//!
//! An instance writes to its file itself (it must outlive us, so there is no pipe), opened for
//! append. A file per instance keeps lines of several instances apart without anything in between.
//! When a file has grown to its limit, its content is copied to `INSTANCE.log.NNNNNN` and the file is
//! truncated in place: the writer goes on at the new end. **What is written between the last read of
//! the copy and the truncation is lost** (microseconds, unless a writer outruns the copying); renaming instead would lose nothing, but the
//! writer would go on in the renamed file for ever. All files of a deployment together keep to a
//! limit, oldest first out; a file in use is never removed.
//!
//! Output carries no times of its own, so a file `….marks` beside notes how far it had grown when.
//! `since` is answered by it, and so is when a line was first seen: both to within [`MARK_EVERY`], and
//! alike, so that no line shows a time before the `since` that it was asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use contract::ids::{DeploymentRef, InstanceId};
use contract::time::{Span, Timestamp};

/// How often the growth of a file is noted.
pub const MARK_EVERY: Span = Span::from_secs(10);

/// Longest line that a reader gives in one piece; the rest follows as a line of its own.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// A file in use is rotated once it is larger.
    pub file_bytes_max: u64,
    /// All files of one deployment together. With many instances, each gets a smaller share.
    pub deployment_bytes_max: u64,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self {
            file_bytes_max: 10 << 20,
            deployment_bytes_max: 50 << 20,
        }
    }
}

/// The least that a file may grow to, however many instances share the limit.
const SHARE_BYTES_MIN: u64 = 64 << 10;

fn folder(data: &Path, deployment: &str) -> PathBuf {
    data.join("logs").join(deployment)
}

/// The file that an instance writes to.
pub(crate) fn output_path(data: &Path, deployment: &str, id: &InstanceId) -> PathBuf {
    folder(data, deployment).join(format!("{id}.log"))
}

fn marks_path(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".marks");
    name.into()
}

/// Rotates, notes growth and drops what is too old, for all deployments with instances in use.
pub(crate) fn sweep(
    data: &Path,
    in_use: &BTreeMap<String, BTreeSet<InstanceId>>,
    limits: LogLimits,
    now: Timestamp,
) -> io::Result<()> {
    for (deployment, ids) in in_use {
        let live: BTreeSet<PathBuf> = ids
            .iter()
            .map(|id| output_path(data, deployment, id))
            .collect();
        let share = limits.deployment_bytes_max / (live.len() as u64 + 1);
        let file_max = limits.file_bytes_max.min(share.max(SHARE_BYTES_MIN));
        for log in &live {
            let Ok(meta) = fs::metadata(log) else {
                continue;
            };
            if meta.len() > file_max {
                rotate(log)?;
            } else {
                mark(log, meta.len(), now)?;
            }
        }
        drop_oldest(
            &folder(data, deployment),
            &live,
            limits.deployment_bytes_max,
        )?;
    }
    Ok(())
}

/// A pass copies what came during the one before it. A writer that is faster than we are would keep
/// us copying for ever; it loses what it wrote during the last pass.
const COPY_PASSES_MAX: u32 = 5;

fn rotate(log: &Path) -> io::Result<()> {
    let number = rotated(log)?.last().map_or(1, |(number, _)| number + 1);
    let target = log.with_extension(format!("log.{number:06}"));
    let source = OpenOptions::new().read(true).write(true).open(log)?;
    let mut copy = File::create(&target)?;
    let mut copied = 0;
    for _ in 0..COPY_PASSES_MAX {
        let length = source.metadata()?.len();
        if length <= copied {
            break;
        }
        copied += io::copy(&mut (&source).take(length - copied), &mut copy)?;
    }
    source.set_len(0)?;
    match fs::rename(marks_path(log), marks_path(&target)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The rotated parts of a log, oldest first.
fn rotated(log: &Path) -> io::Result<Vec<(u32, PathBuf)>> {
    let (Some(folder), Some(name)) = (log.parent(), log.file_name().and_then(|n| n.to_str()))
    else {
        return Ok(Vec::new());
    };
    let mut parts = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let part = entry.file_name();
        let number = part
            .to_str()
            .and_then(|part| part.strip_prefix(name)?.strip_prefix('.')?.parse().ok());
        if let Some(number) = number {
            parts.push((number, entry.path()));
        }
    }
    parts.sort();
    Ok(parts)
}

fn mark(log: &Path, length: u64, now: Timestamp) -> io::Result<()> {
    let path = marks_path(log);
    let last = read_marks(log).last().copied();
    let due = last.is_none_or(|(time, size)| {
        size != length && now.since(time).millis() >= MARK_EVERY.millis()
    });
    if !due {
        return Ok(());
    }
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    // One write, so that a crash leaves a whole line or none.
    file.write_all(format!("{} {length}\n", now.millis()).as_bytes())
}

fn read_marks(log: &Path) -> Vec<(Timestamp, u64)> {
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

fn drop_oldest(folder: &Path, live: &BTreeSet<PathBuf>, bytes_max: u64) -> io::Result<()> {
    let mut total = 0;
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        total += meta.len();
        let path = entry.path();
        let in_use = live.contains(&path) || live.iter().any(|log| marks_path(log) == path);
        if meta.is_file() && !in_use {
            files.push((meta.modified()?, path, meta.len()));
        }
    }
    files.sort();
    let mut newest = BTreeSet::new();
    for log in live {
        newest.extend(rotated(log)?.pop().map(|(_, path)| path));
    }
    for (_, path, length) in files {
        if total <= bytes_max {
            break;
        }
        if newest.contains(&path) {
            // Empty it stays, so that its number is not given again: readers count by it.
            OpenOptions::new().write(true).open(path)?.set_len(0)?;
        } else {
            fs::remove_file(path)?;
        }
        total -= length;
    }
    Ok(())
}

/// A line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    pub instance: InstanceId,
    /// The line had been written by then, and not long before.
    pub seen: Timestamp,
    /// Without the newline; what is not UTF-8 is replaced.
    pub text: String,
}

/// Reads the output of a deployment: what there is, and then what comes. It holds no file open
/// between reads and never blocks for long; to follow, read again after a while.
#[derive(Debug)]
pub struct LogReader {
    folder: PathBuf,
    since: Option<Timestamp>,
    /// By instance: which part is being read, and how far.
    places: BTreeMap<String, Place>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Parts up to this number have been read.
    parts_done: u32,
    offset: u64,
}

/// The output of a deployment, from `since` on (all that is kept, without it).
pub fn logs(data: &Path, deployment: &DeploymentRef, since: Option<Timestamp>) -> LogReader {
    LogReader {
        folder: folder(data, &deployment.to_string()),
        since,
        places: BTreeMap::new(),
    }
}

impl LogReader {
    /// The next lines, at most about `bytes_max`; none when all that is there has been read. Lines of
    /// an instance are in order; instances come one after the other, those that wrote last at the end.
    pub fn read(&mut self, bytes_max: usize) -> io::Result<Vec<LogLine>> {
        let mut lines = Vec::new();
        let mut left = bytes_max.max(1);
        for name in self.instances()? {
            while left > 0 {
                let before = lines.len();
                let advanced = self.read_part(&name, &mut lines, left)?;
                let taken: usize = lines[before..]
                    .iter()
                    .map(|l: &LogLine| l.text.len() + 1)
                    .sum();
                left = left.saturating_sub(taken);
                if !advanced {
                    break;
                }
            }
        }
        Ok(lines)
    }

    /// Names of instances with output, in order of their last write.
    fn instances(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let instance = name.to_str().and_then(|name| name.strip_suffix(".log"));
            if let Some(instance) = instance {
                found.push((entry.metadata()?.modified()?, instance.to_owned()));
            }
        }
        found.sort();
        Ok(found.into_iter().map(|(_, name)| name).collect())
    }

    /// Reads on in one instance; true if there may be more.
    fn read_part(
        &mut self,
        name: &str,
        lines: &mut Vec<LogLine>,
        bytes_max: usize,
    ) -> io::Result<bool> {
        let log = self.folder.join(format!("{name}.log"));
        let mut place = match self.places.get(name) {
            Some(place) => *place,
            None => self.first_place(&log)?,
        };
        let next = rotated(&log)?
            .into_iter()
            .find(|(number, _)| *number > place.parts_done);
        let (path, part) = match &next {
            Some((number, path)) => (path.clone(), Some(*number)),
            None => (log, None),
        };
        if part.is_some_and(|number| number != place.parts_done + 1) {
            // What lay between was dropped for its age.
            place.offset = 0;
        }
        let Some(Piece {
            offset,
            bytes,
            at_end,
            modified,
        }) = read_at(&path, place.offset, bytes_max)?
        else {
            // Dropped for its age since it was listed.
            return Ok(false);
        };
        place.offset = offset;
        // The end of a part that is closed is the end of a line, whatever stands there.
        let whole = whole_lines(&bytes, part.is_some() && at_end);
        let marks = match whole {
            [] => Vec::new(),
            _ => read_marks(&path),
        };
        for text in whole.split_inclusive(|byte| *byte == b'\n') {
            place.offset += text.len() as u64;
            let text = text.strip_suffix(b"\n").unwrap_or(text);
            lines.push(LogLine {
                instance: InstanceId::from(name.to_owned()),
                seen: seen(&marks, place.offset, modified),
                text: String::from_utf8_lossy(text).into_owned(),
            });
        }
        let part_finished = at_end && whole.len() == bytes.len();
        let mut more = !whole.is_empty();
        if let Some(number) = part
            && part_finished
        {
            place = Place {
                parts_done: number,
                offset: 0,
            };
            more = true;
        }
        self.places.insert(name.to_owned(), place);
        Ok(more)
    }

    /// Where reading starts: the first part that was still written to after `since`.
    fn first_place(&self, log: &Path) -> io::Result<Place> {
        let Some(since) = self.since else {
            return Ok(Place::default());
        };
        let mut parts_done = 0;
        for (number, path) in rotated(log)? {
            if modified(&path)? >= since {
                let offset = offset_at(&path, since);
                let parts_done = number.saturating_sub(1);
                return Ok(Place { parts_done, offset });
            }
            parts_done = number;
        }
        let offset = if modified(log)? < since {
            fs::metadata(log)?.len()
        } else {
            offset_at(log, since)
        };
        Ok(Place { parts_done, offset })
    }
}

fn modified(path: &Path) -> io::Result<Timestamp> {
    let modified = fs::metadata(path)?.modified()?;
    let since_1970 = modified
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Timestamp::from_millis(since_1970.as_millis() as i64))
}

/// The largest length noted before the instant; everything later lies behind it.
fn offset_at(log: &Path, since: Timestamp) -> u64 {
    let before = |mark: &&(Timestamp, u64)| mark.0 <= since;
    read_marks(log)
        .iter()
        .filter(before)
        .map(|mark| mark.1)
        .max()
        .unwrap_or(0)
}

/// When what ends at an offset was noted first, or else when the file was written to last.
fn seen(marks: &[(Timestamp, u64)], end: u64, modified: Timestamp) -> Timestamp {
    let after = marks.partition_point(|(_, length)| *length < end);
    let noted = marks.get(after).map(|(time, _)| *time);
    noted.map_or(modified, |noted| noted.min(modified))
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
fn read_at(path: &Path, offset: u64, bytes_max: usize) -> io::Result<Option<Piece>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    // Shorter than what was read: truncated by a rotation, and written anew from its start.
    let offset = if offset > length { 0 } else { offset };
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    (&file)
        .take(bytes_max.max(LINE_BYTES_MAX) as u64)
        .read_to_end(&mut bytes)?;
    Ok(Some(Piece {
        offset,
        at_end: offset + bytes.len() as u64 >= length,
        modified: modified(path)?,
        bytes,
    }))
}

/// What can be given away: up to the last newline, or all of it if no end of the line is in sight.
fn whole_lines(bytes: &[u8], closed: bool) -> &[u8] {
    if closed || bytes.len() >= LINE_BYTES_MAX && !bytes.contains(&b'\n') {
        return bytes;
    }
    let end = bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |last| last + 1);
    &bytes[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Logs {
        data: tempfile::TempDir,
        in_use: BTreeMap<String, BTreeSet<InstanceId>>,
    }

    const LIMITS: LogLimits = LogLimits {
        file_bytes_max: 100,
        deployment_bytes_max: 400 << 10,
    };

    fn id(name: &str) -> InstanceId {
        InstanceId::from(name.to_owned())
    }

    impl Logs {
        fn new() -> Self {
            let data = tempfile::tempdir().unwrap();
            fs::create_dir_all(data.path().join("logs/iris/blue")).unwrap();
            let in_use = BTreeMap::from([("iris/blue".to_owned(), BTreeSet::from([id("a")]))]);
            Self { data, in_use }
        }

        fn path(&self, name: &str) -> PathBuf {
            output_path(self.data.path(), "iris/blue", &id(name))
        }

        fn append(&self, name: &str, text: &str) {
            let mut file = OpenOptions::new()
                .append(true)
                .create(true)
                .open(self.path(name))
                .unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }

        fn sweep(&self, now: Timestamp) {
            sweep(self.data.path(), &self.in_use, LIMITS, now).unwrap();
        }

        fn reader(&self, since: Option<Timestamp>) -> LogReader {
            logs(self.data.path(), &"iris/blue".parse().unwrap(), since)
        }
    }

    fn texts(lines: Vec<LogLine>) -> Vec<String> {
        lines.into_iter().map(|line| line.text).collect()
    }

    fn now() -> Timestamp {
        let since_1970 = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        Timestamp::from_millis(since_1970.as_millis() as i64)
    }

    #[test]
    fn a_reader_gives_whole_lines_once_and_follows_over_a_rotation() {
        let logs = Logs::new();
        let mut reader = logs.reader(None);
        logs.append("a", "one\ntw");
        assert_eq!(texts(reader.read(1000).unwrap()), ["one"]);
        logs.append("a", &format!("o\n{}\n", "x".repeat(200)));
        assert_eq!(
            texts(reader.read(1000).unwrap()),
            ["two".to_owned(), "x".repeat(200)]
        );
        logs.append("a", "before\n");
        logs.sweep(Timestamp::from_secs(1));
        logs.append("a", "after\n");
        assert_eq!(fs::metadata(logs.path("a")).unwrap().len(), 6);
        assert_eq!(texts(reader.read(1000).unwrap()), ["before", "after"]);
        assert!(reader.read(1000).unwrap().is_empty());
    }

    #[test]
    fn a_deployment_keeps_to_its_limit_and_loses_the_oldest_first() {
        let logs = Logs::new();
        logs.append("ended", &"old\n".repeat(80 << 10));
        let text = format!("{}\n", "y".repeat(150 << 10));
        for second in 0..3 {
            logs.append("a", &text);
            logs.sweep(Timestamp::from_secs(second));
        }
        assert!(!logs.path("ended").exists());
        let folder = fs::read_dir(logs.path("a").parent().unwrap()).unwrap();
        let total: u64 = folder
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= LIMITS.deployment_bytes_max, "{total}");
        assert!(logs.path("a").exists());
    }

    #[test]
    fn the_number_of_a_part_is_not_given_again_when_all_parts_were_dropped() {
        let logs = Logs::new();
        let too_much = format!("{}\n", "y".repeat(500 << 10));
        for second in 0..3 {
            logs.append("a", &too_much);
            logs.sweep(Timestamp::from_secs(second));
        }
        let parts = rotated(&logs.path("a")).unwrap();
        assert_eq!(parts.last().unwrap().0, 3);
        let mut reader = logs.reader(None);
        reader.read(1 << 20).unwrap();
        logs.append("a", "after\n");
        assert_eq!(texts(reader.read(1000).unwrap()), ["after"]);
    }

    #[test]
    fn since_leaves_out_what_had_been_written_before() {
        let logs = Logs::new();
        let now = now();
        logs.append("a", "early\n");
        logs.sweep(now - Span::from_secs(60));
        logs.append("a", "late\n");
        let since = Some(now - Span::from_secs(30));
        assert_eq!(texts(logs.reader(since).read(1000).unwrap()), ["late"]);
        assert_eq!(
            texts(logs.reader(None).read(1000).unwrap()),
            ["early", "late"]
        );
    }

    #[test]
    fn a_line_shows_when_it_was_first_seen_and_none_shows_a_time_before_since() {
        let logs = Logs::new();
        let start = now() - Span::from_secs(100);
        for (line, after) in [("one", 0), ("two", 30), ("three", 60)] {
            logs.append("a", &format!("{line}\n"));
            logs.sweep(start + Span::from_secs(after));
        }
        logs.append("a", "not noted yet\n");
        let written = modified(&logs.path("a")).unwrap();
        let times = |since| -> Vec<Timestamp> {
            let lines = logs.reader(since).read(1000).unwrap();
            lines.into_iter().map(|line| line.seen).collect()
        };
        let expected = [
            start,
            start + Span::from_secs(30),
            start + Span::from_secs(60),
            written,
        ];
        assert_eq!(times(None), expected);
        for since in [
            start,
            start + Span::from_secs(15),
            start + Span::from_secs(30),
        ] {
            let shown = times(Some(since));
            let later = expected.into_iter().filter(|time| *time > since);
            assert_eq!(shown, later.collect::<Vec<_>>());
        }
    }

    #[test]
    fn lines_of_a_rotated_part_keep_their_times() {
        let logs = Logs::new();
        let start = now() - Span::from_secs(100);
        logs.append("a", "early\n");
        logs.sweep(start);
        logs.append("a", &format!("{}\n", "x".repeat(200)));
        logs.sweep(start + Span::from_secs(30));
        logs.append("a", "late\n");
        logs.sweep(start + Span::from_secs(60));
        let lines = logs.reader(None).read(1000).unwrap();
        let times: Vec<Timestamp> = lines.iter().map(|line| line.seen).collect();
        let parts = rotated(&logs.path("a")).unwrap();
        let copied = modified(&parts[0].1).unwrap();
        assert_eq!(times, [start, copied, start + Span::from_secs(60)]);
    }

    #[test]
    fn lines_without_end_and_without_utf8_are_given_in_pieces() {
        let logs = Logs::new();
        logs.append("a", &"z".repeat(LINE_BYTES_MAX + 10));
        let mut reader = logs.reader(None);
        let lines = texts(reader.read(10 << 20).unwrap());
        assert_eq!(lines.concat().len(), LINE_BYTES_MAX + 10);
    }
}
