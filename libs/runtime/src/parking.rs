//! Parking: an endpoint with an event that a consumer cannot process is set aside, and the others
//! continue.
//!
//! An event that cannot be decoded, or on which folding or evaluating panics, parks its endpoint in
//! that consumer: its state is dropped and later records are skipped until an operator intervenes.
//! `event.skipped` names a position to be skipped in every fold from then on; `consumer.unparked`
//! has the endpoint's history folded again. Both are events of the endpoint's stream `parking/…`.
//!
//! An event that belongs to no endpoint and cannot be processed parks nothing: it is skipped, and
//! reported like a parked endpoint until a release can process it. Such events are read from the
//! start of the log at each start, so none is lost.
//!
//! Invariants: a poisonous event of one endpoint affects no other endpoint; a parked endpoint is
//! reported in the process log, in a metric, in health, and as a row of the model `parked`.
//! `verify` does not compare that model, since it describes the state of consumers and not what
//! happened.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock};

use contract::events::Event;
use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::log::{Record, RowChange, StreamKind, StreamName};
use contract::time::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use serde::{Deserialize, Serialize};
use store::{Commit, LogEntry, RowQuery, Store, StoreError, Unreadable};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::health::Component;
use crate::retry;

/// The read model of parked endpoints; its keys are `CONSUMER/WORKSPACE/ENDPOINT`, or
/// `CONSUMER/POSITION` for an event that belongs to no endpoint.
pub const PARKED: &str = "parked";

/// Records per read of an endpoint's history.
const PAGE: usize = 1000;
/// The most rows checked for stale ones; accidents do not park more endpoints than this.
const ROWS_MAX: usize = 500;
/// The most endpoints and events that health names; the rest are counted.
const NAMED_MAX: usize = 3;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ConsumerLabels {
    consumer: &'static str,
}

/// Parked endpoints by consumer of this process.
pub(crate) static PARKED_ENDPOINTS: LazyLock<Family<ConsumerLabels, Gauge>> =
    LazyLock::new(Family::default);

/// Events that belong to no endpoint and cannot be processed, by consumer of this process.
pub(crate) static UNPROCESSED_EVENTS: LazyLock<Family<ConsumerLabels, Gauge>> =
    LazyLock::new(Family::default);

/// The document of a row of [`PARKED`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ParkedView {
    /// The consumer that could not process the event: `autoscaler`.
    pub consumer: String,
    /// The endpoint of the event; none if it belongs to no endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Name>,
    /// The position of the event.
    pub position: Position,
    /// The type of the event, or `evaluation` if the endpoint was folded but could not be
    /// evaluated.
    pub event_type: String,
    /// What went wrong: the decoding error or the panic message.
    pub detail: String,
    /// When the endpoint was parked for this event first.
    pub since: Timestamp,
}

/// An event that belongs to no endpoint and cannot be processed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnprocessedEvent {
    /// The position of the event.
    pub position: Position,
    /// The type of the event.
    pub event_type: String,
    /// What went wrong: the decoding error or the panic message.
    pub detail: String,
}

/// How to handle a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handling {
    /// Fold the record.
    Apply,
    /// Skip the record: its endpoint is parked, or an operator decided so.
    Skip,
    /// The endpoint is unparked: drop its state, read its [`history`] up to and including this
    /// record, and fold that.
    Rebuild,
}

/// The parked endpoints of one consumer.
pub struct Parking {
    consumer: &'static str,
    parked: BTreeMap<EndpointKey, Position>,
    /// Skipped positions, each with its bucket.
    skipped: BTreeMap<Position, Bucket>,
    /// Events that belong to no endpoint, with their types.
    unprocessed: BTreeMap<Position, String>,
    component: Component,
    /// Unbounded, since parking cannot wait for the store. One update per endpoint that is parked
    /// or unparked, and one each time that buckets have caught up.
    row_writer: mpsc::UnboundedSender<RowUpdate>,
}

