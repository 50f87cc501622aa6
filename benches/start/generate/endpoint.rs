//! One endpoint's life: what people, load and instances do, and what the engines make of it.

mod instances;
mod load;
mod people;

use std::collections::{BTreeMap, BTreeSet};

use contract::decision::{Carried, Decision, InstanceCounts};
use contract::events::Event;
use contract::ids::{DeploymentRef, EndpointKey, InstanceId, Name, Uid};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::resources::ProvisioningState;
use contract::time::{Span, Timestamp};
use domain::autoscale::{Policy, Selection, TickInputs, carry, evaluate, explain, should_explain};
use domain::endpoint::Deployment;
use domain::endpoint::settle::settle;
use domain::fold::EndpointFold;
use domain::instances::plan::{Context as PlanContext, plan};
use runtime::ids::Ids;

use self::load::Session;
use self::people::Change;
use crate::documents::{Green, Shape};
use crate::house::Ground;

/// What happens next to an endpoint.
#[derive(Clone, Debug)]
pub enum Task {
    /// People apply its documents.
    Create,
    /// Load comes.
    Begin,
    Evaluate,
    /// A minute of usage is over.
    CloseMinute,
    /// People change something.
    Change(Change),
    /// Time has passed that planner or reactor wait for.
    Look,
    Started(InstanceId),
    Ready(InstanceId),
    Failed(InstanceId),
    Unready(InstanceId),
    /// Gateways have let go of it.
    Drained(InstanceId),
    Stopped(InstanceId),
}

impl Task {
    /// Whether it ends something that has begun.
    pub fn is_under_way(&self) -> bool {
        match self {
            Self::Look
            | Self::Started(_)
            | Self::Ready(_)
            | Self::Failed(_)
            | Self::Drained(_)
            | Self::Stopped(_) => true,
            Self::Create
            | Self::Begin
            | Self::Evaluate
            | Self::CloseMinute
            | Self::Change(_)
            | Self::Unready(_) => false,
        }
    }
}

/// What follows, and when.
pub type Followed = Vec<(Timestamp, Task)>;

pub struct Endpoint {
    name: Name,
    key: EndpointKey,
    rng: fastrand::Rng,
    shape: Shape,
    /// Counts what people have changed.
    revision: u64,
    fold: EndpointFold,
    watched: BTreeMap<Uid, Watched>,
    session: Option<Session>,
    /// Instances that gateways have let go of.
    drained: BTreeSet<InstanceId>,
    /// When it is evaluated next.
    evaluated_at: Option<Timestamp>,
    /// When load comes next.
    begins_at: Timestamp,
    /// No usage has been checked yet.
    is_first_minute: bool,
}

/// The running evaluation of one deployment, as the autoscaler keeps it.
#[derive(Default)]
struct Watched {
    compiled: Option<(u64, Policy)>,
    carried: Carried,
    selection: Option<Selection>,
    last: Option<Decision>,
}

