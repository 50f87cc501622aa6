//! A complete Penstock under a virtual clock: one log, services that read it bucket by bucket in random
//! order and with random lag, gateways and nodes with seeded faults.
//!
//! The services are the real ones, and so is the code that drives them (`runtime::consumer::Core`,
//! `runtime::reconcile::Evaluator`, `actuator::node::state::NodeState`, `runtime::executor`); only the store,
//! the bus and the backends around it are replaced. Each service has two replicas, between which buckets
//! move (see `service`); requests to backends take virtual time (see `node`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use actuator::planner::Planner;
use autoscaler::Autoscaler;
use contract::decision::Decision;
use contract::events::{
    AutoscalePinned, AutoscaleSet, ConsumerUnparked, DeploymentCreated, DeploymentUpdated,
    EndpointCreated, EndpointKeys, Event, EventSkipped, MemberJoined, SealedKey,
};
use contract::frame::{DeploymentFrame, Frame, InstanceFrame, Outcomes, Role, Source, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Name, Position, Uid};
use contract::log::{Actor, NewEvent, StreamKind, StreamName};
use contract::resources::{AutoscaleSpec, BackendKind, DeploymentSpec};
use contract::time::{Span, Timestamp};
use domain::fold::EndpointFold;
use runtime::ids::{Ids, SeededIds};
use tokio::runtime::Runtime;
use tokio::time::Instant;
use uuid::Uuid;

use crate::log::Log;
use crate::node::Node;
use crate::rng::Rng;
use crate::service::Service;

/// How far back the bus keeps frames.
const FRAMES_KEPT: Span = Span::from_secs(45);

/// The consumers that an event which cannot be read parks an endpoint in.
const CONSUMERS: [&str; 3] = ["autoscaler", "actuator", "node"];

/// Probabilities of faults, in percent per second.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    pub service_restarts: u64,
    pub instance_crashes: u64,
    pub start_failures: u64,
    pub lost_frames: u64,
    pub lagging_reads: u64,
    pub duplicate_node_turns: u64,
    pub node_restarts: u64,
    /// Moves of a bucket to the other replica.
    pub rebalances: u64,
    /// Commits that reach the log only in the next turn.
    pub late_commits: u64,
    /// Requests for which a backend lacks resources.
    pub postponed_requests: u64,
    /// Events that no service can decode.
    pub unreadable_events: u64,
}

/// The members, which are there from the start.
pub const GATEWAYS: [&str; 2] = ["gateway-1", "gateway-2"];
pub const NODES: [&str; 2] = ["node-1", "node-2"];

/// A gateway: its routes, and its count of requests in flight on each instance.
#[derive(Default)]
struct Gateway {
    /// Routes with their positions: the instances that may get requests. The first entry is in use.
    routes: VecDeque<(Position, BTreeSet<InstanceId>)>,
    in_flight: BTreeMap<InstanceId, u32>,
    sequence: u64,
}

pub struct World {
    pub rng: Rng,
    pub clock: Timestamp,
    pub log: Log,
    pub faults: Faults,
    /// Requests per second that clients send, by deployment.
    pub load: BTreeMap<(EndpointKey, Name), u64>,
    /// The state of a reader of the whole log.
    pub truth: BTreeMap<EndpointKey, EndpointFold>,
    /// The newest decision on each deployment.
    pub decided: BTreeMap<(EndpointKey, Uid), Decision>,
    ids: SeededIds,
    pub autoscaler: Service<Autoscaler>,
    pub planner: Service<Planner>,
    pub nodes: [Node; 2],
    /// On which requests to backends run, under its own virtual clock.
    requests: Runtime,
    gateways: BTreeMap<&'static str, Gateway>,
    /// Recent frames, and when they were sent.
    frames: VecDeque<(Timestamp, Arc<Frame>)>,
    /// Endpoints with an event that cannot be read.
    parked: BTreeMap<String, Position>,
    /// Number of endpoints that have been unparked.
    pub unparked: u32,
    truth_read: usize,
}

impl Gateway {
    /// Sends requests to routed instances; on others one request ends per turn.
    fn serve(&mut self, rng: &mut Rng) {
        let routed = &self.routes[0].1;
        for id in routed {
            self.in_flight.insert(id.clone(), rng.below(4) as u32);
        }
        for (id, in_flight) in &mut self.in_flight {
            if !routed.contains(id) {
                *in_flight = in_flight.saturating_sub(1);
            }
        }
    }
}

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub fn key(endpoint: &str) -> EndpointKey {
    EndpointKey::new(&name(endpoint))
}

