//! The read models: rows derived from the log, updated row by row.
//!
//! Invariants: rows depend only on the order of records within a bucket, so a rebuild from the log
//! produces the same rows whatever order the buckets were read in; memory is bounded.

mod models;
mod shapes;

use std::collections::{BTreeMap, VecDeque};

use contract::decision::Decision;
use contract::events::{AccessGranted, Event};
use contract::ids::{EndpointKey, InstanceId, Name, Position, Uid};
use contract::log::{Record, RowChange, StreamKind};
use contract::resources::Percentages;
use contract::time::Timestamp;
use contract::views::{
    AccessView, AvailableCondition, AvailableReason, DecisionSummary, DecisionView, DeploymentView,
    InstanceTally,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::available;
use crate::endpoint::{Deployment, Endpoint};
use crate::instances::{InstanceState, Instances};

pub use models::{MODELS, ReadModel};
pub use shapes::{autoscale_view, endpoint_view};
use shapes::{deployment_view, instance_view};

/// Number of ended instances per deployment that stay visible: enough to see how a crash loop went.
pub const ENDED_INSTANCES_MAX: usize = 20;

/// The current state, folded from the log.
#[derive(Clone, Debug, Default)]
pub struct Projection {
    /// The state behind every known endpoint name.
    pub endpoints: BTreeMap<EndpointKey, EndpointModel>,
    /// Access tokens by name, as needed to check a token.
    pub access: BTreeMap<String, Access>,
    /// Deployments whose rows are deferred, and when they last changed; `None` if rows are not
    /// deferred.
    deferred: Option<DeferredRows>,
}

type DeferredRows = BTreeMap<EndpointKey, BTreeMap<Name, Timestamp>>;

/// Version of [`EndpointModel`]. Raise it with any change to what it makes of recorded events or to
/// its serialized form; consumers that snapshot it derive their versions from it.
pub const MODEL_VERSION: u32 = 3;

/// The state behind one endpoint name, across all its incarnations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointModel {
    /// The current incarnation, if there is one.
    pub endpoint: Option<Endpoint>,
    /// Version of the stream `endpoint/…`.
    pub version: u64,
    /// Instances that have not ended.
    pub instances: Instances,
    /// The last decision about each existing deployment.
    pub decided: BTreeMap<Name, LastDecision>,
    /// Position of the last event about the endpoint or its instances: the route's revision.
    pub position: Position,
    /// The condition Available of each deployment, unless it is being deleted.
    available: BTreeMap<Name, Availability>,
    requested: BTreeMap<InstanceId, Position>,
    ended: BTreeMap<Name, VecDeque<InstanceId>>,
}

/// The reason of a deployment's condition Available; its message follows from the instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Availability {
    reason: AvailableReason,
    /// When the reason last changed.
    since: Timestamp,
}

/// The last decision about a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastDecision {
    /// The deployment's incarnation.
    pub deployment_uid: Uid,
    /// Its summary.
    pub summary: DecisionSummary,
}

/// An access token that is valid according to the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it allows, and its hash.
    pub granted: AccessGranted,
    /// Position of the event that granted it.
    pub position: Position,
}

impl Projection {
    /// Creates a projection for folding a history of which only the final rows are needed:
    /// [`apply`](Self::apply) defers the rows of deployments, which nearly every event changes,
    /// until the end.
    pub fn with_deferred_rows() -> Self {
        Self {
            deferred: Some(DeferredRows::new()),
            ..Self::default()
        }
    }

    /// Whether the rows of deployments are deferred.
    pub fn has_deferred_rows(&self) -> bool {
        self.deferred.is_some()
    }

    /// Returns the deferred rows and stops deferring.
    pub fn take_deferred_rows(&mut self) -> Vec<RowChange> {
        let mut changes = Vec::new();
        for (key, names) in self.deferred.take().unwrap_or_default() {
            let Some(model) = self.endpoints.get(&key) else {
                continue;
            };
            for (name, time) in names {
                let mut rows = Rows::at(time, None);
                model.put_deployment_rows(&key, &name, &mut rows);
                changes.append(&mut rows.changes);
            }
        }
        changes
    }

    /// Applies one record and returns the rows that change.
    pub fn apply(&mut self, record: &Record) -> Vec<RowChange> {
        let mut rows = Rows::at(record.time, self.deferred.as_mut());
        change(&mut self.endpoints, &mut self.access, record, &mut rows);
        rows.changes
    }

