//! Projects the log to the rows of read models: those that a rebuild writes, and that `verify` compares the
//! stored ones with.
//!
//! Invariant: an endpoint with an event that cannot be processed has the same rows as with the running
//! consumer. They stay as they were before that event until an operator unparks the endpoint; then they
//! are those of its history without the skipped events. The decision to skip an event comes later in the
//! log than the event, so the projection then restarts from the beginning.

use std::collections::{BTreeMap, BTreeSet};

use contract::events::Event;
use contract::ids::{EndpointKey, Position};
use contract::log::{Record, RowChange};
use contract::time::Timestamp;
use domain::views::{EndpointModel, Projection, ReadModel};
use runtime::parking::{ParkedView, catch_panic, endpoint_of};
use store::{Projector, Unreadable};

use super::CONSUMER;

#[derive(Default)]
pub struct ViewsProjector {
    projection: Projection,
    /// Events to skip from the start.
    skipped: BTreeSet<Position>,
    /// Events that operators have decided to skip so far, by endpoint.
    skip_decisions: BTreeMap<EndpointKey, BTreeSet<Position>>,
    parked: BTreeMap<EndpointKey, ParkedView>,
    /// Events that belong to no endpoint and cannot be processed.
    unprocessed: Vec<ParkedView>,
    /// Unparked endpoints, ignored until the restart, which makes their rows.
    unparked_endpoints: BTreeSet<EndpointKey>,
    must_restart: bool,
}

impl ViewsProjector {
    /// Returns a projector that makes only the rows as of the end of the log.
    pub fn for_rebuild() -> Self {
        Self {
            projection: Projection::with_deferred_rows(),
            ..Self::default()
        }
    }

    /// Resumes from these models, and skips these events.
    pub fn resuming_from(
        models: BTreeMap<EndpointKey, EndpointModel>,
        skipped: BTreeSet<Position>,
    ) -> Self {
        Self {
            projection: Projection::of(models),
            skipped,
            ..Self::default()
        }
    }

    /// Applies a record whose rows are already written.
    pub fn fold(&mut self, record: &Record) {
        self.apply_with(record, |projection| projection.apply_without_rows(record));
    }

    /// Returns none if the record is skipped or cannot be applied.
    fn apply_with<T>(
        &mut self,
        record: &Record,
        apply: impl FnOnce(&mut Projection) -> T,
    ) -> Option<T> {
        if self.apply_parking_event(record) || self.is_ignored(record) {
            return None;
        }
        let projection = &mut self.projection;
        match catch_panic(|| apply(projection)) {
            Ok(applied) => Some(applied),
            Err(detail) => {
                // The event may be partly applied, which the rows must not show.
                self.must_restart |= self.projection.has_deferred_rows();
                self.park(
                    record.endpoint(),
                    record.position,
                    record.event.type_name(),
                    detail,
                );
                None
            }
        }
    }

    /// Endpoints whose rows are those before an event that cannot be processed. Their `since` is not
    /// set.
    pub fn parked(&self) -> &BTreeMap<EndpointKey, ParkedView> {
        &self.parked
    }

    /// Events that belong to no endpoint and are skipped because they cannot be processed. Their `since`
    /// is not set.
    pub fn unprocessed(&self) -> &[ParkedView] {
        &self.unprocessed
    }

    fn is_ignored(&self, record: &Record) -> bool {
        if self.skipped.contains(&record.position) {
            return true;
        }
        if self.parked.is_empty() && self.unparked_endpoints.is_empty() {
            return false;
        }
        record.endpoint().is_some_and(|key| {
            self.parked.contains_key(&key) || self.unparked_endpoints.contains(&key)
        })
    }

    fn park(
        &mut self,
        key: Option<EndpointKey>,
        position: Position,
        event_type: &str,
        detail: String,
    ) {
        let view = ParkedView {
            consumer: CONSUMER.to_owned(),
            endpoint: key.as_ref().map(EndpointKey::endpoint),
            position,
            event_type: event_type.to_owned(),
            detail,
            since: Timestamp::default(),
        };
        let Some(key) = key else {
            self.unprocessed.push(view);
            return;
        };
        self.unparked_endpoints.remove(&key);
        self.parked.entry(key).or_insert(view);
    }

    /// Without further events to skip, the endpoint would fail on the same event again and stays parked.
    fn unpark(&mut self, key: EndpointKey) {
        let skip_decisions = self.skip_decisions.get(&key);
        if !self.parked.contains_key(&key)
            || skip_decisions.is_none_or(|d| d.is_subset(&self.skipped))
        {
            return;
        }
        self.skipped.extend(skip_decisions.into_iter().flatten());
        self.parked.remove(&key);
        self.unparked_endpoints.insert(key);
        self.must_restart = true;
    }

    /// Returns whether the record is about parking, and not to be folded.
    fn apply_parking_event(&mut self, record: &Record) -> bool {
        let (consumer, skipped) = match &record.event {
            Event::EventSkipped(skipped) => (&skipped.consumer, Some(skipped.position)),
            Event::ConsumerUnparked(unparked) => (&unparked.consumer, None),
            _ => return false,
        };
        if consumer == CONSUMER
            && let Some(key) = record.endpoint()
        {
            match skipped {
                Some(position) => {
                    self.skip_decisions.entry(key).or_default().insert(position);
                }
                None => self.unpark(key),
            }
        }
        true
    }
}

impl Projector for ViewsProjector {
    fn project(&mut self, record: &Record) -> Vec<RowChange> {
        let rows = self.apply_with(record, |projection| projection.apply(record));
        rows.unwrap_or_default()
    }

    fn skip_unreadable(&mut self, unreadable: &Unreadable) {
        let Unreadable {
            position,
            type_name,
            detail,
            ..
        } = unreadable;
        if !self.skipped.contains(position) {
            let key = endpoint_of(unreadable);
            self.park(key, *position, type_name, detail.clone());
        }
    }

    fn finish(&mut self) -> Option<Vec<RowChange>> {
        if std::mem::take(&mut self.must_restart) {
            let skipped = std::mem::take(&mut self.skipped);
            *self = Self::resuming_from(BTreeMap::new(), skipped);
            return None;
        }
        Some(self.projection.take_deferred_rows())
    }

    fn is_written_once(&self, model: &str) -> bool {
        ReadModel::of_name(model).is_some_and(ReadModel::is_written_once)
    }

    fn consumer(&self) -> &'static str {
        CONSUMER
    }
}