impl World {
    pub fn new(seed: u64, start: Timestamp) -> Self {
        // Shared across restarts of the planner, which must not reuse ids.
        let instance_ids = Arc::new(SeededIds::new(!seed));
        let mut log = Log::default();
        let requests = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build();
        let mut world = Self {
            rng: Rng::new(seed),
            clock: start,
            faults: Faults::default(),
            load: BTreeMap::new(),
            truth: BTreeMap::new(),
            decided: BTreeMap::new(),
            ids: SeededIds::new(seed),
            autoscaler: Service::new(Autoscaler::default, &mut log),
            planner: Service::new(move || Planner::new(None, instance_ids.clone()), &mut log),
            nodes: NODES.map(|id| Node::new(id, &mut log)),
            requests: requests.unwrap(),
            gateways: GATEWAYS.map(|id| (id, Gateway::default())).into(),
            frames: VecDeque::new(),
            parked: BTreeMap::new(),
            unparked: 0,
            truth_read: 0,
            log,
        };
        let gateways = GATEWAYS.map(|id| (SourceKind::GATEWAY, id));
        let nodes = NODES.map(|id| (SourceKind::NODE, id));
        for (kind, id) in gateways.into_iter().chain(nodes) {
            world.join(kind, id);
        }
        world
    }

    fn join(&mut self, kind: SourceKind, id: &str) {
        let joined = MemberJoined {
            source: Source {
                kind,
                id: id.into(),
            },
            address: None,
            backends: vec![BackendKind::SIMULATED],
        };
        self.write(&StreamName::members(), Event::MemberJoined(joined));
    }

    fn write(&mut self, stream: &StreamName, event: Event) -> Position {
        let event = NewEvent {
            id: self.ids.event_id(self.clock),
            time: self.clock,
            actor: Actor::service("simulation"),
            event,
        };
        self.log.write(stream, vec![event])[0].position
    }

    /// Appends an operator's change to the log, as control would.
    pub fn control(&mut self, endpoint: &str, event: Event) -> Position {
        self.write(&StreamName::of(StreamKind::Endpoint, &key(endpoint)), event)
    }

    /// Appends an event that no service can decode, which parks the endpoint in each. It would not change
    /// anything: a pin that has ended already.
    pub fn park(&mut self, endpoint: &str) {
        if self.parked.contains_key(endpoint) {
            return;
        }
        let pin = contract::decision::Pin {
            instances: 1,
            until: Some(self.clock),
        };
        let pinned = AutoscalePinned {
            deployment: name("blue"),
            pin,
        };
        let position = self.control(endpoint, Event::AutoscalePinned(pinned));
        self.log.unreadable.insert(position);
        self.parked.insert(endpoint.to_owned(), position);
    }

    /// Has every service skip the event that it cannot read, and unpark the endpoint.
    pub fn unpark(&mut self, endpoint: &str) {
        let Some(position) = self.parked.remove(endpoint) else {
            return;
        };
        self.unparked += 1;
        let stream = StreamName::of(StreamKind::Parking, &key(endpoint));
        for consumer in CONSUMERS {
            let (consumer, reason) = (consumer.to_owned(), "simulation".to_owned());
            let skipped = EventSkipped {
                consumer: consumer.clone(),
                position,
                reason: reason.clone(),
            };
            self.write(&stream, Event::EventSkipped(skipped));
            let unparked = ConsumerUnparked { consumer, reason };
            self.write(&stream, Event::ConsumerUnparked(unparked));
        }
    }

    pub fn deploy(&mut self, endpoint: &str, instances: u32, autoscale: Option<AutoscaleSpec>) {
        let sealed = SealedKey {
            hash: String::new(),
            sealed: String::new(),
        };
        self.control(
            endpoint,
            Event::EndpointCreated(EndpointCreated {
                uid: Uid(self.ids.uid()),
                name: name(endpoint),
                labels: BTreeMap::new(),
                spec: Default::default(),
                keys: EndpointKeys {
                    primary: sealed.clone(),
                    secondary: sealed,
                },
            }),
        );
        let uid = Uid(self.ids.uid());
        self.control(
            endpoint,
            Event::DeploymentCreated(DeploymentCreated {
                uid,
                deployment: name("blue"),
                labels: BTreeMap::new(),
                spec: deployment_spec(instances),
            }),
        );
        if let Some(spec) = autoscale {
            self.set_autoscale(endpoint, 1, spec);
        }
    }

