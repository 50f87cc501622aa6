//! The log: pages, a live stream, verification and replay.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::IntoResponse;
use axum::response::sse::{self, KeepAlive, Sse};
use contract::chain::ChainHash;
use contract::decision::Decision;
use contract::ids::{Bucket, Position};
use contract::log::Record;
use contract::problem::Finding;
use contract::time::Timestamp;
use domain::autoscale::{Comparison, compare, is_reproducible, reevaluate};
use domain::views::MODELS;
use domain::zones::ZoneData;
use http::{HeaderName, StatusCode};
use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};
use serde::{Deserialize, Serialize};
use store::{LogEntry, Store, Unreadable};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::app::App;
use crate::call::{Call, POSITION_MAX, parse_position};
use crate::error::ApiError;
use crate::response::{ApiResult, List, json, with_position};
use crate::table::{
    Content, OPERATOR, PAGE, Parameter, RouteEntry, VIEWER, record_schema, route, schema,
};
use crate::views::{ViewsProgress, ViewsProjector};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/events" "listEvents" VIEWER, "Events after a position, oldest first",
        Content::Json(page_schema), list, query &[
            Parameter::whole("after", "Only events after this position; 0 by default", 0, POSITION_MAX), PAGE[0],
        ]),
        route!(GET "/v1/events/stream" "streamEvents" VIEWER, "Events as they are written, starting from Last-Event-ID, `after`, or now",
        Content::EventStream, stream, query &[
            Parameter::whole("after", "Start after this position", 0, POSITION_MAX),
        ], headers &[
            Parameter::whole("Last-Event-ID", "Start after this position, instead of `after`", 0, POSITION_MAX),
        ]),
        route!(GET "/v1/events/verify" "verifyEvents" OPERATOR, "Verify that the log is intact and that the read models match it",
            Content::Json(schema::<Verified>), verify),
        route!(POST "/v1/events/verify" "verifyEventsAgainst" OPERATOR, "Also verify that the log still contains these chain heads, which were stored elsewhere",
            Content::Json(schema::<Verified>), verify_against, body schema::<Kept>),
        route!(GET "/v1/events/heads" "listHeads" VIEWER, "The chain head of each bucket, to be stored elsewhere",
            Content::Json(schema::<List<ChainHead>>), heads),
        route!(POST "/v1/events/replay" "replayEvents" OPERATOR, "Evaluate every recorded decision again",
            Content::Json(schema::<Replayed>), replay, body schema::<Replay>),
    ]
}

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const STREAM_PAGE: usize = 500;
/// How often a stream polls the log without a notification.
const STREAM_RECHECK: Duration = Duration::from_secs(1);
const REPLAY_PAGE: usize = 1000;
/// Maximum differing decisions that a report lists; further ones are only counted.
const DIFFERENCES_MAX: usize = 100;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EventPage {
    items: Vec<EventItem>,
    next_cursor: Option<String>,
    head: Position,
}

/// An event in a response. An unreadable one is included, so that readers can move past it.
#[derive(Serialize)]
#[serde(untagged)]
enum EventItem {
    Record(Arc<Record>),
    Unreadable(UnreadableEvent),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct UnreadableEvent {
    position: Position,
    prev: Position,
    bucket: Bucket,
    stream: String,
    version: u64,
    time: Timestamp,
    actor: String,
    r#type: String,
    /// Why it cannot be read.
    unreadable: String,
}

impl EventItem {
    fn position(&self) -> Position {
        match self {
            Self::Record(record) => record.position,
            Self::Unreadable(event) => event.position,
        }
    }

    /// The SSE event name. Unknown type names are not used, since they might contain line breaks.
    fn name(&self) -> &'static str {
        match self {
            Self::Record(record) => record.event.type_name(),
            Self::Unreadable(_) => "unreadable",
        }
    }
}

impl From<LogEntry> for EventItem {
    fn from(entry: LogEntry) -> Self {
        match entry {
            LogEntry::Record(record) => Self::Record(record),
            LogEntry::Unreadable(unreadable) => Self::Unreadable(unreadable.into()),
        }
    }
}

impl From<Unreadable> for UnreadableEvent {
    fn from(event: Unreadable) -> Self {
        Self {
            position: event.position,
            prev: event.prev,
            bucket: event.bucket,
            stream: event.stream,
            version: event.version,
            time: event.time,
            actor: event.actor,
            r#type: event.type_name,
            unreadable: event.detail,
        }
    }
}

fn item_schema(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({"anyOf": [record_schema(generator), {
        "type": "object",
        "description": "An event that this version cannot read",
        "required": ["position", "prev", "bucket", "stream", "version", "time", "actor", "type", "unreadable"],
        "properties": {
            "position": {"type": "integer", "minimum": 1},
            "prev": {"type": "integer", "minimum": 0},
            "bucket": {"type": "integer", "minimum": 0},
            "stream": {"type": "string"},
            "version": {"type": "integer", "minimum": 1},
            "time": {"type": "string", "format": "date-time"},
            "actor": {"type": "string"},
            "type": {"type": "string"},
            "unreadable": {"type": "string", "description": "Why it cannot be read"}
        }
    }]})
}

