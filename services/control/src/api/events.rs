//! The log itself: pages, a live stream, and its proofs.

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
use store::{Entry, Store, Unreadable};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::answer::{Answer, List, at, json};
use crate::call::Call;
use crate::error::ApiError;
use crate::service::App;
use crate::table::record_schema;
use crate::views::{Progress, ViewsProjector};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const STREAM_PAGE: usize = 500;
/// The stream looks into the log this often even if nothing tells it to.
const STREAM_RECHECK: Duration = Duration::from_secs(1);
const REPLAY_PAGE: usize = 1000;
/// Differing decisions that a report lists; the rest are counted.
const DIFFERENCES_MAX: usize = 100;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EventPage {
    items: Vec<EventItem>,
    next_cursor: Option<String>,
    head: Position,
}

/// An event as it is shown: one that cannot be read keeps its place, so that readers get past it.
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
    /// Why.
    unreadable: String,
}

impl EventItem {
    fn position(&self) -> Position {
        match self {
            Self::Record(record) => record.position,
            Self::Unreadable(event) => event.position,
        }
    }

    /// What a stream calls it. A name that nobody knows might hold what ends a line.
    fn name(&self) -> &'static str {
        match self {
            Self::Record(record) => record.event.type_name(),
            Self::Unreadable(_) => "unreadable",
        }
    }
}

impl From<Entry> for EventItem {
    fn from(entry: Entry) -> Self {
        match entry {
            Entry::Record(record) => Self::Record(record),
            Entry::Unreadable(unreadable) => Self::Unreadable(unreadable.into()),
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

pub async fn list(app: Arc<App>, call: Call) -> Answer {
    let after = Position(call.number("after")?.unwrap_or(0));
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
    Ok(at(json(StatusCode::OK, &page)?, head))
}

/// A reader's place in the log.
struct Tail {
    store: Store,
    progress: watch::Receiver<Progress>,
    shutdown: CancellationToken,
    after: Position,
    ready: VecDeque<EventItem>,
    _room: OwnedSemaphorePermit,
}

impl Tail {
    /// The next event; none when the server shuts down.
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
                    tracing::warn!(%error, "an event stream ends");
                    return None;
                }
            }
        }
    }
}

pub async fn stream(app: Arc<App>, call: Call) -> Answer {
    let resumed = match call.header(&LAST_EVENT_ID)? {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| {
            ApiError::bad_request(format!("Last-Event-ID must be a position, not `{text}`"))
        })?),
    };
    let after = match resumed.or(call.number("after")?) {
        Some(after) => Position(after),
        None => app.deps.store.head().await?,
    };
    let room = app.room_for_stream()?;
    let tail = Tail {
        store: app.deps.store.clone(),
        progress: app.views.progress(),
        shutdown: app.shutdown.clone(),
        after,
        ready: VecDeque::new(),
        _room: room,
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

/// What a walk over the whole log found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Verified {
    pub ok: bool,
    pub events: u64,
    pub streams: u64,
    pub buckets: u64,
    pub rows: u64,
    pub head: Position,
    /// Sentences; empty for a sound log.
    pub problems: Vec<String>,
}

/// The end of a bucket's chain of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChainHead {
    pub bucket: Bucket,
    pub position: Position,
    pub hash: ChainHash,
}

pub async fn heads(app: Arc<App>, _call: Call) -> Answer {
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

/// Ends of chains that were kept elsewhere, as `GET /v1/events/heads` gave them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kept {
    pub heads: Vec<ChainHead>,
}

pub async fn verify(app: Arc<App>, _call: Call) -> Answer {
    verified(&app, &[]).await
}

pub async fn verify_against(app: Arc<App>, call: Call) -> Answer {
    let Kept { heads } = call.typed()?;
    let kept = heads.into_iter().map(|head| store::ChainHead {
        bucket: head.bucket,
        position: head.position,
        hash: head.hash,
    });
    verified(&app, &kept.collect::<Vec<_>>()).await
}

