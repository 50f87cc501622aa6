//! The instances of one endpoint: what was requested (stream `instances/…`) and what nodes report
//! of it (streams `node/…`), folded into one state.

pub mod drain;
mod placement;
pub mod plan;
pub mod ready;

use std::collections::BTreeMap;

use contract::events::{Event, RemovalReason, RequestReason};
use contract::ids::{InstanceId, Name, Position, Uid};
use contract::log::Record;
use contract::resources::DeploymentSpec;
use contract::time::{Span, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::endpoint::{Deployment, instance_digest};
use crate::members::Members;

/// The instances of an endpoint that have not ended, and how recent starts went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instances {
    /// By id.
    pub instances: BTreeMap<InstanceId, Box<Instance>>,
    /// By deployment uid.
    pub starts: BTreeMap<Uid, StartHistory>,
    /// The last specs of which an instance was ever ready, by deployment uid; the newest last.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ready_specs: BTreeMap<Uid, Vec<u64>>,
}

/// One instance, from its request to its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// Never reused.
    pub id: InstanceId,
    /// The deployment.
    pub deployment: Name,
    /// The deployment's incarnation.
    pub deployment_uid: Uid,
    /// The deployment's instance revision.
    pub revision: u64,
    /// Generation of the latest request about it.
    pub generation: u64,
    /// Id of the node that it runs on, or was requested on.
    pub node: String,
    /// Why it was requested.
    pub reason: RequestReason,
    /// The decision that requested it, if any.
    pub decision: Option<Uuid>,
    /// The spec that it was created from.
    pub spec: DeploymentSpec,
    /// The phase that its node last reported.
    pub phase: Phase,
    /// `HOST:PORT` that it listens on, once known.
    pub address: Option<String>,
    /// Process id, if it is a process.
    pub pid: Option<u32>,
    /// When it was requested.
    pub requested_at: Timestamp,
    /// When its node started it.
    pub started_at: Option<Timestamp>,
    /// When it first became ready.
    pub ready_at: Option<Timestamp>,
    /// The request to drain it, if there is one.
    pub draining: Option<Draining>,
    /// The request to remove it, if there is one.
    pub removal: Option<RemovalRequest>,
    /// The latest detail that its node reported, for people; empty if none.
    pub detail: String,
    /// Why it fails its liveness probe and has to be replaced, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy: Option<String>,
}

/// The reported phase of an instance; draining and removal are requests and are kept separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Requested, not ready yet.
    Starting,
    /// Its readiness probe succeeds.
    Ready,
    /// Was ready; its readiness probe fails now.
    Unready,
    /// Failed to start, or exited by itself. Waits to be removed.
    Failed,
}

/// A request to drain an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Draining {
    /// Position of the request; a gateway whose routes have reached it sends the instance nothing new.
    pub position: Position,
    /// When it was made.
    pub since: Timestamp,
    /// How long requests may take to finish before the instance is stopped regardless.
    pub timeout: Span,
    /// Why the instance is being removed.
    pub reason: RemovalReason,
}

/// A request to remove an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RemovalRequest {
    /// Generation of the request.
    pub generation: u64,
    /// Time from the termination signal to the kill signal.
    pub grace: Span,
    /// When it was made.
    pub since: Timestamp,
}

/// How recent starts of one revision of a deployment went; the basis of the crash-loop back-off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartHistory {
    /// The instance revision whose starts these are.
    pub revision: u64,
    /// Consecutive failures; reset by an instance that is started after one and stays ready for long
    /// enough, not by those that were healthy before.
    pub failures: u32,
    /// Time of the last failure, if any.
    pub last_failure: Option<Timestamp>,
    /// Reason of the last failure, for people.
    pub last_reason: String,
}

impl StartHistory {
    /// Whether this instance is a start after the last failure that went well.
    fn is_ended_by(&self, instance: &Instance, now: Timestamp) -> bool {
        instance.revision == self.revision
            && instance.is_ready()
            && instance.ready_at.is_some_and(|ready| {
                let is_later = self.last_failure.is_none_or(|failure| ready > failure);
                is_later && now.since(ready) >= HEALTHY_AFTER
            })
    }
}

