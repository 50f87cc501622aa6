//! What is made of answers, good ones and others: by tables, cut at random, and beside hyper.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::body::Reader;
use super::head::{Ask, HEAD_BYTES_MAX, Length};

/// How an answer ends for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Whole, and a next request may follow.
    Reusable,
    Whole,
    /// The instance broke off.
    BrokenOff,
    Malformed,
}

/// An answer as far as it could be read.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    end: End,
}

fn headers_of(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let pairs = headers.iter();
    pairs
        .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()))
        .collect()
}

/// Reads the pieces that a connection brings before it closes.
fn read<'a>(method: &Method, pieces: impl Iterator<Item = &'a [u8]>) -> Answer {
    let mut reader = Reader::new();
    reader.begin(method);
    let mut answer = Answer {
        status: 0,
        headers: Vec::new(),
        body: Vec::new(),
        end: End::BrokenOff,
    };
    let mut known = false;
    let mut step = |reader: &mut Reader, answer: &mut Answer| {
        if !known {
            let Some(head) = reader.head(&mut HeaderMap::new())? else {
                return Ok(());
            };
            known = true;
            answer.status = head.status.as_u16();
            answer.headers = headers_of(&head.headers);
        }
        while let Some(data) = reader.data()? {
            assert!(!data.is_empty());
            answer.body.extend_from_slice(&data);
        }
        Ok::<_, super::head::Malformed>(())
    };
    for piece in pieces {
        reader.push(Bytes::copy_from_slice(piece));
        if step(&mut reader, &mut answer).is_err() {
            answer.end = End::Malformed;
            return answer;
        }
    }
    let reusable = reader.may_go_on();
    answer.end = match (reusable, reader.end()) {
        (true, _) => End::Reusable,
        (false, Ok(true)) => End::Whole,
        (false, Ok(false)) => End::BrokenOff,
        (false, Err(_)) => End::Malformed,
    };
    answer
}

fn read_whole(method: &Method, text: &str) -> Answer {
    read(method, std::iter::once(text.as_bytes()))
}

fn post(text: &str) -> (u16, String, End) {
    let answer = read_whole(&Method::POST, text);
    let body = String::from_utf8(answer.body).unwrap();
    (answer.status, body, answer.end)
}

#[test]
fn good_answers_end_where_they_say() {
    let cases = [
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            200,
            "ok",
            End::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            200,
            "",
            End::Reusable,
        ),
        (
            "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
            200,
            "ok",
            End::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok",
            200,
            "ok",
            End::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok",
            200,
            "ok",
            End::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            200,
            "ok",
            End::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;a=b\r\no\r\n001  \r\nk\r\n0\r\nt: 1\r\nu: 2\r\n\r\n",
            200,
            "ok",
            End::Reusable,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
            200,
            "ok",
            End::Whole,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: x, Close\r\n\r\nok",
            200,
            "ok",
            End::Whole,
        ),
        (
            "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
            200,
            "ok",
            End::Whole,
        ),
        (
            "HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nok",
            200,
            "ok",
            End::Reusable,
        ),
        // Ended by the connection.
        (
            "HTTP/1.1 200 OK\r\n\r\nall of it",
            200,
            "all of it",
            End::Whole,
        ),
        ("HTTP/1.0 200 OK\r\n\r\n", 200, "", End::Whole),
        // Without a body whatever they say.
        ("HTTP/1.1 204 No Content\r\n\r\n", 204, "", End::Reusable),
        (
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n",
            304,
            "",
            End::Reusable,
        ),
        // Interim answers are skipped.
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            200,
            "ok",
            End::Reusable,
        ),
        // What nobody asked for is not passed on, and ends the connection.
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n",
            200,
            "ok",
            End::Whole,
        ),
        ("HTTP/1.1 204 No Content\r\n\r\nx", 204, "", End::Whole),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nx",
            200,
            "ok",
            End::Whole,
        ),
    ];
    for (text, status, body, end) in cases {
        assert_eq!(post(text), (status, body.to_owned(), end), "{text:?}");
    }
    let head = read_whole(
        &Method::HEAD,
        "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n",
    );
    assert_eq!((head.body.len(), head.end), (0, End::Reusable));
    assert_eq!(head.headers, [("content-length".to_owned(), b"7".to_vec())]);
}

