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
        /// Something that happened, in the present version of its type.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event { $($(#[$doc])* $variant($data),)* }

        /// Name and current version of every event type.
        pub const EVENT_TYPES: &[(&str, u32)] = &[$(($name, $version),)*];

        /// The JSON Schema of the data of every event type, in the version written now.
        pub fn event_schemas() -> Vec<(&'static str, u32, schemars::Schema)> {
            vec![$(($name, $version, schemars::schema_for!($data)),)*]
        }

        impl Event {
            /// Its stable name, such as `scaling.decided`.
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
            ///
            /// # Errors
            ///
            /// Where a number cannot be written as JSON, such as one that is not finite.
            pub fn data(&self) -> Result<Value, serde_json::Error> {
                match self { $(Self::$variant(data) => serde_json::to_value(data),)* }
            }

            /// The same as JSON text, without a detour over a tree.
            ///
            /// # Errors
            ///
            /// Where a number cannot be written as JSON, such as one that is not finite.
            pub fn data_json(&self) -> Result<String, serde_json::Error> {
                match self { $(Self::$variant(data) => serde_json::to_string(data),)* }
            }

            /// Reads a stored event of any version up to the current one.
            ///
            /// # Errors
            ///
            /// [`DecodeError::Unknown`] for a type or version of a newer release,
            /// [`DecodeError::Data`] where the data are not what their version says.
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
    /// An endpoint was made.
    "endpoint.created" v 1 in [Endpoint] => EndpointCreated(EndpointCreated),
    /// An endpoint's document changed.
    "endpoint.updated" v 1 in [Endpoint] => EndpointUpdated(EndpointUpdated),
    /// Shares of live and copied traffic changed.
    "endpoint.traffic-set" v 1 in [Endpoint] => TrafficSet(TrafficSet),
    /// One of an endpoint's keys is another.
    "endpoint.key-regenerated" v 1 in [Endpoint] => KeyRegenerated(KeyRegenerated),
    /// An endpoint stands elsewhere on its way to what was asked for.
    "endpoint.state-changed" v 1 in [Endpoint] => EndpointStateChanged(EndpointStateChanged),
    /// An endpoint is to go.
    "endpoint.deletion-requested" v 1 in [Endpoint] => EndpointDeletionRequested(Empty),
    /// An endpoint is gone; its name is free.
    "endpoint.deleted" v 1 in [Endpoint] => EndpointDeleted(Empty),
    /// A deployment was made.
    "deployment.created" v 1 in [Endpoint] => DeploymentCreated(DeploymentCreated),
    /// A deployment's document changed.
    "deployment.updated" v 1 in [Endpoint] => DeploymentUpdated(DeploymentUpdated),
    /// A deployment stands elsewhere on its way to what was asked for.
    "deployment.state-changed" v 1 in [Endpoint] => DeploymentStateChanged(DeploymentStateChanged),
    /// A deployment is to go.
    "deployment.deletion-requested" v 1 in [Endpoint] => DeploymentDeletionRequested(OfDeployment),
    /// A deployment is gone; its name is free.
    "deployment.deleted" v 1 in [Endpoint] => DeploymentDeleted(OfDeployment),
    /// A deployment's count follows these rules from now on.
    "autoscale.set" v 1 in [Endpoint] => AutoscaleSet(AutoscaleSet),
    /// A deployment goes back to its own count.
    "autoscale.removed" v 1 in [Endpoint] => AutoscaleRemoved(OfDeployment),
    /// A count holds whatever the rules say.
    "autoscale.pinned" v 1 in [Endpoint] => AutoscalePinned(AutoscalePinned),
    /// The rules decide again.
    "autoscale.released" v 1 in [Endpoint] => AutoscaleReleased(OfDeployment),
    /// Scaling was paused, or goes on.
    "autoscale.pause-set" v 1 in [Endpoint] => AutoscalePauseSet(AutoscalePauseSet),
    /// A count was decided.
    "scaling.decided" v 1 in [Scaling] => ScalingDecided(Box<Decision>),
    /// The clock of a bucket's owner, of whichever service, was set back.
    "clock.stepped" v 1 in [Endpoint, Scaling, Instances, Node, Usage] => ClockStepped(ClockStepped),
    /// A node is to start an instance.
    "instance.requested" v 1 in [Instances] => InstanceRequested(Box<InstanceRequested>),
    /// No new request goes to an instance.
    "instance.draining" v 1 in [Instances] => InstanceDraining(InstanceDraining),
    /// A node is to end an instance.
    "instance.removal-requested" v 1 in [Instances] => InstanceRemovalRequested(InstanceRemovalRequested),
    /// An instance's process runs.
    "instance.started" v 1 in [Node] => InstanceStarted(InstanceStarted),
    /// An instance answers its readiness probe.
    "instance.ready" v 1 in [Node] => InstanceReady(OfInstance),
    /// An instance does not answer its readiness probe any more.
    "instance.unready" v 1 in [Node] => InstanceUnready(InstanceUnready),
    /// An instance ended by itself, or never started.
    "instance.failed" v 1 in [Node] => InstanceFailed(InstanceEnded),
    /// An instance ended because it was to.
    "instance.stopped" v 1 in [Node] => InstanceStopped(InstanceEnded),
    /// What was used in a minute, or in several without a request.
    "usage.closed" v 2 in [Usage] => UsageClosed(UsageMinute),
    /// What came late to a minute that was closed.
    "usage.corrected" v 2 in [Usage] => UsageCorrected(UsageMinute),
    /// Frames are missing in a minute.
    "usage.gap" v 1 in [Usage] => UsageGap(UsageGap),
    /// A token was made.
    "access.granted" v 1 in [Access] => AccessGranted(AccessGranted),
    /// A token is valid no longer.
    "access.revoked" v 1 in [Access] => AccessRevoked(AccessRevoked),
    /// A gateway or a node counts from now on.
    "member.joined" v 1 in [Members] => MemberJoined(MemberJoined),
    /// A gateway or a node does not count any more.
    "member.left" v 1 in [Members] => MemberLeft(MemberLeft),
    /// An event is passed over by a consumer.
    "event.skipped" v 1 in [Parking] => EventSkipped(EventSkipped),
    /// A consumer tries an endpoint again.
    "consumer.unparked" v 1 in [Parking] => ConsumerUnparked(ConsumerUnparked),
}

