//! The shape of the log: records as they are stored and published, and what is handed to an append.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::chain::{ChainHash, Fields};
use crate::events::Event;
use crate::ids::{Bucket, BucketKey, EndpointKey, InvalidName, Position};
use crate::time::Timestamp;

/// Largest event, as stored JSON. The store refuses larger ones.
pub const EVENT_BYTES_MAX: usize = 256 * 1024;

/// What a stream belongs to, and so what stands in its name behind the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamOf {
    /// `kind/WORKSPACE/NAME`.
    Endpoint,
    /// `kind/WORKSPACE/NAME/NODE`.
    EndpointAndNode,
    /// `kind/WORKSPACE`; it lies in the global bucket.
    Workspace,
}

impl StreamOf {
    /// Parts of a name, the kind included.
    const fn parts(self) -> usize {
        match self {
            Self::Workspace => 2,
            Self::Endpoint => 3,
            Self::EndpointAndNode => 4,
        }
    }
}

/// Declares the kinds of streams, with all that is known of each, so that none can lack a part of it.
macro_rules! streams {
    ($($(#[$doc:meta])* $variant:ident = $name:literal of $of:ident by $writer:literal,)*) => {
        /// The kinds of streams; the first part of a stream's name, one writing service each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum StreamKind { $($(#[$doc])* $variant,)* }

        impl StreamKind {
            /// All kinds of this release.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As it stands in names of streams.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What its streams belong to.
            pub const fn of(self) -> StreamOf {
                match self { $(Self::$variant => StreamOf::$of,)* }
            }

            /// The service that writes its streams, and nobody else does.
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
    /// Which instances there should be.
    Instances = "instances" of Endpoint by "actuator",
    /// What became of the instances, as their node tells it.
    Node = "node" of EndpointAndNode by "actuator",
    /// Minutes of usage.
    Usage = "usage" of Endpoint by "meter",
    /// Tokens.
    Access = "access" of Workspace by "control",
    /// Which gateways and nodes there are.
    Members = "members" of Workspace by "control",
    /// What people decided about events that a consumer cannot digest.
    Parking = "parking" of Endpoint by "control",
}

impl StreamKind {
    /// The kind of the stream of this name; none of one that this release does not know.
    pub fn of_name(stream: &str) -> Option<Self> {
        let (kind, _) = stream.split_once('/')?;
        Self::ALL
            .iter()
            .copied()
            .find(|known| known.as_str() == kind)
    }
}

/// The name of a stream: `kind/workspace/endpoint`, `node/workspace/endpoint/NODE` for what one
/// node reports, or `access/workspace` and `members/workspace`, which belong to no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StreamName(String);

impl StreamName {
    /// The stream of this kind about an endpoint.
    pub fn of(kind: StreamKind, endpoint: &EndpointKey) -> Self {
        Self(format!("{}/{endpoint}", kind.as_str()))
    }

    /// The stream in which one node answers for its instances of an endpoint.
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

    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Which service writes it; none where a newer release has named a kind that this one does not
    /// know.
    pub fn kind(&self) -> Option<StreamKind> {
        StreamKind::of_name(&self.0)
    }

    /// What decides the bucket of this stream.
    pub fn bucket_key(&self) -> BucketKey {
        self.endpoint()
            .map_or(BucketKey::Global, BucketKey::Endpoint)
    }

    /// The endpoint that the stream belongs to; `None` for global streams.
    pub fn endpoint(&self) -> Option<EndpointKey> {
        let mut parts = self.0.split('/').skip(1);
        let workspace = parts.next()?;
        let endpoint = parts.next()?;
        format!("{workspace}/{endpoint}").parse().ok()
    }
}

impl FromStr for StreamName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let kind = StreamKind::of_name(text);
        let shape_known = kind.is_some_and(|kind| text.split('/').count() == kind.of().parts());
        if shape_known {
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

/// An event that is to be appended. The id is time-ordered (UUIDv7) and made by the caller.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// Never used for another event; the same again is the same event.
    pub id: Uuid,
    /// When it happened, by the clock of who appends it.
    pub time: Timestamp,
    /// Who caused it.
    pub actor: Actor,
    /// What happened.
    pub event: Event,
}

/// An event as it stands in the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Its place in the log; rises, not without gaps.
    pub position: Position,
    /// The bucket's previous position; `Position::START` for the first.
    pub prev: Position,
    /// The bucket of its stream.
    pub bucket: Bucket,
    /// Where it was appended.
    pub stream: StreamName,
    /// 1 for a stream's first event.
    pub version: u64,
    /// Made by who appended it (UUIDv7).
    pub id: Uuid,
    /// When it happened, by the clock of who appended it.
    pub time: Timestamp,
    /// Who caused it.
    pub actor: Actor,
    /// What happened, brought to the present version of its type.
    #[serde(flatten)]
    pub event: Event,
}

impl Record {
    /// The endpoint that it belongs to; none for tokens and members.
    pub fn endpoint(&self) -> Option<EndpointKey> {
        self.stream.endpoint()
    }
}

/// An event as the log has it, not decoded: a newer release may have written it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawRecord {
    /// Its place in the log.
    pub position: Position,
    /// The bucket's previous position; `Position::START` for the first.
    pub prev: Position,
    /// The hash of the event at `prev`. None where it is not known: a release from before the chain
    /// has published the event.
    pub prev_hash: Option<ChainHash>,
    /// The bucket of its stream.
    pub bucket: Bucket,
    /// The name of its stream, of whatever kind.
    pub stream: String,
    /// 1 for a stream's first event.
    pub version: u64,
    /// A UUID, as text.
    pub id: String,
    /// Such as `scaling.decided`.
    pub type_name: String,
    /// The version in which its data are written.
    pub type_version: u32,
    /// When it happened, by the clock of who appended it.
    pub time: Timestamp,
    /// Who caused it: `token:NAME` or `service:NAME`.
    pub actor: String,
    /// JSON.
    pub data: String,
}

impl RawRecord {
    /// A record as this release writes it.
    ///
    /// # Errors
    ///
    /// Where the event cannot be written as JSON, such as a number that is not finite.
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

    /// Whether it is this event that stands in another place, where the hash of what is before it may
    /// not be known.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let hashes = self.prev_hash.zip(other.prev_hash);
        hashes.is_none_or(|(ours, theirs)| ours == theirs) && self.has_fields_of(other)
    }

    /// Whether all is the same but, perhaps, what came before it.
    pub fn has_fields_of(&self, other: &Self) -> bool {
        let (ours, theirs) = (Fields::of(self), Fields::of(other));
        ours.numbers == theirs.numbers && ours.texts == theirs.texts
    }
}

/// A change to one row of a read model, made in the same commit as what caused it. Rows can be
/// dropped and rebuilt from the log.
#[derive(Clone, Debug, PartialEq)]
pub struct RowChange {
    /// Which read model, such as `endpoints`.
    pub model: &'static str,
    /// Which row of the model; unique there.
    pub key: String,
    /// For filters; empty where the row belongs to none.
    pub endpoint: String,
    /// For filters, with `endpoint`; empty where the row belongs to none.
    pub deployment: String,
    /// Of the event that the row shows; lists are in descending order of it.
    pub position: Position,
    /// Of the same event.
    pub time: Timestamp,
    /// JSON; `None` deletes the row.
    pub doc: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_lies_in_the_bucket_of_its_endpoint() {
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
    fn every_kind_of_stream_has_the_shape_of_what_it_belongs_to_and_a_writer() {
        for kind in StreamKind::ALL {
            let name = kind.as_str();
            let shapes = [
                (StreamOf::Workspace, format!("{name}/default")),
                (StreamOf::Endpoint, format!("{name}/default/iris")),
                (StreamOf::EndpointAndNode, format!("{name}/default/iris/n1")),
            ];
            for (of, text) in shapes {
                let fits = text.parse::<StreamName>().is_ok();
                assert_eq!(fits, kind.of() == of, "{text}");
            }
            assert!(!kind.writer().is_empty(), "{name}");
        }
        assert!("toys/default/iris".parse::<StreamName>().is_err());
    }
}
