//! Autoscale settings, manual pins and pauses.

use std::sync::Arc;

use contract::decision::{Pause, Pin};
use contract::ids::{DeploymentRef, Name};
use contract::problem::Finding;
use contract::resources::{AutoscaleView, Resource};
use contract::time::{Span, Timestamp};
use domain::endpoint::Endpoint;
use domain::endpoint::commands::Command;
use domain::views::{ReadModel, autoscale_view};
use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::endpoints::{DeleteResult, Deleted};
use super::{
    Filter, applied, carry_out, first_answer, gone_meanwhile, kept, key_of, one, resource, rows,
    with_revision,
};
use crate::answer::{Answer, at, json};
use crate::call::Call;
use crate::commands::{Done, Order};
use crate::error::ApiError;
use crate::service::App;

/// Longest time that a preview covers, and how far it looks unless told.
const PREVIEW_MAX: Span = Span::from_secs(400 * 86_400);
const PREVIEW_DEFAULT: Span = Span::from_secs(7 * 86_400);

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PinBody {
    pub instances: u32,
    /// Left out: until released.
    #[serde(default)]
    pub until: Option<Timestamp>,
}

/// Directions to pause or resume; both if none is named.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Directions {
    #[serde(default)]
    pub scale_in: Option<bool>,
    #[serde(default)]
    pub scale_out: Option<bool>,
}

/// What stands above the rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Manual {
    pub endpoint: Name,
    pub deployment: Name,
    pub pin: Option<Pin>,
    pub pause: Pause,
}

/// The profile that holds from a moment on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    pub at: Timestamp,
    pub profile: String,
    pub min: u32,
    pub max: u32,
    pub default: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Preview {
    pub items: Vec<Transition>,
}

pub async fn list(app: Arc<App>, call: Call) -> Answer {
    let filter = Filter::of(ReadModel::Autoscales, &call)?;
    json(StatusCode::OK, &rows(&app, filter, call.page()?).await?)
}

pub async fn get(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    with_revision(
        &one(
            &app,
            ReadModel::Autoscales,
            &key_of(&of),
            &format!("Autoscale for `{of}`"),
        )
        .await?,
    )
}

fn view(endpoint: &Endpoint, of: &DeploymentRef) -> Option<AutoscaleView> {
    let deployment = endpoint.deployments.get(&of.deployment)?;
    autoscale_view(endpoint, &of.deployment, deployment, None)
}

pub async fn put(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    let Resource::Autoscale(document) = resource(&app, &call, "Autoscale", &of.to_string())? else {
        return Err(ApiError::internal("another kind passed for an Autoscale"));
    };
    let command = Command::PutAutoscale {
        deployment: of.deployment.clone(),
        labels: document.metadata.labels,
        spec: document.spec,
    };
    let done = carry_out(&app, &call, &of.endpoint, &command).await?;
    let before = done
        .before
        .as_ref()
        .and_then(|endpoint| view(endpoint, &of));
    let after = done.after.as_ref().and_then(|endpoint| view(endpoint, &of));
    applied(
        &call,
        before.as_ref(),
        after.ok_or_else(gone_meanwhile)?,
        &done,
    )
}

pub async fn delete(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    let command = Command::DeleteAutoscale {
        deployment: of.deployment,
    };
    let done = carry_out(&app, &call, &of.endpoint, &command).await?;
    let body = Deleted {
        result: DeleteResult::Deleted,
        dry_run: call.flag("dryRun")?,
        deployments: Vec::new(),
    };
    Ok(at(json(StatusCode::OK, &body)?, done.position))
}

fn manual(endpoint: Option<&Endpoint>, of: DeploymentRef) -> Result<Manual, ApiError> {
    let deployment = endpoint.and_then(|endpoint| endpoint.deployments.get(&of.deployment));
    let deployment = deployment.ok_or_else(gone_meanwhile)?;
    Ok(Manual {
        endpoint: of.endpoint,
        deployment: of.deployment,
        pin: deployment.pin,
        pause: deployment.pause,
    })
}

