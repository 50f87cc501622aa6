//! Plans the next requests about single instances from what was decided and what runs.
//!
//! Level-triggered: the plan is a function of the complete state, so nothing is lost if a
//! predecessor handled an event, and planning twice requests nothing twice. Every request contains
//! all that a node needs; nodes make no choices.

use std::collections::BTreeMap;

use contract::events::{
    Event, InstanceDraining, InstanceRemovalRequested, InstanceRequested, RemovalReason,
    RequestReason,
};
use contract::ids::{DeploymentRef, InstanceId, Name, Uid};
use contract::resources::{ProvisioningState, Update};
use contract::time::{Span, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::placement::Placement;
use super::{Instance, Instances, Phase, StartHistory};
use crate::endpoint::{Deployment, Endpoint};
use crate::members::Members;

/// Delay after the first failure; doubles with each consecutive one.
const BACKOFF_FIRST: Span = Span::from_secs(1);
/// Longest delay after a failure.
pub const BACKOFF_MAX: Span = Span::from_secs(60);
/// Consecutive failures from which on only one start is attempted at a time.
const SINGLE_START_AFTER_FAILURES: u32 = 2;
/// Share of the granted number, at least one instance, that a rollout may start in addition, and that may
/// be missing while instances that fail their liveness probe, or have to stop first, are replaced.
const SURGE_PERCENT: u32 = 25;

/// What the latest decision on a deployment granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// Number of instances.
    pub instances: u32,
    /// Id of the decision.
    pub decision: Uuid,
}

/// The inputs of a plan besides the folded states.
pub struct PlanContext<'a> {
    /// By deployment uid; a deployment without a decision keeps its instances.
    pub granted: &'a BTreeMap<Uid, Granted>,
    /// Whether the gateways have released a draining instance.
    pub drained: &'a dyn Fn(&Instance) -> bool,
    /// The current gateways and nodes.
    pub members: &'a Members,
    /// The node in this process, which may get instances before the log lists it as a member.
    pub own_node: Option<&'a str>,
    /// Whether there can be no other node than `own_node`.
    pub is_only_node: bool,
    /// Time of the plan.
    pub now: Timestamp,
}

impl<'a> PlanContext<'a> {
    /// The only node takes over what a former one ran, so nothing is lost there.
    fn is_lost(&self, instance: &Instance) -> bool {
        self.only_node().is_none() && self.members.is_lost(&instance.node, self.now)
    }

    fn only_node(&self) -> Option<&'a str> {
        self.own_node.filter(|_| self.is_only_node)
    }
}

/// Returns the next requests about the instances of one endpoint, as events for its stream `instances/…`.
pub fn plan(
    name: &Name,
    endpoint: Option<&Endpoint>,
    instances: &Instances,
    context: &PlanContext<'_>,
    new_id: &mut dyn FnMut() -> Uuid,
) -> Vec<Event> {
    let mut requests = Vec::new();
    for instance in instances.instances.values() {
        if let Some(reason) = removal_due(instance, context) {
            requests.push(remove(instance, reason));
        } else if instance.is_kept() && !belongs_to_live_deployment(endpoint, instance) {
            requests.push(drain(endpoint, instance, RemovalReason::Deleted, None));
        } else if instance.is_kept() && context.is_lost(instance) {
            // It may still run unseen: gateways must release it before its node may stop it.
            requests.push(drain(endpoint, instance, RemovalReason::NodeLost, None));
        }
    }
    let mut placement = Placement::new(
        instances,
        context.members,
        context.own_node,
        context.only_node(),
        context.now,
    );
    for (deployment_name, deployment) in endpoint.iter().flat_map(|e| &e.deployments) {
        let Some(granted) = context.granted.get(&deployment.uid) else {
            continue;
        };
        if is_deleting(endpoint, deployment) {
            continue;
        }
        let fleet = Fleet::new(deployment_name, deployment, instances, context);
        let of = DeploymentRef {
            endpoint: name.clone(),
            deployment: deployment_name.clone(),
        };
        // A new revision is tried at once, whatever became of the one before. Others being healthy says
        // nothing about the next start.
        let history = instances
            .failures(deployment.uid, deployment.instance_revision)
            .filter(|_| !instances.has_recovered(deployment.uid, context.now));
        let allowed = starts_allowed(&fleet, history, context.now);
        let starts = fleet.starts(granted.instances).min(allowed);
        for _ in 0..starts {
            let Some(node) = placement.place(deployment) else {
                break;
            };
            let reason = fleet.reason(granted.instances, history);
            let id = InstanceId::new(&of, new_id());
            requests.push(request(id, &of, deployment, *granted, reason, node));
        }
        let mut drains = fleet.drains(granted.instances);
        if drains.is_empty() {
            let unhealthy = fleet.unhealthy_to_replace(granted.instances, allowed > 0);
            drains.extend(unhealthy.map(|instance| (instance, RemovalReason::Unhealthy)));
        }
        requests.extend(
            drains.into_iter().map(|(instance, reason)| {
                drain(endpoint, instance, reason, Some(granted.decision))
            }),
        );
    }
    requests
}

