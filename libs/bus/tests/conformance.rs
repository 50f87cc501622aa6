//! What every bus must do. Written against [`Bus`]; each part gets a bus of its own.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bus::{Bus, BusMessage, LocalBus, SUBSCRIBER_QUEUE_MAX, Subscription};
use contract::events::{Empty, Event};
use contract::frame::{Frame, Source, SourceKind};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Actor, Record, StreamKind, StreamName};
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use tokio::sync::mpsc::Receiver;
use uuid::Uuid;

fn endpoint(name: &str) -> EndpointKey {
    EndpointKey::new(&name.parse().unwrap())
}

fn record(name: &str, position: u64) -> Arc<Record> {
    let endpoint = endpoint(name);
    Arc::new(Record {
        position: Position(position),
        prev: Position::START,
        bucket: endpoint.bucket(),
        stream: StreamName::of(StreamKind::Endpoint, &endpoint),
        version: position,
        id: Uuid::from_u128(u128::from(position)),
        time: Timestamp::from_secs(1),
        actor: Actor::service("test"),
        event: Event::EndpointDeletionRequested(Empty {}),
    })
}

fn frame(sequence: u64) -> Arc<Frame> {
    Arc::new(Frame {
        source: Source {
            kind: SourceKind::Gateway,
            id: "g1".to_owned(),
        },
        boot: Uuid::nil(),
        sequence,
        bucket: Bucket(0),
        start: Timestamp::from_secs(sequence as i64),
        length_us: 1_000_000,
        routes: Default::default(),
        members: Default::default(),
        hello: None,
        goodbye: false,
        deployments: Vec::new(),
    })
}

fn route(name: &str, revision: u64) -> Arc<RouteUpdate> {
    Arc::new(RouteUpdate {
        endpoint: endpoint(name),
        revision: Position(revision),
        members: Position::START,
        route: None,
    })
}

/// Takes what is there; parts that publish and then take find everything there.
fn drain<T>(receiver: &mut Receiver<T>) -> Vec<T> {
    std::iter::from_fn(|| receiver.try_recv().ok()).collect()
}

fn positions(messages: &[BusMessage]) -> Vec<u64> {
    messages
        .iter()
        .filter_map(|message| match message {
            BusMessage::Record(record) => Some(record.position.0),
            _ => None,
        })
        .collect()
}

async fn a_subscriber_is_told_its_buckets_before_any_record(bus: Arc<dyn Bus>) {
    let mut subscriber = bus.subscribe_records(Subscription::Group("test"));
    bus.publish_records(&[record("iris", 1)]).await.unwrap();
    let messages = drain(&mut subscriber);
    let BusMessage::Assigned(buckets) = &messages[0] else {
        panic!("{messages:?}")
    };
    let all: BTreeSet<Bucket> = Bucket::of_endpoints().collect();
    assert_eq!(buckets.iter().copied().collect::<BTreeSet<_>>(), all);
    assert_eq!(positions(&messages), [1]);
}

async fn every_group_gets_every_record_in_order_within_its_bucket(bus: Arc<dyn Bus>) {
    let mut groups = [
        bus.subscribe_records(Subscription::Group("a")),
        bus.subscribe_records(Subscription::Group("b")),
    ];
    let names = ["iris", "tulip", "rose"];
    for position in 1..=30 {
        bus.publish_records(&[record(names[position as usize % 3], position)])
            .await
            .unwrap();
    }
    for group in &mut groups {
        let mut by_bucket: BTreeMap<Bucket, Vec<Position>> = BTreeMap::new();
        for message in drain(group) {
            if let BusMessage::Record(record) = message {
                let positions = by_bucket.entry(record.bucket).or_default();
                positions.push(record.position);
            }
        }
        assert_eq!(by_bucket.values().map(Vec::len).sum::<usize>(), 30);
        assert!(by_bucket.values().all(|positions| positions.is_sorted()));
    }
}

async fn a_slow_subscriber_loses_messages_that_are_counted_and_holds_nobody_up(bus: Arc<dyn Bus>) {
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

async fn frames_reach_every_subscriber_there_is(bus: Arc<dyn Bus>) {
    bus.publish_frame(frame(0));
    let mut subscribers = [bus.subscribe_frames(), bus.subscribe_frames()];
    drop(bus.subscribe_frames());
    bus.publish_frame(frame(1));
    bus.publish_frame(frame(2));
    for subscriber in &mut subscribers {
        let sequences: Vec<u64> = drain(subscriber).iter().map(|f| f.sequence).collect();
        assert_eq!(sequences, [1, 2]);
    }
    assert_eq!(bus.dropped(), 0, "one that is gone is not a slow one");
}

async fn a_new_subscriber_gets_the_newest_route_of_each_endpoint_and_then_updates(
    bus: Arc<dyn Bus>,
) {
    for (name, revision) in [("iris", 1), ("rose", 2), ("iris", 3)] {
        bus.publish_route(route(name, revision));
    }
    let mut subscriber = bus.subscribe_routes();
    bus.publish_route(route("rose", 4));
    let seen: Vec<(String, u64)> = drain(&mut subscriber)
        .iter()
        .map(|update| (update.endpoint.endpoint().to_string(), update.revision.0))
        .collect();
    let expected = [("iris", 3), ("rose", 2), ("rose", 4)];
    assert_eq!(
        seen,
        expected.map(|(name, revision)| (name.to_owned(), revision))
    );
}

async fn an_older_route_does_not_replace_a_newer_one(bus: Arc<dyn Bus>) {
    bus.publish_route(route("iris", 5));
    bus.publish_route(route("iris", 4));
    let mut subscriber = bus.subscribe_routes();
    let kept = drain(&mut subscriber);
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].revision, Position(5));
    // The same again is no news for the log, but it heals a gateway that has missed it.
    bus.publish_route(route("iris", 5));
    assert_eq!(drain(&mut subscriber).len(), 1);
}

macro_rules! suite {
    ($bus:expr; $($name:ident)*) => {
        $(#[tokio::test]
        async fn $name() {
            super::$name($bus).await;
        })*
    };
}

mod local {
    use super::LocalBus;

    suite! { LocalBus::new();
        a_subscriber_is_told_its_buckets_before_any_record
        every_group_gets_every_record_in_order_within_its_bucket
        a_slow_subscriber_loses_messages_that_are_counted_and_holds_nobody_up
        frames_reach_every_subscriber_there_is
        a_new_subscriber_gets_the_newest_route_of_each_endpoint_and_then_updates
        an_older_route_does_not_replace_a_newer_one
    }
}
