//! The simulation of an endpoint: the actions of people, load and instances, and the engines' reactions.

mod instances;
mod load;
mod people;

use std::collections::{BTreeMap, BTreeSet};

use contract::decision::{CarriedState, Decision, InstanceCounts};
use contract::events::Event;
use contract::ids::{DeploymentRef, EndpointKey, InstanceId, Name, Uid};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::resources::ProvisioningState;
use contract::time::{Span, Timestamp};
use domain::autoscale::{Policy, Selection, TickInputs, carry, evaluate, explain, should_explain};
use domain::endpoint::Deployment;
use domain::fold::EndpointFold;
use domain::instances::plan::{PlanContext, plan};
use domain::settle::settle;
use runtime::ids::Ids;

use self::load::Session;
use self::people::Change;
use crate::documents::{EndpointShape, Green};
use crate::installation::SharedState;

/// A scheduled action on an endpoint.
#[derive(Clone, Debug)]
pub enum Task {
    /// A user applies the documents.
    Create,
    /// A load session starts.
    BeginLoad,
    Evaluate,
    /// A minute of usage ends.
    CloseMinute,
    /// A user changes something.
    Change(Change),
    /// A timer of the planner or the endpoint lifecycle expires.
    Wake,
    Started(InstanceId),
    Ready(InstanceId),
    Failed(InstanceId),
    Unready(InstanceId),
    /// Gateways have drained the instance.
    Drained(InstanceId),
    Stopped(InstanceId),
}

impl Task {
    /// Whether the task completes something that has begun.
    pub fn is_completion(&self) -> bool {
        match self {
            Self::Wake
            | Self::Started(_)
            | Self::Ready(_)
            | Self::Failed(_)
            | Self::Drained(_)
            | Self::Stopped(_) => true,
            Self::Create
            | Self::BeginLoad
            | Self::Evaluate
            | Self::CloseMinute
            | Self::Change(_)
            | Self::Unready(_) => false,
        }
    }
}

/// Follow-up tasks with their times.
pub type FollowUps = Vec<(Timestamp, Task)>;

pub struct Endpoint {
    name: Name,
    key: EndpointKey,
    rng: fastrand::Rng,
    shape: EndpointShape,
    /// Number of changes by users.
    revision: u64,
    fold: EndpointFold,
    evaluations: BTreeMap<Uid, EvaluationState>,
    session: Option<Session>,
    /// Instances that gateways have drained.
    drained: BTreeSet<InstanceId>,
    /// Time of the next evaluation.
    evaluated_at: Option<Timestamp>,
    /// Time of the next load session.
    begins_at: Timestamp,
    /// Whether no usage has been checked yet.
    is_first_minute: bool,
}

/// The running evaluation of one deployment, as the autoscaler keeps it.
#[derive(Default)]
struct EvaluationState {
    compiled: Option<(u64, Policy)>,
    carried: CarriedState,
    selection: Option<Selection>,
    last: Option<Decision>,
}

impl Endpoint {
    pub fn new(index: usize, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        // The first endpoint has no key and is otherwise simple, for probes.
        let shape = match index {
            0 => EndpointShape {
                has_key: false,
                green: Green::None,
                policy: Some(0),
            },
            _ => EndpointShape::draw(&mut rng),
        };
        let name = name(&format!("e-{index:05}"));
        Self {
            key: EndpointKey::new(&name),
            name,
            rng,
            shape,
            revision: 0,
            fold: EndpointFold::default(),
            evaluations: BTreeMap::new(),
            session: None,
            drained: BTreeSet::new(),
            evaluated_at: None,
            begins_at: Timestamp::default(),
            is_first_minute: index == 0,
        }
    }

    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Number of existing instances.
    pub fn instances(&self) -> usize {
        self.fold.instances.instances.len()
    }

    /// Whether the granted instances are ready, and no engine has anything to write.
    pub fn is_settled(&self, now: Timestamp, shared: &SharedState) -> bool {
        let deployments = self.fold.endpoint.iter().flat_map(|e| &e.deployments);
        let mut counts = deployments.map(|(_, deployment)| {
            let granted = self.fold.granted.get(&deployment.uid);
            (
                granted.map_or(0, |granted| granted.instances),
                self.counts(deployment.uid),
            )
        });
        let are_there =
            counts.all(|(granted, counts)| (granted, 0) == (counts.ready, counts.pending));
        are_there && self.planned(now, shared).is_empty() && self.settled(now, shared).is_empty()
    }

