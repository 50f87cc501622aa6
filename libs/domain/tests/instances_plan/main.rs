//! How the planner turns decisions into requests about instances: scale, replace, roll, drain, back off.

#![allow(clippy::unwrap_used)]

mod stop_first;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use contract::events::{
    DeploymentCreated, DeploymentEvent, DeploymentUpdated, Empty, EndpointCreated, Event,
    InstanceEnded, InstanceStarted, LeaveReason, RemovalReason, RequestReason,
};
use contract::ids::{Bucket, InstanceId, Position, Uid};
use contract::log::{Actor, Record, StreamName};
use contract::resources::{BackendKind, DeploymentSpec};
use contract::time::Span;
use contract::{DeploymentRef, EndpointKey};
use domain::instances::InstanceState;
use domain::members::NODE_GRACE;
use domain::settle::settle;
use proptest::prelude::*;
use uuid::Uuid;

use world::*;

#[test]
fn nothing_is_ordered_before_a_decision() {
    assert_eq!(World::new().plan(), []);
}

#[test]
fn as_many_instances_are_requested_as_were_granted_and_none_twice() {
    let mut world = World::new();
    world.grant(3);
    assert_eq!(requests(&world.plan()), 3);
    assert_eq!(world.plan(), []);
    world.make_ready();
    assert_eq!(world.plan(), []);
}

#[test]
fn every_request_names_the_decision_behind_it() {
    let mut world = World::new();
    world.grant(1);
    let Event::InstanceRequested(requested) = world.plan().remove(0) else {
        panic!()
    };
    assert_eq!(requested.decision, Some(Uuid::from_u128(99)));
    let blue = DeploymentRef {
        endpoint: name("iris"),
        deployment: name("blue"),
    };
    assert_eq!(requested.deployment, blue);
}

#[test]
fn a_scale_in_drains_first_and_removes_only_when_the_gateways_have_released() {
    let mut world = World::new();
    world.grant(2);
    world.settle();
    world.grant(1);
    let planned = world.plan();
    let [Event::InstanceDraining(draining)] = planned.as_slice() else {
        panic!("{planned:?}")
    };
    world.busy.insert(draining.id.clone());
    assert_eq!(world.plan(), [], "still in use");
    world.busy.clear();
    let planned = world.plan();
    assert!(
        matches!(planned.as_slice(), [Event::InstanceRemovalRequested(r)] if r.id == draining.id && r.generation == 2)
    );
    assert_eq!(world.plan(), []);
}

/// How long the only instance drains if the deployment gets this spec after its start.
fn drain_timeout(started_with: DeploymentSpec, present: DeploymentSpec) -> Span {
    let mut world = World::new();
    let update = |spec: DeploymentSpec| {
        Event::DeploymentUpdated(DeploymentUpdated {
            deployment: name("blue"),
            revision: 1,
            labels: BTreeMap::new(),
            spec,
        })
    };
    world.append(update(started_with));
    world.grant(1);
    world.settle();
    world.append(update(present));
    world.grant(0);
    let orders = world.plan();
    let [Event::InstanceDraining(draining)] = orders.as_slice() else {
        panic!("{orders:?}")
    };
    draining.timeout
}

#[test]
fn a_drain_lasts_as_long_as_the_longest_request_by_the_present_or_the_instances_spec() {
    let with = |timeout: u64, max_duration: Option<u64>| {
        let mut spec = spec();
        spec.request_settings.timeout = Span::from_secs(timeout);
        spec.request_settings.max_duration = max_duration.map(Span::from_secs);
        spec
    };
    let cases = [
        (with(2, None), with(60, None), 60),
        (with(60, None), with(2, None), 60),
        (with(2, None), with(2, Some(3600)), 3600),
        (with(2, Some(90)), with(60, None), 90),
    ];
    for (started_with, present, seconds) in cases {
        let expected = Span::from_secs(seconds + 10);
        assert_eq!(drain_timeout(started_with, present), expected, "{seconds}");
    }
}

