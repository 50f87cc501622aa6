//! Readers while output is written, rotated and dropped.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;

use contract::time::Span;

use super::files::rotated_parts;
use super::marks::modified;
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

    fn reader(&self, since: Option<Timestamp>) -> OutputReader {
        logs(self.data.path(), &"iris/blue".parse().unwrap(), since, None)
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
fn a_reader_returns_complete_lines_once_and_follows_across_a_rotation() {
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
fn a_deployment_keeps_to_its_limit_by_dropping_the_oldest_files() {
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
fn part_numbers_are_not_reused_after_all_parts_were_dropped() {
    let logs = Logs::new();
    let too_much = format!("{}\n", "y".repeat(500 << 10));
    for second in 0..3 {
        logs.append("a", &too_much);
        logs.sweep(Timestamp::from_secs(second));
    }
    let parts = rotated_parts(&logs.path("a")).unwrap();
    assert_eq!(parts.last().unwrap().0, 3);
    let mut reader = logs.reader(None);
    reader.read(1 << 20).unwrap();
    logs.append("a", "after\n");
    assert_eq!(texts(reader.read(1000).unwrap()), ["after"]);
}

#[test]
fn since_leaves_out_lines_written_before_it() {
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
        let times_shown = times(Some(since));
        let later = expected.into_iter().filter(|time| *time > since);
        assert_eq!(times_shown, later.collect::<Vec<_>>());
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
    let parts = rotated_parts(&logs.path("a")).unwrap();
    let copied = modified(&parts[0].1).unwrap();
    assert_eq!(times, [start, copied, start + Span::from_secs(60)]);
}

#[test]
fn an_endless_line_is_returned_in_chunks() {
    let logs = Logs::new();
    logs.append("a", &"z".repeat(LINE_BYTES_MAX + 10));
    let mut reader = logs.reader(None);
    let chunk = "z".repeat(LINE_BYTES_MAX);
    assert_eq!(texts(reader.read(10 << 20).unwrap()), [chunk]);
    logs.append("a", "\n");
    assert_eq!(texts(reader.read(1000).unwrap()), ["z".repeat(10)]);
}

const ALL: TailLimits = TailLimits {
    lines: usize::MAX,
    bytes: u64::MAX,
};

fn lines(lines: usize) -> TailLimits {
    TailLimits { lines, ..ALL }
}

/// Returns the last lines, and the reader positioned after them.
fn tail(mut reader: OutputReader, limits: TailLimits) -> (Vec<String>, OutputReader) {
    let mut tail = reader.tail(limits).unwrap();
    while tail.step().unwrap() {}
    let announced = tail.lines();
    reader.start_at(tail);
    let mut lines_read = Vec::new();
    while let Some(lines) = reader.read_backlog(1000).unwrap() {
        lines_read.extend(texts(lines));
    }
    assert_eq!(lines_read.len(), announced);
    (lines_read, reader)
}

/// Lines so long that a hundred of them exceed a chunk.
fn numbered(range: std::ops::Range<u32>) -> String {
    numbers(range).join("\n") + "\n"
}

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| format!("line {number:0900}")).collect()
}

/// Reads everything in chunks, as a server does.
fn read_all(reader: &mut OutputReader) -> Vec<String> {
    let mut lines_read = Vec::new();
    for _ in 0..1000 {
        match reader.read(1000).unwrap() {
            lines if lines.is_empty() => return lines_read,
            lines => lines_read.extend(texts(lines)),
        }
    }
    panic!("reading does not end");
}

impl Logs {
    /// Parts 1, 2 and 3 of `a` with lines 0 to 299, and 300 to 309 in its log.
    fn in_parts() -> Self {
        let logs = Self::new();
        for part in 0..3 {
            logs.append("a", &numbered(part * 100..part * 100 + 100));
            logs.sweep(Timestamp::from_secs(1));
        }
        logs.append("a", &numbered(300..310));
        logs
    }

    fn part(&self, number: u32) -> PathBuf {
        files::part_path(&self.path("a"), number)
    }
}

#[test]
fn lines_after_dropped_parts_are_returned_once_and_in_order() {
    let logs = Logs::in_parts();
    fs::remove_file(logs.part(1)).unwrap();
    let mut reader = logs.reader(None);
    assert_eq!(read_all(&mut reader), numbers(100..310));
    assert_eq!(tail(logs.reader(None), ALL).0, numbers(100..310));
}

#[test]
fn parts_dropped_between_two_reads_are_skipped() {
    let logs = Logs::in_parts();
    fs::write(logs.part(1), format!("{}\n", "x".repeat(LINE_BYTES_MAX))).unwrap();
    for dropped in [1..2, 1..3, 1..4] {
        let mut reader = logs.reader(None);
        // In the middle of the first part.
        assert_eq!(texts(reader.read(1).unwrap()), ["x".repeat(LINE_BYTES_MAX)]);
        let kept: Vec<_> = dropped
            .clone()
            .map(|number| (logs.part(number), fs::read(logs.part(number)).unwrap()))
            .collect();
        for (path, _) in &kept {
            fs::remove_file(path).unwrap();
        }
        let first = (dropped.end - 1) * 100;
        let lines_read = read_all(&mut reader);
        assert_eq!(lines_read, numbers(first..310), "{dropped:?}");
        for (path, bytes) in kept {
            fs::write(path, bytes).unwrap();
        }
    }
}

#[test]
fn an_emptied_newest_part_is_skipped() {
    let logs = Logs::in_parts();
    for number in [1, 2] {
        fs::remove_file(logs.part(number)).unwrap();
    }
    fs::write(logs.part(3), "").unwrap();
    let mut reader = logs.reader(None);
    assert_eq!(read_all(&mut reader), numbers(300..310));
    assert_eq!(tail(logs.reader(None), lines(20)).0, numbers(300..310));
}

#[test]
fn an_unfinished_rotation_is_not_visible() {
    let logs = Logs::new();
    logs.append("a", &numbered(0..3));
    fs::write(
        logs.path("a").with_extension("log.unfinished"),
        "line 0\nli",
    )
    .unwrap();
    let mut reader = logs.reader(None);
    assert_eq!(texts(reader.read(1000).unwrap()), numbers(0..3));
    logs.append("a", &numbered(3..100));
    logs.sweep(Timestamp::from_secs(1));
    assert_eq!(texts(reader.read(1 << 20).unwrap()), numbers(3..100));
}

#[test]
fn the_tail_has_exactly_the_requested_number_of_lines() {
    let logs = Logs::in_parts();
    // Output of an instance that wrote earlier.
    logs.append("b", &numbered(900..910));
    let earlier = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    File::options()
        .append(true)
        .open(logs.path("b"))
        .unwrap()
        .set_modified(earlier)
        .unwrap();
    let all: Vec<String> = numbers(900..910)
        .into_iter()
        .chain(numbers(0..310))
        .collect();
    for requested in [0, 1, 9, 10, 11, 109, 110, 111, 309, 310, 311, 319, 320, 999] {
        let (lines_read, reader) = tail(logs.reader(None), lines(requested));
        assert_eq!(lines_read, all[all.len() - requested.min(all.len())..]);
        // What follows is only what is written later, also for the instances that were skipped.
        let mut reader = reader;
        assert!(reader.read(1000).unwrap().is_empty());
    }
}

#[test]
fn lines_completed_after_the_tail_follow_it() {
    let logs = Logs::new();
    logs.append("a", "one\ntw");
    logs.append("b", "alpha\nbe");
    for requested in [0, 1, 5] {
        let (lines_read, mut reader) = tail(logs.reader(None), lines(requested));
        assert_eq!(lines_read.len(), requested.min(2));
        let (a, b) = (
            fs::read(logs.path("a")).unwrap(),
            fs::read(logs.path("b")).unwrap(),
        );
        logs.append("a", "o\n");
        logs.append("b", "ta\n");
        let mut later_lines = texts(reader.read(1000).unwrap());
        later_lines.sort();
        assert_eq!(later_lines, ["beta", "two"], "after {requested}");
        fs::write(logs.path("a"), a).unwrap();
        fs::write(logs.path("b"), b).unwrap();
    }
}

#[test]
fn lines_written_while_the_tail_is_read_are_not_part_of_it() {
    let logs = Logs::in_parts();
    let mut reader = logs.reader(None);
    let mut tail = reader.tail(lines(20)).unwrap();
    while tail.step().unwrap() {}
    reader.start_at(tail);
    logs.append("a", &numbered(310..500));
    logs.sweep(Timestamp::from_secs(2));
    logs.append("a", "new\n");
    let mut lines_read = Vec::new();
    while let Some(lines) = reader.read_backlog(1).unwrap() {
        lines_read.extend(texts(lines));
    }
    assert_eq!(lines_read, numbers(290..310));
    let later_lines = texts(reader.read(1 << 20).unwrap());
    assert_eq!(later_lines[..190], numbers(310..500));
    assert_eq!(later_lines[190..], ["new"]);
}

#[test]
fn only_the_end_of_the_output_is_read_for_the_tail() {
    let logs = Logs::new();
    for second in 0..3 {
        logs.append("a", &numbered(0..500));
        logs.sweep(Timestamp::from_secs(second));
    }
    logs.append("b", &numbered(0..500));
    logs.append("a", &numbered(0..10));
    let (lines_read, reader) = tail(logs.reader(None), lines(12));
    assert_eq!(lines_read.len(), 12);
    // Blocks from the end, and then the lines themselves.
    let read = reader.bytes_read();
    assert!(read < 3 * LINE_BYTES_MAX as u64, "{read}");
}

#[test]
fn the_tail_of_one_instance_has_no_lines_of_others() {
    let logs = Logs::in_parts();
    logs.append("b", &numbered(900..910));
    let deployment = "iris/blue".parse().unwrap();
    let reader = super::logs(logs.data.path(), &deployment, None, Some(id("b")));
    assert_eq!(tail(reader, lines(3)).0, numbers(907..910));
}

#[test]
fn an_overlong_line_counts_once_for_each_chunk_it_is_returned_in() {
    let logs = Logs::new();
    let long = "z".repeat(3 * LINE_BYTES_MAX + 10);
    logs.append("a", &format!("one\n{long}\ntwo\n{long}"));
    for requested in 1..12 {
        let lines_read = tail(logs.reader(None), lines(requested)).0;
        assert_eq!(lines_read.len(), requested.min(10), "{requested}");
    }
}

#[test]
fn lines_beyond_the_byte_limit_are_left_out() {
    let logs = Logs::in_parts();
    let limits = TailLimits {
        bytes: 10_000,
        ..ALL
    };
    let mut tail = logs.reader(None).tail(limits).unwrap();
    while tail.step().unwrap() {}
    assert_eq!(
        (
            tail.lines(),
            tail.is_cut_by_size(),
            tail.has_earlier_lines()
        ),
        (11, true, true)
    );
    let long = "z".repeat(5 * LINE_BYTES_MAX);
    logs.append("a", &format!("{long}\n"));
    let limits = TailLimits {
        bytes: 2 * LINE_BYTES_MAX as u64,
        ..ALL
    };
    let (lines_read, reader) = super::tests::tail(logs.reader(None), limits);
    assert_eq!(lines_read.len(), 2);
    assert!(reader.bytes_read() < 6 * LINE_BYTES_MAX as u64);
    let mut all = logs.reader(None).tail(ALL).unwrap();
    while all.step().unwrap() {}
    assert!(!all.is_cut_by_size() && !all.has_earlier_lines());
}
