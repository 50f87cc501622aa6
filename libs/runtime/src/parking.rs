//! Endpoints that a consumer cannot digest an event of: they are parked, and the others go on.
//!
//! An event that cannot be decoded, or on which folding or evaluating panics, parks its endpoint in
//! that consumer: what was folded of it is dropped and its later records are passed over, until a
//! person says otherwise. `event.skipped` names a position that is passed over in every fold from
//! then on; `consumer.unparked` has the endpoint's history folded anew. Both stand in the stream
//! `parking/…` of the endpoint.
//!
//! Invariants: one endpoint's poison touches no other; whoever is parked is told: in the log of the
//! process, in a metric, in health, and as a row of the model `parked`, which is no part of what
//! `verify` compares, since it says how consumers fare and not what happened.

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
use store::{Commit, Entry, RowQuery, Store, StoreError, Unreadable};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::health::Component;
use crate::retry;

/// The read model of what is parked; its keys are `CONSUMER/WORKSPACE/ENDPOINT`.
pub const PARKED: &str = "parked";

/// Records per read of an endpoint's history.
const PAGE: usize = 1000;
/// Rows that are looked through for stale ones; more endpoints are not parked by any accident.
const ROWS_MAX: usize = 500;
/// Endpoints that health names; the rest are counted.
const NAMED_MAX: usize = 3;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Labels {
    consumer: &'static str,
}

/// Of all consumers of this process.
pub(crate) static PARKED_ENDPOINTS: LazyLock<Family<Labels, Gauge>> =
    LazyLock::new(Family::default);

/// The document of a row of [`PARKED`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ParkedView {
    /// Who could not digest the event: `autoscaler`.
    pub consumer: String,
    /// Whose event it is.
    pub endpoint: Name,
    /// Of the event that could not be digested.
    pub position: Position,
    /// Its type, or `evaluation` where the endpoint was folded and could not be evaluated.
    pub event_type: String,
    /// What went wrong, in the words of the fault or of the panic.
    pub detail: String,
    /// When this was first met.
    pub since: Timestamp,
}

/// What is to be done with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handling {
    /// The record is folded.
    Apply,
    /// It is passed over: its endpoint is parked, or people said so.
    Skip,
    /// The endpoint is parked no longer: drop what there is of it, read its [`history`] up to and
    /// with this record, and fold it.
    Rebuild,
}

/// What one consumer has parked.
pub struct Parking {
    consumer: &'static str,
    parked: BTreeMap<EndpointKey, Position>,
    /// Positions, each in its bucket.
    skipped: BTreeMap<Position, Bucket>,
    component: Component,
    /// Unbounded, since whoever parks an endpoint cannot wait for the store; one note for each endpoint
    /// that is parked or released, and one for each time that buckets are caught up with.
    clerk: mpsc::UnboundedSender<Note>,
}

/// Calls `attempt`, and gives the words of the panic if it panics.
///
/// # Errors
///
/// The words of the panic.
pub fn catch_panic<T>(attempt: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(attempt)).map_err(|panic| words_of(panic.as_ref()))
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "it panicked without a word".to_owned())
}

/// The endpoint that an event belongs to which cannot be decoded.
pub fn endpoint_of(unreadable: &Unreadable) -> Option<EndpointKey> {
    let mut parts = unreadable.stream.split('/').skip(1);
    let (workspace, endpoint) = (parts.next()?, parts.next()?);
    format!("{workspace}/{endpoint}").parse().ok()
}

fn is_parking(record: &Record) -> bool {
    record.stream.kind() == Some(StreamKind::Parking)
}

/// Everything about one endpoint up to and with `to`, without what people decided about parking.
///
/// # Errors
///
/// Where the store cannot be read: try again.
pub async fn history(
    store: Store,
    key: EndpointKey,
    to: Position,
) -> Result<Vec<Entry>, StoreError> {
    let mut kept = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_bucket_entries(key.bucket(), after, PAGE).await?;
        let ended = page.len() < PAGE;
        for entry in page {
            after = entry.position();
            if after > to {
                return Ok(kept);
            }
            let ours = match &entry {
                Entry::Record(record) => {
                    !is_parking(record) && record.endpoint().as_ref() == Some(&key)
                }
                Entry::Unreadable(unreadable) => endpoint_of(unreadable).as_ref() == Some(&key),
            };
            if ours {
                kept.push(entry);
            }
        }
        if ended {
            return Ok(kept);
        }
    }
}

impl Parking {
    /// Needs a runtime: rows are written in the background, for as long as this lives.
    pub fn open(consumer: &'static str, store: Store, component: Component) -> Self {
        let (clerk, notes) = mpsc::unbounded_channel();
        tokio::spawn(write_down(consumer, store, notes));
        let parking = Self::noting(consumer, component, clerk);
        parking.show();
        parking
    }

