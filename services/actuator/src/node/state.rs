//! What the log says and what the backends say, and what follows from the difference. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use backends::{Observed, ObservedPhase, Order};
use contract::events::{Event, InstanceEnded, InstanceStarted, InstanceUnready, OfInstance};
use contract::ids::{EndpointKey, InstanceId, Name, Uid};
use contract::log::{Record, StreamName};
use contract::resources::BackendKind;
use contract::time::Span;
use domain::instances::{Instance, Instances, Phase};
use runtime::consumer::Folds;
use runtime::executor::{Answers, Dispatched, Request};

use super::fold::Placed;

/// Why an instance failed that was running when Penstock was last seen, and is not any more.
pub const GONE: &str = "was gone when Penstock came back";

const STOPPED_WITH_PENSTOCK: &str = "Penstock was stopped";

/// Something that a backend is to do.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum BackendOrder {
    Ensure {
        kind: BackendKind,
        order: Box<Order>,
    },
    Remove {
        kind: BackendKind,
        id: InstanceId,
        generation: u64,
        grace: Span,
    },
}

impl BackendOrder {
    pub(super) fn kind(&self) -> &BackendKind {
        match self {
            Self::Ensure { kind, .. } | Self::Remove { kind, .. } => kind,
        }
    }

    pub(super) fn id(&self) -> &InstanceId {
        match self {
            Self::Ensure { order, .. } => &order.id,
            Self::Remove { id, .. } => id,
        }
    }
}

/// What is to be done about one endpoint.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan {
    pub orders: Vec<BackendOrder>,
    pub events: Vec<Event>,
}

/// What is known of an instance from its backend.
#[derive(Debug)]
struct Local {
    kind: BackendKind,
    observed: Observed,
    /// The log has been told in this run that it was adopted.
    announced: bool,
}

/// Tells orders about an instance apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OrderMark {
    Ensure,
    Remove { generation: u64 },
}

impl Request for BackendOrder {
    type Target = InstanceId;
    type Mark = OrderMark;

    fn target(&self) -> &InstanceId {
        self.id()
    }

    fn mark(&self) -> OrderMark {
        match self {
            Self::Ensure { .. } => OrderMark::Ensure,
            Self::Remove { generation, .. } => OrderMark::Remove {
                generation: *generation,
            },
        }
    }
}

#[derive(Debug)]
pub(super) struct NodeState {
    node: String,
    grace: Span,
    folds: Folds<Instances>,
    answers: Answers<EndpointKey>,
    /// Where an instance of this node belongs.
    homes: BTreeMap<InstanceId, EndpointKey>,
    local: BTreeMap<InstanceId, Local>,
    dispatched: Dispatched<BackendOrder>,
    listed: BTreeSet<BackendKind>,
    /// Endpoints where something changed.
    touched: BTreeSet<EndpointKey>,
    /// Instances that a backend may have and that nothing in the log wants.
    strays: BTreeSet<InstanceId>,
    /// Endpoints of which nothing is known, because an event of theirs cannot be digested.
    parked: BTreeSet<EndpointKey>,
    /// To be looked at again after a while.
    later: (BTreeSet<EndpointKey>, BTreeSet<InstanceId>),
}

impl NodeState {
    pub(super) fn new(node: &str, grace: Span, folds: Folds<Instances>) -> Self {
        Self {
            node: node.to_owned(),
            grace,
            folds,
            answers: Answers::default(),
            homes: BTreeMap::new(),
            local: BTreeMap::new(),
            dispatched: Dispatched::default(),
            listed: BTreeSet::new(),
            touched: BTreeSet::new(),
            strays: BTreeSet::new(),
            parked: BTreeSet::new(),
            later: Default::default(),
        }
    }

    /// A record was applied to the fold of its endpoint.
    pub(super) fn applied(&mut self, key: EndpointKey, placed: Placed) {
        if let Some(id) = placed.new {
            self.homes.insert(id, key.clone());
        }
        for id in placed.gone {
            self.homes.remove(&id);
            self.dispatched.forget(&id);
            self.strays.insert(id);
        }
        self.touched.insert(key);
    }

    /// Goes on from what is folded of all endpoints.
    pub(super) fn restore_all(&mut self) {
        let folds = self.folds.clone();
        for (key, entry) in folds.lock().iter() {
            self.restore(key, &entry.state);
        }
    }

