//! The routes and their handlers, one module per kind of resource.

pub mod access;
pub mod archive;
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
use contract::resources::Resource;
use contract::time::Timestamp;
use contract::views::{Applied, ApplyResult};
use documents::Backends;
use domain::documents::diff;
use domain::endpoint::commands::Command;
use domain::views::ReadModel;
use http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};
use store::{Row, RowQuery};

use crate::app::App;
use crate::call::{Call, PageRequest};
use crate::commands::{CommandOutcome, CommandRequest};
use crate::error::ApiError;
use crate::response::{ApiResult, List, json, raw_json, revision_of, with_etag, with_position};
use crate::table::RouteEntry;

/// All routes.
pub fn routes() -> Vec<RouteEntry> {
    [
        endpoints::routes(),
        deployments::routes(),
        autoscale::routes(),
        decisions::routes(),
        instances::routes(),
        logs::routes(),
        history::routes(),
        events::routes(),
        parking::routes(),
        archive::routes(),
        access::routes(),
        ops::routes(),
    ]
    .concat()
}

/// Parses the document of a row.
fn parse_doc(row: &Row) -> Result<Value, ApiError> {
    serde_json::from_str(&row.doc).map_err(ApiError::internal)
}

/// Returns the document of one row.
async fn get_row(app: &App, model: ReadModel, key: &str, what: &str) -> Result<Value, ApiError> {
    let row = app.deps.store.row(model.name(), key).await?;
    let row = row.ok_or_else(|| ApiError::not_found(format!("there is no {what}")))?;
    parse_doc(&row)
}

fn json_with_etag(view: &Value) -> ApiResult {
    let response = json(StatusCode::OK, view)?;
    Ok(match revision_of(view) {
        Some(revision) => with_etag(response, revision),
        None => response,
    })
}

/// Selects the rows of a list.
struct Filter {
    model: &'static str,
    endpoint: Option<String>,
    deployment: Option<String>,
    since: Option<Timestamp>,
}

impl Filter {
    /// Reads the query parameters `endpoint`, `deployment` and `since`.
    fn from_query(model: ReadModel, call: &Call) -> Result<Self, ApiError> {
        Self::for_model(model.name(), call)
    }

    /// Like [`Filter::from_query`], for rows outside of [`ReadModel`].
    fn for_model(model: &'static str, call: &Call) -> Result<Self, ApiError> {
        let endpoint = call.query.get("endpoint");
        Ok(Self {
            model,
            endpoint: endpoint.map(|name| format!("{}/{name}", contract::ids::DEFAULT_WORKSPACE)),
            deployment: call.query.get("deployment").cloned(),
            since: call.time("since")?,
        })
    }
}

async fn list_rows(app: &App, filter: Filter, page: PageRequest) -> Result<List<Value>, ApiError> {
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
    let items = rows.iter().map(parse_doc).collect::<Result<_, _>>()?;
    Ok(List { items, next_cursor })
}

/// Executes a command on an endpoint.
async fn execute(
    app: &App,
    call: &Call,
    endpoint: &Name,
    command: &Command,
) -> Result<CommandOutcome, ApiError> {
    let request = CommandRequest {
        endpoint,
        command,
        precondition: call.precondition()?,
        actor: call.actor(),
        dry_run: call.flag("dryRun")?,
        idempotency_key: None,
    };
    app.commands.execute(request, &app.views).await
}

/// Builds the response to a PUT of a document.
fn applied_response<V: Serialize>(
    call: &Call,
    before: Option<&V>,
    after: V,
    outcome: &CommandOutcome,
    warnings: Vec<Finding>,
) -> ApiResult {
    let old = before
        .map(serde_json::to_value)
        .transpose()
        .map_err(ApiError::internal)?;
    let new = serde_json::to_value(&after).map_err(ApiError::internal)?;
    let result = match (&old, outcome.changed) {
        (None, _) => ApplyResult::Created,
        (Some(_), true) => ApplyResult::Changed,
        (Some(_), false) => ApplyResult::Unchanged,
    };
    let changes = diff(
        old.as_ref().map(user_defined).as_ref(),
        Some(&user_defined(&new)),
    );
    let dry_run = call.flag("dryRun")?;
    let status = match (result, dry_run) {
        (ApplyResult::Created, false) => StatusCode::CREATED,
        _ => StatusCode::OK,
    };
    let revision = revision_of(&new);
    let body = Applied {
        result,
        dry_run,
        changes,
        warnings,
        resource: after,
    };
    let response = with_position(json(status, &body)?, outcome.position);
    Ok(match revision {
        Some(revision) if !dry_run => with_etag(response, revision),
        _ => response,
    })
}

/// The user-defined parts of a view: labels and spec.
fn user_defined(view: &Value) -> Value {
    json!({"metadata": {"labels": view.pointer("/metadata/labels")}, "spec": view.get("spec")})
}

/// Parses the body as a resource that belongs at this path.
fn parse_resource(
    app: &App,
    call: &Call,
    kind: &str,
    full_name: &str,
) -> Result<Resource, ApiError> {
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
            "this path takes a {kind}, not a {}; send it to its own path",
            resource.kind()
        );
        return Some(Finding::new("/kind", detail));
    }
    if resource.full_name() == full_name {
        return None;
    }
    let pointer = resource.identifying_pointer();
    let detail = format!(
        "the document is for `{}`, but was sent for `{full_name}`; make them equal",
        resource.full_name()
    );
    Some(Finding::new(pointer, detail))
}

fn deleted_concurrently() -> ApiError {
    ApiError::conflict(
        "changed-meanwhile",
        "the resource was deleted by another request; read it again",
    )
}

/// Returns the response of the first POST if this one repeats its Idempotency-Key. Responses are stored
/// sealed, since they may contain a secret.
async fn stored_response(
    app: &Arc<App>,
    call: &Call,
) -> Result<Option<axum::response::Response>, ApiError> {
    let Some(idempotency_key) = call.idempotency_key()? else {
        return Ok(None);
    };
    let Some(before) = app.deps.store.find_committed(&idempotency_key).await? else {
        return Ok(None);
    };
    let store::Committed::Duplicate { positions, result } = before else {
        return Ok(None);
    };
    let text = app
        .seal
        .unseal(&result.unwrap_or_default(), &idempotency_key.key)
        .map_err(ApiError::internal)?;
    let (status, body) = text.split_once(' ').unwrap_or(("200", &text));
    let status = status.parse().unwrap_or(StatusCode::OK);
    let position = positions.last().copied().unwrap_or(Position::START);
    Ok(Some(with_position(
        raw_json(status, body.to_owned()),
        position,
    )))
}

/// Seals a response, to be stored with its idempotency key.
fn seal_response(
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
fn deployment_row_key(target: &contract::ids::DeploymentRef) -> String {
    domain::views::row_key(&EndpointKey::new(&target.endpoint), &target.deployment)
}
