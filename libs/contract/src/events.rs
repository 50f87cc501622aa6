//! All events, with their stable names and versions. Stored events stay readable forever: a changed
//! shape raises the version and adds an upcaster. `libs/contract/tests/golden/events` holds a file for each
//! (type, version).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use uuid::Uuid;

use crate::decision::{Decision, Pause, Pin};
use crate::frame::Source;
use crate::ids::{DeploymentRef, InstanceId, Name, Position, Uid};
use crate::resources::{
    AutoscaleSpec, BackendKind, DeploymentSpec, EndpointSpec, Labels, Percentages, ProbeSpec,
    ProvisioningState,
};
use crate::stream::StreamKind;
use crate::time::{Span, Timestamp};
use crate::usage::{self, UsageGap, UsageMinute};

/// Declares the enum, the names and versions, and both directions of the wire format in one place, so
/// that no event can lack one of them.
macro_rules! events {
    ($($(#[$doc:meta])* $name:literal v $version:literal in [$($stream:ident),+] => $variant:ident($data:ty),)*) => {
        /// Something that happened, in the current version of its type.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event { $($(#[$doc])* $variant($data),)* }

        /// The name and current version of every event type.
        pub const EVENT_TYPES: &[(&str, u32)] = &[$(($name, $version),)*];

        /// Returns the JSON Schema of the data of every event type, in its current version.
        pub fn event_schemas() -> Vec<(&'static str, u32, schemars::Schema)> {
            vec![$(($name, $version, schemars::schema_for!($data)),)*]
        }

        impl Event {
            /// The stable name of its type, such as `scaling.decided`.
            pub fn type_name(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name,)* }
            }

            /// The version that this release writes.
            pub fn version(&self) -> u32 {
                match self { $(Self::$variant(_) => $version,)* }
            }

            /// The kinds of streams that may contain it: one writing service per stream.
            pub fn streams(&self) -> &'static [StreamKind] {
                match self { $(Self::$variant(_) => &[$(StreamKind::$stream),+],)* }
            }

            /// Returns the `data` member of the stored event.
            ///
            /// # Errors
            ///
            /// Returns an error if a number cannot be written as JSON, such as one that is not finite.
            pub fn data(&self) -> Result<Value, serde_json::Error> {
                match self { $(Self::$variant(data) => serde_json::to_value(data),)* }
            }

            /// Returns [`data`](Self::data) as JSON text, without building a tree.
            ///
            /// # Errors
            ///
            /// Returns an error if a number cannot be written as JSON, such as one that is not finite.
            pub fn data_json(&self) -> Result<String, serde_json::Error> {
                match self { $(Self::$variant(data) => serde_json::to_string(data),)* }
            }

            /// Decodes a stored event of any version up to the current one.
            ///
            /// # Errors
            ///
            /// Returns [`DecodeError::Unknown`] for a type or version of a newer release, and
            /// [`DecodeError::Data`] if the data do not match their version.
            pub fn decode(type_name: &str, version: u32, data: &str) -> Result<Self, DecodeError> {
                let fail = |source| DecodeError::Data { type_name: type_name.to_owned(), version, source };
                match type_name {
                    $($name if version == $version => serde_json::from_str(data).map(Self::$variant).map_err(fail),
                    $name if version < $version && has_current_shape(type_name, data) => {
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
    /// An endpoint was created.
    "endpoint.created" v 1 in [Endpoint] => EndpointCreated(EndpointCreated),
    /// An endpoint's document changed.
    "endpoint.updated" v 1 in [Endpoint] => EndpointUpdated(EndpointUpdated),
    /// The traffic split or the mirror shares changed.
    "endpoint.traffic-set" v 1 in [Endpoint] => TrafficSet(TrafficSet),
    /// One of an endpoint's keys was replaced.
    "endpoint.key-regenerated" v 1 in [Endpoint] => KeyRegenerated(KeyRegenerated),
    /// The provisioning state of an endpoint changed.
    "endpoint.state-changed" v 1 in [Endpoint] => EndpointStateChanged(EndpointStateChanged),
    /// Deletion of an endpoint was requested.
    "endpoint.deletion-requested" v 1 in [Endpoint] => EndpointDeletionRequested(Empty),
    /// An endpoint was deleted; its name is free.
    "endpoint.deleted" v 1 in [Endpoint] => EndpointDeleted(Empty),
    /// A deployment was created.
    "deployment.created" v 2 in [Endpoint] => DeploymentCreated(DeploymentCreated),
    /// A deployment's document changed.
    "deployment.updated" v 2 in [Endpoint] => DeploymentUpdated(DeploymentUpdated),
    /// The provisioning state of a deployment changed.
    "deployment.state-changed" v 1 in [Endpoint] => DeploymentStateChanged(DeploymentStateChanged),
    /// Deletion of a deployment was requested.
    "deployment.deletion-requested" v 1 in [Endpoint] => DeploymentDeletionRequested(DeploymentEvent),
    /// A deployment was deleted; its name is free.
    "deployment.deleted" v 1 in [Endpoint] => DeploymentDeleted(DeploymentEvent),
    /// An autoscale policy was set for a deployment.
    "autoscale.set" v 1 in [Endpoint] => AutoscaleSet(AutoscaleSet),
    /// The autoscale policy was removed; the deployment's own count applies.
    "autoscale.removed" v 1 in [Endpoint] => AutoscaleRemoved(DeploymentEvent),
    /// The count of a deployment was pinned.
    "autoscale.pinned" v 1 in [Endpoint] => AutoscalePinned(AutoscalePinned),
    /// The pin was released; the rules decide again.
    "autoscale.released" v 1 in [Endpoint] => AutoscaleReleased(DeploymentEvent),
    /// Scaling was paused or resumed.
    "autoscale.pause-set" v 1 in [Endpoint] => AutoscalePauseSet(AutoscalePauseSet),
    /// A scaling decision was made.
    "scaling.decided" v 1 in [Scaling] => ScalingDecided(Box<Decision>),
    /// The clock of a bucket's owner, in any service, was set back.
    "clock.stepped" v 1 in [Endpoint, Scaling, Instances, Node, Usage] => ClockStepped(ClockStepped),
    /// The start of an instance was requested from a node.
    "instance.requested" v 2 in [Instances] => InstanceRequested(Box<InstanceRequested>),
    /// An instance is draining: it gets no new requests.
    "instance.draining" v 1 in [Instances] => InstanceDraining(InstanceDraining),
    /// The removal of an instance was requested from its node.
    "instance.removal-requested" v 1 in [Instances] => InstanceRemovalRequested(InstanceRemovalRequested),
    /// An instance was started.
    "instance.started" v 1 in [Node] => InstanceStarted(InstanceStarted),
    /// An instance takes long to start, and what it waits for.
    "instance.starting" v 1 in [Node] => InstanceStarting(InstanceStarting),
    /// An instance passes its readiness probe.
    "instance.ready" v 1 in [Node] => InstanceReady(InstanceEvent),
    /// An instance no longer passes its readiness probe.
    "instance.unready" v 1 in [Node] => InstanceUnready(InstanceUnready),
    /// An instance fails its liveness probe and is to be replaced.
    "instance.unhealthy" v 1 in [Node] => InstanceUnhealthy(InstanceUnhealthy),
    /// An instance exited on its own, or never started.
    "instance.failed" v 1 in [Node] => InstanceFailed(InstanceEnded),
    /// An instance was stopped on request.
    "instance.stopped" v 1 in [Node] => InstanceStopped(InstanceEnded),
    /// Usage of a minute, or of several minutes without requests.
    "usage.closed" v 2 in [Usage] => UsageClosed(UsageMinute),
    /// Usage that arrived after its minute was closed.
    "usage.corrected" v 2 in [Usage] => UsageCorrected(UsageMinute),
    /// Frames of a minute are missing.
    "usage.gap" v 1 in [Usage] => UsageGap(UsageGap),
    /// A token was created.
    "access.granted" v 1 in [Access] => AccessGranted(AccessGranted),
    /// A token was revoked.
    "access.revoked" v 1 in [Access] => AccessRevoked(AccessRevoked),
    /// A gateway or a node joined.
    "member.joined" v 1 in [Members] => MemberJoined(MemberJoined),
    /// A gateway or a node left.
    "member.left" v 1 in [Members] => MemberLeft(MemberLeft),
    /// An operator told a consumer to skip an event.
    "event.skipped" v 1 in [Parking] => EventSkipped(EventSkipped),
    /// An operator told a consumer to retry an endpoint.
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

/// Whether the upcaster would leave data of an older version unchanged. Most of a long log is of few
/// types, and parsing into a generic JSON tree first takes several times as long.
fn has_current_shape(type_name: &str, data: &str) -> bool {
    match type_name {
        "usage.closed" | "usage.corrected" => !data.contains(usage::MOVED_IN_V2),
        "deployment.created" | "deployment.updated" | "instance.requested" => {
            !data.contains("livenessProbe")
        }
        _ => false,
    }
}

/// Upcasts data from one version to the next.
fn upcast(type_name: &str, from: u32, data: Value) -> Value {
    match (type_name, from) {
        ("usage.closed" | "usage.corrected", 1) => usage::upcast_v1(data),
        ("deployment.created" | "deployment.updated" | "instance.requested", 1) => {
            without_former_liveness_default(data)
        }
        _ => data,
    }
}

/// Version 1 of a spec always had a liveness probe; the default one was asked for by nobody.
fn without_former_liveness_default(mut data: Value) -> Value {
    let spec = data.get_mut("spec").and_then(Value::as_object_mut);
    if let Some(spec) = spec
        && let Some(probe) = spec.get("livenessProbe")
        && ProbeSpec::deserialize(probe).is_ok_and(|probe| probe.is_former_liveness_default())
    {
        spec.remove("livenessProbe");
    }
    data
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
    /// Its data do not match its type and version.
    #[error("the data of an event `{type_name}` version {version} cannot be read: {source}")]
    Data {
        /// The type as stored.
        type_name: String,
        /// The version as stored.
        version: u32,
        /// The error from deserializing the data.
        source: serde_json::Error,
    },
}

/// The wire format: `type`, `typeVersion`, `data`.
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

/// An event without data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Empty {}

/// A new incarnation of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointCreated {
    /// The incarnation; never reused.
    pub uid: Uid,
    /// The name of the endpoint.
    pub name: Name,
    /// The labels in the document.
    pub labels: Labels,
    /// The spec, without traffic and mirror, which have an event of their own.
    pub spec: EndpointSpec,
    /// The first two keys.
    pub keys: EndpointKeys,
}

/// Both keys of an endpoint. Either grants access, so that they can be rotated one at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct EndpointKeys {
    /// The primary key.
    pub primary: SealedKey,
    /// The secondary key.
    pub secondary: SealedKey,
}

/// A key as stored: a hash to check it by, and an encrypted copy that only control can decrypt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SealedKey {
    /// SHA-256, hexadecimal.
    pub hash: String,
    /// Nonce and ciphertext (ChaCha20-Poly1305), base64.
    pub sealed: String,
}

/// One of an endpoint's two keys.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum KeySlot {
    /// The primary key.
    Primary,
    /// The secondary key.
    Secondary,
}

/// The updated document of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointUpdated {
    /// All labels.
    pub labels: Labels,
    /// The spec, without traffic and mirror.
    pub spec: EndpointSpec,
}

/// The updated traffic split and mirror shares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrafficSet {
    /// Live traffic in percent, by deployment; they sum to 0 or 100.
    pub traffic: Percentages,
    /// Mirrored traffic in percent, by deployment; at most 100 each.
    pub mirror: Percentages,
}

