//! What a consumer starts from: its snapshots, or the log alone.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use bus::BusMessage;
use contract::ids::Position;
use proptest::prelude::*;
use runtime::consumer::Step;
use store::Store;
use support::positions::{TestConsumer, poison, skip_and_unpark, touch};
use support::{execute, key, open};

#[tokio::test]
async fn a_released_bucket_leaves_nothing_behind_that_a_fresh_fold_would_not_know() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let position = poison(&store, "iris").await;
    skip_and_unpark(&store, "iris", position).await;
    let mut test = TestConsumer::<1>::start(&store, false).await;
    let bucket = key("iris").bucket();
    assert!(!test.consumer.parking().skipped_in(bucket).is_empty());
    test.bus.send(BusMessage::Revoked(vec![bucket]));
    while !matches!(test.step().await, Step::Released(_)) {}
    assert!(test.consumer.parking().skipped_in(bucket).is_empty());
}

#[tokio::test]
async fn a_restart_begins_with_the_snapshot_and_applies_only_later_events() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    touch(&store, "rose").await;
    TestConsumer::<1>::start(&store, false).await.stop().await;
    touch(&store, "iris").await;
    let second = TestConsumer::<1>::start(&store, false).await;
    assert_eq!(second.applied, [3]);
    let states = second.stop().await;
    let iris = &states[&key("iris")];
    assert!(iris.contains("\"state\":[1,3]"), "{iris}");
    execute(&folder, "DELETE FROM snapshots").await;
    assert_eq!(
        TestConsumer::<1>::start(&store, false).await.states(),
        states
    );
}

#[tokio::test]
async fn a_snapshot_of_another_version_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    TestConsumer::<1>::start(&store, false).await.stop().await;
    let newer = TestConsumer::<2>::start(&store, false).await;
    assert_eq!(newer.applied, [1]);
    newer.stop().await;
    assert!(
        TestConsumer::<2>::start(&store, false)
            .await
            .applied
            .is_empty()
    );
    assert_eq!(TestConsumer::<1>::start(&store, false).await.applied, [1]);
}

#[tokio::test]
async fn a_damaged_snapshot_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    let states = TestConsumer::<1>::start(&store, false).await.stop().await;
    execute(
        &folder,
        "UPDATE snapshot_parts SET doc = replace(doc, '[1]', '[7]')",
    )
    .await;
    let second = TestConsumer::<1>::start(&store, false).await;
    assert_eq!(second.states(), states);
    assert_eq!(second.applied, [1]);
}

#[tokio::test]
async fn a_parked_endpoint_stays_parked_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "rose").await;
    let poison = poison(&store, "rose").await;
    let first = TestConsumer::<1>::start(&store, false).await;
    assert_eq!(first.parked, [key("rose")]);
    first.stop().await;
    let second = TestConsumer::<1>::start(&store, false).await;
    assert_eq!(second.parked, [key("rose")]);
    assert!(second.consumer.parking().is_parked(&key("rose")));
    second.stop().await;
    skip_and_unpark(&store, "rose", poison).await;
    let third = TestConsumer::<1>::start(&store, false).await.stop().await;
    assert!(third[&key("rose")].contains("\"state\":[1]"), "{third:?}");
    // Decisions about parking are in the snapshot as well.
    let fourth = TestConsumer::<1>::start(&store, false).await;
    assert_eq!(fourth.states(), third);
    assert!(fourth.consumer.parking().is_skipped(poison));
}

#[tokio::test]
async fn an_endpoint_is_unparked_once_its_event_can_be_processed() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "rose").await;
    // The snapshot is bound to this event, which stays unchanged.
    touch(&store, "rose").await;
    let unreadable = "UPDATE events SET type = 'x-' || type WHERE position = 1";
    execute(&folder, unreadable).await;
    let first = TestConsumer::<1>::start(&store, false).await;
    assert_eq!(first.parked, [key("rose")]);
    first.stop().await;
    let readable = "UPDATE events SET type = substr(type, 3) WHERE position = 1";
    execute(&folder, readable).await;
    let second = TestConsumer::<1>::start(&store, false).await;
    assert!(second.applied.is_empty(), "it starts from the snapshot");
    assert!(second.parked.is_empty());
    assert!(second.states()[&key("rose")].contains("\"state\":[1,2]"));
}

#[tokio::test]
async fn a_replaced_owner_stores_no_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    let first = TestConsumer::<1>::start(&store, false).await;
    let second = TestConsumer::<1>::start(&store, false).await;
    first.stop().await;
    let bucket = key("iris").bucket();
    assert_eq!(store.snapshot("positions", bucket, 1).await.unwrap(), None);
    second.stop().await;
    let stored = store.snapshot("positions", bucket, 1).await.unwrap();
    assert_eq!(stored.unwrap().meta.position, Position(1));
}

