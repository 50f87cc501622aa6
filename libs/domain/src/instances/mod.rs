//! The instances of one endpoint: what was asked for (stream `instances/…`) and what the nodes say
//! became of it (streams `node/…`), folded into one state.

pub mod drain;
mod place;
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

use crate::members::Members;

/// All instances of an endpoint that are not over yet, and how starts have gone lately.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instances {
    /// By id.
    pub instances: BTreeMap<InstanceId, Instance>,
    /// By deployment uid.
    pub starts: BTreeMap<Uid, StartHistory>,
}

/// One instance, from its order until it is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// Never used again.
    pub id: InstanceId,
    /// Of which deployment.
    pub deployment: Name,
    /// Its incarnation.
    pub deployment_uid: Uid,
    /// The deployment's instance revision.
    pub revision: u64,
    /// The highest order given about it.
    pub generation: u64,
    /// Where it runs, by the node's id.
    pub node: String,
    /// Why it was asked for.
    pub reason: RequestReason,
    /// The decision that asked for it, where one did.
    pub decision: Option<Uuid>,
    /// What it is made of.
    pub spec: DeploymentSpec,
    /// What is known of it.
    pub phase: Phase,
    /// `HOST:PORT` that it listens on, once it has one.
    pub address: Option<String>,
    /// Of its process, where it has one.
    pub pid: Option<u32>,
    /// When it was asked for.
    pub requested_at: Timestamp,
    /// When its node began it.
    pub started_at: Option<Timestamp>,
    /// When it first became ready.
    pub ready_at: Option<Timestamp>,
    /// The order to take no new requests, once it was given.
    pub draining: Option<Draining>,
    /// The order to end it, once it was given.
    pub removal: Option<Removal>,
    /// What its node said of it last, for people; empty where it said nothing.
    pub detail: String,
}

/// What is known of the instance itself; draining and removal are orders, and stand apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Asked for, not ready yet.
    Starting,
    /// Answers its readiness probe.
    Ready,
    /// Was ready; its readiness probe fails now.
    Unready,
    /// Could not start, or ended by itself. Waits to be cleared away.
    Failed,
}

/// An order that no new request goes to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Draining {
    /// Position of the order; a gateway whose routes have reached it sends no new request.
    pub position: Position,
    /// When it was given.
    pub since: Timestamp,
    /// How long requests may take to end before the instance is ended with them.
    pub timeout: Span,
    /// Why the instance is to go.
    pub reason: RemovalReason,
}

/// An order to end an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Removal {
    /// Of the order.
    pub generation: u64,
    /// From the polite signal to the hard one.
    pub grace: Span,
    /// When it was given first.
    pub since: Timestamp,
}

/// How the last starts of a deployment went; crash-loop back-off rests on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartHistory {
    /// Failures in a row; an instance that is ready for long enough ends the row.
    pub failures: u32,
    /// When one failed last; none where none has.
    pub last_failure: Option<Timestamp>,
    /// Why, for people.
    pub last_reason: String,
}

/// An instance that stays ready for this long after a failure ends the row of failures.
pub const HEALTHY_AFTER: Span = Span::from_secs(60);

/// The word for an instance's state in the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceState {
    /// Asked for, not ready yet, or not ready any more.
    Starting,
    /// Answers its readiness probe.
    Ready,
    /// Finishes what it has, to go then.
    Draining,
    /// Gone because it was to go.
    Stopped,
    /// Ended by itself, or never started.
    Failed,
}

impl Instance {
    /// Of phase and orders together.
    pub fn state(&self) -> InstanceState {
        match self.phase {
            Phase::Failed => InstanceState::Failed,
            _ if self.draining.is_some() || self.removal.is_some() => InstanceState::Draining,
            Phase::Ready => InstanceState::Ready,
            Phase::Starting | Phase::Unready => InstanceState::Starting,
        }
    }

    /// Counts towards the wanted number: not failed and not on its way out.
    pub fn is_kept(&self) -> bool {
        matches!(self.state(), InstanceState::Starting | InstanceState::Ready)
    }

    /// Nothing is left to be done about it but by its node, which is lost: nobody waits for that.
    pub fn is_written_off(&self, members: &Members, now: Timestamp) -> bool {
        self.removal.is_some() && members.is_lost(&self.node, now)
    }

    /// Whether it may be given requests.
    pub fn is_ready(&self) -> bool {
        self.state() == InstanceState::Ready
    }
}

impl Instances {
    /// Those of one deployment, by id.
    pub fn of(&self, deployment_uid: Uid) -> impl Iterator<Item = &Instance> {
        self.instances
            .values()
            .filter(move |instance| instance.deployment_uid == deployment_uid)
    }

    /// Takes in one event; events that are not about instances leave the state as it is.
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
            };
            self.instances.insert(requested.id.clone(), instance);
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
        if let Event::InstanceFailed(ended) = &record.event {
            let history = self.starts.entry(deployment_uid).or_default();
            let was_healthy = instance
                .ready_at
                .is_some_and(|ready| record.time.since(ready) >= HEALTHY_AFTER);
            history.failures = if was_healthy { 1 } else { history.failures + 1 };
            history.last_failure = Some(record.time);
            history.last_reason.clone_from(&ended.reason);
        }
    }

    /// Forgets what belongs to a deployment that is gone.
    pub fn forget(&mut self, deployment_uid: Uid) {
        self.instances
            .retain(|_, instance| instance.deployment_uid != deployment_uid);
        self.starts.remove(&deployment_uid);
    }
}

impl Instance {
    fn apply_change(&mut self, record: &Record) {
        match &record.event {
            Event::InstanceStarted(started) => {
                self.address = Some(started.address.clone());
                self.pid = started.pid;
                self.started_at.get_or_insert(record.time);
                if started.adopted && self.phase == Phase::Ready {
                    // Adopted instances prove themselves again before they serve.
                    self.phase = Phase::Unready;
                }
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
                self.removal = Some(Removal {
                    generation: removal.generation,
                    grace: removal.grace,
                    since: record.time,
                });
            }
            _ => {}
        }
    }
}

/// The instance that an event is about, other than its request.
fn instance_of(event: &Event) -> Option<&InstanceId> {
    Some(match event {
        Event::InstanceStarted(event) => &event.id,
        Event::InstanceReady(event) => &event.id,
        Event::InstanceUnready(event) => &event.id,
        Event::InstanceFailed(event) | Event::InstanceStopped(event) => &event.id,
        Event::InstanceDraining(event) => &event.id,
        Event::InstanceRemovalRequested(event) => &event.id,
        _ => return None,
    })
}