/// Calls `attempt` and catches a panic.
///
/// # Errors
///
/// The panic message.
pub fn catch_panic<T>(attempt: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(attempt)).map_err(|panic| panic_message(panic.as_ref()))
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "panicked without a message".to_owned())
}

/// The endpoint of an event that cannot be decoded.
pub fn endpoint_of(unreadable: &Unreadable) -> Option<EndpointKey> {
    let mut parts = unreadable.stream.split('/').skip(1);
    let (workspace, endpoint) = (parts.next()?, parts.next()?);
    format!("{workspace}/{endpoint}").parse().ok()
}

fn is_parking_event(record: &Record) -> bool {
    record.stream.kind() == Some(StreamKind::Parking)
}

/// Reads all events of one endpoint up to and including `to`, except decisions about parking.
///
/// # Errors
///
/// If the store cannot be read; retry.
pub async fn history(
    store: Store,
    key: EndpointKey,
    to: Position,
) -> Result<Vec<LogEntry>, StoreError> {
    let mut entries = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_bucket_entries(key.bucket(), after, PAGE).await?;
        let is_last_page = page.len() < PAGE;
        for entry in page {
            after = entry.position();
            if after > to {
                return Ok(entries);
            }
            let is_ours = match &entry {
                LogEntry::Record(record) => {
                    !is_parking_event(record) && record.endpoint().as_ref() == Some(&key)
                }
                LogEntry::Unreadable(unreadable) => endpoint_of(unreadable).as_ref() == Some(&key),
            };
            if is_ours {
                entries.push(entry);
            }
        }
        if is_last_page {
            return Ok(entries);
        }
    }
}

impl Parking {
    /// Creates the parking of a consumer. Requires a Tokio runtime: rows are written in the
    /// background for as long as this lives.
    pub fn open(consumer: &'static str, store: Store, component: Component) -> Self {
        let (row_writer, updates) = mpsc::unbounded_channel();
        tokio::spawn(write_rows(consumer, store, updates));
        let parking = Self::with_row_writer(consumer, component, row_writer);
        parking.publish_status();
        parking
    }

    /// Creates parking that writes no rows, for a consumer without a store.
    pub fn detached(consumer: &'static str, component: Component) -> Self {
        // The receiver is dropped, so updates are discarded.
        let (row_writer, _) = mpsc::unbounded_channel();
        Self::with_row_writer(consumer, component, row_writer)
    }

    fn with_row_writer(
        consumer: &'static str,
        component: Component,
        row_writer: mpsc::UnboundedSender<RowUpdate>,
    ) -> Self {
        Self {
            consumer,
            parked: BTreeMap::new(),
            skipped: BTreeMap::new(),
            unprocessed: BTreeMap::new(),
            component,
            row_writer,
        }
    }

    /// Decides how to handle the next record of the log, and remembers decisions about parking.
    pub fn classify(&mut self, record: &Record) -> Handling {
        match &record.event {
            Event::EventSkipped(skipped) => {
                if skipped.consumer == self.consumer {
                    self.skipped.insert(skipped.position, record.bucket);
                }
                return Handling::Skip;
            }
            Event::ConsumerUnparked(unparked) => {
                let parked = record.endpoint().is_some_and(|key| self.is_parked(&key));
                return match parked && unparked.consumer == self.consumer {
                    true => Handling::Rebuild,
                    false => Handling::Skip,
                };
            }
            _ => {}
        }
        if self.parked.is_empty() && self.skipped.is_empty() {
            return Handling::Apply;
        }
        let parked = record.endpoint().is_some_and(|key| self.is_parked(&key));
        match parked || self.is_skipped(record.position) {
            true => Handling::Skip,
            false => Handling::Apply,
        }
    }

    /// Whether an operator decided to skip this event.
    pub fn is_skipped(&self, position: Position) -> bool {
        self.skipped.contains_key(&position)
    }

    /// Skipped positions.
    pub fn skipped(&self) -> BTreeSet<Position> {
        self.skipped.keys().copied().collect()
    }