pub fn page_schema(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "required": ["items", "nextCursor", "head"],
        "properties": {
            "items": {"type": "array", "items": item_schema(generator)},
            "nextCursor": {"type": ["string", "null"], "description": "For `after`; null at the end of the log"},
            "head": {"type": "integer", "minimum": 0, "description": "The newest position"}
        }
    })
}

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let after = call.position("after")?.unwrap_or_default();
    let entries = app
        .deps
        .store
        .read_all_entries(after, call.limit()?)
        .await?;
    let items: Vec<EventItem> = entries.into_iter().map(EventItem::from).collect();
    let head = app.deps.store.head().await?;
    let last = items.last().map(EventItem::position);
    let next_cursor = last
        .filter(|last| *last < head)
        .map(|last| last.to_string());
    let page = EventPage {
        items,
        next_cursor,
        head,
    };
    Ok(with_position(json(StatusCode::OK, &page)?, head))
}

/// A reader that follows the log.
struct EventTail {
    store: Store,
    progress: watch::Receiver<ViewsProgress>,
    shutdown: CancellationToken,
    after: Position,
    ready: VecDeque<EventItem>,
    _permit: OwnedSemaphorePermit,
}

impl EventTail {
    /// Returns the next event, or none when the server shuts down.
    async fn next(&mut self) -> Option<EventItem> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                self.after = item.position();
                return Some(item);
            }
            if self.shutdown.is_cancelled() {
                return None;
            }
            self.progress.mark_unchanged();
            match self.store.read_all_entries(self.after, STREAM_PAGE).await {
                Ok(entries) if !entries.is_empty() => {
                    self.ready = entries.into_iter().map(EventItem::from).collect();
                }
                Ok(_) => {
                    tokio::select! {
                        _ = self.progress.changed() => {}
                        () = self.shutdown.cancelled() => return None,
                        () = tokio::time::sleep(STREAM_RECHECK) => {}
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "event stream aborted");
                    return None;
                }
            }
        }
    }
}

pub async fn stream(app: Arc<App>, call: Call) -> ApiResult {
    let last_event_id = match call.header(&LAST_EVENT_ID)? {
        None => None,
        Some(text) => Some(parse_position(text).ok_or_else(|| {
            ApiError::bad_request(format!("Last-Event-ID must be a position, not `{text}`"))
        })?),
    };
    let after = match last_event_id.or(call.position("after")?) {
        Some(after) => after,
        None => app.deps.store.head().await?,
    };
    let permit = app.acquire_stream_permit()?;
    let tail = EventTail {
        store: app.deps.store.clone(),
        progress: app.views.progress(),
        shutdown: app.shutdown.clone(),
        after,
        ready: VecDeque::new(),
        _permit: permit,
    };
    let events = futures::stream::unfold(tail, |mut tail| async move {
        let item = tail.next().await?;
        let event = sse::Event::default()
            .id(item.position().to_string())
            .event(item.name());
        let data = serde_json::to_string(&item).unwrap_or_default();
        Some((Ok::<_, Infallible>(event.data(data)), tail))
    });
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(15));
    Ok(Sse::new(events).keep_alive(keep_alive).into_response())
}

/// The result of verifying the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Verified {
    pub ok: bool,
    pub events: u64,
    pub streams: u64,
    pub buckets: u64,
    pub rows: u64,
    pub head: Position,
    /// Sentences; empty for an intact log.
    pub problems: Vec<String>,
}

/// The head of a bucket's chain of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChainHead {
    pub bucket: Bucket,
    pub position: Position,
    pub hash: ChainHash,
}

pub async fn heads(app: Arc<App>, _call: Call) -> ApiResult {
    let heads = store::heads(&app.deps.store).await?;
    let items = heads.into_iter().map(|head| ChainHead {
        bucket: head.bucket,
        position: head.position,
        hash: head.hash,
    });
    let list = List {
        items: items.collect::<Vec<ChainHead>>(),
        next_cursor: None,
    };
    json(StatusCode::OK, &list)
}

/// Chain heads that were stored elsewhere, as returned by `GET /v1/events/heads`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kept {
    pub heads: Vec<ChainHead>,
}

pub async fn verify(app: Arc<App>, _call: Call) -> ApiResult {
    run_verify(&app, &[]).await
}

pub async fn verify_against(app: Arc<App>, call: Call) -> ApiResult {
    let Kept { heads } = call.parse_body()?;
    let expected = heads.into_iter().map(|head| store::BucketHead {
        bucket: head.bucket,
        position: head.position,
        hash: head.hash,
    });
    run_verify(&app, &expected.collect::<Vec<_>>()).await
}

