//! Conformance tests for every implementation of [`Bus`]; each test gets its own bus. A bus may be
//! slow to start and may repeat messages, so the tests wait for what must arrive.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bus::{Bus, BusMessage, LocalBus, RouteMessage, SUBSCRIBER_QUEUE_MAX, Subscription};
use contract::ids::{Bucket, Position};
use contract::log::StreamName;
use support::{
    Reader, drain, endpoint, frame, next, next_route, record, route, route_of, wait_for_frames,
};

async fn buckets_are_assigned_before_any_record(bus: Arc<dyn Bus>) {
    for subscription in [Subscription::All, Subscription::Group("test")] {
        let mut subscriber = bus.subscribe_records(subscription);
        let mut assigned = BTreeSet::new();
        while assigned.len() < Bucket::of_endpoints().count() {
            match next(&mut subscriber).await {
                BusMessage::Assigned(buckets) => assigned.extend(buckets),
                other => panic!("{other:?} before all buckets were assigned"),
            }
        }
        assert_eq!(assigned, Bucket::of_endpoints().collect());
        bus.publish_records(&[record("iris", 1)]).await.unwrap();
        let BusMessage::Record(first) = next(&mut subscriber).await else {
            panic!("not a record")
        };
        assert_eq!(*first, *record("iris", 1));
    }
}

async fn every_group_gets_every_record_in_order_within_its_bucket(bus: Arc<dyn Bus>) {
    let subscriptions = [
        Subscription::Group("a"),
        Subscription::Group("b"),
        Subscription::All,
    ];
    let mut readers = Vec::new();
    for subscription in subscriptions {
        readers.push(Reader::join(&*bus, subscription).await);
    }
    let names = ["iris", "tulip", "rose"];
    for position in 1..=30 {
        let record = record(names[position as usize % 3], position);
        bus.publish_records(&[record]).await.unwrap();
    }
    for reader in &mut readers {
        reader.wait_for_records(30).await;
        let mut by_bucket: BTreeMap<Bucket, Vec<Position>> = BTreeMap::new();
        for record in reader.records.values() {
            let positions = by_bucket.entry(record.bucket).or_default();
            positions.push(record.position);
        }
        assert_eq!(by_bucket.values().map(Vec::len).sum::<usize>(), 30);
        assert!(reader.is_in_order, "a bucket's records came out of order");
    }
}

async fn global_records_reach_every_subscriber(bus: Arc<dyn Bus>) {
    let mut member = Reader::join(&*bus, Subscription::Group("a")).await;
    let mut all = Reader::join(&*bus, Subscription::All).await;
    let global = support::global_record(7);
    assert_eq!(global.stream, StreamName::access());
    // The global bucket is never announced, so there is no point after which its records must
    // arrive.
    for reader in [&mut member, &mut all] {
        while reader.records.is_empty() {
            bus.publish_records(std::slice::from_ref(&global))
                .await
                .unwrap();
            reader.receive_pending().await;
        }
        assert_eq!(reader.records[&Position(7)], global);
    }
}

async fn frames_reach_every_subscriber(bus: Arc<dyn Bus>) {
    let mut subscribers = [bus.subscribe_frames(), bus.subscribe_frames()];
    drop(bus.subscribe_frames());
    wait_for_frames(&*bus, &mut subscribers).await;
    bus.publish_frame(frame(1));
    bus.publish_frame(frame(2));
    for subscriber in &mut subscribers {
        for sequence in [1, 2] {
            let mut received = next(subscriber).await;
            while received.sequence > 1000 {
                received = next(subscriber).await;
            }
            assert_eq!(*received, *frame(sequence));
        }
    }
    assert_eq!(bus.dropped(), 0, "a dropped subscriber is not a slow one");
}

async fn a_new_subscriber_gets_the_newest_route_of_each_endpoint_and_then_updates(
    bus: Arc<dyn Bus>,
) {
    let mut early = bus.subscribe_routes();
    for (name, revision) in [("iris", 1), ("rose", 2), ("iris", 3)] {
        bus.publish_route(route(name, revision));
    }
    while next_route(&mut early).await.revision < Position(3) {}
    bus.mark_routes_complete();
    let mut subscriber = bus.subscribe_routes();
    let updates = [
        next_route(&mut subscriber).await,
        next_route(&mut subscriber).await,
    ];
    let updates = updates.map(|update| (update.endpoint.clone(), update.revision.0));
    assert_eq!(updates, [(endpoint("iris"), 3), (endpoint("rose"), 2)]);
    let message = next(&mut subscriber).await;
    assert!(matches!(message, RouteMessage::CaughtUp), "{message:?}");
    bus.publish_route(route("rose", 4));
    let update = next_route(&mut subscriber).await;
    assert_eq!(*update, *route("rose", 4));
}

