//! Compares the state in the log with that of the backends and derives what to do. Pure: the agent and the
//! simulation drive it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use backends::{BackendError, ObservedInstance, ObservedPhase, StartSpec};
use contract::events::{
    Event, InstanceEnded, InstanceEvent, InstanceStarted, InstanceStarting, InstanceUnhealthy,
    InstanceUnready,
};
use contract::ids::{EndpointKey, InstanceId, Name, Uid};
use contract::log::{Record, StreamName};
use contract::resources::BackendKind;
use contract::time::{Span, Timestamp};
use domain::instances::{Instance, Instances, Phase};
use runtime::consumer::SharedEntries;
use runtime::executor::{Dispatched, ExecutionError, Request, UnconfirmedWrites};

use super::fold::PlacementChange;

/// The failure reason of an instance that stopped running while Penstock was down.
pub const GONE_REASON: &str = "was gone when Penstock came back";

const STOPPED_WITH_PENSTOCK: &str = "Penstock was stopped";

/// A request to a backend.
#[derive(Clone, Debug, PartialEq)]
pub enum BackendRequest {
    Ensure {
        kind: BackendKind,
        start: Box<StartSpec>,
    },
    Remove {
        kind: BackendKind,
        id: InstanceId,
        generation: u64,
        grace: Span,
    },
}

impl BackendRequest {
    pub fn kind(&self) -> &BackendKind {
        match self {
            Self::Ensure { kind, .. } | Self::Remove { kind, .. } => kind,
        }
    }

    pub fn id(&self) -> &InstanceId {
        match self {
            Self::Ensure { start, .. } => &start.id,
            Self::Remove { id, .. } => id,
        }
    }
}

/// The requests and events due for one endpoint.
#[derive(Debug, Default, PartialEq)]
pub struct EndpointPlan {
    pub requests: Vec<BackendRequest>,
    pub events: Vec<Event>,
}

/// An instance as its backend sees it.
#[derive(Debug)]
struct LocalInstance {
    kind: BackendKind,
    observed: ObservedInstance,
    /// Whether this process has recorded its adoption in the log.
    is_adoption_reported: bool,
    /// How often it has become ready.
    ready_count: u64,
}

/// What frames say about an instance besides its resources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeasuredInstance {
    pub endpoint: EndpointKey,
    pub deployment_uid: Uid,
    pub deployment: Name,
    /// `None` if it is not ready, or on its way out.
    pub readiness: Option<ReadinessPeriod>,
}

/// A period for which an instance is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadinessPeriod {
    /// How often it has become ready: another count is another period.
    pub count: u64,
    /// When it first became ready, if that was before this process adopted it.
    pub before: Option<Timestamp>,
}

/// Distinguishes requests about one instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestMark {
    Ensure,
    Remove { generation: u64 },
}

impl Request for BackendRequest {
    type Target = InstanceId;
    type Mark = RequestMark;

    fn target(&self) -> &InstanceId {
        self.id()
    }

    fn mark(&self) -> RequestMark {
        match self {
            Self::Ensure { .. } => RequestMark::Ensure,
            Self::Remove { generation, .. } => RequestMark::Remove {
                generation: *generation,
            },
        }
    }
}

#[derive(Debug)]
pub struct NodeState {
    node: String,
    grace: Span,
    folds: SharedEntries<Instances>,
    answers: UnconfirmedWrites<EndpointKey>,
    /// The endpoint of each instance of this node.
    endpoints: BTreeMap<InstanceId, EndpointKey>,
    local: BTreeMap<InstanceId, LocalInstance>,
    dispatched: Dispatched<BackendRequest>,
    listed: BTreeSet<BackendKind>,
    /// Endpoints with changes since they were last planned.
    dirty: BTreeSet<EndpointKey>,
    /// Instances that a backend may have although the log does not want them.
    strays: BTreeSet<InstanceId>,
    /// Endpoints without state, because one of their events cannot be applied.
    parked: BTreeSet<EndpointKey>,
    /// Endpoints and stray instances to retry after a pause.
    retry_later: (BTreeSet<EndpointKey>, BTreeSet<InstanceId>),
}

impl NodeState {
    pub fn new(node: &str, grace: Span, folds: SharedEntries<Instances>) -> Self {
        Self {
            node: node.to_owned(),
            grace,
            folds,
            answers: UnconfirmedWrites::default(),
            endpoints: BTreeMap::new(),
            local: BTreeMap::new(),
            dispatched: Dispatched::default(),
            listed: BTreeSet::new(),
            dirty: BTreeSet::new(),
            strays: BTreeSet::new(),
            parked: BTreeSet::new(),
            retry_later: Default::default(),
        }
    }

