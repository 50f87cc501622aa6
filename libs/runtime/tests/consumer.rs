//! What a consumer begins with: its snapshots, or the log alone.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use bus::BusMessage;
use contract::events::{ConsumerUnparked, Empty, Event, EventSkipped};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, StreamKind, StreamName};
use proptest::prelude::*;
use runtime::clock::SystemClock;
use runtime::consumer::{Consumer, ConsumerConfig, ConsumerDeps, Fold, Step};
use runtime::health::Health;
use serde::{Deserialize, Serialize};
use store::Store;
use support::{ScriptedBus, append_to, execute, key, open};

/// Remembers the positions of an endpoint's events. An endpoint's deletion is poison to it.
struct Positions<const VERSION: u32>;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Seen(Vec<Position>);

impl<const VERSION: u32> Fold for Positions<VERSION> {
    type State = Seen;
    type Effect = ();

    const VERSION: u32 = VERSION;
    const READS: &'static [StreamKind] = &[StreamKind::Endpoint, StreamKind::Instances];

    fn apply(&self, _key: &EndpointKey, state: &mut Seen, record: &Record) {
        assert!(!matches!(record.event, Event::EndpointDeleted(_)), "poison");
        state.0.push(record.position);
    }

    fn writes(&self, stream: &StreamName) -> bool {
        stream.kind() == Some(StreamKind::Instances)
    }
}

/// What one life of a consumer has come to.
struct Life<const VERSION: u32> {
    consumer: Consumer<Positions<VERSION>>,
    bus: Arc<ScriptedBus>,
    /// Positions that were applied, in order.
    applied: Vec<u64>,
    parked: Vec<EndpointKey>,
}

impl<const VERSION: u32> Life<VERSION> {
    /// Owns everything, and has caught up.
    async fn begin(store: &Store, waits_for_writes: bool) -> Self {
        let bus = ScriptedBus::new();
        let config = ConsumerConfig {
            waits_for_writes,
            ..ConsumerConfig::shared("positions")
        };
        let deps = ConsumerDeps {
            store: store.clone(),
            bus: bus.clone(),
            clock: Arc::new(SystemClock),
        };
        let component = Health::default().component("positions");
        let mut life = Self {
            consumer: Consumer::open(config, Positions, deps, component),
            bus: bus.clone(),
            applied: Vec::new(),
            parked: Vec::new(),
        };
        bus.send(BusMessage::Assigned(Bucket::of_endpoints().collect()));
        while !matches!(life.step().await, Step::CaughtUp(_)) {}
        life
    }

    async fn step(&mut self) -> Step<()> {
        let step = self.consumer.next().await.unwrap();
        match &step {
            Step::Applied(applied) => {
                let taken = applied.iter().filter(|one| one.effect.is_some());
                self.applied.extend(taken.map(|one| one.record.position.0));
            }
            Step::Parked(key) => self.parked.push(key.clone()),
            _ => {}
        }
        step
    }

    async fn end(mut self) -> BTreeMap<EndpointKey, String> {
        self.consumer.save_all().await;
        self.states()
    }

    fn states(&self) -> BTreeMap<EndpointKey, String> {
        let entries = self.consumer.folds().lock();
        let text =
            |(key, entry): (&EndpointKey, _)| (key.clone(), serde_json::to_string(entry).unwrap());
        entries.iter().map(text).collect()
    }
}

async fn touch(store: &Store, endpoint: &str) -> Position {
    let event = Event::EndpointDeletionRequested(Empty {});
    append_to(store, StreamKind::Endpoint, endpoint, event)
        .await
        .position
}

async fn poison(store: &Store, endpoint: &str) -> Position {
    let event = Event::EndpointDeleted(Empty {});
    append_to(store, StreamKind::Endpoint, endpoint, event)
        .await
        .position
}

