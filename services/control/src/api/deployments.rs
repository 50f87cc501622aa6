//! Deployments.

use std::sync::Arc;

use contract::ids::{EndpointKey, Uid};
use contract::resources::{Resource, document_schema};
use contract::views::{Applied, DeploymentView};
use domain::endpoint::Endpoint;
use domain::endpoint::commands::Command;
use domain::views::{EndpointModel, ReadModel};
use http::StatusCode;

use super::endpoints::{DeleteResult, Deleted};
use super::{
    Filter, applied_response, deleted_concurrently, deployment_row_key, execute, get_row,
    json_with_etag, list_rows, parse_resource,
};
use crate::app::App;
use crate::call::Call;
use crate::error::ApiError;
use crate::response::{ApiResult, List, json, with_position};
use crate::table::{
    Content, DELETE, FILTERED, GUARDED, OPERATOR, PAGED, PUT, RouteEntry, VIEWER, WRITE, route,
    schema,
};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/endpoints/{endpoint}/deployments" "listDeployments" VIEWER, "Deployments of an endpoint, newest first",
            Content::Json(schema::<List<DeploymentView>>), list, query PAGED),
        route!(GET "/v1/endpoints/{endpoint}/deployments/{deployment}" "getDeployment" VIEWER, "One deployment",
            Content::Json(schema::<DeploymentView>), get),
        route!(PUT "/v1/endpoints/{endpoint}/deployments/{deployment}" "putDeployment" OPERATOR, "Create a deployment, or update it to match the document",
            Content::Json(schema::<Applied<DeploymentView>>), put, query WRITE, headers GUARDED,
            body |g| document_schema("Deployment", g), statuses PUT),
        route!(DELETE "/v1/endpoints/{endpoint}/deployments/{deployment}" "deleteDeployment" OPERATOR, "Delete a deployment that gets no traffic",
            Content::Json(schema::<Deleted>), delete, query WRITE, headers GUARDED, statuses DELETE),
        route!(GET "/v1/deployments" "listAllDeployments" VIEWER, "Deployments of all endpoints, newest first",
            Content::Json(schema::<List<DeploymentView>>), list_all, query FILTERED),
    ]
}

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let name = call.endpoint()?;
    let key = EndpointKey::new(&name);
    get_row(
        &app,
        ReadModel::Endpoints,
        key.as_str(),
        &format!("endpoint `{name}`"),
    )
    .await?;
    let filter = Filter {
        endpoint: Some(key.to_string()),
        ..Filter::from_query(ReadModel::Deployments, &call)?
    };
    json(
        StatusCode::OK,
        &list_rows(&app, filter, call.page()?).await?,
    )
}

pub async fn list_all(app: Arc<App>, call: Call) -> ApiResult {
    let filter = Filter::from_query(ReadModel::Deployments, &call)?;
    json(
        StatusCode::OK,
        &list_rows(&app, filter, call.page()?).await?,
    )
}

pub async fn get(app: Arc<App>, call: Call) -> ApiResult {
    let target = call.deployment()?;
    json_with_etag(
        &get_row(
            &app,
            ReadModel::Deployments,
            &deployment_row_key(&target),
            &format!("deployment `{target}`"),
        )
        .await?,
    )
}

/// The view of a deployment, with the instance counts of the read models.
fn view(
    app: &App,
    endpoint: &Endpoint,
    target: &contract::ids::DeploymentRef,
) -> Option<DeploymentView> {
    let deployment = endpoint.deployments.get(&target.deployment)?;
    let models = app.views.models();
    let model = models.get(&EndpointKey::new(&target.endpoint));
    let model = model.map(|entry| &entry.state);
    let empty = EndpointModel::default();
    Some(
        model
            .unwrap_or(&empty)
            .deployment_view(endpoint, &target.deployment, deployment),
    )
}

pub async fn put(app: Arc<App>, call: Call) -> ApiResult {
    let target = call.deployment()?;
    let resource = parse_resource(&app, &call, "Deployment", &target.to_string())?;
    let warnings = documents::warnings(&resource);
    let Resource::Deployment(document) = resource else {
        return Err(ApiError::internal("parsed resource is not a Deployment"));
    };
    let findings = app.config.own_secrets.findings(&document.spec);
    if !findings.is_empty() {
        return Err(ApiError::invalid(findings));
    }
    let command = Command::PutDeployment {
        deployment: target.deployment.clone(),
        labels: document.metadata.labels,
        spec: Box::new(document.spec),
        uid: Uid(app.deps.ids.uid()),
    };
    let outcome = execute(&app, &call, &target.endpoint, &command).await?;
    let before = outcome
        .before
        .as_ref()
        .and_then(|endpoint| view(&app, endpoint, &target));
    let after = outcome
        .after
        .as_ref()
        .and_then(|endpoint| view(&app, endpoint, &target));
    applied_response(
        &call,
        before.as_ref(),
        after.ok_or_else(deleted_concurrently)?,
        &outcome,
        warnings,
    )
}

pub async fn delete(app: Arc<App>, call: Call) -> ApiResult {
    let target = call.deployment()?;
    let command = Command::DeleteDeployment {
        deployment: target.deployment.clone(),
    };
    let outcome = execute(&app, &call, &target.endpoint, &command).await?;
    let body = Deleted {
        result: DeleteResult::Deleting,
        dry_run: call.flag("dryRun")?,
        deployments: vec![target.deployment],
        instances: None,
        held_by: None,
    };
    let status = if body.dry_run {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok(with_position(json(status, &body)?, outcome.position))
}
