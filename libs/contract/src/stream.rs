//! Streams: their kinds, what each belongs to and who writes it, and their names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{BucketKey, EndpointKey, InvalidName};

/// What a stream belongs to, which determines the rest of its name after the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamScope {
    /// `kind/WORKSPACE/NAME`.
    Endpoint,
    /// `kind/WORKSPACE/NAME/NODE`.
    EndpointAndNode,
    /// `kind/WORKSPACE`, in the global bucket.
    Workspace,
}

impl StreamScope {
    /// The number of parts in a name, including the kind.
    const fn part_count(self) -> usize {
        match self {
            Self::Workspace => 2,
            Self::Endpoint => 3,
            Self::EndpointAndNode => 4,
        }
    }
}

/// Declares the kinds of streams with all their properties, so that none can lack one.
macro_rules! streams {
    ($($(#[$doc:meta])* $variant:ident = $name:literal of $scope:ident by $writer:literal,)*) => {
        /// The kind of a stream: the first part of its name. Each kind has one writing service.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum StreamKind { $($(#[$doc])* $variant,)* }

        impl StreamKind {
            /// All kinds of this release.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The kind as it appears in stream names.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What streams of this kind belong to.
            pub const fn scope(self) -> StreamScope {
                match self { $(Self::$variant => StreamScope::$scope,)* }
            }

            /// The only service that writes streams of this kind.
            pub const fn writer(self) -> &'static str {
                match self { $(Self::$variant => $writer,)* }
            }
        }
    };
}

streams! {
    /// Specs, traffic, keys, autoscale settings.
    Endpoint = "endpoint" of Endpoint by "control",
    /// Decisions.
    Scaling = "scaling" of Endpoint by "autoscaler",
    /// The instances that should exist.
    Instances = "instances" of Endpoint by "actuator",
    /// The state of the instances, as reported by their node.
    Node = "node" of EndpointAndNode by "actuator",
    /// Closed minutes of usage.
    Usage = "usage" of Endpoint by "meter",
    /// Tokens.
    Access = "access" of Workspace by "control",
    /// Gateways and nodes.
    Members = "members" of Workspace by "control",
    /// Decisions of operators about events that a consumer cannot process.
    Parking = "parking" of Endpoint by "control",
}

impl StreamKind {
    /// Returns the kind of the stream with this name; `None` if this release does not know it.
    pub fn from_stream_name(stream: &str) -> Option<Self> {
        let (kind, _) = stream.split_once('/')?;
        Self::ALL
            .iter()
            .copied()
            .find(|known| known.as_str() == kind)
    }
}

/// The name of a stream: `kind/workspace/endpoint`, `node/workspace/endpoint/NODE` for the reports of
/// one node, or `access/workspace` and `members/workspace`, which belong to no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StreamName(String);

impl StreamName {
    /// The stream of this kind for an endpoint.
    pub fn of(kind: StreamKind, endpoint: &EndpointKey) -> Self {
        Self(format!("{}/{endpoint}", kind.as_str()))
    }

    /// The stream in which a node reports its instances of an endpoint.
    pub fn of_node(endpoint: &EndpointKey, node: &str) -> Self {
        Self(format!("{}/{endpoint}/{node}", StreamKind::Node.as_str()))
    }

    /// The stream of tokens.
    pub fn access() -> Self {
        Self::of_workspace(StreamKind::Access)
    }

    /// The stream of gateways and nodes.
    pub fn members() -> Self {
        Self::of_workspace(StreamKind::Members)
    }

    fn of_workspace(kind: StreamKind) -> Self {
        Self(format!(
            "{}/{}",
            kind.as_str(),
            crate::ids::DEFAULT_WORKSPACE
        ))
    }

    /// The full name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The kind of the stream; `None` if only a newer release knows it.
    pub fn kind(&self) -> Option<StreamKind> {
        StreamKind::from_stream_name(&self.0)
    }

    /// The key that determines the bucket of this stream.
    pub fn bucket_key(&self) -> BucketKey {
        self.endpoint()
            .map_or(BucketKey::Global, BucketKey::Endpoint)
    }

    /// The endpoint that the stream belongs to; `None` for global streams.
    pub fn endpoint(&self) -> Option<EndpointKey> {
        let (_, key) = self.0.split_once('/')?;
        let (workspace, rest) = key.split_once('/')?;
        let endpoint = rest.find('/').unwrap_or(rest.len());
        let end = workspace.len() + 1 + endpoint;
        key.get(..end)?.parse().ok()
    }

    /// The node whose reports the stream holds; `None` for other streams.
    pub fn node(&self) -> Option<&str> {
        let is_of_node = self.kind() == Some(StreamKind::Node);
        let (_, node) = self.0.rsplit_once('/').filter(|_| is_of_node)?;
        Some(node)
    }
}

impl FromStr for StreamName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let kind = StreamKind::from_stream_name(text);
        let is_valid =
            kind.is_some_and(|kind| text.split('/').count() == kind.scope().part_count());
        if is_valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName(text.to_owned()))
        }
    }
}

impl fmt::Display for StreamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A release with one more kind of stream.
    mod toy {
        use super::super::StreamScope;

        streams! {
            /// Toys of an endpoint.
            Toys = "toys" of Endpoint by "toy",
        }
    }

    #[test]
    fn a_line_makes_a_kind_of_stream() {
        let kind = toy::StreamKind::Toys;
        assert_eq!(toy::StreamKind::ALL, [kind]);
        assert_eq!((kind.as_str(), kind.writer()), ("toys", "toy"));
        assert_eq!(kind.scope(), StreamScope::Endpoint);
    }

    #[test]
    fn a_stream_is_in_the_bucket_of_its_endpoint() {
        let endpoint = EndpointKey::new(&"iris".parse().unwrap());
        let streams = [
            StreamName::of(StreamKind::Endpoint, &endpoint),
            StreamName::of(StreamKind::Scaling, &endpoint),
            StreamName::of_node(&endpoint, "n1"),
        ];
        for stream in streams {
            assert_eq!(stream.bucket_key().bucket(), endpoint.bucket(), "{stream}");
            assert_eq!(stream.as_str().parse::<StreamName>().unwrap(), stream);
        }
        assert_eq!(StreamName::of_node(&endpoint, "n1").node(), Some("n1"));
        assert_eq!(
            StreamName::of(StreamKind::Instances, &endpoint).node(),
            None
        );
        for stream in [StreamName::access(), StreamName::members()] {
            assert_eq!(stream.bucket_key(), BucketKey::Global, "{stream}");
            assert_eq!(stream.as_str().parse::<StreamName>().unwrap(), stream);
        }
    }

    #[test]
    fn every_kind_of_stream_accepts_only_names_of_its_scope_and_has_a_writer() {
        for kind in StreamKind::ALL {
            let name = kind.as_str();
            let shapes = [
                (StreamScope::Workspace, format!("{name}/default")),
                (StreamScope::Endpoint, format!("{name}/default/iris")),
                (
                    StreamScope::EndpointAndNode,
                    format!("{name}/default/iris/n1"),
                ),
            ];
            for (scope, text) in shapes {
                let is_valid = text.parse::<StreamName>().is_ok();
                assert_eq!(is_valid, kind.scope() == scope, "{text}");
            }
            assert!(!kind.writer().is_empty(), "{name}");
        }
        assert!("toys/default/iris".parse::<StreamName>().is_err());
    }
}
