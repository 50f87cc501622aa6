//! Parked endpoints, and the decisions of operators about them.

use std::sync::Arc;

use contract::events::{ConsumerUnparked, Event, EventSkipped};
use contract::ids::{EndpointKey, Name, Position};
use contract::log::NewEvent;
use contract::problem::Finding;
use contract::time::Timestamp;
use http::StatusCode;
use runtime::parking::{PARKED, endpoint_of, stream};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use store::{Append, Commit, CommitError, Committed, LogEntry};

use super::{Filter, list_rows, seal_response, stored_response};
use crate::app::App;
use crate::call::{Call, parse_position};
use crate::error::ApiError;
use crate::response::{ApiResult, List, json, with_position};
use crate::table::{
    BY_ENDPOINT, Content, IDEMPOTENT, OPERATOR, PAGE, RouteEntry, VIEWER, route, schema,
};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/events/parked" "listParked" VIEWER, "Endpoints that a consumer has parked because it cannot process one of their events, and such events of no endpoint",
            Content::Json(schema::<List<Parked>>), list, query &[BY_ENDPOINT, PAGE[0], PAGE[1]]),
        route!(POST "/v1/events/{position}/skip" "skipEvent" OPERATOR, "Make a consumer skip an event, from its next fold on",
            Content::Json(schema::<Decided>), skip, headers &[IDEMPOTENT], body schema::<Skip>),
        route!(POST "/v1/endpoints/{endpoint}/unpark" "unparkEndpoint" OPERATOR, "Make a consumer rebuild its state of a parked endpoint",
            Content::Json(schema::<Decided>), unpark, headers &[IDEMPOTENT], body schema::<Unpark>),
    ]
}

/// How often a write is attempted before it fails on conflicts.
const ATTEMPTS_MAX: usize = 5;
const READ_PAGE: usize = 1000;
/// Longest name of a consumer, and longest reason, in characters.
const CONSUMER_MAX: usize = 64;
const REASON_MAX: usize = 1000;

/// An endpoint that a consumer has parked, or an event that belongs to no endpoint and that it skips.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Parked {
    pub consumer: String,
    /// The endpoint; absent if the event belongs to none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Name>,
    /// The position of the event that the consumer cannot process.
    pub position: Position,
    pub event_type: String,
    pub detail: String,
    pub since: Timestamp,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Skip {
    #[schemars(length(max = CONSUMER_MAX), regex(pattern = r"\S"))]
    pub consumer: String,
    #[schemars(length(max = REASON_MAX), regex(pattern = r"\S"))]
    pub reason: String,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Unpark {
    #[schemars(length(max = CONSUMER_MAX), regex(pattern = r"\S"))]
    pub consumer: String,
    #[schemars(length(max = REASON_MAX))]
    #[serde(default)]
    pub reason: String,
}

/// The decision of an operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Decided {
    pub endpoint: Name,
    pub consumer: String,
    /// The position of the event that is skipped from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<Position>,
}

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let filter = Filter::for_model(PARKED, &call)?;
    json(
        StatusCode::OK,
        &list_rows(&app, filter, call.page()?).await?,
    )
}

pub async fn skip(app: Arc<App>, call: Call) -> ApiResult {
    let Skip { consumer, reason } = call.parse_body()?;
    check("/consumer", &consumer, 1, CONSUMER_MAX)?;
    check("/reason", &reason, 1, REASON_MAX)?;
    let position = position(&call)?;
    let key = endpoint_at(&app, position).await?;
    let event = Event::EventSkipped(EventSkipped {
        consumer: consumer.clone(),
        position,
        reason,
    });
    let decision = Decided {
        endpoint: key.endpoint(),
        consumer,
        skipped: Some(position),
    };
    write(&app, &call, &key, event, &decision).await
}

