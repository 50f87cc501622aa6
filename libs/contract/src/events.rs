//! Every event there is, with its stable name and version. What is written once is read for ever:
//! a changed shape raises the version and adds an upcaster; `tests/golden/events` holds a file for
//! each (type, version).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use uuid::Uuid;

use crate::decision::{Decision, Pause, Pin};
use crate::frame::Source;
use crate::ids::{DeploymentRef, InstanceId, Name, Position, Uid};
use crate::log::StreamKind;
use crate::resources::{
    AutoscaleSpec, BackendKind, DeploymentSpec, EndpointSpec, Labels, Percentages,
    ProvisioningState,
};
use crate::time::{Span, Timestamp};
use crate::usage::{self, UsageGap, UsageMinute};

/// Declares the enum, the names and versions, and both directions of the wire form at once, so that
/// no event can lack one of them.
macro_rules! events {
    ($($(#[$doc:meta])* $name:literal v $version:literal in [$($stream:ident),+] => $variant:ident($data:ty),)*) => {
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event { $($(#[$doc])* $variant($data),)* }

        /// Name and current version of every event type.
        pub const EVENT_TYPES: &[(&str, u32)] = &[$(($name, $version),)*];

        /// The JSON Schema of the data of every event type, in the version written now.
        pub fn event_schemas() -> Vec<(&'static str, u32, schemars::Schema)> {
            vec![$(($name, $version, schemars::schema_for!($data)),)*]
        }

        impl Event {
            pub fn type_name(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name,)* }
            }

            /// The version that this binary writes.
            pub fn version(&self) -> u32 {
                match self { $(Self::$variant(_) => $version,)* }
            }

            /// The kinds of streams that it may stand in: one writing service per stream.
            pub fn streams(&self) -> &'static [StreamKind] {
                match self { $(Self::$variant(_) => &[$(StreamKind::$stream),+],)* }
            }

            /// The `data` member of the stored event.
            pub fn data(&self) -> Result<Value, serde_json::Error> {
                match self { $(Self::$variant(data) => serde_json::to_value(data),)* }
            }

            /// The same as JSON text, without a detour over a tree.
            pub fn data_json(&self) -> Result<String, serde_json::Error> {
                match self { $(Self::$variant(data) => serde_json::to_string(data),)* }
            }

            /// Reads a stored event of any version up to the current one.
            pub fn decode(type_name: &str, version: u32, data: &str) -> Result<Self, DecodeError> {
                let fail = |source| DecodeError::Data { type_name: type_name.to_owned(), version, source };
                match type_name {
                    $($name if version == $version => serde_json::from_str(data).map(Self::$variant).map_err(fail),
                    $name if version < $version && has_present_shape(type_name, data) => {
                        serde_json::from_str(data).map(Self::$variant).map_err(fail)
                    }
                    $name if version < $version => {
                        let old = serde_json::from_str(data).map_err(fail)?;
                        let current = (version..$version).fold(old, |data, from| upcast(type_name, from, data));
                        serde_json::from_value(current).map(Self::$variant).map_err(fail)
                    })*
                    _ => Err(DecodeError::Unknown { type_name: type_name.to_owned(), version }),
                }
            }
        }
    };
}

events! {
    "endpoint.created" v 1 in [Endpoint] => EndpointCreated(EndpointCreated),
    "endpoint.updated" v 1 in [Endpoint] => EndpointUpdated(EndpointUpdated),
    "endpoint.traffic-set" v 1 in [Endpoint] => TrafficSet(TrafficSet),
    "endpoint.key-regenerated" v 1 in [Endpoint] => KeyRegenerated(KeyRegenerated),
    "endpoint.state-changed" v 1 in [Endpoint] => EndpointStateChanged(EndpointStateChanged),
    "endpoint.deletion-requested" v 1 in [Endpoint] => EndpointDeletionRequested(Empty),
    "endpoint.deleted" v 1 in [Endpoint] => EndpointDeleted(Empty),
    "deployment.created" v 1 in [Endpoint] => DeploymentCreated(DeploymentCreated),
    "deployment.updated" v 1 in [Endpoint] => DeploymentUpdated(DeploymentUpdated),
    "deployment.state-changed" v 1 in [Endpoint] => DeploymentStateChanged(DeploymentStateChanged),
    "deployment.deletion-requested" v 1 in [Endpoint] => DeploymentDeletionRequested(OfDeployment),
    "deployment.deleted" v 1 in [Endpoint] => DeploymentDeleted(OfDeployment),
    "autoscale.set" v 1 in [Endpoint] => AutoscaleSet(AutoscaleSet),
    "autoscale.removed" v 1 in [Endpoint] => AutoscaleRemoved(OfDeployment),
    "autoscale.pinned" v 1 in [Endpoint] => AutoscalePinned(AutoscalePinned),
    "autoscale.released" v 1 in [Endpoint] => AutoscaleReleased(OfDeployment),
    "autoscale.pause-set" v 1 in [Endpoint] => AutoscalePauseSet(AutoscalePauseSet),
    "scaling.decided" v 1 in [Scaling] => ScalingDecided(Box<Decision>),
    // Any owner of a bucket may find that its clock was set back.
    "clock.stepped" v 1 in [Endpoint, Scaling, Instances, Node, Usage] => ClockStepped(ClockStepped),
    "instance.requested" v 1 in [Instances] => InstanceRequested(Box<InstanceRequested>),
    "instance.draining" v 1 in [Instances] => InstanceDraining(InstanceDraining),
    "instance.removal-requested" v 1 in [Instances] => InstanceRemovalRequested(InstanceRemovalRequested),
    "instance.started" v 1 in [Node] => InstanceStarted(InstanceStarted),
    "instance.ready" v 1 in [Node] => InstanceReady(OfInstance),
    "instance.unready" v 1 in [Node] => InstanceUnready(InstanceUnready),
    "instance.failed" v 1 in [Node] => InstanceFailed(InstanceEnded),
    "instance.stopped" v 1 in [Node] => InstanceStopped(InstanceEnded),
    "usage.closed" v 2 in [Usage] => UsageClosed(UsageMinute),
    "usage.corrected" v 2 in [Usage] => UsageCorrected(UsageMinute),
    "usage.gap" v 1 in [Usage] => UsageGap(UsageGap),
    "access.granted" v 1 in [Access] => AccessGranted(AccessGranted),
    "access.revoked" v 1 in [Access] => AccessRevoked(AccessRevoked),
    "member.joined" v 1 in [Members] => MemberJoined(MemberJoined),
    "member.left" v 1 in [Members] => MemberLeft(MemberLeft),
    "event.skipped" v 1 in [Parking] => EventSkipped(EventSkipped),
    "consumer.unparked" v 1 in [Parking] => ConsumerUnparked(ConsumerUnparked),
}

/// Brings the data of one version to the shape of the next.
/// Whether the data of an older version need no upcaster, as it would leave them as they are. Most of a long
/// log is of few types, and to read data first as any JSON takes several times as long.
fn has_present_shape(type_name: &str, data: &str) -> bool {
    match type_name {
        "usage.closed" | "usage.corrected" => !data.contains(usage::MOVED_IN_2),
        _ => false,
    }
}

fn upcast(type_name: &str, from: u32, data: Value) -> Value {
    match (type_name, from) {
        ("usage.closed" | "usage.corrected", 1) => usage::upcast_1(data),
        _ => data,
    }
}

#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error(
        "event type `{type_name}` version {version} is not known to this binary; use the release that wrote it or a newer one"
    )]
    Unknown { type_name: String, version: u32 },
    #[error("the data of an event `{type_name}` version {version} cannot be read: {source}")]
    Data {
        type_name: String,
        version: u32,
        source: serde_json::Error,
    },
}

