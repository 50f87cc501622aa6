//! Endpoints, their traffic and their keys.

use std::sync::Arc;

use contract::events::{EndpointKeys, KeySlot, SealedKey};
use contract::ids::{EndpointKey, Name, Uid};
use contract::resources::{Percentages, Resource, document_schema};
use contract::views::{Applied, EndpointView};
use domain::endpoint::Endpoint;
use domain::endpoint::commands::Command;
use domain::views::{ReadModel, endpoint_view};
use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Filter, applied_response, deleted_concurrently, execute, get_row, json_with_etag, list_rows,
    parse_resource, seal_response, stored_response,
};
use crate::app::App;
use crate::call::Call;
use crate::commands::CommandRequest;
use crate::error::ApiError;
use crate::response::{ApiResult, List, json, with_position};
use crate::table::{
    ADMIN, Content, DELETE, GUARDED, OPERATOR, PAGED, PUT, REPEATABLE, RouteEntry, VIEWER, WRITE,
    route, schema,
};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/endpoints" "listEndpoints" VIEWER, "Endpoints, newest first",
            Content::Json(schema::<List<EndpointView>>), list, query PAGED),
        route!(GET "/v1/endpoints/{endpoint}" "getEndpoint" VIEWER, "One endpoint",
            Content::Json(schema::<EndpointView>), get),
        route!(PUT "/v1/endpoints/{endpoint}" "putEndpoint" OPERATOR, "Create an endpoint, or update it to match the document",
            Content::Json(schema::<Applied<EndpointView>>), put, query WRITE, headers GUARDED,
            body |g| document_schema("Endpoint", g), statuses PUT),
        route!(DELETE "/v1/endpoints/{endpoint}" "deleteEndpoint" OPERATOR, "Delete an endpoint with its deployments",
            Content::Json(schema::<Deleted>), delete, query WRITE, headers GUARDED, statuses DELETE),
        route!(PUT "/v1/endpoints/{endpoint}/traffic" "putTraffic" OPERATOR, "Split and mirror traffic; omitted parts stay as they are",
            Content::Json(schema::<Applied<EndpointView>>), traffic, query WRITE, headers GUARDED, body schema::<Traffic>),
        route!(GET "/v1/endpoints/{endpoint}/keys" "getKeys" ADMIN, "The keys of an endpoint",
            Content::Json(schema::<Keys>), keys),
        route!(POST "/v1/endpoints/{endpoint}/keys/{slot}/regenerate" "regenerateKey" ADMIN, "Replace a key; the old one stops working",
            Content::Json(schema::<Keys>), regenerate, headers REPEATABLE),
    ]
}

/// `traffic` and `mirror`; omitted parts stay as they are.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Traffic {
    #[serde(default)]
    pub traffic: Option<Percentages>,
    #[serde(default)]
    pub mirror: Option<Percentages>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Keys {
    pub primary: String,
    pub secondary: String,
}

/// The response to a DELETE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Deleted {
    pub result: DeleteResult,
    pub dry_run: bool,
    /// Deployments that are deleted with it.
    pub deployments: Vec<Name>,
    /// Of an Autoscale: the deployment's own count, which applies from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instances: Option<u32>,
    /// Of an Autoscale: what keeps the present count until it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_by: Option<HeldBy>,
}

/// What keeps the count of a deployment whose Autoscale is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HeldBy {
    /// A pin, until it is released.
    Pin,
    /// A pause of both directions, until scaling is resumed.
    Pause,
    /// A pause of scaling in: the count does not fall.
    PauseOfScaleIn,
    /// A pause of scaling out: the count does not grow.
    PauseOfScaleOut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeleteResult {
    /// Its instances are being stopped; it is deleted after that.
    Deleting,
    Deleted,
}

fn scoring_uri(app: &App, name: &str) -> Option<String> {
    let gateway = app.config.gateway.as_deref()?.trim_end_matches('/');
    Some(format!("{gateway}/endpoints/{name}/score"))
}

fn add_scoring_uri(app: &App, view: &mut Value) {
    let name = view
        .pointer("/metadata/name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if let Some(uri) = scoring_uri(app, name) {
        view["status"]["scoringUri"] = json!(uri);
    }
}

fn view(app: &App, endpoint: &Endpoint) -> EndpointView {
    let mut view = endpoint_view(endpoint);
    view.status.scoring_uri = scoring_uri(app, endpoint.name.as_str());
    view
}

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let mut list = list_rows(
        &app,
        Filter::from_query(ReadModel::Endpoints, &call)?,
        call.page()?,
    )
    .await?;
    list.items
        .iter_mut()
        .for_each(|item| add_scoring_uri(&app, item));
    json(StatusCode::OK, &list)
}

pub async fn get(app: Arc<App>, call: Call) -> ApiResult {
    let name = call.endpoint()?;
    let key = EndpointKey::new(&name);
    let mut view = get_row(
        &app,
        ReadModel::Endpoints,
        key.as_str(),
        &format!("endpoint `{name}`"),
    )
    .await?;
    add_scoring_uri(&app, &mut view);
    json_with_etag(&view)
}

/// Creates two keys for an incarnation.
fn new_keys(app: &App, uid: Uid) -> Result<EndpointKeys, ApiError> {
    Ok(EndpointKeys {
        primary: new_key(app, uid)?,
        secondary: new_key(app, uid)?,
    })
}

