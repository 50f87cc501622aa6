//! Streams that are cut: why, and how the client learns of it. A stream of server-sent events gets a last
//! event that says why. Any other is reset, since a mere close may look like its regular end.

use bytes::Bytes;
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};

use crate::outcome::RequestOutcome;

/// Why a response ended before it was complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CutReason {
    /// Nothing arrived for the deployment's `streamIdleTimeout`.
    Idle,
    /// It took longer than the deployment's `maxDuration`, or its `timeout` if that is the limit.
    Duration,
    /// The instance closed the connection or sent something malformed.
    Instance,
    /// The gateway ended before the response.
    Shutdown,
}

impl CutReason {
    /// The label in metrics, and the code of the last event.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Idle => "stream-idle",
            Self::Duration => "max-duration",
            Self::Instance => "instance-closed",
            Self::Shutdown => "gateway-shutdown",
        }
    }

    pub const fn outcome(self) -> RequestOutcome {
        match self {
            Self::Idle | Self::Duration => RequestOutcome::Timeout,
            Self::Instance => RequestOutcome::Unreachable,
            Self::Shutdown => RequestOutcome::Internal,
        }
    }

    /// The last event, in the form that clients of OpenAI's API read as an error.
    const fn last_event(self) -> &'static str {
        match self {
            Self::Idle => concat!(
                "event: error\ndata: {\"error\":{\"message\":\"The stream was cut: the model sent nothing ",
                "within the deployment's streamIdleTimeout.\",\"type\":\"timeout\",\"code\":\"stream-idle\"}}\n\n",
            ),
            Self::Duration => concat!(
                "event: error\ndata: {\"error\":{\"message\":\"The stream was cut: it took longer than the ",
                "deployment allows.\",\"type\":\"timeout\",\"code\":\"max-duration\"}}\n\n",
            ),
            Self::Instance => concat!(
                "event: error\ndata: {\"error\":{\"message\":\"The stream was cut: the instance closed its ",
                "connection.\",\"type\":\"server_error\",\"code\":\"instance-closed\"}}\n\n",
            ),
            Self::Shutdown => concat!(
                "event: error\ndata: {\"error\":{\"message\":\"The stream was cut: the gateway is shutting ",
                "down.\",\"type\":\"server_error\",\"code\":\"gateway-shutdown\"}}\n\n",
            ),
        }
    }
}

/// Follows a stream of server-sent events, to know where an event may be added: between two events, not
/// inside one, which would complete half an event.
#[derive(Debug)]
pub struct EventStream {
    /// The last bytes; a blank line before the first event.
    tail: [u8; 3],
}

impl EventStream {
    /// Returns `None` unless events can be added to a body with these headers.
    pub fn of(headers: &HeaderMap, exact_length: Option<u64>) -> Option<Self> {
        let content_type = headers.get(CONTENT_TYPE)?.as_bytes();
        let (media_type, rest) = content_type.split_at_checked(EVENT_STREAM.len())?;
        let is_event_stream = media_type.eq_ignore_ascii_case(EVENT_STREAM)
            && matches!(rest.first(), None | Some(b';' | b' '));
        let is_plain = exact_length.is_none() && !headers.contains_key(CONTENT_ENCODING);
        (is_event_stream && is_plain).then_some(Self { tail: *b"\n\n\n" })
    }

    pub fn push(&mut self, data: &[u8]) {
        match data {
            [.., a, b, c] => self.tail = [*a, *b, *c],
            [a, b] => self.tail = [self.tail[2], *a, *b],
            [a] => self.tail = [self.tail[1], self.tail[2], *a],
            [] => {}
        }
    }

    /// The last event, if it can be added here.
    pub fn last_event(&self, reason: CutReason) -> Option<Bytes> {
        let is_between_events = matches!(
            self.tail,
            [_, b'\n', b'\n'] | [b'\n', b'\r', b'\n'] | [_, b'\r', b'\r']
        );
        is_between_events.then(|| Bytes::from_static(reason.last_event().as_bytes()))
    }
}

const EVENT_STREAM: &[u8] = b"text/event-stream";

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn stream(content_type: &'static str) -> Option<EventStream> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        EventStream::of(&headers, None)
    }

    #[test]
    fn an_event_is_added_only_between_events() {
        for (pieces, is_between) in [
            (&[][..], true),
            (&["data: 1\n\n"], true),
            (&["data: 1\r\n\r\n"], true),
            (&["data: 1\r", "\r"], true),
            (&["data: 1", "\n", "\n"], true),
            (&["data: 1\r\n", "\r", "\n"], true),
            (&["data: 1\n"], false),
            (&["data: 1\n\ndata: 2"], false),
            (&["data: 1\r\n"], false),
            (&["\n\n", "d"], false),
        ] {
            let mut stream = stream("text/event-stream").unwrap();
            for piece in pieces {
                stream.push(piece.as_bytes());
            }
            let event = stream.last_event(CutReason::Idle);
            assert_eq!(event.is_some(), is_between, "{pieces:?}");
        }
    }

    #[test]
    fn only_plain_streams_of_events_get_one() {
        assert!(stream("Text/Event-Stream; charset=utf-8").is_some());
        assert!(stream("text/event-streams").is_none());
        assert!(stream("text/plain").is_none());
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        assert!(EventStream::of(&headers, Some(100)).is_none());
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        assert!(EventStream::of(&headers, None).is_none());
    }

    #[test]
    fn the_last_event_is_json_with_the_reason() {
        for reason in [
            CutReason::Idle,
            CutReason::Duration,
            CutReason::Instance,
            CutReason::Shutdown,
        ] {
            let event = reason.last_event();
            let data = event.strip_prefix("event: error\ndata: ").unwrap();
            let error: serde_json::Value = serde_json::from_str(data).unwrap();
            assert_eq!(error["error"]["code"], reason.code());
            assert!(event.ends_with("\n\n"));
        }
    }
}
