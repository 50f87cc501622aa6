//! The condition Available of a deployment: whether it can serve requests now, and if not, why. Derived
//! from the count that was granted and the state of the instances.

use contract::decision::FailedStarts;
use contract::resources::ProvisioningState;
use contract::views::AvailableReason;

use crate::endpoint::Deployment;
use crate::instances::{Instance, Instances, Phase, StartHistory};

/// Returns the reason of the condition; `None` while the deployment is being deleted, when nobody waits
/// for instances. `wanted` is the count that the last decision granted, if there was one.
pub fn reason(
    deployment: &Deployment,
    instances: &Instances,
    wanted: Option<u32>,
) -> Option<AvailableReason> {
    if deployment.state == ProvisioningState::Deleting {
        return None;
    }
    let ready = ready(deployment, instances);
    Some(match wanted {
        Some(0) if ready == 0 => AvailableReason::ScaledToZero,
        _ if ready > 0 && ready >= wanted.unwrap_or(0) => AvailableReason::Ready,
        _ if ready > 0 => AvailableReason::Degraded,
        _ if newest_failure(deployment, instances).is_some() => AvailableReason::Failing,
        _ => AvailableReason::Starting,
    })
}

/// The condition in words: how many instances are ready, and the newest failure.
pub fn message(deployment: &Deployment, instances: &Instances, wanted: Option<u32>) -> String {
    let Some(wanted) = wanted else {
        return "the count has not been decided yet".into();
    };
    let ready = ready(deployment, instances);
    if wanted == 0 && ready == 0 {
        return "no instance is wanted".into();
    }
    let mut message = match (ready, wanted) {
        (ready, 1) => format!("{ready} of 1 instance is ready"),
        (1, wanted) => format!("1 of {wanted} instances is ready"),
        (ready, wanted) => format!("{ready} of {wanted} instances are ready"),
    };
    let replaced = of(deployment, instances).any(|i| !deployment.is_made_of(i.revision, &i.spec));
    if ready >= wanted && !replaced {
        return message;
    }
    let failure = newest_failure(deployment, instances);
    for detail in failure
        .into_iter()
        .chain(slowest_start(deployment, instances))
    {
        message.push_str("; ");
        message.push_str(&detail);
    }
    message
}

fn of<'a>(deployment: &Deployment, instances: &'a Instances) -> impl Iterator<Item = &'a Instance> {
    instances.of(deployment.uid).filter(|i| i.is_kept())
}

fn ready(deployment: &Deployment, instances: &Instances) -> u32 {
    of(deployment, instances).filter(|i| i.is_ready()).count() as u32
}

/// What the instance that has been starting for longest waits for; `None` unless one takes long.
fn slowest_start(deployment: &Deployment, instances: &Instances) -> Option<String> {
    let starting = of(deployment, instances)
        .filter(|i| i.phase == Phase::Starting && !i.detail.is_empty())
        .min_by_key(|i| i.started_at)?;
    Some(format!("{} is starting: {}", starting.id, starting.detail))
}

/// What failed last at the present revision; `None` if nothing has failed since it changed or was
/// healthy.
fn newest_failure(deployment: &Deployment, instances: &Instances) -> Option<String> {
    let unready = of(deployment, instances)
        .filter(|i| i.phase == Phase::Unready && !i.detail.is_empty())
        .max_by_key(|i| i.ready_at)
        .map(|i| format!("{} fails its readiness probe: {}", i.id, i.detail));
    let unhealthy = instances.of(deployment.uid).find_map(|i| {
        let reason = i.unhealthy.as_ref()?;
        Some(format!("{} is replaced: {reason}", i.id))
    });
    unready
        .or(unhealthy)
        .or_else(|| present_failures(deployment, instances).map(describe_failures))
}

/// The failures in a row of the present revision; `None` also if an instance has become ready since.
pub fn present_failures<'a>(
    deployment: &Deployment,
    instances: &'a Instances,
) -> Option<&'a StartHistory> {
    let history = instances.failures(deployment.uid, deployment.instance_revision)?;
    let has_started_since =
        of(deployment, instances).any(|i| i.is_ready() && i.ready_at > history.last_failure);
    (!has_started_since).then_some(history)
}

/// Starts of the present revision that failed, if the last one did, as an input of decisions.
pub fn failed_starts(deployment: &Deployment, instances: &Instances) -> Option<FailedStarts> {
    let history = present_failures(deployment, instances)?;
    Some(FailedStarts {
        in_a_row: history.failures,
        reason: history.last_reason.clone(),
        never_ready: !instances.was_ready(deployment),
    })
}

fn describe_failures(history: &StartHistory) -> String {
    match history.failures {
        1 => format!("the last one failed: {}", history.last_reason),
        failures => format!(
            "{failures} failed in a row, the last with: {}",
            history.last_reason
        ),
    }
}