/// The time before which no start is attempted; `None` while starts succeed.
pub fn backoff_until(history: &StartHistory) -> Option<Timestamp> {
    let last_failure = history.last_failure?;
    let doublings = history.failures.saturating_sub(1).min(16);
    let wait = BACKOFF_FIRST
        .millis()
        .saturating_mul(1 << doublings)
        .min(BACKOFF_MAX.millis());
    Some(last_failure + Span::from_millis(wait))
}

fn is_deleting(endpoint: Option<&Endpoint>, deployment: &Deployment) -> bool {
    deployment.state == ProvisioningState::Deleting
        || endpoint.is_none_or(|endpoint| endpoint.state == ProvisioningState::Deleting)
}

fn belongs_to_live_deployment(endpoint: Option<&Endpoint>, instance: &Instance) -> bool {
    deployment_of(endpoint, instance).is_some_and(|d| !is_deleting(endpoint, d))
}

/// The deployment of an instance, unless it is gone.
fn deployment_of<'a>(
    endpoint: Option<&'a Endpoint>,
    instance: &Instance,
) -> Option<&'a Deployment> {
    let deployment = endpoint?.deployments.get(&instance.deployment)?;
    (deployment.uid == instance.deployment_uid).then_some(deployment)
}

/// Why an instance must be removed now, if so.
fn removal_due(instance: &Instance, context: &PlanContext<'_>) -> Option<RemovalReason> {
    if instance.removal.is_some() {
        return None;
    }
    if instance.phase == Phase::Failed {
        return Some(RemovalReason::Ended);
    }
    let draining = instance.draining.as_ref()?;
    (context.drained)(instance).then_some(draining.reason)
}

fn remove(instance: &Instance, reason: RemovalReason) -> Event {
    Event::InstanceRemovalRequested(InstanceRemovalRequested {
        id: instance.id.clone(),
        generation: instance.generation + 1,
        node: instance.node.clone(),
        grace: instance.spec.termination_grace(),
        reason,
    })
}

fn drain(
    endpoint: Option<&Endpoint>,
    instance: &Instance,
    reason: RemovalReason,
    decision: Option<Uuid>,
) -> Event {
    let present = deployment_of(endpoint, instance).map(|deployment| &deployment.spec);
    Event::InstanceDraining(InstanceDraining {
        id: instance.id.clone(),
        reason,
        decision,
        timeout: super::drain::timeout(instance, present),
    })
}

fn request(
    id: InstanceId,
    of: &DeploymentRef,
    deployment: &Deployment,
    granted: Granted,
    reason: RequestReason,
    node: String,
) -> Event {
    Event::InstanceRequested(Box::new(InstanceRequested {
        id,
        generation: 1,
        deployment: of.clone(),
        deployment_uid: deployment.uid,
        revision: deployment.instance_revision,
        node,
        decision: Some(granted.decision),
        reason,
        spec: deployment.spec.clone(),
    }))
}

/// The instances of one deployment that are kept, by revision.
struct Fleet<'a> {
    current: Vec<&'a Instance>,
    /// Created from an older revision, to be replaced.
    old: Vec<&'a Instance>,
    /// Whether instances that were lost with their node are still listed.
    has_lost: bool,
    /// Whether an instance that failed its liveness probe is still being drained or removed.
    is_replacing_unhealthy: bool,
    /// How many instances may still run if none may start beside one that is to be replaced, those of an
    /// earlier incarnation included.
    running_if_stop_first: Option<u32>,
    /// If old instances have to stop first: whether instances of other specs were ready, and none of the
    /// present one.
    is_new_spec: bool,
}

impl<'a> Fleet<'a> {
    fn new(
        name: &Name,
        deployment: &Deployment,
        instances: &'a Instances,
        context: &PlanContext<'_>,
    ) -> Self {
        let (current, old) = instances
            .of(deployment.uid)
            .filter(|instance| instance.is_kept() && !context.is_lost(instance))
            .partition(|instance| deployment.is_made_of(instance.revision, &instance.spec));
        let has_lost = instances
            .of(deployment.uid)
            .any(|instance| context.is_lost(instance));
        let may_run = |instance: &&Instance| {
            instance.deployment == *name
                && instance.phase != Phase::Failed
                && !context.is_lost(instance)
        };
        let all = || instances.instances.values().map(Box::as_ref);
        let running = || all().filter(may_run).count() as u32;
        let is_stop_first = deployment.spec.update == Update::StopFirst;
        Self {
            current,
            old,
            has_lost,
            running_if_stop_first: is_stop_first.then(running),
            // Hashes the spec, so only if it is needed.
            is_new_spec: is_stop_first
                && instances.was_any_ready(deployment.uid)
                && !instances.was_ready(deployment),
            is_replacing_unhealthy: instances.of(deployment.uid).any(|instance| {
                let draining = instance.draining.as_ref();
                draining.is_some_and(|draining| draining.reason == RemovalReason::Unhealthy)
                    && !context.is_lost(instance)
            }),
        }
    }

