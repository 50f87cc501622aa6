//! Execution of commands. Aggregates are cached in memory; the store's expected version ensures that a
//! decision was based on the newest state, and a command that lost a race is decided again.

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
use store::{Append, Commit, CommitError, Committed, IdempotencyKey, Store, StoreError};

use crate::error::ApiError;
use crate::mirror;

/// How often a command is decided before it fails on conflicts. Only replicas of control write these
/// streams, so even one conflict is rare.
const ATTEMPTS_MAX: usize = 5;
const PAGE: usize = 1000;

/// From this count on, endpoints are counted exactly and created one at a time. The distance to the
/// limit exceeds the number that can be created concurrently.
const EXACT_COUNT_FROM: usize = ENDPOINTS_MAX - 1000;

/// The cached state of an endpoint, at a version of its stream.
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

type SharedAggregate = Arc<tokio::sync::Mutex<Aggregate>>;

pub struct Commands {
    store: Store,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn Ids>,
    zones: ZoneData,
    aggregates: Mutex<BTreeMap<Name, SharedAggregate>>,
    /// Held while an endpoint is created close to the limit.
    creation_lock: tokio::sync::Mutex<()>,
}

/// The endpoints in the read models.
pub trait EndpointIndex: Sync {
    /// A cheap upper bound on their number.
    fn upper_bound(&self) -> usize;
    fn names(&self) -> Vec<Name>;
}

/// A command with the context of its request.
pub struct CommandRequest<'a> {
    pub endpoint: &'a Name,
    pub command: &'a Command,
    pub precondition: Precondition,
    pub actor: Actor,
    pub dry_run: bool,
    pub idempotency_key: Option<IdempotencyKey>,
}