/// A replaced key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyRegenerated {
    /// The key that was replaced.
    pub slot: KeySlot,
    /// The new key.
    pub key: SealedKey,
}

/// The provisioning state of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStateChanged {
    /// The new state.
    pub state: ProvisioningState,
    /// The reason, for people; may be empty.
    pub reason: String,
}

/// An event that names only a deployment of the stream's endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "OfDeployment")]
pub struct DeploymentEvent {
    /// The name of the deployment.
    pub deployment: Name,
}

/// A new incarnation of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentCreated {
    /// The incarnation; never reused.
    pub uid: Uid,
    /// The name of the deployment.
    pub deployment: Name,
    /// The labels in the document.
    pub labels: Labels,
    /// The spec in the document.
    pub spec: DeploymentSpec,
}

/// The updated document of a deployment. `revision` increases only if instances must be replaced; see
/// `domain::endpoint`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentUpdated {
    /// The deployment.
    pub deployment: Name,
    /// The revision of what instances are made from.
    pub revision: u64,
    /// All labels.
    pub labels: Labels,
    /// The updated spec.
    pub spec: DeploymentSpec,
}

/// The provisioning state of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentStateChanged {
    /// The deployment.
    pub deployment: Name,
    /// The new state.
    pub state: ProvisioningState,
    /// The reason, for people; may be empty.
    pub reason: String,
}

