//! The strict rules of HTTP/1 framing for requests, as pure functions over bytes: where a head
//! ends, which heads are refused and why, how long the body is, where chunks end.

use std::io;
use std::mem::MaybeUninit;

use crate::config::{HEAD_BYTES_MAX, HEADERS_MAX};
use crate::hop_by_hop::tokens;

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadError {
    /// Not HTTP/1, or not strict enough.
    Malformed,
    /// Contradictory or repeated lengths.
    Framing,
    /// No `host` header, or several.
    Host,
    Method,
    /// Asks for another protocol, which its client depends on.
    Upgrade,
    /// More than `HEAD_BYTES_MAX` or `HEADERS_MAX`.
    TooLarge,
    /// Not received in time.
    Slow,
}

impl HeadError {
    const ALL: [Self; 7] = [
        Self::Malformed,
        Self::Framing,
        Self::Host,
        Self::Method,
        Self::Upgrade,
        Self::TooLarge,
        Self::Slow,
    ];

    /// The name used in the method that replaces the refused head.
    pub const fn token(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Framing => "framing",
            Self::Host => "host",
            Self::Method => "method",
            Self::Upgrade => "upgrade",
            Self::TooLarge => "too-large",
            Self::Slow => "slow",
        }
    }

    pub fn from_token(token: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|error| error.token() == token)
    }
}

/// Length of the body after a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    Known(u64),
    Chunked,
}

/// Empty lines that are ignored before a request, as some old clients send one after a body (RFC 9112, 2.2).
const EMPTY_LINES_MAX: u8 = 4;

/// Incremental search for the end of a head.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadScanner {
    /// Empty lines before the head.
    empty_lines: u8,
    searched: usize,
    line_start: usize,
    lines: usize,
}

impl HeadScanner {
    /// Returns how many of `bytes` are empty lines before the head, to be left out from now on.
    pub fn skip_empty_lines(&mut self, bytes: &[u8]) -> usize {
        let mut skipped = 0;
        while self.lines == 0
            && self.empty_lines < EMPTY_LINES_MAX
            && bytes[skipped..].starts_with(b"\r\n")
        {
            skipped += 2;
            self.empty_lines += 1;
            self.searched = 0;
        }
        skipped
    }

    /// Whether there were empty lines before the head.
    pub fn has_skipped_lines(&self) -> bool {
        self.empty_lines > 0
    }

    /// Returns the length of the head at the beginning of `bytes` once it is complete. Lines must
    /// end with CR LF.
    pub fn find_end(&mut self, bytes: &[u8]) -> Result<Option<usize>, HeadError> {
        while let Some(offset) = memchr::memchr(b'\n', &bytes[self.searched..]) {
            let end = self.searched + offset;
            if end == 0 || bytes[end - 1] != b'\r' {
                return Err(HeadError::Malformed);
            }
            let empty = end - 1 == self.line_start;
            self.searched = end + 1;
            self.line_start = end + 1;
            if empty && self.lines > 0 {
                let is_within_limits =
                    self.searched <= HEAD_BYTES_MAX && self.lines <= HEADERS_MAX + 1;
                return if is_within_limits {
                    Ok(Some(self.searched))
                } else {
                    Err(HeadError::TooLarge)
                };
            }
            // One more than are skipped.
            if empty {
                return Err(HeadError::Malformed);
            }
            self.lines += 1;
        }
        self.searched = bytes.len();
        let is_within_limits = bytes.len() <= HEAD_BYTES_MAX && self.lines <= HEADERS_MAX + 1;
        if is_within_limits {
            Ok(None)
        } else {
            Err(HeadError::TooLarge)
        }
    }
}

/// What a connection's heads had in common so far, which saves looking for it in each.
#[derive(Debug, Default)]
pub struct SeenHeads {
    /// The last path, which was valid.
    path: String,
    /// Whether any had the client's own id of the request.
    pub has_request_id: bool,
    /// Whether any named a deployment.
    pub names_deployment: bool,
}