async fn skip_and_unpark(store: &Store, endpoint: &str, position: Position) {
    let skipped = Event::EventSkipped(EventSkipped {
        consumer: "positions".into(),
        position,
        reason: "test".into(),
    });
    append_to(store, StreamKind::Parking, endpoint, skipped).await;
    let unparked = Event::ConsumerUnparked(ConsumerUnparked {
        consumer: "positions".into(),
        reason: "test".into(),
    });
    append_to(store, StreamKind::Parking, endpoint, unparked).await;
}

#[tokio::test]
async fn who_starts_again_begins_with_the_snapshot_and_applies_only_what_came_after() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    touch(&store, "rose").await;
    Life::<1>::begin(&store, false).await.end().await;
    touch(&store, "iris").await;
    let second = Life::<1>::begin(&store, false).await;
    assert_eq!(second.applied, [3]);
    let states = second.end().await;
    let iris = &states[&key("iris")];
    assert!(iris.contains("\"state\":[1,3]"), "{iris}");
    execute(&folder, "DELETE FROM snapshots").await;
    assert_eq!(Life::<1>::begin(&store, false).await.states(), states);
}

#[tokio::test]
async fn a_snapshot_of_another_version_is_not_begun_with() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    Life::<1>::begin(&store, false).await.end().await;
    let newer = Life::<2>::begin(&store, false).await;
    assert_eq!(newer.applied, [1]);
    newer.end().await;
    assert!(Life::<2>::begin(&store, false).await.applied.is_empty());
    assert_eq!(Life::<1>::begin(&store, false).await.applied, [1]);
}

#[tokio::test]
async fn a_damaged_snapshot_is_not_begun_with() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    let states = Life::<1>::begin(&store, false).await.end().await;
    execute(
        &folder,
        "UPDATE snapshot_parts SET doc = replace(doc, '[1]', '[7]')",
    )
    .await;
    let second = Life::<1>::begin(&store, false).await;
    assert_eq!(second.states(), states);
    assert_eq!(second.applied, [1]);
}

#[tokio::test]
async fn an_endpoint_that_is_parked_is_so_in_the_next_life_too() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "rose").await;
    let poison = poison(&store, "rose").await;
    let first = Life::<1>::begin(&store, false).await;
    assert_eq!(first.parked, [key("rose")]);
    first.end().await;
    let second = Life::<1>::begin(&store, false).await;
    assert_eq!(second.parked, [key("rose")]);
    assert!(second.consumer.parking().is_parked(&key("rose")));
    second.end().await;
    skip_and_unpark(&store, "rose", poison).await;
    let third = Life::<1>::begin(&store, false).await.end().await;
    assert!(third[&key("rose")].contains("\"state\":[1]"), "{third:?}");
    // What people decided is in the snapshot as well.
    let fourth = Life::<1>::begin(&store, false).await;
    assert_eq!(fourth.states(), third);
    assert!(fourth.consumer.parking().is_skipped(poison));
}

#[tokio::test]
async fn who_can_digest_what_an_earlier_life_could_not_takes_the_endpoint_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "rose").await;
    // The snapshot is bound to this one, which stays as it is.
    touch(&store, "rose").await;
    let unreadable = "UPDATE events SET type = 'x-' || type WHERE position = 1";
    execute(&folder, unreadable).await;
    let first = Life::<1>::begin(&store, false).await;
    assert_eq!(first.parked, [key("rose")]);
    first.end().await;
    let readable = "UPDATE events SET type = substr(type, 3) WHERE position = 1";
    execute(&folder, readable).await;
    let second = Life::<1>::begin(&store, false).await;
    assert!(second.applied.is_empty(), "it begins with the snapshot");
    assert!(second.parked.is_empty());
    assert!(second.states()[&key("rose")].contains("\"state\":[1,2]"));
}

#[tokio::test]
async fn who_was_replaced_stores_no_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    let first = Life::<1>::begin(&store, false).await;
    let second = Life::<1>::begin(&store, false).await;
    first.end().await;
    let bucket = key("iris").bucket();
    assert_eq!(store.snapshot("positions", bucket, 1).await.unwrap(), None);
    second.end().await;
    let stored = store.snapshot("positions", bucket, 1).await.unwrap();
    assert_eq!(stored.unwrap().meta.position, Position(1));
}