    /// Handles a record that was applied to the fold of its endpoint.
    pub fn handle_applied(&mut self, key: EndpointKey, change: PlacementChange) {
        if let Some(id) = change.added {
            self.endpoints.insert(id, key.clone());
        }
        for id in change.removed {
            self.endpoints.remove(&id);
            self.dispatched.forget(&id);
            self.strays.insert(id);
        }
        self.dirty.insert(key);
    }

    /// Restores the state of all endpoints from their folds.
    pub fn restore_all(&mut self) {
        let folds = self.folds.clone();
        for (key, entry) in folds.lock().iter() {
            self.restore(key, &entry.state);
        }
    }

    fn restore(&mut self, key: &EndpointKey, instances: &Instances) {
        for id in instances.instances.keys() {
            self.endpoints.insert(id.clone(), key.clone());
        }
        self.dirty.insert(key.clone());
    }

    /// Drops the state of an endpoint. Its instances are left alone from here on.
    pub fn park(&mut self, key: &EndpointKey) {
        self.answers.forget(key);
        self.dirty.remove(key);
        self.retry_later.0.remove(key);
        let affected = |(_, endpoint): &(&InstanceId, &EndpointKey)| *endpoint == key;
        let affected: Vec<InstanceId> = self
            .endpoints
            .iter()
            .filter(affected)
            .map(|(id, _)| id.clone())
            .collect();
        for id in affected {
            self.endpoints.remove(&id);
            self.dispatched.forget(&id);
        }
        self.parked.insert(key.clone());
    }

    /// Resumes an endpoint that has been folded again from the start.
    pub fn unpark(&mut self, key: &EndpointKey) {
        self.parked.remove(key);
        let folds = self.folds.clone();
        if let Some(entry) = folds.lock().get(key) {
            self.restore(key, &entry.state);
        }
        let is_unknown = |id: &&InstanceId| !self.endpoints.contains_key(*id);
        self.strays
            .extend(self.local.keys().filter(is_unknown).cloned());
    }

    /// Whether the instance may belong to a parked endpoint. Its request may be the very event that cannot
    /// be read, so this goes by the id. An id that may belong to two endpoints is spared.
    fn may_be_parked(&self, id: &InstanceId) -> bool {
        self.parked.iter().any(|key| {
            let rest = id.as_str().strip_prefix(key.endpoint().as_str());
            rest.is_some_and(|rest| rest.starts_with('-'))
        })
    }

    /// The instances of this node's backends that have not ended.
    pub fn running(&self) -> impl Iterator<Item = &InstanceId> {
        let has_ended = |local: &LocalInstance| {
            let phase = &local.observed.phase;
            matches!(
                phase,
                ObservedPhase::Exited { .. } | ObservedPhase::Removed { .. }
            )
        };
        let running = self
            .local
            .iter()
            .filter(move |(_, local)| !has_ended(local));
        running.map(|(id, _)| id)
    }

    /// Handles a change reported by a backend.
    pub fn observe(&mut self, kind: BackendKind, observed: ObservedInstance) {
        let id = observed.id.clone();
        match self.local.get_mut(&id) {
            Some(local) => {
                let was_ready = local.observed.phase == ObservedPhase::Ready;
                let is_ready = observed.phase == ObservedPhase::Ready;
                local.ready_count += u64::from(is_ready && !was_ready);
                local.observed = observed;
            }
            None => {
                let local = LocalInstance {
                    kind,
                    ready_count: u64::from(observed.phase == ObservedPhase::Ready),
                    observed,
                    is_adoption_reported: false,
                };
                self.local.insert(id.clone(), local);
            }
        }
        self.mark_instance_dirty(id);
    }

    /// Handles the full list of a backend's instances. Returns true the first time. Requests without a
    /// visible result are sent again, since changes may have been missed.
    pub fn handle_list(&mut self, kind: BackendKind, listed: Vec<ObservedInstance>) -> bool {
        let of_kind = |local: &LocalInstance| local.kind == kind;
        let known_ids: Vec<InstanceId> = self
            .local
            .iter()
            .filter(|(_, local)| of_kind(local))
            .map(|(id, _)| id.clone())
            .collect();
        let listed_ids: BTreeSet<InstanceId> = listed.iter().map(|o| o.id.clone()).collect();
        for id in known_ids.into_iter().filter(|id| !listed_ids.contains(id)) {
            self.local.remove(&id);
            self.mark_instance_dirty(id);
        }
        for id in self.dispatched.forget_all() {
            self.mark_instance_dirty(id);
        }
        for observed in listed {
            self.observe(kind.clone(), observed);
        }
        self.listed.insert(kind)
    }