fn answer(done: &Done, of: DeploymentRef) -> Answer {
    let body = manual(done.after.as_ref(), of)?;
    Ok(at(json(StatusCode::OK, &body)?, done.position))
}

pub async fn pin(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    let PinBody { instances, until } = call.typed()?;
    let command = Command::Pin {
        deployment: of.deployment.clone(),
        pin: Pin { instances, until },
    };
    let done = carry_out(&app, &call, &of.endpoint, &command).await?;
    answer(&done, of)
}

pub async fn release(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    let command = Command::Release {
        deployment: of.deployment.clone(),
    };
    let done = carry_out(&app, &call, &of.endpoint, &command).await?;
    answer(&done, of)
}

pub async fn pause(app: Arc<App>, call: Call) -> Answer {
    set_pause(app, call, true).await
}

pub async fn resume(app: Arc<App>, call: Call) -> Answer {
    set_pause(app, call, false).await
}

async fn set_pause(app: Arc<App>, call: Call, to: bool) -> Answer {
    let of = call.deployment()?;
    let Directions {
        scale_in,
        scale_out,
    } = call.typed()?;
    if scale_in == Some(false) && scale_out == Some(false) {
        let detail = "both directions are false, so nothing is asked for; name one, or leave both out for both";
        return Err(ApiError::invalid(vec![Finding::new("", detail)]));
    }
    let both = scale_in.is_none() && scale_out.is_none();
    if let Some(answer) = first_answer(&app, &call).await? {
        return Ok(answer);
    }
    let aggregate = app.commands.endpoint(&of.endpoint).await?;
    let deployment = aggregate
        .state
        .as_ref()
        .and_then(|endpoint| endpoint.deployments.get(&of.deployment));
    let mut pause = deployment
        .map(|deployment| deployment.pause)
        .unwrap_or_default();
    if both || scale_in == Some(true) {
        pause.scale_in = to;
    }
    if both || scale_out == Some(true) {
        pause.scale_out = to;
    }
    let mut cause = call.cause()?;
    if let (Some(cause), Some(deployment)) = (&mut cause, deployment) {
        let body = Manual {
            endpoint: of.endpoint.clone(),
            deployment: of.deployment.clone(),
            pin: deployment.pin,
            pause,
        };
        cause.result = Some(kept(&app, &cause.key, StatusCode::OK, &body)?);
    }
    let command = Command::SetPause {
        deployment: of.deployment.clone(),
        pause,
    };
    let order = Order {
        endpoint: &of.endpoint,
        command: &command,
        precondition: call.precondition()?,
        actor: call.actor(),
        dry_run: false,
        cause,
    };
    let done = app.commands.carry_out(order, &app.views).await?;
    answer(&done, of)
}

pub async fn preview(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    let from = call.time("from")?.unwrap_or(call.now);
    let to = call.time("to")?.unwrap_or(from + PREVIEW_DEFAULT);
    if to <= from || to.since(from) > PREVIEW_MAX {
        return Err(ApiError::bad_request(format!(
            "`to` must lie after `from`, and at most {PREVIEW_MAX} after it"
        )));
    }
    let aggregate = app.commands.endpoint(&of.endpoint).await?;
    let deployment = aggregate
        .state
        .as_ref()
        .and_then(|endpoint| endpoint.deployments.get(&of.deployment));
    let autoscale = deployment.and_then(|deployment| deployment.autoscale.as_ref());
    let Some(autoscale) = autoscale else {
        one(
            &app,
            ReadModel::Deployments,
            &key_of(&of),
            &format!("deployment `{of}`"),
        )
        .await?;
        return Err(ApiError::not_found(format!(
            "there is no Autoscale for `{of}`"
        )));
    };
    let items = crate::api::decisions::transitions(&autoscale.spec, &app.deps.zones, from, to)?;
    json(StatusCode::OK, &Preview { items })
}
