//! Slots are allocated so that an instance's limit holds across all gateways, also during a
//! transition.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use contract::events::{
    DeploymentCreated, EndpointCreated, EndpointKeys, Event, InstanceEvent, InstanceRequested,
    InstanceStarted, LeaveReason, MemberJoined, MemberLeft, RequestReason, SealedKey,
};
use contract::frame::{Frame, Source, SourceKind};
use contract::ids::{EndpointKey, InstanceId, Position, Uid};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::route::{ANY_GATEWAY, RouteUpdate};
use contract::time::{Span, Timestamp};
use domain::fold::EndpointFold;
use domain::members::Members;
use domain::routes::slots::{Slots, YIELD_TIMEOUT, YieldTracker, allocate, granted};
use domain::routes::{AllocationInputs, route};
use proptest::prelude::*;
use uuid::Uuid;

fn instance(name: &str) -> InstanceId {
    InstanceId::from(name.to_owned())
}

fn gateways(count: usize) -> BTreeSet<String> {
    (0..count).map(|n| format!("g{n}")).collect()
}

fn sum(slots: &Slots, gateways: &BTreeSet<String>, limit: u32) -> u64 {
    let of = |gateway: &String| u64::from(granted(slots, gateway, limit));
    gateways.iter().map(of).sum()
}

#[test]
fn one_gateway_or_none_has_the_full_limit_under_any_name() {
    for count in 0..=1 {
        let slots = allocate(7, &instance("i"), &gateways(count));
        assert_eq!(slots, Slots::from([(ANY_GATEWAY.to_owned(), 7)]));
    }
}

#[test]
fn the_remainder_does_not_always_go_to_the_same_gateway() {
    let all = gateways(3);
    let mut favoured = BTreeMap::<String, u32>::new();
    for n in 0..300 {
        let slots = allocate(4, &instance(&format!("i{n}")), &all);
        let lucky = all.iter().find(|gateway| slots[*gateway] == 2).unwrap();
        *favoured.entry(lucky.clone()).or_default() += 1;
    }
    for gateway in &all {
        assert!(favoured[gateway] > 60, "{favoured:?}");
    }
}

proptest! {
    #[test]
    fn a_final_allocation_is_complete_and_within_the_limit(limit in 1u32..200, count in 0usize..12, name in "[a-z]{1,8}") {
        let all = gateways(count);
        let slots = allocate(limit, &instance(&name), &all);
        prop_assert!(all.iter().all(|gateway| granted(&slots, gateway, limit) >= 1));
        if count > 0 {
            prop_assert_eq!(sum(&slots, &all, limit), u64::from(limit.max(count as u32)));
        }
        let shares: BTreeSet<u32> = all.iter().map(|g| granted(&slots, g, limit)).collect();
        prop_assert!(shares.last().unwrap_or(&1) - shares.first().unwrap_or(&1) <= 1, "{shares:?}");
    }
}

fn at(millis: u64) -> Timestamp {
    Timestamp::from_secs(1_000_000) + Span::from_millis(millis)
}

fn iris() -> EndpointKey {
    EndpointKey::new(&"iris".parse().unwrap())
}

/// A publisher of the route of one endpoint with one instance, and gateways that follow it, each at
/// its own pace.
struct World {
    fold: EndpointFold,
    members: Members,
    yielded: YieldTracker,
    published: Option<RouteUpdate>,
    position: u64,
    /// Position of the last event of the endpoint.
    revision: Position,
    millis: u64,
    limit: u32,
    /// The update that each gateway has reached, including gateways that have left.
    reached: BTreeMap<String, RouteUpdate>,
}