    /// Marks an instance as failed, since its backend cannot run it.
    pub fn report_failed(&mut self, id: &InstanceId, detail: &str) {
        let Some((_, instance)) = self.find_instance(id) else {
            return;
        };
        let has_ended = self.local.get(id).is_some_and(|local| {
            matches!(
                local.observed.phase,
                ObservedPhase::Exited { .. } | ObservedPhase::Removed { .. }
            )
        });
        if has_ended {
            return;
        }
        let observed = self.ended_instance(
            &instance,
            ObservedPhase::Exited {
                code: None,
                reason: detail.to_owned(),
            },
        );
        self.observe(instance.spec.backend.clone(), observed);
    }

    /// Marks an instance as removed, since there is no backend that could have it.
    pub fn report_removed(&mut self, id: &InstanceId) {
        if let Some((_, instance)) = self.find_instance(id) {
            let observed = self.ended_instance(&instance, ObservedPhase::Removed { code: None });
            self.observe(instance.spec.backend.clone(), observed);
        }
    }

    fn ended_instance(&self, instance: &Instance, phase: ObservedPhase) -> ObservedInstance {
        ObservedInstance {
            id: instance.id.clone(),
            generation: instance.generation,
            node: self.node.clone(),
            address: None,
            pid: None,
            phase,
            adopted: false,
            progress: None,
            unhealthy: None,
        }
    }

    /// Handles the result of a request. Its backend reports separately what became of the instance.
    pub fn handle_result(
        &mut self,
        request: &BackendRequest,
        result: Result<(), ExecutionError<BackendError>>,
    ) {
        let error = match result {
            Ok(()) => return,
            Err(ExecutionError::Failed(error)) => error,
            Err(panicked) => {
                tracing::error!(instance = %request.id(), error = %panicked, "backend request failed");
                return self.retry_later(request);
            }
        };
        match (request, error) {
            (BackendRequest::Ensure { .. }, BackendError::CannotStart { detail, .. }) => {
                self.report_failed(request.id(), &detail);
            }
            (BackendRequest::Ensure { .. }, error @ BackendError::Stale { .. }) => {
                // Wanted by the log but removed at the backend: it can only be replaced.
                self.report_failed(request.id(), &error.to_string());
            }
            // Already reported by the backend.
            (_, BackendError::OutOfResources { .. }) => self.retry_later(request),
            (_, error) => {
                tracing::warn!(instance = %request.id(), %error, "backend request failed");
                self.retry_later(request);
            }
        }
    }

    /// Schedules a request that the backend could not carry out for a retry.
    fn retry_later(&mut self, request: &BackendRequest) {
        self.dispatched.forget(request.id());
        match self.endpoints.get(request.id()) {
            Some(endpoint) => self.retry_later.0.insert(endpoint.clone()),
            None => self.retry_later.1.insert(request.id().clone()),
        };
    }

    pub fn mark_dirty_later(&mut self, endpoint: &EndpointKey) {
        self.retry_later.0.insert(endpoint.clone());
    }

    pub fn retry(&mut self) {
        self.dirty.append(&mut self.retry_later.0);
        self.strays.append(&mut self.retry_later.1);
    }

    pub fn mark_all_dirty(&mut self) {
        let folds = self.folds.clone();
        let locked = folds.lock();
        self.dirty = locked.iter().map(|(key, _)| key.clone()).collect();
    }

    fn mark_instance_dirty(&mut self, id: InstanceId) {
        match self.endpoints.get(&id) {
            Some(endpoint) => self.dirty.insert(endpoint.clone()),
            None => self.strays.insert(id),
        };
    }

    pub fn take_dirty(&mut self) -> BTreeSet<EndpointKey> {
        std::mem::take(&mut self.dirty)
    }

