//! The read models: rows that follow from the log, one change of a row at a time.
//!
//! Invariants: rows depend only on the order of records within a bucket, so a rebuild from the log
//! gives the same rows whatever order buckets were read in; nothing is remembered without bound.

mod models;
mod shapes;

use std::collections::{BTreeMap, VecDeque};

use contract::decision::Decision;
use contract::events::{AccessGranted, Event};
use contract::ids::{EndpointKey, InstanceId, Name, Position, Uid};
use contract::log::{Record, RowChange, StreamKind};
use contract::resources::{
    AccessView, DecisionSummary, DecisionView, DeploymentView, InstanceTally, Percentages,
};
use contract::time::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::endpoint::{Deployment, Endpoint};
use crate::instances::{InstanceState, Instances};

pub use models::{MODELS, ReadModel};
pub use shapes::{autoscale_view, endpoint_view};
use shapes::{deployment_view, instance_view};

/// Instances that are over stay visible, the last ones of each deployment: enough to see how a crash
/// loop went.
pub const ENDED_INSTANCES_MAX: usize = 20;

/// Everything that is known now, folded from the log.
#[derive(Clone, Debug, Default)]
pub struct Projection {
    /// Every endpoint of which anything is known.
    pub endpoints: BTreeMap<EndpointKey, EndpointModel>,
    /// By name; what is needed to check a token.
    pub access: BTreeMap<String, Access>,
    /// Deployments whose rows are wanted at the end only, and when they last changed.
    late: Option<Late>,
}

type Late = BTreeMap<EndpointKey, BTreeMap<Name, Timestamp>>;

/// Changed together with whatever changes what [`EndpointModel`] makes of recorded events, or how it is
/// written: consumers that keep it in snapshots build their versions on it.
pub const MODEL_VERSION: u32 = 1;

/// One endpoint's name, over all its incarnations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointModel {
    /// Its present incarnation, if there is one.
    pub endpoint: Option<Endpoint>,
    /// Version of the stream `endpoint/…`.
    pub version: u64,
    /// Its instances that are not over.
    pub instances: Instances,
    /// The last decision about each deployment that exists.
    pub decided: BTreeMap<Name, Decided>,
    /// Position of the last event about the endpoint or its instances: the route's revision.
    pub position: Position,
    requested: BTreeMap<InstanceId, Position>,
    ended: BTreeMap<Name, VecDeque<InstanceId>>,
}

/// The last decision about a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decided {
    /// About which incarnation.
    pub deployment_uid: Uid,
    /// What it says.
    pub summary: DecisionSummary,
}

/// A token that is valid, as far as the log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it allows, and the hash that it is known by.
    pub granted: AccessGranted,
    /// Of the event that granted it.
    pub position: Position,
}

impl Projection {
    /// For folding a history of which only the rows at its end are wanted: [`apply`](Self::apply)
    /// leaves those of deployments, which nearly every event changes, for [`late_rows`](Self::late_rows).
    pub fn with_late_rows() -> Self {
        Self {
            late: Some(Late::new()),
            ..Self::default()
        }
    }

    /// Whether rows of deployments are left for the end.
    pub fn has_late_rows(&self) -> bool {
        self.late.is_some()
    }

    /// The rows that were left for the end.
    pub fn late_rows(&mut self) -> Vec<RowChange> {
        let mut changes = Vec::new();
        for (key, names) in self.late.take().unwrap_or_default() {
            let Some(model) = self.endpoints.get(&key) else {
                continue;
            };
            for (name, time) in names {
                let mut rows = Rows::at(time, None);
                model.deployment_rows(&key, &name, &mut rows);
                changes.append(&mut rows.changes);
            }
        }
        changes
    }

    /// Takes in one record, and says which rows change.
    pub fn apply(&mut self, record: &Record) -> Vec<RowChange> {
        let mut rows = Rows::at(record.time, self.late.as_mut());
        change(&mut self.endpoints, &mut self.access, record, &mut rows);
        rows.changes
    }

    /// Takes in one record whose rows nobody wants.
    pub fn apply_silently(&mut self, record: &Record) {
        let mut rows = Rows::unwanted();
        change(&mut self.endpoints, &mut self.access, record, &mut rows);
    }

    /// Goes on from models that others have folded.
    pub fn of(endpoints: BTreeMap<EndpointKey, EndpointModel>) -> Self {
        Self {
            endpoints,
            ..Self::default()
        }
    }

    /// The present incarnation of this name, if there is one.
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

fn apply_access(known: &mut BTreeMap<String, Access>, record: &Record, rows: &mut Rows) {
    match &record.event {
        Event::AccessGranted(granted) => {
            let access = Access {
                granted: granted.clone(),
                position: record.position,
            };
            known.insert(granted.name.clone(), access);
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
                Of::NOTHING,
                record.position,
                &view,
            );
        }
        Event::AccessRevoked(revoked) => {
            known.remove(&revoked.name);
            rows.delete(
                ReadModel::Access,
                &revoked.name,
                Of::NOTHING,
                record.position,
            );
        }
        _ => {}
    }
}

