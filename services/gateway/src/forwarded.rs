//! What an instance is told of the client and of the way to the gateway: `x-forwarded-for`, `-host`, `-proto`,
//! `-prefix` and `forwarded`. Invariant: what a client says about itself is dropped; only a trusted proxy
//! is believed, and its own address is then added.

use std::cell::RefCell;
use std::net::IpAddr;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
const FORWARDED: HeaderName = HeaderName::from_static("forwarded");

/// The other end of a client connection.
#[derive(Debug)]
pub struct Peer {
    address: String,
    /// The beginning of its element of `forwarded`.
    element: String,
    is_trusted: bool,
    /// What was written last: mostly the same for all requests of a connection.
    last: RefCell<Written>,
}

/// What is written for a request of a client that is not trusted.
#[derive(Debug, Default)]
struct Written {
    host: Vec<u8>,
    prefix: String,
    text: Vec<u8>,
}

/// How a request reached the gateway.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    pub peer: &'a Peer,
    /// The host in the request line, if there is one.
    pub authority: Option<&'a str>,
    /// The part of the path before the one that the instance gets.
    pub prefix: &'a str,
}

impl Peer {
    pub fn new(address: IpAddr, trusted_proxies: &[IpNet]) -> Self {
        let address = address.to_canonical();
        let element = match address {
            IpAddr::V4(address) => format!("for={address};proto=http"),
            IpAddr::V6(address) => format!("for=\"[{address}]\";proto=http"),
        };
        Self {
            address: address.to_string(),
            element,
            is_trusted: trusted_proxies.iter().any(|net| net.contains(&address)),
            last: RefCell::default(),
        }
    }
}

