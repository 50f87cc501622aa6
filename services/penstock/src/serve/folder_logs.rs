//! Logs as the process backend keeps them in the data folder: existing lines first, then new ones.
//!
//! Invariant: files are read in chunks of bounded size on blocking threads; a reader can be dropped
//! between two chunks. All readers share one limit, whichever listener they came through.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actuator::logs::{LogsError, LogsQuery, NodeLines, NodeLogs};
use backends::logs::{LogLine, OutputReader, TailLimits, TailSearch};
use bytes::Bytes;
use contract::ids::DeploymentRef;
use futures::StreamExt;
use futures::stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Maximum number of concurrent log readers; more are refused. Each holds a few chunks in memory and
/// competes with instances for the disk.
pub const READERS_MAX: usize = 128;
/// How often a followed log is polled.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);
/// Maximum number of concurrent chunk reads, of all readers together.
const CONCURRENT_READS_MAX: usize = 8;
/// Maximum size of a chunk.
const CHUNK_BYTES_MAX: usize = 64 * 1024;
/// Maximum number of existing lines returned, and the default.
const LINES_MAX: usize = 100_000;
/// Maximum size of existing lines in one response.
const BACKLOG_BYTES_MAX: u64 = 32 << 20;

pub struct FolderLogs {
    data: PathBuf,
    permits: Arc<Semaphore>,
    backlog_bytes_max: u64,
}

impl FolderLogs {
    /// Logs in a data folder; `permits` is shared by all readers of this process.
    pub fn new(data: &Path, permits: Arc<Semaphore>) -> Self {
        Self {
            data: data.to_owned(),
            permits,
            backlog_bytes_max: BACKLOG_BYTES_MAX,
        }
    }

    /// A notice for the top of the response if existing lines are cut without the client having asked.
    fn cut_notice(&self, tail: &TailSearch, query: &LogsQuery) -> Option<String> {
        let most = match (tail.is_cut_by_size(), query.limit) {
            (true, _) => format!("{} bytes of them", self.backlog_bytes_max),
            (false, None) => format!("{LINES_MAX} of them"),
            (false, Some(_)) => return None,
        };
        let cut_notice =
            format!("penstock: older lines are omitted: a response has at most {most}\n");
        tail.has_earlier_lines().then_some(cut_notice)
    }
}

#[async_trait::async_trait]
impl NodeLogs for FolderLogs {
    async fn logs(&self, of: &DeploymentRef, query: LogsQuery) -> Result<NodeLines, LogsError> {
        let permit = self.permits.clone().try_acquire_owned().map_err(|_| {
            LogsError::Busy(
                "this node has too many log readers; close one, or try again later".to_owned(),
            )
        })?;
        let most = TailLimits {
            lines: query.limit.unwrap_or(LINES_MAX).min(LINES_MAX),
            bytes: self.backlog_bytes_max,
        };
        let reader = backends::logs::logs(&self.data, of, query.since, query.instance.clone());
        let failed = |error: io::Error| LogsError::Failed(error.to_string());
        let (mut reader, tail) = find_tail(reader, most).await.map_err(failed)?;
        let (existing_lines, cut_notice) = (tail.lines(), self.cut_notice(&tail, &query));
        reader.start_at(tail);
        let state = LogStream {
            reader,
            query,
            cut_notice,
            is_in_backlog: true,
            _permit: permit,
        };
        Ok(NodeLines {
            existing_lines,
            stream: stream::unfold(state, LogStream::next).boxed(),
        })
    }
}

/// Runs file I/O on a blocking thread. A few concurrent chunks keep a disk busy; more would only cost
/// threads, and memory for data waiting to be sent.
async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    static READS: Semaphore = Semaphore::const_new(CONCURRENT_READS_MAX);
    let _permit = READS.acquire().await.map_err(io::Error::other)?;
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(io::Error::other)?
}

/// Finds the tail block by block, so that the search ends when the client disconnects.
async fn find_tail(
    reader: OutputReader,
    most: TailLimits,
) -> io::Result<(OutputReader, TailSearch)> {
    let open_tail = move || {
        let tail = reader.tail(most)?;
        Ok((reader, tail))
    };
    let (reader, mut tail) = run_blocking(open_tail).await?;
    loop {
        let step = move || {
            let more = tail.step()?;
            Ok((tail, more))
        };
        let (stepped, more) = run_blocking(step).await?;
        if !more {
            return Ok((reader, stepped));
        }
        tail = stepped;
    }
}