/// What a row belongs to, for filters.
#[derive(Clone, Copy)]
struct Of<'a> {
    endpoint: &'a str,
    deployment: &'a str,
}

impl Of<'_> {
    const NOTHING: Of<'static> = Of {
        endpoint: "",
        deployment: "",
    };
}

struct Rows<'a> {
    time: Timestamp,
    changes: Vec<RowChange>,
    late: Option<&'a mut Late>,
    /// Nobody wants them: they are not made.
    unwanted: bool,
}

impl<'a> Rows<'a> {
    fn at(time: Timestamp, late: Option<&'a mut Late>) -> Self {
        Self {
            time,
            changes: Vec::new(),
            late,
            unwanted: false,
        }
    }

    /// For a record whose rows nobody wants.
    fn unwanted() -> Self {
        Self {
            unwanted: true,
            ..Self::at(Timestamp::default(), None)
        }
    }

    /// Whether the rows of this deployment are left for the end, or are not wanted at all.
    fn leaves(&mut self, key: &EndpointKey, name: &Name) -> bool {
        if self.unwanted {
            return true;
        }
        let Some(late) = &mut self.late else {
            return false;
        };
        match late.get_mut(key) {
            Some(names) => match names.get_mut(name) {
                Some(time) => *time = self.time,
                None => {
                    names.insert(name.clone(), self.time);
                }
            },
            None => {
                let names = BTreeMap::from([(name.clone(), self.time)]);
                late.insert(key.clone(), names);
            }
        }
        true
    }

    fn put(
        &mut self,
        model: ReadModel,
        key: &str,
        of: Of,
        position: Position,
        view: &impl Serialize,
    ) {
        if self.unwanted {
            return;
        }
        // Views are trees of plain values; writing them as JSON cannot fail.
        let doc = serde_json::to_string(view).ok();
        self.change(model, key, of, position, doc);
    }

    fn delete(&mut self, model: ReadModel, key: &str, of: Of, position: Position) {
        self.change(model, key, of, position, None);
    }