/// Validates a complete head and returns the length of the body that follows.
pub fn check_head(head: &[u8], seen: &mut SeenHeads) -> Result<BodyLength, HeadError> {
    let mut headers = [const { MaybeUninit::<httparse::Header<'_>>::uninit() }; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut []);
    match request.parse_with_uninit_headers(head, &mut headers) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooLarge),
        _ => return Err(HeadError::Malformed),
    }
    let method = request.method.unwrap_or_default();
    // The gateway does not support tunnels.
    if method.starts_with('!') || method == "CONNECT" {
        return Err(HeadError::Method);
    }
    let path = request.path.unwrap_or_default();
    if path != seen.path {
        if !is_plain_path(path) && http::Uri::try_from(path).is_err() {
            return Err(HeadError::Malformed);
        }
        path.clone_into(&mut seen.path);
    }
    let mut hosts = 0;
    let mut length: Option<BodyLength> = None;
    for header in request.headers.iter() {
        let name = header.name.as_bytes();
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => hosts += 1,
            // The first letter rules out `content-type`.
            12 if matches!(name[0], b'x' | b'X') && name.eq_ignore_ascii_case(b"x-request-id") => {
                seen.has_request_id = true;
            }
            19 if name.eq_ignore_ascii_case(b"penstock-deployment") => seen.names_deployment = true,
            24 if name.eq_ignore_ascii_case(b"azureml-model-deployment") => {
                seen.names_deployment = true;
            }
            // Other protocols are offers (Java's client offers h2c), which a response may ignore.
            7 if name.eq_ignore_ascii_case(b"upgrade")
                && tokens(header.value).any(|token| token.eq_ignore_ascii_case(b"websocket")) =>
            {
                return Err(HeadError::Upgrade);
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                let bytes = content_length(header.value).ok_or(HeadError::Framing)?;
                if length.replace(BodyLength::Known(bytes)).is_some() {
                    return Err(HeadError::Framing);
                }
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                let chunked = header.value.eq_ignore_ascii_case(b"chunked");
                if !chunked || length.replace(BodyLength::Chunked).is_some() {
                    return Err(HeadError::Framing);
                }
            }
            _ => {}
        }
    }
    let is_http_1_0 = request.version == Some(0);
    let is_length_valid = match length {
        Some(BodyLength::Chunked) => !is_http_1_0,
        Some(BodyLength::Known(_)) => true,
        // A body that ends with the connection cannot be distinguished from one that was cut.
        None => !(is_http_1_0 && matches!(method, "POST" | "PUT" | "PATCH")),
    };
    if !is_length_valid {
        return Err(HeadError::Framing);
    }
    if hosts > 1 || (hosts == 0 && !is_http_1_0) {
        return Err(HeadError::Host);
    }
    Ok(length.unwrap_or(BodyLength::Known(0)))
}

/// The bytes of plain paths, as a table.
static IS_PLAIN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < table.len() {
        let b = byte as u8;
        table[byte] = b.is_ascii_alphanumeric()
            || matches!(b, b'/' | b'-' | b'_' | b'.' | b'?' | b'=' | b'&' | b'%');
        byte += 1;
    }
    table
};

/// Whether a path is certainly a valid URI for the HTTP server, without parsing it; most paths are.
fn is_plain_path(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|byte| IS_PLAIN[usize::from(byte)])
}

/// Digits only: no sign, list or spaces.
pub fn content_length(value: &[u8]) -> Option<u64> {
    // 18 digits fit in 63 bits, and nobody sends an exabyte.
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(
        value
            .iter()
            .fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')),
    )
}

/// Incremental parser of a chunked body.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChunkParser {
    /// Whether blanks may follow a size: some old servers pad the line with them.
    allows_padding: bool,
    state: ChunkState,
    /// Bytes left of the chunk; while its size is parsed, the size so far.
    remaining: u64,
    /// Length of the size line, or of all trailers.
    line: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ChunkState {
    #[default]
    Size,
    Padding,
    Extension,
    SizeEnd,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    TrailerName,
    Trailer,
    TrailerEnd,
    LastLf,
}

const CHUNK_LINE_MAX: usize = 256;
const TRAILERS_MAX: usize = 8 * 1024;

impl ChunkParser {
    /// For an instance's response: tolerates what is harmless there.
    pub fn for_response() -> Self {
        Self {
            allows_padding: true,
            ..Self::default()
        }
    }

    /// Returns how many of `bytes` belong to the body, and whether the body ends with them.
    pub fn consume(&mut self, bytes: &[u8]) -> io::Result<(usize, bool)> {
        let mut at = 0;
        loop {
            let (skipped, done) = self.skip_framing(&bytes[at..])?;
            at += skipped;
            let passed = self.take_data(bytes.len() - at);
            at += passed;
            if done || passed == 0 {
                return Ok((at, done));
            }
        }
    }

    /// Returns how many of `bytes` precede the next data, and whether the body ends with them.
    pub fn skip_framing(&mut self, bytes: &[u8]) -> io::Result<(usize, bool)> {
        for (at, byte) in bytes.iter().enumerate() {
            if self.state == ChunkState::Data {
                return Ok((at, false));
            }
            if self.step(*byte)? {
                return Ok((at + 1, true));
            }
        }
        Ok((bytes.len(), false))
    }

    /// Returns how many of the next `available` bytes are data.
    pub fn take_data(&mut self, available: usize) -> usize {
        let passed = self.data_remaining().min(available as u64);
        if passed > 0 {
            self.remaining -= passed;
            if self.remaining == 0 {
                self.state = ChunkState::DataCr;
            }
        }
        passed as usize
    }