    /// Writes no rows: for a consumer without a store.
    pub fn detached(consumer: &'static str, component: Component) -> Self {
        // Nobody reads the notes, so that each is dropped at once.
        let (clerk, _) = mpsc::unbounded_channel();
        Self::noting(consumer, component, clerk)
    }

    fn noting(
        consumer: &'static str,
        component: Component,
        clerk: mpsc::UnboundedSender<Note>,
    ) -> Self {
        Self {
            consumer,
            parked: BTreeMap::new(),
            skipped: BTreeMap::new(),
            component,
            clerk,
        }
    }

    /// What is to be done with the next record of the log; remembers what people decided.
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

    /// Whether a person said that this event is to be skipped.
    pub fn is_skipped(&self, position: Position) -> bool {
        self.skipped.contains_key(&position)
    }

    /// Positions that are skipped.
    pub fn skipped(&self) -> BTreeSet<Position> {
        self.skipped.keys().copied().collect()
    }

    /// Positions of a bucket that are skipped.
    pub fn skipped_in(&self, bucket: Bucket) -> BTreeSet<Position> {
        let of_it = self.skipped.iter().filter(|(_, of)| **of == bucket);
        of_it.map(|(position, _)| *position).collect()
    }

    /// Remembers what people decided before the position at which a bucket is begun.
    pub fn skip(&mut self, bucket: Bucket, positions: impl IntoIterator<Item = Position>) {
        let of_it = positions.into_iter().map(|position| (position, bucket));
        self.skipped.extend(of_it);
    }

    /// Endpoints of a bucket that are parked.
    pub fn parked_in(&self, bucket: Bucket) -> BTreeSet<EndpointKey> {
        let of_it = self.parked.keys().filter(|key| key.bucket() == bucket);
        of_it.cloned().collect()
    }

    /// Whether this endpoint is parked.
    pub fn is_parked(&self, key: &EndpointKey) -> bool {
        self.parked.contains_key(key)
    }

    /// The event that the endpoint is parked for.
    pub fn parked_at(&self, key: &EndpointKey) -> Option<Position> {
        self.parked.get(key).copied()
    }

    /// Parks the endpoint of an event that cannot be decoded, and says which: its state is to be
    /// dropped. None: it is parked already, or the event is passed over, or it is of no endpoint.
    pub fn unreadable(&mut self, unreadable: &Unreadable, now: Timestamp) -> Option<EndpointKey> {
        let Unreadable {
            position,
            type_name,
            detail,
            ..
        } = unreadable;
        let Some(key) = endpoint_of(unreadable) else {
            tracing::error!(consumer = self.consumer, %position, type_name, detail, "an event that belongs to no endpoint cannot be read, and is passed over");
            return None;
        };
        if self.is_skipped(*position) || self.is_parked(&key) {
            return None;
        }
        self.park(&key, *position, type_name, detail, now);
        Some(key)
    }

    /// Parks an endpoint whose state is to be dropped.
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
            "endpoint parked: this consumer cannot digest an event of it; see `penstock events parked`"
        );
        self.parked.insert(key.clone(), position);
        let view = ParkedView {
            consumer: self.consumer.to_owned(),
            endpoint: key.endpoint(),
            position,
            event_type: event_type.to_owned(),
            detail: detail.to_owned(),
            since: now,
        };
        self.note(Note::Parked(key.clone(), view));
        self.show();
    }

    /// To be called before an endpoint is folded anew.
    pub fn release(&mut self, key: &EndpointKey) {
        if self.parked.remove(key).is_some() {
            tracing::info!(consumer = self.consumer, endpoint = %key, "endpoint unparked");
            self.note(Note::Released(key.clone()));
            self.show();
        }
    }

    /// A bucket belongs to somebody else now, or is folded anew; its rows stay.
    pub fn forget(&mut self, bucket: Bucket) {
        self.parked.retain(|key, _| key.bucket() != bucket);
        self.show();
    }

    /// The history of these buckets has been folded: rows about what is not parked (any more) go.
    pub fn caught_up(&self, buckets: &[Bucket]) {
        let parked = self.parked.keys().cloned().collect();
        self.note(Note::CaughtUp(buckets.to_vec(), parked));
    }

    fn note(&self, note: Note) {
        // The clerk ends with the store only.
        let _ = self.clerk.send(note);
    }

    fn show(&self) {
        let labels = Labels {
            consumer: self.consumer,
        };
        let count = self.parked.len();
        PARKED_ENDPOINTS.get_or_create(&labels).set(count as i64);
        let named = self.parked.iter().take(NAMED_MAX);
        let named =
            named.map(|(key, position)| format!("{} (position {position})", key.endpoint()));
        let named: Vec<String> = named.collect();
        let more = match count.saturating_sub(NAMED_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let remark = format!("endpoints are parked: {}{more}", named.join(", "));
        self.component.remark((count > 0).then_some(remark));
    }
}