/// The outcome of a command.
pub struct CommandOutcome {
    pub before: Option<Endpoint>,
    /// The new state; for a dry run, what it would be.
    pub after: Option<Endpoint>,
    /// False: nothing had to change.
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
            aggregates: Mutex::default(),
            creation_lock: tokio::sync::Mutex::default(),
        }
    }

    fn shared_aggregate(&self, endpoint: &Name) -> SharedAggregate {
        let mut aggregates = self
            .aggregates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        aggregates.entry(endpoint.clone()).or_default().clone()
    }

    /// Returns the newest state, whichever replica wrote it.
    pub async fn endpoint(&self, endpoint: &Name) -> Result<Aggregate, StoreError> {
        let shared = self.shared_aggregate(endpoint);
        let mut aggregate = shared.lock().await;
        let read = self.catch_up(endpoint, &mut aggregate).await;
        self.evict_if_empty(endpoint, &aggregate);
        read.map(|()| aggregate.clone())
    }

    /// Whether the endpoint exists as far as this replica knows, which is exact enough for the limit.
    async fn exists(&self, endpoint: &Name) -> Result<bool, StoreError> {
        let shared = self.shared_aggregate(endpoint);
        let mut aggregate = shared.lock().await;
        if aggregate.version == 0 {
            self.catch_up(endpoint, &mut aggregate).await?;
            self.evict_if_empty(endpoint, &aggregate);
        }
        Ok(aggregate.state.is_some())
    }

    /// Keeps lookups of unknown names from filling the cache. A concurrent holder of the entry is still
    /// guarded by the store's expected version.
    fn evict_if_empty(&self, endpoint: &Name, aggregate: &Aggregate) {
        if aggregate.version == 0 {
            let mut aggregates = self
                .aggregates
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            aggregates.remove(endpoint);
        }
    }

    async fn catch_up(&self, endpoint: &Name, aggregate: &mut Aggregate) -> Result<(), StoreError> {
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

    /// Counts the endpoints besides this one. Far from the limit, returns an upper bound instead, since
    /// the cost of counting grows with the number of endpoints.
    async fn count_others(
        &self,
        endpoint: &Name,
        index: &dyn EndpointIndex,
    ) -> Result<usize, StoreError> {
        if let Some(upper_bound) = self.upper_bound_far_from_limit(index) {
            return Ok(upper_bound);
        }
        let mut names: BTreeSet<Name> = index.names().into_iter().collect();
        {
            let aggregates = self
                .aggregates
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            names.extend(aggregates.keys().cloned());
        }
        names.remove(endpoint);
        let mut count = 0;
        for name in &names {
            count += match self.exists(name).await {
                Ok(exists) => usize::from(exists),
                // It exists, and must not prevent others from being created.
                Err(StoreError::Unreadable { .. }) => 1,
                Err(error) => return Err(error),
            };
        }
        Ok(count)
    }

    /// An upper bound on the number of endpoints, if it is far from the limit.
    fn upper_bound_far_from_limit(&self, index: &dyn EndpointIndex) -> Option<usize> {
        let aggregates = self
            .aggregates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let upper_bound = index.upper_bound() + aggregates.len();
        (upper_bound < EXACT_COUNT_FROM).then_some(upper_bound)
    }

    /// Decides a command and appends its events.
    pub async fn execute(
        &self,
        request: CommandRequest<'_>,
        index: &dyn EndpointIndex,
    ) -> Result<CommandOutcome, ApiError> {
        let is_put = matches!(request.command, Command::PutEndpoint { .. });
        let is_create = is_put && self.endpoint(request.endpoint).await?.state.is_none();
        let _creation_guard = match is_create && self.upper_bound_far_from_limit(index).is_none() {
            true => Some(self.creation_lock.lock().await),
            false => None,
        };
        let other_endpoints = match is_create {
            true => self.count_others(request.endpoint, index).await?,
            false => 0,
        };
        let shared = self.shared_aggregate(request.endpoint);
        let mut aggregate = shared.lock().await;
        // Another replica may have written since: "unchanged" must refer to the newest state.
        self.catch_up(request.endpoint, &mut aggregate).await?;
        for _ in 0..ATTEMPTS_MAX {
            let now = self.clock.now();
            let context = Context {
                endpoint: request.endpoint.clone(),
                other_endpoints,
                precondition: request.precondition,
                zones: self.zones.clone(),
                now,
            };
            let state = aggregate.state.as_ref();
            let decision = decide(state, request.command, &context)
                .and_then(|events| mirror::refuse_new_shares(state, events));
            if decision.is_err() || request.dry_run {
                self.evict_if_empty(request.endpoint, &aggregate);
            }
            let events = decision?;
            let before = aggregate.state.clone();
            if events.is_empty() || request.dry_run {
                let changed = !events.is_empty();
                let after = preview(&aggregate, request.endpoint, &events, &request.actor, now);
                let position = aggregate.position;
                return Ok(CommandOutcome {
                    before,
                    after,
                    changed,
                    position,
                });
            }
            let idempotency_key = request.idempotency_key.clone();
            match self
                .append(
                    request.endpoint,
                    &mut aggregate,
                    events,
                    &request.actor,
                    idempotency_key,
                )
                .await
            {
                Ok(position) => {
                    let after = aggregate.state.clone();
                    return Ok(CommandOutcome {
                        before,
                        after,
                        changed: true,
                        position,
                    });
                }
                Err(CommitError::Conflict { .. }) => {
                    self.catch_up(request.endpoint, &mut aggregate).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ApiError::conflict(
            "changed-meanwhile",
            "the endpoint was repeatedly changed by other requests; try again",
        ))
    }

    /// Appends the events of the reactor, unless the endpoint has moved past `version`.
    pub async fn settle(
        &self,
        endpoint: &Name,
        version: u64,
        events: Vec<Event>,
        actor: &Actor,
    ) -> Result<(), StoreError> {
        let shared = self.shared_aggregate(endpoint);
        let mut aggregate = shared.lock().await;
        if aggregate.version == 0 {
            self.catch_up(endpoint, &mut aggregate).await?;
        }
        if aggregate.version != version {
            // Another writer was first; its records trigger the reactor again.
            return Ok(());
        }
        match self
            .append(endpoint, &mut aggregate, events, actor, None)
            .await
        {
            Ok(_) => Ok(()),
            Err(CommitError::Conflict { .. }) => self.catch_up(endpoint, &mut aggregate).await,
            Err(CommitError::Store(error)) => Err(error),
            Err(error) => Err(StoreError::refused(error.to_string()).caused_by(error)),
        }
    }

    async fn append(
        &self,
        endpoint: &Name,
        aggregate: &mut Aggregate,
        events: Vec<Event>,
        actor: &Actor,
        idempotency_key: Option<IdempotencyKey>,
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
            idempotency_key,
            ..Commit::default()
        };
        match self.store.commit(commit).await? {
            Committed::Written { records } => {
                records.iter().for_each(|record| aggregate.apply(record))
            }
            // The same request was in flight twice: read what the other one wrote.
            Committed::Duplicate { .. } => self.catch_up(endpoint, aggregate).await?,
        }
        Ok(aggregate.position)
    }
}

pub fn stream_of(endpoint: &Name) -> StreamName {
    StreamName::of(StreamKind::Endpoint, &EndpointKey::new(endpoint))
}

/// Returns the state after applying events that are not written.
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
