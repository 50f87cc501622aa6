//! The relay of a bus that outlives processes.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use contract::events::{Empty, Event};
use contract::ids::{Bucket, Position};
use contract::log::StreamKind;
use runtime::health::Health;
use runtime::metrics::Metrics;
use runtime::relay::{RELAY, RelayDeps, run_durable};
use store::Store;
use support::{Mood, ScriptedBus, append_to, execute, open};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

fn start(
    store: &Store,
    bus: &Arc<ScriptedBus>,
    holder: &str,
    health: &Health,
) -> (JoinHandle<()>, CancellationToken) {
    let stop = CancellationToken::new();
    let deps = RelayDeps {
        store: store.clone(),
        bus: bus.clone(),
        holder: holder.to_owned(),
        component: health.component("relay"),
        metrics: Metrics::default(),
    };
    (tokio::spawn(run_durable(deps, stop.clone())), stop)
}

async fn write(store: &Store, count: usize) {
    for _ in 0..count {
        let event = Event::EndpointDeletionRequested(Empty {});
        append_to(store, StreamKind::Endpoint, "iris", event).await;
    }
}

#[tokio::test]
async fn everything_is_published_in_order_and_the_cursor_says_how_far() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    write(&store, 30).await;
    let (relay, stop) = start(&store, &bus, "a", &Health::default());
    bus.until_published(30).await;
    write(&store, 30).await;
    let published = bus.until_published(60).await;
    assert_eq!(published, (1..=60).collect::<Vec<_>>());
    stop.cancel();
    relay.await.unwrap();
    let cursor = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    assert!(cursor.0 >= 30, "{cursor}");
}

#[tokio::test]
async fn what_the_bus_refuses_is_offered_again_and_readiness_says_so_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let (bus, health) = (ScriptedBus::new(), Health::default());
    bus.set(Mood::Refuses);
    write(&store, 5).await;
    let (relay, stop) = start(&store, &bus, "a", &health);
    let mut refused = bus.refused.subscribe();
    refused.wait_for(|count| *count >= 2).await.unwrap();
    let missing = health.missing().join("\n");
    assert!(missing.contains("the bus cannot be reached"), "{missing}");
    bus.set(Mood::Takes);
    assert_eq!(bus.until_published(5).await, [1, 2, 3, 4, 5]);
    health.until_ready().await;
    stop.cancel();
    relay.await.unwrap();
}

#[tokio::test]
async fn who_dies_between_publishing_and_moving_the_cursor_leaves_nothing_out() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    bus.set(Mood::Hangs);
    write(&store, 5).await;
    let (relay, _) = start(&store, &bus, "a", &Health::default());
    bus.until_published(5).await;
    relay.abort();
    assert!(relay.await.unwrap_err().is_cancelled());
    bus.set(Mood::Takes);
    let (relay, stop) = start(&store, &bus, "a", &Health::default());
    assert_eq!(
        bus.until_published(10).await,
        [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    );
    stop.cancel();
    relay.await.unwrap();
}

#[tokio::test]
async fn of_two_relays_one_publishes_and_the_other_goes_on_where_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let (first, second) = (ScriptedBus::new(), ScriptedBus::new());
    let (relay, stop) = start(&store, &first, "a", &Health::default());
    write(&store, 10).await;
    first.until_published(10).await;
    let (other, stop_other) = start(&store, &second, "b", &Health::default());
    write(&store, 10).await;
    first.until_published(20).await;
    assert!(second.published.borrow().is_empty());
    stop.cancel();
    relay.await.unwrap();
    write(&store, 1).await;
    let published = second.until_published(1).await;
    assert!(published[0] <= 21, "nothing is left out: {published:?}");
    let all = second.until_published(21 - published[0] as usize + 1).await;
    assert_eq!(all, (published[0]..=21).collect::<Vec<_>>());
    stop_other.cancel();
    other.await.unwrap();
}

#[tokio::test]
async fn what_only_a_newer_release_can_read_is_published_as_it_stands() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let (bus, health) = (ScriptedBus::new(), Health::default());
    write(&store, 5).await;
    let newer = "UPDATE events SET type = 'endpoint.not-invented-yet', type_version = 7,
        data = '{ \"b\": 1, \"a\":2}' WHERE position IN (1, 3)";
    execute(&folder, newer).await;
    let as_stored = store.read_raw(Position::START, 10).await.unwrap();
    bus.set(Mood::Refuses);
    let (relay, stop) = start(&store, &bus, "a", &health);
    let mut refused = bus.refused.subscribe();
    refused.wait_for(|count| *count >= 2).await.unwrap();
    assert!(!health.missing().is_empty());
    bus.set(Mood::Takes);
    assert_eq!(bus.until_published(5).await, [1, 2, 3, 4, 5]);
    stop.cancel();
    relay.await.unwrap();
    let published = bus.stored.lock().unwrap().clone();
    assert_eq!(
        published, as_stored,
        "all that the log has, and as it has it"
    );
    for event in [&published[0], &published[2]] {
        assert_eq!(event.data, "{ \"b\": 1, \"a\":2}");
        assert_eq!(event.type_name, "endpoint.not-invented-yet");
        assert_eq!(event.type_version, 7);
    }
}

#[tokio::test]
async fn a_field_that_this_release_does_not_know_goes_out_with_its_event() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    write(&store, 2).await;
    let newer = "UPDATE events SET data = '{ \"notInvented\": [1, 2.50] }' WHERE position = 2";
    execute(&folder, newer).await;
    let read = store.read_all(Position::START, 10).await.unwrap();
    assert_eq!(read.len(), 2, "it can be read all the same");
    let (relay, stop) = start(&store, &bus, "a", &Health::default());
    assert_eq!(bus.until_published(2).await, [1, 2]);
    stop.cancel();
    relay.await.unwrap();
    let published = bus.stored.lock().unwrap().clone();
    assert_eq!(published[1].data, "{ \"notInvented\": [1, 2.50] }");
}
