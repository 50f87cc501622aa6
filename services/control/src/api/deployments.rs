//! Deployments.

use std::sync::Arc;

use contract::ids::{EndpointKey, Uid};
use contract::resources::{DeploymentView, Resource};
use domain::endpoint::Endpoint;
use domain::endpoint::commands::Command;
use domain::views::{EndpointModel, ReadModel};
use http::StatusCode;

use super::endpoints::{DeleteResult, Deleted};
use super::{
    Filter, applied, carry_out, gone_meanwhile, key_of, one, resource, rows, with_revision,
};
use crate::answer::{Answer, at, json};
use crate::call::Call;
use crate::error::ApiError;
use crate::service::App;

pub async fn list(app: Arc<App>, call: Call) -> Answer {
    let name = call.endpoint()?;
    let key = EndpointKey::new(&name);
    one(
        &app,
        ReadModel::Endpoints,
        key.as_str(),
        &format!("endpoint `{name}`"),
    )
    .await?;
    let filter = Filter {
        endpoint: Some(key.to_string()),
        ..Filter::of(ReadModel::Deployments, &call)?
    };
    json(StatusCode::OK, &rows(&app, filter, call.page()?).await?)
}

pub async fn list_all(app: Arc<App>, call: Call) -> Answer {
    let filter = Filter::of(ReadModel::Deployments, &call)?;
    json(StatusCode::OK, &rows(&app, filter, call.page()?).await?)
}

pub async fn get(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    with_revision(
        &one(
            &app,
            ReadModel::Deployments,
            &key_of(&of),
            &format!("deployment `{of}`"),
        )
        .await?,
    )
}

/// With the instances as far as the read models have counted them.
fn view(
    app: &App,
    endpoint: &Endpoint,
    of: &contract::ids::DeploymentRef,
) -> Option<DeploymentView> {
    let deployment = endpoint.deployments.get(&of.deployment)?;
    let models = app.views.models();
    let model = models.get(&EndpointKey::new(&of.endpoint));
    let model = model.map(|entry| &entry.state);
    let empty = EndpointModel::default();
    Some(
        model
            .unwrap_or(&empty)
            .deployment_view(endpoint, &of.deployment, deployment),
    )
}

pub async fn put(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    let Resource::Deployment(document) = resource(&app, &call, "Deployment", &of.to_string())?
    else {
        return Err(ApiError::internal("another kind passed for a Deployment"));
    };
    let findings = app.config.own.findings(&document.spec);
    if !findings.is_empty() {
        return Err(ApiError::invalid(findings));
    }
    let command = Command::PutDeployment {
        deployment: of.deployment.clone(),
        labels: document.metadata.labels,
        spec: document.spec,
        uid: Uid(app.deps.ids.uid()),
    };
    let done = carry_out(&app, &call, &of.endpoint, &command).await?;
    let before = done
        .before
        .as_ref()
        .and_then(|endpoint| view(&app, endpoint, &of));
    let after = done
        .after
        .as_ref()
        .and_then(|endpoint| view(&app, endpoint, &of));
    applied(
        &call,
        before.as_ref(),
        after.ok_or_else(gone_meanwhile)?,
        &done,
    )
}

pub async fn delete(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    let command = Command::DeleteDeployment {
        deployment: of.deployment.clone(),
    };
    let done = carry_out(&app, &call, &of.endpoint, &command).await?;
    let body = Deleted {
        result: DeleteResult::Deleting,
        dry_run: call.flag("dryRun")?,
        deployments: vec![of.deployment],
    };
    let status = if body.dry_run {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok(at(json(status, &body)?, done.position))
}