    /// Applies one record without producing rows.
    pub fn apply_without_rows(&mut self, record: &Record) {
        let mut rows = Rows::discarding();
        change(&mut self.endpoints, &mut self.access, record, &mut rows);
    }

    /// Starts from models that were folded elsewhere.
    pub fn of(endpoints: BTreeMap<EndpointKey, EndpointModel>) -> Self {
        Self {
            endpoints,
            ..Self::default()
        }
    }

    /// The current incarnation behind a name, if there is one.
    pub fn endpoint(&self, key: &EndpointKey) -> Option<&Endpoint> {
        self.endpoints.get(key)?.endpoint.as_ref()
    }
}

fn change(
    endpoints: &mut BTreeMap<EndpointKey, EndpointModel>,
    access: &mut BTreeMap<String, Access>,
    record: &Record,
    rows: &mut Rows,
) {
    match record.endpoint() {
        None => apply_access(access, record, rows),
        Some(key) => {
            let model = endpoints.entry(key.clone()).or_default();
            model.change(&key, record, rows);
        }
    }
}

fn apply_access(tokens: &mut BTreeMap<String, Access>, record: &Record, rows: &mut Rows) {
    match &record.event {
        Event::AccessGranted(granted) => {
            let access = Access {
                granted: granted.clone(),
                position: record.position,
            };
            tokens.insert(granted.name.clone(), access);
            let view = AccessView {
                name: granted.name.clone(),
                role: granted.role,
                expires: granted.expires,
                granted_at: record.time,
                granted_by: record.actor.0.clone(),
            };
            rows.put(
                ReadModel::Access,
                &granted.name,
                RowScope::NONE,
                record.position,
                &view,
            );
        }
        Event::AccessRevoked(revoked) => {
            tokens.remove(&revoked.name);
            rows.delete(
                ReadModel::Access,
                &revoked.name,
                RowScope::NONE,
                record.position,
            );
        }
        _ => {}
    }
}

/// The endpoint and deployment that a row belongs to, for filters.
#[derive(Clone, Copy)]
struct RowScope<'a> {
    endpoint: &'a str,
    deployment: &'a str,
}

impl RowScope<'_> {
    const NONE: RowScope<'static> = RowScope {
        endpoint: "",
        deployment: "",
    };
}

struct Rows<'a> {
    time: Timestamp,
    changes: Vec<RowChange>,
    deferred: Option<&'a mut DeferredRows>,
    /// Whether rows are not produced at all.
    discard: bool,
}

impl<'a> Rows<'a> {
    fn at(time: Timestamp, deferred: Option<&'a mut DeferredRows>) -> Self {
        Self {
            time,
            changes: Vec::new(),
            deferred,
            discard: false,
        }
    }

    /// Collects nothing.
    fn discarding() -> Self {
        Self {
            discard: true,
            ..Self::at(Timestamp::default(), None)
        }
    }

    /// Whether not to produce the rows of this deployment now: they are deferred or discarded.
    fn skips(&mut self, key: &EndpointKey, name: &Name) -> bool {
        if self.discard {
            return true;
        }
        let Some(deferred) = &mut self.deferred else {
            return false;
        };
        match deferred.get_mut(key) {
            Some(names) => match names.get_mut(name) {
                Some(time) => *time = self.time,
                None => {
                    names.insert(name.clone(), self.time);
                }
            },
            None => {
                let names = BTreeMap::from([(name.clone(), self.time)]);
                deferred.insert(key.clone(), names);
            }
        }
        true
    }

    fn put(
        &mut self,
        model: ReadModel,
        key: &str,
        scope: RowScope,
        position: Position,
        view: &impl Serialize,
    ) {
        if self.discard {
            return;
        }
        // Views are trees of plain values, so serializing them cannot fail.
        let doc = serde_json::to_string(view).ok();
        self.change(model, key, scope, position, doc);
    }

    fn delete(&mut self, model: ReadModel, key: &str, scope: RowScope, position: Position) {
        self.change(model, key, scope, position, None);
    }

    fn change(
        &mut self,
        model: ReadModel,
        key: &str,
        scope: RowScope,
        position: Position,
        doc: Option<String>,
    ) {
        if self.discard {
            return;
        }
        self.changes.push(RowChange {
            model: model.name(),
            key: key.to_owned(),
            endpoint: scope.endpoint.to_owned(),
            deployment: scope.deployment.to_owned(),
            position,
            time: self.time,
            doc,
        });
    }
}