impl Origin<'_> {
    /// Whether a header of the client is replaced by what `write` writes, or not believed.
    #[inline]
    pub fn replaces(&self, name: &HeaderName) -> bool {
        // A name with underscores is the client's even behind a proxy: few proxies drop it, and some servers
        // take it for the one with dashes.
        let is_replaced =
            || [FOR, HOST, PROTO, PREFIX, FORWARDED].contains(name) || name.as_str().contains('_');
        is_forwarded(name.as_str()) && (!self.peer.is_trusted || is_replaced())
    }

    /// Writes the headers of a request with these headers, of which `host` is the one of that name.
    pub fn write(&self, host: &[u8], headers: &HeaderMap, out: &mut Vec<u8>) {
        let host = self.authority.map_or(host, str::as_bytes);
        if self.peer.is_trusted {
            return self.compose(host, headers, out);
        }
        let mut last = self.peer.last.borrow_mut();
        if last.text.is_empty() || last.host != host || last.prefix != self.prefix {
            let mut text = Vec::new();
            self.compose(host, &HeaderMap::new(), &mut text);
            *last = Written {
                host: host.to_vec(),
                prefix: self.prefix.to_owned(),
                text,
            };
        }
        out.extend_from_slice(&last.text);
    }

    /// Adds to what the proxies before say.
    fn compose(&self, host: &[u8], proxied: &HeaderMap, out: &mut Vec<u8>) {
        let Peer {
            address, element, ..
        } = self.peer;
        let host = Some(host).filter(|host| is_host(host));
        let proxied = |name| proxied.get_all(name).into_iter();

        out.extend_from_slice(b"x-forwarded-for: ");
        for value in proxied(FOR) {
            out.extend_from_slice(value.as_bytes());
            out.extend_from_slice(b", ");
        }
        out.extend_from_slice(address.as_bytes());

        out.extend_from_slice(b"\r\nforwarded: ");
        for value in proxied(FORWARDED) {
            out.extend_from_slice(value.as_bytes());
            out.extend_from_slice(b", ");
        }
        out.extend_from_slice(element.as_bytes());
        if let Some(host) = host {
            out.extend_from_slice(b";host=\"");
            out.extend_from_slice(host);
            out.extend_from_slice(b"\"");
        }

        out.extend_from_slice(b"\r\nx-forwarded-proto: ");
        let proto = proxied(PROTO).next();
        out.extend_from_slice(proto.map_or(b"http", |proto| proto.as_bytes()));
        let proxied_host = proxied(HOST).next();
        if let Some(host) = proxied_host.map(|host| host.as_bytes()).or(host) {
            out.extend_from_slice(b"\r\nx-forwarded-host: ");
            out.extend_from_slice(host);
        }
        let proxied_prefix = proxied(PREFIX).next();
        if proxied_prefix.is_some() || !self.prefix.is_empty() {
            out.extend_from_slice(b"\r\nx-forwarded-prefix: ");
            let before = proxied_prefix.map_or(&b""[..], |prefix| prefix.as_bytes());
            out.extend_from_slice(before.strip_suffix(b"/").unwrap_or(before));
            out.extend_from_slice(self.prefix.as_bytes());
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// Whether a header says how a request was forwarded. Some servers take `_` for `-`.
#[inline]
fn is_forwarded(name: &str) -> bool {
    match name.as_bytes() {
        [b'f', ..] => name == FORWARDED.as_str(),
        [b'x', b'-' | b'_', rest @ ..] => rest
            .strip_prefix(b"forwarded")
            .is_some_and(|rest| matches!(rest, [b'-' | b'_', ..])),
        _ => false,
    }
}

/// Whether a host can be quoted.
fn is_host(host: &[u8]) -> bool {
    let is_valid = |byte: &u8| byte.is_ascii_alphanumeric() || b".-:[]_".contains(byte);
    !host.is_empty() && host.iter().all(is_valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENTS_OWN: [(&str, &str); 7] = [
        ("x-forwarded-for", "6.6.6.6"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "models.example"),
        ("x-forwarded-prefix", "/ml/"),
        ("x-forwarded-port", "443"),
        ("x_forwarded_for", "6.6.6.6"),
        ("forwarded", "for=6.6.6.6"),
    ];

    /// What is written, and which of the client's own headers are kept.
    fn written(
        address: &str,
        trusted: &str,
        (host, prefix): (&str, &str),
    ) -> (String, Vec<&'static str>) {
        let trusted: Vec<IpNet> = trusted.split(' ').flat_map(str::parse).collect();
        let peer = Peer::new(address.parse().unwrap(), &trusted);
        let origin = Origin {
            peer: &peer,
            authority: None,
            prefix,
        };
        let mut headers = HeaderMap::new();
        for (name, value) in CLIENTS_OWN {
            headers.append(name, value.parse().unwrap());
        }
        let mut out = Vec::new();
        origin.write(host.as_bytes(), &headers, &mut out);
        let names = CLIENTS_OWN.map(|(name, _)| name);
        let kept = names
            .into_iter()
            .filter(|name| !origin.replaces(&name.parse().unwrap()));
        (String::from_utf8(out).unwrap(), kept.collect())
    }

    #[test]
    fn what_a_client_says_about_itself_is_dropped() {
        let (text, kept) = written("10.1.2.3", "10.1.2.4/32", ("a:80", "/endpoints/iris"));
        let expected = "x-forwarded-for: 10.1.2.3\r\nforwarded: for=10.1.2.3;proto=http;host=\"a:80\"\r\n\
            x-forwarded-proto: http\r\nx-forwarded-host: a:80\r\nx-forwarded-prefix: /endpoints/iris\r\n";
        assert_eq!((text.as_str(), kept.as_slice()), (expected, [].as_slice()));
    }

    #[test]
    fn what_a_trusted_proxy_says_is_kept_and_its_address_added() {
        let (text, kept) = written(
            "::ffff:10.1.2.3",
            "::1/128 10.0.0.0/8",
            ("a", "/endpoints/iris"),
        );
        let expected = "x-forwarded-for: 6.6.6.6, 10.1.2.3\r\n\
            forwarded: for=6.6.6.6, for=10.1.2.3;proto=http;host=\"a\"\r\nx-forwarded-proto: https\r\n\
            x-forwarded-host: models.example\r\nx-forwarded-prefix: /ml/endpoints/iris\r\n";
        assert_eq!(text, expected);
        assert_eq!(kept, ["x-forwarded-port"]);
    }

    #[test]
    fn each_request_of_a_connection_gets_its_own_host_and_prefix() {
        let peer = Peer::new([10, 1, 2, 3].into(), &[]);
        let write = |host: &[u8], authority, prefix| {
            let mut out = Vec::new();
            let origin = Origin {
                peer: &peer,
                authority,
                prefix,
            };
            origin.write(host, &HeaderMap::new(), &mut out);
            String::from_utf8(out).unwrap()
        };
        let first = write(b"a", None, "/endpoints/a");
        assert!(write(b"b", None, "/endpoints/a").contains("-host: b\r\n"));
        assert!(write(b"b", Some("c"), "/endpoints/a").contains("-host: c\r\n"));
        assert!(write(b"b", None, "/endpoints/b").contains("-prefix: /endpoints/b\r\n"));
        assert_eq!(write(b"a", None, "/endpoints/a"), first);
    }

    #[test]
    fn a_host_that_would_end_its_quotes_and_an_empty_prefix_are_left_out() {
        let (text, _) = written("2001:db8::1", "", ("a\";for=\"6.6.6.6", ""));
        let expected = "x-forwarded-for: 2001:db8::1\r\n\
            forwarded: for=\"[2001:db8::1]\";proto=http\r\nx-forwarded-proto: http\r\n";
        assert_eq!(text, expected);
    }
}
