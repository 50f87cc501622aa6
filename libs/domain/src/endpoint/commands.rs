//! What may be asked of an endpoint, and which events that leads to, or why it is refused.
//!
//! Invariants: traffic sums to 0 or 100 and names deployments that exist and are not going away; a
//! deployment that is mirrored to gets no live traffic; a command that changes nothing gives no
//! event; ids and keys come with the command, so the same command on the same state always gives the
//! same events.

use contract::decision::{Pause, Pin};
use contract::events::{
    AutoscalePauseSet, AutoscalePinned, AutoscaleSet, DeploymentCreated, DeploymentUpdated, Empty,
    EndpointCreated, EndpointKeys, EndpointUpdated, Event, KeyRegenerated, KeySlot, OfDeployment,
    SealedKey, TrafficSet,
};
use contract::ids::{DeploymentRef, Name, Uid};
use contract::problem::Finding;
use contract::resources::{
    AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels, Percentages, ProvisioningState, limits,
};
use contract::time::Timestamp;

use super::{Deployment, Endpoint};
use crate::documents;
use crate::zones::ZoneData;

/// Five times as many as `make bench-endpoints` measures; each costs a route in every gateway.
pub const ENDPOINTS_MAX: usize = 50_000;
/// Azure allows 20 as well.
pub const DEPLOYMENTS_PER_ENDPOINT_MAX: usize = 20;

/// What may be asked of an endpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// The endpoint shall be so; it is made if there is none.
    PutEndpoint {
        /// Its labels, all of them.
        labels: Labels,
        /// Its document; shares that it leaves out stay as they are.
        spec: EndpointSpec,
        /// Used if the endpoint is new.
        uid: Uid,
        /// Used if the endpoint is new: its two keys.
        keys: EndpointKeys,
    },
    /// What is left out stays as it is.
    SetTraffic {
        /// Shares of live traffic in percent, of all deployments.
        traffic: Option<Percentages>,
        /// Shares of copied traffic in percent, of all deployments.
        mirror: Option<Percentages>,
    },
    /// One of its keys is another from now on.
    RegenerateKey {
        /// Which one.
        slot: KeySlot,
        /// The new one.
        key: SealedKey,
    },
    /// It goes, with all that belongs to it.
    DeleteEndpoint,
    /// A deployment shall be so; it is made if there is none.
    PutDeployment {
        /// Its name within the endpoint.
        deployment: Name,
        /// Its labels, all of them.
        labels: Labels,
        /// Its document.
        spec: DeploymentSpec,
        /// Used if the deployment is new.
        uid: Uid,
    },
    /// A deployment goes; it must have no share of live traffic.
    DeleteDeployment {
        /// Which one.
        deployment: Name,
    },
    /// The count of a deployment shall follow these rules.
    PutAutoscale {
        /// Which one.
        deployment: Name,
        /// Labels of the rules, all of them.
        labels: Labels,
        /// The document of the rules.
        spec: AutoscaleSpec,
    },
    /// A deployment goes back to its own count.
    DeleteAutoscale {
        /// Which one.
        deployment: Name,
    },
    /// A count holds whatever the rules say.
    Pin {
        /// Of which deployment.
        deployment: Name,
        /// The count, and until when.
        pin: Pin,
    },
    /// The rules decide again.
    Release {
        /// Of which deployment.
        deployment: Name,
    },
    /// Scaling is paused, or goes on.
    SetPause {
        /// Of which deployment.
        deployment: Name,
        /// In which directions it is paused.
        pause: Pause,
    },
}

/// What must hold of the document's revision for the command to be carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precondition {
    /// Whatever there is.
    #[default]
    None,
    /// There is no such document yet.
    Absent,
    /// There is one, whatever its revision.
    Present,
    /// There is one at this revision.
    Revision(u64),
}