    /// Bytes of data left in the current chunk.
    pub fn data_remaining(&self) -> u64 {
        if self.state == ChunkState::Data {
            self.remaining
        } else {
            0
        }
    }

    fn step(&mut self, byte: u8) -> io::Result<bool> {
        use ChunkState::{
            Data, DataCr, DataLf, Extension, LastLf, Padding, Size, SizeEnd, Trailer, TrailerEnd,
            TrailerName, TrailerStart,
        };
        self.line += 1;
        let (next, done) = match (self.state, byte) {
            (Size, b'\r') if self.line > 1 => (SizeEnd, false),
            (Size, b';') if self.line > 1 => (Extension, false),
            (Size, b' ' | b'\t') if self.line > 1 && self.allows_padding => (Padding, false),
            (Padding, b' ' | b'\t') if self.line <= CHUNK_LINE_MAX => (Padding, false),
            (Padding, b'\r') => (SizeEnd, false),
            (Padding, b';') => (Extension, false),
            (Size, digit) => {
                let digit = char::from(digit).to_digit(16).ok_or_else(malformed)?;
                if self.line > 15 {
                    return Err(malformed());
                }
                self.remaining = self.remaining * 16 + u64::from(digit);
                (Size, false)
            }
            (Extension, b'\r') => (SizeEnd, false),
            (Extension, b'\n') => return Err(malformed()),
            (Extension, _) if self.line <= CHUNK_LINE_MAX => (Extension, false),
            (SizeEnd, b'\n') => {
                self.line = 0;
                (
                    if self.remaining == 0 {
                        TrailerStart
                    } else {
                        Data
                    },
                    false,
                )
            }
            (DataCr, b'\r') => (DataLf, false),
            (DataLf, b'\n') => {
                self.line = 0;
                (Size, false)
            }
            (TrailerStart, b'\r') => (LastLf, false),
            (LastLf, b'\n') => (LastLf, true),
            (Trailer, b'\r') => (TrailerEnd, false),
            (TrailerEnd, b'\n') => (TrailerStart, false),
            (TrailerStart | TrailerName | Trailer, _) if self.line > TRAILERS_MAX => {
                return Err(malformed());
            }
            (TrailerStart | TrailerName, name) if is_token(name) => (TrailerName, false),
            (TrailerName, b':') => (Trailer, false),
            (Trailer, value) if value == b'\t' || (value >= b' ' && value != 127) => {
                (Trailer, false)
            }
            _ => return Err(malformed()),
        };
        self.state = next;
        Ok(done)
    }
}