impl World {
    fn new(limit: u32) -> Self {
        let mut world = Self {
            fold: EndpointFold::default(),
            members: Members::default(),
            yielded: YieldTracker::default(),
            published: None,
            position: 0,
            revision: Position::START,
            millis: 0,
            limit,
            reached: BTreeMap::new(),
        };
        let sealed = SealedKey {
            hash: String::new(),
            sealed: String::new(),
        };
        world.append(Event::EndpointCreated(EndpointCreated {
            uid: Uid(Uuid::from_u128(1)),
            name: "iris".parse().unwrap(),
            labels: BTreeMap::new(),
            spec: Default::default(),
            keys: EndpointKeys {
                primary: sealed.clone(),
                secondary: sealed,
            },
        }));
        let spec = serde_json::json!({
            "backend": "simulated", "instanceType": "t", "authorization": "pass",
            "requestSettings": {"maxConcurrentRequestsPerInstance": limit}
        });
        let spec: contract::resources::DeploymentSpec = serde_json::from_value(spec).unwrap();
        world.append(Event::DeploymentCreated(DeploymentCreated {
            uid: Uid(Uuid::from_u128(2)),
            deployment: "blue".parse().unwrap(),
            labels: BTreeMap::new(),
            spec: spec.clone(),
        }));
        let id = instance("i");
        world.append(Event::InstanceRequested(Box::new(InstanceRequested {
            id: id.clone(),
            generation: 1,
            deployment: "iris/blue".parse().unwrap(),
            deployment_uid: Uid(Uuid::from_u128(2)),
            revision: 1,
            node: "n".into(),
            decision: None,
            reason: RequestReason::ScaleOut,
            spec,
        })));
        world.append(Event::InstanceStarted(InstanceStarted {
            id: id.clone(),
            generation: 1,
            address: "127.0.0.1:1".into(),
            pid: None,
            adopted: false,
        }));
        world.append(Event::InstanceReady(InstanceEvent { id }));
        world
    }

    fn append(&mut self, event: Event) {
        self.position += 1;
        let global = matches!(event, Event::MemberJoined(_) | Event::MemberLeft(_));
        let stream = match global {
            true => StreamName::members(),
            false => StreamName::of(StreamKind::Endpoint, &iris()),
        };
        let record = Record {
            position: Position(self.position),
            prev: Position(self.position - 1),
            bucket: iris().bucket(),
            stream,
            version: self.position,
            id: Uuid::from_u128(u128::from(self.position)),
            time: at(self.millis),
            actor: Actor::service("test"),
            event,
        };
        if global {
            self.members.apply(&record);
        } else {
            self.fold.apply(&record);
            self.revision = record.position;
        }
    }

    fn join(&mut self, gateway: &str) {
        let source = source(gateway);
        self.append(Event::MemberJoined(MemberJoined {
            source,
            address: None,
            backends: Vec::new(),
        }));
        self.publish();
    }

    /// A gateway that says goodbye gives back all its slots.
    fn leave(&mut self, gateway: &str) {
        self.append(Event::MemberLeft(MemberLeft {
            source: source(gateway),
            reason: LeaveReason::Goodbye,
        }));
        self.reached.remove(gateway);
        self.publish();
    }

    fn publish(&mut self) {
        let bucket = iris().bucket();
        let dealing = AllocationInputs {
            members: &self.members,
            published: self.published.as_ref(),
            yielded: self.yielded.is_done(bucket, &self.members, at(self.millis)),
        };
        let endpoint = self.fold.endpoint.as_ref().unwrap();
        let revision = self.revision;
        let update = route(endpoint, &self.fold.instances, revision, &dealing);
        self.published = Some(update);
    }

    /// The gateway applies the latest published route.
    fn follow(&mut self, gateway: &str) {
        let update = self.published.clone().unwrap();
        self.reached.insert(gateway.to_owned(), update);
    }

    /// The gateway reports what it has reached, and the publisher polls.
    fn frame(&mut self, gateway: &str) {
        let members = self.reached.get(gateway).map(|update| update.members);
        let frame = Frame {
            source: source(gateway),
            boot: Uuid::nil(),
            sequence: 0,
            bucket: iris().bucket(),
            start: at(0),
            length_us: 1_000_000,
            routes: BTreeMap::new(),
            members: members.unwrap_or_default(),
            hello: None,
            goodbye: false,
            deployments: Vec::new(),
        };
        self.yielded.observe(&frame, at(self.millis));
        self.poll();
    }

