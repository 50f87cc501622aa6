//! Endpoints that a consumer cannot digest an event of, and what people decide about them.

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
use store::{Append, Commit, CommitError, Committed, Entry};

use super::{Filter, first_answer, kept, rows};
use crate::answer::{Answer, at, json};
use crate::call::Call;
use crate::error::ApiError;
use crate::service::App;

/// Times that a decision is written anew after another one came first.
const TRIES: usize = 5;
const PAGE: usize = 1000;
/// Longest name of a consumer, and longest reason, in bytes.
const CONSUMER_BYTES_MAX: usize = 64;
const REASON_BYTES_MAX: usize = 1000;

/// An endpoint that a consumer has parked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Parked {
    pub consumer: String,
    pub endpoint: Name,
    /// Of the event that the consumer cannot digest.
    pub position: Position,
    pub event_type: String,
    pub detail: String,
    pub since: Timestamp,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Skip {
    pub consumer: String,
    pub reason: String,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Unpark {
    pub consumer: String,
    #[serde(default)]
    pub reason: String,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Decided {
    pub endpoint: Name,
    pub consumer: String,
    /// Of the event that is passed over from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<Position>,
}

pub async fn list(app: Arc<App>, call: Call) -> Answer {
    let filter = Filter::of_rows(PARKED, &call)?;
    json(StatusCode::OK, &rows(&app, filter, call.page()?).await?)
}

pub async fn skip(app: Arc<App>, call: Call) -> Answer {
    let Skip { consumer, reason } = call.typed()?;
    check("/consumer", &consumer, 1, CONSUMER_BYTES_MAX)?;
    check("/reason", &reason, 1, REASON_BYTES_MAX)?;
    let position = position(&call)?;
    let key = endpoint_at(&app, position).await?;
    let event = Event::EventSkipped(EventSkipped {
        consumer: consumer.clone(),
        position,
        reason,
    });
    let decided = Decided {
        endpoint: key.endpoint(),
        consumer,
        skipped: Some(position),
    };
    write(&app, &call, &key, event, &decided).await
}

pub async fn unpark(app: Arc<App>, call: Call) -> Answer {
    let Unpark { consumer, reason } = call.typed()?;
    check("/consumer", &consumer, 1, CONSUMER_BYTES_MAX)?;
    check("/reason", &reason, 0, REASON_BYTES_MAX)?;
    let key = EndpointKey::new(&call.endpoint()?);
    if let Some(answer) = first_answer(&app, &call).await? {
        return Ok(answer);
    }
    let row_key = format!("{consumer}/{key}");
    if app.deps.store.row(PARKED, &row_key).await?.is_none() {
        return Err(ApiError::not_found(format!(
            "`{}` is not parked in `{consumer}`; see `penstock events parked` for what is",
            key.endpoint()
        )));
    }
    let event = Event::ConsumerUnparked(ConsumerUnparked {
        consumer: consumer.clone(),
        reason,
    });
    let decided = Decided {
        endpoint: key.endpoint(),
        consumer,
        skipped: None,
    };
    write(&app, &call, &key, event, &decided).await
}

fn check(pointer: &str, text: &str, least: usize, most: usize) -> Result<(), ApiError> {
    if (least..=most).contains(&text.trim().len()) {
        return Ok(());
    }
    let detail = format!("write {least} to {most} characters");
    Err(ApiError::invalid(vec![Finding::new(pointer, detail)]))
}

fn position(call: &Call) -> Result<Position, ApiError> {
    let text = call.params.get("position").map_or("", String::as_str);
    match text.parse() {
        Ok(position) if position > 0 => Ok(Position(position)),
        _ => Err(ApiError::bad_request(format!(
            "`{text}` is not a position; positions are whole numbers from 1"
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
        Entry::Record(record) => record.endpoint(),
        Entry::Unreadable(unreadable) => endpoint_of(&unreadable),
    };
    key.ok_or_else(|| {
        ApiError::bad_request(format!(
            "the event at position {position} belongs to no endpoint, and parks none"
        ))
    })
}

async fn write(
    app: &Arc<App>,
    call: &Call,
    key: &EndpointKey,
    event: Event,
    decided: &Decided,
) -> Answer {
    if let Some(answer) = first_answer(app, call).await? {
        return Ok(answer);
    }
    let cause = match call.cause()? {
        None => None,
        Some(mut cause) => {
            cause.result = Some(kept(app, &cause.key, StatusCode::OK, decided)?);
            Some(cause)
        }
    };
    let (store, now) = (&app.deps.store, app.deps.clock.now());
    let stream = stream(key);
    for _ in 0..TRIES {
        let mut version = 0;
        loop {
            let page = store.read_stream(&stream, version, PAGE).await?;
            version = page.last().map_or(version, |record| record.version);
            if page.len() < PAGE {
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
            cause: cause.clone(),
            ..Commit::default()
        };
        let position = match store.commit(commit).await {
            Ok(Committed::Now { records }) => records.last().map(|record| record.position),
            Ok(Committed::Before { positions, .. }) => positions.last().copied(),
            Err(CommitError::Conflict { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let answer = json(StatusCode::OK, decided)?;
        return Ok(at(answer, position.unwrap_or_default()));
    }
    Err(ApiError::conflict(
        "changed-meanwhile",
        "others decided about this endpoint again and again; try again",
    ))
}