impl EndpointModel {
    /// The counts that the last decisions granted, for deployments of this incarnation.
    pub fn granted(&self) -> BTreeMap<Name, u32> {
        let granted = self.decided.iter();
        granted
            .map(|(name, decided)| (name.clone(), decided.summary.granted))
            .collect()
    }

    /// Applies one record and returns the rows that change.
    pub fn apply(&mut self, key: &EndpointKey, record: &Record) -> Vec<RowChange> {
        let mut rows = Rows::at(record.time, None);
        self.change(key, record, &mut rows);
        rows.changes
    }

    /// Applies one record without producing rows.
    pub fn apply_without_rows(&mut self, key: &EndpointKey, record: &Record) {
        self.change(key, record, &mut Rows::discarding());
    }

    fn change(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        match &record.event {
            Event::ScalingDecided(decision) => self.apply_decision(key, decision, record, rows),
            Event::UsageClosed(_) | Event::UsageCorrected(_) | Event::UsageGap(_) => {
                if !rows.discard {
                    put_usage_row(key, record, rows);
                }
            }
            Event::ClockStepped(_) => {}
            _ => self.change_by_stream(key, record, rows),
        }
    }

    fn change_by_stream(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        use StreamKind::{Access, Endpoint, Instances, Members, Node, Parking, Scaling, Usage};
        match record.stream.kind() {
            Some(Endpoint) => self.apply_lifecycle(key, record, rows),
            Some(Instances | Node) => self.apply_instance(key, record, rows),
            Some(Scaling | Usage | Access | Members | Parking) | None => {}
        }
    }

    fn apply_lifecycle(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        let before = self.endpoint.take();
        if let (Event::DeploymentDeleted(of), Some(endpoint)) = (&record.event, &before) {
            self.forget(endpoint, &of.deployment);
        }
        let shares = before.as_ref().map(|endpoint| endpoint.traffic.clone());
        let autoscaled: Vec<Name> = autoscaled(before.as_ref()).cloned().collect();
        let names_before: Vec<Name> = names(before.as_ref()).cloned().collect();
        self.endpoint = Endpoint::apply(before, record);
        self.version = record.version;
        self.position = record.position;
        let current: Vec<Name> = names(self.endpoint.as_ref()).cloned().collect();
        self.available.retain(|name, _| current.contains(name));
        for name in &current {
            self.update_availability(name, record.time);
        }
        self.put_endpoint_row(key, record, rows);
        for name in names_before.iter().filter(|name| !self.has(name)) {
            let scope = RowScope {
                endpoint: key.as_str(),
                deployment: name.as_str(),
            };
            rows.delete(
                ReadModel::Deployments,
                &row_key(key, name),
                scope,
                record.position,
            );
        }
        for name in &autoscaled {
            let gone = self.deployment(name).is_none_or(|d| d.autoscale.is_none());
            if gone {
                let scope = RowScope {
                    endpoint: key.as_str(),
                    deployment: name.as_str(),
                };
                rows.delete(
                    ReadModel::Autoscales,
                    &row_key(key, name),
                    scope,
                    record.position,
                );
            }
        }
        if self.endpoint.is_none() {
            self.delete_ended(key, record, rows);
            return;
        }
        let affected: Vec<Name> = names(self.endpoint.as_ref())
            .filter(|name| self.is_affected(name, record, shares.as_ref()))
            .cloned()
            .collect();
        for name in affected {
            self.put_deployment_rows(key, &name, rows);
        }
    }

    fn has(&self, name: &Name) -> bool {
        self.deployment(name).is_some()
    }

    fn deployment(&self, name: &Name) -> Option<&Deployment> {
        let deployment = self.endpoint.as_ref()?.deployments.get(name);
        deployment.map(Box::as_ref)
    }

    /// Whether this record changed something in the row of a deployment.
    fn is_affected(&self, name: &Name, record: &Record, shares: Option<&Percentages>) -> bool {
        let share = self
            .endpoint
            .as_ref()
            .and_then(|endpoint| endpoint.traffic.get(name));
        let share_before = shares.and_then(|shares| shares.get(name));
        share != share_before
            || self
                .deployment(name)
                .is_some_and(|d| d.position == record.position)
    }

    fn forget(&mut self, endpoint: &Endpoint, name: &Name) {
        self.decided.remove(name);
        if let Some(deployment) = endpoint.deployments.get(name) {
            self.instances.forget(deployment.uid);
            let instances = &self.instances.instances;
            self.requested.retain(|id, _| instances.contains_key(id));
        }
    }

