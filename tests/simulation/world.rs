//! A complete Penstock under a virtual clock: one log, services that read it bucket by bucket in random
//! order and with random lag, gateways and nodes with seeded faults.
//!
//! The services are the real ones, and so is the loop that drives them (`runtime::consumer::Core`,
//! `runtime::reconcile::Evaluator`); only the store and the bus around it are replaced. The log
//! guarantees no more than the real one: order within a bucket, expected versions. A restarted service
//! starts from snapshots taken at random times, or from none.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use actuator::planner::Planner;
use autoscaler::Autoscaler;
use contract::decision::Decision;
use contract::events::{
    AutoscalePinned, AutoscaleSet, DeploymentCreated, DeploymentUpdated, EndpointCreated,
    EndpointKeys, Event, InstanceEnded, InstanceEvent, InstanceStarted, MemberJoined, SealedKey,
};
use contract::frame::{DeploymentFrame, Frame, InstanceFrame, Outcomes, Role, Source, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Name, Position, Uid};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::resources::{AutoscaleSpec, BackendKind, DeploymentSpec};
use contract::time::{Span, Timestamp};
use domain::fold::EndpointFold;
use domain::instances::Instance;
use runtime::consumer::{Applied, ApplyOutcome, Core, Fold, Initial};
use runtime::health::Health;
use runtime::ids::{Ids, SeededIds};
use runtime::parking::Parking;
use runtime::reconcile::{CommitResult, Evaluator, Reconciler};
use store::{Fence, Snapshot};
use uuid::Uuid;

pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True with this probability in percent.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, self.below(index as u64 + 1) as usize);
        }
    }
}

/// The log, in memory.
#[derive(Default)]
pub struct Log {
    pub records: Vec<Arc<Record>>,
    by_bucket: BTreeMap<Bucket, Vec<Arc<Record>>>,
    versions: BTreeMap<StreamName, u64>,
}

impl Log {
    /// Appends; returns false if the stream is not at the expected version.
    fn append(
        &mut self,
        stream: StreamName,
        expected: Option<u64>,
        events: Vec<(Uuid, Timestamp, Event)>,
    ) -> bool {
        let version = self.versions.entry(stream.clone()).or_default();
        if expected.is_some_and(|expected| expected != *version) {
            return false;
        }
        let bucket = stream.bucket_key().bucket();
        for (id, time, event) in events {
            *version += 1;
            let in_bucket = self.by_bucket.entry(bucket).or_default();
            let record = Arc::new(Record {
                position: Position(self.records.len() as u64 + 1),
                prev: in_bucket
                    .last()
                    .map_or(Position::START, |last| last.position),
                bucket,
                stream: stream.clone(),
                version: *version,
                id,
                time,
                actor: Actor::service("simulation"),
                event,
            });
            in_bucket.push(record.clone());
            self.records.push(record);
        }
        true
    }
}

/// The consumer name of snapshots; they are not stored here.
const SNAPSHOTS: &str = "simulation";

/// A simulated service: the parts of its loop, its read position in each bucket, and its snapshots.
pub struct Service<R: Reconciler> {
    evaluator: Evaluator<R>,
    core: Core<R::Fold>,
    make: Box<dyn Fn() -> R>,
    read: BTreeMap<Bucket, usize>,
    snapshots: BTreeMap<Bucket, Snapshot>,
    /// Number of starts from a snapshot.
    pub resumed: u32,
}

fn new_core<R: Reconciler>(reconciler: &R) -> Core<R::Fold> {
    let component = Health::default().component(R::SERVICE);
    let parking = Parking::detached(R::SERVICE, component);
    Core::new(Arc::new(reconciler.fold()), parking)
}

