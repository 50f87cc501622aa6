//! Deployments with `update: stop-first`: an instance has stopped before its replacement starts.

use contract::events::{Event, LeaveReason, RemovalReason, RequestReason};
use contract::resources::Update;
use contract::time::Span;
use domain::instances::{HEALTHY_AFTER, InstanceState};
use proptest::prelude::*;

use super::world::*;

fn world(wanted: u32) -> World {
    let mut world = World::new();
    world.spec.update = Update::StopFirst;
    world.change_command();
    world.grant(wanted);
    world.settle();
    world
}

#[test]
fn a_replacement_starts_only_when_the_instance_before_has_stopped() {
    let mut world = world(1);
    let before = world.ids_in(InstanceState::Ready).remove(0);
    world.change_command();
    let planned = world.plan();
    let [Event::InstanceDraining(draining)] = planned.as_slice() else {
        panic!("{planned:?}")
    };
    assert_eq!(
        (&draining.id, draining.reason),
        (&before, RemovalReason::Rollout)
    );
    world.busy.insert(before.clone());
    assert_eq!(world.plan(), [], "requests are in flight");
    world.busy.clear();
    let planned = world.plan();
    let is_removal = matches!(planned.as_slice(), [Event::InstanceRemovalRequested(_)]);
    assert!(is_removal, "{planned:?}");
    assert_eq!(world.plan(), [], "its process may still run");
    world.carry_out_removals();
    let planned = world.plan();
    let [Event::InstanceRequested(requested)] = planned.as_slice() else {
        panic!("{planned:?}")
    };
    assert_eq!(requested.reason, RequestReason::Rollout);
}

#[test]
fn of_many_instances_a_quarter_is_replaced_at_a_time() {
    let mut world = world(8);
    world.change_command();
    let ready = world.settle();
    assert_eq!(ready.iter().min(), Some(&6), "{ready:?}");
    assert_eq!(ready.iter().max(), Some(&8), "{ready:?}");
    let revisions: Vec<u64> = world
        .instances
        .instances
        .values()
        .map(|i| i.revision)
        .collect();
    assert_eq!(revisions, [3; 8]);
}

#[test]
fn a_rollout_to_something_that_cannot_start_stops_no_further_instance() {
    let mut world = world(4);
    world.change_command();
    for _ in 0..600 {
        world.plan();
        world.carry_out_removals();
        for id in world.ids_in(InstanceState::Starting) {
            world.fail(id);
        }
        world.now = world.now + Span::from_secs(1);
    }
    assert_eq!(world.count(InstanceState::Ready), 3);
}

#[test]
fn an_unhealthy_instance_stops_before_its_replacement_starts_too() {
    let mut world = world(1);
    let sick = world.ids_in(InstanceState::Ready).remove(0);
    world.now = world.now + HEALTHY_AFTER;
    world.sicken(sick);
    let planned = world.plan();
    assert!(matches!(planned.as_slice(), [Event::InstanceDraining(_)]));
    world.plan();
    assert_eq!(requests(&world.plan()), 0);
    world.carry_out_removals();
    assert_eq!(requests(&world.plan()), 1);
}

#[test]
fn the_instance_of_a_node_that_was_lost_is_not_waited_for() {
    let mut world = two_nodes();
    world.spec.update = Update::StopFirst;
    world.change_command();
    world.grant(1);
    world.settle();
    let lost = world.by_node().into_keys().next().unwrap();
    world.leave(&lost, LeaveReason::Silent);
    assert_eq!(requests(&world.plan()), 1);
}

#[test]
fn an_instance_is_given_the_grace_that_it_was_started_with() {
    let mut world = World::new();
    world.spec.termination_grace = Some(Span::from_secs(90));
    world.change_command();
    world.grant(1);
    world.settle();
    world.grant(0);
    world.plan();
    let planned = world.plan();
    let [Event::InstanceRemovalRequested(removal)] = planned.as_slice() else {
        panic!("{planned:?}")
    };
    assert_eq!(removal.grace, Span::from_secs(90));
}

proptest! {
    #[test]
    fn never_more_instances_run_than_are_granted(
        wanted in 1u32..6, happenings in prop::collection::vec(0u8..5, 1..40)
    ) {
        let mut world = world(wanted);
        for happening in happenings {
            world.plan();
            prop_assert!(world.instances.instances.len() <= wanted as usize);
            match happening {
                0 => world.make_ready(),
                1 => world.change_command(),
                2 => if let Some(id) = world.ids_in(InstanceState::Ready).pop() { world.sicken(id) },
                3 => if let Some(id) = world.ids_in(InstanceState::Draining).pop() { world.busy.insert(id); },
                _ => { world.busy.clear(); world.carry_out_removals() }
            }
            world.now = world.now + Span::from_secs(5);
        }
        world.busy.clear();
        // Beyond every back-off.
        for _ in 0..2 {
            world.now = world.now + Span::from_secs(600);
            world.settle();
        }
        prop_assert_eq!(world.count(InstanceState::Ready), wanted as usize);
    }
}
