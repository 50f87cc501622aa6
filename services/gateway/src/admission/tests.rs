//! Slots and queueing of one deployment, single-threaded and across threads.

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
    set_instances(&state, slots, &[]);
    state
}

fn set_instances(state: &Arc<DeploymentState>, slots: &[u32], draining: &[usize]) {
    let routed: Vec<RoutedInstance> = slots
        .iter()
        .enumerate()
        .map(|(index, slots)| RoutedInstance {
            id: format!("i{index}").into(),
            address: "127.0.0.1:1".into(),
            draining: draining.contains(&index),
            slots: *slots,
        })
        .collect();
    let mut serial = 100;
    state.set_instances(&routed, || {
        serial += 1;
        serial
    });
}

#[test]
fn at_most_twice_the_limit_of_each_instance_is_admitted() {
    let state = deployment(&[3, 3]);
    let admitted: Vec<PendingGuard> = (0..20).filter_map(|_| state.admit(3)).collect();
    assert_eq!(admitted.len(), 12);
    let allocated = deployment(&[2, 1]);
    let admitted: Vec<PendingGuard> = (0..20).filter_map(|_| allocated.admit(3)).collect();
    assert_eq!(admitted.len(), 6, "another gateway admits the other six");
    let none = deployment(&[]);
    let admitted: Vec<PendingGuard> = (0..20).filter_map(|_| none.admit(3)).collect();
    assert_eq!(admitted.len(), 6);
    drop(admitted);
    assert_eq!(none.pending(), 0);
}

#[test]
fn every_slot_can_be_acquired_and_then_none() {
    let state = deployment(&[1, 0, 2, 1]);
    let slots: Vec<Slot> = (0..).map_while(|n| state.try_acquire_slot(n, 0)).collect();
    assert_eq!(slots.len(), 4);
}

#[test]
fn the_queue_is_first_in_first_out() {
    let state = deployment(&[1]);
    let held = state.try_acquire_slot(0, 0).unwrap();
    let mut first = state.enqueue(|| ());
    let mut second = state.enqueue(|| ());
    assert!(state.try_acquire_slot(0, 0).is_none());
    drop(held);
    let slot = first.receiver.try_recv().unwrap();
    assert!(second.receiver.try_recv().is_err());
    assert!(state.try_acquire_slot(0, 0).is_none());
    drop(slot);
    assert!(second.receiver.try_recv().is_ok());
}

#[test]
fn a_slot_granted_to_a_request_that_left_goes_to_the_next() {
    let state = deployment(&[1]);
    let held = state.try_acquire_slot(0, 0).unwrap();
    let first = state.enqueue(|| ());
    let mut second = state.enqueue(|| ());
    drop(held);
    // The first already had its slot, and leaves without taking it.
    drop(first);
    assert!(second.receiver.try_recv().is_ok());
}

#[test]
fn a_new_instance_serves_queued_requests() {
    let state = deployment(&[]);
    let mut ticket = state.enqueue(|| ());
    assert!(ticket.receiver.try_recv().is_err());
    set_instances(&state, &[1], &[]);
    assert!(ticket.receiver.try_recv().is_ok());
}

#[test]
fn a_draining_or_removed_instance_gets_no_requests_and_is_reported_until_it_is_empty() {
    let state = deployment(&[2, 2]);
    let slots: Vec<Slot> = (0..2).map_while(|n| state.try_acquire_slot(n, 0)).collect();
    assert_eq!(slots.len(), 2);
    set_instances(&state, &[2, 2], &[1]);
    let more: Vec<Slot> = (0..).map_while(|n| state.try_acquire_slot(n, 0)).collect();
    assert!(more.iter().all(|slot| slot.instance.id.as_str() == "i0"));
    set_instances(&state, &[2], &[]);
    assert_eq!(state.reported_instances().len(), 2);
    drop((slots, more));
    assert_eq!(state.reported_instances().len(), 2);
    assert_eq!(state.reported_instances().len(), 1);
}

#[test]
fn an_index_is_reused_only_after_the_final_report_of_its_instance() {
    let state = deployment(&[1, 1]);
    let indices = || {
        let reported = state.reported_instances();
        let of = reported.iter().map(|i| (i.id.to_string(), i.index));
        of.collect::<std::collections::BTreeMap<_, _>>()
    };
    let expected = |pairs: &[(&str, usize)]| {
        pairs
            .iter()
            .map(|(id, index)| (String::from(*id), *index))
            .collect()
    };
    let apply = |ids: &[&str]| {
        let routed = ids.iter().map(|id| RoutedInstance {
            id: String::from(*id).into(),
            address: "127.0.0.1:1".into(),
            draining: false,
            slots: 1,
        });
        state.set_instances(&routed.collect::<Vec<_>>(), || 0);
    };
    assert_eq!(indices(), expected(&[("i0", 0), ("i1", 1)]));
    let held: Vec<Slot> = (0..2).map_while(|n| state.try_acquire_slot(n, 0)).collect();
    apply(&["i1", "new"]);
    assert_eq!(indices(), expected(&[("i0", 0), ("i1", 1), ("new", 2)]));
    drop(held);
    indices();
    apply(&["i1", "new", "newer"]);
    assert_eq!(indices(), expected(&[("newer", 0), ("i1", 1), ("new", 2)]));
}

#[test]
fn slots_are_never_exceeded_by_threads_that_queue_and_release() {
    let state = deployment(&[2, 1]);
    let concurrent = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().build();
                let runtime = runtime.unwrap();
                for round in 0..2_000 {
                    let slot = state.try_acquire_slot(round, 0).unwrap_or_else(|| {
                        let mut ticket = state.enqueue(|| ());
                        let granted = std::future::poll_fn(|cx| ticket.poll(cx));
                        runtime.block_on(granted).unwrap()
                    });
                    assert!(concurrent.fetch_add(1, Ordering::SeqCst) < 3);
                    concurrent.fetch_sub(1, Ordering::SeqCst);
                    drop(slot);
                }
            });
        }
    });
    assert_eq!(state.queued.current(), 0);
    assert!(
        state
            .reported_instances()
            .iter()
            .all(|i| i.in_flight() == 0)
    );
}
