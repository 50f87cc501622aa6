//! Carrying out commands: the aggregate is kept in memory, the store's expected version makes sure
//! that it is the newest, and a command that lost a race is decided anew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use contract::events::Event;
use contract::ids::{EndpointKey, Name, Position};
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::Timestamp;
use domain::endpoint::Endpoint;
use domain::endpoint::commands::{Command, Context, ENDPOINTS_MAX, Precondition, decide};
use domain::zones::ZoneData;
use runtime::clock::Clock;
use runtime::ids::Ids;
use store::{Append, Cause, Commit, CommitError, Committed, Store, StoreError};

use crate::error::ApiError;
use crate::mirror;

/// Times that a command is decided anew after somebody else wrote first. Only replicas of control
/// write these streams, so even one is rare.
const TRIES: usize = 5;
const PAGE: usize = 1000;

/// This close to the limit on their number, endpoints are counted one by one and made one at a time.
/// More than can be made at once.
const COUNTED_FROM: usize = ENDPOINTS_MAX - 1000;

/// The endpoint as this process knows it, at a version of its stream.
#[derive(Clone, Debug, Default)]
pub struct Aggregate {
    pub state: Option<Endpoint>,
    pub version: u64,
    pub position: Position,
}

impl Aggregate {
    fn apply(&mut self, record: &Record) {
        self.state = Endpoint::apply(self.state.take(), record);
        self.version = record.version;
        self.position = record.position;
    }
}

type Slot = Arc<tokio::sync::Mutex<Aggregate>>;

pub struct Commands {
    store: Store,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn Ids>,
    zones: ZoneData,
    slots: Mutex<BTreeMap<Name, Slot>>,
    /// Held while an endpoint is made, where that comes close to the limit on their number.
    creation: tokio::sync::Mutex<()>,
}

/// The endpoints that the read models show.
pub trait Known: Sync {
    /// No fewer than there are, without counting.
    fn at_most(&self) -> usize;
    fn names(&self) -> Vec<Name>;
}

/// A command and how it came.
pub struct Order<'a> {
    pub endpoint: &'a Name,
    pub command: &'a Command,
    pub precondition: Precondition,
    pub actor: Actor,
    pub dry_run: bool,
    pub cause: Option<Cause>,
}

/// What became of an order.
pub struct Done {
    pub before: Option<Endpoint>,
    /// As it is now, or would be after a dry run.
    pub after: Option<Endpoint>,
    /// None: nothing had to change.
    pub changed: bool,
    pub position: Position,
}

impl Commands {
    pub fn new(store: Store, clock: Arc<dyn Clock>, ids: Arc<dyn Ids>, zones: ZoneData) -> Self {
        Self {
            store,
            clock,
            ids,
            zones,
            slots: Mutex::default(),
            creation: tokio::sync::Mutex::default(),
        }
    }