#[test]
fn answers_that_can_be_read_in_two_ways_or_not_at_all_are_refused() {
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
        assert_eq!(post(&text).2, End::Malformed, "{header:?}");
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
        assert_eq!(post(text).2, End::Malformed, "{text:?}");
    }
}

#[test]
fn malformed_chunks_end_the_answer_after_what_was_good() {
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
            post(&text),
            (200, body.to_owned(), End::Malformed),
            "{chunks:?}"
        );
    }
}

#[test]
fn answers_that_break_off_are_not_whole() {
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
        let (_, got, end) = post(text);
        assert_eq!((got.as_str(), end), (body, End::BrokenOff), "{text:?}");
    }
}

#[test]
fn heads_have_limits_in_size_and_number_also_when_they_never_end() {
    let with = |lines: usize, size: usize| {
        let line = format!("x: {}\r\n", "y".repeat(size));
        let lines = line.repeat(lines);
        post(&format!(
            "HTTP/1.1 200 OK\r\n{lines}content-length: 0\r\n\r\n"
        ))
        .2
    };
    assert_eq!(with(99, 10), End::Reusable);
    assert_eq!(with(100, 10), End::Malformed);
    assert_eq!(with(1, HEAD_BYTES_MAX - 100), End::Reusable);
    assert_eq!(with(1, HEAD_BYTES_MAX), End::Malformed);
    let endless = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(HEAD_BYTES_MAX));
    assert_eq!(post(&endless).2, End::Malformed);
    let interim = "HTTP/1.1 100 Continue\r\n\r\n".repeat(HEAD_BYTES_MAX / 20);
    assert_eq!(post(&interim).2, End::Malformed);
}

#[test]
fn what_belongs_to_the_hop_is_left_out_and_the_length_said_once() {
    let text = "HTTP/1.1 200 OK\r\nConnection: x-hop, content-length\r\nX-Hop: 1\r\n\
        penstock-deployment: theirs\r\nX-Request-Id: theirs\r\npenstock-model-status: 1\r\n\
        Keep-Alive: timeout=5\r\nTrailer: t\r\nUpgrade: h2c\r\npenstock-error-code: mine\r\n\
        Set-Cookie: a\r\nset-cookie: b\r\nx-empty:\r\nContent-Length: 2, 2\r\n\r\nok";
    let answer = read_whole(&Method::POST, text);
    let got: Vec<_> = answer
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
fn an_unusual_reason_is_kept_and_a_usual_one_is_not_worth_it() {
    let reason = |line: &str| {
        let mut reader = Reader::new();
        reader.push(Bytes::from(format!(
            "HTTP/1.1 {line}\r\ncontent-length: 0\r\n\r\n"
        )));
        let head = reader.head(&mut HeaderMap::new()).unwrap().unwrap();
        assert_eq!(head.length, Length::Known(0));
        head.reason.map(|reason| reason.as_bytes().to_vec())
    };
    assert_eq!(reason("200 OK"), None);
    assert_eq!(reason("200 Fine").unwrap(), b"Fine");
}

#[test]
fn a_request_is_written_without_what_belongs_to_the_clients_hop() {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("host", "public.example"),
        ("connection", "x-hop"),
        ("connection", "keep-alive, host"),
        ("x-hop", "1"),
        ("x-request-id", "theirs"),
        ("authorization", "Bearer secret"),
        ("transfer-encoding", "chunked"),
        ("accept", "a"),
        ("accept", "b"),
    ] {
        headers.append(name, HeaderValue::from_static(value));
    }
    let ask = Ask {
        method: &Method::POST,
        path: "/score?x=1",
        headers: &headers,
        host: &HeaderValue::from_static("10.0.0.1:80"),
        id: &HeaderValue::from_static("ours"),
    };
    let written = |chunked| {
        let mut out = Vec::new();
        ask.write(&mut out, chunked);
        String::from_utf8(out).unwrap()
    };
    let head = "POST /score?x=1 HTTP/1.1\r\nhost: 10.0.0.1:80\r\nx-request-id: ours\r\n\
        accept: a\r\naccept: b\r\n";
    assert_eq!(written(false), format!("{head}\r\n"));
    assert_eq!(
        written(true),
        format!("{head}transfer-encoding: chunked\r\n\r\n")
    );
}

