//! Hop-by-hop headers, in both directions.

use http::HeaderName;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};

/// The headers that a message's `connection` header names. Almost always empty.
#[derive(Debug, Default)]
pub struct ConnectionOptions(Vec<HeaderName>);

impl ConnectionOptions {
    /// Adds the names in one `connection` header.
    pub fn add(&mut self, connection: &[u8]) {
        for token in tokens(connection) {
            // These two concern how long the connection lasts.
            if token.eq_ignore_ascii_case(b"keep-alive") || token.eq_ignore_ascii_case(b"close") {
                continue;
            }
            // Framing stays under our control, whatever the message says.
            let protected = [CONTENT_LENGTH, TRANSFER_ENCODING, HOST];
            if let Ok(name) = HeaderName::from_bytes(token)
                && !protected.contains(&name)
            {
                self.0.push(name);
            }
        }
    }

    /// Whether a header must not be forwarded.
    #[inline]
    pub fn is_hop_by_hop(&self, name: &HeaderName) -> bool {
        // The first letter already rules out almost all names.
        let is_hop_by_hop = match name.as_str().as_bytes() {
            [b'c', ..] => name == CONNECTION,
            [b't' | b'u' | b'e' | b'k' | b'p' | b'a', ..] => is_hop_by_hop(name.as_str()),
            _ => false,
        };
        is_hop_by_hop || (!self.0.is_empty() && self.0.contains(name))
    }
}

/// Splits a comma-separated header value.
pub fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|byte| *byte == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty())
}

/// Whether a header other than `connection` is hop-by-hop, set by the gateway itself, or must not reach the
/// other side. The caller knows the first letters.
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "te" | "upgrade"
            | "trailer"
            | "expect"
            | "keep-alive"
            | "transfer-encoding"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "authorization"
            | "penstock-deployment"
            | "azureml-model-deployment"
            | "penstock-error-code"
            | "penstock-model-status"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_named_by_connection_are_hop_by_hop_but_framing_is_not() {
        let mut options = ConnectionOptions::default();
        options.add(b"Keep-Alive, X-One ,, content-length");
        options.add(b"x-two, bad name");
        let is_dropped = |name: &str| options.is_hop_by_hop(&name.parse().unwrap());
        for name in ["x-one", "x-two", "connection", "te", "authorization"] {
            assert!(is_dropped(name), "{name}");
        }
        for name in ["content-length", "x-three", "accept", "host"] {
            assert!(!is_dropped(name), "{name}");
        }
    }
}
