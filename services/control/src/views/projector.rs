//! The rows of read models as the log makes them: what a rebuild writes, and what `verify` compares the
//! stored ones with.
//!
//! Invariant: an endpoint with an event that cannot be digested has the rows that the running consumer
//! leaves it. They stay as they were before that event until people take the endpoint back; then they are
//! those of its history without the events that people have said are to be passed over. That decision
//! stands in the log after what it is about, so with it all is folded once more from the start.

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
    /// Events that are passed over from the start.
    skipped: BTreeSet<Position>,
    /// What people have said so far about events of an endpoint that are to be passed over.
    decided: BTreeMap<EndpointKey, BTreeSet<Position>>,
    parked: BTreeMap<EndpointKey, ParkedView>,
    /// Endpoints that were taken back; the next fold has their rows.
    taken_back: BTreeSet<EndpointKey>,
    starts_over: bool,
}

impl ViewsProjector {
    /// Gives rows as they are at the end of the log, and makes no others.
    pub fn for_rebuild() -> Self {
        Self {
            projection: Projection::with_late_rows(),
            ..Self::default()
        }
    }

    /// Goes on from these models, and skips these events.
    pub fn beginning_with(
        models: BTreeMap<EndpointKey, EndpointModel>,
        skipped: BTreeSet<Position>,
    ) -> Self {
        Self {
            projection: Projection::of(models),
            skipped,
            ..Self::default()
        }
    }

    /// Goes on by a record whose rows are written already.
    pub fn fold(&mut self, record: &Record) {
        self.apply_with(record, |projection| projection.apply_silently(record));
    }

    /// None: the record is skipped, or cannot be digested.
    fn apply_with<T>(
        &mut self,
        record: &Record,
        apply: impl FnOnce(&mut Projection) -> T,
    ) -> Option<T> {
        if self.hear(record) || self.is_left_alone(record) {
            return None;
        }
        let projection = &mut self.projection;
        match catch_panic(|| apply(projection)) {
            Ok(applied) => Some(applied),
            Err(detail) => {
                // What an event has left half done is not what its endpoint's rows shall show.
                self.starts_over |= self.projection.has_late_rows();
                if let Some(key) = record.endpoint() {
                    self.park(key, record.position, record.event.type_name(), detail);
                }
                None
            }
        }
    }

    /// Endpoints whose rows are those before an event that cannot be digested; since when is for others
    /// to say.
    pub fn parked(&self) -> &BTreeMap<EndpointKey, ParkedView> {
        &self.parked
    }

    fn is_left_alone(&self, record: &Record) -> bool {
        if self.skipped.contains(&record.position) {
            return true;
        }
        if self.parked.is_empty() && self.taken_back.is_empty() {
            return false;
        }
        record
            .endpoint()
            .is_some_and(|key| self.parked.contains_key(&key) || self.taken_back.contains(&key))
    }

    fn park(&mut self, key: EndpointKey, position: Position, event_type: &str, detail: String) {
        let view = ParkedView {
            consumer: CONSUMER.to_owned(),
            endpoint: key.endpoint(),
            position,
            event_type: event_type.to_owned(),
            detail,
            since: Timestamp::default(),
        };
        self.taken_back.remove(&key);
        self.parked.entry(key).or_insert(view);
    }

    /// An endpoint that is taken back without anything more to pass over comes to the same event again.
    fn take_back(&mut self, key: EndpointKey) {
        let decided = self.decided.get(&key);
        if !self.parked.contains_key(&key) || decided.is_none_or(|d| d.is_subset(&self.skipped)) {
            return;
        }
        self.skipped.extend(decided.into_iter().flatten());
        self.parked.remove(&key);
        self.taken_back.insert(key);
        self.starts_over = true;
    }

    /// True: it is about parking, and no part of what is folded.
    fn hear(&mut self, record: &Record) -> bool {
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
                    self.decided.entry(key).or_default().insert(position);
                }
                None => self.take_back(key),
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

    fn pass_over(&mut self, unreadable: &Unreadable) {
        let Unreadable {
            position,
            type_name,
            detail,
            ..
        } = unreadable;
        if let Some(key) = endpoint_of(unreadable)
            && !self.skipped.contains(position)
        {
            self.park(key, *position, type_name, detail.clone());
        }
    }

    fn rest(&mut self) -> Option<Vec<RowChange>> {
        if std::mem::take(&mut self.starts_over) {
            let skipped = std::mem::take(&mut self.skipped);
            *self = Self::beginning_with(BTreeMap::new(), skipped);
            return None;
        }
        Some(self.projection.late_rows())
    }

    fn is_written_once(&self, model: &str) -> bool {
        ReadModel::of_name(model).is_some_and(ReadModel::is_written_once)
    }

    fn consumer(&self) -> &'static str {
        CONSUMER
    }
}
