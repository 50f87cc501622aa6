//! Commands on an endpoint, and the events that they lead to.
//!
//! Invariants: traffic sums to 0 or 100 and names deployments that exist and are not being deleted;
//! a mirrored deployment gets no live traffic; a command that changes nothing produces no event;
//! ids and keys are part of the command, so the same command on the same state always produces the
//! same events.

use contract::decision::{Pause, Pin};
use contract::events::{
    AutoscalePauseSet, AutoscalePinned, AutoscaleSet, DeploymentCreated, DeploymentEvent,
    DeploymentUpdated, Empty, EndpointCreated, EndpointKeys, EndpointUpdated, Event,
    KeyRegenerated, KeySlot, SealedKey, TrafficSet,
};
use contract::ids::{DeploymentRef, Name, Uid};
use contract::problem::Finding;
use contract::resources::{
    AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels, Percentages, ProvisioningState, limits,
};
use contract::time::Timestamp;

use super::{Deployment, Endpoint, needs_new_instances};
use crate::documents;
use crate::zones::ZoneData;

/// Most endpoints of a workspace: five times as many as `make bench-endpoints` measures. Each costs
/// a route in every gateway.
pub const ENDPOINTS_MAX: usize = 50_000;
/// Most deployments of an endpoint; the same limit as Azure's.
pub const DEPLOYMENTS_PER_ENDPOINT_MAX: usize = 20;

/// A command on an endpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Creates or updates the endpoint.
    PutEndpoint {
        /// Its complete labels.
        labels: Labels,
        /// Its spec; shares that it omits stay as they are.
        spec: EndpointSpec,
        /// Uid to use if the endpoint is new.
        uid: Uid,
        /// Keys to use if the endpoint is new.
        keys: EndpointKeys,
    },
    /// Sets traffic shares; those omitted stay as they are.
    SetTraffic {
        /// Shares of live traffic in percent, of all deployments.
        traffic: Option<Percentages>,
        /// Shares of copied traffic in percent, of all deployments.
        mirror: Option<Percentages>,
    },
    /// Replaces one of its keys.
    RegenerateKey {
        /// Which key.
        slot: KeySlot,
        /// The new key.
        key: SealedKey,
    },
    /// Deletes the endpoint with everything that belongs to it.
    DeleteEndpoint,
    /// Creates or updates a deployment.
    PutDeployment {
        /// Its name within the endpoint.
        deployment: Name,
        /// Its complete labels.
        labels: Labels,
        /// Its spec.
        spec: Box<DeploymentSpec>,
        /// Uid to use if the deployment is new.
        uid: Uid,
    },
    /// Deletes a deployment, which must have no share of live traffic.
    DeleteDeployment {
        /// The deployment.
        deployment: Name,
    },
    /// Sets the autoscale settings of a deployment.
    PutAutoscale {
        /// The deployment.
        deployment: Name,
        /// Their complete labels.
        labels: Labels,
        /// Their spec.
        spec: AutoscaleSpec,
    },
    /// Removes the autoscale settings of a deployment.
    DeleteAutoscale {
        /// The deployment.
        deployment: Name,
    },
    /// Pins the count of a deployment, whatever the rules say.
    Pin {
        /// The deployment.
        deployment: Name,
        /// The count, and until when.
        pin: Pin,
    },
    /// Releases the pin.
    Release {
        /// The deployment.
        deployment: Name,
    },
    /// Pauses or resumes scaling.
    SetPause {
        /// The deployment.
        deployment: Name,
        /// The directions that are paused.
        pause: Pause,
    },
}

/// Condition on the document's revision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precondition {
    /// No condition.
    #[default]
    None,
    /// The document must not exist.
    Absent,
    /// The document must exist, at any revision.
    Present,
    /// The document must be at this revision.
    Revision(u64),
}

/// The context of a command.
#[derive(Clone, Debug)]
pub struct Context {
    /// The endpoint that the command is about.
    pub endpoint: Name,
    /// Number of other endpoints.
    pub other_endpoints: usize,
    /// Precondition of the command.
    pub precondition: Precondition,
    /// Time zones that schedules are checked with.
    pub zones: ZoneData,
    /// Time of the command.
    pub now: Timestamp,
}