async fn verified(app: &App, kept: &[store::ChainHead]) -> Answer {
    let mut projector = ViewsProjector::default();
    let report = store::verify_against(&app.deps.store, &mut projector, MODELS, kept).await?;
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
    pub check_decisions: bool,
}

/// What came of evaluating recorded decisions again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Replayed {
    /// No decision of the present engine differs, and there is nothing that cannot be read.
    pub ok: bool,
    pub decisions: u64,
    /// Of any version.
    pub equal: u64,
    /// Of the present engine version, and not equal: a fault.
    pub different: u64,
    /// Of other engine versions or time zones, and different under the present ones: no fault.
    pub different_older: u64,
    /// Events that cannot be read, and might be decisions.
    pub unreadable: u64,
    pub problems: Vec<String>,
    pub differing: Vec<Uuid>,
    /// Decisions that this engine need not make again, by what made them.
    pub other_versions: Vec<OfVersion>,
}

/// Decisions of another version of the engine, or by another release of the time zones, beside what the
/// present ones make of their inputs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OfVersion {
    pub engine: String,
    pub engine_version: u32,
    /// The release of the time zones that schedules went by, where it is recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_data: Option<String>,
    /// To the byte, but for the version.
    pub equal: u64,
    /// Numbers, outcome, profile and verdicts are the same; explanations are not.
    pub only_words: u64,
    pub other: u64,
}

pub async fn replay(app: Arc<App>, call: Call) -> Answer {
    let Replay { check_decisions } = call.typed()?;
    let mut report = Replayed::default();
    let mut after = Position::START;
    if !check_decisions {
        let detail = "only decisions can be replayed; set it to true";
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
                Entry::Record(record) => report.take_in(record, &app.deps.zones),
                Entry::Unreadable(unreadable) => report.pass_over(unreadable),
            }
        }
        // A long log must not keep other requests from their turn.
        tokio::task::yield_now().await;
    }
    let version = |of: &OfVersion| (of.engine.clone(), of.engine_version, of.zone_data.clone());
    report.other_versions.sort_by_key(version);
    report.ok = report.different == 0 && report.unreadable == 0;
    json(StatusCode::OK, &report)
}

impl Replayed {
    fn pass_over(&mut self, event: &Unreadable) {
        self.unreadable += 1;
        if self.problems.len() < DIFFERENCES_MAX {
            self.problems.push(format!(
                "the event `{}` at position {} cannot be read, and was not evaluated: {}",
                event.type_name, event.position, event.detail
            ));
        }
    }

    /// Where decisions of this one's version are counted.
    fn of_version(&mut self, decision: &Decision) -> &mut OfVersion {
        let of_this = |of: &OfVersion| {
            of.engine == decision.engine
                && of.engine_version == decision.engine_version
                && of.zone_data == decision.inputs.zone_data
        };
        let versions = &mut self.other_versions;
        let known = versions.iter().position(of_this);
        let at = known.unwrap_or_else(|| {
            versions.push(OfVersion {
                engine: decision.engine.clone(),
                engine_version: decision.engine_version,
                zone_data: decision.inputs.zone_data.clone(),
                ..OfVersion::default()
            });
            versions.len() - 1
        });
        &mut versions[at]
    }

    fn take_in(&mut self, record: &Record, zones: &ZoneData) {
        let contract::events::Event::ScalingDecided(decision) = &record.event else {
            return;
        };
        self.decisions += 1;
        let again = reevaluate(decision, zones);
        let comparison = compare(decision, &again);
        let is_equal = comparison == Comparison::Equal;
        self.equal += u64::from(is_equal);
        if !is_reproducible(decision, zones) {
            self.different_older += u64::from(!is_equal);
            let of_version = self.of_version(decision);
            *match comparison {
                Comparison::Equal => &mut of_version.equal,
                Comparison::OnlyWords => &mut of_version.only_words,
                Comparison::Other => &mut of_version.other,
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
                again.from,
                again.granted,
                again.outcome,
            ));
        }
    }
}