async fn run_verify(app: &App, expected: &[store::BucketHead]) -> ApiResult {
    let mut projector = ViewsProjector::default();
    let report = store::verify_against(&app.deps.store, &mut projector, MODELS, expected).await?;
    let verified = Verified {
        ok: report.is_sound(),
        events: report.events,
        streams: report.streams,
        buckets: report.buckets,
        rows: report.rows,
        head: report.head,
        problems: report.problems,
    };
    json(StatusCode::OK, &verified)
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Replay {
    /// Only decisions can be replayed.
    #[schemars(extend("const" = true))]
    pub check_decisions: bool,
}

/// The result of evaluating recorded decisions again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Replayed {
    /// True if no decision of the current engine version differs, and all events can be read.
    pub ok: bool,
    pub decisions: u64,
    /// Decisions of any version that are equal.
    pub equal: u64,
    /// Decisions of the current engine version that differ: a fault.
    pub different: u64,
    /// Decisions of other engine versions or time zones that differ under the current ones: no fault.
    pub different_older: u64,
    /// Events that cannot be read and might be decisions.
    pub unreadable: u64,
    pub problems: Vec<String>,
    pub differing: Vec<Uuid>,
    /// Counts of decisions that this engine need not reproduce, by the version that made them.
    pub other_versions: Vec<OfVersion>,
}

/// Counts of decisions by another engine version or time zone release, compared with what the current
/// ones decide for the same inputs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OfVersion {
    pub engine: String,
    pub engine_version: u32,
    /// The time zone release that schedules used, if recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_data: Option<String>,
    /// Equal byte for byte, except for the version.
    pub equal: u64,
    /// Numbers, outcome, profile and verdicts are the same; explanations are not.
    pub only_words: u64,
    pub other: u64,
}

pub async fn replay(app: Arc<App>, call: Call) -> ApiResult {
    let Replay { check_decisions } = call.parse_body()?;
    let mut report = Replayed::default();
    let mut after = Position::START;
    if !check_decisions {
        let detail = "only decisions can be replayed; set this to true";
        return Err(ApiError::invalid(vec![Finding::new(
            "/checkDecisions",
            detail,
        )]));
    }
    loop {
        let entries = app.deps.store.read_all_entries(after, REPLAY_PAGE).await?;
        let Some(last) = entries.last() else { break };
        after = last.position();
        for entry in &entries {
            match entry {
                LogEntry::Record(record) => report.evaluate(record, &app.deps.zones),
                LogEntry::Unreadable(unreadable) => report.count_unreadable(unreadable),
            }
        }
        // A long log must not starve other requests.
        tokio::task::yield_now().await;
    }
    let version = |counts: &OfVersion| {
        (
            counts.engine.clone(),
            counts.engine_version,
            counts.zone_data.clone(),
        )
    };
    report.other_versions.sort_by_key(version);
    report.ok = report.different == 0 && report.unreadable == 0;
    json(StatusCode::OK, &report)
}

impl Replayed {
    fn count_unreadable(&mut self, event: &Unreadable) {
        self.unreadable += 1;
        if self.problems.len() < DIFFERENCES_MAX {
            self.problems.push(format!(
                "the event `{}` at position {} cannot be read, and was not evaluated: {}",
                event.type_name, event.position, event.detail
            ));
        }
    }

    /// Returns the counts for the version of a decision.
    fn version_counts(&mut self, decision: &Decision) -> &mut OfVersion {
        let is_same_version = |counts: &OfVersion| {
            counts.engine == decision.engine
                && counts.engine_version == decision.engine_version
                && counts.zone_data == decision.inputs.zone_data
        };
        let versions = &mut self.other_versions;
        let found = versions.iter().position(is_same_version);
        let index = found.unwrap_or_else(|| {
            versions.push(OfVersion {
                engine: decision.engine.clone(),
                engine_version: decision.engine_version,
                zone_data: decision.inputs.zone_data.clone(),
                ..OfVersion::default()
            });
            versions.len() - 1
        });
        &mut versions[index]
    }

    fn evaluate(&mut self, record: &Record, zones: &ZoneData) {
        let contract::events::Event::ScalingDecided(decision) = &record.event else {
            return;
        };
        self.decisions += 1;
        let reevaluated = reevaluate(decision, zones);
        let comparison = compare(decision, &reevaluated);
        let is_equal = comparison == Comparison::Equal;
        self.equal += u64::from(is_equal);
        if !is_reproducible(decision, zones) {
            self.different_older += u64::from(!is_equal);
            let version_counts = self.version_counts(decision);
            *match comparison {
                Comparison::Equal => &mut version_counts.equal,
                Comparison::WordingOnly => &mut version_counts.only_words,
                Comparison::Other => &mut version_counts.other,
            } += 1;
            return;
        }
        if is_equal {
            return;
        }
        self.different += 1;
        if self.differing.len() < DIFFERENCES_MAX {
            self.differing.push(record.id);
            self.problems.push(format!(
                "decision {} about {} at position {} was {} to {} ({:?}) and is now {} to {} ({:?})",
                record.id,
                decision.deployment,
                record.position,
                decision.from,
                decision.granted,
                decision.outcome,
                reevaluated.from,
                reevaluated.granted,
                reevaluated.outcome,
            ));
        }
    }
}