/// The autoscale policy of a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleSet {
    /// The deployment that the policy applies to.
    pub deployment: Name,
    /// Counts from 1 per deployment.
    pub revision: u64,
    /// All labels.
    pub labels: Labels,
    /// The updated spec.
    pub spec: AutoscaleSpec,
}

/// A pinned count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalePinned {
    /// The deployment.
    pub deployment: Name,
    /// The count, and when the pin ends.
    pub pin: Pin,
}

/// The directions in which scaling is paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalePauseSet {
    /// The deployment.
    pub deployment: Name,
    /// Replaces the previous setting.
    pub pause: Pause,
}

/// The owner's clock is more than 5 s behind the latest time recorded in the bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClockStepped {
    /// The latest time recorded in the bucket.
    pub recorded: Timestamp,
    /// The time by the owner's clock.
    pub clock: Timestamp,
}

/// Everything that a node needs to start an instance; it decides nothing itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRequested {
    /// The id of the new instance; never reused.
    pub id: InstanceId,
    /// Increases with each request for this instance; a backend rejects an older one.
    pub generation: u64,
    /// The deployment.
    pub deployment: DeploymentRef,
    /// Its incarnation.
    pub deployment_uid: Uid,
    /// The deployment's revision that the instance is made from.
    pub revision: u64,
    /// The id of the node that starts it.
    pub node: String,
    /// The event id of the decision that led to it.
    pub decision: Option<Uuid>,
    /// Why the instance is started.
    pub reason: RequestReason,
    /// The spec of the deployment.
    pub spec: DeploymentSpec,
}

