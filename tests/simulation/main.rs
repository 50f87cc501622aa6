//! Simulated weeks in seconds: the real services under a virtual clock (see `world`), with seeded faults
//! and invariants checked after every step. `SEED` and `COUNT` select other runs.

#![allow(clippy::unwrap_used)] // tests fail by panicking

mod decisions;
mod folds;
mod log;
mod node;
mod rng;
mod schedules;
mod service;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use contract::events::Event;
use contract::resources::AutoscaleSpec;
use contract::time::{Span, Timestamp};
use domain::zones::ZoneData;
use world::{Faults, World, key, name};

const ENDPOINTS: [&str; 4] = ["iris", "mnist", "llm", "tabular"];

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn start() -> Timestamp {
    "2026-03-01T00:00:00Z".parse().unwrap()
}

fn policy(endpoint: &str, min: u32, max: u32) -> AutoscaleSpec {
    serde_json::from_value(serde_json::json!({
        "target": {"endpoint": endpoint, "deployment": "blue"},
        "cooldown": {"out": "5s", "in": "10s"}, "stabilization": {"out": "0s", "in": "20s"},
        "profiles": [{
            "name": "default", "capacity": {"min": min, "max": max, "default": min},
            "rules": [{"name": "follow", "metric": {"name": "requests_per_second", "window": "5s"}, "track": {"target": 10}}]
        }]
    }))
    .unwrap()
}

/// Asserts what must hold after every step.
fn check_invariants(world: &World, context: &str) {
    for node in &world.nodes {
        for (id, starts) in &node.backend.lock().unwrap().starts {
            assert_eq!(*starts, 1, "{id} was started {starts} times ({context})");
        }
    }
    for ((endpoint, _), decision) in &world.decided {
        let Some(policy) = &decision.inputs.policy else {
            continue;
        };
        let capacity = policy.profiles[0].capacity;
        let pinned = decision.outcome == contract::decision::DecisionOutcome::Pinned;
        assert!(
            pinned || (capacity.min..=capacity.max).contains(&decision.granted),
            "{endpoint}: {} is outside of {capacity:?} ({context})",
            decision.granted
        );
    }
}

/// Asserts for the whole log: versions without gaps, no instance removed before it was drained or failed,
/// and every decision re-evaluates to itself.
fn check_log(world: &World, context: &str) {
    let mut versions = BTreeMap::new();
    let mut removable = BTreeSet::new();
    for record in &world.log.records {
        let version: &mut u64 = versions.entry(record.stream.clone()).or_default();
        *version += 1;
        assert_eq!(record.version, *version, "{} ({context})", record.stream);
        match &record.event {
            Event::InstanceDraining(draining) => {
                removable.insert(draining.id.clone());
            }
            Event::InstanceFailed(ended) => {
                removable.insert(ended.id.clone());
            }
            Event::InstanceRemovalRequested(removal) => {
                assert!(
                    removable.contains(&removal.id),
                    "{} was not drained ({context})",
                    removal.id
                );
            }
            Event::ScalingDecided(decision) => {
                let reevaluated = domain::autoscale::reevaluate(decision, &ZoneData::bundled());
                let bytes = |decision| serde_json::to_string(decision).unwrap();
                assert_eq!(
                    bytes(&reevaluated),
                    bytes(decision),
                    "at {} ({context})",
                    record.position
                );
            }
            _ => {}
        }
    }
}

/// How often something happened that a run is about.
#[derive(Debug, Default)]
struct Happened {
    /// A service started from snapshots.
    resumed: u32,
    /// A commit of a former owner was refused.
    refused: u32,
    /// An endpoint was unparked.
    unparked: u32,
}

