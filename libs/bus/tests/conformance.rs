//! What every bus must do. Written against [`Bus`]; each part gets a bus of its own. A bus may be
//! slow to begin and may give a message twice, so the parts wait for what must come.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bus::{Bus, BusMessage, LocalBus, RouteMessage, SUBSCRIBER_QUEUE_MAX, Subscription};
use contract::ids::{Bucket, Position};
use contract::log::StreamName;
use support::{
    Reader, drain, endpoint, frame, frames_flow, next, next_route, record, route, route_of,
};

async fn a_subscriber_is_told_its_buckets_before_any_record(bus: Arc<dyn Bus>) {
    for subscription in [Subscription::Whole, Subscription::Group("test")] {
        let mut subscriber = bus.subscribe_records(subscription);
        let mut told = BTreeSet::new();
        while told.len() < Bucket::of_endpoints().count() {
            match next(&mut subscriber).await {
                BusMessage::Assigned(buckets) => told.extend(buckets),
                other => panic!("{other:?} before all buckets"),
            }
        }
        assert_eq!(told, Bucket::of_endpoints().collect());
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
        Subscription::Whole,
    ];
    let mut readers = Vec::new();
    for subscription in subscriptions {
        readers.push(Reader::joined(&*bus, subscription).await);
    }
    let names = ["iris", "tulip", "rose"];
    for position in 1..=30 {
        let record = record(names[position as usize % 3], position);
        bus.publish_records(&[record]).await.unwrap();
    }
    for reader in &mut readers {
        reader.until(30).await;
        let mut by_bucket: BTreeMap<Bucket, Vec<Position>> = BTreeMap::new();
        for record in reader.records.values() {
            let positions = by_bucket.entry(record.bucket).or_default();
            positions.push(record.position);
        }
        assert_eq!(by_bucket.values().map(Vec::len).sum::<usize>(), 30);
        assert!(reader.in_order, "a bucket's records came out of order");
    }
}

async fn what_belongs_to_no_endpoint_reaches_everybody(bus: Arc<dyn Bus>) {
    let mut member = Reader::joined(&*bus, Subscription::Group("a")).await;
    let mut whole = Reader::joined(&*bus, Subscription::Whole).await;
    let global = support::global_record(7);
    assert_eq!(global.stream, StreamName::access());
    // The global bucket is not told of, so there is no moment from which on it must come.
    for reader in [&mut member, &mut whole] {
        while reader.records.is_empty() {
            bus.publish_records(std::slice::from_ref(&global))
                .await
                .unwrap();
            reader.take_what_comes().await;
        }
        assert_eq!(reader.records[&Position(7)], global);
    }
}

async fn frames_reach_every_subscriber_there_is(bus: Arc<dyn Bus>) {
    let mut subscribers = [bus.subscribe_frames(), bus.subscribe_frames()];
    drop(bus.subscribe_frames());
    frames_flow(&*bus, &mut subscribers).await;
    bus.publish_frame(frame(1));
    bus.publish_frame(frame(2));
    for subscriber in &mut subscribers {
        for sequence in [1, 2] {
            let mut found = next(subscriber).await;
            while found.sequence > 1000 {
                found = next(subscriber).await;
            }
            assert_eq!(*found, *frame(sequence));
        }
    }
    assert_eq!(bus.dropped(), 0, "one that is gone is not a slow one");
}

async fn a_new_subscriber_gets_the_newest_route_of_each_endpoint_and_then_updates(
    bus: Arc<dyn Bus>,
) {
    let mut early = bus.subscribe_routes();
    for (name, revision) in [("iris", 1), ("rose", 2), ("iris", 3)] {
        bus.publish_route(route(name, revision));
    }
    while next_route(&mut early).await.revision < Position(3) {}
    let mut subscriber = bus.subscribe_routes();
    let seen = [
        next_route(&mut subscriber).await,
        next_route(&mut subscriber).await,
    ];
    let seen = seen.map(|update| (update.endpoint.clone(), update.revision.0));
    assert_eq!(seen, [(endpoint("iris"), 3), (endpoint("rose"), 2)]);
    let word = next(&mut subscriber).await;
    assert!(matches!(word, RouteMessage::CaughtUp), "{word:?}");
    bus.publish_route(route("rose", 4));
    let update = next_route(&mut subscriber).await;
    assert_eq!(*update, *route("rose", 4));
}

async fn a_route_arrives_whole_and_so_does_its_end(bus: Arc<dyn Bus>) {
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
    // The same again is no news for the log, but it heals a gateway that has missed it.
    bus.publish_route(route("iris", 5));
    assert_eq!(next_route(&mut early).await.revision, Position(5));
    let mut subscriber = bus.subscribe_routes();
    assert_eq!(next_route(&mut subscriber).await.revision, Position(5));
}

async fn a_closed_bus_ends_its_subscriptions(bus: Arc<dyn Bus>) {
    let mut records = Reader::joined(&*bus, Subscription::Group("a")).await;
    let (mut frames, mut routes) = (bus.subscribe_frames(), bus.subscribe_routes());
    bus.close().await;
    records.until_closed().await;
    support::closed(&mut frames).await;
    support::closed(&mut routes).await;
}

/// In one process nothing comes late, so more can be said.
#[tokio::test]
async fn a_slow_subscriber_loses_messages_that_are_counted_and_holds_nobody_up() {
    let bus = LocalBus::new();
    let _slow = bus.subscribe_frames();
    for sequence in 0..SUBSCRIBER_QUEUE_MAX as u64 {
        bus.publish_frame(frame(sequence));
    }
    let mut quick = bus.subscribe_frames();
    assert_eq!(bus.dropped(), 0);
    for sequence in 0..10 {
        bus.publish_frame(frame(sequence));
    }
    assert_eq!(bus.dropped(), 10);
    assert_eq!(drain(&mut quick).len(), 10);
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
    a_subscriber_is_told_its_buckets_before_any_record
    every_group_gets_every_record_in_order_within_its_bucket
    what_belongs_to_no_endpoint_reaches_everybody
    frames_reach_every_subscriber_there_is
    a_new_subscriber_gets_the_newest_route_of_each_endpoint_and_then_updates
    a_route_arrives_whole_and_so_does_its_end
    an_older_route_does_not_replace_a_newer_one
    a_closed_bus_ends_its_subscriptions
}
