//! Endpoints, deployments and instances as the API shows them.

use contract::events::InstanceEnded;
use contract::ids::{EndpointKey, Name};
use contract::resources::{API_VERSION, ProvisioningState};
use contract::time::Timestamp;
use contract::views::{
    AutoscaleStatus, AutoscaleView, AvailableCondition, DecisionSummary, DeploymentStatus,
    DeploymentView, EndpointStatus, EndpointView, InstanceTally, InstanceView, InstanceViewState,
    ViewMetadata,
};

use crate::documents::full_spec;
use crate::endpoint::{Deployment, Endpoint};
use crate::instances::{Instance, InstanceState};

/// The endpoint as the API shows it, without its scoring URI, which only the server knows.
pub fn endpoint_view(endpoint: &Endpoint) -> EndpointView {
    EndpointView {
        api_version: API_VERSION.into(),
        kind: "Endpoint".into(),
        metadata: ViewMetadata {
            name: Some(endpoint.name.clone()),
            endpoint: None,
            uid: endpoint.uid,
            labels: endpoint.labels.clone(),
            revision: endpoint.revision,
            created_at: endpoint.created_at,
        },
        spec: full_spec(&endpoint.spec, &endpoint.traffic, &endpoint.mirror),
        status: EndpointStatus {
            provisioning_state: endpoint.state,
            reason: endpoint.state_reason.clone(),
            scoring_uri: None,
            deployments: endpoint.deployments.keys().cloned().collect(),
        },
    }
}

fn deployment_metadata(endpoint: &Endpoint, name: &Name, deployment: &Deployment) -> ViewMetadata {
    ViewMetadata {
        name: Some(name.clone()),
        endpoint: Some(endpoint.name.clone()),
        uid: deployment.uid,
        labels: deployment.labels.clone(),
        revision: deployment.revision,
        created_at: deployment.created_at,
    }
}

pub(super) fn deployment_view(
    endpoint: &Endpoint,
    name: &Name,
    deployment: &Deployment,
    instances: InstanceTally,
    available: Option<AvailableCondition>,
) -> DeploymentView {
    DeploymentView {
        api_version: API_VERSION.into(),
        kind: "Deployment".into(),
        metadata: deployment_metadata(endpoint, name, deployment),
        spec: deployment.spec.clone(),
        status: DeploymentStatus {
            provisioning_state: deployment.state,
            reason: deployment.state_reason.clone(),
            traffic: endpoint.traffic.get(name).copied().unwrap_or(0),
            instance_revision: deployment.instance_revision,
            instances,
            available,
            autoscaled: deployment.autoscale.is_some(),
            pin: deployment.pin,
            pause: deployment.pause,
        },
    }
}

/// Returns `None` if no Autoscale applies.
pub fn autoscale_view(
    endpoint: &Endpoint,
    name: &Name,
    deployment: &Deployment,
    last_decision: Option<DecisionSummary>,
) -> Option<AutoscaleView> {
    let autoscale = deployment.autoscale.as_ref()?;
    Some(AutoscaleView {
        api_version: API_VERSION.into(),
        kind: "Autoscale".into(),
        metadata: ViewMetadata {
            name: None,
            endpoint: None,
            labels: autoscale.labels.clone(),
            revision: autoscale.revision,
            ..deployment_metadata(endpoint, name, deployment)
        },
        spec: autoscale.spec.clone(),
        status: AutoscaleStatus {
            provisioning_state: ProvisioningState::Succeeded,
            pin: deployment.pin,
            pause: deployment.pause,
            last_decision,
        },
    })
}

pub(super) fn instance_view(
    key: &EndpointKey,
    instance: &Instance,
    is_over: bool,
    end: Option<(&InstanceEnded, Timestamp)>,
) -> InstanceView {
    let state = match instance.state() {
        // A failed instance stays failed after it was removed.
        InstanceState::Failed => InstanceViewState::Failed,
        _ if is_over => InstanceViewState::Stopped,
        InstanceState::Starting => InstanceViewState::Starting,
        InstanceState::Ready => InstanceViewState::Ready,
        InstanceState::Draining => InstanceViewState::Draining,
        InstanceState::Stopped => InstanceViewState::Stopped,
    };
    let detail = match end {
        Some((ended, _)) if instance.detail.is_empty() => ended.reason.clone(),
        _ => instance.detail.clone(),
    };
    InstanceView {
        id: instance.id.clone(),
        endpoint: key.endpoint(),
        deployment: instance.deployment.clone(),
        deployment_uid: instance.deployment_uid,
        generation: instance.generation,
        revision: instance.revision,
        state,
        detail,
        node: instance.node.clone(),
        address: instance.address.clone(),
        pid: instance.pid,
        requested_at: instance.requested_at,
        started_at: instance.started_at,
        ready_at: instance.ready_at,
        ended_at: end.map(|(_, time)| time),
        exit_code: end.and_then(|(ended, _)| ended.exit_code),
        decision: instance.decision,
    }
}
