//! Parsing of valid and invalid responses: from tables, split at random, and compared with hyper.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::body::ResponseReader;
use super::head::{RESPONSE_HEAD_BYTES_MAX, ResponseLength, UpstreamRequest};
use crate::forwarded::{Origin, Peer};

/// How a response ends for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResponseEnd {
    /// Complete, and the connection can be reused.
    Reusable,
    Complete,
    /// The instance closed the connection early.
    ClosedEarly,
    Malformed,
}

/// A response as far as it could be read.
#[derive(Debug, PartialEq, Eq)]
struct ReadResponse {
    status: u16,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    end: ResponseEnd,
}

fn headers_of(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let pairs = headers.iter();
    pairs
        .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()))
        .collect()
}

/// Reads the pieces that a connection delivers before it closes.
fn read<'a>(method: &Method, pieces: impl Iterator<Item = &'a [u8]>) -> ReadResponse {
    let mut reader = ResponseReader::new();
    reader.begin(method);
    let mut response = ReadResponse {
        status: 0,
        headers: Vec::new(),
        body: Vec::new(),
        end: ResponseEnd::ClosedEarly,
    };
    let mut has_head = false;
    let mut step = |reader: &mut ResponseReader, response: &mut ReadResponse| {
        if !has_head {
            let Some(head) = reader.head(&mut HeaderMap::new())? else {
                return Ok(());
            };
            has_head = true;
            response.status = head.status.as_u16();
            response.headers = headers_of(&head.headers);
        }
        while let Some(data) = reader.data()? {
            assert!(!data.is_empty());
            response.body.extend_from_slice(&data);
        }
        Ok::<_, super::head::MalformedResponse>(())
    };
    for piece in pieces {
        reader.push(Bytes::copy_from_slice(piece));
        if step(&mut reader, &mut response).is_err() {
            response.end = ResponseEnd::Malformed;
            return response;
        }
    }
    let reusable = reader.is_reusable();
    response.end = match (reusable, reader.on_close()) {
        (true, _) => ResponseEnd::Reusable,
        (false, Ok(true)) => ResponseEnd::Complete,
        (false, Ok(false)) => ResponseEnd::ClosedEarly,
        (false, Err(_)) => ResponseEnd::Malformed,
    };
    response
}

fn read_all(method: &Method, text: &str) -> ReadResponse {
    read(method, std::iter::once(text.as_bytes()))
}

fn read_post(text: &str) -> (u16, String, ResponseEnd) {
    let response = read_all(&Method::POST, text);
    let body = String::from_utf8(response.body).unwrap();
    (response.status, body, response.end)
}

#[test]
fn valid_responses_end_where_they_say() {
    let cases = [
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            200,
            "",
            ResponseEnd::Reusable,
        ),
        (
            "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            200,
            "ok",
            ResponseEnd::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;a=b\r\no\r\n001  \r\nk\r\n0\r\nt: 1\r\nu: 2\r\n\r\n",
            200,
            "ok",
            ResponseEnd::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Complete,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: x, Close\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Complete,
        ),
        (
            "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Complete,
        ),
        (
            "HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Reusable,
        ),
        // Ended by the close.
        (
            "HTTP/1.1 200 OK\r\n\r\nall of it",
            200,
            "all of it",
            ResponseEnd::Complete,
        ),
        ("HTTP/1.0 200 OK\r\n\r\n", 200, "", ResponseEnd::Complete),
        // Without a body, whatever the headers say.
        (
            "HTTP/1.1 204 No Content\r\n\r\n",
            204,
            "",
            ResponseEnd::Reusable,
        ),
        (
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n",
            304,
            "",
            ResponseEnd::Reusable,
        ),
        // Interim responses are skipped.
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            200,
            "ok",
            ResponseEnd::Reusable,
        ),
        // Unrequested data is not forwarded, and ends the connection.
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n",
            200,
            "ok",
            ResponseEnd::Complete,
        ),
        (
            "HTTP/1.1 204 No Content\r\n\r\nx",
            204,
            "",
            ResponseEnd::Complete,
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nx",
            200,
            "ok",
            ResponseEnd::Complete,
        ),
    ];
    for (text, status, body, end) in cases {
        assert_eq!(read_post(text), (status, body.to_owned(), end), "{text:?}");
    }
    let head = read_all(
        &Method::HEAD,
        "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n",
    );
    assert_eq!((head.body.len(), head.end), (0, ResponseEnd::Reusable));
    assert_eq!(head.headers, [("content-length".to_owned(), b"7".to_vec())]);
}

