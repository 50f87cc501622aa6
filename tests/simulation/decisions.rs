//! Counts and their causes through the whole system.

use contract::decision::{CauseKind, Decision, DecisionOutcome};
use contract::events::Event;
use contract::resources::AutoscaleSpec;
use contract::time::Span;

use crate::world::{Faults, World, key, name};
use crate::{policy, start};

/// Follows the load from a default of `default` instances.
fn from_default(default: u32) -> AutoscaleSpec {
    let mut spec = policy("iris", 1, 9);
    spec.profiles[0].capacity.default = default;
    spec
}

fn seconds(world: &mut World, count: u32) {
    (0..count).for_each(|_| world.step(Span::from_secs(1)));
}

fn decisions(world: &World) -> impl Iterator<Item = &Decision> {
    world
        .log
        .records
        .iter()
        .filter_map(|record| match &record.event {
            Event::ScalingDecided(decision) => Some(&**decision),
            _ => None,
        })
}

fn newest(world: &World) -> &Decision {
    decisions(world).last().unwrap()
}

#[test]
fn a_crash_loop_under_load_stays_at_its_count_and_says_so() {
    let mut world = World::new(3, start());
    world.deploy("iris", 1, Some(from_default(2)));
    world.load.insert((key("iris"), name("blue")), 80);
    world.faults = Faults {
        start_failures: 100,
        ..Faults::default()
    };
    seconds(&mut world, 120);
    let last = newest(&world);
    assert_eq!(
        (last.granted, last.outcome),
        (2, DecisionOutcome::HeldByFailedStarts)
    );
    let failed = last.inputs.failed_starts.as_ref().unwrap();
    assert!(failed.never_ready && failed.in_a_row > 0, "{failed:?}");
    // Starts succeed from now on, and the rules act again.
    world.faults = Faults::default();
    seconds(&mut world, 400);
    assert_eq!(newest(&world).granted, 8);
}

#[test]
fn the_default_is_the_first_count_if_the_autoscale_follows_its_deployment() {
    let mut world = World::new(4, start());
    world.deploy("iris", 1, None);
    seconds(&mut world, 5);
    assert_eq!(newest(&world).granted, 1);
    world.set_autoscale("iris", 1, from_default(4));
    seconds(&mut world, 2);
    let changes: Vec<_> = decisions(&world)
        .map(|decision| (decision.from, decision.granted))
        .filter(|(from, granted)| from != granted)
        .collect();
    assert_eq!(changes, [(0, 1), (1, 4)]);
}

#[test]
fn a_later_autoscale_continues_from_the_deployments_own_count() {
    let mut world = World::new(5, start());
    world.deploy("iris", 3, None);
    world.load.insert((key("iris"), name("blue")), 30);
    seconds(&mut world, 90);
    world.set_autoscale("iris", 1, from_default(8));
    seconds(&mut world, 20);
    assert_eq!(newest(&world).granted, 3);
}

#[test]
fn the_end_of_a_pin_and_changed_bounds_are_causes() {
    let mut world = World::new(6, start());
    world.deploy("iris", 1, Some(policy("iris", 1, 4)));
    seconds(&mut world, 5);
    world.pin("iris", 7, Some(world.clock + Span::from_secs(10)));
    seconds(&mut world, 20);
    let causes: Vec<_> = decisions(&world)
        .filter(|decision| decision.from != decision.granted)
        .map(|decision| (decision.granted, decision.cause.as_ref().unwrap().kind))
        .collect();
    assert_eq!(
        causes,
        [
            (1, CauseKind::Profile),
            (7, CauseKind::Pin),
            (4, CauseKind::PinEnd)
        ]
    );
    world.set_autoscale("iris", 2, policy("iris", 6, 9));
    seconds(&mut world, 5);
    let changed = newest(&world);
    assert_eq!(changed.granted, 6);
    assert_eq!(changed.cause.as_ref().unwrap().kind, CauseKind::Bounds);
}

#[test]
fn an_autoscaler_that_has_just_started_has_the_answers_in_frames_that_the_bus_has_kept() {
    let mut world = World::new(7, start());
    let with_minimum = |min: u32| {
        let mut spec = policy("iris", min, 9);
        let rules = spec.profiles[0].rules.as_mut().unwrap();
        rules[0].metric.window = Span::from_secs(30);
        spec
    };
    world.deploy("iris", 1, Some(with_minimum(1)));
    world.load.insert((key("iris"), name("blue")), 20);
    seconds(&mut world, 90);
    // Of two replicas, each time a random one.
    (0..8).for_each(|_| world.autoscaler.restart(&mut world.log, &mut world.rng));
    seconds(&mut world, 2);
    // Makes it decide.
    world.set_autoscale("iris", 2, with_minimum(5));
    seconds(&mut world, 2);
    let decision = newest(&world);
    assert_eq!(decision.granted, 5);
    let signal = decision.inputs.signals["requests_per_second/30s/average"];
    assert_eq!(signal.answered, Some(30 * 20));
}
