//! Endpoints, their traffic and their keys.

use std::sync::Arc;

use contract::events::{EndpointKeys, KeySlot, SealedKey};
use contract::ids::{EndpointKey, Name, Uid};
use contract::resources::{EndpointView, Percentages, Resource};
use domain::endpoint::Endpoint;
use domain::endpoint::commands::Command;
use domain::views::{ReadModel, endpoint_view};
use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Filter, applied, carry_out, first_answer, gone_meanwhile, kept, one, resource, rows,
    with_revision,
};
use crate::answer::{Answer, at, json};
use crate::call::Call;
use crate::commands::Order;
use crate::error::ApiError;
use crate::service::App;

/// `traffic` and `mirror`; what is left out stays as it is.
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

/// The answer to a DELETE: it is gone, or on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Deleted {
    pub result: DeleteResult,
    pub dry_run: bool,
    /// Deployments that go with it.
    pub deployments: Vec<Name>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeleteResult {
    /// Its instances are being stopped; it is gone after that.
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

pub async fn list(app: Arc<App>, call: Call) -> Answer {
    let mut list = rows(&app, Filter::of(ReadModel::Endpoints, &call)?, call.page()?).await?;
    list.items
        .iter_mut()
        .for_each(|item| add_scoring_uri(&app, item));
    json(StatusCode::OK, &list)
}

pub async fn get(app: Arc<App>, call: Call) -> Answer {
    let name = call.endpoint()?;
    let key = EndpointKey::new(&name);
    let mut view = one(
        &app,
        ReadModel::Endpoints,
        key.as_str(),
        &format!("endpoint `{name}`"),
    )
    .await?;
    add_scoring_uri(&app, &mut view);
    with_revision(&view)
}

/// Two fresh keys for an incarnation.
fn new_keys(app: &App, uid: Uid) -> Result<EndpointKeys, ApiError> {
    Ok(EndpointKeys {
        primary: new_key(app, uid)?,
        secondary: new_key(app, uid)?,
    })
}

fn new_key(app: &App, uid: Uid) -> Result<SealedKey, ApiError> {
    app.seal
        .new_key(&context(uid), app.deps.ids.as_ref())
        .map_err(ApiError::internal)
}

/// Keys open only for the incarnation that they were made for.
pub(crate) fn context(uid: Uid) -> String {
    format!("endpoint-key/{uid}")
}

pub async fn put(app: Arc<App>, call: Call) -> Answer {
    let name = call.endpoint()?;
    let Resource::Endpoint(document) = resource(&app, &call, "Endpoint", name.as_str())? else {
        return Err(ApiError::internal("another kind passed for an Endpoint"));
    };
    let uid = Uid(app.deps.ids.uid());
    let command = Command::PutEndpoint {
        labels: document.metadata.labels,
        spec: document.spec,
        uid,
        keys: new_keys(&app, uid)?,
    };
    let done = carry_out(&app, &call, &name, &command).await?;
    let before = done.before.as_ref().map(|endpoint| view(&app, endpoint));
    let after = done.after.as_ref().map(|endpoint| view(&app, endpoint));
    applied(
        &call,
        before.as_ref(),
        after.ok_or_else(gone_meanwhile)?,
        &done,
    )
}

pub async fn traffic(app: Arc<App>, call: Call) -> Answer {
    let name = call.endpoint()?;
    let Traffic { traffic, mirror } = call.typed()?;
    let command = Command::SetTraffic { traffic, mirror };
    let done = carry_out(&app, &call, &name, &command).await?;
    let before = done.before.as_ref().map(|endpoint| view(&app, endpoint));
    let after = done.after.as_ref().map(|endpoint| view(&app, endpoint));
    applied(
        &call,
        before.as_ref(),
        after.ok_or_else(gone_meanwhile)?,
        &done,
    )
}

pub async fn delete(app: Arc<App>, call: Call) -> Answer {
    let name = call.endpoint()?;
    let done = carry_out(&app, &call, &name, &Command::DeleteEndpoint).await?;
    let names = done
        .before
        .iter()
        .flat_map(|endpoint| endpoint.deployments.keys());
    let body = Deleted {
        result: DeleteResult::Deleting,
        dry_run: call.flag("dryRun")?,
        deployments: names.cloned().collect(),
    };
    let status = if body.dry_run {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok(at(json(status, &body)?, done.position))
}

fn open_keys(app: &App, endpoint: &Endpoint) -> Result<Keys, ApiError> {
    let context = context(endpoint.uid);
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

fn no_endpoint(name: &Name) -> String {
    format!("there is no endpoint `{name}`; `penstock get endpoints` lists those that there are")
}

pub async fn keys(app: Arc<App>, call: Call) -> Answer {
    let name = call.endpoint()?;
    let aggregate = app.commands.endpoint(&name).await?;
    let endpoint = aggregate
        .state
        .ok_or_else(|| ApiError::not_found(no_endpoint(&name)))?;
    json(StatusCode::OK, &open_keys(&app, &endpoint)?)
}

pub async fn regenerate(app: Arc<App>, call: Call) -> Answer {
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
    if let Some(answer) = first_answer(&app, &call).await? {
        return Ok(answer);
    }
    let aggregate = app.commands.endpoint(&name).await?;
    let mut endpoint = aggregate
        .state
        .ok_or_else(|| ApiError::not_found(no_endpoint(&name)))?;
    let key = new_key(&app, endpoint.uid)?;
    match slot {
        KeySlot::Primary => endpoint.keys.primary = key.clone(),
        KeySlot::Secondary => endpoint.keys.secondary = key.clone(),
    }
    let keys = open_keys(&app, &endpoint)?;
    let mut cause = call.cause()?;
    if let Some(cause) = &mut cause {
        cause.result = Some(kept(&app, &cause.key, StatusCode::OK, &keys)?);
    }
    let order = Order {
        endpoint: &name,
        command: &Command::RegenerateKey { slot, key },
        precondition: call.precondition()?,
        actor: call.actor(),
        dry_run: false,
        cause,
    };
    let done = app.commands.carry_out(order, &app.views).await?;
    // Another key may have changed at the same time: what is shown is what holds.
    let endpoint = done.after.ok_or_else(gone_meanwhile)?;
    Ok(at(
        json(StatusCode::OK, &open_keys(&app, &endpoint)?)?,
        done.position,
    ))
}