#[tokio::test]
async fn a_snapshot_waits_until_what_follows_has_been_written() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    let bucket = key("iris").bucket();
    let mut test = TestConsumer::<1>::start(&store, true).await;
    test.consumer.save_all().await;
    assert_eq!(store.snapshot("positions", bucket, 1).await.unwrap(), None);
    test.consumer.confirm_written(bucket, Position(1));
    test.consumer.save_all().await;
    let stored = store.snapshot("positions", bucket, 1).await.unwrap();
    assert_eq!(stored.unwrap().meta.position, Position(1));
}

#[tokio::test]
async fn many_events_lead_to_a_snapshot_while_running() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    for _ in 0..600 {
        touch(&store, "iris").await;
    }
    let mut test = TestConsumer::<1>::start(&store, false).await;
    let bucket = key("iris").bucket();
    while store
        .snapshot("positions", bucket, 1)
        .await
        .unwrap()
        .is_none()
    {
        let more = touch(&store, "rose").await;
        let records = store.read_all(Position(more.0 - 1), 1).await.unwrap();
        test.bus
            .send(BusMessage::Record(Arc::new(records[0].clone())));
        test.step().await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Each pair: what happens next, and to which of three endpoints.
    #[test]
    fn states_are_the_same_from_snapshots_at_random_positions_and_from_none(
        steps in prop::collection::vec((0u32..12, 0usize..3), 1..50),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let store = open(&folder).await;
            let mut poisoned: Vec<(usize, Position)> = Vec::new();
            let names = ["iris", "rose", "tulip"];
            for (event, endpoint) in steps {
                match event {
                    0 => poisoned.push((endpoint, poison(&store, names[endpoint]).await)),
                    1 => {
                        if let Some((endpoint, position)) = poisoned.pop() {
                            skip_and_unpark(&store, names[endpoint], position).await;
                        }
                    }
                    2 | 3 => drop(TestConsumer::<1>::start(&store, false).await.stop().await),
                    _ => drop(touch(&store, names[endpoint]).await),
                }
            }
            let resumed = TestConsumer::<1>::start(&store, false).await;
            execute(&folder, "DELETE FROM snapshots").await;
            let fresh = TestConsumer::<1>::start(&store, false).await;
            assert_eq!(resumed.states(), fresh.states());
            for (position, effect) in &resumed.effects {
                assert_eq!(fresh.effects.get(position), Some(effect), "at {position}");
            }
            for name in names {
                let parked = |test: &TestConsumer<1>| test.consumer.parking().parked_at(&key(name));
                assert_eq!(parked(&resumed), parked(&fresh));
            }
        });
    }

    /// Each tuple: what happens next, to which of three endpoints, and up to where the log is
    /// archived.
    #[test]
    fn states_are_the_same_wherever_the_log_is_stored(
        steps in prop::collection::vec((0u32..12, 0usize..3, 0u64..60), 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let store = open(&folder).await;
            let mut poisoned: Vec<(usize, Position)> = Vec::new();
            let names = ["iris", "rose", "tulip"];
            for (event, endpoint, position) in steps {
                match event {
                    0 => poisoned.push((endpoint, poison(&store, names[endpoint]).await)),
                    1 => {
                        if let Some((endpoint, position)) = poisoned.pop() {
                            skip_and_unpark(&store, names[endpoint], position).await;
                        }
                    }
                    2 => drop(TestConsumer::<1>::start(&store, false).await.stop().await),
                    3 | 4 => archive(&store, position).await,
                    _ => drop(touch(&store, names[endpoint]).await),
                }
            }
            let head = store.head().await.unwrap();
            let other = tempfile::tempdir().unwrap();
            let copy = open(&other).await;
            let hash = store::copy(&store, &copy, |_, _| {}).await.unwrap();
            assert_eq!(store::log_hash(&store, head).await.unwrap(), hash);
            let resumed = TestConsumer::<1>::start(&store, false).await;
            execute(&folder, "DELETE FROM snapshots").await;
            let fresh = TestConsumer::<1>::start(&store, false).await;
            let unarchived = TestConsumer::<1>::start(&copy, false).await;
            assert_eq!(resumed.states(), unarchived.states());
            assert_eq!(fresh.states(), unarchived.states());
            assert_eq!(fresh.applied, unarchived.applied);
        });
    }
}

async fn archive(store: &Store, before: u64) {
    let ttl = std::time::Duration::from_secs(60);
    let fence = store.acquire_lease(store::ARCHIVE_LEASE, "test", ttl).await;
    let limits = store::SealLimits {
        before: Some(Position(before)),
        events_max: Some(7),
        ..store::SealLimits::default()
    };
    let now = contract::time::Timestamp::from_secs(2);
    let sealed = store::seal(store, &fence.unwrap().unwrap(), &limits, now, |_| {}).await;
    sealed.unwrap();
}