    /// Skipped positions of a bucket.
    pub fn skipped_in(&self, bucket: Bucket) -> BTreeSet<Position> {
        let in_bucket = self.skipped.iter().filter(|(_, of)| **of == bucket);
        in_bucket.map(|(position, _)| *position).collect()
    }

    /// Restores decisions from before the position at which a bucket is started.
    pub fn skip(&mut self, bucket: Bucket, positions: impl IntoIterator<Item = Position>) {
        let in_bucket = positions.into_iter().map(|position| (position, bucket));
        self.skipped.extend(in_bucket);
    }

    /// Parked endpoints of a bucket.
    pub fn parked_in(&self, bucket: Bucket) -> BTreeSet<EndpointKey> {
        let in_bucket = self.parked.keys().filter(|key| key.bucket() == bucket);
        in_bucket.cloned().collect()
    }

    /// Whether this endpoint is parked.
    pub fn is_parked(&self, key: &EndpointKey) -> bool {
        self.parked.contains_key(key)
    }

    /// The position of the event for which the endpoint is parked.
    pub fn parked_at(&self, key: &EndpointKey) -> Option<Position> {
        self.parked.get(key).copied()
    }

    /// Parks the endpoint of an event that cannot be decoded, and returns it; the caller must drop
    /// its state. Returns `None` if it is parked already, the event is skipped, or it belongs to no
    /// endpoint, in which case it is [reported](Self::report).
    pub fn park_unreadable(
        &mut self,
        unreadable: &Unreadable,
        now: Timestamp,
    ) -> Option<EndpointKey> {
        let Unreadable {
            position,
            type_name,
            detail,
            ..
        } = unreadable;
        let Some(key) = endpoint_of(unreadable) else {
            let event = UnprocessedEvent {
                position: *position,
                event_type: type_name.clone(),
                detail: detail.clone(),
            };
            self.report(event, now);
            return None;
        };
        if self.is_skipped(*position) || self.is_parked(&key) {
            return None;
        }
        self.park(&key, *position, type_name, detail, now);
        Some(key)
    }

    /// Parks an endpoint; the caller must drop its state.
    pub fn park(
        &mut self,
        key: &EndpointKey,
        position: Position,
        event_type: &str,
        detail: &str,
        now: Timestamp,
    ) {
        tracing::error!(
            consumer = self.consumer, endpoint = %key, %position, event_type, detail,
            see = "penstock events parked",
            "endpoint parked"
        );
        self.parked.insert(key.clone(), position);
        let view = ParkedView {
            consumer: self.consumer.to_owned(),
            endpoint: Some(key.endpoint()),
            position,
            event_type: event_type.to_owned(),
            detail: detail.to_owned(),
            since: now,
        };
        self.send(RowUpdate::Parked(Some(key.clone()), view));
        self.publish_status();
    }

    /// Reports an event that belongs to no endpoint and is skipped because it cannot be processed.
    pub fn report(&mut self, event: UnprocessedEvent, now: Timestamp) {
        let UnprocessedEvent {
            position,
            event_type,
            detail,
        } = event;
        tracing::error!(
            consumer = self.consumer, %position, event_type, detail,
            see = "penstock events parked",
            "event of no endpoint skipped"
        );
        self.unprocessed.insert(position, event_type.clone());
        let view = ParkedView {
            consumer: self.consumer.to_owned(),
            endpoint: None,
            position,
            event_type,
            detail,
            since: now,
        };
        self.send(RowUpdate::Parked(None, view));
        self.publish_status();
    }

    /// Whether the event at a position has been [reported](Self::report).
    pub fn is_unprocessed(&self, position: Position) -> bool {
        self.unprocessed.contains_key(&position)
    }

    /// Unparks an endpoint. Must be called before its history is folded again.
    pub fn release(&mut self, key: &EndpointKey) {
        if self.parked.remove(key).is_some() {
            tracing::info!(consumer = self.consumer, endpoint = %key, "endpoint unparked");
            self.send(RowUpdate::Released(row_key(self.consumer, key)));
            self.publish_status();
        }
    }