/// Beside the headers that hyper passes on as they are.
const HOP: [&str; 2] = ["connection", "transfer-encoding"];

/// The answer as hyper's client reads it, from a connection that closes behind it.
async fn read_by_hyper(text: &[u8]) -> Result<Answer, hyper::Error> {
    let (ours, mut theirs) = tokio::io::duplex(1 << 20);
    let text = text.to_vec();
    tokio::spawn(async move {
        // What comes before it is asked for would be refused.
        let mut request = [0; 1024];
        let _ = theirs.read(&mut request).await;
        let _ = theirs.write_all(&text).await;
    });
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(ours)).await?;
    tokio::spawn(connection);
    let response = sender.send_request(Request::new(Empty::new())).await;
    let (parts, mut body) = response?.into_parts();
    let mut answer = Answer {
        status: parts.status.as_u16(),
        headers: headers_of(&parts.headers),
        body: Vec::new(),
        end: End::Whole,
    };
    answer
        .headers
        .retain(|(name, _)| !HOP.contains(&name.as_str()));
    // Ours says a length once.
    answer
        .headers
        .dedup_by(|a, b| a == b && a.0 == "content-length");
    while let Some(frame) = body.frame().await {
        match frame.map(|frame| frame.into_data()) {
            Ok(Ok(data)) => answer.body.extend_from_slice(&data),
            Ok(Err(_)) => {}
            Err(_) => answer.end = End::BrokenOff,
        }
    }
    Ok(answer)
}

fn header() -> impl Strategy<Value = String> {
    let known = prop_oneof![
        Just("connection: close".to_owned()),
        Just("connection: keep-alive".to_owned()),
        Just("content-length: 4".to_owned()),
    ];
    prop_oneof![
        4 => "[xX]-[a-zA-Z0-9_]{1,8}:[ \t]{0,2}[ -~]{0,20}",
        1 => known,
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

/// Well-formed answers in all three framings, some broken off.
fn answer() -> impl Strategy<Value = Vec<u8>> {
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
                // One length per answer: it is generated below, or is one of four bytes here.
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

/// Good answers in which some bytes are replaced.
fn spoiled() -> impl Strategy<Value = Vec<u8>> {
    let spots = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (answer(), spots).prop_map(|(mut bytes, spots)| {
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
    fn an_answer_in_pieces_is_the_same_as_whole(
        bytes in spoiled(),
        cuts in proptest::collection::vec(1..30usize, 1..40),
    ) {
        let whole = read(&Method::POST, std::iter::once(&bytes[..]));
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
        prop_assert_eq!(cut, whole);
    }

    #[test]
    fn hyper_reads_the_same_answers(bytes in answer()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let theirs = runtime.block_on(read_by_hyper(&bytes));
        let ours = read(&Method::GET, std::iter::once(&bytes[..]));
        match theirs {
            Ok(theirs) => {
                prop_assert_eq!(&ours.headers, &theirs.headers);
                prop_assert_eq!(&ours.body, &theirs.body);
                prop_assert_eq!(ours.status, theirs.status);
                let whole = matches!(ours.end, End::Whole | End::Reusable);
                prop_assert_eq!(whole, theirs.end == End::Whole, "{:?}", ours.end);
            }
            Err(error) => prop_assert!(
                ours.status == 0 && matches!(ours.end, End::BrokenOff | End::Malformed),
                "{error:?}, {ours:?}"
            ),
        }
    }

    #[test]
    fn what_hyper_refuses_is_refused(bytes in spoiled()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let theirs = runtime.block_on(read_by_hyper(&bytes));
        let ours = read(&Method::GET, std::iter::once(&bytes[..]));
        let whole = |answer: &Answer| matches!(answer.end, End::Whole | End::Reusable);
        match theirs {
            Ok(theirs) if whole(&ours) => {
                prop_assert_eq!(ours.status, theirs.status);
                prop_assert_eq!(&ours.body, &theirs.body);
                prop_assert!(whole(&theirs));
            }
            // Stricter than hyper is allowed.
            Ok(_) => {}
            Err(error) => prop_assert!(!whole(&ours), "{error:?}, {ours:?}"),
        }
    }
}
