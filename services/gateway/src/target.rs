//! From a request to its endpoint: by path or by host name, and what its key says.

use http::HeaderMap;
use http::header::{AUTHORIZATION, HOST};
use http::request::Parts;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::reply::Refusal;
use crate::router::Endpoint;

const PREFIX: &str = "/endpoints/";
const SCORE: &str = "/score";

/// The endpoint's name and what the instance is asked for: what follows the name, from `/score` on,
/// with the query.
#[derive(Debug, PartialEq, Eq)]
pub struct Target<'a> {
    pub endpoint: &'a str,
    pub rest: &'a str,
}

impl<'a> Target<'a> {
    /// Path and query of a request, of which the target is a part.
    pub fn path(parts: &Parts) -> &str {
        parts.uri.path_and_query().map_or("/", |path| path.as_str())
    }

    /// Finds the target in the path, or in the host name under `domain`.
    pub fn of(parts: &'a Parts, domain: Option<&str>) -> Result<Self, Refusal> {
        let path = Self::path(parts);
        let target = match path.strip_prefix(PREFIX) {
            Some(tail) => {
                let end = tail.find(['/', '?']).ok_or(Refusal::UnknownEndpoint)?;
                let (endpoint, rest) = tail.split_at(end);
                Self { endpoint, rest }
            }
            None => Self {
                endpoint: host_endpoint(parts, domain).ok_or(Refusal::UnknownEndpoint)?,
                rest: path,
            },
        };
        target.check()?;
        Ok(target)
    }

    fn check(&self) -> Result<(), Refusal> {
        if self.rest == SCORE {
            return Ok(());
        }
        let below = self
            .rest
            .strip_prefix(SCORE)
            .filter(|below| below.starts_with(['/', '?']))
            .ok_or(Refusal::UnknownEndpoint)?;
        let path = below.split_once('?').map_or(below, |(path, _)| path);
        if climbs(path) {
            return Err(Refusal::Path);
        }
        Ok(())
    }
}

/// Rounds of percent signs that are looked through: an instance behind a proxy of its own may have
/// them resolved twice.
const DECODED_MAX: usize = 2;

/// Whether an instance may find `.` or `..` in the path, however they or the slashes beside them
/// are written: with percent signs, as backslashes, with parameters behind a semicolon.
fn climbs(path: &str) -> bool {
    // Without any of these there is no such segment, and most paths have none.
    if !path.bytes().any(|byte| matches!(byte, b'.' | b'%')) {
        return false;
    }
    let mut path = path.as_bytes().to_vec();
    for _ in 0..DECODED_MAX {
        if has_dots(&path) || !decode(&mut path) {
            break;
        }
    }
    has_dots(&path)
}

fn has_dots(path: &[u8]) -> bool {
    path.split(|byte| matches!(byte, b'/' | b'\\'))
        .filter_map(|segment| segment.split(|byte| *byte == b';').next())
        .any(|segment| matches!(segment, b"." | b".."))
}

/// Resolves percent signs in place; false where there are none.
fn decode(path: &mut Vec<u8>) -> bool {
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

fn host_endpoint<'a>(parts: &'a Parts, domain: Option<&str>) -> Option<&'a str> {
    let domain = domain?;
    let host = match parts.uri.host() {
        Some(host) => host,
        None => parts.headers.get(HOST)?.to_str().ok()?,
    };
    let host = host.split_once(':').map_or(host, |(host, _)| host);
    let (endpoint, rest) = host.split_once('.')?;
    rest.eq_ignore_ascii_case(domain).then_some(endpoint)
}

/// Whether the request carries one of the endpoint's keys. Every key is compared whole, so the time
/// it takes tells nothing.
pub fn authorize(endpoint: &Endpoint, headers: &HeaderMap) -> Result<(), Refusal> {
    let header = headers.get(AUTHORIZATION).ok_or(Refusal::NoKey)?.as_bytes();
    let (scheme, key) = header.split_at_checked(7).ok_or(Refusal::NoKey)?;
    if !scheme.eq_ignore_ascii_case(b"bearer ") {
        return Err(Refusal::NoKey);
    }
    let digest: [u8; 32] = Sha256::digest(key).into();
    let known = endpoint
        .keys
        .iter()
        .fold(Choice::from(0), |known, valid| known | valid.ct_eq(&digest));
    if bool::from(known) {
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
        ];
        for (uri, host, endpoint, rest) in cases {
            let parts = parts(uri, host);
            let target = Target::of(&parts, Some("ml.example"));
            assert_eq!(target, Ok(Target { endpoint, rest }), "{uri} {host}");
        }
    }

    #[test]
    fn other_paths_and_hosts_lead_nowhere() {
        for (uri, host) in [
            ("/", "x"),
            ("/endpoints/iris", "x"),
            ("/endpoints/iris/", "x"),
            ("/endpoints/iris/scores", "x"),
            ("/endpoints/iris/other", "x"),
            ("/score", "iris.other.example"),
            ("/score", "a.iris.ml.example"),
            ("/other", "iris.ml.example"),
        ] {
            let parts = parts(uri, host);
            let target = Target::of(&parts, Some("ml.example"));
            assert_eq!(target, Err(Refusal::UnknownEndpoint), "{uri} {host}");
        }
        let by_host = parts("/score", "iris.ml.example");
        assert!(Target::of(&by_host, None).is_err());
    }

    #[test]
    fn a_path_cannot_climb_out_of_the_scoring_path() {
        for rest in [
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
            let parts = parts(&format!("/endpoints/iris/score{rest}"), "x");
            assert_eq!(Target::of(&parts, None), Err(Refusal::Path), "{rest}");
        }
        for rest in [
            "/...",
            "/a..b/.c/d.",
            "/a%2fb",
            "/50%",
            "/%zz",
            "/a;b=..",
            "/a?b=/../c",
        ] {
            let parts = parts(&format!("/endpoints/iris/score{rest}"), "x");
            assert!(Target::of(&parts, None).is_ok(), "{rest}");
        }
    }
}
