//! Reads an answer from the bytes of a connection, whichever pieces they come in. It knows no
//! socket, so what it makes of some bytes can be tried on any of them.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, Method};

use super::head::{HEAD_BYTES_MAX, Head, Length, Malformed, Parsed, parse};
use crate::framing::Chunks;

#[derive(Debug)]
enum State {
    Head,
    Known(u64),
    Chunks(Chunks),
    UntilClose,
    Whole,
    /// What follows the last data cannot be read.
    Malformed,
}

#[derive(Debug)]
pub struct Reader {
    /// Of the request that is answered.
    method: Method,
    state: State,
    /// Read and not yet used.
    input: Bytes,
    /// How much of the input has been searched for a head.
    searched: usize,
    /// Bytes of interim answers.
    interim: usize,
    keeps_alive: bool,
}

impl Reader {
    pub fn new() -> Self {
        Self {
            method: Method::GET,
            state: State::Head,
            input: Bytes::new(),
            searched: 0,
            interim: 0,
            keeps_alive: false,
        }
    }

    /// The answer to a new request follows.
    pub fn begin(&mut self, method: &Method) {
        self.method.clone_from(method);
        self.state = State::Head;
        self.searched = 0;
        self.interim = 0;
        self.keeps_alive = false;
    }

    /// What the connection has brought.
    pub fn push(&mut self, bytes: Bytes) {
        if self.input.is_empty() {
            self.input = bytes;
            return;
        }
        let mut input = BytesMut::from(std::mem::take(&mut self.input));
        input.extend_from_slice(&bytes);
        self.input = input.freeze();
    }

    /// The head of the answer, once it is whole. Interim answers before it are skipped.
    pub fn head(&mut self, spare: &mut HeaderMap) -> Result<Option<Box<Head>>, Malformed> {
        loop {
            // A head that comes in small pieces is not read again for each of them.
            let new = &self.input[self.searched..];
            if new.is_empty() || (self.searched > 0 && !new.contains(&b'\n')) {
                return self.partial();
            }
            match parse(&self.input, &self.method, spare)? {
                Parsed::Partial => return self.partial(),
                Parsed::Interim(length) => {
                    self.input.advance(length);
                    self.interim += length;
                    self.searched = 0;
                }
                Parsed::Head(head, length) => {
                    self.input.advance(length);
                    if self.interim + length > HEAD_BYTES_MAX {
                        return Err(Malformed);
                    }
                    self.keeps_alive = head.keeps_alive;
                    self.state = match head.length {
                        Length::Known(0) => State::Whole,
                        Length::Known(length) => State::Known(length),
                        Length::Chunked => State::Chunks(Chunks::of_answer()),
                        Length::UntilClose => State::UntilClose,
                    };
                    return Ok(Some(head));
                }
            }
        }
    }

    fn partial(&mut self) -> Result<Option<Box<Head>>, Malformed> {
        self.searched = self.input.len();
        if self.interim + self.searched > HEAD_BYTES_MAX {
            return Err(Malformed);
        }
        Ok(None)
    }

    /// The next piece of the body, as far as it has come.
    pub fn data(&mut self) -> Result<Option<Bytes>, Malformed> {
        match &mut self.state {
            State::Head | State::Whole => Ok(None),
            State::Malformed => Err(Malformed),
            _ if self.input.is_empty() => Ok(None),
            State::UntilClose => Ok(Some(std::mem::take(&mut self.input))),
            State::Known(left) => {
                let taken = self
                    .input
                    .len()
                    .min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= taken as u64;
                if *left == 0 {
                    self.state = State::Whole;
                }
                Ok(Some(self.take(taken)))
            }
            State::Chunks(_) => self.chunk(),
        }
    }

    fn take(&mut self, count: usize) -> Bytes {
        if count == self.input.len() {
            return std::mem::take(&mut self.input);
        }
        self.input.split_to(count)
    }

    fn chunk(&mut self) -> Result<Option<Bytes>, Malformed> {
        self.skip();
        let State::Chunks(chunks) = &mut self.state else {
            return match self.state {
                State::Malformed => Err(Malformed),
                _ => Ok(None),
            };
        };
        let taken = chunks.pass(self.input.len());
        if taken == 0 {
            return Ok(None);
        }
        let data = self.take(taken);
        // So that the end is known together with the last piece where both came together.
        self.skip();
        Ok(Some(data))
    }

    /// Takes what stands between the data of chunks.
    fn skip(&mut self) {
        let State::Chunks(chunks) = &mut self.state else {
            return;
        };
        match chunks.skip(&self.input) {
            Ok((taken, done)) => {
                self.input.advance(taken);
                if done {
                    self.state = State::Whole;
                }
            }
            Err(_) => self.state = State::Malformed,
        }
    }

    /// The instance has closed: true where that is how the answer ends.
    pub fn end(&mut self) -> Result<bool, Malformed> {
        match self.state {
            State::UntilClose => self.state = State::Whole,
            // The last piece of a head that stays a part may not have been looked at.
            State::Head if !self.input.is_empty() => {
                parse(&self.input, &self.method, &mut HeaderMap::new())?;
            }
            _ => {}
        }
        Ok(self.is_whole())
    }

    pub fn is_whole(&self) -> bool {
        matches!(self.state, State::Whole)
    }

    /// Something of an answer has come, be it a part of a head.
    pub fn has_begun(&self) -> bool {
        !matches!(self.state, State::Head) || self.interim > 0 || !self.input.is_empty()
    }

    /// The rest of the body has come, and is one piece.
    pub fn is_at_hand(&self) -> bool {
        match self.state {
            State::Known(left) => self.input.len() as u64 >= left,
            State::Whole => true,
            _ => false,
        }
    }

    /// A next request may follow: the answer is whole and nothing came behind it.
    pub fn may_go_on(&self) -> bool {
        self.is_whole() && self.keeps_alive && self.input.is_empty()
    }

    /// How many bytes of data are still to come, where the instance has said so: of the body, or of
    /// its present chunk.
    pub fn announced(&self) -> u64 {
        match &self.state {
            State::Known(left) => *left,
            State::Chunks(chunks) => chunks.announced(),
            _ => 0,
        }
    }

    /// The exact length of what is left of the body, where it is known.
    pub fn exact_length(&self) -> Option<u64> {
        match &self.state {
            State::Known(left) => Some(*left),
            State::Whole => Some(0),
            _ => None,
        }
    }
}