    fn poll(&mut self) {
        let due = self.yielded.due(&self.members, at(self.millis));
        if due.contains(&iris().bucket()) {
            self.publish();
        }
    }

    fn settle(&mut self) {
        for _ in 0..2 {
            for gateway in self.members.gateway_ids() {
                self.follow(&gateway);
                self.frame(&gateway);
            }
        }
    }

    fn held(&self, gateway: &str) -> u32 {
        let slots =
            |update: &RouteUpdate| slots_of(update).map(|s| granted(s, gateway, self.limit));
        self.reached.get(gateway).and_then(slots).unwrap_or(0)
    }

    fn sum(&self) -> u32 {
        self.reached.keys().map(|gateway| self.held(gateway)).sum()
    }
}

fn slots_of(update: &RouteUpdate) -> Option<&Slots> {
    let route = update.route.as_ref()?;
    let mut instances = route.deployments.values().flat_map(|d| &d.instances);
    instances.next().map(|instance| &instance.slots)
}

fn source(gateway: &str) -> Source {
    Source {
        kind: SourceKind::GATEWAY,
        id: gateway.into(),
    }
}

#[test]
fn a_route_says_what_instances_get_of_authorization() {
    let mut world = World::new(1);
    world.publish();
    let route = world.published.unwrap().route.unwrap();
    let deployment = route.deployments.values().next().unwrap();
    assert_eq!(
        deployment.authorization,
        contract::resources::Authorization::Pass
    );
}

#[test]
fn a_newcomer_gets_one_slot_until_the_others_have_yielded() {
    let mut world = World::new(10);
    world.publish();
    world.join("a");
    world.settle();
    assert_eq!(world.held("a"), 10);
    world.join("b");
    world.follow("b");
    assert_eq!((world.held("a"), world.held("b")), (10, 1));
    world.follow("a");
    assert_eq!((world.held("a"), world.held("b")), (5, 1));
    world.frame("a");
    world.follow("b");
    assert_eq!(world.held("b"), 1, "b has not reported that it follows");
    world.frame("b");
    world.follow("b");
    assert_eq!(world.held("b"), 5);
}

#[test]
fn the_slots_of_a_gateway_that_leaves_go_to_the_others() {
    let mut world = World::new(10);
    for gateway in ["a", "b", "c"] {
        world.join(gateway);
        world.settle();
    }
    world.leave("c");
    world.settle();
    assert_eq!((world.held("a"), world.held("b")), (5, 5));
    world.leave("b");
    world.settle();
    assert_eq!(world.held("a"), 10);
}

#[test]
fn a_gateway_that_does_not_follow_delays_the_others_by_at_most_ten_seconds() {
    let mut world = World::new(10);
    world.join("a");
    world.settle();
    world.join("b");
    world.follow("b");
    world.frame("b");
    world.millis += YIELD_TIMEOUT.millis() - 1;
    world.poll();
    world.follow("b");
    assert_eq!(world.held("b"), 1);
    world.millis += 1;
    world.poll();
    world.follow("b");
    assert_eq!(world.held("b"), 5);
    let slots = slots_of(world.published.as_ref().unwrap()).unwrap();
    let excess = world
        .yielded
        .excess(iris().bucket(), &world.members, slots, 10, at(world.millis));
    assert_eq!(excess, 5, "a may still have all ten");
}

#[test]
fn a_publisher_that_takes_over_midway_grants_no_slots_that_others_may_hold() {
    let mut world = World::new(10);
    world.join("a");
    world.settle();
    world.join("b");
    world.published = None;
    world.yielded = YieldTracker::default();
    world.publish();
    world.follow("b");
    assert_eq!(world.held("b"), 1);
    assert_eq!(world.sum(), 11);
    world.settle();
    assert_eq!((world.held("a"), world.held("b")), (5, 5));
}