/// Loads every bucket, from its snapshot if there is one; returns the read positions.
fn load_buckets<F: Fold>(
    core: &mut Core<F>,
    log: &Log,
    snapshots: &BTreeMap<Bucket, Snapshot>,
) -> BTreeMap<Bucket, usize> {
    let mut read = BTreeMap::new();
    for bucket in Bucket::of_endpoints() {
        let fence = Fence {
            name: bucket.to_string(),
            generation: 1,
        };
        let initial = snapshots
            .get(&bucket)
            .map_or_else(Initial::default, |snapshot| {
                Initial::decode(snapshot, |_| Vec::new()).unwrap()
            });
        let records = log.by_bucket.get(&bucket).map_or(&[][..], Vec::as_slice);
        let behind = records.partition_point(|record| record.position <= initial.position);
        read.insert(bucket, behind);
        core.acquire(bucket, Some(fence), initial, Timestamp::default());
        core.caught_up(&[bucket]);
    }
    read
}

impl<R: Reconciler> Service<R> {
    fn new(make: impl Fn() -> R + 'static) -> Self {
        let reconciler = make();
        let mut core = new_core(&reconciler);
        let read = load_buckets(&mut core, &Log::default(), &BTreeMap::new());
        Self {
            core,
            evaluator: Evaluator::new(reconciler),
            make: Box::new(make),
            read,
            snapshots: BTreeMap::new(),
            resumed: 0,
        }
    }

    /// Loses all state, as in a crash; the next turn reads the log from the snapshots' positions, or from the
    /// start.
    fn restart(&mut self, log: &Log, rng: &mut Rng) {
        let reconciler = (self.make)();
        self.core = new_core(&reconciler);
        self.evaluator = Evaluator::new(reconciler);
        if rng.percent(30) {
            self.snapshots.clear();
        }
        self.resumed += u32::from(!self.snapshots.is_empty());
        self.read = load_buckets(&mut self.core, log, &self.snapshots);
    }

    /// Takes a snapshot of a random bucket.
    fn take_snapshot(&mut self, rng: &mut Rng) {
        let bucket = Bucket(rng.below(64) as u16);
        // There is no store with earlier parts, so the snapshot must be complete.
        self.core.stored(bucket, None);
        if let Some(draft) = self.core.draft(bucket) {
            let version = <R::Fold as Fold>::VERSION;
            let snapshot = draft.into_snapshot(SNAPSHOTS, bucket, version);
            self.snapshots.insert(bucket, snapshot);
        }
    }

    /// Reads up to `limit` records of each bucket, buckets in random order.
    fn read(&mut self, log: &Log, rng: &mut Rng, limit: usize) {
        let mut buckets: Vec<_> = log.by_bucket.keys().copied().collect();
        rng.shuffle(&mut buckets);
        for bucket in buckets {
            let read = self.read.entry(bucket).or_default();
            for record in log.by_bucket[&bucket][*read..].iter().take(limit) {
                *read += 1;
                let applied = apply(&mut self.core, record);
                self.evaluator.applied(&self.core, vec![applied]);
            }
        }
    }

    fn evaluate(&mut self, log: &mut Log, clock: Timestamp, ids: &SeededIds) {
        self.evaluator.mark_due(Bucket::of_endpoints());
        let (writes, failed) = self.evaluator.evaluate_due(&self.core, ids, clock);
        assert!(failed.is_empty(), "{failed:?}");
        for write in writes {
            let mut settled = CommitResult::Refused;
            for append in write.appends {
                let events = append.events.into_iter();
                let events = events.map(|event| (event.id, event.time, event.event));
                // Refused if this service lags behind its own stream: it reads on and retries.
                if log.append(
                    append.stream,
                    Some(append.expected_version),
                    events.collect(),
                ) {
                    settled = CommitResult::Written(Position(log.records.len() as u64));
                }
            }
            self.evaluator.settle(write.subject, write.now, settled);
        }
    }

    /// Asserts that folding the log from its start and from the snapshots gives the same state.
    pub fn assert_snapshots_match_log(&self, log: &Log, context: &str) {
        let folded = |snapshots: &BTreeMap<Bucket, Snapshot>| {
            let mut core = new_core(&self.evaluator.reconciler);
            let read = load_buckets(&mut core, log, snapshots);
            for (bucket, records) in &log.by_bucket {
                let read = read.get(bucket).copied().unwrap_or_default();
                for record in &records[read..] {
                    apply(&mut core, record);
                }
            }
            let entries = core.folds().lock();
            let written = |(key, entry)| (key, serde_json::to_string(entry).unwrap());
            let written = entries.iter().map(written);
            written
                .map(|(key, text): (&EndpointKey, String)| (key.clone(), text))
                .collect::<BTreeMap<_, _>>()
        };
        let from_start = folded(&BTreeMap::new());
        assert!(!from_start.is_empty(), "{context}");
        assert_eq!(folded(&self.snapshots), from_start, "{context}");
    }
}

