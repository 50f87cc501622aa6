//! One endpoint's life: what people, load and instances do, and what the engines make of it.

mod instances;
mod load;

use std::collections::{BTreeMap, BTreeSet};

use contract::decision::{Carried, Decision, InstanceCounts, Pause, Pin};
use contract::events::{EndpointKeys, Event, KeySlot, SealedKey};
use contract::ids::{DeploymentRef, EndpointKey, InstanceId, Name, Uid};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::resources::{Labels, ProvisioningState};
use contract::time::{Span, Timestamp};
use domain::autoscale::{Policy, Selection, TickInputs, carry, evaluate, explain, should_explain};
use domain::endpoint::Deployment;
use domain::endpoint::commands::{Command, Context, Precondition, decide};
use domain::endpoint::settle::settle;
use domain::fold::EndpointFold;
use domain::instances::plan::{Context as PlanContext, plan};
use runtime::ids::Ids;

use self::load::Session;
use crate::documents::{self, Green, Shape};
use crate::house::{Ground, hex};

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

#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Another release of the model, which replaces the instances.
    Release,
    Policy,
    Traffic,
    Pin,
    Pause,
    Key,
    Delete,
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

    fn command(
        &mut self,
        command: &Command,
        now: Timestamp,
        ground: &mut Ground,
    ) -> anyhow::Result<()> {
        let context = Context {
            endpoint: self.name.clone(),
            other_endpoints: 0,
            precondition: Precondition::None,
            zones: ground.zones.clone(),
            now,
        };
        let events = decide(self.fold.endpoint.as_ref(), command, &context);
        let events = events.map_err(|refusal| anyhow::anyhow!("{}: {refusal:?}", self.name))?;
        for event in events {
            self.append(
                StreamKind::Endpoint,
                &Actor::token("ci"),
                now,
                event,
                ground,
            )?;
        }
        Ok(())
    }

    fn create(
        &mut self,
        now: Timestamp,
        ground: &mut Ground,
        followed: &mut Followed,
    ) -> anyhow::Result<()> {
        self.revision += 1;
        let keys = EndpointKeys {
            primary: sealed_key(ground),
            secondary: sealed_key(ground),
        };
        let put = Command::PutEndpoint {
            labels: labels("team", &format!("team-{}", self.rng.u32(0..20))),
            spec: documents::endpoint(self.shape)?,
            uid: Uid(ground.log.ids.uid()),
            keys,
        };
        self.command(&put, now, ground)?;
        let has_green = self.shape.green != Green::None;
        for deployment in ["blue", "green"].iter().take(1 + usize::from(has_green)) {
            let put = self.put_deployment(deployment, ground)?;
            self.command(&put, now, ground)?;
        }
        self.set_traffic(90, now, ground)?;
        self.put_policy(now, ground)?;
        self.evaluate_at(now + Span::from_millis(20), followed);
        self.begin_later(now, followed);
        Ok(())
    }

    fn put_deployment(&mut self, deployment: &str, ground: &Ground) -> serde_json::Result<Command> {
        let instances = if deployment == "blue" { 2 } else { 1 };
        Ok(Command::PutDeployment {
            deployment: name(deployment),
            labels: labels("release", &self.revision.to_string()),
            spec: documents::deployment(self.revision, instances)?,
            uid: Uid(ground.log.ids.uid()),
        })
    }

    fn put_policy(&mut self, now: Timestamp, ground: &mut Ground) -> anyhow::Result<()> {
        let Some(shape) = self.shape.policy else {
            return Ok(());
        };
        let deployment = name("blue");
        let put = Command::PutAutoscale {
            spec: documents::policy(&self.name, &deployment, shape, self.revision)?,
            labels: Labels::new(),
            deployment,
        };
        self.command(&put, now, ground)
    }

    fn set_traffic(&mut self, blue: u8, now: Timestamp, ground: &mut Ground) -> anyhow::Result<()> {
        let (blue_name, green_name) = (name("blue"), name("green"));
        let (traffic, mirror) = match self.shape.green {
            Green::None => (vec![(blue_name, 100)], Vec::new()),
            Green::Live => (
                vec![(blue_name, blue), (green_name, 100 - blue)],
                Vec::new(),
            ),
            Green::Mirrored => (vec![(blue_name, 100)], vec![(green_name, blue / 2)]),
        };
        let set = Command::SetTraffic {
            traffic: Some(traffic.into_iter().collect()),
            mirror: Some(mirror.into_iter().collect()),
        };
        self.command(&set, now, ground)
    }

    fn change(
        &mut self,
        change: Change,
        now: Timestamp,
        ground: &mut Ground,
    ) -> anyhow::Result<()> {
        let deployment = name("blue");
        match self.fold.endpoint.as_ref() {
            Some(endpoint) if endpoint.state != ProvisioningState::Deleting => {}
            _ => return Ok(()),
        }
        self.revision += 1;
        match change {
            Change::Release => {
                let put = self.put_deployment("blue", ground)?;
                self.command(&put, now, ground)
            }
            Change::Policy => self.put_policy(now, ground),
            Change::Traffic => {
                let blue = self.rng.u8(50..100);
                self.set_traffic(blue, now, ground)
            }
            Change::Pin => {
                let pin = Pin {
                    instances: self.rng.u32(1..5),
                    until: Some(now + Span::from_secs(self.rng.u64(300..3600))),
                };
                self.command(&Command::Pin { deployment, pin }, now, ground)
            }
            Change::Pause => {
                let pause = Pause {
                    scale_in: self.rng.bool(),
                    scale_out: false,
                };
                self.command(&Command::SetPause { deployment, pause }, now, ground)
            }
            Change::Key => {
                let (slot, key) = (KeySlot::Secondary, sealed_key(ground));
                self.command(&Command::RegenerateKey { slot, key }, now, ground)
            }
            Change::Delete => {
                self.session = None;
                self.command(&Command::DeleteEndpoint, now, ground)
            }
        }
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

/// As control writes it; nobody has the key that could open it.
fn sealed_key(ground: &Ground) -> SealedKey {
    let ids = &ground.log.ids;
    SealedKey {
        hash: hex(&ids.secret()),
        sealed: hex(&ids.secret()),
    }
}

fn labels(key: &str, value: &str) -> Labels {
    [(key.to_owned(), value.to_owned())].into()
}

#[expect(clippy::unwrap_used, reason = "names that stand in this program")]
fn name(text: &str) -> Name {
    text.parse().unwrap()
}