#[tokio::test]
async fn a_snapshot_waits_until_what_follows_from_it_has_been_written() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    touch(&store, "iris").await;
    let bucket = key("iris").bucket();
    let mut life = Life::<1>::begin(&store, true).await;
    life.consumer.save_all().await;
    assert_eq!(store.snapshot("positions", bucket, 1).await.unwrap(), None);
    life.consumer.confirm_written(bucket, Position(1));
    life.consumer.save_all().await;
    let stored = store.snapshot("positions", bucket, 1).await.unwrap();
    assert_eq!(stored.unwrap().meta.position, Position(1));
}

#[tokio::test]
async fn many_events_lead_to_a_snapshot_without_an_end_of_the_service() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    for _ in 0..600 {
        touch(&store, "iris").await;
    }
    let mut life = Life::<1>::begin(&store, false).await;
    let bucket = key("iris").bucket();
    while store
        .snapshot("positions", bucket, 1)
        .await
        .unwrap()
        .is_none()
    {
        let more = touch(&store, "rose").await;
        let records = store.read_all(Position(more.0 - 1), 1).await.unwrap();
        life.bus
            .send(BusMessage::Record(Arc::new(records[0].clone())));
        life.step().await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Each number: what happens next, to which of three endpoints.
    #[test]
    fn states_are_the_same_from_snapshots_at_random_positions_and_from_none(
        what in prop::collection::vec((0u32..12, 0usize..3), 1..50),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let store = open(&folder).await;
            let mut poisoned: Vec<(usize, Position)> = Vec::new();
            let names = ["iris", "rose", "tulip"];
            for (event, endpoint) in what {
                match event {
                    0 => poisoned.push((endpoint, poison(&store, names[endpoint]).await)),
                    1 => {
                        if let Some((endpoint, position)) = poisoned.pop() {
                            skip_and_unpark(&store, names[endpoint], position).await;
                        }
                    }
                    2 | 3 => drop(Life::<1>::begin(&store, false).await.end().await),
                    _ => drop(touch(&store, names[endpoint]).await),
                }
            }
            let resumed = Life::<1>::begin(&store, false).await;
            execute(&folder, "DELETE FROM snapshots").await;
            let fresh = Life::<1>::begin(&store, false).await;
            assert_eq!(resumed.states(), fresh.states());
            for name in names {
                let parked = |life: &Life<1>| life.consumer.parking().parked_at(&key(name));
                assert_eq!(parked(&resumed), parked(&fresh));
            }
        });
    }

    /// Each number: what happens next, to which of three endpoints, and up to where is archived.
    #[test]
    fn states_are_the_same_wherever_the_log_stands(
        what in prop::collection::vec((0u32..12, 0usize..3, 0u64..60), 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let store = open(&folder).await;
            let mut poisoned: Vec<(usize, Position)> = Vec::new();
            let names = ["iris", "rose", "tulip"];
            for (event, endpoint, position) in what {
                match event {
                    0 => poisoned.push((endpoint, poison(&store, names[endpoint]).await)),
                    1 => {
                        if let Some((endpoint, position)) = poisoned.pop() {
                            skip_and_unpark(&store, names[endpoint], position).await;
                        }
                    }
                    2 => drop(Life::<1>::begin(&store, false).await.end().await),
                    3 | 4 => archive(&store, position).await,
                    _ => drop(touch(&store, names[endpoint]).await),
                }
            }
            let head = store.head().await.unwrap();
            let other = tempfile::tempdir().unwrap();
            let whole = open(&other).await;
            let hash = store::copy(&store, &whole, |_, _| {}).await.unwrap();
            assert_eq!(store::log_hash(&store, head).await.unwrap(), hash);
            let resumed = Life::<1>::begin(&store, false).await;
            execute(&folder, "DELETE FROM snapshots").await;
            let fresh = Life::<1>::begin(&store, false).await;
            let unarchived = Life::<1>::begin(&whole, false).await;
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