/// Why a command is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandRefusal {
    /// Its subject does not exist; the message says what to look for.
    #[error("{0}")]
    NotFound(String),
    /// The request is invalid, with the fields at fault.
    #[error("the request is not valid")]
    Invalid(Vec<Finding>),
    /// The request is valid but conflicts with the current state.
    #[error("{detail}")]
    Conflict {
        /// Stable, for programs: `being-deleted`, `limit-reached`, …
        code: &'static str,
        /// What is in the way and what to do.
        detail: String,
    },
    /// The document is at another revision, which the message names.
    #[error("{0}")]
    PreconditionFailed(String),
}

type CommandResult = Result<Vec<Event>, CommandRefusal>;

/// Returns the events that a command leads to, in order; none if it changes nothing.
///
/// # Errors
///
/// A [`CommandRefusal`], for whoever gave the command.
pub fn decide(state: Option<&Endpoint>, command: &Command, context: &Context) -> CommandResult {
    context.check(state, command)?;
    match command {
        Command::PutEndpoint {
            labels,
            spec,
            uid,
            keys,
        } => put_endpoint(state, labels, spec, *uid, keys, context),
        Command::SetTraffic { traffic, mirror } => {
            let endpoint = live_endpoint(state, context)?;
            set_traffic(endpoint, traffic.as_ref(), mirror.as_ref(), "")
        }
        Command::RegenerateKey { slot, key } => {
            live_endpoint(state, context)?;
            let (slot, key) = (*slot, key.clone());
            Ok(vec![Event::KeyRegenerated(KeyRegenerated { slot, key })])
        }
        Command::DeleteEndpoint => Ok(delete_endpoint(existing_endpoint(state, context)?)),
        Command::PutDeployment {
            deployment,
            labels,
            spec,
            uid,
        } => put_deployment(
            live_endpoint(state, context)?,
            deployment,
            labels,
            spec,
            *uid,
        ),
        Command::DeleteDeployment { deployment } => {
            delete_deployment(existing_endpoint(state, context)?, deployment)
        }
        Command::PutAutoscale {
            deployment,
            labels,
            spec,
        } => {
            let endpoint = live_endpoint(state, context)?;
            put_autoscale(endpoint, deployment, labels, spec, &context.zones)
        }
        Command::DeleteAutoscale { deployment } => {
            delete_autoscale(live_endpoint(state, context)?, deployment)
        }
        Command::Pin { deployment, pin } => pin_count(
            live_endpoint(state, context)?,
            deployment,
            *pin,
            context.now,
        ),
        Command::Release { deployment } => {
            let (current, of) = live_deployment(live_endpoint(state, context)?, deployment)?;
            Ok(current
                .pin
                .map(|_| Event::AutoscaleReleased(of))
                .into_iter()
                .collect())
        }
        Command::SetPause { deployment, pause } => {
            let (current, of) = live_deployment(live_endpoint(state, context)?, deployment)?;
            let set = AutoscalePauseSet {
                deployment: of.deployment,
                pause: *pause,
            };
            let changed = current.pause != *pause;
            Ok(changed
                .then_some(Event::AutoscalePauseSet(set))
                .into_iter()
                .collect())
        }
    }
}

impl Context {
    fn check(&self, state: Option<&Endpoint>, command: &Command) -> Result<(), CommandRefusal> {
        let current = revision(state, command);
        let wanted = match (self.precondition, current) {
            (Precondition::None, _)
            | (Precondition::Absent, None)
            | (Precondition::Present, Some(_)) => return Ok(()),
            (Precondition::Revision(wanted), Some(current)) if wanted == current => return Ok(()),
            (Precondition::Revision(wanted), _) => format!("at revision {wanted}"),
            (Precondition::Absent, _) => "absent".into(),
            (Precondition::Present, _) => "present".into(),
        };
        let current = current.map_or("there is none".into(), |r| format!("it is at revision {r}"));
        let detail = format!(
            "the document was expected to be {wanted}, but {current}; read it again and retry"
        );
        Err(CommandRefusal::PreconditionFailed(detail))
    }
}