impl Endpoint {
    pub fn new(index: usize, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        // The first one lets anybody in and stands on its own, for probes.
        let shape = match index {
            0 => Shape {
                has_key: false,
                green: Green::None,
                policy: Some(0),
            },
            _ => Shape::draw(&mut rng),
        };
        let name = name(&format!("e-{index:05}"));
        Self {
            key: EndpointKey::new(&name),
            name,
            rng,
            shape,
            revision: 0,
            fold: EndpointFold::default(),
            watched: BTreeMap::new(),
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

    /// Instances that are there.
    pub fn instances(&self) -> usize {
        self.fold.instances.instances.len()
    }

    /// Whether what is granted is there, and nobody has anything to say.
    pub fn is_at_rest(&self, now: Timestamp, ground: &Ground) -> bool {
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
        are_there && self.planned(now, ground).is_empty() && self.settled(now, ground).is_empty()
    }

    pub fn perform(
        &mut self,
        task: Task,
        now: Timestamp,
        ground: &mut Ground,
    ) -> anyhow::Result<Followed> {
        let mut followed = Followed::new();
        let may_back_off = matches!(task, Task::Failed(_) | Task::Stopped(_));
        match task {
            Task::Create => self.create(now, ground, &mut followed)?,
            Task::Begin => self.begin(now, &mut followed),
            Task::Evaluate => self.evaluate(now, ground, &mut followed)?,
            Task::CloseMinute => self.close_minute(now, ground, &mut followed)?,
            Task::Change(change) => self.change(change, now, ground)?,
            Task::Look => {}
            Task::Drained(id) => {
                self.drained.insert(id);
            }
            Task::Started(id) => self.started(id, now, ground)?,
            Task::Ready(id) => self.ready(id, now, ground)?,
            Task::Failed(id) => self.failed(id, now, ground)?,
            Task::Unready(id) => self.unready(id, now, ground, &mut followed)?,
            Task::Stopped(id) => self.stopped(id, now, ground)?,
        }
        self.react(now, ground, &mut followed)?;
        if may_back_off {
            self.back_off(now, &mut followed);
        }
        Ok(followed)
    }

    fn append(
        &mut self,
        kind: StreamKind,
        actor: &Actor,
        now: Timestamp,
        event: Event,
        ground: &mut Ground,
    ) -> anyhow::Result<Record> {
        let stream = match kind {
            StreamKind::Node => StreamName::of_node(&self.key, &ground.node),
            kind => StreamName::of(kind, &self.key),
        };
        let record = ground.log.append(&stream, now, actor, event)?;
        self.fold.apply(&record);
        Ok(record)
    }

    /// What control, autoscaler and planner make of it until nobody has anything to say.
    fn react(
        &mut self,
        now: Timestamp,
        ground: &mut Ground,
        followed: &mut Followed,
    ) -> anyhow::Result<()> {
        loop {
            let mut events = self.planned(now, ground);
            let mut written_by = (StreamKind::Instances, Actor::service("actuator"));
            if events.is_empty() {
                events = self.settled(now, ground);
                written_by = (StreamKind::Endpoint, Actor::service("control"));
            }
            if events.is_empty() {
                return Ok(());
            }
            let (kind, actor) = written_by;
            for event in events {
                self.answers(&event, now, followed);
                let gone = matches!(event, Event::EndpointDeleted(_));
                self.append(kind, &actor, now, event, ground)?;
                if gone {
                    self.forget();
                    let hours = self.rng.u64(1..12);
                    let again = now + Span::from_secs(hours * 3600);
                    followed.push((again, Task::Create));
                }
            }
        }
    }

    fn planned(&self, now: Timestamp, ground: &Ground) -> Vec<Event> {
        let context = PlanContext {
            granted: &self.fold.granted,
            drained: &|instance| self.drained.contains(&instance.id),
            members: &ground.members,
            own_node: Some(ground.node.as_str()),
            now,
        };
        plan(
            &self.name,
            self.fold.endpoint.as_ref(),
            &self.fold.instances,
            &context,
            &mut || ground.log.ids.uid(),
        )
    }

    fn settled(&self, now: Timestamp, ground: &Ground) -> Vec<Event> {
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
            &ground.members,
            now,
        )
    }

    fn forget(&mut self) {
        self.watched.clear();
        self.drained.clear();
        self.session = None;
        self.evaluated_at = None;
    }

    /// Evaluates all deployments, and says when to do it again.
    fn evaluate(
        &mut self,
        now: Timestamp,
        ground: &mut Ground,
        followed: &mut Followed,
    ) -> anyhow::Result<()> {
        let Some(endpoint) = &self.fold.endpoint else {
            return Ok(());
        };
        if endpoint.state == ProvisioningState::Deleting {
            return Ok(());
        }
        let deployments = endpoint.deployments.clone();
        self.evaluated_at = self.evaluated_at.filter(|at| *at > now);
        let mut is_calm = true;
        for (deployment_name, deployment) in &deployments {
            let decision = self.decide(deployment_name, deployment, now, ground)?;
            is_calm &= decision.is_none();
            if let Some(decision) = decision {
                let event = Event::ScalingDecided(Box::new(decision));
                let actor = Actor::service("autoscaler");
                self.append(StreamKind::Scaling, &actor, now, event, ground)?;
            }
        }
        self.evaluate_again(is_calm, now, followed);
        Ok(())
    }

    /// The decision to write, if there is one.
    fn decide(
        &mut self,
        deployment_name: &Name,
        deployment: &Deployment,
        now: Timestamp,
        ground: &Ground,
    ) -> anyhow::Result<Option<Decision>> {
        let uid = deployment.uid;
        let instances = self.counts(uid);
        let load = self.load(deployment_name, now);
        let rng = &mut self.rng;
        let watched = self.watched.entry(uid).or_default();
        watched.compile(deployment, ground)?;
        let policy = watched.compiled.as_ref().map(|(_, policy)| policy);
        let specs = policy.map_or(&[][..], Policy::signals);
        let signals = specs.iter();
        let signals: Vec<_> = signals
            .map(|spec| Some(load::signal(spec, load, instances.ready, rng)))
            .collect();
        let tick = TickInputs {
            policy_revision: watched
                .compiled
                .as_ref()
                .map_or(0, |(revision, _)| *revision),
            fixed_instances: deployment.spec.instances,
            pin: deployment.pin,
            pause: deployment.pause,
            instances,
            signals: &signals,
            carried: &watched.carried,
            selection: watched.selection,
        };
        let evaluation = evaluate(policy, &tick, now);
        let is_news = should_explain(watched.last.as_ref(), policy, &evaluation);
        let of = DeploymentRef {
            endpoint: self.name.clone(),
            deployment: deployment_name.clone(),
        };
        let decision = is_news.then(|| explain(&of, uid, policy, &tick, now));
        carry(&mut watched.carried, policy, &evaluation, now);
        watched.selection = evaluation.selection;
        if decision.is_some() {
            watched.last.clone_from(&decision);
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

impl Watched {
    fn compile(&mut self, deployment: &Deployment, ground: &Ground) -> anyhow::Result<()> {
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
        let policy = Policy::compile(&autoscale.spec, &ground.zones);
        let policy = policy.map_err(|findings| anyhow::anyhow!("a policy: {findings:?}"))?;
        self.compiled = Some((autoscale.revision, policy));
        self.selection = None;
        Ok(())
    }
}

#[expect(clippy::unwrap_used, reason = "names that stand in this program")]
fn name(text: &str) -> Name {
    text.parse().unwrap()
}
