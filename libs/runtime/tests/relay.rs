//! The durable relay.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use contract::events::{Empty, Event};
use contract::ids::{Bucket, Position};
use contract::log::StreamKind;
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use runtime::relay::{RELAY, RelayDeps, run_durable};
use store::Store;
use support::{PublishMode, ScriptedBus, append_to, execute, open};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

fn start(
    store: &Store,
    bus: &Arc<ScriptedBus>,
    holder: &str,
    health: &HealthRegistry,
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
async fn everything_is_published_in_order_and_the_cursor_moves() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    write(&store, 30).await;
    let (relay, stop) = start(&store, &bus, "a", &HealthRegistry::default());
    bus.wait_for_published(30).await;
    write(&store, 30).await;
    let published = bus.wait_for_published(60).await;
    assert_eq!(published, (1..=60).collect::<Vec<_>>());
    stop.cancel();
    relay.await.unwrap();
    let cursor = store.cursor(RELAY, Bucket::GLOBAL).await.unwrap();
    assert!(cursor.0 >= 30, "{cursor}");
}

#[tokio::test]
async fn refused_records_are_retried_and_readiness_reports_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let (bus, health) = (ScriptedBus::new(), HealthRegistry::default());
    bus.set_mode(PublishMode::Refuse);
    write(&store, 5).await;
    let (relay, stop) = start(&store, &bus, "a", &health);
    let mut refused = bus.refused.subscribe();
    refused.wait_for(|count| *count >= 2).await.unwrap();
    let missing = health.missing().join("\n");
    assert!(missing.contains("the bus cannot be reached"), "{missing}");
    bus.set_mode(PublishMode::Accept);
    assert_eq!(bus.wait_for_published(5).await, [1, 2, 3, 4, 5]);
    health.until_ready().await;
    stop.cancel();
    relay.await.unwrap();
}

#[tokio::test]
async fn a_crash_before_the_cursor_moves_leaves_nothing_out() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    bus.set_mode(PublishMode::Hang);
    write(&store, 5).await;
    let (relay, _) = start(&store, &bus, "a", &HealthRegistry::default());
    bus.wait_for_published(5).await;
    relay.abort();
    assert!(relay.await.unwrap_err().is_cancelled());
    bus.set_mode(PublishMode::Accept);
    let (relay, stop) = start(&store, &bus, "a", &HealthRegistry::default());
    assert_eq!(
        bus.wait_for_published(10).await,
        [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    );
    stop.cancel();
    relay.await.unwrap();
}

#[tokio::test]
async fn of_two_relays_one_publishes_and_the_other_continues_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let (first, second) = (ScriptedBus::new(), ScriptedBus::new());
    let (relay, stop) = start(&store, &first, "a", &HealthRegistry::default());
    write(&store, 10).await;
    first.wait_for_published(10).await;
    let (other, stop_other) = start(&store, &second, "b", &HealthRegistry::default());
    write(&store, 10).await;
    first.wait_for_published(20).await;
    assert!(second.published.borrow().is_empty());
    stop.cancel();
    relay.await.unwrap();
    write(&store, 1).await;
    let published = second.wait_for_published(1).await;
    assert!(published[0] <= 21, "nothing is left out: {published:?}");
    let all = second
        .wait_for_published(21 - published[0] as usize + 1)
        .await;
    assert_eq!(all, (published[0]..=21).collect::<Vec<_>>());
    stop_other.cancel();
    other.await.unwrap();
}

#[tokio::test]
async fn events_of_a_newer_release_are_published_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let (bus, health) = (ScriptedBus::new(), HealthRegistry::default());
    write(&store, 5).await;
    let newer = "UPDATE events SET type = 'endpoint.not-invented-yet', type_version = 7,
        data = '{ \"b\": 1, \"a\":2}' WHERE position IN (1, 3)";
    execute(&folder, newer).await;
    let as_stored = store.read_raw(Position::START, 10).await.unwrap();
    bus.set_mode(PublishMode::Refuse);
    let (relay, stop) = start(&store, &bus, "a", &health);
    let mut refused = bus.refused.subscribe();
    refused.wait_for(|count| *count >= 2).await.unwrap();
    assert!(!health.missing().is_empty());
    bus.set_mode(PublishMode::Accept);
    assert_eq!(bus.wait_for_published(5).await, [1, 2, 3, 4, 5]);
    stop.cancel();
    relay.await.unwrap();
    let published = bus.stored.lock().unwrap().clone();
    assert_eq!(published, as_stored, "everything in the log, unchanged");
    for event in [&published[0], &published[2]] {
        assert_eq!(event.data, "{ \"b\": 1, \"a\":2}");
        assert_eq!(event.type_name, "endpoint.not-invented-yet");
        assert_eq!(event.type_version, 7);
    }
}

#[tokio::test]
async fn unknown_fields_are_published_with_their_event() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let bus = ScriptedBus::new();
    write(&store, 2).await;
    let newer = "UPDATE events SET data = '{ \"notInvented\": [1, 2.50] }' WHERE position = 2";
    execute(&folder, newer).await;
    let read = store.read_all(Position::START, 10).await.unwrap();
    assert_eq!(read.len(), 2, "it can still be read");
    let (relay, stop) = start(&store, &bus, "a", &HealthRegistry::default());
    assert_eq!(bus.wait_for_published(2).await, [1, 2]);
    stop.cancel();
    relay.await.unwrap();
    let published = bus.stored.lock().unwrap().clone();
    assert_eq!(published[1].data, "{ \"notInvented\": [1, 2.50] }");
}
