//! Resolves a request to its endpoint, by path or host name, and checks its key.

use std::borrow::Cow;

use http::header::{AUTHORIZATION, HOST};
use http::request::Parts;
use http::{HeaderMap, Method};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::paths::PathKind;
use crate::reply::Refusal;
use crate::router::ServedEndpoint;

const PREFIX: &str = "/endpoints/";
const HEALTH: &str = "/healthz";

/// The endpoint's name, and what follows it: path and query.
#[derive(Debug, PartialEq, Eq)]
pub struct Target<'a> {
    pub endpoint: Cow<'a, str>,
    pub path: &'a str,
    pub kind: PathKind,
}

impl<'a> Target<'a> {
    /// The request's path and query.
    pub fn path_and_query(parts: &Parts) -> &str {
        parts.uri.path_and_query().map_or("/", |path| path.as_str())
    }

    /// Finds the target in the host name under `domain` if that names an endpoint that `exists`, or else in the
    /// path: the paths of a model may begin as ours do.
    pub fn parse(
        parts: &'a Parts,
        domain: Option<&str>,
        exists: impl Fn(&str) -> bool,
    ) -> Result<Self, Refusal> {
        let path = Self::path_and_query(parts);
        let on_host = || host_endpoint(parts, domain).filter(|endpoint| exists(endpoint));
        let (endpoint, path) = match path.strip_prefix(PREFIX) {
            Some(_)
                if domain.is_some()
                    && let Some(endpoint) = on_host() =>
            {
                (endpoint, path)
            }
            Some(tail) => {
                let (endpoint, path) = tail.split_at(tail.find(['/', '?']).unwrap_or(tail.len()));
                (endpoint.into(), path)
            }
            // Not the `*` of an OPTIONS request.
            None if !path.starts_with('/') => return Err(Refusal::UnknownEndpoint),
            None => {
                let endpoint = host_endpoint(parts, domain);
                (endpoint.ok_or(Refusal::UnknownEndpoint)?, path)
            }
        };
        Ok(Self {
            endpoint,
            path,
            kind: PathKind::of(path),
        })
    }

    /// What precedes the endpoint's paths; nothing on its host name.
    pub fn prefix(&self, parts: &'a Parts) -> &'a str {
        let path = Self::path_and_query(parts);
        &path[..path.len() - self.path.len()]
    }

    /// Checks that the path does not lead out of what it begins with.
    pub fn check_segments(&self) -> Result<(), Refusal> {
        if self.kind == PathKind::Scoring {
            return Ok(());
        }
        let path = self
            .path
            .split_once('?')
            .map_or(self.path, |(path, _)| path);
        if is_traversal(path) {
            return Err(Refusal::Path);
        }
        Ok(())
    }
}

/// Whether the request asks for the gateway's own health. On the host name of an endpoint that `exists`, it is
/// the endpoint's.
pub fn is_health_check(parts: &Parts, domain: Option<&str>, exists: impl Fn(&str) -> bool) -> bool {
    matches!(parts.method, Method::GET | Method::HEAD)
        && parts.uri.path() == HEALTH
        && !host_endpoint(parts, domain).is_some_and(|endpoint| exists(&endpoint))
}

/// Rounds of percent-decoding to check: an instance behind its own proxy may see the path decoded
/// twice.
const DECODE_ROUNDS_MAX: usize = 2;

/// Whether an instance may see a `.` or `..` segment in the path, however it or the adjacent
/// slashes are written: percent-encoded, as backslashes, or with parameters after a semicolon.
fn is_traversal(path: &str) -> bool {
    // Without either byte there is no such segment; most paths contain neither.
    if !path.bytes().any(|byte| matches!(byte, b'.' | b'%')) {
        return false;
    }
    let mut path = path.as_bytes().to_vec();
    for _ in 0..DECODE_ROUNDS_MAX {
        if has_dot_segment(&path) || !percent_decode(&mut path) {
            break;
        }
    }
    has_dot_segment(&path)
}

fn has_dot_segment(path: &[u8]) -> bool {
    path.split(|byte| matches!(byte, b'/' | b'\\'))
        .filter_map(|segment| segment.split(|byte| *byte == b';').next())
        .any(|segment| matches!(segment, b"." | b".."))
}

/// Decodes percent-encoded bytes in place; returns false if there are none.
fn percent_decode(path: &mut Vec<u8>) -> bool {
    let (mut from, mut to) = (0, 0);
    while from < path.len() {
        let mut byte = [path[from]];
        let digits = path.get(from + 1..from + 3);
        let is_code = byte == *b"%"
            && digits.is_some_and(|digits| hex::decode_to_slice(digits, &mut byte).is_ok());
        from += if is_code { 3 } else { 1 };
        path[to] = byte[0];
        to += 1;
    }
    path.truncate(to);
    from != to
}

/// The endpoint that the host name under `domain` names, without regard to case or a dot at the end.
fn host_endpoint<'a>(parts: &'a Parts, domain: Option<&str>) -> Option<Cow<'a, str>> {
    let domain = domain?;
    let host = match parts.uri.host() {
        Some(host) => host,
        None => parts.headers.get(HOST)?.to_str().ok()?,
    };
    let host = host.split_once(':').map_or(host, |(host, _)| host);
    let host = host.strip_suffix('.').unwrap_or(host);
    let (endpoint, parent_domain) = host.split_once('.')?;
    if !parent_domain.eq_ignore_ascii_case(domain) {
        return None;
    }
    // Endpoints have lower-case names.
    Some(match endpoint.bytes().any(|b| b.is_ascii_uppercase()) {
        true => endpoint.to_ascii_lowercase().into(),
        false => endpoint.into(),
    })
}