#[test]
fn ambiguous_or_invalid_responses_are_refused() {
    let headers = [
        "content-length: 2\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 2\r\n",
        "content-length: 2\r\ncontent-length: 3\r\n",
        "content-length: 2, 3\r\n",
        "content-length: +2\r\n",
        "content-length: -2\r\n",
        "content-length: 0x2\r\n",
        "content-length: 2 2\r\n",
        "content-length:\r\n",
        "content-length: 2,\r\n",
        "content-length: 99999999999999999999\r\n",
        "transfer-encoding: gzip, chunked\r\n",
        "transfer-encoding: chunked, chunked\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: identity\r\n",
        "transfer-encoding:\r\n",
        "content-length : 2\r\n",
        "x: a\r\n b\r\n",
        "x: a\0b\r\n",
        "x: a\rb\r\n",
        "x y: a\r\n",
        ": a\r\n",
    ];
    for header in headers {
        let text = format!("HTTP/1.1 200 OK\r\n{header}\r\nok");
        assert_eq!(read_post(&text).2, ResponseEnd::Malformed, "{header:?}");
    }
    for text in [
        "nonsense\r\n\r\n",
        "HTTP/2.0 200 OK\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 2000 OK\r\n\r\n",
        "HTTP/1.1 099 OK\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 O\0K\r\n\r\n",
    ] {
        assert_eq!(read_post(text).2, ResponseEnd::Malformed, "{text:?}");
    }
}

#[test]
fn malformed_chunks_end_the_response_after_the_valid_data() {
    for (chunks, body) in [
        ("0x1\r\na\r\n", ""),
        ("\r\n", ""),
        ("-1\r\n", ""),
        (" 1\r\na", ""),
        ("1 1\r\na", ""),
        ("1\na\n", ""),
        ("ffffffffffffffff\r\n", ""),
        ("1\r\nab\r\n", "a"),
        ("1\r\na\n\r\n", "a"),
        ("1\r\na\r\n;\r\n", "a"),
        ("1\r\na\r\n0\r\nt: 1\n\n", "a"),
    ] {
        let text = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}");
        assert_eq!(
            read_post(&text),
            (200, body.to_owned(), ResponseEnd::Malformed),
            "{chunks:?}"
        );
    }
}

#[test]
fn truncated_responses_are_incomplete() {
    for (text, body) in [
        ("", ""),
        ("HTTP/1.1 200 OK\r\ncontent-le", ""),
        ("HTTP/1.1 100 Continue\r\n\r\n", ""),
        ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", "ok"),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
            "ok",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nok",
            "ok",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
            "",
        ),
    ] {
        let (_, got, end) = read_post(text);
        assert_eq!(
            (got.as_str(), end),
            (body, ResponseEnd::ClosedEarly),
            "{text:?}"
        );
    }
}

#[test]
fn heads_are_limited_in_size_and_number_even_if_they_never_end() {
    let with = |lines: usize, size: usize| {
        let line = format!("x: {}\r\n", "y".repeat(size));
        let lines = line.repeat(lines);
        read_post(&format!(
            "HTTP/1.1 200 OK\r\n{lines}content-length: 0\r\n\r\n"
        ))
        .2
    };
    assert_eq!(with(99, 10), ResponseEnd::Reusable);
    assert_eq!(with(100, 10), ResponseEnd::Malformed);
    assert_eq!(
        with(1, RESPONSE_HEAD_BYTES_MAX - 100),
        ResponseEnd::Reusable
    );
    assert_eq!(with(1, RESPONSE_HEAD_BYTES_MAX), ResponseEnd::Malformed);
    let endless = format!(
        "HTTP/1.1 200 OK\r\nx: {}",
        "y".repeat(RESPONSE_HEAD_BYTES_MAX)
    );
    assert_eq!(read_post(&endless).2, ResponseEnd::Malformed);
    let interim = "HTTP/1.1 100 Continue\r\n\r\n".repeat(RESPONSE_HEAD_BYTES_MAX / 20);
    assert_eq!(read_post(&interim).2, ResponseEnd::Malformed);
}

#[test]
fn hop_by_hop_headers_are_dropped_and_the_length_is_not_repeated() {
    let text = "HTTP/1.1 200 OK\r\nConnection: x-hop, content-length\r\nX-Hop: 1\r\n\
        penstock-deployment: theirs\r\nX-Request-Id: theirs\r\npenstock-model-status: 1\r\n\
        Keep-Alive: timeout=5\r\nTrailer: t\r\nUpgrade: h2c\r\npenstock-error-code: mine\r\n\
        Set-Cookie: a\r\nset-cookie: b\r\nx-empty:\r\nContent-Length: 2, 2\r\n\r\nok";
    let response = read_all(&Method::POST, text);
    let got: Vec<_> = response
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), std::str::from_utf8(value).unwrap()))
        .collect();
    let expected = [
        ("set-cookie", "a"),
        ("set-cookie", "b"),
        ("x-empty", ""),
        ("content-length", "2"),
    ];
    assert_eq!(got, expected);
}

