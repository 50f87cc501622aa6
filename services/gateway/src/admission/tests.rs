//! Slots and turns of one deployment, alone and by several threads.

use super::*;

fn deployment(slots: &[u32]) -> Arc<DeploymentState> {
    let endpoint = EndpointKey::new(&"iris".parse().unwrap());
    let uid = Uid(uuid::Uuid::nil());
    let state = Arc::new(DeploymentState::new(
        endpoint,
        "blue".parse().unwrap(),
        uid,
        0,
    ));
    set(&state, slots, &[]);
    state
}

fn set(state: &Arc<DeploymentState>, slots: &[u32], draining: &[usize]) {
    let wanted: Vec<Wanted> = slots
        .iter()
        .enumerate()
        .map(|(index, slots)| Wanted {
            id: format!("i{index}").into(),
            address: "127.0.0.1:1".into(),
            draining: draining.contains(&index),
            slots: *slots,
        })
        .collect();
    let mut serial = 100;
    state.set_instances(&wanted, || {
        serial += 1;
        serial
    });
}

#[test]
fn no_more_are_admitted_than_twice_the_limit_for_each_instance() {
    let state = deployment(&[3, 3]);
    let admitted: Vec<Pending> = (0..20).filter_map(|_| state.admit(3)).collect();
    assert_eq!(admitted.len(), 12);
    let dealt = deployment(&[2, 1]);
    let admitted: Vec<Pending> = (0..20).filter_map(|_| dealt.admit(3)).collect();
    assert_eq!(admitted.len(), 6, "another gateway admits the other six");
    let none = deployment(&[]);
    let admitted: Vec<Pending> = (0..20).filter_map(|_| none.admit(3)).collect();
    assert_eq!(admitted.len(), 6);
    drop(admitted);
    assert_eq!(none.pending(), 0);
}

#[test]
fn every_slot_is_found_and_then_none() {
    let state = deployment(&[1, 0, 2, 1]);
    let slots: Vec<Slot> = (0..).map_while(|n| state.try_slot(n, 0)).collect();
    assert_eq!(slots.len(), 4);
}

#[test]
fn who_waits_longest_is_served_first_and_nobody_overtakes() {
    let state = deployment(&[1]);
    let held = state.try_slot(0, 0).unwrap();
    let mut first = state.wait(|| ());
    let mut second = state.wait(|| ());
    assert!(state.try_slot(0, 0).is_none());
    drop(held);
    let slot = first.turn.try_recv().unwrap();
    assert!(second.turn.try_recv().is_err());
    assert!(state.try_slot(0, 0).is_none());
    drop(slot);
    assert!(second.turn.try_recv().is_ok());
}

#[test]
fn a_slot_of_one_who_left_the_queue_goes_to_the_next() {
    let state = deployment(&[1]);
    let held = state.try_slot(0, 0).unwrap();
    let first = state.wait(|| ());
    let mut second = state.wait(|| ());
    drop(held);
    // The first had its slot already, and leaves without having taken it.
    drop(first);
    assert!(second.turn.try_recv().is_ok());
}

#[test]
fn a_new_instance_serves_those_who_wait() {
    let state = deployment(&[]);
    let mut waiting = state.wait(|| ());
    assert!(waiting.turn.try_recv().is_err());
    set(&state, &[1], &[]);
    assert!(waiting.turn.try_recv().is_ok());
}

#[test]
fn an_instance_that_drains_or_left_gets_nothing_new_and_is_reported_until_it_is_empty() {
    let state = deployment(&[2, 2]);
    let slots: Vec<Slot> = (0..2).map_while(|n| state.try_slot(n, 0)).collect();
    assert_eq!(slots.len(), 2);
    set(&state, &[2, 2], &[1]);
    let more: Vec<Slot> = (0..).map_while(|n| state.try_slot(n, 0)).collect();
    assert!(more.iter().all(|slot| slot.instance.id.as_str() == "i0"));
    set(&state, &[2], &[]);
    assert_eq!(state.reported_instances().len(), 2);
    drop((slots, more));
    assert_eq!(state.reported_instances().len(), 2);
    assert_eq!(state.reported_instances().len(), 1);
}

#[test]
fn an_index_is_of_one_instance_until_that_has_been_reported_a_last_time() {
    let state = deployment(&[1, 1]);
    let indices = || {
        let reported = state.reported_instances();
        let of = reported.iter().map(|i| (i.id.to_string(), i.index));
        of.collect::<std::collections::BTreeMap<_, _>>()
    };
    let named = |pairs: &[(&str, usize)]| {
        pairs
            .iter()
            .map(|(id, index)| (String::from(*id), *index))
            .collect()
    };
    let put = |ids: &[&str]| {
        let wanted = ids.iter().map(|id| Wanted {
            id: String::from(*id).into(),
            address: "127.0.0.1:1".into(),
            draining: false,
            slots: 1,
        });
        state.set_instances(&wanted.collect::<Vec<_>>(), || 0);
    };
    assert_eq!(indices(), named(&[("i0", 0), ("i1", 1)]));
    let held: Vec<Slot> = (0..2).map_while(|n| state.try_slot(n, 0)).collect();
    put(&["i1", "new"]);
    assert_eq!(indices(), named(&[("i0", 0), ("i1", 1), ("new", 2)]));
    drop(held);
    indices();
    put(&["i1", "new", "newer"]);
    assert_eq!(indices(), named(&[("newer", 0), ("i1", 1), ("new", 2)]));
}

#[test]
fn slots_are_kept_by_threads_that_queue_and_release() {
    let state = deployment(&[2, 1]);
    let on = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().build();
                let runtime = runtime.unwrap();
                for round in 0..2_000 {
                    let slot = state.try_slot(round, 0).unwrap_or_else(|| {
                        let mut waiting = state.wait(|| ());
                        let turn = std::future::poll_fn(|cx| waiting.poll(cx));
                        runtime.block_on(turn).unwrap()
                    });
                    assert!(on.fetch_add(1, Ordering::SeqCst) < 3);
                    on.fetch_sub(1, Ordering::SeqCst);
                    drop(slot);
                }
            });
        }
    });
    assert_eq!(state.queued.now(), 0);
    assert!(
        state
            .reported_instances()
            .iter()
            .all(|i| i.in_flight() == 0)
    );
}