fn new_key(app: &App, uid: Uid) -> Result<SealedKey, ApiError> {
    app.seal
        .new_key(&key_context(uid), app.deps.ids.as_ref())
        .map_err(ApiError::internal)
}

/// The seal context of endpoint keys: they open only for the incarnation that they were made for.
pub(crate) fn key_context(uid: Uid) -> String {
    format!("endpoint-key/{uid}")
}

pub async fn put(app: Arc<App>, call: Call) -> ApiResult {
    let name = call.endpoint()?;
    let Resource::Endpoint(document) = parse_resource(&app, &call, "Endpoint", name.as_str())?
    else {
        return Err(ApiError::internal("parsed resource is not an Endpoint"));
    };
    let uid = Uid(app.deps.ids.uid());
    let command = Command::PutEndpoint {
        labels: document.metadata.labels,
        spec: document.spec,
        uid,
        keys: new_keys(&app, uid)?,
    };
    let outcome = execute(&app, &call, &name, &command).await?;
    let before = outcome.before.as_ref().map(|endpoint| view(&app, endpoint));
    let after = outcome.after.as_ref().map(|endpoint| view(&app, endpoint));
    applied_response(
        &call,
        before.as_ref(),
        after.ok_or_else(deleted_concurrently)?,
        &outcome,
        Vec::new(),
    )
}

pub async fn traffic(app: Arc<App>, call: Call) -> ApiResult {
    let name = call.endpoint()?;
    let Traffic { traffic, mirror } = call.parse_body()?;
    let command = Command::SetTraffic { traffic, mirror };
    let outcome = execute(&app, &call, &name, &command).await?;
    let before = outcome.before.as_ref().map(|endpoint| view(&app, endpoint));
    let after = outcome.after.as_ref().map(|endpoint| view(&app, endpoint));
    applied_response(
        &call,
        before.as_ref(),
        after.ok_or_else(deleted_concurrently)?,
        &outcome,
        Vec::new(),
    )
}

pub async fn delete(app: Arc<App>, call: Call) -> ApiResult {
    let name = call.endpoint()?;
    let outcome = execute(&app, &call, &name, &Command::DeleteEndpoint).await?;
    let names = outcome
        .before
        .iter()
        .flat_map(|endpoint| endpoint.deployments.keys());
    let body = Deleted {
        result: DeleteResult::Deleting,
        dry_run: call.flag("dryRun")?,
        deployments: names.cloned().collect(),
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

fn open_keys(app: &App, endpoint: &Endpoint) -> Result<Keys, ApiError> {
    let context = key_context(endpoint.uid);
    let open = |key: &SealedKey| {
        app.seal
            .unseal(&key.sealed, &context)
            .map_err(ApiError::internal)
    };
    Ok(Keys {
        primary: open(&endpoint.keys.primary)?,
        secondary: open(&endpoint.keys.secondary)?,
    })
}

fn endpoint_not_found(name: &Name) -> String {
    format!("there is no endpoint `{name}`; `penstock get endpoints` lists those that exist")
}

pub async fn keys(app: Arc<App>, call: Call) -> ApiResult {
    let name = call.endpoint()?;
    let aggregate = app.commands.endpoint(&name).await?;
    let endpoint = aggregate
        .state
        .ok_or_else(|| ApiError::not_found(endpoint_not_found(&name)))?;
    json(StatusCode::OK, &open_keys(&app, &endpoint)?)
}

pub async fn regenerate(app: Arc<App>, call: Call) -> ApiResult {
    let name = call.endpoint()?;
    let slot = match call.params.get("slot").map(String::as_str) {
        Some("primary") => KeySlot::Primary,
        Some("secondary") => KeySlot::Secondary,
        _ => {
            return Err(ApiError::not_found(
                "an endpoint has two keys: primary and secondary",
            ));
        }
    };
    if let Some(response) = stored_response(&app, &call).await? {
        return Ok(response);
    }
    let aggregate = app.commands.endpoint(&name).await?;
    let mut endpoint = aggregate
        .state
        .ok_or_else(|| ApiError::not_found(endpoint_not_found(&name)))?;
    let key = new_key(&app, endpoint.uid)?;
    match slot {
        KeySlot::Primary => endpoint.keys.primary = key.clone(),
        KeySlot::Secondary => endpoint.keys.secondary = key.clone(),
    }
    let keys = open_keys(&app, &endpoint)?;
    let mut idempotency_key = call.idempotency_key()?;
    if let Some(idempotency_key) = &mut idempotency_key {
        idempotency_key.result = Some(seal_response(
            &app,
            &idempotency_key.key,
            StatusCode::OK,
            &keys,
        )?);
    }
    let request = CommandRequest {
        endpoint: &name,
        command: &Command::RegenerateKey { slot, key },
        precondition: call.precondition()?,
        actor: call.actor(),
        dry_run: false,
        idempotency_key,
    };
    let outcome = app.commands.execute(request, &app.views).await?;
    // The other key may have changed concurrently: return the keys that are in force.
    let endpoint = outcome.after.ok_or_else(deleted_concurrently)?;
    Ok(with_position(
        json(StatusCode::OK, &open_keys(&app, &endpoint)?)?,
        outcome.position,
    ))
}
