//! Instances.

use std::sync::Arc;

use domain::views::ReadModel;
use http::StatusCode;

use super::{Filter, list_rows};
use crate::call::Call;
use crate::response::{ApiResult, json};
use crate::service::App;

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let filter = Filter::from_query(ReadModel::Instances, &call)?;
    json(
        StatusCode::OK,
        &list_rows(&app, filter, call.page()?).await?,
    )
}