fn apply<F: Fold>(core: &mut Core<F>, record: &Arc<Record>) -> Applied<F::Effect> {
    let effect = match core.apply(record, Timestamp::default()) {
        ApplyOutcome::Applied(effect) => Some(effect),
        ApplyOutcome::Skipped => None,
        ApplyOutcome::Parked(key) | ApplyOutcome::Rebuild(key) => panic!("{key} is parked"),
    };
    Applied {
        record: record.clone(),
        effect,
    }
}

/// Probabilities of faults, in percent per second.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    pub service_restarts: u64,
    pub instance_crashes: u64,
    pub start_failures: u64,
    pub lost_frames: u64,
    pub lagging_reads: u64,
    pub duplicate_node_turns: u64,
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

/// A process of a simulated node.
struct Process {
    ready_at: Timestamp,
    reported_ready: bool,
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
    processes: BTreeMap<InstanceId, Process>,
    /// Highest generation carried out, by instance, as in a backend's tombstones.
    carried_out: BTreeMap<InstanceId, u64>,
    pub starts: BTreeMap<InstanceId, u32>,
    gateways: BTreeMap<&'static str, Gateway>,
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
        let mut world = Self {
            rng: Rng::new(seed),
            clock: start,
            log: Log::default(),
            faults: Faults::default(),
            load: BTreeMap::new(),
            truth: BTreeMap::new(),
            decided: BTreeMap::new(),
            ids: SeededIds::new(seed),
            autoscaler: Service::new(Autoscaler::default),
            planner: Service::new(move || Planner::new(None, instance_ids.clone())),
            processes: BTreeMap::new(),
            carried_out: BTreeMap::new(),
            starts: BTreeMap::new(),
            gateways: GATEWAYS.map(|id| (id, Gateway::default())).into(),
            truth_read: 0,
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
        let event = (
            self.ids.event_id(self.clock),
            self.clock,
            Event::MemberJoined(joined),
        );
        assert!(self.log.append(StreamName::members(), None, vec![event]));
    }

    /// Appends an operator's change to the log, as control would.
    pub fn control(&mut self, endpoint: &str, event: Event) {
        let record = (self.ids.event_id(self.clock), self.clock, event);
        assert!(self.log.append(
            StreamName::of(StreamKind::Endpoint, &key(endpoint)),
            None,
            vec![record]
        ));
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
        if self.rng.percent(self.faults.service_restarts) {
            self.autoscaler.restart(&self.log, &mut self.rng);
        }
        if self.rng.percent(self.faults.service_restarts) {
            self.planner.restart(&self.log, &mut self.rng);
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
        self.read_truth();
        self.clock = self.clock + step;
    }

    fn service_turn(&mut self, autoscaler: bool) {
        let limit = if self.rng.percent(self.faults.lagging_reads) {
            1
        } else {
            usize::MAX
        };
        if autoscaler {
            self.autoscaler.read(&self.log, &mut self.rng, limit);
            self.autoscaler.take_snapshot(&mut self.rng);
            self.autoscaler.evaluator.reconciler.due(self.clock);
            self.autoscaler
                .evaluate(&mut self.log, self.clock, &self.ids);
        } else {
            self.planner.read(&self.log, &mut self.rng, limit);
            self.planner.take_snapshot(&mut self.rng);
            self.planner.evaluate(&mut self.log, self.clock, &self.ids);
        }
    }

    /// A gateway receives routes one turn late, and reports in frames.
    fn gateway_turn(&mut self, id: &'static str) {
        self.read_truth();
        let ready = |instance: &&Instance| instance.is_ready();
        let routed = self
            .truth
            .values()
            .flat_map(|fold| fold.instances.instances.values().filter(ready));
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
            let frame = self.frame(id, bucket);
            self.autoscaler
                .evaluator
                .reconciler
                .observe(&frame, self.clock);
            self.planner
                .evaluator
                .reconciler
                .observe(&frame, self.clock);
        }
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
        self.node_turn();
        if self.rng.percent(self.faults.duplicate_node_turns) {
            self.node_turn();
        }
    }