    fn update_availability(&mut self, name: &Name, time: Timestamp) {
        let reason = self
            .deployment(name)
            .and_then(|d| available::reason(d, &self.instances, self.wanted(name)));
        match reason {
            None => drop(self.available.remove(name)),
            Some(reason) => {
                let new = Availability {
                    reason,
                    since: time,
                };
                let availability = self.available.entry(name.clone()).or_insert(new);
                if availability.reason != reason {
                    *availability = new;
                }
            }
        }
    }

    /// The count that the last decision granted, if there was one.
    fn wanted(&self, name: &Name) -> Option<u32> {
        let decided = self.decided.get(name);
        decided.map(|decided| decided.summary.granted)
    }

    fn put_endpoint_row(&self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        let scope = RowScope {
            endpoint: key.as_str(),
            deployment: "",
        };
        let Some(endpoint) = &self.endpoint else {
            rows.delete(ReadModel::Endpoints, key.as_str(), scope, record.position);
            return;
        };
        let view = endpoint_view(endpoint);
        rows.put(
            ReadModel::Endpoints,
            key.as_str(),
            scope,
            endpoint.created,
            &view,
        );
    }

    fn put_deployment_rows(&self, key: &EndpointKey, name: &Name, rows: &mut Rows) {
        if rows.skips(key, name) {
            return;
        }
        let Some(endpoint) = &self.endpoint else {
            return;
        };
        let Some(deployment) = endpoint.deployments.get(name) else {
            return;
        };
        let scope = RowScope {
            endpoint: key.as_str(),
            deployment: name.as_str(),
        };
        let row_key = row_key(key, name);
        let view = self.deployment_view(endpoint, name, deployment);
        rows.put(
            ReadModel::Deployments,
            &row_key,
            scope,
            deployment.created,
            &view,
        );
        let decided = self
            .decided
            .get(name)
            .map(|decided| decided.summary.clone());
        if let Some(view) = autoscale_view(endpoint, name, deployment, decided) {
            rows.put(
                ReadModel::Autoscales,
                &row_key,
                scope,
                deployment.created,
                &view,
            );
        }
    }

    /// The deployment as the API shows it, including its instance counts.
    pub fn deployment_view(
        &self,
        endpoint: &Endpoint,
        name: &Name,
        deployment: &Deployment,
    ) -> DeploymentView {
        let wanted = self.wanted(name);
        let mut tally = InstanceTally {
            wanted,
            ..InstanceTally::default()
        };
        for instance in self.instances.of(deployment.uid) {
            match instance.state() {
                InstanceState::Starting => tally.starting += 1,
                InstanceState::Ready => tally.ready += 1,
                InstanceState::Draining => tally.draining += 1,
                InstanceState::Failed => tally.failed += 1,
                InstanceState::Stopped => {}
            }
        }
        let available = self.available.get(name).map(|availability| {
            let Availability { reason, since } = *availability;
            AvailableCondition {
                status: reason.status(),
                reason,
                message: available::message(deployment, &self.instances, wanted),
                since,
            }
        });
        deployment_view(endpoint, name, deployment, tally, available)
    }

    fn apply_decision(
        &mut self,
        key: &EndpointKey,
        decision: &Decision,
        record: &Record,
        rows: &mut Rows,
    ) {
        let name = &decision.deployment.deployment;
        let scope = RowScope {
            endpoint: key.as_str(),
            deployment: name.as_str(),
        };
        if !rows.discard {
            let view = DecisionView::new(record.id, record.time, decision.clone());
            rows.put(
                ReadModel::Decisions,
                &record.id.to_string(),
                scope,
                record.position,
                &view,
            );
        }
        // A decision about a deleted incarnation says nothing about the current one.
        if self
            .deployment(name)
            .is_none_or(|d| d.uid != decision.deployment_uid)
        {
            return;
        }
        let summary = DecisionSummary {
            id: record.id,
            time: record.time,
            from: decision.from,
            wanted: decision.wanted,
            granted: decision.granted,
            outcome: decision.outcome,
            profile: decision.profile.clone(),
        };
        let decided = LastDecision {
            deployment_uid: decision.deployment_uid,
            summary,
        };
        self.decided.insert(name.clone(), decided);
        self.update_availability(name, record.time);
        self.put_deployment_rows(key, name, rows);
    }