pub async fn unpark(app: Arc<App>, call: Call) -> ApiResult {
    let Unpark { consumer, reason } = call.parse_body()?;
    check("/consumer", &consumer, 1, CONSUMER_MAX)?;
    check("/reason", &reason, 0, REASON_MAX)?;
    let key = EndpointKey::new(&call.endpoint()?);
    if let Some(response) = stored_response(&app, &call).await? {
        return Ok(response);
    }
    let row_key = format!("{consumer}/{key}");
    if app.deps.store.row(PARKED, &row_key).await?.is_none() {
        return Err(ApiError::not_found(format!(
            "`{}` is not parked in `{consumer}`; `penstock events parked` lists those that are",
            key.endpoint()
        )));
    }
    let event = Event::ConsumerUnparked(ConsumerUnparked {
        consumer: consumer.clone(),
        reason,
    });
    let decision = Decided {
        endpoint: key.endpoint(),
        consumer,
        skipped: None,
    };
    write(&app, &call, &key, event, &decision).await
}

fn check(pointer: &str, text: &str, min: usize, max: usize) -> Result<(), ApiError> {
    if text.trim().chars().count() >= min && text.chars().count() <= max {
        return Ok(());
    }
    let detail = format!("write {min} to {max} characters");
    Err(ApiError::invalid(vec![Finding::new(pointer, detail)]))
}

fn position(call: &Call) -> Result<Position, ApiError> {
    let text = call.params.get("position").map_or("", String::as_str);
    match parse_position(text) {
        Some(position) if position > Position::START => Ok(position),
        _ => Err(ApiError::bad_request(format!(
            "`{text}` is not a position; use a whole number from 1 up"
        ))),
    }
}

/// The endpoint of the event at a position, whether or not the event can be read.
async fn endpoint_at(app: &App, position: Position) -> Result<EndpointKey, ApiError> {
    let after = Position(position.0 - 1);
    let entries = app.deps.store.read_all_entries(after, 1).await?;
    let entry = entries
        .into_iter()
        .find(|entry| entry.position() == position);
    let entry = entry
        .ok_or_else(|| ApiError::not_found(format!("there is no event at position {position}")))?;
    let key = match entry {
        LogEntry::Record(record) => record.endpoint(),
        LogEntry::Unreadable(unreadable) => endpoint_of(&unreadable),
    };
    key.ok_or_else(|| {
        ApiError::bad_request(format!(
            "the event at position {position} does not belong to an endpoint, so it parks none: a consumer that cannot process it skips it, and reports it until its release can"
        ))
    })
}

async fn write(
    app: &Arc<App>,
    call: &Call,
    key: &EndpointKey,
    event: Event,
    decision: &Decided,
) -> ApiResult {
    if let Some(response) = stored_response(app, call).await? {
        return Ok(response);
    }
    let idempotency_key = match call.idempotency_key()? {
        None => None,
        Some(mut idempotency_key) => {
            idempotency_key.result = Some(seal_response(
                app,
                &idempotency_key.key,
                StatusCode::OK,
                decision,
            )?);
            Some(idempotency_key)
        }
    };
    let (store, now) = (&app.deps.store, app.deps.clock.now());
    let stream = stream(key);
    for _ in 0..ATTEMPTS_MAX {
        let mut version = 0;
        loop {
            let page = store.read_stream(&stream, version, READ_PAGE).await?;
            version = page.last().map_or(version, |record| record.version);
            if page.len() < READ_PAGE {
                break;
            }
        }
        let append = Append {
            stream: stream.clone(),
            expected_version: version,
            events: vec![NewEvent {
                id: app.deps.ids.event_id(now),
                time: now,
                actor: call.actor(),
                event: event.clone(),
            }],
        };
        let commit = Commit {
            appends: vec![append],
            idempotency_key: idempotency_key.clone(),
            ..Commit::default()
        };
        let position = match store.commit(commit).await {
            Ok(Committed::Written { records }) => records.last().map(|record| record.position),
            Ok(Committed::Duplicate { positions, .. }) => positions.last().copied(),
            Err(CommitError::Conflict { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let response = json(StatusCode::OK, decision)?;
        return Ok(with_position(response, position.unwrap_or_default()));
    }
    Err(ApiError::conflict(
        "changed-meanwhile",
        "other requests repeatedly decided about this endpoint; try again",
    ))
}
