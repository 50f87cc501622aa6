//! The handlers, a module for each kind of resource.

pub mod access;
pub mod autoscale;
pub mod decisions;
pub mod deployments;
pub mod endpoints;
pub mod events;
pub mod history;
pub mod instances;
pub mod logs;
pub mod ops;
pub mod parking;

use std::sync::Arc;

use contract::ids::{EndpointKey, Name, Position};
use contract::problem::Finding;
use contract::resources::{Applied, ApplyResult, Resource};
use contract::time::Timestamp;
use documents::Backends;
use domain::documents::diff;
use domain::endpoint::commands::Command;
use domain::views::ReadModel;
use http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};
use store::{Row, RowQuery};

use crate::answer::{Answer, List, at, json, json_text, revision_of, tagged};
use crate::call::{Call, Page};
use crate::commands::{Done, Order};
use crate::error::ApiError;
use crate::service::App;

/// A row's document.
fn doc(row: &Row) -> Result<Value, ApiError> {
    serde_json::from_str(&row.doc).map_err(ApiError::internal)
}

/// One row, as it is stored.
async fn one(app: &App, model: ReadModel, key: &str, what: &str) -> Result<Value, ApiError> {
    let row = app.deps.store.row(model.name(), key).await?;
    let row = row.ok_or_else(|| ApiError::not_found(format!("there is no {what}")))?;
    doc(&row)
}

fn with_revision(view: &Value) -> Answer {
    let response = json(StatusCode::OK, view)?;
    Ok(match revision_of(view) {
        Some(revision) => tagged(response, revision),
        None => response,
    })
}

/// Which rows a list shows.
struct Filter {
    model: &'static str,
    endpoint: Option<String>,
    deployment: Option<String>,
    since: Option<Timestamp>,
}

impl Filter {
    /// By the query parameters `endpoint`, `deployment` and `since`.
    fn of(model: ReadModel, call: &Call) -> Result<Self, ApiError> {
        Self::of_rows(model.name(), call)
    }

    /// The same of rows that are not of a read model of events.
    fn of_rows(model: &'static str, call: &Call) -> Result<Self, ApiError> {
        let endpoint = call.query.get("endpoint");
        Ok(Self {
            model,
            endpoint: endpoint.map(|name| format!("{}/{name}", contract::ids::DEFAULT_WORKSPACE)),
            deployment: call.query.get("deployment").cloned(),
            since: call.time("since")?,
        })
    }
}

async fn rows(app: &App, filter: Filter, page: Page) -> Result<List<Value>, ApiError> {
    let query = RowQuery {
        model: filter.model.to_owned(),
        endpoint: filter.endpoint,
        deployment: filter.deployment,
        since: filter.since,
        before: page.before,
        limit: page.limit,
    };
    let rows = app.deps.store.rows(query).await?;
    let last = rows.last().filter(|_| rows.len() >= page.limit);
    let next_cursor = last.map(|row| row.position.to_string());
    let items = rows.iter().map(doc).collect::<Result<_, _>>()?;
    Ok(List { items, next_cursor })
}

/// A write to an endpoint's stream.
async fn carry_out(
    app: &App,
    call: &Call,
    endpoint: &Name,
    command: &Command,
) -> Result<Done, ApiError> {
    let order = Order {
        endpoint,
        command,
        precondition: call.precondition()?,
        actor: call.actor(),
        dry_run: call.flag("dryRun")?,
        cause: None,
    };
    app.commands.carry_out(order, &app.views).await
}

/// The answer to a PUT of a document.
fn applied<V: Serialize>(call: &Call, before: Option<&V>, after: V, done: &Done) -> Answer {
    let old = before
        .map(serde_json::to_value)
        .transpose()
        .map_err(ApiError::internal)?;
    let new = serde_json::to_value(&after).map_err(ApiError::internal)?;
    let result = match (&old, done.changed) {
        (None, _) => ApplyResult::Created,
        (Some(_), true) => ApplyResult::Changed,
        (Some(_), false) => ApplyResult::Unchanged,
    };
    let changes = diff(old.as_ref().map(written).as_ref(), Some(&written(&new)));
    let dry_run = call.flag("dryRun")?;
    let status = match (result, dry_run) {
        (ApplyResult::Created, false) => StatusCode::CREATED,
        _ => StatusCode::OK,
    };
    let revision = revision_of(&new);
    let answer = Applied {
        result,
        dry_run,
        changes,
        resource: after,
    };
    let response = at(json(status, &answer)?, done.position);
    Ok(match revision {
        Some(revision) if !dry_run => tagged(response, revision),
        _ => response,
    })
}

/// What a person writes of a view: labels and spec.
fn written(view: &Value) -> Value {
    json!({"metadata": {"labels": view.pointer("/metadata/labels")}, "spec": view.get("spec")})
}

/// The body as a resource that belongs at this path.
fn resource(app: &App, call: &Call, kind: &str, full_name: &str) -> Result<Resource, ApiError> {
    let document = call.document()?;
    let backends = Backends::offered(app.routes.members().backends());
    let checked = document.checked(&backends, |resource| {
        let mut findings = domain::documents::validate(resource, &app.deps.zones);
        findings.extend(misplaced(resource, kind, full_name));
        findings
    });
    checked.map_err(ApiError::invalid)
}

fn misplaced(resource: &Resource, kind: &str, full_name: &str) -> Option<Finding> {
    if resource.kind() != kind {
        let detail = format!(
            "a {} cannot be put here, where a {kind} belongs; send it to its own path",
            resource.kind()
        );
        return Some(Finding::new("/kind", detail));
    }
    if resource.full_name() == full_name {
        return None;
    }
    let pointer = resource.named_by();
    let detail = format!(
        "the document is about `{}`, and was sent for `{full_name}`; make them equal",
        resource.full_name()
    );
    Some(Finding::new(pointer, detail))
}

fn gone_meanwhile() -> ApiError {
    ApiError::conflict(
        "changed-meanwhile",
        "the resource was deleted meanwhile; read it again",
    )
}

/// Carries out a POST once: a repeat with the same Idempotency-Key gets the first answer. The answer
/// is kept sealed, since it may hold a secret.
async fn first_answer(
    app: &Arc<App>,
    call: &Call,
) -> Result<Option<axum::response::Response>, ApiError> {
    let Some(cause) = call.cause()? else {
        return Ok(None);
    };
    let Some(before) = app.deps.store.repeated(&cause).await? else {
        return Ok(None);
    };
    let store::Committed::Before { positions, result } = before else {
        return Ok(None);
    };
    let text = app
        .seal
        .unseal(&result.unwrap_or_default(), &cause.key)
        .map_err(ApiError::internal)?;
    let (status, body) = text.split_once(' ').unwrap_or(("200", &text));
    let status = status.parse().unwrap_or(StatusCode::OK);
    let position = positions.last().copied().unwrap_or(Position::START);
    Ok(Some(at(json_text(status, body.to_owned()), position)))
}

/// The answer as it is kept with its cause.
fn kept(
    app: &App,
    key: &str,
    status: StatusCode,
    body: &impl Serialize,
) -> Result<String, ApiError> {
    let body = serde_json::to_string(body).map_err(ApiError::internal)?;
    let text = format!("{} {body}", status.as_u16());
    app.seal
        .seal(&text, key, app.deps.ids.as_ref())
        .map_err(ApiError::internal)
}

/// `workspace/endpoint/deployment`.
fn key_of(of: &contract::ids::DeploymentRef) -> String {
    domain::views::row_key(&EndpointKey::new(&of.endpoint), &of.deployment)
}