    fn change(
        &mut self,
        model: ReadModel,
        key: &str,
        of: Of,
        position: Position,
        doc: Option<String>,
    ) {
        if self.unwanted {
            return;
        }
        self.changes.push(RowChange {
            model: model.name(),
            key: key.to_owned(),
            endpoint: of.endpoint.to_owned(),
            deployment: of.deployment.to_owned(),
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

    /// Applies one record, and says which rows change.
    pub fn apply(&mut self, key: &EndpointKey, record: &Record) -> Vec<RowChange> {
        let mut rows = Rows::at(record.time, None);
        self.change(key, record, &mut rows);
        rows.changes
    }

    /// Applies one record whose rows nobody wants.
    pub fn apply_silently(&mut self, key: &EndpointKey, record: &Record) {
        self.change(key, record, &mut Rows::unwanted());
    }

    fn change(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        match &record.event {
            Event::ScalingDecided(decision) => self.decision(key, decision, record, rows),
            Event::UsageClosed(_) | Event::UsageCorrected(_) | Event::UsageGap(_) => {
                if !rows.unwanted {
                    usage(key, record, rows);
                }
            }
            Event::ClockStepped(_) => {}
            _ => self.change_by_stream(key, record, rows),
        }
    }

    fn change_by_stream(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        use StreamKind::{Access, Endpoint, Instances, Members, Node, Parking, Scaling, Usage};
        match record.stream.kind() {
            Some(Endpoint) => self.lifecycle(key, record, rows),
            Some(Instances | Node) => self.instance(key, record, rows),
            Some(Scaling | Usage | Access | Members | Parking) | None => {}
        }
    }

    fn lifecycle(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        let before = self.endpoint.take();
        if let (Event::DeploymentDeleted(of), Some(endpoint)) = (&record.event, &before) {
            self.forget(endpoint, &of.deployment);
        }
        let shares = before.as_ref().map(|endpoint| endpoint.traffic.clone());
        let autoscaled: Vec<Name> = autoscaled(before.as_ref()).cloned().collect();
        let known: Vec<Name> = names(before.as_ref()).cloned().collect();
        self.endpoint = Endpoint::apply(before, record);
        self.version = record.version;
        self.position = record.position;
        self.endpoint_row(key, record, rows);
        for name in known.iter().filter(|name| !self.has(name)) {
            let of = Of {
                endpoint: key.as_str(),
                deployment: name.as_str(),
            };
            rows.delete(
                ReadModel::Deployments,
                &row_key(key, name),
                of,
                record.position,
            );
        }
        for name in &autoscaled {
            let gone = self.deployment(name).is_none_or(|d| d.autoscale.is_none());
            if gone {
                let of = Of {
                    endpoint: key.as_str(),
                    deployment: name.as_str(),
                };
                rows.delete(
                    ReadModel::Autoscales,
                    &row_key(key, name),
                    of,
                    record.position,
                );
            }
        }
        if self.endpoint.is_none() {
            self.drop_ended(key, record, rows);
            return;
        }
        let touched: Vec<Name> = names(self.endpoint.as_ref())
            .filter(|name| self.is_touched(name, record, shares.as_ref()))
            .cloned()
            .collect();
        for name in touched {
            self.deployment_rows(key, &name, rows);
        }
    }

    fn has(&self, name: &Name) -> bool {
        self.deployment(name).is_some()
    }

    fn deployment(&self, name: &Name) -> Option<&Deployment> {
        self.endpoint.as_ref()?.deployments.get(name)
    }

    /// Whether the row of a deployment shows something that this record changed.
    fn is_touched(&self, name: &Name, record: &Record, shares: Option<&Percentages>) -> bool {
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

    fn endpoint_row(&self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        let of = Of {
            endpoint: key.as_str(),
            deployment: "",
        };
        let Some(endpoint) = &self.endpoint else {
            rows.delete(ReadModel::Endpoints, key.as_str(), of, record.position);
            return;
        };
        let view = endpoint_view(endpoint);
        rows.put(
            ReadModel::Endpoints,
            key.as_str(),
            of,
            endpoint.created,
            &view,
        );
    }

    fn deployment_rows(&self, key: &EndpointKey, name: &Name, rows: &mut Rows) {
        if rows.leaves(key, name) {
            return;
        }
        let Some(endpoint) = &self.endpoint else {
            return;
        };
        let Some(deployment) = endpoint.deployments.get(name) else {
            return;
        };
        let of = Of {
            endpoint: key.as_str(),
            deployment: name.as_str(),
        };
        let row_key = row_key(key, name);
        let view = self.deployment_view(endpoint, name, deployment);
        rows.put(
            ReadModel::Deployments,
            &row_key,
            of,
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
                of,
                deployment.created,
                &view,
            );
        }
    }

    /// The deployment as the API shows it, with its instances counted.
    pub fn deployment_view(
        &self,
        endpoint: &Endpoint,
        name: &Name,
        deployment: &Deployment,
    ) -> DeploymentView {
        let wanted = self
            .decided
            .get(name)
            .map(|decided| decided.summary.granted);
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
        deployment_view(endpoint, name, deployment, tally)
    }

    fn decision(
        &mut self,
        key: &EndpointKey,
        decision: &Decision,
        record: &Record,
        rows: &mut Rows,
    ) {
        let name = &decision.deployment.deployment;
        let of = Of {
            endpoint: key.as_str(),
            deployment: name.as_str(),
        };
        if !rows.unwanted {
            let view = DecisionView::new(record.id, record.time, decision.clone());
            rows.put(
                ReadModel::Decisions,
                &record.id.to_string(),
                of,
                record.position,
                &view,
            );
        }
        // What belongs to an incarnation that is gone says nothing about the present one.
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
        let decided = Decided {
            deployment_uid: decision.deployment_uid,
            summary,
        };
        self.decided.insert(name.clone(), decided);
        self.deployment_rows(key, name, rows);
    }

    fn instance(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
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
        if !rows.unwanted {
            let end = match &record.event {
                Event::InstanceStopped(ended) | Event::InstanceFailed(ended) => Some(ended),
                _ => None,
            };
            let of = Of {
                endpoint: key.as_str(),
                deployment: name.as_str(),
            };
            let end = end.map(|end| (end, record.time));
            let view = instance_view(key, instance, after.is_none(), end);
            let position = self.requested.get(id).copied().unwrap_or(record.position);
            rows.put(ReadModel::Instances, id.as_str(), of, position, &view);
        }
        if after.is_none() {
            self.requested.remove(id);
            self.keep_ended(key, &name, id, record, rows);
        }
        self.deployment_rows(key, &name, rows);
    }

    /// Remembers an instance that is over, and forgets the oldest past the limit.
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
            let of = Of {
                endpoint: key.as_str(),
                deployment: name.as_str(),
            };
            rows.delete(ReadModel::Instances, oldest.as_str(), of, record.position);
        }
    }

    fn drop_ended(&mut self, key: &EndpointKey, record: &Record, rows: &mut Rows) {
        for (name, ended) in std::mem::take(&mut self.ended) {
            let of = Of {
                endpoint: key.as_str(),
                deployment: name.as_str(),
            };
            for id in ended {
                rows.delete(ReadModel::Instances, id.as_str(), of, record.position);
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

/// One row for each event: closed minutes, corrections and gaps, as they were written.
fn usage(key: &EndpointKey, record: &Record, rows: &mut Rows) {
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
    // Moved and not copied: there are more of these than of all others.
    view["data"] = record.event.data().unwrap_or_default();
    let of = Of {
        endpoint: key.as_str(),
        deployment,
    };
    rows.put(
        ReadModel::Usage,
        &record.id.to_string(),
        of,
        record.position,
        &view,
    );
}

/// The instance that an event is about.
fn instance_of(event: &Event) -> Option<&InstanceId> {
    Some(match event {
        Event::InstanceRequested(event) => &event.id,
        Event::InstanceStarted(event) => &event.id,
        Event::InstanceReady(event) => &event.id,
        Event::InstanceUnready(event) => &event.id,
        Event::InstanceFailed(event) | Event::InstanceStopped(event) => &event.id,
        Event::InstanceDraining(event) => &event.id,
        Event::InstanceRemovalRequested(event) => &event.id,
        _ => return None,
    })
}