impl Event {
    /// Like [`decode`](Self::decode), but without the slices of usage that ended by `slices_from`. They are most
    /// of a long log, and only whoever still counts those minutes, or reports them, needs them.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode), but slices that are left out are only checked to be JSON.
    pub fn decode_since(
        type_name: &str,
        version: u32,
        data: &str,
        slices_from: Timestamp,
    ) -> Result<Self, DecodeError> {
        let of_usage = match type_name {
            "usage.closed" => Self::UsageClosed,
            "usage.corrected" => Self::UsageCorrected,
            _ => return Self::decode(type_name, version, data),
        };
        if slices_from > Timestamp::MIN
            && let Ok(minute) = usage::decode_without_slices(data)
            && minute.end() <= slices_from
        {
            let event = of_usage(minute);
            if version <= event.version() {
                return Ok(event);
            }
        }
        Self::decode(type_name, version, data)
    }
}

/// Whether the data of an older version need no upcaster, as it would leave them as they are. Most of a long
/// log is of few types, and to read data first as any JSON takes several times as long.
fn has_present_shape(type_name: &str, data: &str) -> bool {
    match type_name {
        "usage.closed" | "usage.corrected" => !data.contains(usage::MOVED_IN_2),
        _ => false,
    }
}

/// Brings the data of one version to the shape of the next.
fn upcast(type_name: &str, from: u32, data: Value) -> Value {
    match (type_name, from) {
        ("usage.closed" | "usage.corrected", 1) => usage::upcast_1(data),
        _ => data,
    }
}

