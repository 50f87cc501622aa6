//! Logs as the process backend keeps them in the data folder: the past first, then what comes.
//!
//! Invariant: files are read in pieces of bounded size, beside the async threads; between two of them a
//! reader can be dropped, and then it ends. All readers share one limit, whichever door they came by.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actuator::logs::{LogsError, LogsQuery, NodeLines, NodeLogs};
use backends::logs::{LogLine, LogReader, Most, Tail};
use bytes::Bytes;
use contract::ids::DeploymentRef;
use futures::StreamExt;
use futures::stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Readers of logs at the same time; more are refused. Each takes a few pieces of memory, and time of a
/// disk that instances write to.
pub const READERS_MAX: usize = 128;
/// How often a followed log is looked at again.
const FOLLOW_EVERY: Duration = Duration::from_millis(250);
/// Pieces that are read at the same time, for all readers together.
const PIECES_MAX: usize = 8;
/// How much is read at a time.
const PIECE_BYTES_MAX: usize = 64 * 1024;
/// Most lines of the past that are shown where no number was asked for.
const LINES_MAX: usize = 100_000;
/// Most bytes of the past in one answer, however few lines they are.
const PAST_BYTES_MAX: u64 = 32 << 20;

pub struct FolderLogs {
    data: PathBuf,
    room: Arc<Semaphore>,
    past_bytes_max: u64,
}

impl FolderLogs {
    /// Logs in a data folder; `room` is that of all readers of this process.
    pub fn new(data: &Path, room: Arc<Semaphore>) -> Self {
        Self {
            data: data.to_owned(),
            room,
            past_bytes_max: PAST_BYTES_MAX,
        }
    }

    /// What is said before the past where not all of it is shown and nobody asked for that.
    fn note(&self, tail: &Tail, query: &LogsQuery) -> Option<String> {
        let most = match (tail.is_cut(), query.limit) {
            (true, _) => format!("{} bytes of them", self.past_bytes_max),
            (false, None) => format!("{LINES_MAX} of them"),
            (false, Some(_)) => return None,
        };
        let note = format!("penstock: older lines are left out: an answer has at most {most}\n");
        tail.leaves_out().then_some(note)
    }
}

#[async_trait::async_trait]
impl NodeLogs for FolderLogs {
    async fn logs(&self, of: &DeploymentRef, query: LogsQuery) -> Result<NodeLines, LogsError> {
        let room = self.room.clone().try_acquire_owned().map_err(|_| {
            LogsError::Busy(
                "this node has no room for more readers of logs; close one, or try again later"
                    .to_owned(),
            )
        })?;
        let most = Most {
            lines: query.limit.unwrap_or(LINES_MAX).min(LINES_MAX),
            bytes: self.past_bytes_max,
        };
        let reader = backends::logs::logs(&self.data, of, query.since, query.instance.clone());
        let failed = |error: io::Error| LogsError::Failed(error.to_string());
        let (mut reader, tail) = find_tail(reader, most).await.map_err(failed)?;
        let (past, note) = (tail.lines(), self.note(&tail, &query));
        reader.start_at(tail);
        let reading = Reading {
            reader,
            query,
            note,
            is_past: true,
            _room: room,
        };
        Ok(NodeLines {
            past,
            stream: stream::unfold(reading, Reading::next).boxed(),
        })
    }
}

/// Work with files for as long as a piece takes: it has no place among the tasks. A few pieces at a time
/// keep a disk busy; more would only take threads, and memory for what waits to be sent.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    static PIECES: Semaphore = Semaphore::const_new(PIECES_MAX);
    let _piece = PIECES.acquire().await.map_err(io::Error::other)?;
    let worked = tokio::task::spawn_blocking(work).await;
    worked.map_err(io::Error::other)?
}

/// Block by block, so that a reader who leaves meanwhile is not searched for any further.
async fn find_tail(reader: LogReader, most: Most) -> io::Result<(LogReader, Tail)> {
    let begin = move || {
        let tail = reader.tail(most)?;
        Ok((reader, tail))
    };
    let (reader, mut tail) = aside(begin).await?;
    loop {
        let step = move || {
            let more = tail.step()?;
            Ok((tail, more))
        };
        let (stepped, more) = aside(step).await?;
        if !more {
            return Ok((reader, stepped));
        }
        tail = stepped;
    }
}

/// A log being read.
struct Reading {
    reader: LogReader,
    query: LogsQuery,
    note: Option<String>,
    is_past: bool,
    _room: OwnedSemaphorePermit,
}