/// The revision of the document that a command is about.
fn revision(state: Option<&Endpoint>, command: &Command) -> Option<u64> {
    let endpoint = state?;
    let deployment = |name: &Name| endpoint.deployments.get(name);
    match command {
        Command::PutEndpoint { .. }
        | Command::SetTraffic { .. }
        | Command::RegenerateKey { .. }
        | Command::DeleteEndpoint => Some(endpoint.revision),
        Command::PutDeployment { deployment: of, .. }
        | Command::DeleteDeployment { deployment: of } => deployment(of).map(|d| d.revision),
        Command::PutAutoscale { deployment: of, .. }
        | Command::DeleteAutoscale { deployment: of }
        | Command::Pin { deployment: of, .. }
        | Command::Release { deployment: of }
        | Command::SetPause { deployment: of, .. } => {
            deployment(of)?.autoscale.as_ref().map(|a| a.revision)
        }
    }
}

fn existing_endpoint<'a>(
    state: Option<&'a Endpoint>,
    context: &Context,
) -> Result<&'a Endpoint, CommandRefusal> {
    state.ok_or_else(|| {
        let name = &context.endpoint;
        CommandRefusal::NotFound(format!("there is no endpoint `{name}`; create it first, or look for its name with `penstock get endpoints`"))
    })
}

fn live_endpoint<'a>(
    state: Option<&'a Endpoint>,
    context: &Context,
) -> Result<&'a Endpoint, CommandRefusal> {
    let endpoint = existing_endpoint(state, context)?;
    if endpoint.state == ProvisioningState::Deleting {
        let name = &endpoint.name;
        return Err(CommandRefusal::Conflict {
            code: "being-deleted",
            detail: format!(
                "endpoint `{name}` is being deleted; wait until it is gone, then create it again"
            ),
        });
    }
    Ok(endpoint)
}

fn deployment_not_found(endpoint: &Endpoint, deployment: &Name) -> CommandRefusal {
    let endpoint = &endpoint.name;
    CommandRefusal::NotFound(format!(
        "there is no deployment `{endpoint}/{deployment}`; create it first"
    ))
}

fn live_deployment<'a>(
    endpoint: &'a Endpoint,
    name: &Name,
) -> Result<(&'a Deployment, DeploymentEvent), CommandRefusal> {
    let deployment = endpoint
        .deployments
        .get(name)
        .ok_or_else(|| deployment_not_found(endpoint, name))?;
    if deployment.state == ProvisioningState::Deleting {
        let endpoint = &endpoint.name;
        return Err(CommandRefusal::Conflict {
            code: "being-deleted",
            detail: format!(
                "deployment `{endpoint}/{name}` is being deleted; wait until it is gone, then create it again"
            ),
        });
    }
    let of = DeploymentEvent {
        deployment: name.clone(),
    };
    Ok((deployment, of))
}

fn refuse_invalid(findings: Vec<Finding>) -> Result<(), CommandRefusal> {
    if findings.is_empty() {
        return Ok(());
    }
    Err(CommandRefusal::Invalid(findings))
}

fn put_endpoint(
    state: Option<&Endpoint>,
    labels: &Labels,
    spec: &EndpointSpec,
    uid: Uid,
    keys: &EndpointKeys,
    context: &Context,
) -> CommandResult {
    let own_spec = EndpointSpec {
        traffic: None,
        mirror: None,
        ..spec.clone()
    };
    let Some(_) = state else {
        if context.other_endpoints >= ENDPOINTS_MAX {
            return Err(CommandRefusal::Conflict {
                code: "limit-reached",
                detail: format!(
                    "there are {ENDPOINTS_MAX} endpoints, the maximum; delete one that is no longer used"
                ),
            });
        }
        refuse_invalid(unknown_deployments(
            |_| Presence::Missing,
            spec.traffic.as_ref(),
            "/spec/traffic",
        ))?;
        refuse_invalid(unknown_deployments(
            |_| Presence::Missing,
            spec.mirror.as_ref(),
            "/spec/mirror",
        ))?;
        return Ok(vec![Event::EndpointCreated(EndpointCreated {
            uid,
            name: context.endpoint.clone(),
            labels: labels.clone(),
            spec: own_spec,
            keys: keys.clone(),
        })]);
    };
    let endpoint = live_endpoint(state, context)?;
    let mut events = Vec::new();
    if endpoint.spec != own_spec || endpoint.labels != *labels {
        events.push(Event::EndpointUpdated(EndpointUpdated {
            labels: labels.clone(),
            spec: own_spec,
        }));
    }
    let (traffic, mirror) = (spec.traffic.as_ref(), spec.mirror.as_ref());
    events.extend(set_traffic(endpoint, traffic, mirror, "/spec")?);
    Ok(events)
}