    fn kept(&self) -> impl Iterator<Item = &'a Instance> {
        self.current.iter().chain(&self.old).copied()
    }

    /// The next instance to drain because it fails its liveness probe: one at a time, and only as many as
    /// replacements become ready. What fails all probes at once, such as an overload, must not end all
    /// instances, and the last ready one stays until its replacement may start.
    fn unhealthy_to_replace(&self, wanted: u32, may_start: bool) -> Option<&'a Instance> {
        if self.is_replacing_unhealthy {
            return None;
        }
        let unhealthy = self.kept().find(|instance| instance.unhealthy.is_some())?;
        let is_healthy = |instance: &&Instance| instance.unhealthy.is_none();
        let others_serve = self.kept().filter(is_healthy).any(Instance::is_ready);
        let others_start = self.kept().filter(is_healthy).any(|i| !i.is_ready());
        let left = self.ready() - u32::from(unhealthy.is_ready());
        if unhealthy.is_ready() && left == 0 && !may_start {
            return None;
        }
        let is_spare = left + surge(wanted) >= wanted;
        // Without any ready one, or if only starts that fail are missing, waiting would not help.
        let is_stuck = !others_start && (others_serve || self.ready() == 0);
        (is_spare || is_stuck).then_some(unhealthy)
    }

    fn size(&self) -> u32 {
        (self.current.len() + self.old.len()) as u32
    }

    fn ready(&self) -> u32 {
        self.current
            .iter()
            .chain(&self.old)
            .filter(|instance| instance.is_ready())
            .count() as u32
    }

    /// How many instances to start. During a rollout, old and new ones together may exceed the
    /// granted number only by the surge, or not at all if the old ones have to stop first.
    fn starts(&self, wanted: u32) -> u32 {
        let missing = wanted.saturating_sub(self.current.len() as u32);
        if let Some(running) = self.running_if_stop_first {
            return missing.min(wanted.saturating_sub(running));
        }
        if self.old.is_empty() {
            return missing;
        }
        missing.min((wanted + surge(wanted)).saturating_sub(self.size()))
    }

    fn reason(&self, wanted: u32, history: Option<&StartHistory>) -> RequestReason {
        let is_rollout = match self.running_if_stop_first {
            Some(_) => !self.old.is_empty() || self.is_new_spec,
            None => !self.old.is_empty() && self.size() >= wanted,
        };
        if is_rollout {
            RequestReason::Rollout
        } else if self.has_lost || history.is_some() {
            RequestReason::Replacement
        } else {
            RequestReason::ScaleOut
        }
    }

    /// Which instances to drain: those that serve nothing first, ready ones only while the granted
    /// number of ready ones remains, or almost if they have to stop first.
    fn drains(&self, wanted: u32) -> Vec<(&'a Instance, RemovalReason)> {
        let mut drains = Vec::new();
        let may_be_missing = self.running_if_stop_first.map_or(0, |_| surge(wanted));
        let mut ready_spare = self
            .ready()
            .saturating_sub(wanted.saturating_sub(may_be_missing));
        for instance in &self.old {
            if !instance.is_ready() {
                drains.push((*instance, RemovalReason::Rollout));
            } else if ready_spare > 0 {
                ready_spare -= 1;
                drains.push((*instance, RemovalReason::Rollout));
            }
        }
        let surplus = (self.current.len() as u32).saturating_sub(wanted);
        let mut candidates = self.current.clone();
        // Not ready or not live before ready, then the youngest first: it has the least warmed-up state to
        // lose.
        candidates.sort_by_key(|i| {
            (
                i.is_ready() && i.unhealthy.is_none(),
                std::cmp::Reverse(i.requested_at),
                i.id.clone(),
            )
        });
        let leaving = candidates.into_iter().take(surplus as usize);
        drains.extend(leaving.map(|instance| (instance, RemovalReason::ScaleIn)));
        drains
    }
}

/// By how many instances a replacement may deviate from the wanted number.
fn surge(wanted: u32) -> u32 {
    (wanted * SURGE_PERCENT).div_ceil(100).max(1)
}

/// How many starts the crash-loop back-off allows now.
fn starts_allowed(fleet: &Fleet<'_>, history: Option<&StartHistory>, now: Timestamp) -> u32 {
    let Some(history) = history else {
        return u32::MAX;
    };
    if backoff_until(history).is_some_and(|until| now < until) {
        return 0;
    }
    if history.failures < SINGLE_START_AFTER_FAILURES {
        return u32::MAX;
    }
    let starting = fleet
        .current
        .iter()
        .filter(|i| i.phase == Phase::Starting)
        .count() as u32;
    1u32.saturating_sub(starting)
}