    fn apply_instance(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        let Some(id) = instance_of(&record.event) else {
            return;
        };
        if matches!(record.event, Event::InstanceRequested(_)) {
            self.requested.insert(id.clone(), record.position);
        }
        let before = self.instances.instances.get(id).cloned();
        self.instances.apply(record);
        let after = self.instances.instances.get(id).cloned();
        let Some(instance) = after.as_ref().or(before.as_ref()) else {
            return;
        };
        self.position = record.position;
        let name = instance.deployment.clone();
        if !rows.discard {
            let end = match &record.event {
                Event::InstanceStopped(ended) | Event::InstanceFailed(ended) => Some(ended),
                _ => None,
            };
            let scope = RowScope {
                endpoint: key.as_str(),
                deployment: name.as_str(),
            };
            let end = end.map(|end| (end, record.time));
            let view = instance_view(key, instance, after.is_none(), end);
            let position = self.requested.get(id).copied().unwrap_or(record.position);
            rows.put(ReadModel::Instances, id.as_str(), scope, position, &view);
        }
        if after.is_none() {
            self.requested.remove(id);
            self.keep_ended(key, &name, id, record, rows);
        }
        self.update_availability(&name, record.time);
        self.put_deployment_rows(key, &name, rows);
    }

    /// Records an ended instance and deletes the oldest beyond the limit.
    fn keep_ended(
        &mut self,
        key: &EndpointKey,
        name: &Name,
        id: &InstanceId,
        record: &Record,
        rows: &mut Rows,
    ) {
        let ended = self.ended.entry(name.clone()).or_default();
        ended.push_back(id.clone());
        if ended.len() <= ENDED_INSTANCES_MAX {
            return;
        }
        if let Some(oldest) = ended.pop_front() {
            let scope = RowScope {
                endpoint: key.as_str(),
                deployment: name.as_str(),
            };
            rows.delete(
                ReadModel::Instances,
                oldest.as_str(),
                scope,
                record.position,
            );
        }
    }

    fn delete_ended(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        for (name, ended) in std::mem::take(&mut self.ended) {
            let scope = RowScope {
                endpoint: key.as_str(),
                deployment: name.as_str(),
            };
            for id in ended {
                rows.delete(ReadModel::Instances, id.as_str(), scope, record.position);
            }
        }
    }
}

fn names(endpoint: Option<&Endpoint>) -> impl Iterator<Item = &Name> {
    endpoint
        .into_iter()
        .flat_map(|endpoint| endpoint.deployments.keys())
}

fn autoscaled(endpoint: Option<&Endpoint>) -> impl Iterator<Item = &Name> {
    let deployments = endpoint
        .into_iter()
        .flat_map(|endpoint| &endpoint.deployments);
    deployments
        .filter(|(_, d)| d.autoscale.is_some())
        .map(|(name, _)| name)
}

/// `workspace/endpoint/deployment`.
pub fn row_key(endpoint: &EndpointKey, deployment: &Name) -> String {
    format!("{endpoint}/{deployment}")
}

/// Adds one row per event: closed minutes, corrections and gaps, as written.
fn put_usage_row(key: &EndpointKey, record: &Record, rows: &mut Rows) {
    let deployment = match &record.event {
        Event::UsageClosed(minute) | Event::UsageCorrected(minute) => minute.deployment.as_str(),
        _ => "",
    };
    let mut view = json!({
        "id": record.id,
        "time": record.time,
        "type": record.event.type_name(),
        "endpoint": key.endpoint(),
    });
    // Moved, not copied: there are more of these than of all others.
    view["data"] = record.event.data().unwrap_or_default();
    let scope = RowScope {
        endpoint: key.as_str(),
        deployment,
    };
    rows.put(
        ReadModel::Usage,
        &record.id.to_string(),
        scope,
        record.position,
        &view,
    );
}

/// The instance that an event is about.
fn instance_of(event: &Event) -> Option<&InstanceId> {
    Some(match event {
        Event::InstanceRequested(event) => &event.id,
        Event::InstanceStarted(event) => &event.id,
        Event::InstanceStarting(event) => &event.id,
        Event::InstanceReady(event) => &event.id,
        Event::InstanceUnready(event) => &event.id,
        Event::InstanceUnhealthy(event) => &event.id,
        Event::InstanceFailed(event) | Event::InstanceStopped(event) => &event.id,
        Event::InstanceDraining(event) => &event.id,
        Event::InstanceRemovalRequested(event) => &event.id,
        _ => return None,
    })
}
