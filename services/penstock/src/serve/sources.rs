//! What control shows and other services own: logs of instances, and measurements of the past.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backends::logs::{LogLine, LogReader};
use bytes::Bytes;
use contract::ids::DeploymentRef;
use control::{HistoryQuery, HistorySource, LogQuery, LogSource, SourceError};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use meter::{History, Query};

/// How often a followed log is looked at again.
const FOLLOW_EVERY: Duration = Duration::from_millis(250);
const CHUNK_BYTES_MAX: usize = 64 * 1024;
/// Most lines of the past that are shown where no number was asked for.
const LINES_MAX: usize = 100_000;

/// Logs as the process backend keeps them in the data folder.
pub struct FolderLogs {
    data: PathBuf,
}

impl FolderLogs {
    pub fn new(data: &Path) -> Self {
        Self {
            data: data.to_owned(),
        }
    }
}

/// A log being read: the past first, then what comes.
struct Reading {
    reader: LogReader,
    query: LogQuery,
    past_done: bool,
}

#[async_trait::async_trait]
impl LogSource for FolderLogs {
    async fn logs(
        &self,
        of: &DeploymentRef,
        query: LogQuery,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, SourceError> {
        let reader = backends::logs::logs(&self.data, of, query.since);
        let reading = Reading {
            reader,
            query,
            past_done: false,
        };
        Ok(stream::unfold(reading, Reading::next).boxed())
    }
}

impl Reading {
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        if !self.past_done {
            self.past_done = true;
            let past = self.past();
            return Some((past, self));
        }
        while self.query.follow {
            match self.read() {
                Ok(None) => tokio::time::sleep(FOLLOW_EVERY).await,
                Ok(Some(lines)) => return Some((Ok(self.text(lines)), self)),
                Err(error) => return Some((Err(error), self)),
            }
        }
        None
    }

    /// The last lines of what there is.
    fn past(&mut self) -> io::Result<Bytes> {
        let most = self.query.lines.unwrap_or(LINES_MAX).min(LINES_MAX);
        let mut last = VecDeque::new();
        while let Some(lines) = self.read()? {
            last.extend(lines);
            let surplus = last.len().saturating_sub(most);
            last.drain(..surplus);
        }
        Ok(self.text(last))
    }

    fn text(&self, lines: impl IntoIterator<Item = LogLine>) -> Bytes {
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

    /// The next lines that were asked for; none when all that is there has been read.
    fn read(&mut self) -> io::Result<Option<Vec<LogLine>>> {
        // Files of the data folder: short reads, and yet no place for them among the tasks.
        let mut lines = tokio::task::block_in_place(|| self.reader.read(CHUNK_BYTES_MAX))?;
        if lines.is_empty() {
            return Ok(None);
        }
        if let Some(wanted) = &self.query.instance {
            lines.retain(|line| line.instance == *wanted);
        }
        Ok(Some(lines))
    }
}

/// Measurements as the meter keeps them.
pub struct MeterHistory {
    history: History,
}

impl MeterHistory {
    pub fn new(history: History) -> Self {
        Self { history }
    }
}

#[async_trait::async_trait]
impl HistorySource for MeterHistory {
    async fn history(&self, query: HistoryQuery) -> Result<Vec<serde_json::Value>, SourceError> {
        let query = Query {
            endpoint: query.endpoint,
            deployment: query.deployment,
            from: query.from,
            to: query.to,
            step: query.step,
        };
        let failed = |error: String| SourceError::Failed(error);
        let points = self
            .history
            .points(&query)
            .await
            .map_err(|error| failed(error.to_string()))?;
        points
            .iter()
            .map(serde_json::to_value)
            .collect::<Result<_, _>>()
            .map_err(|error| failed(error.to_string()))
    }
}
