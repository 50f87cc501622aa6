//! Byte streams re-chunked at line ends, so that those of several nodes can be interleaved.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};

/// Maximum length of a line; longer ones are split.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Chunks that end with a line.
pub type LineStream = BoxStream<'static, io::Result<Bytes>>;

/// Limits a stream to this many bytes; a notice replaces the rest.
pub fn limit_bytes(lines: LineStream, bytes_max: usize) -> LineStream {
    let state = (lines, Some(bytes_max));
    stream::unfold(state, move |(mut lines, remaining)| async move {
        let remaining = remaining?;
        let chunk = match lines.next().await? {
            Ok(chunk) => chunk,
            Err(error) => return Some((Err(error), (lines, None))),
        };
        if let Some(remaining) = remaining.checked_sub(chunk.len()) {
            return Some((Ok(chunk), (lines, Some(remaining))));
        }
        let notice = format!(
            "penstock: the rest is omitted: a response has at most {bytes_max} bytes; request fewer lines, or one instance\n"
        );
        Some((Ok(notice.into()), (lines, None)))
    })
    .boxed()
}

struct LineChunks<S> {
    node: String,
    source: Pin<Box<S>>,
    buffer: BytesMut,
    idle_timeout: Option<Duration>,
    is_done: bool,
}

/// Re-chunks a node's stream so that each chunk ends with a line.
pub fn split_at_lines<S, E>(node: &str, source: S, idle_timeout: Option<Duration>) -> LineStream
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display + 'static,
{
    let state = LineChunks {
        node: node.to_owned(),
        source: Box::pin(source),
        buffer: BytesMut::new(),
        idle_timeout,
        is_done: false,
    };
    stream::unfold(state, LineChunks::next).boxed()
}

impl<S, E> LineChunks<S>
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display,
{
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        if self.is_done {
            return None;
        }
        loop {
            match self.chunk().await {
                Ok(Some(chunk)) => {
                    self.buffer.extend_from_slice(&chunk);
                    if let Some(lines) = self.lines() {
                        return Some((Ok(lines), self));
                    }
                }
                ended => {
                    self.is_done = true;
                    if !self.buffer.is_empty() {
                        self.buffer.extend_from_slice(b"\n");
                    }
                    if let Err(why) = ended {
                        let line = format!(
                            "penstock: the connection to node {} was lost: {why}\n",
                            self.node
                        );
                        self.buffer.extend_from_slice(line.as_bytes());
                    }
                    let rest = self.buffer.split().freeze();
                    return (!rest.is_empty()).then_some((Ok(rest), self));
                }
            }
        }
    }

    async fn chunk(&mut self) -> Result<Option<Bytes>, String> {
        let chunk = self.source.next();
        let chunk = match self.idle_timeout {
            None => chunk.await,
            Some(idle_timeout) => match tokio::time::timeout(idle_timeout, chunk).await {
                Ok(chunk) => chunk,
                Err(_) => return Err(format!("no data for {} s", idle_timeout.as_secs())),
            },
        };
        chunk.transpose().map_err(|error| error.to_string())
    }

    /// The buffered bytes up to the last line end.
    fn lines(&mut self) -> Option<Bytes> {
        let end = self.buffer.iter().rposition(|byte| *byte == b'\n');
        match end {
            Some(end) => Some(self.buffer.split_to(end + 1).freeze()),
            None if self.buffer.len() > LINE_BYTES_MAX => {
                let mut chunk = self.buffer.split();
                chunk.extend_from_slice(b"\n");
                Some(chunk.freeze())
            }
            None => None,
        }
    }
}