#[test]
fn only_a_non_canonical_reason_is_kept() {
    let reason = |line: &str| {
        let mut reader = ResponseReader::new();
        reader.push(Bytes::from(format!(
            "HTTP/1.1 {line}\r\ncontent-length: 0\r\n\r\n"
        )));
        let head = reader.head(&mut HeaderMap::new()).unwrap().unwrap();
        assert_eq!(head.length, ResponseLength::Known(0));
        head.reason.map(|reason| reason.as_bytes().to_vec())
    };
    assert_eq!(reason("200 OK"), None);
    assert_eq!(reason("200 Fine").unwrap(), b"Fine");
}

#[test]
fn a_request_is_written_without_hop_by_hop_headers() {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("host", "public.example"),
        ("connection", "x-hop"),
        ("connection", "keep-alive, host"),
        ("x-hop", "1"),
        ("x-request-id", "theirs"),
        ("authorization", "Bearer secret"),
        ("x-forwarded-for", "6.6.6.6"),
        ("transfer-encoding", "chunked"),
        ("accept", "a"),
        ("accept", "b"),
    ] {
        headers.append(name, HeaderValue::from_static(value));
    }
    let request = UpstreamRequest {
        method: &Method::POST,
        path: "/score?x=1",
        headers: &headers,
        host: &HeaderValue::from_static("10.0.0.1:80"),
        id: &HeaderValue::from_static("ours"),
        origin: Origin {
            peer: &Peer::new([10, 0, 0, 2].into(), &[]),
            authority: None,
            prefix: "/endpoints/iris",
        },
        passes_authorization: false,
    };
    let written = |chunked| {
        let mut out = Vec::new();
        request.write(&mut out, chunked);
        String::from_utf8(out).unwrap()
    };
    let head = "POST /score?x=1 HTTP/1.1\r\nhost: 10.0.0.1:80\r\nx-request-id: ours\r\n\
        accept: a\r\naccept: b\r\nx-forwarded-for: 10.0.0.2\r\nforwarded: for=10.0.0.2;proto=http;host=\"public.example\"\r\n\
        x-forwarded-proto: http\r\nx-forwarded-host: public.example\r\n\
        x-forwarded-prefix: /endpoints/iris\r\n";
    assert_eq!(written(false), format!("{head}\r\n"));
    assert_eq!(
        written(true),
        format!("{head}transfer-encoding: chunked\r\n\r\n")
    );
}

/// Headers that only hyper passes on.
const HOP_BY_HOP: [&str; 2] = ["connection", "transfer-encoding"];

/// The response as hyper's client reads it, from a connection that closes after it.
async fn read_by_hyper(text: &[u8]) -> Result<ReadResponse, hyper::Error> {
    let (ours, mut theirs) = tokio::io::duplex(1 << 20);
    let text = text.to_vec();
    tokio::spawn(async move {
        // hyper would refuse a response that arrives before the request.
        let mut request = [0; 1024];
        let _ = theirs.read(&mut request).await;
        let _ = theirs.write_all(&text).await;
    });
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(ours)).await?;
    tokio::spawn(connection);
    let response = sender.send_request(Request::new(Empty::new())).await;
    let (parts, mut body) = response?.into_parts();
    let mut response = ReadResponse {
        status: parts.status.as_u16(),
        headers: headers_of(&parts.headers),
        body: Vec::new(),
        end: ResponseEnd::Complete,
    };
    response
        .headers
        .retain(|(name, _)| !HOP_BY_HOP.contains(&name.as_str()));
    // Ours includes a length once.
    response
        .headers
        .dedup_by(|a, b| a == b && a.0 == "content-length");
    while let Some(frame) = body.frame().await {
        match frame.map(|frame| frame.into_data()) {
            Ok(Ok(data)) => response.body.extend_from_slice(&data),
            Ok(Err(_)) => {}
            Err(_) => response.end = ResponseEnd::ClosedEarly,
        }
    }
    Ok(response)
}

fn header() -> impl Strategy<Value = String> {
    let has_head = prop_oneof![
        Just("connection: close".to_owned()),
        Just("connection: keep-alive".to_owned()),
        Just("content-length: 4".to_owned()),
    ];
    prop_oneof![
        4 => "[xX]-[a-zA-Z0-9_]{1,8}:[ \t]{0,2}[ -~]{0,20}",
        1 => has_head,
    ]
}

