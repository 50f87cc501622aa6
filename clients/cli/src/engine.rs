//! What the command line evaluates with the domain engines, without a server.

use contract::decision::Decision;
use contract::ids::DeploymentRef;
use contract::problem::Finding;
use contract::resources::{AutoscaleSpec, Resource};
use contract::time::Timestamp;
use contract::views::DecisionView;
use domain::autoscale::{Policy, SchedulePreview, explain};
use domain::zones::ZoneData;

/// Faults that only the engines detect: in conditions, schedules, metrics. Pointers start at the root.
pub fn findings(resource: &Resource) -> Vec<Finding> {
    if let Resource::Autoscale(autoscale) = resource
        && let Err(findings) = Policy::compile(&autoscale.spec, &ZoneData::bundled())
    {
        return findings;
    }
    domain::documents::validate(resource, &ZoneData::bundled())
}

/// What is valid in a document and probably not intended.
pub fn warnings(resource: &Resource) -> Vec<Finding> {
    let mut warnings = domain::documents::warnings(resource, &ZoneData::bundled());
    warnings.extend(documents::warnings(resource));
    warnings
}

/// The active profile at `from`, then the changes up to `to`.
pub fn preview(
    spec: &AutoscaleSpec,
    from: Timestamp,
    to: Timestamp,
) -> Result<SchedulePreview, Vec<Finding>> {
    let policy = Policy::compile(spec, &ZoneData::bundled())?;
    Ok(policy.preview(from, to))
}

/// The explanation of a decision in words.
pub fn explanation(view: DecisionView) -> String {
    explain::text(&decision(view))
}

/// What changed the count of a decision or keeps it.
pub fn sentence(view: DecisionView) -> String {
    explain::sentence(&decision(view))
}

fn decision(view: DecisionView) -> Decision {
    Decision {
        engine: view.engine,
        engine_version: view.engine_version,
        deployment: DeploymentRef {
            endpoint: view.endpoint,
            deployment: view.deployment,
        },
        deployment_uid: view.deployment_uid,
        at: view.at,
        from: view.from,
        wanted: view.wanted,
        granted: view.granted,
        outcome: view.outcome,
        profile: view.profile,
        decided_by: view.decided_by,
        cause: view.cause,
        rules: view.rules,
        stages: view.stages,
        inputs: view.inputs,
    }
}