/// Why a stored event cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A newer release wrote it.
    #[error(
        "event type `{type_name}` version {version} is not known to this binary; use the release that wrote it or a newer one"
    )]
    Unknown {
        /// The type as stored.
        type_name: String,
        /// The version as stored.
        version: u32,
    },
    /// It is not what its type and version say.
    #[error("the data of an event `{type_name}` version {version} cannot be read: {source}")]
    Data {
        /// The type as stored.
        type_name: String,
        /// The version as stored.
        version: u32,
        /// Where reading stopped.
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

/// The event says it all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Empty {}

/// A new incarnation of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointCreated {
    /// Of the incarnation; never used again.
    pub uid: Uid,
    /// Free until then.
    pub name: Name,
    /// As its document has them.
    pub labels: Labels,
    /// Without traffic and mirror, which have an event of their own.
    pub spec: EndpointSpec,
    /// The first two keys.
    pub keys: EndpointKeys,
}

/// Both keys of an endpoint; either opens it, so that one can be changed at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct EndpointKeys {
    /// The first.
    pub primary: SealedKey,
    /// The second.
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

/// Which of an endpoint's two keys.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum KeySlot {
    /// The first.
    Primary,
    /// The second.
    Secondary,
}

/// The document as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointUpdated {
    /// All of them.
    pub labels: Labels,
    /// Without traffic and mirror.
    pub spec: EndpointSpec,
}

/// The shares as they are now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrafficSet {
    /// Live traffic in percent, by deployment; they sum to 0 or 100.
    pub traffic: Percentages,
    /// Copied traffic in percent, by deployment; at most 100 each.
    pub mirror: Percentages,
}

/// A key that takes the place of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyRegenerated {
    /// Which one it is.
    pub slot: KeySlot,
    /// The new one.
    pub key: SealedKey,
}

/// Where an endpoint stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStateChanged {
    /// On its way to what was asked for.
    pub state: ProvisioningState,
    /// Why, for people; empty where there is nothing to say.
    pub reason: String,
}

/// Which deployment of the stream's endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OfDeployment {
    /// Its name.
    pub deployment: Name,
}

/// A new incarnation of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentCreated {
    /// Of the incarnation; never used again.
    pub uid: Uid,
    /// Its name, free until then.
    pub deployment: Name,
    /// As its document has them.
    pub labels: Labels,
    /// As its document has it.
    pub spec: DeploymentSpec,
}

/// `revision` rises only when instances have to be replaced; see `domain::endpoint`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentUpdated {
    /// Which one.
    pub deployment: Name,
    /// Of what instances are made of.
    pub revision: u64,
    /// All of them.
    pub labels: Labels,
    /// The document as it is now.
    pub spec: DeploymentSpec,
}

/// Where a deployment stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentStateChanged {
    /// Which one.
    pub deployment: Name,
    /// On its way to what was asked for.
    pub state: ProvisioningState,
    /// Why, for people; empty where there is nothing to say.
    pub reason: String,
}

/// The rules as they are now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleSet {
    /// Whose count follows them.
    pub deployment: Name,
    /// Counts from 1 per deployment.
    pub revision: u64,
    /// All of them.
    pub labels: Labels,
    /// The document as it is now.
    pub spec: AutoscaleSpec,
}

/// A count set by hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalePinned {
    /// Of which deployment.
    pub deployment: Name,
    /// The count, and until when.
    pub pin: Pin,
}

/// Directions that are paused as of now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalePauseSet {
    /// Of which deployment.
    pub deployment: Name,
    /// In place of those that were.
    pub pause: Pause,
}

/// The owner's clock stands more than 5 s behind what the bucket has already recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClockStepped {
    /// The greatest time that the bucket has.
    pub recorded: Timestamp,
    /// What the clock showed.
    pub clock: Timestamp,
}

/// Everything a node needs to start the instance; it has no choice left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRequested {
    /// Made for this order; never used again.
    pub id: InstanceId,
    /// Rises with each order about this instance; a backend refuses an older one.
    pub generation: u64,
    /// Of which deployment.
    pub deployment: DeploymentRef,
    /// Its incarnation.
    pub deployment_uid: Uid,
    /// The deployment's revision that the instance is made of.
    pub revision: u64,
    /// Who is to start it, by the node's id.
    pub node: String,
    /// Event id of the decision that asked for it.
    pub decision: Option<Uuid>,
    /// Why there is to be one.
    pub reason: RequestReason,
    /// What it is made of.
    pub spec: DeploymentSpec,
}