fn chunks(pieces: &[Vec<u8>], trailer: bool) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, piece) in pieces.iter().filter(|piece| !piece.is_empty()).enumerate() {
        let extension = ["", ";a", ";a=\"b\"", " "][number % 4];
        out.extend_from_slice(format!("{:X}{extension}\r\n", piece.len()).as_bytes());
        out.extend_from_slice(piece);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(if trailer {
        b"0\r\nt: 1\r\n\r\n"
    } else {
        b"0\r\n\r\n"
    });
    out
}

/// Well-formed responses in all three framings, some truncated.
fn response() -> impl Strategy<Value = Vec<u8>> {
    let pieces = proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..5);
    let parts = (
        prop_oneof![Just(200), Just(204), Just(304), 200..600u16],
        proptest::collection::vec(header(), 0..4),
        pieces,
        0..3u8,
        any::<bool>(),
        any::<bool>(),
        proptest::option::weighted(0.2, any::<prop::sample::Index>()),
    );
    parts.prop_map(
        |(status, headers, pieces, framing, trailer, interim, cut)| {
            let mut out = Vec::new();
            if interim {
                out.extend_from_slice(b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\n");
            }
            out.extend_from_slice(format!("HTTP/1.1 {status} Why\r\n").as_bytes());
            for header in headers {
                // One length per response: it is generated below, or is one of four bytes here.
                if framing == 2 || !header.starts_with("content-length") {
                    out.extend_from_slice(header.as_bytes());
                    out.extend_from_slice(b"\r\n");
                }
            }
            let body = pieces.concat();
            let bodiless = status == 204 || status == 304;
            match framing {
                0 => {
                    out.extend_from_slice(
                        format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes(),
                    );
                    out.extend_from_slice(if bodiless { b"" } else { &body });
                }
                1 => {
                    out.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                    if !bodiless {
                        out.extend_from_slice(&chunks(&pieces, trailer));
                    }
                }
                _ => {
                    out.extend_from_slice(b"\r\n");
                    out.extend_from_slice(if bodiless { b"" } else { &body });
                }
            }
            if let Some(cut) = cut {
                out.truncate(cut.index(out.len()));
            }
            out
        },
    )
}

/// Valid responses in which some bytes are replaced.
fn corrupted() -> impl Strategy<Value = Vec<u8>> {
    let spots = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (response(), spots).prop_map(|(mut bytes, spots)| {
        for (at, byte) in spots {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        bytes
    })
}

proptest! {
    #[test]
    fn a_response_in_pieces_is_read_like_one_in_one_piece(
        bytes in corrupted(),
        cuts in proptest::collection::vec(1..30usize, 1..40),
    ) {
        let in_one_piece = read(&Method::POST, std::iter::once(&bytes[..]));
        let mut rest = &bytes[..];
        let mut pieces = Vec::new();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, tail) = rest.split_at((*cut).min(rest.len()));
            pieces.push(piece);
            rest = tail;
        }
        let cut = read(&Method::POST, pieces.into_iter());
        prop_assert_eq!(cut, in_one_piece);
    }

    #[test]
    fn hyper_reads_the_same_responses(bytes in response()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let theirs = runtime.block_on(read_by_hyper(&bytes));
        let ours = read(&Method::GET, std::iter::once(&bytes[..]));
        match theirs {
            Ok(theirs) => {
                prop_assert_eq!(&ours.headers, &theirs.headers);
                prop_assert_eq!(&ours.body, &theirs.body);
                prop_assert_eq!(ours.status, theirs.status);
                let is_complete = matches!(ours.end, ResponseEnd::Complete | ResponseEnd::Reusable);
                prop_assert_eq!(is_complete, theirs.end == ResponseEnd::Complete, "{:?}", ours.end);
            }
            Err(error) => prop_assert!(
                ours.status == 0 && matches!(ours.end, ResponseEnd::ClosedEarly | ResponseEnd::Malformed),
                "{error:?}, {ours:?}"
            ),
        }
    }

    #[test]
    fn what_hyper_refuses_is_refused(bytes in corrupted()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let theirs = runtime.block_on(read_by_hyper(&bytes));
        let ours = read(&Method::GET, std::iter::once(&bytes[..]));
        let is_complete = |response: &ReadResponse| matches!(response.end, ResponseEnd::Complete | ResponseEnd::Reusable);
        match theirs {
            Ok(theirs) if is_complete(&ours) => {
                prop_assert_eq!(ours.status, theirs.status);
                prop_assert_eq!(&ours.body, &theirs.body);
                prop_assert!(is_complete(&theirs));
            }
            // It is allowed to be stricter than hyper.
            Ok(_) => {}
            Err(error) => prop_assert!(!is_complete(&ours), "{error:?}, {ours:?}"),
        }
    }
}
