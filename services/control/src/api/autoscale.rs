//! Autoscale settings, manual pins and pauses.

use std::sync::Arc;

use contract::decision::{Pause, Pin};
use contract::ids::{DeploymentRef, Name};
use contract::problem::Finding;
use contract::resources::{AutoscaleSpec, Resource, document_schema};
use contract::time::{Span, Timestamp};
use contract::views::{Applied, AutoscaleView};
use domain::autoscale::Policy;
use domain::endpoint::commands::Command;
use domain::endpoint::{Deployment, Endpoint};
use domain::views::{ReadModel, autoscale_view};
use domain::zones::ZoneData;
use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::endpoints::{DeleteResult, Deleted, HeldBy};
use super::{
    Filter, applied_response, deleted_concurrently, deployment_row_key, execute, get_row,
    json_with_etag, list_rows, parse_resource, seal_response, stored_response,
};
use crate::app::App;
use crate::call::Call;
use crate::commands::{CommandOutcome, CommandRequest};
use crate::error::ApiError;
use crate::response::{ApiResult, List, json, with_position};
use crate::table::{
    Content, FILTERED, FROM, GUARDED, OPERATOR, PUT, REPEATABLE, RouteEntry, TO, VIEWER, WRITE,
    route, schema,
};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/autoscale" "listAutoscale" VIEWER, "Autoscale settings, newest first",
            Content::Json(schema::<List<AutoscaleView>>), list, query FILTERED),
        route!(GET "/v1/autoscale/{endpoint}/{deployment}" "getAutoscale" VIEWER, "The Autoscale of a deployment",
            Content::Json(schema::<AutoscaleView>), get),
        route!(PUT "/v1/autoscale/{endpoint}/{deployment}" "putAutoscale" OPERATOR, "Set the Autoscale of a deployment",
            Content::Json(schema::<Applied<AutoscaleView>>), put, query WRITE, headers GUARDED,
            body |g| document_schema("Autoscale", g), statuses PUT),
        route!(DELETE "/v1/autoscale/{endpoint}/{deployment}" "deleteAutoscale" OPERATOR, "Remove the Autoscale; the deployment's own count applies again",
            Content::Json(schema::<Deleted>), delete, query WRITE, headers GUARDED),
        route!(PUT "/v1/autoscale/{endpoint}/{deployment}/pin" "pin" OPERATOR, "Pin the number of instances, whatever the rules say",
            Content::Json(schema::<Manual>), pin, headers GUARDED, body schema::<PinBody>),
        route!(DELETE "/v1/autoscale/{endpoint}/{deployment}/pin" "release" OPERATOR, "Release the pin, so that the rules decide again",
            Content::Json(schema::<Manual>), release, headers GUARDED),
        route!(POST "/v1/autoscale/{endpoint}/{deployment}/pause" "pause" OPERATOR, "Pause scaling, in one direction or both",
            Content::Json(schema::<Manual>), pause, headers REPEATABLE, body schema::<Directions>),
        route!(POST "/v1/autoscale/{endpoint}/{deployment}/resume" "resume" OPERATOR, "Resume scaling, in one direction or both",
            Content::Json(schema::<Manual>), resume, headers REPEATABLE, body schema::<Directions>),
        route!(GET "/v1/autoscale/{endpoint}/{deployment}/preview" "previewAutoscale" VIEWER, "The profiles in force over time, oldest first; the next seven days by default",
            Content::Json(schema::<Preview>), preview, query &[FROM, TO]),
    ]
}

/// The maximum and the default time span of a preview.
const PREVIEW_MAX: Span = Span::from_secs(400 * 86_400);
const PREVIEW_DEFAULT: Span = Span::from_secs(7 * 86_400);

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PinBody {
    pub instances: u32,
    /// When the pin ends; without it and `for`, it holds until released.
    #[serde(default)]
    pub until: Option<Timestamp>,
    /// How long the pin holds, by the server's clock, such as `1h`; instead of `until`.
    #[serde(default, rename = "for")]
    pub duration: Option<Span>,
}

impl PinBody {
    /// The pin, from now on.
    fn pin(self, now: Timestamp) -> Result<Pin, ApiError> {
        let until = match (self.until, self.duration) {
            (Some(_), Some(_)) => {
                let detail = "`until` is given too; keep one of the two";
                return Err(ApiError::invalid(vec![Finding::new("/for", detail)]));
            }
            (None, Some(duration)) if duration == Span::ZERO => {
                let detail = "a pin for no time has no effect; write a duration such as 1h, or omit it to pin until released";
                return Err(ApiError::invalid(vec![Finding::new("/for", detail)]));
            }
            (until, duration) => until.or(duration.map(|duration| now + duration)),
        };
        Ok(Pin {
            instances: self.instances,
            until,
        })
    }
}