/// What the rows are to show.
enum Note {
    Parked(EndpointKey, ParkedView),
    Released(EndpointKey),
    CaughtUp(Vec<Bucket>, BTreeSet<EndpointKey>),
}

/// Writes rows in the order of the notes, each until the store has it.
async fn write_down(
    consumer: &'static str,
    store: Store,
    mut notes: mpsc::UnboundedReceiver<Note>,
) {
    while let Some(note) = notes.recv().await {
        loop {
            let written = match &note {
                Note::Parked(key, view) => list(&store, key, view.clone()).await,
                Note::Released(key) => delete(&store, &[row_key(consumer, key)]).await,
                Note::CaughtUp(buckets, parked) => sweep(&store, consumer, buckets, parked).await,
            };
            match written {
                Ok(()) => break,
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::debug!(consumer, %error, "what is parked cannot be written down yet");
                    sleep(retry::PAUSE).await;
                }
            }
        }
    }
}

fn row_key(consumer: &str, key: &EndpointKey) -> String {
    format!("{consumer}/{key}")
}

/// Lists an endpoint as parked: so its consumer, once it can digest the event, knows that it has rows to
/// write.
///
/// # Errors
///
/// Where the store cannot be read or written: try again.
pub async fn list(
    store: &Store,
    key: &EndpointKey,
    mut view: ParkedView,
) -> Result<(), StoreError> {
    let row_key = row_key(&view.consumer, key);
    let known = store.row(PARKED, &row_key).await?;
    let known = known.and_then(|row| serde_json::from_str::<ParkedView>(&row.doc).ok());
    if let Some(known) = known.filter(|known| known.position == view.position) {
        view.since = known.since;
    }
    let row = RowChange {
        model: PARKED,
        key: row_key,
        endpoint: key.as_str().to_owned(),
        deployment: String::new(),
        position: view.position,
        time: view.since,
        doc: serde_json::to_string(&view).ok(),
    };
    write(store, vec![row]).await
}

async fn delete(store: &Store, keys: &[String]) -> Result<(), StoreError> {
    let gone = |key: &String| RowChange {
        model: PARKED,
        key: key.clone(),
        endpoint: String::new(),
        deployment: String::new(),
        position: Position::START,
        time: Timestamp::default(),
        doc: None,
    };
    write(store, keys.iter().map(gone).collect()).await
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
        Err(error) => Err(StoreError::Refused(error.to_string())),
    }
}

/// Rows about endpoints of these buckets that are not parked are left from another life.
async fn sweep(
    store: &Store,
    consumer: &str,
    buckets: &[Bucket],
    parked: &BTreeSet<EndpointKey>,
) -> Result<(), StoreError> {
    let query = RowQuery {
        model: PARKED.to_owned(),
        limit: ROWS_MAX,
        ..RowQuery::default()
    };
    let stale = store.rows(query).await?.into_iter().filter(|row| {
        let Ok(key) = row.endpoint.parse::<EndpointKey>() else {
            return true;
        };
        row.key == row_key(consumer, &key)
            && buckets.contains(&key.bucket())
            && !parked.contains(&key)
    });
    let keys: Vec<String> = stale.map(|row| row.key).collect();
    delete(store, &keys).await
}

/// The stream in which people decide about an endpoint.
pub fn stream(key: &EndpointKey) -> StreamName {
    StreamName::of(StreamKind::Parking, key)
}

/// Applies the [`history`] of an endpoint that is parked no longer; `false` if it is parked again, and
/// what was applied of it is to be dropped once more.
pub fn rebuild(
    parking: &mut Parking,
    key: &EndpointKey,
    entries: Vec<Entry>,
    now: Timestamp,
    mut apply: impl FnMut(&Arc<Record>),
) -> bool {
    parking.release(key);
    for entry in entries {
        if parking.is_skipped(entry.position()) {
            continue;
        }
        match entry {
            Entry::Unreadable(unreadable) => {
                parking.unreadable(&unreadable, now);
                return false;
            }
            Entry::Record(record) => {
                if let Err(detail) = catch_panic(|| apply(&record)) {
                    parking.park(key, record.position, record.event.type_name(), &detail, now);
                    return false;
                }
            }
        }
    }
    true
}