    /// Returns the removals of instances that backends have but the log does not want.
    pub fn stray_requests(&mut self) -> Vec<BackendRequest> {
        let mut requests = Vec::new();
        for id in std::mem::take(&mut self.strays) {
            if let Some(endpoint) = self.endpoints.get(&id) {
                // The backend reported it before the log did.
                self.dirty.insert(endpoint.clone());
                continue;
            }
            if self.may_be_parked(&id) {
                continue;
            }
            let Some(local) = self.local.get(&id) else {
                continue;
            };
            if matches!(local.observed.phase, ObservedPhase::Removed { .. }) {
                self.local.remove(&id);
                self.dispatched.forget(&id);
                continue;
            }
            let request = BackendRequest::Remove {
                kind: local.kind.clone(),
                generation: local.observed.generation,
                grace: self.grace,
                id,
            };
            requests.extend(self.dispatched.dispatch(request));
        }
        requests
    }

    /// Plans one endpoint. The returned requests count as dispatched from now on.
    pub fn plan(&mut self, key: &EndpointKey) -> EndpointPlan {
        let mut plan = EndpointPlan::default();
        let folds = self.folds.clone();
        let locked = folds.lock();
        let Some(entry) = locked.get(key) else {
            return plan;
        };
        let are_confirmed = self.answers.are_confirmed(key, entry.position);
        let mut requests = Vec::new();
        for instance in entry.state.instances.values() {
            let local = self.local.get(&instance.id);
            requests.extend(request_for(key, instance, local));
            if are_confirmed {
                plan.events.extend(missing_events(instance, local));
            }
        }
        drop(locked);
        plan.requests = requests
            .into_iter()
            .filter_map(|request| self.dispatched.dispatch(request))
            .collect();
        plan
    }

    /// Returns the version of this node's stream of an endpoint.
    pub fn version(&self, endpoint: &EndpointKey) -> u64 {
        let stream = StreamName::of_node(endpoint, &self.node);
        let folds = self.folds.lock();
        let folded = folds
            .get(endpoint)
            .map_or(0, |entry| entry.version(&stream));
        self.answers.version(endpoint, folded)
    }

    /// Handles records committed to this node's stream; the fold follows when they come back.
    pub fn committed(&mut self, key: &EndpointKey, records: &[Arc<Record>]) {
        self.answers.committed(key, records);
        for record in records {
            if let Event::InstanceStarted(started) = &record.event
                && started.adopted
                && let Some(local) = self.local.get_mut(&started.id)
            {
                local.is_adoption_reported = true;
            }
        }
    }

    pub fn find_instance(&self, id: &InstanceId) -> Option<(EndpointKey, Instance)> {
        let key = self.endpoints.get(id)?;
        let folds = self.folds.lock();
        let instance = folds.get(key)?.state.instances.get(id)?;
        Some((key.clone(), (**instance).clone()))
    }

    /// Returns the deployment that an instance belongs to, and its readiness: in the log, so that it gets
    /// requests, and at its backend.
    pub fn placement_of(&self, id: &InstanceId) -> Option<MeasuredInstance> {
        let key = self.endpoints.get(id)?;
        let folds = self.folds.lock();
        let instance = folds.get(key)?.state.instances.get(id)?;
        let is_ready = |local: &&LocalInstance| {
            instance.is_ready() && local.observed.phase == ObservedPhase::Ready
        };
        let local = self.local.get(id).filter(is_ready);
        Some(MeasuredInstance {
            endpoint: key.clone(),
            deployment_uid: instance.deployment_uid,
            deployment: instance.deployment.clone(),
            readiness: local.map(|local| ReadinessPeriod {
                count: local.ready_count,
                before: instance.ready_at.filter(|_| local.observed.adopted),
            }),
        })
    }

    pub fn is_adopted(&self, id: &InstanceId) -> bool {
        self.local
            .get(id)
            .is_some_and(|local| local.observed.adopted)
    }

    /// Returns the newest generation of an instance in the log or at its backend.
    pub fn newest_generation(&self, observed: &ObservedInstance) -> u64 {
        let requested = self
            .find_instance(&observed.id)
            .map_or(0, |(_, i)| i.generation);
        observed.generation.max(requested)
    }

    /// Returns the events for instances that were stopped because Penstock stops.
    pub fn stop_events(
        &self,
        stopped: &BTreeMap<InstanceId, Option<i32>>,
    ) -> BTreeMap<EndpointKey, Vec<Event>> {
        let mut stops = BTreeMap::<EndpointKey, Vec<Event>>::new();
        for (id, code) in stopped {
            if let Some(key) = self.endpoints.get(id) {
                let event = ended_event(id, STOPPED_WITH_PENSTOCK, *code);
                stops
                    .entry(key.clone())
                    .or_default()
                    .push(Event::InstanceStopped(event));
            }
        }
        stops
    }
}