/// Why an instance is to be started.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum RequestReason {
    /// There are too few.
    ScaleOut,
    /// In place of one that failed.
    Replacement,
    /// The deployment changed.
    Rollout,
}

/// Why an instance is to go.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum RemovalReason {
    /// There are too many.
    ScaleIn,
    /// One of the present revision takes its place.
    Rollout,
    /// It does not answer its probes.
    Unhealthy,
    /// Its deployment goes, or its endpoint.
    Deleted,
    /// It failed or ended by itself; what is left is cleared away.
    Ended,
    /// Its node has left, and does not answer for it any more.
    NodeLost,
}

/// An order that no new request goes to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceDraining {
    /// Which one.
    pub id: InstanceId,
    /// Why it is to go.
    pub reason: RemovalReason,
    /// Event id of the decision that asked for it.
    pub decision: Option<Uuid>,
    /// How long requests may still run; counts only while frames arrive.
    pub timeout: Span,
}

/// An order to end an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRemovalRequested {
    /// Which one.
    pub id: InstanceId,
    /// Of the order; above all before about this instance.
    pub generation: u64,
    /// Who is to end it, by the node's id.
    pub node: String,
    /// From the polite signal to the hard one.
    pub grace: Span,
    /// Why it is to go.
    pub reason: RemovalReason,
}

/// Which instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OfInstance {
    /// Its id.
    pub id: InstanceId,
}

/// An instance as it runs now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStarted {
    /// Which one.
    pub id: InstanceId,
    /// Of the order that was carried out.
    pub generation: u64,
    /// `HOST:PORT` that it listens on; empty for simulated ones.
    pub address: String,
    /// Of its process, where it has one.
    pub pid: Option<u32>,
    /// It was found running after a restart of Penstock.
    pub adopted: bool,
}

/// An instance that should get no requests for now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceUnready {
    /// Which one.
    pub id: InstanceId,
    /// What its probe met.
    pub reason: String,
}

/// The end of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceEnded {
    /// Which one.
    pub id: InstanceId,
    /// Why, for people.
    pub reason: String,
    /// None: ended by a signal, never started, or not a child of this process (adopted).
    pub exit_code: Option<i32>,
}

/// What a token allows; each allows what those before it do.
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
    /// To look.
    Viewer,
    /// To change what runs.
    Operator,
    /// To give access to others.
    Admin,
}

/// A token, as a hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessGranted {
    /// What people call it; unique among those that are valid.
    pub name: String,
    /// What it allows.
    pub role: AccessRole,
    /// SHA-256 of the token, hexadecimal.
    pub hash: String,
    /// When it ends by itself; none where it does not.
    pub expires: Option<Timestamp>,
}

/// A token that is valid no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessRevoked {
    /// Which one.
    pub name: String,
}

/// A gateway or a node has become a member: it gets slots, or instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberJoined {
    /// Who it is.
    pub source: Source,
    /// Where its admin listener answers, as a URL; nodes show logs there.
    pub address: Option<String>,
    /// What a node can run; empty for a gateway.
    pub backends: Vec<BackendKind>,
}

/// A gateway or a node has left: others take its slots, or its instances are replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberLeft {
    /// Who it was.
    pub source: Source,
    /// How that is known.
    pub reason: LeaveReason,
}

/// How it is known that a member has left.
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
    /// Which consumer.
    pub consumer: String,
    /// Of the event that it cannot digest.
    pub position: Position,
    /// In the words of who decided it.
    pub reason: String,
}

/// A person lets a consumer try an endpoint's streams again from the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConsumerUnparked {
    /// Which consumer.
    pub consumer: String,
    /// In the words of who decided it.
    pub reason: String,
}
