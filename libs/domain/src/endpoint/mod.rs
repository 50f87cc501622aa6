//! An endpoint with its deployments, traffic, keys and autoscale settings: one aggregate, so that
//! the split that sums to 100 has one owner. This file holds the state, folded from the events of
//! the stream `endpoint/…`; `commands` turns requests into events or refuses them.

pub mod commands;

use std::collections::BTreeMap;

use contract::decision::{Pause, Pin};
use contract::events::{EndpointKeys, Event, KeySlot};
use contract::ids::{Name, Position, Uid};
use contract::log::Record;
use contract::resources::{
    AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels, Percentages, ProvisioningState,
    RequestSettings,
};
use contract::time::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// One incarnation of an endpoint. Where it is optional, `None` means that no endpoint has the
/// name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Its incarnation.
    pub uid: Uid,
    /// Unique among the existing endpoints of the workspace.
    pub name: Name,
    /// Labels from its document.
    pub labels: Labels,
    /// Its spec, without traffic and mirror.
    pub spec: EndpointSpec,
    /// Shares of live traffic in percent; they sum to 0 or 100.
    pub traffic: Percentages,
    /// Shares of copied traffic in percent, at most 100 each.
    pub mirror: Percentages,
    /// Its two keys, sealed.
    pub keys: EndpointKeys,
    /// Provisioning state.
    pub state: ProvisioningState,
    /// Reason of the state, for people; may be empty.
    pub state_reason: String,
    /// When this incarnation was created.
    pub created_at: Timestamp,
    /// Counts changes of the document (spec, labels, traffic, mirror); the ETag.
    pub revision: u64,
    /// Its deployments by name, including those being deleted. Boxed, as values of other small maps here:
    /// even a map with one entry has room for eleven.
    pub deployments: BTreeMap<Name, Box<Deployment>>,
    /// Position of the event that created it.
    pub created: Position,
    /// Position of the last event of the stream.
    pub position: Position,
}

/// One incarnation of a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Deployment {
    /// Its incarnation.
    pub uid: Uid,
    /// Labels from its document.
    pub labels: Labels,
    /// Spec from its document.
    pub spec: DeploymentSpec,
    /// Revision of the part of the spec that instances are created from; instances of older
    /// revisions are replaced.
    pub instance_revision: u64,
    /// Counts changes of the document; the ETag.
    pub revision: u64,
    /// Provisioning state.
    pub state: ProvisioningState,
    /// Reason of the state, for people; may be empty.
    pub state_reason: String,
    /// When this incarnation was created.
    pub created_at: Timestamp,
    /// Its autoscale settings, if any.
    pub autoscale: Option<Autoscale>,
    /// The count pinned by a person, expired or not.
    pub pin: Option<Pin>,
    /// Who pinned it: `token:NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned_by: Option<String>,
    /// Directions paused by a person.
    pub pause: Pause,
    /// When the instance revision last changed; earlier failures say nothing about it.
    pub changed_at: Timestamp,
    /// Position of the event that created it.
    pub created: Position,
    /// Position of the last event about this deployment.
    pub position: Position,
}

impl Deployment {
    /// Whether an instance of this revision and spec is as the present spec requires. One of an older
    /// revision is too if the spec has changed back since: it is kept.
    pub fn is_made_of(&self, revision: u64, spec: &DeploymentSpec) -> bool {
        revision == self.instance_revision || !needs_new_instances(spec, &self.spec)
    }
}

/// Whether the new spec requires other instances.
fn needs_new_instances(old: &DeploymentSpec, new: &DeploymentSpec) -> bool {
    instance_part(old) != instance_part(new)
}

/// The spec as far as it requires other instances. Their number, how requests reach them and are answered,
/// and how long the next ones may take to start can change without replacing them; everything else requires
/// new ones, probes included, since an instance is watched by the probes that it was started with.
fn instance_part(spec: &DeploymentSpec) -> DeploymentSpec {
    DeploymentSpec {
        instances: 0,
        request_settings: RequestSettings::default(),
        // What it sets is in the other fields.
        server: None,
        routes: None,
        protocol: None,
        error_mapping: None,
        authorization: Default::default(),
        drain_timeout: Default::default(),
        startup_timeout: Default::default(),
        ..spec.clone()
    }
}

/// Identifies the part of a spec that instances are created from: equal for specs that need no other
/// instances.
pub(crate) fn instance_digest(spec: &DeploymentSpec) -> u64 {
    // Specs are read from JSON, and can be written as such.
    let text = serde_json::to_vec(&instance_part(spec)).unwrap_or_default();
    let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(Sha256::digest(text));
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// The autoscale settings of a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Autoscale {
    /// Counts changes of the document; the ETag.
    pub revision: u64,
    /// Labels from the document.
    pub labels: Labels,
    /// Spec from the document.
    pub spec: AutoscaleSpec,
    /// When it was first applied to the deployment.
    #[serde(default)]
    pub created_at: Timestamp,
}