/// Directions to pause or resume; both if none is given.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Directions {
    #[serde(default)]
    pub scale_in: Option<bool>,
    #[serde(default)]
    pub scale_out: Option<bool>,
}

/// Manual overrides of the rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Manual {
    pub endpoint: Name,
    pub deployment: Name,
    pub pin: Option<Pin>,
    pub pause: Pause,
}

/// The profile in force from a given time on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Transition")]
pub struct TransitionView {
    pub at: Timestamp,
    pub profile: String,
    pub min: u32,
    pub max: u32,
    pub default: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Preview {
    pub items: Vec<TransitionView>,
    /// When the first change happens that was left out because there are more than 10,000; absent if none
    /// was. A preview from then on continues this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_at: Option<Timestamp>,
}

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let filter = Filter::from_query(ReadModel::Autoscales, &call)?;
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
            ReadModel::Autoscales,
            &deployment_row_key(&target),
            &format!("Autoscale for `{target}`"),
        )
        .await?,
    )
}

fn view(endpoint: &Endpoint, target: &DeploymentRef) -> Option<AutoscaleView> {
    let deployment = endpoint.deployments.get(&target.deployment)?;
    autoscale_view(endpoint, &target.deployment, deployment, None)
}

pub async fn put(app: Arc<App>, call: Call) -> ApiResult {
    let target = call.deployment()?;
    let resource = parse_resource(&app, &call, "Autoscale", &target.to_string())?;
    let warnings = domain::documents::warnings(&resource, &app.deps.zones);
    let Resource::Autoscale(document) = resource else {
        return Err(ApiError::internal("parsed resource is not an Autoscale"));
    };
    let command = Command::PutAutoscale {
        deployment: target.deployment.clone(),
        labels: document.metadata.labels,
        spec: document.spec,
    };
    let outcome = execute(&app, &call, &target.endpoint, &command).await?;
    let before = outcome
        .before
        .as_ref()
        .and_then(|endpoint| view(endpoint, &target));
    let after = outcome
        .after
        .as_ref()
        .and_then(|endpoint| view(endpoint, &target));
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
    let command = Command::DeleteAutoscale {
        deployment: target.deployment.clone(),
    };
    let outcome = execute(&app, &call, &target.endpoint, &command).await?;
    let deployment = outcome
        .after
        .as_ref()
        .and_then(|endpoint| endpoint.deployments.get(&target.deployment));
    let body = Deleted {
        result: DeleteResult::Deleted,
        dry_run: call.flag("dryRun")?,
        deployments: Vec::new(),
        instances: deployment.map(|deployment| deployment.spec.instances),
        held_by: deployment.and_then(|deployment| held_by(deployment, call.now)),
    };
    Ok(with_position(
        json(StatusCode::OK, &body)?,
        outcome.position,
    ))
}

/// What keeps the count of a deployment without an Autoscale.
fn held_by(deployment: &Deployment, now: Timestamp) -> Option<HeldBy> {
    let is_pinned = (deployment.pin).is_some_and(|pin| pin.until.is_none_or(|until| now < until));
    match (deployment.pause.scale_in, deployment.pause.scale_out) {
        _ if is_pinned => Some(HeldBy::Pin),
        (true, true) => Some(HeldBy::Pause),
        (true, false) => Some(HeldBy::PauseOfScaleIn),
        (false, true) => Some(HeldBy::PauseOfScaleOut),
        (false, false) => None,
    }
}

fn manual(endpoint: Option<&Endpoint>, target: DeploymentRef) -> Result<Manual, ApiError> {
    let deployment = endpoint.and_then(|endpoint| endpoint.deployments.get(&target.deployment));
    let deployment = deployment.ok_or_else(deleted_concurrently)?;
    Ok(Manual {
        endpoint: target.endpoint,
        deployment: target.deployment,
        pin: deployment.pin,
        pause: deployment.pause,
    })
}

fn manual_response(outcome: &CommandOutcome, target: DeploymentRef) -> ApiResult {
    let body = manual(outcome.after.as_ref(), target)?;
    Ok(with_position(
        json(StatusCode::OK, &body)?,
        outcome.position,
    ))
}

pub async fn pin(app: Arc<App>, call: Call) -> ApiResult {
    let target = call.deployment()?;
    let body: PinBody = call.parse_body()?;
    let command = Command::Pin {
        deployment: target.deployment.clone(),
        pin: body.pin(call.now)?,
    };
    let outcome = execute(&app, &call, &target.endpoint, &command).await?;
    manual_response(&outcome, target)
}

