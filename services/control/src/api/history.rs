//! Past measurements.

use std::sync::Arc;

use contract::ids::Name;
use contract::time::Span;
use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::app::App;
use crate::call::Call;
use crate::deps::HistoryQuery;
use crate::error::ApiError;
use crate::response::{ApiResult, json};
use crate::table::{
    BY_DEPLOYMENT, BY_ENDPOINT, Content, FROM, Parameter, RouteEntry, SINCE, TO, VIEWER, route,
    schema,
};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/history" "getHistory" VIEWER, "Past measurements, oldest first",
        Content::Json(schema::<History>), get, query &[
            BY_ENDPOINT, BY_DEPLOYMENT, FROM, TO, SINCE,
            Parameter::span("step", "Length of a point in whole seconds; 1s by default"),
        ]),
    ]
}

/// Maximum points per deployment and request: one day of seconds.
const POINTS_MAX: u64 = 86_400;
const WINDOW_DEFAULT: Span = Span::from_secs(600);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct History {
    pub items: Vec<Value>,
}

pub async fn get(app: Arc<App>, call: Call) -> ApiResult {
    let to = call.time("to")?.unwrap_or(call.now);
    let from = match (call.time("from")?, call.time("since")?) {
        (Some(_), Some(_)) => {
            return Err(ApiError::bad_request(
                "`from` and `since` are the same; use only one of the two",
            ));
        }
        (from, since) => from.or(since).unwrap_or(to - WINDOW_DEFAULT),
    };
    let step = call.span("step")?.unwrap_or(Span::from_secs(1));
    if step < Span::from_secs(1) || !step.millis().is_multiple_of(1000) {
        return Err(ApiError::bad_request(
            "`step` must be whole seconds, 1s or more",
        ));
    }
    if to <= from || to.since(from).millis() / step.millis() > POINTS_MAX {
        return Err(ApiError::bad_request(format!(
            "`to` must lie after `from`, with at most {POINTS_MAX} steps between; use a longer `step`"
        )));
    }
    // An invalid name matches nothing.
    let filter = |param: &str| call.query.get(param).map(|name| name.parse::<Name>());
    let (endpoint, deployment) = match (filter("endpoint"), filter("deployment")) {
        (Some(Err(_)), _) | (_, Some(Err(_))) => {
            return json(StatusCode::OK, &History { items: Vec::new() });
        }
        (endpoint, deployment) => (
            endpoint.and_then(Result::ok),
            deployment.and_then(Result::ok),
        ),
    };
    let query = HistoryQuery {
        endpoint,
        deployment,
        from,
        to,
        step,
    };
    let items = app.deps.history.history(query).await?;
    json(StatusCode::OK, &History { items })
}