    pub fn set_autoscale(&mut self, endpoint: &str, revision: u64, spec: AutoscaleSpec) {
        let set = AutoscaleSet {
            deployment: name("blue"),
            revision,
            labels: BTreeMap::new(),
            spec,
        };
        self.control(endpoint, Event::AutoscaleSet(set));
    }

    pub fn pin(&mut self, endpoint: &str, instances: u32, until: Option<Timestamp>) {
        let pin = contract::decision::Pin { instances, until };
        self.control(
            endpoint,
            Event::AutoscalePinned(AutoscalePinned {
                deployment: name("blue"),
                pin,
            }),
        );
    }

    pub fn roll(&mut self, endpoint: &str, instances: u32) {
        self.read_truth();
        let fold = &self.truth[&key(endpoint)];
        let revision =
            fold.endpoint.as_ref().unwrap().deployments[&name("blue")].instance_revision + 1;
        let mut spec = deployment_spec(instances);
        spec.instance_type = format!("r{revision}");
        self.control(
            endpoint,
            Event::DeploymentUpdated(DeploymentUpdated {
                deployment: name("blue"),
                revision,
                labels: BTreeMap::new(),
                spec,
            }),
        );
    }

    /// Runs one turn of each part, then advances the clock by `step`.
    pub fn step(&mut self, step: Span) {
        let (rng, log, faults) = (&mut self.rng, &mut self.log, &self.faults);
        if rng.percent(faults.service_restarts) {
            self.autoscaler.restart(log, rng);
        }
        if rng.percent(faults.service_restarts) {
            self.planner.restart(log, rng);
        }
        if rng.percent(faults.rebalances) {
            self.autoscaler.rebalance(log, rng, self.clock);
        }
        if rng.percent(faults.rebalances) {
            self.planner.rebalance(log, rng, self.clock);
        }
        if rng.percent(faults.node_restarts) {
            let restarted = rng.below(2) as usize;
            self.nodes[restarted].restart(log);
        }
        let mut turns = [0, 1, 2, 3];
        self.rng.shuffle(&mut turns);
        for turn in turns {
            match turn {
                0 => GATEWAYS.into_iter().for_each(|id| self.gateway_turn(id)),
                1 => self.service_turn(true),
                2 => self.service_turn(false),
                _ => self.node_turns(),
            }
        }
        self.run_requests(step);
        self.read_truth();
        self.clock = self.clock + step;
    }

    fn service_turn(&mut self, autoscaler: bool) {
        let frames = self.frames.make_contiguous();
        let (log, rng) = (&mut self.log, &mut self.rng);
        let (clock, ids, faults) = (self.clock, &self.ids, &self.faults);
        match autoscaler {
            true => self.autoscaler.turn(log, rng, clock, ids, frames, faults),
            false => self.planner.turn(log, rng, clock, ids, frames, faults),
        }
    }

    /// A gateway receives routes one turn late, and reports in frames.
    fn gateway_turn(&mut self, id: &'static str) {
        self.read_truth();
        let instances = self
            .truth
            .values()
            .flat_map(|fold| fold.instances.instances.values());
        let routed = instances.filter(|instance| instance.is_ready());
        let routed: BTreeSet<_> = routed.map(|instance| instance.id.clone()).collect();
        let gateway = self.gateways.get_mut(id).unwrap();
        gateway
            .routes
            .push_back((Position(self.log.records.len() as u64), routed));
        if gateway.routes.len() > 2 {
            gateway.routes.pop_front();
        }
        gateway.sequence += 1;
        gateway.serve(&mut self.rng);
        if self.rng.percent(self.faults.lost_frames) {
            return;
        }
        let buckets: BTreeSet<Bucket> = self.truth.keys().map(EndpointKey::bucket).collect();
        for bucket in buckets {
            let frame = Arc::new(self.frame(id, bucket));
            self.autoscaler.observe(&frame, self.clock);
            self.planner.observe(&frame, self.clock);
            self.frames.push_back((self.clock, frame));
        }
        let is_kept = |(at, _): &(Timestamp, _)| *at + FRAMES_KEPT >= self.clock;
        let forgotten = self.frames.partition_point(|frame| !is_kept(frame));
        self.frames.drain(..forgotten);
    }