impl Reading {
    /// The next piece; an error is the last.
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        if let Some(note) = self.note.take() {
            return Some((Ok(note.into()), self));
        }
        while self.is_past || self.query.follow {
            let (lines, mut reading) = aside(move || Ok((self.read(), self))).await.ok()?;
            match lines {
                Ok(Some(lines)) => return Some((Ok(reading.text(lines)), reading)),
                Ok(None) if reading.is_past => reading.is_past = false,
                Ok(None) => tokio::time::sleep(FOLLOW_EVERY).await,
                Err(error) => {
                    (reading.is_past, reading.query.follow) = (false, false);
                    return Some((Err(error), reading));
                }
            }
            self = reading;
        }
        None
    }

    /// The next lines; none when there are no more for now.
    fn read(&mut self) -> io::Result<Option<Vec<LogLine>>> {
        if self.is_past {
            return self.reader.read_past(PIECE_BYTES_MAX);
        }
        let lines = self.reader.read(PIECE_BYTES_MAX)?;
        Ok((!lines.is_empty()).then_some(lines))
    }

    fn text(&self, lines: Vec<LogLine>) -> Bytes {
        let line = |line: LogLine| {
            let LogLine {
                instance,
                seen,
                text,
            } = line;
            match self.query.timestamps {
                true => format!("~{seen} {instance} {text}\n"),
                false => format!("{instance} {text}\n"),
            }
        };
        lines.into_iter().map(line).collect::<String>().into()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Folder {
        data: tempfile::TempDir,
        logs: FolderLogs,
    }

    impl Folder {
        /// With so many lines of an instance, in a part behind those that were dropped, and its log.
        fn new(lines: usize, readers: usize) -> Self {
            let data = tempfile::tempdir().unwrap();
            let folder = data.path().join("logs/iris/blue");
            fs::create_dir_all(&folder).unwrap();
            let text: String = (0..lines).map(|n| format!("line {n:06}\n")).collect();
            let (part, log) = text.split_at(text.len() / 24 * 12);
            fs::write(folder.join("a.log.000007"), part).unwrap();
            fs::write(folder.join("a.log"), log).unwrap();
            let logs = FolderLogs::new(data.path(), Arc::new(Semaphore::new(readers)));
            Self { data, logs }
        }

        async fn open(&self, query: LogsQuery) -> Result<NodeLines, LogsError> {
            self.logs.logs(&"iris/blue".parse().unwrap(), query).await
        }
    }

    /// Lines of the answer, and the bytes of its largest piece.
    async fn read(mut lines: NodeLines) -> (Vec<String>, usize) {
        let (mut text, mut largest) = (Vec::new(), 0);
        while let Some(piece) = lines.stream.next().await {
            let piece = piece.unwrap();
            largest = largest.max(piece.len());
            text.extend_from_slice(&piece);
        }
        let text = String::from_utf8(text).unwrap();
        (text.lines().map(str::to_owned).collect(), largest)
    }

    fn limit(limit: usize) -> LogsQuery {
        LogsQuery {
            limit: Some(limit),
            ..LogsQuery::default()
        }
    }

    #[tokio::test]
    async fn the_past_comes_in_small_pieces_and_is_as_long_as_was_said() {
        let folder = Folder::new(40_000, 1);
        for (query, expected) in [(LogsQuery::default(), 40_000), (limit(25_000), 25_000)] {
            let opened = folder.open(query).await.unwrap();
            assert_eq!(opened.past, expected);
            let (lines, largest) = read(opened).await;
            assert_eq!(lines.len(), expected);
            assert_eq!(lines[0], format!("a line {:06}", 40_000 - expected));
            assert_eq!(lines[expected - 1], "a line 039999");
            assert!(largest <= 2 * PIECE_BYTES_MAX, "{largest}");
        }
    }

    #[tokio::test]
    async fn lines_that_are_left_out_unasked_are_told() {
        let mut folder = Folder::new(LINES_MAX + 2, 1);
        let (lines, _) = read(folder.open(LogsQuery::default()).await.unwrap()).await;
        let note = "penstock: older lines are left out: an answer has at most 100000 of them";
        assert_eq!(lines[0], note);
        assert_eq!(lines[1], "a line 000002");
        assert_eq!(lines.len(), LINES_MAX + 1);
        folder.logs.past_bytes_max = 121;
        let (lines, _) = read(folder.open(limit(50)).await.unwrap()).await;
        let note = "penstock: older lines are left out: an answer has at most 121 bytes of them";
        assert_eq!(lines[0], note);
        assert_eq!(lines.len(), 11);
    }

    #[tokio::test]
    async fn a_reader_over_the_limit_is_refused_until_another_is_dropped() {
        let folder = Folder::new(40_000, 1);
        let mut first = folder.open(LogsQuery::default()).await.unwrap();
        first.stream.next().await.unwrap().unwrap();
        let refused = folder.open(limit(1)).await.err().unwrap();
        assert!(matches!(refused, LogsError::Busy(_)), "{refused}");
        drop(first);
        assert_eq!(folder.open(limit(1)).await.unwrap().past, 1);
    }

    #[tokio::test]
    async fn a_followed_log_goes_on_behind_the_last_lines() {
        let folder = Folder::new(40, 1);
        let query = LogsQuery {
            follow: true,
            ..limit(2)
        };
        let mut opened = folder.open(query).await.unwrap();
        let past = opened.stream.next().await.unwrap().unwrap();
        assert_eq!(past, "a line 000038\na line 000039\n");
        let log = folder.data.path().join("logs/iris/blue/a.log");
        let mut text = fs::read(&log).unwrap();
        text.extend_from_slice(b"more\n");
        fs::write(log, text).unwrap();
        let more = opened.stream.next().await.unwrap().unwrap();
        assert_eq!(more, "a more\n");
    }
}