/// The state of a log stream.
struct LogStream {
    reader: OutputReader,
    query: LogsQuery,
    cut_notice: Option<String>,
    is_in_backlog: bool,
    _permit: OwnedSemaphorePermit,
}

impl LogStream {
    /// The next chunk; an error ends the stream.
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        if let Some(cut_notice) = self.cut_notice.take() {
            return Some((Ok(cut_notice.into()), self));
        }
        while self.is_in_backlog || self.query.follow {
            let (lines, mut state) = run_blocking(move || Ok((self.read(), self))).await.ok()?;
            match lines {
                Ok(Some(lines)) => return Some((Ok(state.text(lines)), state)),
                Ok(None) if state.is_in_backlog => state.is_in_backlog = false,
                Ok(None) => tokio::time::sleep(FOLLOW_INTERVAL).await,
                Err(error) => {
                    (state.is_in_backlog, state.query.follow) = (false, false);
                    return Some((Err(error), state));
                }
            }
            self = state;
        }
        None
    }

    /// The next lines; `None` if there are none for now.
    fn read(&mut self) -> io::Result<Option<Vec<LogLine>>> {
        if self.is_in_backlog {
            return self.reader.read_backlog(CHUNK_BYTES_MAX);
        }
        let lines = self.reader.read(CHUNK_BYTES_MAX)?;
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
        /// A folder with this many lines of one instance, split between a rotated part and the current log.
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

    /// The lines of the response, and the size of its largest chunk.
    async fn read(mut lines: NodeLines) -> (Vec<String>, usize) {
        let (mut text, mut largest) = (Vec::new(), 0);
        while let Some(chunk) = lines.stream.next().await {
            let chunk = chunk.unwrap();
            largest = largest.max(chunk.len());
            text.extend_from_slice(&chunk);
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
    async fn existing_lines_come_in_small_chunks_and_match_the_announced_count() {
        let folder = Folder::new(40_000, 1);
        for (query, expected) in [(LogsQuery::default(), 40_000), (limit(25_000), 25_000)] {
            let opened = folder.open(query).await.unwrap();
            assert_eq!(opened.existing_lines, expected);
            let (lines, largest) = read(opened).await;
            assert_eq!(lines.len(), expected);
            assert_eq!(lines[0], format!("a line {:06}", 40_000 - expected));
            assert_eq!(lines[expected - 1], "a line 039999");
            assert!(largest <= 2 * CHUNK_BYTES_MAX, "{largest}");
        }
    }

    #[tokio::test]
    async fn lines_omitted_without_a_limit_are_reported() {
        let mut folder = Folder::new(LINES_MAX + 2, 1);
        let (lines, _) = read(folder.open(LogsQuery::default()).await.unwrap()).await;
        let cut_notice = "penstock: older lines are omitted: a response has at most 100000 of them";
        assert_eq!(lines[0], cut_notice);
        assert_eq!(lines[1], "a line 000002");
        assert_eq!(lines.len(), LINES_MAX + 1);
        folder.logs.backlog_bytes_max = 121;
        let (lines, _) = read(folder.open(limit(50)).await.unwrap()).await;
        let cut_notice =
            "penstock: older lines are omitted: a response has at most 121 bytes of them";
        assert_eq!(lines[0], cut_notice);
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
        assert_eq!(folder.open(limit(1)).await.unwrap().existing_lines, 1);
    }

    #[tokio::test]
    async fn a_followed_log_continues_after_the_last_lines() {
        let folder = Folder::new(40, 1);
        let query = LogsQuery {
            follow: true,
            ..limit(2)
        };
        let mut opened = folder.open(query).await.unwrap();
        let existing_lines = opened.stream.next().await.unwrap().unwrap();
        assert_eq!(existing_lines, "a line 000038\na line 000039\n");
        let log = folder.data.path().join("logs/iris/blue/a.log");
        let mut text = fs::read(&log).unwrap();
        text.extend_from_slice(b"more\n");
        fs::write(log, text).unwrap();
        let more = opened.stream.next().await.unwrap().unwrap();
        assert_eq!(more, "a more\n");
    }
}
