//! The records of the log, as they are stored and published, and the input of an append.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::chain::{ChainHash, HashedFields};
use crate::events::Event;
use crate::ids::{Bucket, BucketKey, EndpointKey, InvalidName, Position};
use crate::time::Timestamp;

/// Maximum size of an event as stored JSON. The store rejects larger ones.
pub const EVENT_BYTES_MAX: usize = 256 * 1024;

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

/// Who caused an event: `token:NAME` for a person or program, `service:NAME` for Penstock itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Actor(pub String);

impl Actor {
    /// A person or a program, by the name of its token.
    pub fn token(name: &str) -> Self {
        Self(format!("token:{name}"))
    }

    /// A service of Penstock, by its name.
    pub fn service(name: &str) -> Self {
        Self(format!("service:{name}"))
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An event to append. The caller generates its time-ordered id (UUIDv7).
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// Unique to the event: the same id means the same event.
    pub id: Uuid,
    /// When it happened, by the clock of the writer.
    pub time: Timestamp,
    /// Who caused it.
    pub actor: Actor,
    /// What happened.
    pub event: Event,
}

/// An event in the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Its position in the log. Increases, with gaps.
    pub position: Position,
    /// The bucket's previous position; `Position::START` for the first.
    pub prev: Position,
    /// The bucket of its stream.
    pub bucket: Bucket,
    /// The stream that it was appended to.
    pub stream: StreamName,
    /// 1 for a stream's first event.
    pub version: u64,
    /// Generated by the writer (UUIDv7).
    pub id: Uuid,
    /// When it happened, by the clock of the writer.
    pub time: Timestamp,
    /// Who caused it.
    pub actor: Actor,
    /// What happened, upcast to the current version of its type.
    #[serde(flatten)]
    pub event: Event,
}

impl Record {
    /// The endpoint that it belongs to; `None` for tokens and members.
    pub fn endpoint(&self) -> Option<EndpointKey> {
        self.stream.endpoint()
    }
}

/// An event as stored in the log, not decoded: a newer release may have written it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawRecord {
    /// Its position in the log.
    pub position: Position,
    /// The bucket's previous position; `Position::START` for the first.
    pub prev: Position,
    /// The hash of the event at `prev`; `None` if unknown, because a release without hash chains published
    /// the event.
    pub prev_hash: Option<ChainHash>,
    /// The bucket of its stream.
    pub bucket: Bucket,
    /// The name of its stream, of any kind.
    pub stream: String,
    /// 1 for a stream's first event.
    pub version: u64,
    /// A UUID, as text.
    pub id: String,
    /// The type, such as `scaling.decided`.
    pub type_name: String,
    /// The version of the type that `data` is written in.
    pub type_version: u32,
    /// When it happened, by the clock of the writer.
    pub time: Timestamp,
    /// Who caused it: `token:NAME` or `service:NAME`.
    pub actor: String,
    /// The data as JSON.
    pub data: String,
}

impl RawRecord {
    /// Encodes a record as this release writes it.
    ///
    /// # Errors
    ///
    /// Returns an error if the event cannot be written as JSON, such as a number that is not finite.
    pub fn of(record: &Record) -> Result<Self, serde_json::Error> {
        Ok(Self {
            position: record.position,
            prev: record.prev,
            prev_hash: None,
            bucket: record.bucket,
            stream: record.stream.as_str().to_owned(),
            version: record.version,
            id: record.id.to_string(),
            type_name: record.event.type_name().to_owned(),
            type_version: record.event.version(),
            time: record.time,
            actor: record.actor.0.clone(),
            data: record.event.data_json()?,
        })
    }

    /// Whether `other` is a copy of this event. A previous hash that one of them lacks is not compared.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let hashes = self.prev_hash.zip(other.prev_hash);
        hashes.is_none_or(|(ours, theirs)| ours == theirs) && self.has_same_fields(other)
    }

    /// Whether all fields are the same, apart from the previous hash.
    pub fn has_same_fields(&self, other: &Self) -> bool {
        let (ours, theirs) = (HashedFields::of(self), HashedFields::of(other));
        ours.numbers == theirs.numbers && ours.texts == theirs.texts
    }
}

/// A change to one row of a read model, in the same commit as the event that caused it. Rows can be
/// dropped and rebuilt from the log.
#[derive(Clone, Debug, PartialEq)]
pub struct RowChange {
    /// The read model, such as `endpoints`.
    pub model: &'static str,
    /// The key of the row, unique within the model.
    pub key: String,
    /// For filters; empty if the row belongs to no endpoint.
    pub endpoint: String,
    /// For filters, with `endpoint`; empty if the row belongs to no deployment.
    pub deployment: String,
    /// The position of the event that the row shows. Lists are in descending order of it.
    pub position: Position,
    /// The time of the same event.
    pub time: Timestamp,
    /// The row as JSON; `None` deletes it.
    pub doc: Option<String>,
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