    /// Carries out every request, including earlier ones: generations make that harmless.
    fn node_turn(&mut self) {
        self.read_truth();
        let instances: Vec<(EndpointKey, Instance)> = self
            .truth
            .iter()
            .flat_map(|(key, fold)| {
                fold.instances
                    .instances
                    .values()
                    .map(|i| (key.clone(), i.clone()))
            })
            .collect();
        for (endpoint, instance) in instances {
            if let Some(removal) = &instance.removal {
                self.carried_out
                    .insert(instance.id.clone(), removal.generation);
                let was_running = self.processes.remove(&instance.id).is_some();
                let remaining = |gateway: &mut Gateway| gateway.in_flight.remove(&instance.id);
                let in_flight: u32 = self.gateways.values_mut().filter_map(remaining).sum();
                // Frames come every turn or two, so no drain reaches its deadline.
                assert!(
                    !was_running || in_flight == 0,
                    "{} was removed with {in_flight} requests on it",
                    instance.id
                );
                let ended = InstanceEnded {
                    id: instance.id.clone(),
                    reason: "removed".into(),
                    exit_code: None,
                };
                self.report(&endpoint, &instance.node, Event::InstanceStopped(ended));
            } else if self
                .carried_out
                .get(&instance.id)
                .is_none_or(|newest| *newest < instance.generation)
            {
                self.start(&endpoint, instance);
            } else {
                self.watch(&endpoint, &instance);
            }
        }
    }

    fn start(&mut self, endpoint: &EndpointKey, instance: Instance) {
        self.carried_out
            .insert(instance.id.clone(), instance.generation);
        *self.starts.entry(instance.id.clone()).or_default() += 1;
        if self.rng.percent(self.faults.start_failures) {
            let ended = InstanceEnded {
                id: instance.id.clone(),
                reason: "no start".into(),
                exit_code: Some(1),
            };
            self.report(endpoint, &instance.node, Event::InstanceFailed(ended));
            return;
        }
        let ready_at = self.clock + Span::from_secs(1 + self.rng.below(10));
        self.processes.insert(
            instance.id.clone(),
            Process {
                ready_at,
                reported_ready: false,
            },
        );
        self.report(
            endpoint,
            &instance.node,
            Event::InstanceStarted(InstanceStarted {
                id: instance.id,
                generation: instance.generation,
                address: "127.0.0.1:1".into(),
                pid: None,
                adopted: false,
            }),
        );
    }

    fn watch(&mut self, endpoint: &EndpointKey, instance: &Instance) {
        let crash = self.rng.percent(self.faults.instance_crashes);
        let Some(process) = self.processes.get_mut(&instance.id) else {
            return;
        };
        let id = instance.id.clone();
        if crash {
            self.processes.remove(&id);
            let ended = InstanceEnded {
                id,
                reason: "crashed".into(),
                exit_code: Some(139),
            };
            self.report(endpoint, &instance.node, Event::InstanceFailed(ended));
        } else if !process.reported_ready && self.clock >= process.ready_at {
            process.reported_ready = true;
            self.report(
                endpoint,
                &instance.node,
                Event::InstanceReady(InstanceEvent { id }),
            );
        }
    }

    fn report(&mut self, endpoint: &EndpointKey, node: &str, event: Event) {
        let record = (self.ids.event_id(self.clock), self.clock, event);
        assert!(
            self.log
                .append(StreamName::of_node(endpoint, node), None, vec![record])
        );
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
        self.processes.len()
    }
}

fn deployment_spec(instances: u32) -> DeploymentSpec {
    let document = serde_json::json!({
        "backend": "simulated", "instanceType": "cpu-small", "instances": instances,
        "requestSettings": {"timeout": "2s"}
    });
    serde_json::from_value(document).unwrap()
}