enum Presence {
    Present,
    Missing,
    Deleting,
}

/// Returns findings for shares of unknown deployments. Shares of zero may name anything: they ask
/// for nothing.
fn unknown_deployments(
    presence: impl Fn(&Name) -> Presence,
    shares: Option<&Percentages>,
    pointer: &str,
) -> Vec<Finding> {
    let named = shares
        .into_iter()
        .flatten()
        .filter(|(_, share)| **share > 0);
    let fault = |(name, _): (&Name, &u8)| {
        let detail = match presence(name) {
            Presence::Present => return None,
            Presence::Missing => {
                format!("there is no deployment `{name}`; create it first, or take it out")
            }
            Presence::Deleting => format!("deployment `{name}` is being deleted; take it out"),
        };
        Some(Finding::new(format!("{pointer}/{name}"), detail))
    };
    named.filter_map(fault).collect()
}

/// Removes shares of zero, so that equal splits are equal values.
fn without_zeros(shares: &Percentages) -> Percentages {
    let positive = shares.iter().filter(|(_, share)| **share > 0);
    positive
        .map(|(name, share)| (name.clone(), *share))
        .collect()
}

fn set_traffic(
    endpoint: &Endpoint,
    traffic: Option<&Percentages>,
    mirror: Option<&Percentages>,
    base: &str,
) -> CommandResult {
    let (traffic_pointer, mirror_pointer) = (format!("{base}/traffic"), format!("{base}/mirror"));
    let presence = |name: &Name| match endpoint.deployments.get(name) {
        None => Presence::Missing,
        Some(d) if d.state == ProvisioningState::Deleting => Presence::Deleting,
        Some(_) => Presence::Present,
    };
    let mut findings = Vec::new();
    if let Some(shares) = traffic {
        findings.extend(limits::traffic(shares, &traffic_pointer));
    }
    if let Some(shares) = mirror {
        findings.extend(limits::mirror(shares, &mirror_pointer));
    }
    findings.extend(unknown_deployments(presence, traffic, &traffic_pointer));
    findings.extend(unknown_deployments(presence, mirror, &mirror_pointer));
    let new_traffic = traffic.map_or_else(|| endpoint.traffic.clone(), without_zeros);
    let new_mirror = mirror.map_or_else(|| endpoint.mirror.clone(), without_zeros);
    for name in new_mirror
        .keys()
        .filter(|name| new_traffic.contains_key(*name))
    {
        let detail = format!(
            "`{name}` would get live and copied requests at once; take it out of traffic or out of mirror"
        );
        let pointer = if mirror.is_some() {
            &mirror_pointer
        } else {
            &traffic_pointer
        };
        findings.push(Finding::new(format!("{pointer}/{name}"), detail));
    }
    refuse_invalid(findings)?;
    if new_traffic == endpoint.traffic && new_mirror == endpoint.mirror {
        return Ok(Vec::new());
    }
    Ok(vec![Event::TrafficSet(TrafficSet {
        traffic: new_traffic,
        mirror: new_mirror,
    })])
}

fn delete_endpoint(endpoint: &Endpoint) -> Vec<Event> {
    if endpoint.state == ProvisioningState::Deleting {
        return Vec::new();
    }
    let remaining = endpoint
        .deployments
        .iter()
        .filter(|(_, deployment)| deployment.state != ProvisioningState::Deleting);
    let mut events = vec![Event::EndpointDeletionRequested(Empty {})];
    events.extend(remaining.map(|(name, _)| {
        Event::DeploymentDeletionRequested(DeploymentEvent {
            deployment: name.clone(),
        })
    }));
    events
}