#[test]
fn a_drain_timeout_replaces_the_longest_request_as_the_limit_of_a_drain() {
    let with = |drain_timeout: u64| DeploymentSpec {
        drain_timeout: Some(Span::from_secs(drain_timeout)),
        ..spec()
    };
    assert_eq!(drain_timeout(with(3), with(3)), Span::from_secs(3));
    assert_eq!(drain_timeout(with(3), with(30)), Span::from_secs(30));
}

#[test]
fn a_scale_in_takes_instances_that_serve_nothing_before_ready_ones() {
    let mut world = World::new();
    world.grant(2);
    world.settle();
    let ready = world.ids_in(InstanceState::Ready);
    world.grant(3);
    world.plan();
    world.grant(2);
    world.settle();
    assert_eq!(world.ids_in(InstanceState::Ready), ready);
}

#[test]
fn a_failed_instance_is_removed_and_replaced_after_the_back_off() {
    let mut world = World::new();
    world.grant(1);
    world.settle();
    let id = world.ids_in(InstanceState::Ready).remove(0);
    world.fail(id.clone());
    let planned = world.plan();
    assert!(matches!(planned.as_slice(), [Event::InstanceRemovalRequested(r)] if r.id == id));
    world.now = world.now + Span::from_secs(1);
    assert_eq!(requests(&world.plan()), 1);
}

/// Moves time on until an instance is requested; returns by how many seconds.
fn seconds_until_a_request(world: &mut World) -> u64 {
    let mut waited = 0;
    while requests(&world.plan()) == 0 {
        world.now = world.now + Span::from_secs(1);
        waited += 1;
    }
    waited
}