/// The wire form: `type`, `typeVersion`, `data`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    r#type: String,
    type_version: u32,
    data: Value,
}

impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Wire {
            r#type: self.type_name().to_owned(),
            type_version: self.version(),
            data: self.data().map_err(serde::ser::Error::custom)?,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        Self::decode(&wire.r#type, wire.type_version, &wire.data.to_string())
            .map_err(serde::de::Error::custom)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Empty {}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointCreated {
    pub uid: Uid,
    pub name: Name,
    pub labels: Labels,
    /// Without traffic and mirror, which have an event of their own.
    pub spec: EndpointSpec,
    pub keys: EndpointKeys,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct EndpointKeys {
    pub primary: SealedKey,
    pub secondary: SealedKey,
}

/// A key as it is stored: a hash for checking, and a copy that only control can open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SealedKey {
    /// SHA-256, hexadecimal.
    pub hash: String,
    /// Nonce and ciphertext (ChaCha20-Poly1305), base64.
    pub sealed: String,
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum KeySlot {
    Primary,
    Secondary,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointUpdated {
    pub labels: Labels,
    pub spec: EndpointSpec,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrafficSet {
    pub traffic: Percentages,
    pub mirror: Percentages,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyRegenerated {
    pub slot: KeySlot,
    pub key: SealedKey,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStateChanged {
    pub state: ProvisioningState,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OfDeployment {
    pub deployment: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentCreated {
    pub uid: Uid,
    pub deployment: Name,
    pub labels: Labels,
    pub spec: DeploymentSpec,
}

/// `revision` rises only when instances have to be replaced; see `domain::endpoint`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentUpdated {
    pub deployment: Name,
    pub revision: u64,
    pub labels: Labels,
    pub spec: DeploymentSpec,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentStateChanged {
    pub deployment: Name,
    pub state: ProvisioningState,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleSet {
    pub deployment: Name,
    /// Counts from 1 per deployment.
    pub revision: u64,
    pub labels: Labels,
    pub spec: AutoscaleSpec,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalePinned {
    pub deployment: Name,
    pub pin: Pin,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalePauseSet {
    pub deployment: Name,
    pub pause: Pause,
}

/// The owner's clock stands more than 5 s behind what the bucket has already recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClockStepped {
    pub recorded: Timestamp,
    pub clock: Timestamp,
}

/// Everything a node needs to start the instance; it has no choice left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRequested {
    pub id: InstanceId,
    /// Rises with each order about this instance; a backend refuses an older one.
    pub generation: u64,
    pub deployment: DeploymentRef,
    pub deployment_uid: Uid,
    /// The deployment's revision that the instance is made of.
    pub revision: u64,
    pub node: String,
    /// Event id of the decision that asked for it.
    pub decision: Option<Uuid>,
    pub reason: RequestReason,
    pub spec: DeploymentSpec,
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum RequestReason {
    ScaleOut,
    /// In place of one that failed.
    Replacement,
    /// The deployment changed.
    Rollout,
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum RemovalReason {
    ScaleIn,
    Rollout,
    Unhealthy,
    Deleted,
    /// It failed or ended by itself; what is left is cleared away.
    Ended,
    /// Its node has left, and does not answer for it any more.
    NodeLost,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceDraining {
    pub id: InstanceId,
    pub reason: RemovalReason,
    /// Event id of the decision that asked for it.
    pub decision: Option<Uuid>,
    /// How long requests may still run; counts only while frames arrive.
    pub timeout: Span,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRemovalRequested {
    pub id: InstanceId,
    pub generation: u64,
    pub node: String,
    /// From the polite signal to the hard one.
    pub grace: Span,
    pub reason: RemovalReason,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OfInstance {
    pub id: InstanceId,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStarted {
    pub id: InstanceId,
    pub generation: u64,
    pub address: String,
    pub pid: Option<u32>,
    /// It was found running after a restart of Penstock.
    pub adopted: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceUnready {
    pub id: InstanceId,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceEnded {
    pub id: InstanceId,
    pub reason: String,
    /// None: ended by a signal, never started, or not a child of this process (adopted).
    pub exit_code: Option<i32>,
}

#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum AccessRole {
    Viewer,
    Operator,
    Admin,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessGranted {
    pub name: String,
    pub role: AccessRole,
    /// SHA-256 of the token, hexadecimal.
    pub hash: String,
    pub expires: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessRevoked {
    pub name: String,
}

/// A gateway or a node has become a member: it gets slots, or instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberJoined {
    pub source: Source,
    /// Where its admin listener answers, as a URL; nodes show logs there.
    pub address: Option<String>,
    /// What a node can run; empty for a gateway.
    pub backends: Vec<BackendKind>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberLeft {
    pub source: Source,
    pub reason: LeaveReason,
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum LeaveReason {
    /// It said goodbye.
    Goodbye,
    /// Nothing was heard of it for too long.
    Silent,
}

/// A person lets a consumer pass over an event that it cannot digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EventSkipped {
    pub consumer: String,
    pub position: Position,
    pub reason: String,
}

/// A person lets a consumer try an endpoint's streams again from the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConsumerUnparked {
    pub consumer: String,
    pub reason: String,
}