fn put_deployment(
    endpoint: &Endpoint,
    name: &Name,
    labels: &Labels,
    spec: &DeploymentSpec,
    uid: Uid,
) -> CommandResult {
    if !endpoint.deployments.contains_key(name) {
        if endpoint.deployments.len() >= DEPLOYMENTS_PER_ENDPOINT_MAX {
            return Err(CommandRefusal::Conflict {
                code: "limit-reached",
                detail: format!(
                    "endpoint `{}` has {DEPLOYMENTS_PER_ENDPOINT_MAX} deployments, the maximum; delete one that is no longer used",
                    endpoint.name
                ),
            });
        }
        return Ok(vec![Event::DeploymentCreated(DeploymentCreated {
            uid,
            deployment: name.clone(),
            labels: labels.clone(),
            spec: spec.clone(),
        })]);
    }
    let (deployment, of) = live_deployment(endpoint, name)?;
    if deployment.spec == *spec && deployment.labels == *labels {
        return Ok(Vec::new());
    }
    let replaces = needs_new_instances(&deployment.spec, spec);
    Ok(vec![Event::DeploymentUpdated(DeploymentUpdated {
        deployment: of.deployment,
        revision: deployment.instance_revision + u64::from(replaces),
        labels: labels.clone(),
        spec: spec.clone(),
    })])
}

fn delete_deployment(endpoint: &Endpoint, name: &Name) -> CommandResult {
    let deployment = endpoint
        .deployments
        .get(name)
        .ok_or_else(|| deployment_not_found(endpoint, name))?;
    if deployment.state == ProvisioningState::Deleting {
        return Ok(Vec::new());
    }
    for (shares, what) in [(&endpoint.traffic, "live"), (&endpoint.mirror, "copied")] {
        if let Some(share) = shares.get(name) {
            return Err(CommandRefusal::Conflict {
                code: "has-traffic",
                detail: format!(
                    "deployment `{}/{name}` gets {share} % of {what} traffic; set its share to 0 first",
                    endpoint.name
                ),
            });
        }
    }
    Ok(vec![Event::DeploymentDeletionRequested(DeploymentEvent {
        deployment: name.clone(),
    })])
}

fn put_autoscale(
    endpoint: &Endpoint,
    name: &Name,
    labels: &Labels,
    spec: &AutoscaleSpec,
    zones: &ZoneData,
) -> CommandResult {
    let target = DeploymentRef {
        endpoint: endpoint.name.clone(),
        deployment: name.clone(),
    };
    if spec.target != target {
        let detail = format!(
            "the target is `{}`, but the document was sent for `{target}`; make them equal",
            spec.target
        );
        return Err(CommandRefusal::Invalid(vec![Finding::new(
            "/spec/target",
            detail,
        )]));
    }
    let (deployment, of) = live_deployment(endpoint, name)?;
    refuse_invalid(documents::autoscale_findings(spec, zones))?;
    let current = deployment.autoscale.as_ref();
    if current.is_some_and(|autoscale| autoscale.spec == *spec && autoscale.labels == *labels) {
        return Ok(Vec::new());
    }
    Ok(vec![Event::AutoscaleSet(AutoscaleSet {
        deployment: of.deployment,
        revision: current.map_or(0, |autoscale| autoscale.revision) + 1,
        labels: labels.clone(),
        spec: spec.clone(),
    })])
}

fn delete_autoscale(endpoint: &Endpoint, name: &Name) -> CommandResult {
    let (deployment, of) = live_deployment(endpoint, name)?;
    if deployment.autoscale.is_none() {
        return Err(CommandRefusal::NotFound(format!(
            "there is no Autoscale for `{}/{name}`; nothing was removed",
            endpoint.name
        )));
    }
    Ok(vec![Event::AutoscaleRemoved(of)])
}

fn pin_count(endpoint: &Endpoint, name: &Name, pin: Pin, now: Timestamp) -> CommandResult {
    let (deployment, of) = live_deployment(endpoint, name)?;
    let mut findings = Vec::from_iter(limits::instances(pin.instances, "/instances"));
    if pin.until.is_some_and(|until| until <= now) {
        let detail = "this time has passed; give a later one, or omit it to pin until released";
        findings.push(Finding::new("/until", detail));
    }
    refuse_invalid(findings)?;
    if deployment.pin == Some(pin) {
        return Ok(Vec::new());
    }
    Ok(vec![Event::AutoscalePinned(AutoscalePinned {
        deployment: of.deployment,
        pin,
    })])
}
