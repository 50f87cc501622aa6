//! Streams the output of instances.
//!
//! Invariant: a reader holds a stream permit until the response, the client or the server ends.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use domain::views::ReadModel;
use futures::StreamExt;
use http::{HeaderValue, header};

use super::{deployment_row_key, get_row};
use crate::app::App;
use crate::call::Call;
use crate::deps::LogQuery;
use crate::error::ApiError;
use crate::response::ApiResult;
use crate::table::{Content, Parameter, RouteEntry, SINCE, VIEWER, route};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/logs/{endpoint}/{deployment}" "getLogs" VIEWER, "Output of instances, oldest first",
        Content::Text, get, query &[
            SINCE,
            Parameter::whole("limit", "Maximum number of past lines; 100000 by default", 0, LINES_MAX),
            Parameter::flag("follow", "Keep following new output"),
            Parameter::text("instance", "Only of this instance"),
            Parameter::flag("timestamps", "Prefix each line with `~` and the time it was first seen, at most about ten seconds after it was written"),
        ]),
    ]
}

/// Maximum past lines per request.
const LINES_MAX: u64 = 100_000;

pub async fn get(app: Arc<App>, call: Call) -> ApiResult {
    let target = call.deployment()?;
    get_row(
        &app,
        ReadModel::Deployments,
        &deployment_row_key(&target),
        &format!("deployment `{target}`"),
    )
    .await?;
    let lines = call.number("limit")?;
    if lines.is_some_and(|lines| lines > LINES_MAX) {
        return Err(ApiError::bad_request(format!(
            "`limit` is out of range; use 0 to {LINES_MAX}"
        )));
    }
    let query = LogQuery {
        since: call.time("since")?,
        lines: lines.map(|lines| lines as usize),
        follow: call.flag("follow")?,
        timestamps: call.flag("timestamps")?,
        instance: call.query.get("instance").map(|id| id.clone().into()),
    };
    // Also without `follow`: a chatty deployment has many past lines.
    let permit = app.acquire_stream_permit()?;
    let stream = app.deps.logs.logs(&target, query).await?;
    let shutdown = app.shutdown.clone();
    let stream = stream
        .take_until(async move { shutdown.cancelled().await })
        .inspect(move |_| {
            let _permit = &permit;
        });
    let mut response = Response::new(Body::from_stream(stream));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    Ok(response)
}