#[test]
fn a_publisher_that_takes_over_long_after_takes_nothing_away() {
    let mut world = World::new(10);
    world.join("a");
    world.join("b");
    world.millis += YIELD_TIMEOUT.millis();
    world.published = None;
    world.yielded = YieldTracker::default();
    world.publish();
    world.follow("a");
    world.follow("b");
    assert_eq!((world.held("a"), world.held("b")), (5, 5));
}

#[test]
fn a_route_does_not_change_when_its_only_gateway_joins() {
    let mut world = World::new(10);
    world.publish();
    let before = world.published.clone().unwrap();
    world.join("a");
    let after = world.published.clone().unwrap();
    assert_eq!(after.route, before.route);
    assert_eq!(
        after.revision, before.revision,
        "the revision is the endpoint's own"
    );
    assert!(after.members > before.members);
}

#[test]
fn a_new_instance_is_fully_allocated_while_others_yield() {
    let mut world = World::new(10);
    world.join("a");
    world.settle();
    world.join("b");
    let before = world.published.take().map(|mut published| {
        for deployment in published
            .route
            .iter_mut()
            .flat_map(|r| r.deployments.values_mut())
        {
            deployment.instances.clear();
        }
        published
    });
    world.published = before;
    world.publish();
    world.follow("b");
    assert_eq!(world.held("b"), 5);
}

proptest! {
    /// Gateways join, leave, follow and report in any order; together they stay within the limit,
    /// except for one slot for each gateway that would have none.
    #[test]
    fn no_grant_starts_before_the_previous_holder_has_yielded(
        limit in 1u32..40,
        steps in prop::collection::vec((0u8..6, 0usize..5), 1..80),
    ) {
        let mut world = World::new(limit);
        world.join("g0");
        world.settle();
        world.join("g1");
        world.settle();
        for (happening, which) in steps {
            let gateway = format!("g{which}");
            let member = world.members.gateways.contains_key(&gateway);
            match happening {
                0 if !member => world.join(&gateway),
                1 if member && world.members.gateways.len() > 2 => world.leave(&gateway),
                2 | 3 if member => world.follow(&gateway),
                4 | 5 if member => world.frame(&gateway),
                _ => {}
            }
            let bound = limit + world.reached.len() as u32;
            prop_assert!(world.sum() <= bound, "{} of {limit}: {:?}", world.sum(), world.reached.keys());
            let at_least_one = world.reached.keys().filter(|g| world.held(g) == 1).count() as u32;
            prop_assert!(world.sum() <= limit + at_least_one);
        }
        world.settle();
        let count = world.members.gateways.len() as u32;
        prop_assert_eq!(world.sum(), limit.max(count));
    }
}

#[test]
fn an_instance_of_a_dead_incarnation_is_in_no_route_of_the_new_one_of_its_name() {
    let mut world = World::new(2);
    world.join("a");
    world.publish();
    let routed = |world: &World| {
        let route = world.published.as_ref().unwrap().route.as_ref().unwrap();
        let deployments = route.deployments.values();
        deployments.map(|d| d.instances.len()).sum::<usize>()
    };
    assert_eq!(routed(&world), 1);
    let endpoint = world.fold.endpoint.clone().unwrap();
    let blue = &endpoint.deployments[&"blue".parse().unwrap()];
    world.append(Event::EndpointDeleted(contract::events::Empty {}));
    world.append(Event::EndpointCreated(EndpointCreated {
        uid: Uid(Uuid::from_u128(11)),
        name: endpoint.name.clone(),
        labels: BTreeMap::new(),
        spec: Default::default(),
        keys: endpoint.keys.clone(),
    }));
    world.append(Event::DeploymentCreated(DeploymentCreated {
        uid: Uid(Uuid::from_u128(12)),
        deployment: "blue".parse().unwrap(),
        labels: BTreeMap::new(),
        spec: blue.spec.clone(),
    }));
    assert_eq!(world.fold.instances.instances.len(), 1, "it is still there");
    world.publish();
    assert_eq!(routed(&world), 0);
}