    fn restore(&mut self, key: &EndpointKey, instances: &Instances) {
        for id in instances.instances.keys() {
            self.homes.insert(id.clone(), key.clone());
        }
        self.touched.insert(key.clone());
    }

    /// What was folded of an endpoint is gone. Nothing is done about its instances any more.
    pub(super) fn park(&mut self, key: &EndpointKey) {
        self.answers.forget(key);
        self.touched.remove(key);
        self.later.0.remove(key);
        let theirs = |(_, home): &(&InstanceId, &EndpointKey)| *home == key;
        let theirs: Vec<InstanceId> = self
            .homes
            .iter()
            .filter(theirs)
            .map(|(id, _)| id.clone())
            .collect();
        for id in theirs {
            self.homes.remove(&id);
            self.dispatched.forget(&id);
        }
        self.parked.insert(key.clone());
    }

    /// The endpoint has been folded from its start: what was left as it was is looked at again.
    pub(super) fn unpark(&mut self, key: &EndpointKey) {
        self.parked.remove(key);
        let folds = self.folds.clone();
        if let Some(entry) = folds.lock().get(key) {
            self.restore(key, &entry.state);
        }
        let homeless = |id: &&InstanceId| !self.homes.contains_key(*id);
        self.strays
            .extend(self.local.keys().filter(homeless).cloned());
    }

    /// The order for an instance may be the very event that could not be read, so its name tells. A
    /// name may fit two endpoints; then it is better spared than ended.
    fn may_be_parked(&self, id: &InstanceId) -> bool {
        self.parked.iter().any(|key| {
            let rest = id.as_str().strip_prefix(key.endpoint().as_str());
            rest.is_some_and(|rest| rest.starts_with('-'))
        })
    }

    /// Takes in a change at a backend.
    pub(super) fn observe(&mut self, kind: BackendKind, observed: Observed) {
        let id = observed.id.clone();
        match self.local.get_mut(&id) {
            Some(local) => local.observed = observed,
            None => {
                let local = Local {
                    kind,
                    observed,
                    announced: false,
                };
                self.local.insert(id.clone(), local);
            }
        }
        self.touch_instance(id);
    }

    /// Takes in all that a backend has; true the first time. What was missed in between is made up
    /// for: orders that have no visible result are given again.
    pub(super) fn list(&mut self, kind: BackendKind, listed: Vec<Observed>) -> bool {
        let of_kind = |local: &Local| local.kind == kind;
        let known: Vec<InstanceId> = self
            .local
            .iter()
            .filter(|(_, local)| of_kind(local))
            .map(|(id, _)| id.clone())
            .collect();
        let listed_ids: BTreeSet<InstanceId> = listed.iter().map(|o| o.id.clone()).collect();
        for id in known.into_iter().filter(|id| !listed_ids.contains(id)) {
            self.local.remove(&id);
            self.touch_instance(id);
        }
        for id in self.dispatched.forget_all() {
            self.touch_instance(id);
        }
        for observed in listed {
            self.observe(kind.clone(), observed);
        }
        self.listed.insert(kind)
    }

    /// The instance does not run, whatever its backend has to say.
    pub(super) fn lost(&mut self, id: &InstanceId, detail: &str) {
        let Some((_, instance)) = self.home_of(id) else {
            return;
        };
        let over = self.local.get(id).is_some_and(|local| {
            matches!(
                local.observed.phase,
                ObservedPhase::Exited { .. } | ObservedPhase::Removed { .. }
            )
        });
        if over {
            return;
        }
        let observed = self.ended(
            &instance,
            ObservedPhase::Exited {
                code: None,
                reason: detail.to_owned(),
            },
        );
        self.observe(instance.spec.backend.clone(), observed);
    }

    /// There is no backend that could have the instance, so it is as good as removed.
    pub(super) fn nowhere(&mut self, id: &InstanceId) {
        if let Some((_, instance)) = self.home_of(id) {
            let observed = self.ended(&instance, ObservedPhase::Removed { code: None });
            self.observe(instance.spec.backend.clone(), observed);
        }
    }

    fn ended(&self, instance: &Instance, phase: ObservedPhase) -> Observed {
        Observed {
            id: instance.id.clone(),
            generation: instance.generation,
            node: self.node.clone(),
            address: None,
            pid: None,
            phase,
            adopted: false,
        }
    }