pub async fn release(app: Arc<App>, call: Call) -> ApiResult {
    let target = call.deployment()?;
    let command = Command::Release {
        deployment: target.deployment.clone(),
    };
    let outcome = execute(&app, &call, &target.endpoint, &command).await?;
    manual_response(&outcome, target)
}

pub async fn pause(app: Arc<App>, call: Call) -> ApiResult {
    set_pause(app, call, true).await
}

pub async fn resume(app: Arc<App>, call: Call) -> ApiResult {
    set_pause(app, call, false).await
}

async fn set_pause(app: Arc<App>, call: Call, to: bool) -> ApiResult {
    let target = call.deployment()?;
    let Directions {
        scale_in,
        scale_out,
    } = call.parse_body()?;
    if scale_in == Some(false) && scale_out == Some(false) {
        let detail = "both directions are false, so there is nothing to change; name one, or omit both to select both";
        return Err(ApiError::invalid(vec![Finding::new("", detail)]));
    }
    let both = scale_in.is_none() && scale_out.is_none();
    if let Some(response) = stored_response(&app, &call).await? {
        return Ok(response);
    }
    let aggregate = app.commands.endpoint(&target.endpoint).await?;
    let deployment = aggregate
        .state
        .as_ref()
        .and_then(|endpoint| endpoint.deployments.get(&target.deployment));
    let mut pause = deployment
        .map(|deployment| deployment.pause)
        .unwrap_or_default();
    if both || scale_in == Some(true) {
        pause.scale_in = to;
    }
    if both || scale_out == Some(true) {
        pause.scale_out = to;
    }
    let mut idempotency_key = call.idempotency_key()?;
    if let (Some(idempotency_key), Some(deployment)) = (&mut idempotency_key, deployment) {
        let body = Manual {
            endpoint: target.endpoint.clone(),
            deployment: target.deployment.clone(),
            pin: deployment.pin,
            pause,
        };
        idempotency_key.result = Some(seal_response(
            &app,
            &idempotency_key.key,
            StatusCode::OK,
            &body,
        )?);
    }
    let command = Command::SetPause {
        deployment: target.deployment.clone(),
        pause,
    };
    let request = CommandRequest {
        endpoint: &target.endpoint,
        command: &command,
        precondition: call.precondition()?,
        actor: call.actor(),
        dry_run: false,
        idempotency_key,
    };
    let outcome = app.commands.execute(request, &app.views).await?;
    manual_response(&outcome, target)
}

pub async fn preview(app: Arc<App>, call: Call) -> ApiResult {
    let target = call.deployment()?;
    let from = call.time("from")?.unwrap_or(call.now);
    let to = call.time("to")?.unwrap_or(from + PREVIEW_DEFAULT);
    if to <= from || to.since(from) > PREVIEW_MAX {
        return Err(ApiError::bad_request(format!(
            "`to` must lie after `from`, and at most {PREVIEW_MAX} after it"
        )));
    }
    let aggregate = app.commands.endpoint(&target.endpoint).await?;
    let deployment = aggregate
        .state
        .as_ref()
        .and_then(|endpoint| endpoint.deployments.get(&target.deployment));
    let autoscale = deployment.and_then(|deployment| deployment.autoscale.as_ref());
    let Some(autoscale) = autoscale else {
        get_row(
            &app,
            ReadModel::Deployments,
            &deployment_row_key(&target),
            &format!("deployment `{target}`"),
        )
        .await?;
        return Err(ApiError::not_found(format!(
            "there is no Autoscale for `{target}`"
        )));
    };
    let preview = previewed(&autoscale.spec, &app.deps.zones, from, to)?;
    json(StatusCode::OK, &preview)
}

/// Returns the profile in force at `from`, and the changes of it up to `to`.
fn previewed(
    spec: &AutoscaleSpec,
    zones: &ZoneData,
    from: Timestamp,
    to: Timestamp,
) -> Result<Preview, ApiError> {
    let policy = Policy::compile(spec, zones).map_err(ApiError::invalid)?;
    let preview = policy.preview(from, to);
    Ok(Preview {
        items: preview
            .items
            .into_iter()
            .map(TransitionView::from)
            .collect(),
        cut_at: preview.cut_at,
    })
}

impl From<domain::autoscale::Transition> for TransitionView {
    fn from(transition: domain::autoscale::Transition) -> Self {
        Self {
            at: transition.at,
            profile: transition.profile,
            min: transition.min,
            max: transition.max,
            default: transition.default,
        }
    }
}