    fn frame(&self, id: &str, bucket: Bucket) -> Frame {
        let gateway = &self.gateways[id];
        let revision = gateway.routes[0].0;
        let mut deployments = Vec::new();
        for (endpoint, fold) in self.truth.iter().filter(|(key, _)| key.bucket() == bucket) {
            for (deployment, spec) in fold
                .endpoint
                .iter()
                .flat_map(|endpoint| &endpoint.deployments)
            {
                let load = self
                    .load
                    .get(&(endpoint.clone(), deployment.clone()))
                    .copied()
                    .unwrap_or(0);
                // Load is split between the gateways.
                let load = load / 2 + u64::from(id == GATEWAYS[0]) * (load % 2);
                let instances = fold.instances.of(spec.uid).map(|instance| InstanceFrame {
                    in_flight: gateway.in_flight.get(&instance.id).copied().unwrap_or(0),
                    ..InstanceFrame::new(instance.id.clone())
                });
                deployments.push(DeploymentFrame {
                    outcomes: Outcomes {
                        success: load,
                        ..Outcomes::default()
                    },
                    arrivals: load,
                    // A tenth of a second per request.
                    in_flight_us: load * 100_000,
                    in_flight_max: 1,
                    instances: instances.collect(),
                    ..DeploymentFrame::new(
                        endpoint.clone(),
                        deployment.clone(),
                        spec.uid,
                        Role::LIVE,
                    )
                });
            }
        }
        Frame {
            source: Source {
                kind: SourceKind::GATEWAY,
                id: id.into(),
            },
            boot: Uuid::nil(),
            sequence: gateway.sequence,
            bucket,
            start: Timestamp::from_secs(self.clock.secs() - 1),
            length_us: 1_000_000,
            routes: self
                .truth
                .keys()
                .map(|endpoint| (endpoint.clone(), revision))
                .collect(),
            members: Default::default(),
            hello: None,
            goodbye: false,
            deployments,
        }
    }

    fn node_turns(&mut self) {
        let _on = self.requests.enter();
        let turns = match self.rng.percent(self.faults.duplicate_node_turns) {
            true => 2,
            false => 1,
        };
        for _ in 0..turns {
            for node in &mut self.nodes {
                let (log, rng) = (&mut self.log, &mut self.rng);
                node.turn(log, rng, self.clock, &self.ids, &self.faults);
            }
        }
    }

    /// Lets requests to backends run for a while.
    fn run_requests(&mut self, time: Span) {
        if self.nodes.iter().all(|node| node.requests == 0) {
            return;
        }
        self.requests.block_on(async {
            let end = Instant::now() + Duration::from_millis(time.millis());
            for node in &mut self.nodes {
                node.run_until(end).await;
            }
        });
        for node in &self.nodes {
            for id in std::mem::take(&mut node.backend.lock().unwrap().removed) {
                let remaining = |gateway: &mut Gateway| gateway.in_flight.remove(&id);
                let in_flight: u32 = self.gateways.values_mut().filter_map(remaining).sum();
                // Frames come every turn or two, so no drain reaches its deadline.
                assert!(
                    in_flight == 0,
                    "{id} was removed with {in_flight} requests on it"
                );
            }
        }
    }

    fn read_truth(&mut self) {
        for record in &self.log.records[self.truth_read..] {
            let Some(key) = record.endpoint() else {
                continue;
            };
            if let Event::ScalingDecided(decision) = &record.event {
                let of = (key.clone(), decision.deployment_uid);
                self.decided.insert(of, (**decision).clone());
            }
            self.truth.entry(key).or_default().apply(record);
        }
        self.truth_read = self.log.records.len();
    }

    pub fn ready(&self, endpoint: &str) -> usize {
        let fold = &self.truth[&key(endpoint)];
        fold.instances
            .instances
            .values()
            .filter(|instance| instance.is_ready())
            .count()
    }

    /// Ready instances by node.
    pub fn by_node(&self) -> BTreeMap<String, usize> {
        let mut by_node = BTreeMap::new();
        let all = self
            .truth
            .values()
            .flat_map(|f| f.instances.instances.values());
        for instance in all.filter(|instance| instance.is_ready()) {
            *by_node.entry(instance.node.clone()).or_default() += 1;
        }
        by_node
    }

    pub fn running(&self) -> usize {
        let running = |node: &Node| node.backend.lock().unwrap().running();
        self.nodes.iter().map(running).sum()
    }
}

fn deployment_spec(instances: u32) -> DeploymentSpec {
    let document = serde_json::json!({
        "backend": "simulated", "instanceType": "cpu-small", "instances": instances,
        "requestSettings": {"timeout": "2s"}
    });
    serde_json::from_value(document).unwrap()
}