/// One run: random load, pins and rollouts under faults, then a quiet phase in which everything must
/// settle.
fn run(seed: u64) -> Happened {
    let context = format!("SEED={seed}");
    let mut world = World::new(seed, start());
    for (index, endpoint) in ENDPOINTS.iter().enumerate() {
        let autoscale = (index > 0).then(|| policy(endpoint, 1, 6));
        world.deploy(endpoint, 2, autoscale);
    }
    world.faults = Faults {
        service_restarts: 3,
        instance_crashes: 1,
        start_failures: 10,
        lost_frames: 5,
        lagging_reads: 20,
        duplicate_node_turns: 20,
        node_restarts: 2,
        rebalances: 10,
        late_commits: 20,
        postponed_requests: 5,
        unreadable_events: 2,
    };
    for _ in 0..300 {
        let endpoint = ENDPOINTS[world.rng.below(4) as usize];
        if world.rng.percent(world.faults.unreadable_events) {
            world.park(endpoint);
        } else if world.rng.percent(10) {
            world.unpark(endpoint);
        }
        match world.rng.below(40) {
            0 => {
                let (count, until) = (world.rng.below(5) as u32, world.clock + Span::from_secs(30));
                world.pin(endpoint, count, Some(until));
            }
            1 => world.roll(endpoint, 2),
            2..=5 => {
                let rate = world.rng.below(80);
                world.load.insert((key(endpoint), name("blue")), rate);
            }
            _ => {}
        }
        world.step(Span::from_secs(1));
        check_invariants(&world, &context);
    }

    world.faults = Faults::default();
    for endpoint in ENDPOINTS {
        world.unpark(endpoint);
        world.load.insert((key(endpoint), name("blue")), 35);
    }
    for _ in 0..300 {
        world.step(Span::from_secs(1));
        check_invariants(&world, &context);
    }
    assert_eq!(world.ready("iris"), 2, "fixed ({context})");
    for endpoint in &ENDPOINTS[1..] {
        assert_eq!(
            world.ready(endpoint),
            4,
            "{endpoint}: 35 requests/s at 10 each ({context})"
        );
    }
    assert_eq!(
        world.running(),
        14,
        "a process for each ready instance and no other ({context})"
    );
    let by_node = world.by_node();
    assert_eq!(by_node.len(), world::NODES.len(), "{by_node:?} ({context})");
    check_log(&world, &context);
    world
        .autoscaler
        .assert_snapshots_match_log(&world.log, &context);
    world
        .planner
        .assert_snapshots_match_log(&world.log, &context);
    for node in &world.nodes {
        node.assert_snapshots_match_log(&world.log, &context);
    }
    folds::assert_independent_of_snapshots(&world.log.records, &mut world.rng, &context);
    let (autoscaler, planner) = (&world.autoscaler, &world.planner);
    Happened {
        resumed: autoscaler.resumed + planner.resumed,
        refused: autoscaler.refused + planner.refused,
        unparked: world.unparked,
    }
}

#[test]
fn random_faults_never_break_an_invariant_and_everything_settles_afterwards() {
    let (first, count) = (setting("SEED", 1), setting("COUNT", 20));
    println!("SEED={first} COUNT={count}");
    let mut total = Happened::default();
    for happened in (first..first + count).map(run) {
        total.resumed += happened.resumed;
        total.refused += happened.refused;
        total.unparked += happened.unparked;
    }
    println!("{total:?}");
    assert!(total.resumed > 0 && total.refused > 0 && total.unparked > 0);
}

#[test]
fn the_same_seed_gives_the_same_log() {
    let log = |seed| {
        let mut world = World::new(seed, start());
        world.faults = Faults {
            service_restarts: 5,
            start_failures: 20,
            lagging_reads: 30,
            rebalances: 10,
            late_commits: 20,
            node_restarts: 5,
            postponed_requests: 10,
            ..Faults::default()
        };
        world.deploy("iris", 1, Some(policy("iris", 1, 5)));
        world.load.insert((key("iris"), name("blue")), 30);
        (0..100).for_each(|_| world.step(Span::from_secs(1)));
        world
            .log
            .records
            .iter()
            .map(|record| serde_json::to_string(&**record).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(log(5), log(5));
    assert_ne!(log(5), log(6));
}