    /// Forgets a bucket that belongs to another owner or is folded again; its rows stay.
    pub fn forget(&mut self, bucket: Bucket) {
        self.parked.retain(|key, _| key.bucket() != bucket);
        self.skipped.retain(|_, of| *of != bucket);
        self.publish_status();
    }

    /// Removes rows about endpoints that are not parked, once the history of these buckets has been
    /// folded, and with bucket 0 about other events that have been processed.
    pub fn caught_up(&self, buckets: &[Bucket]) {
        let parked = self.parked.keys().map(|key| row_key(self.consumer, key));
        let unprocessed = self.unprocessed.keys();
        let unprocessed = unprocessed.map(|position| global_row_key(self.consumer, *position));
        let current = parked.chain(unprocessed).collect();
        self.send(RowUpdate::CaughtUp(buckets.to_vec(), current));
    }

    fn send(&self, update: RowUpdate) {
        // The row writer ends only with the store.
        let _ = self.row_writer.send(update);
    }

    fn publish_status(&self) {
        let labels = ConsumerLabels {
            consumer: self.consumer,
        };
        let (parked, unprocessed) = (self.parked.len(), self.unprocessed.len());
        PARKED_ENDPOINTS.get_or_create(&labels).set(parked as i64);
        UNPROCESSED_EVENTS
            .get_or_create(&labels)
            .set(unprocessed as i64);
        let mut warnings = Vec::new();
        if parked > 0 {
            let names = self.parked.iter();
            let names =
                names.map(|(key, position)| format!("{} (position {position})", key.endpoint()));
            warnings.push(format!("endpoints are parked: {}", list(names)));
        }
        if unprocessed > 0 {
            let names = self.unprocessed.iter();
            let names =
                names.map(|(position, event_type)| format!("{event_type} (position {position})"));
            warnings.push(format!(
                "events that belong to no endpoint are skipped: {}",
                list(names)
            ));
        }
        let warning = (!warnings.is_empty()).then(|| warnings.join("; "));
        self.component.set_warning(warning);
    }
}