/// What a command is carried out with.
#[derive(Clone, Debug)]
pub struct Context {
    /// The endpoint that the command is about.
    pub endpoint: Name,
    /// How many endpoints there are, this one aside.
    pub other_endpoints: usize,
    /// What must hold before.
    pub precondition: Precondition,
    /// What schedules are checked with.
    pub zones: ZoneData,
    /// When the command is carried out.
    pub now: Timestamp,
}

/// Why a command leads to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// What it is about is not there; the sentence says what to look for.
    #[error("{0}")]
    NotFound(String),
    /// What was sent is wrong, in these places.
    #[error("the request is not valid")]
    Invalid(Vec<Finding>),
    /// It is right by itself, and does not go with what there is.
    #[error("{detail}")]
    Conflict {
        /// Stable, for programs: `being-deleted`, `limit-reached`, …
        code: &'static str,
        /// A sentence: what is in the way and what to do.
        detail: String,
    },
    /// The document is not at the revision that was named; the sentence says at which it is.
    #[error("{0}")]
    PreconditionFailed(String),
}

type Events = Result<Vec<Event>, Refusal>;

/// The events that a command leads to, in order; none if everything is already as asked.
///
/// # Errors
///
/// A [`Refusal`], for whoever gave the command; the state is as it was.
pub fn decide(state: Option<&Endpoint>, command: &Command, context: &Context) -> Events {
    context.check(state, command)?;
    match command {
        Command::PutEndpoint {
            labels,
            spec,
            uid,
            keys,
        } => put_endpoint(state, labels, spec, *uid, keys, context),
        Command::SetTraffic { traffic, mirror } => {
            let endpoint = living(state, context)?;
            set_traffic(endpoint, traffic.as_ref(), mirror.as_ref(), "")
        }
        Command::RegenerateKey { slot, key } => {
            living(state, context)?;
            let (slot, key) = (*slot, key.clone());
            Ok(vec![Event::KeyRegenerated(KeyRegenerated { slot, key })])
        }
        Command::DeleteEndpoint => Ok(delete_endpoint(existing(state, context)?)),
        Command::PutDeployment {
            deployment,
            labels,
            spec,
            uid,
        } => put_deployment(living(state, context)?, deployment, labels, spec, *uid),
        Command::DeleteDeployment { deployment } => {
            delete_deployment(existing(state, context)?, deployment)
        }
        Command::PutAutoscale {
            deployment,
            labels,
            spec,
        } => {
            let endpoint = living(state, context)?;
            put_autoscale(endpoint, deployment, labels, spec, &context.zones)
        }
        Command::DeleteAutoscale { deployment } => {
            delete_autoscale(living(state, context)?, deployment)
        }
        Command::Pin { deployment, pin } => {
            pin_count(living(state, context)?, deployment, *pin, context.now)
        }
        Command::Release { deployment } => {
            let (found, of) = living_deployment(living(state, context)?, deployment)?;
            Ok(found
                .pin
                .map(|_| Event::AutoscaleReleased(of))
                .into_iter()
                .collect())
        }
        Command::SetPause { deployment, pause } => {
            let (found, of) = living_deployment(living(state, context)?, deployment)?;
            let set = AutoscalePauseSet {
                deployment: of.deployment,
                pause: *pause,
            };
            let changed = found.pause != *pause;
            Ok(changed
                .then_some(Event::AutoscalePauseSet(set))
                .into_iter()
                .collect())
        }
    }
}

impl Context {
    fn check(&self, state: Option<&Endpoint>, command: &Command) -> Result<(), Refusal> {
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
        let found = current.map_or("there is none".into(), |r| format!("it is at revision {r}"));
        let detail =
            format!("the document was to be {wanted}, but {found}; read it again and retry");
        Err(Refusal::PreconditionFailed(detail))
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

fn existing<'a>(state: Option<&'a Endpoint>, context: &Context) -> Result<&'a Endpoint, Refusal> {
    state.ok_or_else(|| {
        let name = &context.endpoint;
        Refusal::NotFound(format!("there is no endpoint `{name}`; create it first, or look for its name with `penstock get endpoints`"))
    })
}