/// How many specs of a deployment are remembered to have been ready.
const READY_SPECS_MAX: usize = 10;

/// An instance that stays ready for this long resets the count of consecutive failures.
pub const HEALTHY_AFTER: Span = Span::from_secs(60);

/// The state of an instance as the API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceState {
    /// Requested and not ready yet, or no longer ready.
    Starting,
    /// Its readiness probe succeeds.
    Ready,
    /// Finishing its requests before it is removed.
    Draining,
    /// Ended because its removal was requested.
    Stopped,
    /// Exited by itself, or never started.
    Failed,
}

impl Instance {
    /// Derives the state from the phase and from requests to drain or remove it.
    pub fn state(&self) -> InstanceState {
        match self.phase {
            Phase::Failed => InstanceState::Failed,
            _ if self.draining.is_some() || self.removal.is_some() => InstanceState::Draining,
            Phase::Ready => InstanceState::Ready,
            Phase::Starting | Phase::Unready => InstanceState::Starting,
        }
    }

    /// Whether it counts towards the granted number: neither failed nor on its way out.
    pub fn is_kept(&self) -> bool {
        matches!(self.state(), InstanceState::Starting | InstanceState::Ready)
    }

    /// Whether only its lost node could still do something about it: nobody waits for that.
    pub fn is_written_off(&self, members: &Members, now: Timestamp) -> bool {
        self.removal.is_some() && members.is_lost(&self.node, now)
    }

    /// Whether it may receive requests.
    pub fn is_ready(&self) -> bool {
        self.state() == InstanceState::Ready
    }
}

impl Instances {
    /// The instances of one deployment, by id.
    pub fn of(&self, deployment_uid: Uid) -> impl Iterator<Item = &Instance> {
        let instances = self.instances.values().map(Box::as_ref);
        instances.filter(move |instance| instance.deployment_uid == deployment_uid)
    }

    /// Applies one event; events that are not about instances leave the state unchanged.
    pub fn apply(&mut self, record: &Record) {
        if let Event::InstanceRequested(requested) = &record.event {
            let instance = Instance {
                id: requested.id.clone(),
                deployment: requested.deployment.deployment.clone(),
                deployment_uid: requested.deployment_uid,
                revision: requested.revision,
                generation: requested.generation,
                node: requested.node.clone(),
                reason: requested.reason,
                decision: requested.decision,
                spec: requested.spec.clone(),
                phase: Phase::Starting,
                address: None,
                pid: None,
                requested_at: record.time,
                started_at: None,
                ready_at: None,
                draining: None,
                removal: None,
                detail: String::new(),
                unhealthy: None,
            };
            let id = requested.id.clone();
            self.instances.insert(id, Box::new(instance));
            return;
        }
        let Some(id) = instance_of(&record.event) else {
            return;
        };
        if matches!(record.event, Event::InstanceStopped(_)) {
            self.instances.remove(id);
            return;
        }
        let Some(instance) = self.instances.get_mut(id) else {
            return;
        };
        let deployment_uid = instance.deployment_uid;
        instance.apply_change(record);
        if matches!(record.event, Event::InstanceReady(_)) {
            let digest = instance_digest(&instance.spec);
            let ready = self.ready_specs.entry(deployment_uid).or_default();
            ready.retain(|other| *other != digest);
            ready.push(digest);
            if ready.len() > READY_SPECS_MAX {
                ready.remove(0);
            }
        }
        let failure = match &record.event {
            Event::InstanceFailed(ended) => Some(&ended.reason),
            Event::InstanceUnhealthy(unhealthy) => Some(&unhealthy.reason),
            _ => None,
        };
        if let Some(reason) = failure {
            let revision = instance.revision;
            let was_healthy = instance
                .ready_at
                .is_some_and(|ready| record.time.since(ready) >= HEALTHY_AFTER);
            if was_healthy && matches!(record.event, Event::InstanceUnhealthy(_)) {
                // Its replacement need not wait.
                return;
            }
            let before = self.starts.get(&deployment_uid);
            let before = before.filter(|history| history.revision >= revision);
            let continues = !was_healthy && !self.has_recovered(deployment_uid, record.time);
            let failures = match before {
                // The end of an instance that is being replaced anyway.
                Some(history) if history.revision > revision => return,
                Some(history) if continues => history.failures.saturating_add(1),
                _ => 1,
            };
            let history = StartHistory {
                revision,
                failures,
                last_failure: Some(record.time),
                last_reason: reason.clone(),
            };
            self.starts.insert(deployment_uid, history);
        }
    }