    fn slot(&self, endpoint: &Name) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.entry(endpoint.clone()).or_default().clone()
    }

    /// The newest state, whichever replica wrote it.
    pub async fn endpoint(&self, endpoint: &Name) -> Result<Aggregate, StoreError> {
        let slot = self.slot(endpoint);
        let mut aggregate = slot.lock().await;
        let read = self.read_on(endpoint, &mut aggregate).await;
        self.forget_if_empty(endpoint, &aggregate);
        read.map(|()| aggregate.clone())
    }

    /// Whether there is such an endpoint, as far as this replica knows. Good enough for a limit.
    async fn is_known(&self, endpoint: &Name) -> Result<bool, StoreError> {
        let slot = self.slot(endpoint);
        let mut aggregate = slot.lock().await;
        if aggregate.version == 0 {
            self.read_on(endpoint, &mut aggregate).await?;
            self.forget_if_empty(endpoint, &aggregate);
        }
        Ok(aggregate.state.is_some())
    }

    /// A name that was only asked about leaves nothing behind. Whoever holds the slot meanwhile is
    /// guarded by the store's expected version.
    fn forget_if_empty(&self, endpoint: &Name, aggregate: &Aggregate) {
        if aggregate.version == 0 {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.remove(endpoint);
        }
    }

    async fn read_on(&self, endpoint: &Name, aggregate: &mut Aggregate) -> Result<(), StoreError> {
        let stream = stream_of(endpoint);
        loop {
            let records = self
                .store
                .read_stream(&stream, aggregate.version, PAGE)
                .await?;
            records.iter().for_each(|record| aggregate.apply(record));
            if records.len() < PAGE {
                return Ok(());
            }
        }
    }

    /// How many endpoints there are besides this one. Where that is far from the limit, no fewer: to
    /// count would cost the more the more there are.
    async fn others(&self, endpoint: &Name, known: &dyn Known) -> Result<usize, StoreError> {
        if let Some(at_most) = self.far_from_limit(known) {
            return Ok(at_most);
        }
        let mut names: BTreeSet<Name> = known.names().into_iter().collect();
        {
            let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            names.extend(slots.keys().cloned());
        }
        names.remove(endpoint);
        let mut count = 0;
        for name in &names {
            count += match self.is_known(name).await {
                Ok(known) => usize::from(known),
                // It is there, and must not keep others from being made.
                Err(StoreError::Unreadable { .. }) => 1,
                Err(error) => return Err(error),
            };
        }
        Ok(count)
    }

    /// A number that there are no more endpoints than, if it is far from the limit.
    fn far_from_limit(&self, known: &dyn Known) -> Option<usize> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let at_most = known.at_most() + slots.len();
        (at_most < COUNTED_FROM).then_some(at_most)
    }

    /// Decides and writes.
    pub async fn carry_out(&self, order: Order<'_>, known: &dyn Known) -> Result<Done, ApiError> {
        let puts = matches!(order.command, Command::PutEndpoint { .. });
        let creates = puts && self.endpoint(order.endpoint).await?.state.is_none();
        let _creation = match creates && self.far_from_limit(known).is_none() {
            true => Some(self.creation.lock().await),
            false => None,
        };
        let other_endpoints = match creates {
            true => self.others(order.endpoint, known).await?,
            false => 0,
        };
        let slot = self.slot(order.endpoint);
        let mut aggregate = slot.lock().await;
        // Another replica may have written since: "unchanged" must be said of the newest state.
        self.read_on(order.endpoint, &mut aggregate).await?;
        for _ in 0..TRIES {
            let now = self.clock.now();
            let context = Context {
                endpoint: order.endpoint.clone(),
                other_endpoints,
                precondition: order.precondition,
                zones: self.zones.clone(),
                now,
            };
            let state = aggregate.state.as_ref();
            let decided = decide(state, order.command, &context)
                .and_then(|events| mirror::refuse_new_shares(state, order.command, events));
            if decided.is_err() || order.dry_run {
                self.forget_if_empty(order.endpoint, &aggregate);
            }
            let events = decided?;
            let before = aggregate.state.clone();
            if events.is_empty() || order.dry_run {
                let changed = !events.is_empty();
                let after = preview(&aggregate, order.endpoint, &events, &order.actor, now);
                let position = aggregate.position;
                return Ok(Done {
                    before,
                    after,
                    changed,
                    position,
                });
            }
            let cause = order.cause.clone();
            match self
                .append(order.endpoint, &mut aggregate, events, &order.actor, cause)
                .await
            {
                Ok(position) => {
                    let after = aggregate.state.clone();
                    return Ok(Done {
                        before,
                        after,
                        changed: true,
                        position,
                    });
                }
                Err(CommitError::Conflict { .. }) => {
                    self.read_on(order.endpoint, &mut aggregate).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ApiError::conflict(
            "changed-meanwhile",
            "the endpoint was changed again and again by others; try again",
        ))
    }

    /// Appends what the reactor found, if it looked at the newest state.
    pub async fn settle(
        &self,
        endpoint: &Name,
        version: u64,
        events: Vec<Event>,
        actor: &Actor,
    ) -> Result<(), StoreError> {
        let slot = self.slot(endpoint);
        let mut aggregate = slot.lock().await;
        if aggregate.version == 0 {
            self.read_on(endpoint, &mut aggregate).await?;
        }
        if aggregate.version != version {
            // Somebody has written since; their records will bring the reactor back here.
            return Ok(());
        }
        match self
            .append(endpoint, &mut aggregate, events, actor, None)
            .await
        {
            Ok(_) => Ok(()),
            Err(CommitError::Conflict { .. }) => self.read_on(endpoint, &mut aggregate).await,
            Err(CommitError::Store(error)) => Err(error),
            Err(error) => Err(StoreError::Refused(error.to_string())),
        }
    }

    async fn append(
        &self,
        endpoint: &Name,
        aggregate: &mut Aggregate,
        events: Vec<Event>,
        actor: &Actor,
        cause: Option<Cause>,
    ) -> Result<Position, CommitError> {
        let now = self.clock.now();
        let event = |event| NewEvent {
            id: self.ids.event_id(now),
            time: now,
            actor: actor.clone(),
            event,
        };
        let append = Append {
            stream: stream_of(endpoint),
            expected_version: aggregate.version,
            events: events.into_iter().map(event).collect(),
        };
        let commit = Commit {
            appends: vec![append],
            cause,
            ..Commit::default()
        };
        match self.store.commit(commit).await? {
            Committed::Now { records } => records.iter().for_each(|record| aggregate.apply(record)),
            // The same request, in flight twice: what the other one wrote is read like anybody's.
            Committed::Before { .. } => self.read_on(endpoint, aggregate).await?,
        }
        Ok(aggregate.position)
    }
}

pub fn stream_of(endpoint: &Name) -> StreamName {
    StreamName::of(StreamKind::Endpoint, &EndpointKey::new(endpoint))
}

/// The state after events that are not written.
fn preview(
    aggregate: &Aggregate,
    endpoint: &Name,
    events: &[Event],
    actor: &Actor,
    now: Timestamp,
) -> Option<Endpoint> {
    let stream = stream_of(endpoint);
    let bucket = stream.bucket_key().bucket();
    let mut state = aggregate.state.clone();
    for event in events {
        let record = Record {
            position: aggregate.position,
            prev: aggregate.position,
            bucket,
            stream: stream.clone(),
            version: aggregate.version,
            id: uuid::Uuid::nil(),
            time: now,
            actor: actor.clone(),
            event: event.clone(),
        };
        state = Endpoint::apply(state, &record);
    }
    state
}
