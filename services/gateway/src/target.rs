//! Resolves a request to its endpoint, by path or host name, and checks its key.

use std::borrow::Cow;

use http::HeaderMap;
use http::header::{AUTHORIZATION, HOST};
use http::request::Parts;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::reply::Refusal;
use crate::router::Endpoint;

const PREFIX: &str = "/endpoints/";
const SCORE: &str = "/score";

/// The endpoint's name, and the path and query for the instance: what follows the name, from
/// `/score` on.
#[derive(Debug, PartialEq, Eq)]
pub struct ScoringTarget<'a> {
    pub endpoint: Cow<'a, str>,
    pub upstream_path: &'a str,
}

impl<'a> ScoringTarget<'a> {
    /// The request's path and query.
    pub fn path_and_query(parts: &Parts) -> &str {
        parts.uri.path_and_query().map_or("/", |path| path.as_str())
    }

    /// Finds the target in the path, or in the host name under `domain`.
    pub fn parse(parts: &'a Parts, domain: Option<&str>) -> Result<Self, Refusal> {
        let path = Self::path_and_query(parts);
        let target = match path.strip_prefix(PREFIX) {
            Some(tail) => {
                let end = tail.find(['/', '?']).ok_or(Refusal::UnknownEndpoint)?;
                let (endpoint, upstream_path) = tail.split_at(end);
                Self {
                    endpoint: endpoint.into(),
                    upstream_path,
                }
            }
            None => Self {
                endpoint: host_endpoint(parts, domain).ok_or(Refusal::UnknownEndpoint)?,
                upstream_path: path,
            },
        };
        target.check()?;
        Ok(target)
    }

    fn check(&self) -> Result<(), Refusal> {
        if self.upstream_path == SCORE {
            return Ok(());
        }
        let suffix = self
            .upstream_path
            .strip_prefix(SCORE)
            .filter(|suffix| suffix.starts_with(['/', '?']))
            .ok_or(Refusal::UnknownEndpoint)?;
        let path = suffix.split_once('?').map_or(suffix, |(path, _)| path);
        if is_traversal(path) {
            return Err(Refusal::Path);
        }
        Ok(())
    }
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
pub fn authorize(endpoint: &Endpoint, headers: &HeaderMap) -> Result<(), Refusal> {
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
            ("/score", "Iris.ml.example.", "iris", "/score"),
            ("/score", "iris.ml.example.:80", "iris", "/score"),
            ("/endpoints/Iris/score", "x", "Iris", "/score"),
        ];
        for (uri, host, endpoint, upstream_path) in cases {
            let parts = parts(uri, host);
            let target = ScoringTarget::parse(&parts, Some("ml.example"));
            assert_eq!(
                target,
                Ok(ScoringTarget {
                    endpoint: endpoint.into(),
                    upstream_path
                }),
                "{uri} {host}"
            );
        }
    }

    #[test]
    fn other_paths_and_hosts_match_no_endpoint() {
        for (uri, host) in [
            ("/", "x"),
            ("/endpoints/iris", "x"),
            ("/endpoints/iris/", "x"),
            ("/endpoints/iris/scores", "x"),
            ("/endpoints/iris/other", "x"),
            ("/score", "iris.other.example"),
            ("/score", "a.iris.ml.example"),
            ("/score", "iris.ml.example.."),
            ("/other", "iris.ml.example"),
        ] {
            let parts = parts(uri, host);
            let target = ScoringTarget::parse(&parts, Some("ml.example"));
            assert_eq!(target, Err(Refusal::UnknownEndpoint), "{uri} {host}");
        }
        let by_host = parts("/score", "iris.ml.example");
        assert!(ScoringTarget::parse(&by_host, None).is_err());
    }

    #[test]
    fn a_path_cannot_escape_from_the_scoring_path() {
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
            assert_eq!(
                ScoringTarget::parse(&parts, None),
                Err(Refusal::Path),
                "{suffix}"
            );
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
            assert!(ScoringTarget::parse(&parts, None).is_ok(), "{suffix}");
        }
    }
}