#[test]
fn a_crash_loop_backs_off_twice_as_long_each_time_up_to_a_minute() {
    let mut world = World::new();
    world.grant(1);
    let mut waits = Vec::new();
    for _ in 0..9 {
        waits.push(seconds_until_a_request(&mut world));
        let id = world.ids_in(InstanceState::Starting).remove(0);
        world.fail(id);
    }
    assert_eq!(waits, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
}

#[test]
fn a_crash_loop_beside_a_healthy_instance_backs_off_too() {
    let mut world = World::new();
    world.grant(1);
    world.settle();
    world.now = world.now + Span::from_secs(3600);
    world.grant(2);
    let mut waits = Vec::new();
    for _ in 0..8 {
        waits.push(seconds_until_a_request(&mut world));
        let id = world.ids_in(InstanceState::Starting).remove(0);
        world.fail(id);
        world.carry_out_removals();
    }
    assert_eq!(waits, [0, 1, 2, 4, 8, 16, 32, 60]);
}

#[test]
fn a_new_revision_starts_at_once_without_the_back_off_of_the_one_it_replaces() {
    let mut world = World::new();
    world.grant(3);
    for _ in 0..8 {
        world.plan();
        let ids = world.ids_in(InstanceState::Starting);
        ids.into_iter().for_each(|id| world.fail(id));
        world.now = world.now + Span::from_secs(60);
    }
    world.plan();
    let starting = world.ids_in(InstanceState::Starting);
    world.change_command();
    // The end of an instance of the old revision is no failure of the new one.
    starting.into_iter().for_each(|id| world.fail(id));
    assert_eq!(requests(&world.plan()), 3);
}

#[test]
fn an_instance_that_was_healthy_before_a_failure_does_not_end_the_row() {
    let mut world = World::new();
    world.grant(2);
    world.settle();
    world.now = world.now + Span::from_secs(3600);
    let mut ids = world.ids_in(InstanceState::Ready);
    let failures = |world: &World| world.instances.starts[&blue()].failures;
    world.fail(ids.remove(0));
    assert_eq!(failures(&world), 1, "it was healthy");
    for expected in [2, 3, 4] {
        world.now = world.now + Span::from_secs(120);
        world.plan();
        let id = world.ids_in(InstanceState::Starting).remove(0);
        world.fail(id);
        assert_eq!(failures(&world), expected);
    }
    world.now = world.now + Span::from_secs(120);
    world.plan();
    world.make_ready();
    world.now = world.now + Span::from_secs(60);
    world.fail(ids.remove(0));
    assert_eq!(failures(&world), 1, "a start went well in between");
}

#[test]
fn a_crash_looping_deployment_is_tried_with_one_instance_at_a_time() {
    let mut world = World::new();
    world.grant(5);
    world.plan();
    world
        .ids_in(InstanceState::Starting)
        .into_iter()
        .for_each(|id| world.fail(id));
    world.now = world.now + Span::from_secs(120);
    assert_eq!(requests(&world.plan()), 1);
    world.now = world.now + Span::from_secs(120);
    assert_eq!(requests(&world.plan()), 0, "one is starting");
}

#[test]
fn an_instance_that_stayed_healthy_resets_the_failure_count() {
    let mut world = World::new();
    world.grant(1);
    world.plan();
    for _ in 0..4 {
        let id = world.ids_in(InstanceState::Starting).remove(0);
        world.fail(id);
        world.now = world.now + Span::from_secs(60);
        world.plan();
    }
    world.make_ready();
    world.now = world.now + Span::from_secs(61);
    world.grant(5);
    assert_eq!(requests(&world.plan()), 4);
}

#[test]
fn an_instance_that_fails_liveness_is_drained_and_replaced_at_once() {
    let mut world = World::new();
    world.grant(1);
    world.settle();
    world.now = world.now + Span::from_secs(3600);
    let sick = world.ids_in(InstanceState::Ready).remove(0);
    world.busy.insert(sick.clone());
    world.sicken(sick.clone());
    let planned = world.plan();
    assert!(
        matches!(planned.as_slice(), [Event::InstanceDraining(d)]
            if d.id == sick && d.reason == RemovalReason::Unhealthy),
        "{planned:?}"
    );
    assert_eq!(requests(&world.plan()), 1, "while its requests end");
    world.busy.clear();
    let planned = world.plan();
    assert!(matches!(planned.as_slice(), [Event::InstanceRemovalRequested(r)] if r.id == sick));
}

#[test]
fn instances_that_all_fail_liveness_are_replaced_one_at_a_time() {
    let mut world = World::new();
    world.grant(4);
    world.settle();
    world.now = world.now + Span::from_secs(3600);
    for id in world.ids_in(InstanceState::Ready) {
        world.sicken(id);
    }
    for replaced in 1..=4 {
        world.plan();
        world.plan();
        assert_eq!(world.count(InstanceState::Ready), 3, "{replaced}");
        world.carry_out_removals();
        for _ in 0..3 {
            world.plan();
            world.now = world.now + Span::from_secs(1);
        }
        assert_eq!(world.count(InstanceState::Ready), 3, "the next one waits");
        world.make_ready();
    }
    world.settle();
    let all = world.instances.instances.values();
    assert_eq!(all.filter(|i| i.unhealthy.is_none()).count(), 4);
}

#[test]
fn an_instance_that_fails_liveness_right_after_its_start_backs_off() {
    let mut world = World::new();
    world.grant(1);
    for expected in 1..=4 {
        world.settle();
        let sick = world.ids_in(InstanceState::Ready).remove(0);
        world.sicken(sick);
        assert_eq!(world.instances.starts[&blue()].failures, expected);
        world.plan();
        world.now = world.now + Span::from_secs(30);
    }
}

#[test]
fn the_last_ready_instance_stays_while_its_replacement_may_not_start() {
    let mut world = World::new();
    world.grant(1);
    world.settle();
    let sick = world.ids_in(InstanceState::Ready).remove(0);
    world.sicken(sick);
    world.plan();
    assert_eq!(world.count(InstanceState::Ready), 1);
    world.now = world.now + Span::from_secs(30);
    world.plan();
    assert_eq!(world.count(InstanceState::Ready), 0);
}

#[test]
fn a_rollout_replaces_every_instance_and_never_falls_below_the_wanted_number() {
    let mut world = World::new();
    world.grant(4);
    world.settle();
    let before: BTreeSet<_> = world.ids_in(InstanceState::Ready).into_iter().collect();
    world.change_command();
    let ready = world.settle();
    assert!(
        ready.iter().all(|count| (4..=5).contains(count)),
        "{ready:?}"
    );
    let after: BTreeSet<_> = world.ids_in(InstanceState::Ready).into_iter().collect();
    assert_eq!(after.len(), 4);
    assert!(before.is_disjoint(&after));
}

#[test]
fn going_back_to_a_spec_keeps_the_instances_that_still_run_with_it() {
    let mut world = World::new();
    world.grant(4);
    world.settle();
    let first: BTreeSet<InstanceId> = world.instances.instances.keys().cloned().collect();
    let update = |revision: u64, spec: DeploymentSpec| {
        Event::DeploymentUpdated(DeploymentUpdated {
            deployment: name("blue"),
            revision,
            labels: BTreeMap::new(),
            spec,
        })
    };
    let changed = DeploymentSpec {
        command: vec!["y".into(), "{port}".into()],
        ..spec()
    };
    world.append(update(2, changed));
    assert_eq!(requests(&world.plan()), 1, "the rollout has begun");
    // How requests are sent may differ from then.
    let mut back = spec();
    back.request_settings.timeout = Span::from_secs(9);
    world.append(update(3, back));
    world.settle();
    let kept: BTreeSet<InstanceId> = world.instances.instances.keys().cloned().collect();
    assert_eq!(kept, first);
}

#[test]
fn a_rollout_to_something_that_cannot_start_keeps_the_old_instances() {
    let mut world = World::new();
    world.grant(2);
    world.settle();
    world.change_command();
    for _ in 0..20 {
        world.plan();
        world
            .ids_in(InstanceState::Starting)
            .into_iter()
            .for_each(|id| world.fail(id));
        world.carry_out_removals();
        world.now = world.now + Span::from_secs(30);
    }
    assert_eq!(world.count(InstanceState::Ready), 2);
}

#[test]
fn a_deleted_endpoint_drains_and_removes_everything() {
    let mut world = World::new();
    world.grant(2);
    world.settle();
    world.append(Event::EndpointDeletionRequested(Empty {}));
    world.settle();
    assert!(world.instances.instances.is_empty());
}

#[test]
fn instances_of_a_dead_incarnation_are_removed() {
    let mut world = World::new();
    world.grant(1);
    world.settle();
    world.append(Event::EndpointDeleted(Empty {}));
    world.settle();
    assert!(world.instances.instances.is_empty());
}

#[test]
fn an_instance_of_a_dead_incarnation_does_not_count_for_the_new_one_of_its_name() {
    let mut world = World::new();
    world.grant(1);
    world.settle();
    let old = world.ids_in(InstanceState::Ready);
    assert_eq!(old.len(), 1);
    // It still has requests in flight, so it stays while the name is reused.
    world.busy.extend(old.clone());
    world.append(Event::EndpointDeleted(Empty {}));
    let again = World::new().endpoint.unwrap();
    world.append(Event::EndpointCreated(EndpointCreated {
        uid: Uid(Uuid::from_u128(11)),
        name: name("iris"),
        labels: BTreeMap::new(),
        spec: Default::default(),
        keys: again.keys,
    }));
    let new = Uid(Uuid::from_u128(12));
    world.append(Event::DeploymentCreated(DeploymentCreated {
        uid: new,
        deployment: name("blue"),
        labels: BTreeMap::new(),
        spec: spec(),
    }));
    let granted = world.granted[&blue()];
    world.granted = BTreeMap::from([(new, granted)]);
    world.settle();
    let ready = world.ids_in(InstanceState::Ready);
    assert_eq!(ready.len(), 1, "{ready:?}");
    assert_ne!(ready, old);
    let left = &world.instances.instances[&old[0]];
    assert_eq!(left.state(), InstanceState::Draining);
}

#[test]
fn instances_are_spread_over_the_nodes() {
    let mut world = two_nodes();
    world.grant(5);
    world.settle();
    assert_eq!(world.by_node(), on(&[("north", 3), ("south", 2)]));
}

#[test]
fn a_new_instance_goes_where_the_deployment_has_the_fewest() {
    let mut world = two_nodes();
    world.grant(4);
    world.settle();
    world.join("west", &[BackendKind::PROCESS]);
    world.grant(6);
    world.settle();
    let spread = on(&[("north", 2), ("south", 2), ("west", 2)]);
    assert_eq!(world.by_node(), spread);
}

#[test]
fn only_nodes_that_allow_the_backend_get_instances() {
    let mut world = two_nodes();
    world.join("east", &[BackendKind::SIMULATED]);
    world.grant(4);
    world.settle();
    assert_eq!(world.by_node(), on(&[("north", 2), ("south", 2)]));
}

#[test]
fn if_no_node_offers_the_backend_one_is_asked_and_refuses() {
    let mut world = World::new();
    world.own_node = None;
    world.join("east", &[BackendKind::SIMULATED]);
    world.grant(1);
    assert_eq!(requests(&world.plan()), 1);
    assert_eq!(world.by_node(), on(&[("east", 1)]));
}

#[test]
fn without_any_node_nothing_is_started_until_one_joins() {
    let mut world = World::new();
    world.own_node = None;
    world.grant(1);
    assert_eq!(world.plan(), []);
    world.join("north", &[BackendKind::PROCESS]);
    assert_eq!(requests(&world.plan()), 1);
}

#[test]
fn our_own_node_is_given_instances_before_it_is_a_member() {
    let mut world = World::new();
    world.grant(1);
    world.plan();
    assert_eq!(world.by_node(), on(&[("node-1", 1)]));
}

#[test]
fn nothing_is_requested_on_another_node_where_there_can_only_be_one() {
    let mut world = World::new();
    world.is_only_node = true;
    world.join("former", &[BackendKind::PROCESS]);
    world.grant(2);
    world.plan();
    assert_eq!(world.by_node(), on(&[("node-1", 2)]));
}

#[test]
fn what_a_former_node_ran_is_not_lost_to_the_only_one() {
    let mut world = World::new();
    world.own_node = Some("former");
    world.is_only_node = true;
    world.join("former", &[BackendKind::PROCESS]);
    world.grant(2);
    world.settle();
    world.own_node = Some("node-1");
    world.leave("former", LeaveReason::Silent);
    assert_eq!(world.plan(), []);
    world.grant(3);
    world.plan();
    assert_eq!(world.by_node(), on(&[("former", 2), ("node-1", 1)]));
}

#[test]
fn an_instance_is_on_the_node_that_reports_it() {
    let mut world = World::new();
    world.grant(1);
    world.plan();
    let id = world.ids_in(InstanceState::Starting).remove(0);
    let started = Event::InstanceStarted(InstanceStarted {
        id: id.clone(),
        generation: 1,
        address: "127.0.0.1:1".into(),
        pid: None,
        adopted: true,
    });
    let stream = StreamName::of_node(&EndpointKey::new(&name("iris")), "node-2");
    world.instances.apply(&Record {
        position: Position(100),
        prev: Position(99),
        bucket: Bucket(0),
        stream,
        version: 1,
        id: Uuid::from_u128(100),
        time: world.now,
        actor: Actor::service("test"),
        event: started,
    });
    assert_eq!(world.instances.instances[&id].node, "node-2");
}

#[test]
fn instances_of_a_node_that_fell_silent_are_replaced_at_once_and_drained_before_removal() {
    let mut world = two_nodes();
    world.grant(2);
    world.settle();
    let lost = world
        .instances
        .instances
        .values()
        .find(|i| i.node == "south");
    let lost = lost.unwrap().id.clone();
    world.busy.insert(lost.clone());
    world.leave("south", LeaveReason::Silent);
    let planned = world.plan();
    assert!(
        planned
            .iter()
            .any(|event| matches!(event, Event::InstanceDraining(draining)
        if draining.id == lost && draining.reason == RemovalReason::NodeLost))
    );
    let request = planned.iter().find_map(|event| match event {
        Event::InstanceRequested(requested) => Some(requested),
        _ => None,
    });
    let request = request.unwrap();
    assert_eq!(request.node, "north");
    assert_eq!(request.reason, RequestReason::Replacement);
    assert_eq!(world.plan(), [], "gateways may still use it");
    world.busy.clear();
    let planned = world.plan();
    assert!(
        matches!(planned.as_slice(), [Event::InstanceRemovalRequested(r)] if r.id == lost && r.node == "south")
    );
    assert_eq!(world.by_node(), on(&[("north", 2)]));
}

#[test]
fn a_node_that_said_goodbye_keeps_its_instances_for_a_while() {
    let mut world = two_nodes();
    world.grant(2);
    world.settle();
    world.leave("south", LeaveReason::Goodbye);
    world.now = world.now + NODE_GRACE - Span::from_millis(1);
    assert_eq!(world.plan(), []);
    world.now = world.now + Span::from_millis(1);
    assert_eq!(requests(&world.plan()), 1);
    assert_eq!(world.by_node(), on(&[("north", 2)]));
}

#[test]
fn a_node_that_comes_back_in_time_loses_nothing() {
    let mut world = two_nodes();
    world.grant(2);
    world.settle();
    world.leave("south", LeaveReason::Goodbye);
    world.now = world.now + Span::from_secs(30);
    world.join("south", &[BackendKind::PROCESS]);
    world.now = world.now + Span::from_secs(300);
    assert_eq!(world.plan(), []);
    assert_eq!(world.by_node(), on(&[("north", 1), ("south", 1)]));
}

#[test]
fn a_lost_node_that_comes_back_loses_its_instances_and_gets_new_ones() {
    let mut world = two_nodes();
    world.grant(2);
    world.settle();
    world.leave("south", LeaveReason::Silent);
    world.plan();
    world.plan();
    world.make_ready();
    world.join("south", &[BackendKind::PROCESS]);
    world.carry_out_removals();
    world.grant(3);
    world.settle();
    assert_eq!(world.by_node(), on(&[("north", 2), ("south", 1)]));
}

#[test]
fn nothing_is_started_elsewhere_while_the_only_fitting_node_restarts() {
    let mut world = World::new();
    world.own_node = None;
    world.join("north", &[BackendKind::PROCESS]);
    world.join("east", &[BackendKind::SIMULATED]);
    world.leave("north", LeaveReason::Goodbye);
    world.grant(1);
    assert_eq!(world.plan(), []);
    world.join("north", &[BackendKind::PROCESS]);
    world.plan();
    assert_eq!(world.by_node(), on(&[("north", 1)]));
}

#[test]
fn a_lost_node_does_not_hold_up_the_end_of_an_endpoint() {
    let mut world = two_nodes();
    world.grant(2);
    world.settle();
    world.append(Event::EndpointDeletionRequested(Empty {}));
    let deployment = name("blue");
    world.append(Event::DeploymentDeletionRequested(DeploymentEvent {
        deployment,
    }));
    world.leave("south", LeaveReason::Silent);
    world.plan();
    world.plan();
    let gone = |world: &World| {
        let endpoint = world.endpoint.as_ref().unwrap();
        let events = settle(
            endpoint,
            &world.instances,
            &BTreeMap::new(),
            &world.members,
            world.now,
        );
        events
            .iter()
            .any(|e| matches!(e, Event::EndpointDeleted(_)))
    };
    assert!(!gone(&world), "north has not answered yet");
    let north = world
        .instances
        .instances
        .values()
        .find(|i| i.node == "north");
    let ended = InstanceEnded {
        id: north.unwrap().id.clone(),
        reason: String::new(),
        exit_code: Some(0),
    };
    world.append(Event::InstanceStopped(ended));
    assert!(gone(&world));
}

proptest! {
    #[test]
    fn whatever_happens_the_plan_settles_on_the_granted_number(
        steps in prop::collection::vec((0u32..8, 0u8..4), 1..20)
    ) {
        let mut world = World::new();
        for (granted, happening) in steps {
            world.grant(granted);
            world.plan();
            match happening {
                0 => world.make_ready(),
                1 => if let Some(id) = world.ids_in(InstanceState::Starting).pop() { world.fail(id) },
                2 => world.change_command(),
                _ => world.carry_out_removals(),
            }
            world.now = world.now + Span::from_secs(5);
        }
        world.now = world.now + Span::from_secs(600);
        world.settle();
        world.now = world.now + Span::from_secs(600);
        world.settle();
        let granted = world.granted[&blue()].instances as usize;
        prop_assert_eq!(world.count(InstanceState::Ready), granted);
        prop_assert_eq!(world.instances.instances.len(), granted);
    }
}