/// Whether the byte may occur in a header name.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the chunked body is malformed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(head: &str) -> Result<BodyLength, HeadError> {
        let mut search = HeadScanner::default();
        let end = search.find_end(head.as_bytes())?.expect("a complete head");
        check_head(&head.as_bytes()[..end], &mut SeenHeads::default())
    }

    #[test]
    fn ambiguous_heads_are_refused() {
        let cases = [
            (
                "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
                HeadError::Framing,
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
                HeadError::Framing,
            ),
            (
                "Content-Length: 4\r\nContent-Length: 4\r\n",
                HeadError::Framing,
            ),
            (
                "Content-Length: 4\r\nContent-Length: 5\r\n",
                HeadError::Framing,
            ),
            ("Content-Length: 4, 4\r\n", HeadError::Framing),
            ("Content-Length: +4\r\n", HeadError::Framing),
            ("Content-Length:\r\n", HeadError::Framing),
            ("Content-Length: 0x4\r\n", HeadError::Framing),
            (
                "Content-Length: 99999999999999999999\r\n",
                HeadError::Framing,
            ),
            ("Transfer-Encoding: xchunked\r\n", HeadError::Framing),
            (
                "Transfer-Encoding: chunked, identity\r\n",
                HeadError::Framing,
            ),
            (
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                HeadError::Framing,
            ),
            ("Content-Length : 4\r\n", HeadError::Malformed),
            ("X: a\r\n b\r\n", HeadError::Malformed),
            ("X: a\0b\r\n", HeadError::Malformed),
            ("X: a\rb\r\n", HeadError::Malformed),
            ("X: a\n", HeadError::Malformed),
            ("Host: b\r\n", HeadError::Host),
        ];
        for (headers, expected) in cases {
            let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{headers}\r\n");
            assert_eq!(check(&head), Err(expected), "{headers:?}");
        }
    }

    #[test]
    fn request_lines_that_are_not_http_are_refused() {
        let cases = [
            ("POST / HTTP/1.1\r\n\r\n", HeadError::Host),
            (
                "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
                HeadError::Framing,
            ),
            (
                "POST /a b HTTP/1.1\r\nHost: a\r\n\r\n",
                HeadError::Malformed,
            ),
            ("!slow / HTTP/1.1\r\nHost: a\r\n\r\n", HeadError::Method),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", HeadError::Method),
            (
                "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
                HeadError::Malformed,
            ),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HeadError::Malformed),
            ("GET /\r\n\r\n", HeadError::Malformed),
            ("GET /a<b HTTP/1.1\r\nHost: a\r\n\r\n", HeadError::Malformed),
            ("POST / HTTP/1.0\r\n\r\n", HeadError::Framing),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: x, WebSocket\r\n\r\n",
                HeadError::Upgrade,
            ),
        ];
        for (head, expected) in cases {
            assert_eq!(check(head), Err(expected), "{head:?}");
        }
        for head in [
            "GET / HTTP/1.0\r\n\r\n",
            "GET /a~b?[c] HTTP/1.0\r\n\r\n",
            "GET / HTTP/1.0\r\nUpgrade: h2c\r\n\r\n",
        ] {
            assert_eq!(check(head), Ok(BodyLength::Known(0)), "{head:?}");
        }
    }

    #[test]
    fn the_length_of_the_body_is_known_from_the_head() {
        let with = |header: &str| check(&format!("POST / HTTP/1.1\r\nHost: a\r\n{header}\r\n"));
        assert_eq!(with(""), Ok(BodyLength::Known(0)));
        assert_eq!(
            with("content-LENGTH: 1024\r\n"),
            Ok(BodyLength::Known(1024))
        );
        assert_eq!(
            with("Transfer-Encoding: Chunked\r\n"),
            Ok(BodyLength::Chunked)
        );
    }

    #[test]
    fn a_head_has_at_most_32_kib_and_100_headers() {
        let headers = |count: usize, size: usize| {
            let line = format!("X: {}\r\n", "y".repeat(size));
            check(&format!(
                "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
                line.repeat(count)
            ))
        };
        assert!(headers(99, 10).is_ok());
        assert_eq!(headers(100, 10), Err(HeadError::TooLarge));
        assert!(headers(1, 32_000).is_ok());
        assert_eq!(headers(1, 33_000), Err(HeadError::TooLarge));
        // Refused before it is complete.
        let endless = vec![b'x'; 40_000];
        assert_eq!(
            HeadScanner::default().find_end(&endless),
            Err(HeadError::TooLarge)
        );
    }

    #[test]
    fn a_head_received_byte_by_byte_ends_where_it_would_in_one_piece() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET";
        let mut search = HeadScanner::default();
        let ends: Vec<_> = (1..=head.len())
            .filter_map(|length| search.find_end(&head[..length]).unwrap())
            .take(1)
            .collect();
        assert_eq!(ends, [head.len() - 3]);
    }

    #[test]
    fn only_a_few_empty_lines_are_skipped_however_they_are_split() {
        let mut search = HeadScanner::default();
        assert_eq!(search.skip_empty_lines(b"\r"), 0);
        assert_eq!(search.find_end(b"\r"), Ok(None));
        assert_eq!(search.skip_empty_lines(b"\r\n\r\nGET"), 4);
        assert_eq!(search.skip_empty_lines(b"\r\n\r\n\r\n"), 4);
        assert_eq!(search.find_end(b"\r\n"), Err(HeadError::Malformed));
    }

    #[test]
    fn chunked_bodies_end_at_the_same_byte_however_they_are_split() {
        let body = b"4\r\nabcd\r\nA;x=y\r\n0123456789\r\n0\r\nT: 1\r\n\r\n";
        for step in 1..=body.len() {
            let mut chunks = ChunkParser::default();
            let mut at = 0;
            let mut done = false;
            for piece in body.chunks(step) {
                let (taken, end) = chunks.consume(piece).unwrap();
                at += taken;
                done = end;
            }
            assert!(done && at == body.len(), "{step}");
        }
        let (taken, done) = ChunkParser::default().consume(b"0\r\n\r\nGET /").unwrap();
        assert!(done && taken == 5);
    }

    #[test]
    fn malformed_chunks_are_refused() {
        for body in [
            "0x1\r\na\r\n",
            "\r\n",
            "1\na\n",
            "1\r\nab\r\n",
            "ffffffffffffffff\r\n",
            "-1\r\n",
            "1 \r\na",
            "0\r\nT: 1\n\n",
            "0\r\nT\r\n\r\n",
            "0\r\n: 1\r\n\r\n",
            "0\r\nT: \0\r\n\r\n",
        ] {
            assert!(
                ChunkParser::default().consume(body.as_bytes()).is_err(),
                "{body:?}"
            );
        }
    }
}