    pub fn perform(
        &mut self,
        task: Task,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<FollowUps> {
        let mut follow_ups = FollowUps::new();
        let may_back_off = matches!(task, Task::Failed(_) | Task::Stopped(_));
        match task {
            Task::Create => self.create(now, shared, &mut follow_ups)?,
            Task::BeginLoad => self.begin(now, &mut follow_ups),
            Task::Evaluate => self.evaluate(now, shared, &mut follow_ups)?,
            Task::CloseMinute => self.close_minute(now, shared, &mut follow_ups)?,
            Task::Change(change) => self.change(change, now, shared)?,
            Task::Wake => {}
            Task::Drained(id) => {
                self.drained.insert(id);
            }
            Task::Started(id) => self.started(id, now, shared)?,
            Task::Ready(id) => self.ready(id, now, shared)?,
            Task::Failed(id) => self.failed(id, now, shared)?,
            Task::Unready(id) => self.unready(id, now, shared, &mut follow_ups)?,
            Task::Stopped(id) => self.stopped(id, now, shared)?,
        }
        self.run_engines(now, shared, &mut follow_ups)?;
        if may_back_off {
            self.back_off(now, &mut follow_ups);
        }
        Ok(follow_ups)
    }

    fn append(
        &mut self,
        kind: StreamKind,
        actor: &Actor,
        now: Timestamp,
        event: Event,
        shared: &mut SharedState,
    ) -> anyhow::Result<Record> {
        let stream = match kind {
            StreamKind::Node => StreamName::of_node(&self.key, &shared.node),
            kind => StreamName::of(kind, &self.key),
        };
        let record = shared.log.append(&stream, now, actor, event)?;
        self.fold.apply(&record);
        Ok(record)
    }

    /// Runs the planner and the endpoint lifecycle until neither has anything to write.
    fn run_engines(
        &mut self,
        now: Timestamp,
        shared: &mut SharedState,
        follow_ups: &mut FollowUps,
    ) -> anyhow::Result<()> {
        loop {
            let mut events = self.planned(now, shared);
            let mut written_by = (StreamKind::Instances, Actor::service("actuator"));
            if events.is_empty() {
                events = self.settled(now, shared);
                written_by = (StreamKind::Endpoint, Actor::service("control"));
            }
            if events.is_empty() {
                return Ok(());
            }
            let (kind, actor) = written_by;
            for event in events {
                self.schedule_node_reports(&event, now, follow_ups);
                let gone = matches!(event, Event::EndpointDeleted(_));
                self.append(kind, &actor, now, event, shared)?;
                if gone {
                    self.reset();
                    let hours = self.rng.u64(1..12);
                    let again = now + Span::from_secs(hours * 3600);
                    follow_ups.push((again, Task::Create));
                }
            }
        }
    }

    fn planned(&self, now: Timestamp, shared: &SharedState) -> Vec<Event> {
        let context = PlanContext {
            granted: &self.fold.granted,
            drained: &|instance| self.drained.contains(&instance.id),
            members: &shared.members,
            own_node: Some(shared.node.as_str()),
            is_only_node: false,
            now,
        };
        plan(
            &self.name,
            self.fold.endpoint.as_ref(),
            &self.fold.instances,
            &context,
            &mut || shared.log.ids.uid(),
        )
    }

    fn settled(&self, now: Timestamp, shared: &SharedState) -> Vec<Event> {
        let Some(endpoint) = &self.fold.endpoint else {
            return Vec::new();
        };
        let granted = endpoint
            .deployments
            .iter()
            .filter_map(|(name, deployment)| {
                let granted = self.fold.granted.get(&deployment.uid)?;
                Some((name.clone(), granted.instances))
            });
        let granted = granted.collect();
        settle(
            endpoint,
            &self.fold.instances,
            &granted,
            &shared.members,
            now,
        )
    }

    fn reset(&mut self) {
        self.evaluations.clear();
        self.drained.clear();
        self.session = None;
        self.evaluated_at = None;
    }

    /// Evaluates all deployments, and schedules the next evaluation.
    fn evaluate(
        &mut self,
        now: Timestamp,
        shared: &mut SharedState,
        follow_ups: &mut FollowUps,
    ) -> anyhow::Result<()> {
        let Some(endpoint) = &self.fold.endpoint else {
            return Ok(());
        };
        if endpoint.state == ProvisioningState::Deleting {
            return Ok(());
        }
        let deployments = endpoint.deployments.clone();
        self.evaluated_at = self.evaluated_at.filter(|at| *at > now);
        let mut is_stable = true;
        for (deployment_name, deployment) in &deployments {
            let decision = self.decide(deployment_name, deployment, now, shared)?;
            is_stable &= decision.is_none();
            if let Some(decision) = decision {
                let event = Event::ScalingDecided(Box::new(decision));
                let actor = Actor::service("autoscaler");
                self.append(StreamKind::Scaling, &actor, now, event, shared)?;
            }
        }
        self.schedule_evaluation(is_stable, now, follow_ups);
        Ok(())
    }

    /// The decision to record, if any.
    fn decide(
        &mut self,
        deployment_name: &Name,
        deployment: &Deployment,
        now: Timestamp,
        shared: &SharedState,
    ) -> anyhow::Result<Option<Decision>> {
        let uid = deployment.uid;
        let instances = self.counts(uid);
        let load = self.load(deployment_name, now);
        let rng = &mut self.rng;
        let state = self.evaluations.entry(uid).or_default();
        state.compile(deployment, shared)?;
        let policy = state.compiled.as_ref().map(|(_, policy)| policy);
        let specs = policy.map_or(&[][..], Policy::signals);
        let signals = specs.iter();
        let signals: Vec<_> = signals
            .map(|spec| Some(load::signal(spec, load, instances.ready, rng)))
            .collect();
        let tick = TickInputs {
            pinned_by: None,
            failed_starts: None,
            starts_at_default: false,
            policy_revision: state.compiled.as_ref().map_or(0, |(revision, _)| *revision),
            fixed_instances: deployment.spec.instances,
            pin: deployment.pin,
            pause: deployment.pause,
            instances,
            signals: &signals,
            carried: &state.carried,
            selection: state.selection,
        };
        let evaluation = evaluate(policy, &tick, now);
        let should_record = should_explain(state.last.as_ref(), policy, &tick, &evaluation);
        let of = DeploymentRef {
            endpoint: self.name.clone(),
            deployment: deployment_name.clone(),
        };
        let decision = should_record.then(|| explain(&of, uid, policy, &tick, now));
        carry(&mut state.carried, policy, &evaluation, now);
        state.selection = evaluation.selection;
        if decision.is_some() {
            state.last.clone_from(&decision);
        }
        Ok(decision)
    }

    fn counts(&self, uid: Uid) -> InstanceCounts {
        let mut counts = InstanceCounts::default();
        for instance in self.fold.instances.of(uid).filter(|i| i.is_kept()) {
            match instance.is_ready() {
                true => counts.ready += 1,
                false => counts.pending += 1,
            }
        }
        counts
    }
}

impl EvaluationState {
    fn compile(&mut self, deployment: &Deployment, shared: &SharedState) -> anyhow::Result<()> {
        let Some(autoscale) = &deployment.autoscale else {
            self.compiled = None;
            return Ok(());
        };
        if self
            .compiled
            .as_ref()
            .is_some_and(|(known, _)| *known == autoscale.revision)
        {
            return Ok(());
        }
        let policy = Policy::compile(&autoscale.spec, &shared.zones);
        let policy = policy.map_err(|findings| anyhow::anyhow!("a policy: {findings:?}"))?;
        self.compiled = Some((autoscale.revision, policy));
        self.selection = None;
        Ok(())
    }
}

#[expect(clippy::unwrap_used, reason = "literal names")]
fn name(text: &str) -> Name {
    text.parse().unwrap()
}