async fn a_route_arrives_unchanged_and_so_does_its_removal(bus: Arc<dyn Bus>) {
    let mut subscriber = bus.subscribe_routes();
    bus.publish_route(route_of("iris", 1));
    assert_eq!(*next_route(&mut subscriber).await, *route_of("iris", 1));
    bus.publish_route(route("iris", 2));
    assert_eq!(*next_route(&mut subscriber).await, *route("iris", 2));
}

async fn an_older_route_does_not_replace_a_newer_one(bus: Arc<dyn Bus>) {
    let mut early = bus.subscribe_routes();
    bus.publish_route(route("iris", 5));
    assert_eq!(next_route(&mut early).await.revision, Position(5));
    bus.publish_route(route("iris", 4));
    // A repeat changes nothing, but repairs a gateway that missed the update.
    bus.publish_route(route("iris", 5));
    assert_eq!(next_route(&mut early).await.revision, Position(5));
    let mut subscriber = bus.subscribe_routes();
    assert_eq!(next_route(&mut subscriber).await.revision, Position(5));
}

async fn a_closed_bus_ends_its_subscriptions(bus: Arc<dyn Bus>) {
    let mut records = Reader::join(&*bus, Subscription::Group("a")).await;
    let (mut frames, mut routes) = (bus.subscribe_frames(), bus.subscribe_routes());
    bus.close().await;
    records.wait_until_closed().await;
    support::expect_closed(&mut frames).await;
    support::expect_closed(&mut routes).await;
}

/// The local bus delivers at once, so more can be asserted.
#[tokio::test]
async fn a_slow_subscriber_loses_counted_messages_and_blocks_nobody() {
    let bus = LocalBus::new();
    let _slow = bus.subscribe_frames();
    for sequence in 0..SUBSCRIBER_QUEUE_MAX as u64 {
        bus.publish_frame(frame(sequence));
    }
    let mut fast = bus.subscribe_frames();
    assert_eq!(bus.dropped(), 0);
    for sequence in 0..10 {
        bus.publish_frame(frame(sequence));
    }
    assert_eq!(bus.dropped(), 10);
    assert_eq!(drain(&mut fast).len(), 10);
}

/// It retains no routes of earlier processes, so a gateway must wait for those of the log.
#[tokio::test]
async fn routes_have_caught_up_once_those_of_the_log_are_published() {
    let bus = LocalBus::new();
    let mut routes = bus.subscribe_routes();
    bus.publish_route(route("iris", 1));
    bus.mark_routes_complete();
    bus.publish_route(route("rose", 2));
    bus.mark_routes_complete();
    let received = drain(&mut routes);
    let is_update = |message: &RouteMessage| matches!(message, RouteMessage::Update(_));
    let is_update: Vec<bool> = received.iter().map(is_update).collect();
    assert_eq!(is_update, [true, false, true], "{received:?}");
}

macro_rules! suite {
    ($($name:ident)*) => {
        mod local {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::LocalBus::new()).await;
            })*
        }

        #[cfg(feature = "kafka")]
        mod kafka {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let Some(kafka) = servers::Kafka::shared() else { return };
                let bus = bus::open(&kafka.url(&kafka.prefix())).await.unwrap();
                super::$name(bus.clone()).await;
                bus.close().await;
            })*
        }
    };
}

suite! {
    buckets_are_assigned_before_any_record
    every_group_gets_every_record_in_order_within_its_bucket
    global_records_reach_every_subscriber
    frames_reach_every_subscriber
    a_new_subscriber_gets_the_newest_route_of_each_endpoint_and_then_updates
    a_route_arrives_unchanged_and_so_does_its_removal
    an_older_route_does_not_replace_a_newer_one
    a_closed_bus_ends_its_subscriptions
}
