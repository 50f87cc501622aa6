//! Decisions, and previews of profiles.

use std::sync::Arc;

use contract::views::DecisionView;
use domain::views::ReadModel;
use http::StatusCode;
use uuid::Uuid;

use super::{Filter, get_row, list_rows};
use crate::app::App;
use crate::call::Call;
use crate::error::ApiError;
use crate::response::{ApiResult, List, json};
use crate::table::{
    BY_DEPLOYMENT, BY_ENDPOINT, Content, PAGE, Parameter, RouteEntry, SINCE, VIEWER, route, schema,
};

const LIST: &[Parameter] = &[BY_ENDPOINT, BY_DEPLOYMENT, SINCE, PAGE[0], PAGE[1]];

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/decisions" "listDecisions" VIEWER, "Decisions, newest first",
            Content::Json(schema::<List<DecisionView>>), list, query LIST),
        route!(GET "/v1/decisions/{id}" "getDecision" VIEWER, "One decision with all its inputs",
            Content::Json(schema::<DecisionView>), get),
    ]
}

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let filter = Filter::from_query(ReadModel::Decisions, &call)?;
    json(
        StatusCode::OK,
        &list_rows(&app, filter, call.page()?).await?,
    )
}

pub async fn get(app: Arc<App>, call: Call) -> ApiResult {
    let text = call
        .params
        .get("id")
        .map(String::as_str)
        .unwrap_or_default();
    let id: Uuid = text.parse().map_err(|_| {
        ApiError::bad_request(format!(
            "`{text}` is not the id of a decision; use a UUID, as shown by `penstock decisions`"
        ))
    })?;
    let view = get_row(
        &app,
        ReadModel::Decisions,
        &id.to_string(),
        &format!("decision `{id}`"),
    )
    .await?;
    json(StatusCode::OK, &view)
}