    /// The backend could not take an order now; it is given again after a while.
    pub(super) fn failed(&mut self, order: &BackendOrder) {
        self.dispatched.forget(order.id());
        match self.homes.get(order.id()) {
            Some(endpoint) => self.later.0.insert(endpoint.clone()),
            None => self.later.1.insert(order.id().clone()),
        };
    }

    pub(super) fn touch_later(&mut self, endpoint: &EndpointKey) {
        self.later.0.insert(endpoint.clone());
    }

    pub(super) fn retry(&mut self) {
        self.touched.append(&mut self.later.0);
        self.strays.append(&mut self.later.1);
    }

    pub(super) fn touch_all(&mut self) {
        let folds = self.folds.clone();
        let known = folds.lock();
        self.touched = known.iter().map(|(key, _)| key.clone()).collect();
    }

    fn touch_instance(&mut self, id: InstanceId) {
        match self.homes.get(&id) {
            Some(endpoint) => self.touched.insert(endpoint.clone()),
            None => self.strays.insert(id),
        };
    }

    pub(super) fn take_touched(&mut self) -> BTreeSet<EndpointKey> {
        std::mem::take(&mut self.touched)
    }

    /// What is to be done about what backends have and nobody wants.
    pub(super) fn stray_orders(&mut self) -> Vec<BackendOrder> {
        let mut orders = Vec::new();
        for id in std::mem::take(&mut self.strays) {
            if let Some(endpoint) = self.homes.get(&id) {
                // The backend spoke of it before the log did.
                self.touched.insert(endpoint.clone());
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
            let order = BackendOrder::Remove {
                kind: local.kind.clone(),
                generation: local.observed.generation,
                grace: self.grace,
                id,
            };
            orders.extend(self.dispatched.dispatch(order));
        }
        orders
    }

    /// What is to be done about one endpoint. Orders count as given from now on.
    pub(super) fn plan(&mut self, key: &EndpointKey) -> Plan {
        let mut plan = Plan::default();
        let folds = self.folds.clone();
        let known = folds.lock();
        let Some(entry) = known.get(key) else {
            return plan;
        };
        let have_come_back = self.answers.have_come_back(key, entry.position);
        let mut orders = Vec::new();
        for instance in entry.state.instances.values() {
            let local = self.local.get(&instance.id);
            orders.extend(order_about(key, instance, local));
            if have_come_back {
                plan.events.extend(answers(instance, local));
            }
        }
        drop(known);
        plan.orders = orders
            .into_iter()
            .filter_map(|order| self.dispatched.dispatch(order))
            .collect();
        plan
    }

    /// Version of the stream in which we answer.
    pub(super) fn version(&self, endpoint: &EndpointKey) -> u64 {
        let stream = StreamName::of_node(endpoint, &self.node);
        let known = self.folds.lock();
        let folded = known
            .get(endpoint)
            .map_or(0, |entry| entry.version(&stream));
        self.answers.version(endpoint, folded)
    }

    /// These stand in our stream now; the fold follows when the feed brings them.
    pub(super) fn committed(&mut self, key: &EndpointKey, records: &[Arc<Record>]) {
        self.answers.committed(key, records);
        for record in records {
            if let Event::InstanceStarted(started) = &record.event
                && started.adopted
                && let Some(local) = self.local.get_mut(&started.id)
            {
                local.announced = true;
            }
        }
    }

    pub(super) fn home_of(&self, id: &InstanceId) -> Option<(EndpointKey, Instance)> {
        let key = self.homes.get(id)?;
        let known = self.folds.lock();
        let instance = known.get(key)?.state.instances.get(id)?;
        Some((key.clone(), instance.clone()))
    }

    /// The deployment that an instance belongs to.
    pub(super) fn deployment_of(&self, id: &InstanceId) -> Option<(EndpointKey, Uid, Name)> {
        let key = self.homes.get(id)?;
        let known = self.folds.lock();
        let instance = known.get(key)?.state.instances.get(id)?;
        let (uid, deployment) = (instance.deployment_uid, instance.deployment.clone());
        Some((key.clone(), uid, deployment))
    }

    pub(super) fn is_adopted(&self, id: &InstanceId) -> bool {
        self.local
            .get(id)
            .is_some_and(|local| local.observed.adopted)
    }

    /// The newest order that the log or the backend knows about an instance.
    pub(super) fn newest_generation(&self, observed: &Observed) -> u64 {
        let ordered = self.home_of(&observed.id).map_or(0, |(_, i)| i.generation);
        observed.generation.max(ordered)
    }

    /// The last word on instances that were ended because Penstock ends.
    pub(super) fn stops(
        &self,
        gone: &BTreeMap<InstanceId, Option<i32>>,
    ) -> BTreeMap<EndpointKey, Vec<Event>> {
        let mut stops = BTreeMap::<EndpointKey, Vec<Event>>::new();
        for (id, code) in gone {
            if let Some(key) = self.homes.get(id) {
                let event = ended(id, STOPPED_WITH_PENSTOCK, *code);
                stops
                    .entry(key.clone())
                    .or_default()
                    .push(Event::InstanceStopped(event));
            }
        }
        stops
    }
}

fn order_about(
    key: &EndpointKey,
    instance: &Instance,
    local: Option<&Local>,
) -> Option<BackendOrder> {
    let kind = instance.spec.backend.clone();
    if let Some(removal) = &instance.removal {
        let is_done = local.is_some_and(is_removed);
        return (!is_done).then(|| BackendOrder::Remove {
            kind,
            id: instance.id.clone(),
            generation: removal.generation,
            grace: removal.grace,
        });
    }
    // What was started before is not started again: it is adopted, or it is lost.
    let is_new = instance.started_at.is_none() && instance.phase != Phase::Failed;
    (is_new && local.is_none()).then(|| BackendOrder::Ensure {
        kind,
        order: Box::new(Order {
            id: instance.id.clone(),
            generation: instance.generation,
            deployment: format!("{}/{}", key.endpoint(), instance.deployment),
            spec: instance.spec.clone(),
        }),
    })
}

fn is_removed(local: &Local) -> bool {
    matches!(local.observed.phase, ObservedPhase::Removed { .. })
}

/// What the log does not know yet of an instance.
fn answers(instance: &Instance, local: Option<&Local>) -> Vec<Event> {
    let id = &instance.id;
    let fails = instance.phase != Phase::Failed && instance.removal.is_none();
    let Some(local) = local else {
        let was_running = instance.started_at.is_some();
        let lost = was_running && fails;
        return Vec::from_iter(lost.then(|| Event::InstanceFailed(ended(id, GONE, None))));
    };
    match &local.observed.phase {
        ObservedPhase::Removed { code } if instance.removal.is_some() => {
            vec![Event::InstanceStopped(ended(id, "removed", *code))]
        }
        ObservedPhase::Exited { code, reason } if fails => {
            vec![Event::InstanceFailed(ended(id, reason, *code))]
        }
        ObservedPhase::Removed { .. } | ObservedPhase::Exited { .. } => Vec::new(),
        _ if !fails => Vec::new(),
        phase => running(instance, local, phase),
    }
}

/// The answers of an instance that runs, up to its present phase.
fn running(instance: &Instance, local: &Local, observed: &ObservedPhase) -> Vec<Event> {
    let mut events = Vec::new();
    let mut phase = instance.phase;
    let unannounced = local.observed.adopted && !local.announced;
    if let Some(address) = &local.observed.address {
        let is_news = instance.started_at.is_none()
            || instance.address.as_ref() != Some(address)
            || instance.pid != local.observed.pid
            || unannounced;
        if is_news {
            events.push(Event::InstanceStarted(InstanceStarted {
                id: instance.id.clone(),
                generation: local.observed.generation,
                address: address.clone(),
                pid: local.observed.pid,
                adopted: local.observed.adopted,
            }));
        }
        if is_news && local.observed.adopted && phase == Phase::Ready {
            // As the fold has it: an adopted instance proves itself again.
            phase = Phase::Unready;
        }
    }
    match observed {
        ObservedPhase::Ready if phase != Phase::Ready => {
            let id = instance.id.clone();
            events.push(Event::InstanceReady(OfInstance { id }));
        }
        ObservedPhase::Unready { reason } if phase == Phase::Ready => {
            events.push(Event::InstanceUnready(InstanceUnready {
                id: instance.id.clone(),
                reason: reason.clone(),
            }));
        }
        _ => {}
    }
    events
}

fn ended(id: &InstanceId, reason: &str, exit_code: Option<i32>) -> InstanceEnded {
    InstanceEnded {
        id: id.clone(),
        reason: reason.to_owned(),
        exit_code,
    }
}