    /// The failures in a row of this revision of a deployment, if there are any.
    pub fn failures(&self, deployment_uid: Uid, revision: u64) -> Option<&StartHistory> {
        let history = self.starts.get(&deployment_uid);
        history.filter(|history| history.revision == revision && history.failures > 0)
    }

    /// Whether any instance of a deployment was ever ready.
    pub fn was_any_ready(&self, deployment_uid: Uid) -> bool {
        self.ready_specs.contains_key(&deployment_uid)
    }

    /// Whether an instance of a deployment's present spec was ever ready, also before the spec changed and
    /// changed back.
    pub fn was_ready(&self, deployment: &Deployment) -> bool {
        let ready = self.ready_specs.get(&deployment.uid);
        ready.is_some_and(|ready| ready.contains(&instance_digest(&deployment.spec)))
    }

    /// Whether an instance started after the last failure has stayed ready for long enough.
    pub fn has_recovered(&self, deployment_uid: Uid, now: Timestamp) -> bool {
        let Some(history) = self.starts.get(&deployment_uid) else {
            return true;
        };
        self.of(deployment_uid)
            .any(|instance| history.is_ended_by(instance, now))
    }

    /// Removes everything that belongs to a deleted deployment.
    pub fn forget(&mut self, deployment_uid: Uid) {
        self.instances
            .retain(|_, instance| instance.deployment_uid != deployment_uid);
        self.starts.remove(&deployment_uid);
        self.ready_specs.remove(&deployment_uid);
    }
}

impl Instance {
    fn apply_change(&mut self, record: &Record) {
        match &record.event {
            Event::InstanceStarted(started) => {
                if let Some(node) = record.stream.node() {
                    // Another one than it was requested on, if that has taken over its instances.
                    node.clone_into(&mut self.node);
                }
                self.address = Some(started.address.clone());
                self.pid = started.pid;
                self.started_at.get_or_insert(record.time);
                if started.adopted && self.phase == Phase::Ready {
                    // Adopted instances must become ready again before they serve.
                    self.phase = Phase::Unready;
                }
            }
            Event::InstanceStarting(starting) if self.ready_at.is_none() => {
                self.detail.clone_from(&starting.detail);
            }
            Event::InstanceReady(_) => {
                self.phase = Phase::Ready;
                self.ready_at.get_or_insert(record.time);
                self.detail.clear();
            }
            Event::InstanceUnready(unready) => {
                self.phase = Phase::Unready;
                self.detail.clone_from(&unready.reason);
            }
            Event::InstanceUnhealthy(unhealthy) => {
                self.unhealthy = Some(unhealthy.reason.clone());
            }
            Event::InstanceFailed(ended) => {
                self.phase = Phase::Failed;
                self.detail.clone_from(&ended.reason);
            }
            Event::InstanceDraining(draining) => {
                self.draining = Some(Draining {
                    position: record.position,
                    since: record.time,
                    timeout: draining.timeout,
                    reason: draining.reason,
                });
            }
            Event::InstanceRemovalRequested(removal) => {
                self.generation = removal.generation;
                self.removal = Some(RemovalRequest {
                    generation: removal.generation,
                    grace: removal.grace,
                    since: record.time,
                });
            }
            _ => {}
        }
    }
}

/// The instance that an event other than a request is about.
fn instance_of(event: &Event) -> Option<&InstanceId> {
    Some(match event {
        Event::InstanceStarted(event) => &event.id,
        Event::InstanceStarting(event) => &event.id,
        Event::InstanceReady(event) => &event.id,
        Event::InstanceUnready(event) => &event.id,
        Event::InstanceUnhealthy(event) => &event.id,
        Event::InstanceFailed(event) | Event::InstanceStopped(event) => &event.id,
        Event::InstanceDraining(event) => &event.id,
        Event::InstanceRemovalRequested(event) => &event.id,
        _ => return None,
    })
}