/// Why an instance is started.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum RequestReason {
    /// There are too few instances.
    ScaleOut,
    /// It replaces a failed instance.
    Replacement,
    /// The deployment changed.
    Rollout,
}

/// Why an instance is removed.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum RemovalReason {
    /// There are too many instances.
    ScaleIn,
    /// An instance of the current revision replaces it.
    Rollout,
    /// It fails its probes.
    Unhealthy,
    /// Its deployment or endpoint is being deleted.
    Deleted,
    /// It failed or exited on its own; its remains are cleaned up.
    Ended,
    /// Its node has left and no longer reports it.
    NodeLost,
}

/// A request to drain an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceDraining {
    /// The id of the instance.
    pub id: InstanceId,
    /// Why the instance is removed.
    pub reason: RemovalReason,
    /// The event id of the decision that led to it.
    pub decision: Option<Uuid>,
    /// How long requests in flight may still run; the time counts only while frames arrive.
    pub timeout: Span,
}

/// A request to remove an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceRemovalRequested {
    /// The id of the instance.
    pub id: InstanceId,
    /// The generation of this request; higher than that of any earlier request for this instance.
    pub generation: u64,
    /// The id of the node that removes it.
    pub node: String,
    /// The time between the termination signal and the kill.
    pub grace: Span,
    /// Why the instance is removed.
    pub reason: RemovalReason,
}

/// An event that names only an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "OfInstance")]
pub struct InstanceEvent {
    /// The id of the instance.
    pub id: InstanceId,
}

