//! Which headers belong to one hop and not to the message, in both directions.

use http::HeaderName;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};

/// Headers that a message's `connection` names. Nearly always there are none.
#[derive(Debug, Default)]
pub struct Named(Vec<HeaderName>);

impl Named {
    /// Adds what one `connection` header names.
    pub fn add(&mut self, connection: &[u8]) {
        for token in tokens(connection) {
            // These two say how long the connection lasts.
            if token.eq_ignore_ascii_case(b"keep-alive") || token.eq_ignore_ascii_case(b"close") {
                continue;
            }
            // Framing stays under our control, whatever a message says of it.
            let protected = [CONTENT_LENGTH, TRANSFER_ENCODING, HOST];
            if let Ok(name) = HeaderName::from_bytes(token)
                && !protected.contains(&name)
            {
                self.0.push(name);
            }
        }
    }

    /// Whether a header is not passed on.
    pub fn stays_here(&self, name: &HeaderName) -> bool {
        name == CONNECTION || stays_here(name.as_str()) || self.0.contains(name)
    }
}

/// The elements of a header that is a list.
pub fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|byte| *byte == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty())
}

/// What concerns this hop, is ours to say, or is none of the other side's business.
fn stays_here(name: &str) -> bool {
    // Nearly all names pass here, on their first letter.
    if !matches!(
        name.as_bytes().first(),
        Some(b't' | b'u' | b'e' | b'k' | b'p' | b'a')
    ) {
        return false;
    }
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
    fn what_connection_names_stays_here_but_framing_goes_on() {
        let mut named = Named::default();
        named.add(b"Keep-Alive, X-One ,, content-length");
        named.add(b"x-two, bad name");
        let stays = |name: &str| named.stays_here(&name.parse().unwrap());
        for name in ["x-one", "x-two", "connection", "te", "authorization"] {
            assert!(stays(name), "{name}");
        }
        for name in ["content-length", "x-three", "accept", "host"] {
            assert!(!stays(name), "{name}");
        }
    }
}