fn request_for(
    key: &EndpointKey,
    instance: &Instance,
    local: Option<&LocalInstance>,
) -> Option<BackendRequest> {
    let kind = instance.spec.backend.clone();
    if let Some(removal) = &instance.removal {
        let is_removed_already = local.is_some_and(is_removed);
        return (!is_removed_already).then(|| BackendRequest::Remove {
            kind,
            id: instance.id.clone(),
            generation: removal.generation,
            grace: removal.grace,
        });
    }
    // An instance that was started before is not started again: it is either adopted or lost.
    let is_new = instance.started_at.is_none() && instance.phase != Phase::Failed;
    (is_new && local.is_none()).then(|| BackendRequest::Ensure {
        kind,
        start: Box::new(StartSpec {
            id: instance.id.clone(),
            generation: instance.generation,
            deployment: format!("{}/{}", key.endpoint(), instance.deployment),
            spec: instance.spec.clone(),
        }),
    })
}

fn is_removed(local: &LocalInstance) -> bool {
    matches!(local.observed.phase, ObservedPhase::Removed { .. })
}

/// Returns the events about an instance that are missing from the log.
fn missing_events(instance: &Instance, local: Option<&LocalInstance>) -> Vec<Event> {
    let id = &instance.id;
    let fails = instance.phase != Phase::Failed && instance.removal.is_none();
    let Some(local) = local else {
        let was_running = instance.started_at.is_some();
        let is_lost = was_running && fails;
        return Vec::from_iter(
            is_lost.then(|| Event::InstanceFailed(ended_event(id, GONE_REASON, None))),
        );
    };
    match &local.observed.phase {
        ObservedPhase::Removed { code } if instance.removal.is_some() => {
            vec![Event::InstanceStopped(ended_event(id, "removed", *code))]
        }
        ObservedPhase::Exited { code, reason } if fails => {
            vec![Event::InstanceFailed(ended_event(id, reason, *code))]
        }
        ObservedPhase::Removed { .. } | ObservedPhase::Exited { .. } => Vec::new(),
        _ if !fails => Vec::new(),
        phase => running_events(instance, local, phase),
    }
}

/// Returns the events of a running instance up to its current phase.
fn running_events(
    instance: &Instance,
    local: &LocalInstance,
    observed: &ObservedPhase,
) -> Vec<Event> {
    let mut events = Vec::new();
    let mut phase = instance.phase;
    let is_adoption_unreported = local.observed.adopted && !local.is_adoption_reported;
    if let Some(address) = &local.observed.address {
        let is_changed = instance.started_at.is_none()
            || instance.address.as_ref() != Some(address)
            || instance.pid != local.observed.pid
            || is_adoption_unreported;
        if is_changed {
            events.push(Event::InstanceStarted(InstanceStarted {
                id: instance.id.clone(),
                generation: local.observed.generation,
                address: address.clone(),
                pid: local.observed.pid,
                adopted: local.observed.adopted,
            }));
        }
        if is_changed && local.observed.adopted && phase == Phase::Ready {
            // As in the fold: an adopted instance has to become ready again.
            phase = Phase::Unready;
        }
    }
    match observed {
        ObservedPhase::Starting if phase == Phase::Starting => {
            let progress = local.observed.progress.as_ref();
            let unreported = progress.filter(|progress| **progress != instance.detail);
            events.extend(unreported.map(|detail| {
                Event::InstanceStarting(InstanceStarting {
                    id: instance.id.clone(),
                    detail: detail.clone(),
                })
            }));
        }
        ObservedPhase::Ready if phase != Phase::Ready => {
            let id = instance.id.clone();
            events.push(Event::InstanceReady(InstanceEvent { id }));
        }
        ObservedPhase::Unready { reason } if phase == Phase::Ready => {
            events.push(Event::InstanceUnready(InstanceUnready {
                id: instance.id.clone(),
                reason: reason.clone(),
            }));
        }
        _ => {}
    }
    if instance.unhealthy.is_none()
        && let Some(reason) = &local.observed.unhealthy
    {
        events.push(Event::InstanceUnhealthy(InstanceUnhealthy {
            id: instance.id.clone(),
            reason: reason.clone(),
        }));
    }
    events
}

fn ended_event(id: &InstanceId, reason: &str, exit_code: Option<i32>) -> InstanceEnded {
    InstanceEnded {
        id: id.clone(),
        reason: reason.to_owned(),
        exit_code,
    }
}