/// Checks that the request carries one of the endpoint's keys. Every key is compared in full, in
/// constant time.
pub fn authorize(endpoint: &ServedEndpoint, headers: &HeaderMap) -> Result<(), Refusal> {
    let header = headers.get(AUTHORIZATION).ok_or(Refusal::NoKey)?.as_bytes();
    let (scheme, key) = header.split_at_checked(7).ok_or(Refusal::NoKey)?;
    if !scheme.eq_ignore_ascii_case(b"bearer ") {
        return Err(Refusal::NoKey);
    }
    let digest: [u8; 32] = Sha256::digest(key).into();
    let is_match = endpoint
        .keys
        .iter()
        .fold(Choice::from(0), |is_match, valid| {
            is_match | valid.ct_eq(&digest)
        });
    if bool::from(is_match) {
        Ok(())
    } else {
        Err(Refusal::WrongKey)
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(uri: &str, host: &str) -> Parts {
        let request = Request::builder().uri(uri).header(HOST, host).body(());
        request.unwrap().into_parts().0
    }

    #[test]
    fn an_endpoint_is_found_by_path_or_by_host_name() {
        let cases = [
            ("/endpoints/iris/score", "x", "iris", "/score"),
            (
                "/endpoints/iris/score/a/b?c=/../d",
                "x",
                "iris",
                "/score/a/b?c=/../d",
            ),
            ("/endpoints/iris/score?x=1", "x", "iris", "/score?x=1"),
            ("http://other/endpoints/iris/score", "x", "iris", "/score"),
            ("/score", "iris.ml.example", "iris", "/score"),
            ("/score/a", "iris.ML.example:8080", "iris", "/score/a"),
            ("/endpoints/iris/v1/x?y", "x", "iris", "/v1/x?y"),
            ("/endpoints/iris/scores", "x", "iris", "/scores"),
            ("/endpoints/iris?x", "x", "iris", "?x"),
            ("/endpoints/iris", "x", "iris", ""),
            ("/v1/x", "iris.ml.example", "iris", "/v1/x"),
            ("/score", "Iris.ml.example.", "iris", "/score"),
            ("/score", "iris.ml.example.:80", "iris", "/score"),
            ("/endpoints/Iris/score", "x", "Iris", "/score"),
            (
                "/endpoints/rose/score",
                "iris.ml.example",
                "iris",
                "/endpoints/rose/score",
            ),
            ("/endpoints/rose/score", "www.ml.example", "rose", "/score"),
        ];
        for (uri, host, endpoint, path) in cases {
            let parts = parts(uri, host);
            let target = Target::parse(&parts, Some("ml.example"), |name| name == "iris");
            assert_eq!(
                target,
                Ok(Target {
                    endpoint: endpoint.into(),
                    path,
                    kind: PathKind::of(path),
                }),
                "{uri} {host}"
            );
        }
    }

    #[test]
    fn other_hosts_match_no_endpoint() {
        for (uri, host) in [
            ("/", "x"),
            ("/score", "iris.other.example"),
            ("/score", "a.iris.ml.example"),
            ("*", "iris.ml.example"),
            ("/score", "iris.ml.example.."),
        ] {
            let parts = parts(uri, host);
            let target = Target::parse(&parts, Some("ml.example"), |_| true);
            assert_eq!(target, Err(Refusal::UnknownEndpoint), "{uri} {host}");
        }
        let by_host = parts("/score", "iris.ml.example");
        assert!(Target::parse(&by_host, None, |_| true).is_err());
    }

    #[test]
    fn a_path_cannot_lead_out_of_what_it_begins_with() {
        for suffix in [
            "/..",
            "/a/../../b",
            "/./a",
            "/%2e%2E/a",
            "/.%2e",
            "/..%2f..%2fadmin",
            "/a%2F..",
            "/..%5cadmin",
            "/..\\admin",
            "/..;/admin",
            "/..;x=1/admin",
            "/%2e%2e%3b/admin",
            "/%252e%252e/admin",
            "/..%252fadmin",
        ] {
            let parts = parts(&format!("/endpoints/iris/score{suffix}"), "x");
            let target = Target::parse(&parts, None, |_| true).unwrap();
            assert_eq!(target.check_segments(), Err(Refusal::Path), "{suffix}");
        }
        for suffix in [
            "/...",
            "/a..b/.c/d.",
            "/a%2fb",
            "/50%",
            "/%zz",
            "/a;b=..",
            "/a?b=/../c",
        ] {
            let parts = parts(&format!("/endpoints/iris/score{suffix}"), "x");
            let target = Target::parse(&parts, None, |_| true).unwrap();
            assert_eq!(target.check_segments(), Ok(()), "{suffix}");
        }
    }
}