/// A started instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStarted {
    /// The id of the instance.
    pub id: InstanceId,
    /// The generation of the request that was carried out.
    pub generation: u64,
    /// The `HOST:PORT` that it listens on; empty for simulated instances.
    pub address: String,
    /// The id of its process, if it has one.
    pub pid: Option<u32>,
    /// Whether it was found running after a restart of Penstock.
    pub adopted: bool,
}

/// An instance that is not ready yet, although it was started a while ago.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStarting {
    /// The id of the instance.
    pub id: InstanceId,
    /// What it waits for, for people.
    pub detail: String,
}

/// An instance that temporarily gets no requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceUnready {
    /// The id of the instance.
    pub id: InstanceId,
    /// Why the probe failed.
    pub reason: String,
}

/// An instance that fails its liveness probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceUnhealthy {
    /// The id of the instance.
    pub id: InstanceId,
    /// Why the probe failed.
    pub reason: String,
}

/// The end of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceEnded {
    /// The id of the instance.
    pub id: InstanceId,
    /// The reason, for people.
    pub reason: String,
    /// The exit code; `None` if it was ended by a signal, never started, or is not a child of this process
    /// (adopted).
    pub exit_code: Option<i32>,
}

/// The role of a token. Each role includes those before it.
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
    /// May read.
    Viewer,
    /// May also change what runs.
    Operator,
    /// May also manage access.
    Admin,
}

/// A new token, stored as a hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessGranted {
    /// The name of the token, unique among valid tokens.
    pub name: String,
    /// The role of the token.
    pub role: AccessRole,
    /// SHA-256 of the token, hexadecimal.
    pub hash: String,
    /// When it expires; `None` if never.
    pub expires: Option<Timestamp>,
}

/// A revoked token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessRevoked {
    /// The name of the token.
    pub name: String,
}

/// A gateway or a node that became a member: it is allocated slots or instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberJoined {
    /// The gateway or node.
    pub source: Source,
    /// The URL of its admin listener, where nodes serve logs.
    pub address: Option<String>,
    /// The backends that a node offers; empty for a gateway.
    pub backends: Vec<BackendKind>,
}

/// A gateway or a node that left: its slots are reallocated, or its instances replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberLeft {
    /// The gateway or node.
    pub source: Source,
    /// How its departure was detected.
    pub reason: LeaveReason,
}

/// How the departure of a member was detected.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum LeaveReason {
    /// It said goodbye.
    Goodbye,
    /// It sent no frames for too long, or there can be none: another node has its data folder.
    Silent,
}

/// An operator has a consumer skip an event that it cannot process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EventSkipped {
    /// The name of the consumer.
    pub consumer: String,
    /// The position of the event to skip.
    pub position: Position,
    /// The reason given by the operator.
    pub reason: String,
}

/// An operator has a consumer retry an endpoint's streams from the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConsumerUnparked {
    /// The name of the consumer.
    pub consumer: String,
    /// The reason given by the operator.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    /// A release with one more event.
    mod toy {
        use super::super::{DecodeError, Deserialize, Empty, Serialize, StreamKind, Value};
        use super::super::{has_current_shape, upcast};

        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
        pub struct ToyWound {
            pub turns: u32,
        }

        events! {
            /// An endpoint is gone; its name is free.
            "endpoint.deleted" v 1 in [Endpoint] => EndpointDeleted(Empty),
            /// A toy was wound up.
            "toy.wound" v 1 in [Endpoint, Members] => ToyWound(ToyWound),
        }
    }

    #[test]
    fn a_line_makes_an_event_that_is_written_read_and_described() {
        let event = toy::Event::ToyWound(toy::ToyWound { turns: 3 });
        assert_eq!((event.type_name(), event.version()), ("toy.wound", 1));
        assert_eq!(event.streams().len(), 2);
        assert_eq!(event.data().unwrap()["turns"], 3);
        let data = event.data_json().unwrap();
        assert_eq!(toy::Event::decode("toy.wound", 1, &data).unwrap(), event);
        assert!(toy::Event::decode("toy.wound", 2, &data).is_err());
        assert!(toy::EVENT_TYPES.contains(&("toy.wound", 1)));
        assert_eq!(toy::event_schemas().len(), 2);
    }
}