fn living<'a>(state: Option<&'a Endpoint>, context: &Context) -> Result<&'a Endpoint, Refusal> {
    let endpoint = existing(state, context)?;
    if endpoint.state == ProvisioningState::Deleting {
        let name = &endpoint.name;
        return Err(Refusal::Conflict {
            code: "being-deleted",
            detail: format!(
                "endpoint `{name}` is being deleted; wait until it is gone, then create it again"
            ),
        });
    }
    Ok(endpoint)
}

fn no_deployment(endpoint: &Endpoint, deployment: &Name) -> Refusal {
    let endpoint = &endpoint.name;
    Refusal::NotFound(format!(
        "there is no deployment `{endpoint}/{deployment}`; create it first"
    ))
}

fn living_deployment<'a>(
    endpoint: &'a Endpoint,
    name: &Name,
) -> Result<(&'a Deployment, OfDeployment), Refusal> {
    let deployment = endpoint
        .deployments
        .get(name)
        .ok_or_else(|| no_deployment(endpoint, name))?;
    if deployment.state == ProvisioningState::Deleting {
        let endpoint = &endpoint.name;
        return Err(Refusal::Conflict {
            code: "being-deleted",
            detail: format!(
                "deployment `{endpoint}/{name}` is being deleted; wait until it is gone, then create it again"
            ),
        });
    }
    let of = OfDeployment {
        deployment: name.clone(),
    };
    Ok((deployment, of))
}

fn refuse_invalid(findings: Vec<Finding>) -> Result<(), Refusal> {
    if findings.is_empty() {
        return Ok(());
    }
    Err(Refusal::Invalid(findings))
}

