//! Reads a response from the bytes of a connection, however they are split. It is independent of
//! sockets, so it can be tested on any bytes.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, Method};

use super::head::{
    MalformedResponse, ParsedHead, RESPONSE_HEAD_BYTES_MAX, ResponseHead, ResponseLength, parse,
};
use crate::framing::ChunkParser;

#[derive(Debug)]
enum ReaderState {
    Head,
    Known(u64),
    Chunks(ChunkParser),
    UntilClose,
    Complete,
    /// What follows the last data is malformed.
    Malformed,
}

#[derive(Debug)]
pub struct ResponseReader {
    /// Method of the request.
    method: Method,
    state: ReaderState,
    /// Received and not yet consumed.
    input: Bytes,
    /// How much of the input has been searched for a head.
    searched: usize,
    /// Bytes of interim responses.
    interim: usize,
    is_keep_alive: bool,
}

impl ResponseReader {
    pub fn new() -> Self {
        Self {
            method: Method::GET,
            state: ReaderState::Head,
            input: Bytes::new(),
            searched: 0,
            interim: 0,
            is_keep_alive: false,
        }
    }

    /// Resets for the response to a new request.
    pub fn begin(&mut self, method: &Method) {
        self.method.clone_from(method);
        self.state = ReaderState::Head;
        self.searched = 0;
        self.interim = 0;
        self.is_keep_alive = false;
    }

    /// Adds bytes received on the connection.
    pub fn push(&mut self, bytes: Bytes) {
        if self.input.is_empty() {
            self.input = bytes;
            return;
        }
        let mut input = BytesMut::from(std::mem::take(&mut self.input));
        input.extend_from_slice(&bytes);
        self.input = input.freeze();
    }

    /// Returns the response head once it is complete. Interim responses before it are skipped.
    pub fn head(
        &mut self,
        spare: &mut HeaderMap,
    ) -> Result<Option<Box<ResponseHead>>, MalformedResponse> {
        loop {
            // A head that arrives in small pieces is not reparsed for each of them.
            let new = &self.input[self.searched..];
            if new.is_empty() || (self.searched > 0 && !new.contains(&b'\n')) {
                return self.partial();
            }
            match parse(&self.input, &self.method, spare)? {
                ParsedHead::Partial => return self.partial(),
                ParsedHead::Interim(length) => {
                    self.input.advance(length);
                    self.interim += length;
                    self.searched = 0;
                }
                ParsedHead::Final(head, length) => {
                    self.input.advance(length);
                    if self.interim + length > RESPONSE_HEAD_BYTES_MAX {
                        return Err(MalformedResponse);
                    }
                    self.is_keep_alive = head.is_keep_alive;
                    self.state = match head.length {
                        ResponseLength::Known(0) => ReaderState::Complete,
                        ResponseLength::Known(length) => ReaderState::Known(length),
                        ResponseLength::Chunked => ReaderState::Chunks(ChunkParser::for_response()),
                        ResponseLength::UntilClose => ReaderState::UntilClose,
                    };
                    return Ok(Some(head));
                }
            }
        }
    }

    fn partial(&mut self) -> Result<Option<Box<ResponseHead>>, MalformedResponse> {
        self.searched = self.input.len();
        if self.interim + self.searched > RESPONSE_HEAD_BYTES_MAX {
            return Err(MalformedResponse);
        }
        Ok(None)
    }

    /// Returns the next piece of the body that has arrived.
    pub fn data(&mut self) -> Result<Option<Bytes>, MalformedResponse> {
        match &mut self.state {
            ReaderState::Head | ReaderState::Complete => Ok(None),
            ReaderState::Malformed => Err(MalformedResponse),
            _ if self.input.is_empty() => Ok(None),
            ReaderState::UntilClose => Ok(Some(std::mem::take(&mut self.input))),
            ReaderState::Known(remaining) => {
                let taken = self
                    .input
                    .len()
                    .min(usize::try_from(*remaining).unwrap_or(usize::MAX));
                *remaining -= taken as u64;
                if *remaining == 0 {
                    self.state = ReaderState::Complete;
                }
                Ok(Some(self.take(taken)))
            }
            ReaderState::Chunks(_) => self.chunk(),
        }
    }

    fn take(&mut self, count: usize) -> Bytes {
        if count == self.input.len() {
            return std::mem::take(&mut self.input);
        }
        self.input.split_to(count)
    }

    fn chunk(&mut self) -> Result<Option<Bytes>, MalformedResponse> {
        self.skip_chunk_framing();
        let ReaderState::Chunks(chunks) = &mut self.state else {
            return match self.state {
                ReaderState::Malformed => Err(MalformedResponse),
                _ => Ok(None),
            };
        };
        let taken = chunks.take_data(self.input.len());
        if taken == 0 {
            return Ok(None);
        }
        let data = self.take(taken);
        // So that the end is known together with the last piece if both arrived together.
        self.skip_chunk_framing();
        Ok(Some(data))
    }

    /// Consumes the framing between the data of chunks.
    fn skip_chunk_framing(&mut self) {
        let ReaderState::Chunks(chunks) = &mut self.state else {
            return;
        };
        match chunks.skip_framing(&self.input) {
            Ok((taken, done)) => {
                self.input.advance(taken);
                if done {
                    self.state = ReaderState::Complete;
                }
            }
            Err(_) => self.state = ReaderState::Malformed,
        }
    }

    /// Called when the instance has closed; returns true if that is how the response ends.
    pub fn on_close(&mut self) -> Result<bool, MalformedResponse> {
        match self.state {
            ReaderState::UntilClose => self.state = ReaderState::Complete,
            // The last piece of an incomplete head may not have been parsed.
            ReaderState::Head if !self.input.is_empty() => {
                parse(&self.input, &self.method, &mut HeaderMap::new())?;
            }
            _ => {}
        }
        Ok(self.is_complete())
    }

    pub fn is_complete(&self) -> bool {
        matches!(self.state, ReaderState::Complete)
    }

    /// Whether any part of a response has arrived, even part of a head.
    pub fn has_begun(&self) -> bool {
        !matches!(self.state, ReaderState::Head) || self.interim > 0 || !self.input.is_empty()
    }

    /// Bytes that have arrived and were not taken.
    pub fn unread_bytes(&self) -> usize {
        self.input.len()
    }

    /// Whether the rest of the body has arrived, in one piece.
    pub fn is_buffered(&self) -> bool {
        match self.state {
            ReaderState::Known(remaining) => self.input.len() as u64 >= remaining,
            ReaderState::Complete => true,
            _ => false,
        }
    }

    /// Whether the connection can be reused: the response is complete and nothing followed it.
    pub fn is_reusable(&self) -> bool {
        self.is_complete() && self.is_keep_alive && self.input.is_empty()
    }

    /// Bytes of data left, as far as the instance has announced: of the body, or of the current
    /// chunk.
    pub fn known_remaining(&self) -> u64 {
        match &self.state {
            ReaderState::Known(remaining) => *remaining,
            ReaderState::Chunks(chunks) => chunks.data_remaining(),
            _ => 0,
        }
    }

    /// The exact remaining length of the body, if known.
    pub fn exact_length(&self) -> Option<u64> {
        match &self.state {
            ReaderState::Known(remaining) => Some(*remaining),
            ReaderState::Complete => Some(0),
            _ => None,
        }
    }
}
