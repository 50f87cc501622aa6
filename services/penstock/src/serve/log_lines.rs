//! Text in pieces that end with a line, so that those of several nodes can be mixed.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};

/// A line that is longer is passed on in pieces.
const LINE_BYTES_MAX: usize = 1 << 20;

pub type Lines = BoxStream<'static, io::Result<Bytes>>;

/// No more than so many bytes, and a line that says so where there were more.
pub fn bounded(lines: Lines, bytes_max: usize) -> Lines {
    let state = (lines, Some(bytes_max));
    stream::unfold(state, move |(mut lines, left)| async move {
        let left = left?;
        let piece = match lines.next().await? {
            Ok(piece) => piece,
            Err(error) => return Some((Err(error), (lines, None))),
        };
        if let Some(left) = left.checked_sub(piece.len()) {
            return Some((Ok(piece), (lines, Some(left))));
        }
        let note = format!(
            "penstock: what follows is left out: an answer has at most {bytes_max} bytes; ask for fewer lines, or for one instance\n"
        );
        Some((Ok(note.into()), (lines, None)))
    })
    .boxed()
}

struct Reading<S> {
    node: String,
    source: Pin<Box<S>>,
    buffer: BytesMut,
    patience: Option<Duration>,
    over: bool,
}

/// Pieces that end with a line, so that those of several nodes can be mixed.
pub fn whole_lines<S, E>(node: &str, source: S, patience: Option<Duration>) -> Lines
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display + 'static,
{
    let reading = Reading {
        node: node.to_owned(),
        source: Box::pin(source),
        buffer: BytesMut::new(),
        patience,
        over: false,
    };
    stream::unfold(reading, Reading::next).boxed()
}

impl<S, E> Reading<S>
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display,
{
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        if self.over {
            return None;
        }
        loop {
            match self.piece().await {
                Ok(Some(piece)) => {
                    self.buffer.extend_from_slice(&piece);
                    if let Some(lines) = self.lines() {
                        return Some((Ok(lines), self));
                    }
                }
                ended => {
                    self.over = true;
                    if !self.buffer.is_empty() {
                        self.buffer.extend_from_slice(b"\n");
                    }
                    if let Err(why) = ended {
                        let line = format!("penstock: node {} broke off: {why}\n", self.node);
                        self.buffer.extend_from_slice(line.as_bytes());
                    }
                    let rest = self.buffer.split().freeze();
                    return (!rest.is_empty()).then_some((Ok(rest), self));
                }
            }
        }
    }

    async fn piece(&mut self) -> Result<Option<Bytes>, String> {
        let piece = self.source.next();
        let piece = match self.patience {
            None => piece.await,
            Some(patience) => match tokio::time::timeout(patience, piece).await {
                Ok(piece) => piece,
                Err(_) => return Err(format!("nothing for {} s", patience.as_secs())),
            },
        };
        piece.transpose().map_err(|error| error.to_string())
    }

    /// What there is up to the end of a line.
    fn lines(&mut self) -> Option<Bytes> {
        let end = self.buffer.iter().rposition(|byte| *byte == b'\n');
        match end {
            Some(end) => Some(self.buffer.split_to(end + 1).freeze()),
            None if self.buffer.len() > LINE_BYTES_MAX => {
                let mut piece = self.buffer.split();
                piece.extend_from_slice(b"\n");
                Some(piece.freeze())
            }
            None => None,
        }
    }
}