/// The first names, and how many more there are.
fn list(mut names: impl ExactSizeIterator<Item = String>) -> String {
    let named: Vec<String> = names.by_ref().take(NAMED_MAX).collect();
    let named = named.join(", ");
    match names.len() {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// A change of the rows.
enum RowUpdate {
    Parked(Option<EndpointKey>, ParkedView),
    /// The key of the row.
    Released(String),
    /// The keys of the rows that are to stay.
    CaughtUp(Vec<Bucket>, BTreeSet<String>),
}

/// Writes rows in the order of the updates, retrying each until it is stored.
async fn write_rows(
    consumer: &'static str,
    store: Store,
    mut updates: mpsc::UnboundedReceiver<RowUpdate>,
) {
    while let Some(update) = updates.recv().await {
        loop {
            let written = match &update {
                RowUpdate::Parked(key, view) => {
                    record_parked(&store, key.as_ref(), view.clone()).await
                }
                RowUpdate::Released(row_key) => delete(&store, std::slice::from_ref(row_key)).await,
                RowUpdate::CaughtUp(buckets, current) => {
                    sweep(&store, consumer, buckets, current).await
                }
            };
            match written {
                Ok(()) => break,
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::debug!(consumer, %error, "failed to write parked endpoints, retrying");
                    sleep(retry::RETRY_INTERVAL).await;
                }
            }
        }
    }
}

fn row_key(consumer: &str, key: &EndpointKey) -> String {
    format!("{consumer}/{key}")
}

/// The key of the row of an event that belongs to no endpoint.
pub fn global_row_key(consumer: &str, position: Position) -> String {
    format!("{consumer}/{position}")
}

/// Records an endpoint as parked, or an event of none as skipped, so that its consumer knows that it
/// has rows to write once it can process the event.
///
/// # Errors
///
/// If the store cannot be read or written; retry.
pub async fn record_parked(
    store: &Store,
    key: Option<&EndpointKey>,
    mut view: ParkedView,
) -> Result<(), StoreError> {
    let row_key = match key {
        Some(key) => row_key(&view.consumer, key),
        None => global_row_key(&view.consumer, view.position),
    };
    let existing = store.row(PARKED, &row_key).await?;
    let existing = existing.and_then(|row| serde_json::from_str::<ParkedView>(&row.doc).ok());
    if let Some(existing) = existing.filter(|existing| existing.position == view.position) {
        view.since = existing.since;
    }
    let row = RowChange {
        model: PARKED,
        key: row_key,
        endpoint: key.map_or_else(String::new, |key| key.as_str().to_owned()),
        deployment: String::new(),
        position: view.position,
        time: view.since,
        doc: serde_json::to_string(&view).ok(),
    };
    write(store, vec![row]).await
}

async fn delete(store: &Store, keys: &[String]) -> Result<(), StoreError> {
    let deletion = |key: &String| RowChange {
        model: PARKED,
        key: key.clone(),
        endpoint: String::new(),
        deployment: String::new(),
        position: Position::START,
        time: Timestamp::default(),
        doc: None,
    };
    write(store, keys.iter().map(deletion).collect()).await
}

async fn write(store: &Store, rows: Vec<RowChange>) -> Result<(), StoreError> {
    if rows.is_empty() {
        return Ok(());
    }
    let commit = Commit {
        rows,
        ..Commit::default()
    };
    match store.commit(commit).await {
        Ok(_) => Ok(()),
        Err(store::CommitError::Store(error)) => Err(error),
        Err(error) => Err(StoreError::refused(error.to_string()).caused_by(error)),
    }
}

/// Deletes rows left over by an earlier process that are not current: those of endpoints in these
/// buckets, and by the owner of bucket 0 those of events of no endpoint.
async fn sweep(
    store: &Store,
    consumer: &str,
    buckets: &[Bucket],
    current: &BTreeSet<String>,
) -> Result<(), StoreError> {
    let query = RowQuery {
        model: PARKED.to_owned(),
        limit: ROWS_MAX,
        ..RowQuery::default()
    };
    let stale = store.rows(query).await?.into_iter().filter(|row| {
        let is_ours = match row.endpoint.parse::<EndpointKey>() {
            Ok(key) => row.key == row_key(consumer, &key) && buckets.contains(&key.bucket()),
            // All replicas read these events, and one that cannot process them may be older than others.
            Err(_) => {
                row.key == global_row_key(consumer, row.position)
                    && buckets.contains(&Bucket::GLOBAL_OWNER)
            }
        };
        is_ours && !current.contains(&row.key)
    });
    let keys: Vec<String> = stale.map(|row| row.key).collect();
    delete(store, &keys).await
}

/// The stream of decisions about an endpoint's parking.
pub fn stream(key: &EndpointKey) -> StreamName {
    StreamName::of(StreamKind::Parking, key)
}

/// Unparks an endpoint and applies its [`history`]. Returns `false` if it is parked again; the
/// caller must then drop what was applied.
pub fn rebuild(
    parking: &mut Parking,
    key: &EndpointKey,
    entries: Vec<LogEntry>,
    now: Timestamp,
    mut apply: impl FnMut(&Arc<Record>),
) -> bool {
    parking.release(key);
    for entry in entries {
        if parking.is_skipped(entry.position()) {
            continue;
        }
        match entry {
            LogEntry::Unreadable(unreadable) => {
                parking.park_unreadable(&unreadable, now);
                return false;
            }
            LogEntry::Record(record) => {
                if let Err(detail) = catch_panic(|| apply(&record)) {
                    parking.park(key, record.position, record.event.type_name(), &detail, now);
                    return false;
                }
            }
        }
    }
    true
}