fn put_endpoint(
    state: Option<&Endpoint>,
    labels: &Labels,
    spec: &EndpointSpec,
    uid: Uid,
    keys: &EndpointKeys,
    context: &Context,
) -> Events {
    let own_spec = EndpointSpec {
        traffic: None,
        mirror: None,
        ..spec.clone()
    };
    let Some(_) = state else {
        if context.other_endpoints >= ENDPOINTS_MAX {
            return Err(Refusal::Conflict {
                code: "limit-reached",
                detail: format!(
                    "there are {ENDPOINTS_MAX} endpoints, which is the most; delete one that is no longer used"
                ),
            });
        }
        refuse_invalid(unknown_deployments(
            |_| Absence::Missing,
            spec.traffic.as_ref(),
            "/spec/traffic",
        ))?;
        refuse_invalid(unknown_deployments(
            |_| Absence::Missing,
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
    let endpoint = living(state, context)?;
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

enum Absence {
    Present,
    Missing,
    Deleting,
}

/// Shares of zero are allowed to name anything: they ask for nothing.
fn unknown_deployments(
    absence: impl Fn(&Name) -> Absence,
    shares: Option<&Percentages>,
    pointer: &str,
) -> Vec<Finding> {
    let named = shares
        .into_iter()
        .flatten()
        .filter(|(_, share)| **share > 0);
    let fault = |(name, _): (&Name, &u8)| {
        let detail = match absence(name) {
            Absence::Present => return None,
            Absence::Missing => {
                format!("there is no deployment `{name}`; create it first, or take it out")
            }
            Absence::Deleting => format!("deployment `{name}` is being deleted; take it out"),
        };
        Some(Finding::new(format!("{pointer}/{name}"), detail))
    };
    named.filter_map(fault).collect()
}

/// Without entries of zero, so that equal splits are equal values.
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
) -> Events {
    let (traffic_pointer, mirror_pointer) = (format!("{base}/traffic"), format!("{base}/mirror"));
    let absence = |name: &Name| match endpoint.deployments.get(name) {
        None => Absence::Missing,
        Some(d) if d.state == ProvisioningState::Deleting => Absence::Deleting,
        Some(_) => Absence::Present,
    };
    let mut findings = Vec::new();
    if let Some(shares) = traffic {
        findings.extend(limits::traffic(shares, &traffic_pointer));
    }
    if let Some(shares) = mirror {
        findings.extend(limits::mirror(shares, &mirror_pointer));
    }
    findings.extend(unknown_deployments(absence, traffic, &traffic_pointer));
    findings.extend(unknown_deployments(absence, mirror, &mirror_pointer));
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
    let staying = endpoint
        .deployments
        .iter()
        .filter(|(_, deployment)| deployment.state != ProvisioningState::Deleting);
    let mut events = vec![Event::EndpointDeletionRequested(Empty {})];
    events.extend(staying.map(|(name, _)| {
        Event::DeploymentDeletionRequested(OfDeployment {
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
) -> Events {
    if !endpoint.deployments.contains_key(name) {
        if endpoint.deployments.len() >= DEPLOYMENTS_PER_ENDPOINT_MAX {
            return Err(Refusal::Conflict {
                code: "limit-reached",
                detail: format!(
                    "endpoint `{}` has {DEPLOYMENTS_PER_ENDPOINT_MAX} deployments, which is the most; delete one that is no longer used",
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
    let (deployment, of) = living_deployment(endpoint, name)?;
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

/// Whether running instances are made of something else than the new spec asks for. How many there
/// are and how requests reach them can change around them; everything else is theirs, probes
/// included, since an instance is watched by the probes it was started with.
fn needs_new_instances(old: &DeploymentSpec, new: &DeploymentSpec) -> bool {
    let around = DeploymentSpec {
        instances: old.instances,
        request_settings: old.request_settings.clone(),
        ..new.clone()
    };
    around != *old
}

fn delete_deployment(endpoint: &Endpoint, name: &Name) -> Events {
    let deployment = endpoint
        .deployments
        .get(name)
        .ok_or_else(|| no_deployment(endpoint, name))?;
    if deployment.state == ProvisioningState::Deleting {
        return Ok(Vec::new());
    }
    for (shares, what) in [(&endpoint.traffic, "live"), (&endpoint.mirror, "copied")] {
        if let Some(share) = shares.get(name) {
            return Err(Refusal::Conflict {
                code: "has-traffic",
                detail: format!(
                    "deployment `{}/{name}` gets {share} % of {what} traffic; set its share to 0 first",
                    endpoint.name
                ),
            });
        }
    }
    Ok(vec![Event::DeploymentDeletionRequested(OfDeployment {
        deployment: name.clone(),
    })])
}

fn put_autoscale(
    endpoint: &Endpoint,
    name: &Name,
    labels: &Labels,
    spec: &AutoscaleSpec,
    zones: &ZoneData,
) -> Events {
    let target = DeploymentRef {
        endpoint: endpoint.name.clone(),
        deployment: name.clone(),
    };
    if spec.target != target {
        let detail = format!(
            "the target is `{}`, but the document was sent for `{target}`; make them equal",
            spec.target
        );
        return Err(Refusal::Invalid(vec![Finding::new("/spec/target", detail)]));
    }
    let (deployment, of) = living_deployment(endpoint, name)?;
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

fn delete_autoscale(endpoint: &Endpoint, name: &Name) -> Events {
    let (deployment, of) = living_deployment(endpoint, name)?;
    if deployment.autoscale.is_none() {
        return Err(Refusal::NotFound(format!(
            "there is no Autoscale for `{}/{name}`; nothing was removed",
            endpoint.name
        )));
    }
    Ok(vec![Event::AutoscaleRemoved(of)])
}

fn pin_count(endpoint: &Endpoint, name: &Name, pin: Pin, now: Timestamp) -> Events {
    let (deployment, of) = living_deployment(endpoint, name)?;
    let mut findings = Vec::from_iter(limits::instances(pin.instances, "/instances"));
    if pin.until.is_some_and(|until| until <= now) {
        let detail = "this moment has passed; name a later one, or none to pin until released";
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
