//! Instances.

use std::sync::Arc;

use domain::views::ReadModel;
use http::StatusCode;

use super::{Filter, list_rows};
use crate::app::App;
use crate::call::Call;
use crate::response::{ApiResult, List, json};
use crate::table::{Content, FILTERED, RouteEntry, VIEWER, route, schema};
use contract::views::InstanceView;

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/instances" "listInstances" VIEWER, "Instances, newest first, including recently ended ones",
            Content::Json(schema::<List<InstanceView>>), list, query FILTERED),
    ]
}

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let filter = Filter::from_query(ReadModel::Instances, &call)?;
    json(
        StatusCode::OK,
        &list_rows(&app, filter, call.page()?).await?,
    )
}
