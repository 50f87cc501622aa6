//! Output of instances, streamed as it is kept.
//!
//! Invariant: whoever reads holds room among the streams until the answer, the client or the server ends.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use domain::views::ReadModel;
use futures::StreamExt;
use http::{HeaderValue, header};

use super::{key_of, one};
use crate::answer::Answer;
use crate::call::Call;
use crate::deps::LogQuery;
use crate::error::ApiError;
use crate::service::App;

/// Lines of the past that one request may ask for.
const LINES_MAX: u64 = 100_000;

pub async fn get(app: Arc<App>, call: Call) -> Answer {
    let of = call.deployment()?;
    one(
        &app,
        ReadModel::Deployments,
        &key_of(&of),
        &format!("deployment `{of}`"),
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
    // Not only to follow: the past of a chatty deployment is long too.
    let room = app.room_for_stream()?;
    let stream = app.deps.logs.logs(&of, query).await?;
    let shutdown = app.shutdown.clone();
    let stream = stream
        .take_until(async move { shutdown.cancelled().await })
        .inspect(move |_| {
            let _held = &room;
        });
    let mut response = Response::new(Body::from_stream(stream));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    Ok(response)
}
