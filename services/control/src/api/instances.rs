//! Instances.

use std::sync::Arc;

use domain::views::ReadModel;
use http::StatusCode;

use super::{Filter, rows};
use crate::answer::{Answer, json};
use crate::call::Call;
use crate::service::App;

pub async fn list(app: Arc<App>, call: Call) -> Answer {
    let filter = Filter::of(ReadModel::Instances, &call)?;
    json(StatusCode::OK, &rows(&app, filter, call.page()?).await?)
}