impl Endpoint {
    /// Returns the state after one more event. Events of other streams leave it unchanged.
    pub fn apply(state: Option<Self>, record: &Record) -> Option<Self> {
        match &record.event {
            Event::EndpointCreated(created) => Some(Self {
                uid: created.uid,
                name: created.name.clone(),
                labels: created.labels.clone(),
                spec: created.spec.clone(),
                traffic: Percentages::new(),
                mirror: Percentages::new(),
                keys: created.keys.clone(),
                state: ProvisioningState::Creating,
                state_reason: String::new(),
                created_at: record.time,
                revision: 1,
                deployments: BTreeMap::new(),
                created: record.position,
                position: record.position,
            }),
            Event::EndpointDeleted(_) => None,
            _ => {
                let mut endpoint = state?;
                endpoint.apply_change(record);
                Some(endpoint)
            }
        }
    }

    /// Whether it has a deployment with this uid.
    pub fn has(&self, uid: Uid) -> bool {
        self.deployments.values().any(|d| d.uid == uid)
    }

    fn apply_change(&mut self, record: &Record) {
        match &record.event {
            Event::EndpointUpdated(updated) => {
                self.labels.clone_from(&updated.labels);
                self.spec = updated.spec.clone();
                self.state = ProvisioningState::Updating;
                self.revision += 1;
            }
            Event::TrafficSet(set) => {
                self.traffic.clone_from(&set.traffic);
                self.mirror.clone_from(&set.mirror);
                self.revision += 1;
            }
            Event::KeyRegenerated(regenerated) => {
                let key = regenerated.key.clone();
                match regenerated.slot {
                    KeySlot::Primary => self.keys.primary = key,
                    KeySlot::Secondary => self.keys.secondary = key,
                }
            }
            Event::EndpointStateChanged(changed) => {
                self.state = changed.state;
                self.state_reason.clone_from(&changed.reason);
            }
            Event::EndpointDeletionRequested(_) => self.state = ProvisioningState::Deleting,
            Event::DeploymentCreated(created) => {
                let deployment = Deployment {
                    uid: created.uid,
                    labels: created.labels.clone(),
                    spec: created.spec.clone(),
                    instance_revision: 1,
                    revision: 1,
                    state: ProvisioningState::Creating,
                    state_reason: String::new(),
                    created_at: record.time,
                    autoscale: None,
                    pin: None,
                    pinned_by: None,
                    pause: Pause::default(),
                    changed_at: record.time,
                    created: record.position,
                    position: record.position,
                };
                let name = created.deployment.clone();
                self.deployments.insert(name, Box::new(deployment));
            }
            Event::DeploymentDeleted(of) => {
                self.deployments.remove(&of.deployment);
            }
            event => {
                let Some(deployment) =
                    deployment_of(event).and_then(|name| self.deployments.get_mut(name))
                else {
                    return;
                };
                deployment.apply_change(record);
                deployment.position = record.position;
            }
        }
        self.position = record.position;
    }
}

impl Deployment {
    fn apply_change(&mut self, record: &Record) {
        let time = record.time;
        match &record.event {
            Event::DeploymentUpdated(updated) => {
                self.labels.clone_from(&updated.labels);
                self.spec = updated.spec.clone();
                if self.instance_revision != updated.revision {
                    self.instance_revision = updated.revision;
                    self.changed_at = time;
                }
                self.state = ProvisioningState::Updating;
                self.revision += 1;
            }
            Event::DeploymentStateChanged(changed) => {
                self.state = changed.state;
                self.state_reason.clone_from(&changed.reason);
            }
            Event::DeploymentDeletionRequested(_) => self.state = ProvisioningState::Deleting,
            Event::AutoscaleSet(set) => {
                let before = self.autoscale.as_ref();
                self.autoscale = Some(Autoscale {
                    revision: set.revision,
                    labels: set.labels.clone(),
                    spec: set.spec.clone(),
                    created_at: before.map_or(time, |before| before.created_at),
                });
            }
            Event::AutoscaleRemoved(_) => self.autoscale = None,
            Event::AutoscalePinned(pinned) => {
                self.pin = Some(pinned.pin);
                self.pinned_by = Some(record.actor.0.clone());
            }
            Event::AutoscaleReleased(_) => {
                self.pin = None;
                self.pinned_by = None;
            }
            Event::AutoscalePauseSet(set) => self.pause = set.pause,
            _ => {}
        }
    }
}

/// The deployment that an event of the endpoint's stream is about, if any.
fn deployment_of(event: &Event) -> Option<&Name> {
    Some(match event {
        Event::DeploymentUpdated(event) => &event.deployment,
        Event::DeploymentStateChanged(event) => &event.deployment,
        Event::DeploymentDeletionRequested(event)
        | Event::AutoscaleRemoved(event)
        | Event::AutoscaleReleased(event) => &event.deployment,
        Event::AutoscaleSet(event) => &event.deployment,
        Event::AutoscalePinned(event) => &event.deployment,
        Event::AutoscalePauseSet(event) => &event.deployment,
        _ => return None,
    })
}
