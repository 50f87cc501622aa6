//! Which paths of an endpoint its deployments serve, and the paths of an instance that they reach. All of
//! it is computed once per route: where no deployment has `routes`, a request allocates nothing here.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use contract::resources::Routes;
use http::Method;

use crate::reply::Refusal;
use crate::split::Split;

const SCORE: &str = "/score";

/// The paths that `routes` may treat differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// Exactly `/score`.
    Scoring,
    BelowScoring,
    Other,
}

impl PathKind {
    /// `path` is what follows the endpoint's name, with the query.
    pub fn of(path: &str) -> Self {
        match path.strip_prefix(SCORE).map(str::as_bytes) {
            Some([] | [b'?', ..]) => Self::Scoring,
            Some([b'/', ..]) => Self::BelowScoring,
            _ => Self::Other,
        }
    }
}

/// The `routes` of a deployment.
#[derive(Debug)]
pub struct DeploymentPaths {
    scoring: Option<String>,
    /// Without a slash at its end.
    prefix: Option<String>,
    /// Besides POST.
    counted_methods: Vec<&'static str>,
}

impl DeploymentPaths {
    pub fn new(routes: &Routes) -> Self {
        let prefix = routes.prefix.as_deref();
        Self {
            scoring: routes.scoring.clone(),
            prefix: prefix.map(|prefix| prefix.trim_end_matches('/').to_owned()),
            counted_methods: routes.counted_methods.iter().map(|m| m.as_str()).collect(),
        }
    }

    pub fn opens(&self, kind: PathKind) -> bool {
        match kind {
            PathKind::Scoring => true,
            PathKind::BelowScoring => self.prefix.is_some() || self.scoring.is_none(),
            PathKind::Other => self.prefix.is_some(),
        }
    }

    /// Whether requests with this method count in frames.
    pub fn counts(&self, method: &Method) -> bool {
        *method == Method::POST || self.counted_methods.contains(&method.as_str())
    }

    /// The instance's path and query for the endpoint's.
    pub fn upstream_path<'a>(&self, kind: PathKind, path: &'a str) -> Cow<'a, str> {
        match (kind, &self.scoring, &self.prefix) {
            (PathKind::Scoring, Some(scoring), _) => {
                Cow::Owned([scoring, &path[SCORE.len()..]].concat())
            }
            (PathKind::Scoring, None, _) | (_, _, None) => Cow::Borrowed(path),
            (_, _, Some(prefix)) => match (prefix.as_str(), path.starts_with('/')) {
                ("", true) => Cow::Borrowed(path),
                ("", false) => Cow::Owned(["/", path].concat()),
                (prefix, _) => Cow::Owned([prefix, path].concat()),
            },
        }
    }

    /// The endpoint's path and query for the instance's, if one reaches it.
    pub fn endpoint_path<'a>(&self, path: &'a str) -> Option<Cow<'a, str>> {
        let end = path.find(['?', '#']).unwrap_or(path.len());
        let (own, rest) = path.split_at(end);
        if self.scoring.as_deref() == Some(own) {
            return Some(Cow::Owned([SCORE, rest].concat()));
        }
        let Some(prefix) = &self.prefix else {
            let kind = PathKind::of(path);
            let is_reached = match kind {
                PathKind::Scoring => self.scoring.is_none(),
                PathKind::BelowScoring | PathKind::Other => self.opens(kind),
            };
            return is_reached.then_some(path.into());
        };
        let path = path.strip_prefix(prefix.as_str())?;
        (path.is_empty() || path.starts_with(['/', '?', '#'])).then_some(path.into())
    }
}

/// How the requests for one kind of path are shared among the deployments that open it.
#[derive(Debug)]
pub struct PathShares {
    is_open: bool,
    split: Option<Split>,
    /// Requests that went through the split; shared by all snapshots of this incarnation.
    count: Arc<AtomicU64>,
}

impl PathShares {
    /// `percentages`: of every deployment; `None` if it does not open the path.
    pub fn new(
        percentages: impl Iterator<Item = Option<u8>> + Clone,
        previous: Option<&Self>,
    ) -> Self {
        Self {
            is_open: percentages.clone().any(|percent| percent.is_some()),
            split: Split::new(percentages.map(Option::unwrap_or_default)),
            count: previous.map_or_else(Arc::default, |previous| previous.count.clone()),
        }
    }

    /// Returns the index of the next request's deployment.
    pub fn pick(&self) -> Result<usize, Refusal> {
        match &self.split {
            Some(split) => Ok(split.pick(self.count.fetch_add(1, Ordering::Relaxed))),
            None if self.is_open => Err(Refusal::NoTraffic),
            None => Err(Refusal::UnknownPath),
        }
    }
}

/// How requests are shared where deployments have `routes`, besides those to `/score`.
#[derive(Debug)]
pub struct RoutedShares {
    pub below_scoring: PathShares,
    pub other: PathShares,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_an_instance_is_led_back_to_the_endpoints() {
        let paths = |scoring: Option<&str>, prefix: Option<&str>| {
            DeploymentPaths::new(&Routes {
                scoring: scoring.map(Into::into),
                prefix: prefix.map(Into::into),
                ..Routes::default()
            })
        };
        let cases = [
            (
                Some("/invocations"),
                None,
                "/invocations?a",
                Some("/score?a"),
            ),
            (Some("/invocations"), None, "/v1/x", None),
            (Some("/invocations"), Some("/"), "/v1/x", Some("/v1/x")),
            (None, Some("/api"), "/api/v1?x", Some("/v1?x")),
            (None, Some("/api"), "/apis", None),
            (None, Some("/api"), "/other", None),
        ];
        for (scoring, prefix, path, expected) in cases {
            let back = paths(scoring, prefix);
            assert_eq!(back.endpoint_path(path).as_deref(), expected, "{path}");
        }
    }

    fn upstream(scoring: Option<&str>, prefix: Option<&str>, path: &str) -> Option<String> {
        let paths = DeploymentPaths::new(&Routes {
            scoring: scoring.map(Into::into),
            prefix: prefix.map(Into::into),
            ..Routes::default()
        });
        let kind = PathKind::of(path);
        let upstream = paths.upstream_path(kind, path).into_owned();
        paths.opens(kind).then_some(upstream)
    }

    #[test]
    fn a_path_reaches_what_the_routes_say_with_its_query() {
        let (invocations, root, api) = (Some("/invocations"), Some("/"), Some("/api/"));
        for (scoring, prefix, path, expected) in [
            (None, None, "/score?a=1", Some("/score?a=1")),
            (None, None, "/score/x", Some("/score/x")),
            (None, None, "/v1", None),
            (invocations, None, "/score", Some("/invocations")),
            (invocations, None, "/score?a=1", Some("/invocations?a=1")),
            (invocations, None, "/score/x", None),
            (invocations, None, "/scores", None),
            (invocations, root, "/score", Some("/invocations")),
            (invocations, root, "/score/x?a", Some("/score/x?a")),
            (invocations, root, "/invocations", Some("/invocations")),
            (None, root, "/v1/a%20b?c=d/..", Some("/v1/a%20b?c=d/..")),
            (None, root, "", Some("/")),
            (None, root, "?a", Some("/?a")),
            (None, api, "/score", Some("/score")),
            (None, api, "/v1", Some("/api/v1")),
            (None, api, "/", Some("/api/")),
            (None, api, "", Some("/api")),
            (None, api, "?a", Some("/api?a")),
        ] {
            let reached = upstream(scoring, prefix, path);
            assert_eq!(
                reached.as_deref(),
                expected,
                "{scoring:?} {prefix:?} {path}"
            );
        }
    }
}
